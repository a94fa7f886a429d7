"""The rewards `rouge` and `slot` straight from token ids, on the device that holds them: at a GPU's speed, making strings
would be the bottleneck.

The values equal `data.rewards.rouge` and `slot` of the decoded texts. ROUGE: words are cut as rouge-score cuts them, lower
case and [a-z0-9]+; a word is the hash of its letters, wherever the tokens begin and end (a collision of two 64-bit hashes
would go unseen). Slots: the patterns of data/rewards.py as one table, every text at once. Left out: BLEU, rewards of the
user, and sources with slot values that the patterns lack, such as names put back; those need strings.
"""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from data.characters import Characters, characters_of, every_character
from data.rewards import BARRED, IN_WORDS, KNOWN, LEXICON, MOST_MENTIONS, SLOTS, parse_slots
from data.tokenizer import Tokenizer
from data.transducer import OTHER, build, kind_of

# ---- ROUGE -----------------------------------------------------------------------------------------------------------

BASE = -0x61C8864680B583EB          # a word's hash is a polynomial in this odd number, modulo 2^64
PAIR_BASE = 0x2545F4914F6CDD1D      # makes one hash of two words
TABLE = 1 << 24                     # cells of a table of words by words at a time


def cut(characters: torch.Tensor) -> torch.Tensor:
    """Lower-case characters (N,L) -> a hash for each word (N,W), 0 behind the last one."""
    digit, small = (characters >= 48) & (characters < 58), (characters >= 97) & (characters < 123)
    letter = digit | small                      # (N,L)
    starts = letter & ~F.pad(letter, (1, 0))[:, :-1]
    word = starts.cumsum(1)                     # 1 for the letters of the first word, …
    column = torch.arange(letter.size(1), device=letter.device)
    depth = column - torch.where(starts, column, 0).cummax(1).values  # how far inside its word a letter stands
    powers = torch.full_like(column, BASE).cumprod(0)  # integers overflow as they should
    worth = torch.where(letter, characters * powers[depth], 0)
    W = max(1, int(word.amax()))                # waits for the device
    hashes = worth.new_zeros(len(word), W + 1).scatter_add(1, word, worth)[:, 1:]
    there = torch.arange(1, W + 1, device=word.device) <= word.amax(1, keepdim=True)
    return torch.where(there & (hashes == 0), 1, hashes)


def rouge_ids(characters: torch.Tensor, references: list[list[str]]) -> torch.Tensor:
    """F1 of ROUGE-1, 2 and L, each the best over the references: characters (R,K,L), R lists -> float64 (R,K,3)."""
    R, K, _ = characters.shape
    hyp = cut(characters.flatten(0, 1)).view(R, K, -1)
    ref = cut(characters_of([text for some in references for text in some])).to(hyp.device)  # known here: no need to wait
    row = torch.tensor([r for r, some in enumerate(references) for _ in some], device=hyp.device)
    size = max(1, TABLE // (K * hyp.size(2) * max(hyp.size(2), ref.size(1))))
    scores = [pairs(hyp[row[at:at + size]].flatten(0, 1), ref[at:at + size].repeat_interleave(K, 0))
              for at in range(0, len(row), size)]
    scores = torch.cat(scores).view(-1, K, 3)
    return scores.new_zeros(R, K, 3).scatter_reduce(0, row[:, None, None].expand_as(scores), scores, "amax")


def overlap(hyp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Clipped matches (P,) of words (P,H) and (P,R): the n-th of a word counts if the reference has it n times."""
    nth = (hyp[:, :, None] == hyp[:, None]).tril().sum(2)
    held = (hyp[:, :, None] == ref[:, None]).sum(2)
    return ((hyp != 0) & (nth <= held)).sum(1)


def lcs(hyp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Longest common subsequence (P,) of words (P,H) and (P,R): the usual table, a row at a time; going right in it is a
    running maximum."""
    row = torch.zeros(ref.size(0), ref.size(1) + 1, dtype=torch.int16, device=ref.device)
    for word in hyp.T:
        equal = (ref == word[:, None]) & (word != 0)[:, None]
        row = torch.cat([row[:, :1], torch.maximum(row[:, 1:], row[:, :-1] + equal)], 1).cummax(1).values
    return row[:, -1].long()


def bigrams(words: torch.Tensor) -> torch.Tensor:
    """Words (P,W) -> hashes of neighbours (P,W-1), 0 where there are none."""
    pair = words[:, :-1] * PAIR_BASE + words[:, 1:]
    return torch.where(words[:, 1:] != 0, torch.where(pair == 0, 1, pair), 0)


def pairs(hyp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """F1 of ROUGE-1, 2 and L of P pairs of texts, words (P,H) and (P,R) -> float64 (P,3)."""
    hits = torch.stack([overlap(hyp, ref), overlap(bigrams(hyp), bigrams(ref)), lcs(hyp, ref)], 1)
    h_len, r_len = (hyp != 0).sum(1), (ref != 0).sum(1)
    both, both2 = h_len + r_len, (h_len - 1).clamp(min=0) + (r_len - 1).clamp(min=0)
    return 2 * hits.double() / torch.stack([both, both2, both], 1).clamp(min=1)


# ---- Slots -----------------------------------------------------------------------------------------------------------

PAIRS = list(dict.fromkeys(row[:2] for row in LEXICON))  # P slots with a value each
SLOT_OF = [SLOTS.index(slot) for slot, _ in PAIRS]
RESTAURANT = PAIRS.index(("eatType", "restaurant"))
ALIAS = {"-": " ", "’": "'"}


@lru_cache(maxsize=1 << 12)
def expected(source: str) -> np.ndarray | None:
    """bool (2,P): the pairs that say a source's slots, and those that do no harm; None where a value is no known one."""
    slots, row = parse_slots(source), np.zeros((2, len(PAIRS)), bool)
    if not KNOWN.issuperset(slots.items()):
        return None
    for slot, value in slots.items():
        for name in {value, IN_WORDS.get(value, value)}:
            row[:, PAIRS.index((slot, name))] = True
    row[1, RESTAURANT] = True  # any place may be called that
    return row


@lru_cache
def slot_tables(device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The patterns of all slots, which take a second to build: the kind of every character; then, for state + kind, the next
    state and which row of counts is found; the counts of pairs (rows,P); and the kind to read behind a text. A state is a
    multiple of the number of kinds."""
    machine = build([pattern for _, _, pattern in LEXICON], BARRED)
    kind = every_character(lambda c: kind_of(ALIAS.get(c, c), machine.kinds), device)
    pairs = np.zeros((len(LEXICON), len(PAIRS)), int)
    pairs[np.arange(len(LEXICON)), [PAIRS.index(row[:2]) for row in LEXICON]] = 1
    arrays = machine.next.flatten() * len(machine.kinds), machine.found.flatten(), (machine.counts @ pairs).astype(np.int32)
    return kind, *(torch.from_numpy(array).to(device) for array in arrays), machine.kinds[OTHER]


def mentions(characters: torch.Tensor) -> torch.Tensor:
    """Characters (N,L) -> how often each pair is mentioned, (N,P)."""
    kind, following, found, counts, other = slot_tables(characters.device)
    state = torch.zeros(len(characters), dtype=torch.int64, device=characters.device)
    said = counts.new_zeros(len(characters), counts.size(1))
    for column in F.pad(kind[characters], (0, 1), value=other).T.contiguous():  # one behind the text sees its end
        at = state + column
        said += counts[found[at]]
        state = following[at]
    return said


def slot_ids(characters: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
    """Slot accuracy: characters (R,K,L), R sources -> float64 (R,K), or None where a source has a value that the patterns lack.
    Raises InputError for a source that is no meaning representation."""
    rows = [expected(source) for source in sources]
    if any(row is None for row in rows):
        return None
    says, harmless = torch.from_numpy(np.stack(rows, 1)).to(characters.device)[:, :, None]  # (R,1,P) each
    said = mentions(characters.flatten(0, 1)).view(*characters.shape[:2], -1)  # (R,K,P)
    slot_of = torch.tensor(SLOT_OF, device=said.device).expand_as(said)

    def most(counts):  # of every slot's values: (R,K,P) -> (R,K,8)
        return counts.new_zeros(*said.shape[:2], len(SLOTS)).scatter_reduce(2, slot_of, counts, "amax")
    often, asked = most(said * says), most(says.expand_as(said).to(said.dtype)) > 0
    limit = torch.tensor([said.numel() if slot == "name" else MOST_MENTIONS for slot in SLOTS], device=said.device)
    wrong = (most(said * ~harmless) > 0) | asked & ((often == 0) | (often > limit))
    return (1 - wrong.sum(2) / asked.sum(2).double()).clamp(min=0)


# ---- Both ------------------------------------------------------------------------------------------------------------

class RewardIds:
    """Scores the token ids of one tokenizer on one device."""

    def __init__(self, tok: Tokenizer, device):
        self.characters = Characters(tok, device)

    def __call__(self, names, tokens: torch.Tensor, references: list[list[str]], sources: list[str]) -> dict[str, torch.Tensor]:
        """Those of the named rewards that need no strings: ids (R,K,T), PAD behind EOS, R lists of references and R sources
        -> name: float64 (R,K)."""
        values = {}
        if {"rouge", "slot"} & set(names):
            characters = self.characters(tokens)
            if "rouge" in names:
                values["rouge"] = sum(rouge_ids(characters, references).unbind(2)) / 3  # as numpy does it, to the last digit
            if "slot" in names and (accuracy := slot_ids(characters, sources)) is not None:
                values["slot"] = accuracy
        return values
