"""Rewards and metrics: ROUGE, BLEU and chrF, and the functions that users write.

A reward is any function (hypotheses, references, sources) -> N numbers in 0..1; `load_reward`
makes one from the words after --reward. `rouge`, `bleu` and `chrf` are the metrics of the same
names, equal to the packages rouge-score and sacrebleu. Left out on purpose: stemming, other
tokenizers than 13a, lower-cased BLEU, ROUGE-Lsum, chrF with word n-grams.
"""
import importlib
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np

from data import InputError
from data.e2e import slot

Reward = Callable[[list[str], list[list[str]], list[str]], Iterable[float]]


class RewardError(Exception):
    """The user's reward module or function raised `__cause__`, which has its traceback."""


def _check_references(hypotheses: list[str], references: list[list[str]]) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    if not all(references) or any(isinstance(refs, str) for refs in references):
        raise ValueError("expected a list of at least one reference for every hypothesis")


def _number(items: list) -> tuple[np.ndarray, list]:
    """Items -> a number for each, equal for equal items (N,), and the distinct items by number."""
    number = defaultdict(count().__next__)  # the next number for an item that is new
    numbers = np.fromiter(map(number.__getitem__, items), np.int32, len(items))
    return numbers, list(number)


def _occurrences(grams: list[str]) -> set[str]:
    """The distinct n-grams; the second occurrence of `ab` is `ab 2`, and so on.

    So the clipped number of matches of two texts is the size of an intersection, which needs no
    loop in Python."""
    occurrences = set(grams)
    if len(occurrences) < len(grams):
        for gram, times in Counter(grams).items():
            if times > 1:
                occurrences.update([f"{gram} {k}" for k in range(2, times + 1)])
    return occurrences


# -------------------------------------------------------------------------------------------------
# ROUGE (Lin 2004)
#
# A reward that runs thousands of times per update must not loop over words in Python. So all pairs
# of a hypothesis and a reference are scored at once, and the loop runs over the *positions* of
# hypothesis words, at most about a hundred. For each pair and each hypothesis word h, `bits` holds
# one bit for each reference word r: 1 if the two words are equal. Take the hypothesis
# `the cat the` and the reference `the cat sat` (bit 0, the lowest, belongs to the first word):
#
#     h = 0  the  001        ROUGE-1: each word of the hypothesis uses up the lowest bit that is
#     h = 1  cat  010        still free: `the` bit 0, `cat` bit 1, the second `the` finds none.
#     h = 2  the  001        Two hits; that is the clipped count of matches.
#
# ROUGE-2 does the same with bigrams: h and r are equal bigrams if bit r of word h and bit r + 1
# of word h + 1 are set. ROUGE-L keeps one row of the usual table of common subsequence lengths as
# bits too, and one addition of integers moves it on to the next row. A reference of more than
# 64 words takes W integers, lowest first.

_KEPT = "\0abcdefghijklmnopqrstuvwxyz0123456789"  # the rest of ASCII becomes a space
_ASCII_WORDS = bytes(c if chr(c) in _KEPT else 32 for c in range(256))
_CELLS = 1 << 19  # word-by-word comparisons at a time: the tables stay within the cache


def _cut(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words as rouge-score cuts them, [a-z0-9]+ of the lower case: one number for each word of all
    texts, and for each text the index of its first word and its number of words, (N,) each.

    All texts are cut as one, with a zero character after each."""
    if any("\0" in text for text in texts):
        texts = [text.replace("\0", " ") for text in texts]
    joined = " \0 ".join([*texts, ""]).lower()
    words = joined.encode("ascii", "replace").translate(_ASCII_WORDS).split()
    ids, distinct = _number(words)
    ends = np.flatnonzero(ids == distinct.index(b"\0"))
    starts = np.append(0, ends[:-1] + 1)
    return ids, starts, ends - starts


def _rows(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Texts of `_cut` as rows (P,W) of word numbers, padded with `fill`."""
    columns = np.arange(max(1, lengths.max()))
    padded = ids.take(starts[:, None] + columns, mode="clip")
    return np.where(columns < lengths[:, None], padded, fill)


def _match_bits(hyp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Word numbers (P,H) and (P,R) -> bits, uint64 (H,W,P): is word h equal to word r?"""
    packed = np.packbits(hyp[:, :, None] == ref[:, None], axis=2, bitorder="little")
    whole = np.zeros((*hyp.shape, -(-ref.shape[1] // 64) * 8), np.uint8)  # W times 8 bytes
    whole[:, :, :packed.shape[2]] = packed
    return np.ascontiguousarray(whole.view("<u8").transpose(1, 2, 0))


def _bigram_bits(bits: np.ndarray) -> np.ndarray:
    """The same for bigrams (H-1,W,P): word h is at r, and word h + 1 at r + 1."""
    next_word = bits[1:] >> 1
    next_word[:, :-1] |= bits[1:, 1:] << 63  # the lowest bit of the integer above
    return bits[:-1] & next_word


def _overlap(bits: np.ndarray) -> np.ndarray:
    """Clipped matches (P,): each n-gram of the hypothesis uses up the first equal n-gram of the
    reference that is still free."""
    free = np.full(bits.shape[1:], ~np.uint64(0))
    for row in bits:
        found = False
        for w, equal in enumerate(row):
            usable = equal & free[w]
            lowest = usable & (~usable + 1)  # its lowest bit alone
            if w:
                lowest[found] = 0
            free[w] ^= lowest
            found |= lowest > 0
    return np.bitwise_count(~free).sum(0, np.int32)


def _lcs(bits: np.ndarray) -> np.ndarray:
    """Length of the longest common subsequence (P,): the bit-parallel recurrence of Hyyrö (2004).

    Row h of the usual table, L(h, r) = the length for the first h and r words, grows by 0 or 1
    from r to r + 1. Bit r of `flat` says that it grows by 0. A new row lets the growth move to the
    first match at or before it; in integers that is flat = (flat + (flat & match)) | (flat &
    ~match): the addition's carry runs through the flat stretch up to where the old row grows."""
    flat = np.full(bits.shape[1:], ~np.uint64(0))
    for row in bits:
        carry = np.uint64(0)
        for w, match in enumerate(row):  # one addition of integers that are W words long
            hits = flat[w] & match
            part = flat[w] + hits
            total = part + carry
            carry = (part < hits) | (total < part)  # the sum wrapped around
            flat[w] = total | (flat[w] & ~match)
    return np.bitwise_count(~flat).sum(0, np.int32)


def _rouge_pairs(ids: np.ndarray, hyps: tuple, refs: tuple) -> np.ndarray:
    """F1 of ROUGE-1/2/L (P,3) of P pairs of texts, given as (starts, lengths) in `ids`."""
    (_, hyp_words), (_, ref_words) = hyps, refs
    bits = _match_bits(_rows(ids, *hyps, -1), _rows(ids, *refs, -2))  # fills equal no word
    hits = np.stack([_overlap(bits), _overlap(_bigram_bits(bits)), _lcs(bits)], 1)
    fewer = np.array([0, 1, 0])  # a text has one bigram fewer than words
    total = np.maximum(hyp_words[:, None] - fewer, 0) + np.maximum(ref_words[:, None] - fewer, 0)
    return 2 * hits / np.maximum(total, 1)  # 2pr / (p + r) with p = hits / hyp, r = hits / ref


def rouge(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, each the best over a hypothesis' references: float64
    (N,3), in 0..1.

    Equal to rouge-score's `score_multi` without stemmer. Raises ValueError when the lists differ in
    length or a hypothesis has no list of references."""
    _check_references(hypotheses, references)
    if not hypotheses:
        return np.zeros((0, 3))
    numbers, texts = _number([*hypotheses, *chain.from_iterable(references)])
    counts = np.array([len(refs) for refs in references])
    hyp, ref = numbers[:len(hypotheses)].repeat(counts), numbers[len(hypotheses):]
    ids, starts, lengths = _cut(texts)
    size = np.maximum(1, np.maximum(lengths[hyp], lengths[ref]))
    order = np.argsort(-size, kind="stable")  # similar lengths side by side, longest first
    scores, done = np.empty((len(order), 3)), 0
    while done < len(order):
        part = order[done:done + max(1, _CELLS // int(size[order[done]]) ** 2)]
        h, r = hyp[part], ref[part]
        scores[part] = _rouge_pairs(ids, (starts[h], lengths[h]), (starts[r], lengths[r]))
        done += len(part)
    return np.maximum.reduceat(scores, counts.cumsum() - counts)


# -------------------------------------------------------------------------------------------------
# BLEU (Papineni et al. 2002, as sacrebleu computes it: Post 2018)

_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_SPLITS = [(re.compile(pattern), into) for pattern, into in (
    (r"([!-&(-+:-@\[-`{-~/])", r" \1 "),  # ASCII punctuation but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),  # point and comma stay inside numbers
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "))]  # a dash is cut off the number before it


def _tokens_13a(text: str) -> list[str]:
    """Tokens of mteval-v13a, the WMT scorer's tokenizer."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, into in _SPLITS:
        text = pattern.sub(into, text)
    return text.split()


@lru_cache(maxsize=1 << 14)
def _word_ngrams(text: str) -> list[set[str]]:
    """The n-grams of a text's tokens, one set of `_occurrences` for each n = 1..4."""
    tokens = _tokens_13a(text)
    grams = [tokens]
    for n in (1, 2, 3):
        grams.append([f"{gram} {word}" for gram, word in zip(grams[-1], tokens[n:])])
    return list(map(_occurrences, grams))


def _bleu_counts(hypothesis: str, references: list[str]) -> np.ndarray:
    """(10,): length, closest reference length, matches of 1..4-grams, their totals."""
    grams, allowed = _word_ngrams(hypothesis), [_word_ngrams(text) for text in references]
    length = len(grams[0])
    matches = [len(own & set().union(*others)) for own, others in zip(grams, zip(*allowed))]
    lengths = sorted(len(words) for words, *_ in allowed)
    closest = min(lengths, key=lambda other: abs(other - length))  # the shorter one wins a tie
    return np.array([length, closest, *matches, *map(len, grams)])


def _bleu_score(counts: np.ndarray, effective_order: bool) -> float:
    """BLEU in 0..1 of the counts above, or of their sum over a corpus.

    A precision of 0 becomes 1/(2·total), the next 1/(4·total), … ("exp" smoothing). With
    `effective_order`, orders that a short text does not reach are left out of the mean; without,
    they make the score 0."""
    length, closest, matches, totals = counts[0], counts[1], counts[2:6], counts[6:]
    if not matches.any() or not (effective_order or totals.all()):
        return 0.0
    logs, zeros = [], 0
    for hits, total in zip(matches[totals > 0], totals[totals > 0]):
        zeros += hits == 0
        logs.append(math.log((hits or 0.5 ** zeros) / total))
    return math.exp(min(0.0, 1 - closest / length) + sum(logs) / len(logs))


def bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 in 0..100, equal to sacrebleu's default `corpus_bleu` (13a tokens, exp
    smoothing, case kept); 0 for no hypotheses. Raises as `rouge` does."""
    _check_references(hypotheses, references)
    counts = sum(map(_bleu_counts, hypotheses, references), np.zeros(10, int))
    return 100 * _bleu_score(counts, effective_order=False)


def sentence_bleu(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """BLEU-4 of each text alone, float64 (N,) in 0..1: sacrebleu's `sentence_bleu` / 100. Raises
    as `rouge` does."""
    _check_references(hypotheses, references)
    scores = [_bleu_score(_bleu_counts(hypothesis, refs), effective_order=True)
              for hypothesis, refs in zip(hypotheses, references)]
    return np.array(scores, float)


# -------------------------------------------------------------------------------------------------
# chrF (Popović 2015, as sacrebleu computes it): for every script, since it needs no words

_BETA = 2  # recall counts for twice as much as precision


def _character_ngrams(text: str) -> list[set[str]]:
    """The n-grams of a text without white space, one set of `_occurrences` for each n = 1..6."""
    text = "".join(text.split())
    return [_occurrences([text[i:i + n] for i in range(len(text) - n + 1)]) for n in range(1, 7)]


_reference_sets = lru_cache(maxsize=1 << 8)(_character_ngrams)  # 100 KB for 130 characters


def _chrf_score(hypothesis: list[set[str]], reference: list[set[str]]) -> float:
    precisions, recalls = [], []
    for grams, allowed in zip(hypothesis, reference):
        if grams and allowed:  # else the order is longer than one of the texts
            matches = len(grams & allowed)
            precisions.append(matches / len(grams))
            recalls.append(matches / len(allowed))
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + _BETA ** 2) * p * r / (_BETA ** 2 * p + r)


def chrf(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """Character n-gram F-score, the best over a hypothesis' references: float64 (N,) in 0..1.

    Equal to sacrebleu's `sentence_chrf` / 100 with its default settings: 1- to 6-grams without
    white space, case kept, means of precision and recall over the orders that both texts reach.
    Raises as `rouge` does."""
    _check_references(hypotheses, references)
    scores = []
    for hypothesis, refs in zip(hypotheses, references):
        grams = _character_ngrams(hypothesis)
        scores.append(max(_chrf_score(grams, _reference_sets(ref)) for ref in refs))
    return np.array(scores, float)


# -------------------------------------------------------------------------------------------------
# Rewards by name

BUILT_IN: dict[str, Reward] = {
    "rouge": lambda hypotheses, references, sources: rouge(hypotheses, references).mean(1),
    "bleu": lambda hypotheses, references, sources: sentence_bleu(hypotheses, references),
    "chrf": lambda hypotheses, references, sources: chrf(hypotheses, references),
    "slot": slot,
}
_OURS = {"data", "lab", "model", "sorl", "theory", "train"}  # modules of this project


def load_reward(spec: str) -> Callable[[list[str], list[list[str]], list[str]], np.ndarray]:
    """The reward that `spec` names: rouge (the mean of its three columns), bleu (of each text),
    chrf, slot, or module:function; the mean of several that are joined by +.

    The result maps (hypotheses, references, sources) to float64 (N,) and scores equal cases once.
    Raises InputError when there is no such reward, or when it returns anything but N finite
    numbers in 0..1, and RewardError when the user's module or function raises."""
    parts = [(name, BUILT_IN.get(name) or _load_function(name)) for name in _names(spec)]

    def reward(hypotheses, references, sources):
        # Samples of one source repeat each other, the more so the more a policy has learned.
        cases = list(zip(hypotheses, map(tuple, references), sources, strict=True))
        numbers, distinct = _number(cases)
        columns = []
        for name, part in parts:
            texts = [text for text, _, _ in distinct]  # new lists: a reward may change its own
            refs = [list(refs) for _, refs, _ in distinct]
            values = part(texts, refs, [source for _, _, source in distinct])
            columns.append(_check_values(name, values, distinct))
        return np.mean(columns, axis=0)[numbers]

    return reward


def _load_function(name: str) -> Reward:
    """The user's module:function, from the current directory or else from an installed module."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"reward {name!r}: expected {', '.join(BUILT_IN)} or module:function")
    if sys.path[0] != os.getcwd():
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    with _users_code(name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists; what it imports does not
            module = None
    if module is None:
        raise InputError(f"reward {name!r}: no module {module_name!r} here or installed")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"reward {name!r}: {module} has no function {function_name!r}")
    return _users_code(name)(function)


@contextmanager
def _users_code(name: str):
    """What the user's code raises becomes the cause of a RewardError, whatever its type: their
    ConnectionError or SystemExit must not be taken for ours."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}") from error


def _check_values(name: str, values, cases: list[tuple]) -> np.ndarray:
    """What a reward returned, as float64 (n,). Raises InputError for anything but n numbers in
    0..1 that have an order: NumPy takes neither a set nor a dictionary for an array."""
    returned = f"reward {name!r} returned"
    expected = f"expected {len(cases)} finite numbers in 0..1, one for each hypothesis"
    kind = type(values).__name__
    try:
        array = np.asarray(values, np.float64)
    except Exception as error:  # words, a set, or a tensor that needs gradients or lies on a GPU
        reason = " ".join(str(error).split())
        raise InputError(f"{returned} {kind}: {expected}, as a list ({reason:.80})") from None
    if array.shape != (len(cases),):
        raise InputError(f"{returned} {kind} of shape {array.shape}: {expected}")
    bad = np.flatnonzero(~((array >= -1e-6) & (array <= 1 + 1e-6)))  # NaN compares false
    if len(bad):
        value, text = list(values)[bad[0]], cases[bad[0]][0]  # None is nan in the array
        raise InputError(f"{returned} {value} for the text {text!r:.60}: {expected}")
    return array.clip(0.0, 1.0)  # rounding may step over the ends


def _names(spec: str) -> list[str]:
    return [name.strip() for name in spec.split("+")]


# -------------------------------------------------------------------------------------------------
# What is known about a reward before it runs

def source_of(spec: str) -> bytes:
    """The code of the user's modules in a reward that `load_reward` has found, and of the modules
    that they have imported from the same folder; b"" for built-in rewards."""
    files = set()
    for name in set(_names(spec)) - BUILT_IN.keys():
        main = Path(sys.modules[name.partition(":")[0]].__file__)
        files.add(main)
        for name, module in list(sys.modules.items()):
            file = Path(getattr(module, "__file__", None) or "")
            installed = "site-packages" in file.parts or file.suffix != ".py"
            ours = name.split(".")[0] in {*_OURS, "__main__"}
            if main.parent in file.parents and not installed and not ours:
                files.add(file)
    return b"".join(file.read_bytes() for file in sorted(files))


def blind_to(spec: str, references: list[list[str]]) -> str | None:
    """One line on what ROUGE, if it is in the reward, cannot see in these references, or None.

    Of texts in Hindi, Thai or Chinese, or of emoji and signs, it sees little, so that training
    would learn nothing."""
    texts = list(chain.from_iterable(references))[:1000]
    letters = [c for text in texts for c in text if c.isalnum() or not c.isascii()]
    unread = sum(not c.isascii() for c in letters) / len(letters) if letters else 1.0
    if "rouge" not in _names(spec) or unread <= 0.5:
        return None
    return (f"the reward rouge reads only a to z and 0 to 9, and {unread:.0%} of the letters and "
            f"signs in the references are others; chrf reads every script")
