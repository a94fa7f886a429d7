"""ROUGE straight from token ids, on the device that holds them: at a GPU's speed, making strings would be the bottleneck.

The values equal `data.rewards.rouge` of the decoded texts, unless two 64-bit hashes collide or a text holds a Kelvin sign
(whose lower case is an ASCII k). Words are cut as rouge-score cuts them, lower case and [a-z0-9]+, out of the tokens'
bytes: a word is the hash of its letters, wherever the tokens begin and end. Tokens behind EOS must be PAD, as in every
rollout. Left out: slots and rewards of the user, which need strings.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
NOTHING = -1                        # no byte: a gap behind a short token
BASE = -0x61C8864680B583EB          # a word's hash is a polynomial in this odd number, modulo 2^64
PAIR_BASE = 0x2545F4914F6CDD1D      # makes one hash of two words
TABLE = 1 << 24                     # cells of a table of words by words at a time


class RougeIds:
    """Scores token ids of one tokenizer on one device."""

    def __init__(self, tok: Tokenizer, device):
        longest = max(map(len, tok.bytes))
        rows = [list(token) + [NOTHING] * (longest - len(token)) for token in tok.bytes]
        self.bytes = torch.tensor(rows, dtype=torch.int16, device=device)  # (V,longest); special tokens have none
        letter = [1 + LETTERS.find(chr(b).lower()) if b < 128 else 0 for b in range(256)] + [0]  # the last is NOTHING's
        self.letter = torch.tensor(letter, device=device)
        self.encode = lru_cache(maxsize=1 << 16)(tok.encode)

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (N,T), PAD behind EOS -> a hash for each word (N,W), 0 behind the last one."""
        raw = together(self.bytes[ids].flatten(1))  # (N,L)
        kind = self.letter[raw.long()]              # (N,L) 1..36, or 0 between words
        dotted = (raw[:, :-1] == 0xC4) & (raw[:, 1:] == 0xB0)  # a capital I with a dot is an i in lower case
        kind[:, :-1].masked_fill_(dotted, 1 + LETTERS.index("i"))
        letter = kind > 0
        starts = letter & ~F.pad(letter, (1, 0))[:, :-1]
        word = starts.cumsum(1)                     # 1 for the letters of the first word, …
        column = torch.arange(kind.size(1), device=ids.device)
        depth = column - torch.where(starts, column, 0).cummax(1).values  # how far inside its word a letter stands
        powers = torch.full_like(column, BASE).cumprod(0)  # integers overflow as they should
        worth = torch.where(letter, kind * powers[depth], 0)
        W = max(1, int(word.amax()))                # waits for the device
        hashes = worth.new_zeros(len(ids), W + 1).scatter_add(1, word, worth)[:, 1:]
        there = torch.arange(1, W + 1, device=ids.device) <= word.amax(1, keepdim=True)
        return torch.where(there & (hashes == 0), 1, hashes)

    def __call__(self, tokens: torch.Tensor, references: list[list[str]]) -> torch.Tensor:
        """F1 of ROUGE-1, 2 and L, each the best over the references: tokens (R,K,T), R lists -> float64 (R,K,3)."""
        R, K, _ = tokens.shape
        texts = list(dict.fromkeys(text for some in references for text in some))
        number = {text: i for i, text in enumerate(texts)}
        rows = [self.encode(text) for text in texts]
        width = 1 + max(map(len, rows))
        ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=tokens.device)  # -1: MASK, no bytes
        hyp, ref = self.words(tokens.flatten(0, 1)).view(R, K, -1), self.words(ids)
        row = torch.tensor([r for r, some in enumerate(references) for _ in some], device=tokens.device)
        which = torch.tensor([number[text] for some in references for text in some], device=tokens.device)
        size = max(1, TABLE // (K * hyp.size(2) * max(hyp.size(2), ref.size(1))))
        scores = [pairs(hyp[row[at:at + size]].flatten(0, 1), ref[which[at:at + size]].repeat_interleave(K, 0))
                  for at in range(0, len(row), size)]
        scores = torch.cat(scores).view(-1, K, 3)
        return scores.new_zeros(R, K, 3).scatter_reduce(0, row[:, None, None].expand_as(scores), scores, "amax")


def together(raw: torch.Tensor) -> torch.Tensor:
    """Move the bytes of every row to its left end, NOTHING behind them: (N,L) -> (N,L)."""
    there = raw != NOTHING
    place = torch.where(there, there.cumsum(1) - 1, raw.size(1))
    return raw.new_full((raw.size(0), raw.size(1) + 1), NOTHING).scatter(1, place, raw)[:, :-1]


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
