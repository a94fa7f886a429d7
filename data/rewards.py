"""Rewards and metrics: ROUGE, BLEU, and slot accuracy for restaurant descriptions.

A reward is any function (hypotheses, references, sources) -> N numbers in 0..1; `load_reward` makes one from what
people type after --reward. `rouge` and `bleu` are the metrics of the same names, equal to the packages rouge-score and
sacrebleu. Left out on purpose: stemming, other tokenizers than 13a, lower-cased BLEU, ROUGE-Lsum.
"""

import difflib
import importlib
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np

from data import InputError

Reward = Callable[[list[str], list[list[str]], list[str]], Iterable[float]]


# ---- ROUGE (Lin 2004) ------------------------------------------------------------------------------------------------

_LETTERS = bytes(c if chr(c) in "\0abcdefghijklmnopqrstuvwxyz0123456789" else 32 for c in range(256))
_CELLS = 1 << 19                        # word-by-word comparisons at a time: the tables stay within the cache


def _cut(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words as rouge-score cuts them, [a-z0-9]+ of the lower case: the ids of all words, and where in them each text begins
    and how many are its own (N,). All texts are cut as one, a zero behind each."""
    whole = " \0 ".join([*texts, ""])
    if whole.count("\0") > len(texts):                                  # texts that hold zeros themselves
        whole = " \0 ".join([*(text.replace("\0", " ") for text in texts), ""])
    words = whole.lower().encode("ascii", "replace").translate(_LETTERS).split()
    number = defaultdict(count().__next__)
    ids = np.fromiter(map(number.__getitem__, words), np.int32, len(words))
    ends = np.flatnonzero(ids == number[b"\0"])
    starts = np.append(0, ends[:-1] + 1)
    return ids, starts, ends - starts


def _table(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Texts of `_cut` as rows (P,W), `fill` behind them."""
    columns = np.arange(max(1, lengths.max()))
    return np.where(columns < lengths[:, None], ids.take(starts[:, None] + columns, mode="clip"), fill)


def _match_bits(hyp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Ids (P,H) and (P,R) -> uint64 (H,W,P): bit r of the W words says that hypothesis word h is reference word r."""
    packed = np.packbits(hyp[:, :, None] == ref[:, None], axis=2, bitorder="little")
    whole = np.zeros((*hyp.shape, -(-ref.shape[1] // 64) * 8), np.uint8)
    whole[:, :, : packed.shape[2]] = packed
    return np.ascontiguousarray(whole.view("<u8").transpose(1, 2, 0))


def _bigram_bits(bits: np.ndarray) -> np.ndarray:
    """The same for bigrams: word h at r, and the next word at r + 1."""
    after = bits[1:] >> 1
    after[:, :-1] |= bits[1:, 1:] << 63
    return bits[:-1] & after


def _overlap(bits: np.ndarray) -> np.ndarray:
    """Clipped n-gram matches (P,): every n-gram of the hypothesis takes one equal, still free one of the reference."""
    free = np.full(bits.shape[1:], ~np.uint64(0))
    for row in bits:
        spent = False
        for w, equal in enumerate(row):
            usable = equal & free[w]
            lowest = usable & (~usable + 1)
            if w:
                lowest[spent] = 0
            free[w] ^= lowest
            spent |= lowest > 0
    return np.bitwise_count(~free).sum(0, np.int32)


def _lcs(bits: np.ndarray) -> np.ndarray:
    """Longest common subsequence (P,): the bit-parallel recurrence of Hyyrö (2004), every pair at once. Bit r of
    `steps` turns 0 where the usual table of lengths steps up at reference word r."""
    steps = np.full(bits.shape[1:], ~np.uint64(0))
    for row in bits:
        carry = np.uint64(0)
        for w, equal in enumerate(row):                 # steps + (steps & equal), an addition W words long
            held = steps[w] & equal
            part = steps[w] + held
            total = part + carry
            carry = (part < held) | (total < part)
            steps[w] = total | (steps[w] & ~equal)
    return np.bitwise_count(~steps).sum(0, np.int32)


def _rouge_pairs(ids: np.ndarray, hyps: tuple[np.ndarray, np.ndarray], refs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """F1 of ROUGE-1/2/L (P,3) of P pairs of texts, (starts, lengths) each."""
    (_, h_len), (_, r_len) = hyps, refs
    bits = _match_bits(_table(ids, *hyps, -1), _table(ids, *refs, -2))                  # the fills equal no word
    hits = np.stack([_overlap(bits), _overlap(_bigram_bits(bits)), _lcs(bits)], 1)      # (P,3)
    shorter = np.array([0, 1, 0])                                                       # one bigram fewer than words
    grams = np.maximum(h_len[:, None] - shorter, 0) + np.maximum(r_len[:, None] - shorter, 0)
    return 2 * hits / np.maximum(grams, 1)              # 2pr / (p + r), p = hits/h, r = hits/r


def rouge(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, each the best over a hypothesis' references: float64 (N,3), in 0..1.

    Equal to rouge-score's `score_multi` without stemmer. Equal pairs of texts are scored once.
    Raises ValueError when the two lists differ in length or a hypothesis has no reference.
    """
    _check_references(hypotheses, references)
    if not hypotheses:
        return np.zeros((0, 3))
    number = defaultdict(count().__next__)                                              # of each text
    h, r = (np.array([*map(number.__getitem__, texts)]) for texts in (hypotheses, chain(*references)))
    many = np.array([len(texts) for texts in references])
    pairs, index = np.unique(h.repeat(many) * len(number) + r, return_inverse=True)
    h, r = np.divmod(pairs, len(number))
    ids, starts, lengths = _cut(list(number))
    size = np.maximum(1, np.maximum(lengths[h], lengths[r]))
    scores = np.empty((len(pairs), 3))
    order, done = np.argsort(-size, kind="stable"), 0                                   # similar lengths side by side
    while done < len(order):
        part = order[done : done + max(1, _CELLS // int(size[order[done]]) ** 2)]
        scores[part] = _rouge_pairs(ids, *((starts[texts[part]], lengths[texts[part]]) for texts in (h, r)))
        done += len(part)
    return np.maximum.reduceat(scores[index], many.cumsum() - many)


def _check_references(hypotheses: list[str], references: list[list[str]]) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    if not all(references):
        raise ValueError("every hypothesis needs at least one reference")


# ---- BLEU (Papineni et al. 2002, as sacrebleu computes it: Post 2018) ------------------------------------------------

_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_SPLITS = [(re.compile(pattern), into) for pattern, into in (
    (r"([!-&(-+:-@\[-`{-~/])", r" \1 "),                # ASCII punctuation but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),                     # point and comma stay inside numbers
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "))]                        # a dash leaves the number before it


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
def _ngrams(text: str) -> tuple[int, Counter]:
    tokens = _tokens_13a(text)
    return len(tokens), Counter(chain.from_iterable(zip(*(tokens[i:] for i in range(n))) for n in (1, 2, 3, 4)))


@lru_cache(maxsize=1 << 12)
def _reference_ngrams(texts: tuple[str, ...]) -> tuple[list[int], Counter]:
    lengths, grams = zip(*map(_ngrams, texts))
    merged = Counter()
    for one in grams:
        merged |= one                                   # clip by the most that a single reference holds
    return sorted(lengths), merged


def bleu_counts(hypothesis: str, references: list[str]) -> np.ndarray:
    """(10,): length, closest reference length, matches of 1..4-grams, their totals."""
    length, grams = _ngrams(hypothesis)
    lengths, allowed = _reference_ngrams(tuple(references))
    matches = [0] * 5
    for gram, times in grams.items():
        if gram in allowed:
            matches[len(gram)] += min(times, allowed[gram])
    closest = min(lengths, key=lambda other: abs(other - length))       # sorted: the shorter one wins a tie
    return np.array([length, closest, *matches[1:], *(max(length - n, 0) for n in range(4))])


def bleu_score(counts: np.ndarray, cut_order: bool) -> float:
    """BLEU in 0..1. A precision of 0 becomes 1/(2·total), the next 1/(4·total), … ("exp" smoothing). With
    `cut_order` orders that a short text does not reach are left out of the mean; without it they make the score 0."""
    length, closest, matches, totals = counts[0], counts[1], counts[2:6], counts[6:]
    if not matches.any() or not (cut_order or totals.all()):
        return 0.0
    logs, zeros = [], 0
    for hit, total in zip(matches[totals > 0], totals[totals > 0]):
        zeros += hit == 0
        logs.append(math.log((hit or 0.5 ** zeros) / total))
    return math.exp(min(0.0, 1 - closest / length) + sum(logs) / len(logs))


def bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 in 0..100, equal to sacrebleu's default `corpus_bleu` (13a tokens, exp smoothing, case kept).

    Hypotheses may have different numbers of references. 0 for no hypotheses. Raises ValueError as `rouge` does.
    """
    _check_references(hypotheses, references)
    return 100 * bleu_score(sum(map(bleu_counts, hypotheses, references), np.zeros(10, int)), cut_order=False)


def sentence_bleu(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """BLEU-4 of each text alone, float64 (N,) in 0..1: sacrebleu's `sentence_bleu` / 100. Raises as `rouge` does."""
    _check_references(hypotheses, references)
    return np.array([bleu_score(bleu_counts(*pair), cut_order=True) for pair in zip(hypotheses, references)], float)


# ---- Slots of E2E meaning representations (Novikova et al. 2017) -----------------------------------------------------

SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
_MR = re.compile(r"\s*(%s)\s*\[([^\[\]]+)\]\s*(?:,|$)" % "|".join(SLOTS))
_NOTHING: Counter = Counter()
MOST_MENTIONS = 2                       # people do say a fact twice; a third time is an error (the name apart)
BARRED = "£"                            # no mention begins behind it, or behind a letter
# What a value may be called: a number may be put in words, but words must not be turned into a number.
IN_WORDS = {"less than £20": "cheap", "£20-25": "moderate", "more than £30": "high",
            "1 out of 5": "low", "3 out of 5": "average", "5 out of 5": "high"}

_BE = r"(?: (?:is|are|was|of|by|as|it|at|in|an?|the|very|been|rather|its|only|just|considered|range|to|be|customers?))"
_RATE = (r"(?:customer service |service )?"
         r"(?:rat(?:ed?|es|ings?)|reviews?|reviewed|scor(?:es?|ed)|rank(?:s|ed|ings?)?|satisfaction)\b")
_COST = r"(?:pric(?:es?|ed|ing|ey)|costs?|costing|budget)\b"
_KIN = r"(?:famil(?:y|ies)|kids?|child(?:s|rens?)?|youngsters?)\b"
_NO = r"(?:not?|non|none|never|without|less|nor|unsuitable|isn't|aren't|doesn't|don't|wouldn't|isnt|doesnt)\b"
_NO_MORE = (r"(?: (?:an?|the|very|really|good|suitable|ideal|recommend|recommended|appropriate|for|to|with|be|"
            r"considered|allow|allows|permit|place|any|so|as|that|at|all|your|of|friendly|cater|welcome|welcoming|"
            r"openly|actively|take|bring|bringing|conducive|facilities|however|exactly|particularly))")
_MONEY = r"(?:£|pounds?\b|euros?\b|dollars?\b|quid\b)"


def _rated(words: str, digit: str) -> tuple[str, str]:
    """Patterns of a customer rating in words, and in figures."""
    figure = (rf"(?:{digit})(?: stars?)?(?: ?(?:out of|of|out|/) ?(?:5|five)\b| stars?\b)"
              rf"|{_RATE}{_BE}{{0,4}} (?:{digit})\b")
    return rf"(?:{words})(?: (?:customer|costumer|consumer)s?)? {_RATE}|{_RATE}{_BE}{{0,4}} (?:{words})\b", figure


_LOW, _1 = _rated("low|lowly|lower|poor|poorly|bad|badly", "1|one")
_AVERAGE, _3 = _rated("average|averagely|moderate|moderately|decent|mediocre|mid range|reasonable|ok", "3|three")
_HIGH, _5 = _rated("high|highly|higher|good|great|excellent|perfect|well|top", "5|five")

# (slot, value, pattern) against lower-cased text without hyphens. Where two match at one place, the upper one wins.
LEXICON = (
    ("name", "xname", r"xname\b"),
    ("near", "xnear", r"xnear\b"),
    ("familyFriendly", "no", rf"{_NO}{_NO_MORE}{{0,5}} {_KIN}"),
    ("familyFriendly", "no", rf"{_KIN}(?: friendly)?(?: are| is)? (?:not?|aren't|isn't|unfriendly|prohibited)"
                             rf"\b|adults?\b(?! and| or)"),
    ("familyFriendly", "yes", rf"{_KIN}|all ages\b"),
    ("eatType", "coffee shop", r"coffee|caf[eé]s?\b"),
    ("eatType", "pub", r"pubs?\b|bar\b|tavern\b"),
    ("eatType", "restaurant", r"restaurants?\b|bistro\b|diner\b|eatery\b"),
    ("food", "Fast food", r"fast foods?\b"),
    *(("food", food, food.lower() + r"\b") for food in ("Chinese", "French", "Indian", "Italian", "Japanese")),
    ("food", "English", r"(?:english|british)\b"),
    ("area", "riverside", r"river ?(?:side|bank|front|s)?\b|waterside\b|waterfront\b"),
    ("area", "city centre", r"(?:(?:city|town) ?)?(?:cent(?:re|er|ral)\b|centrally\b)|downtown\b"
                            r"|(?:middle|heart) of (?:the )?(?:city|town)\b"),
    ("customer rating", "1 out of 5", _1),
    ("customer rating", "3 out of 5", _3),
    ("customer rating", "5 out of 5", _5),
    ("customer rating", "low", _LOW),
    ("customer rating", "average", _AVERAGE),
    ("customer rating", "high", _HIGH),
    ("priceRange", "£20-25", rf"£? ?20 ?{_MONEY}? ?(?:to|and)? ?£? ?25\b"),
    ("priceRange", "less than £20", rf"[£$l] ?20\b|(?:20|twenty) ?{_MONEY}|(?:th[ae]n|under|below) 20\b"),
    ("priceRange", "more than £30", rf"[£$l] ?30\b|(?:30|thirty) ?{_MONEY}|(?:th[ae]n|over|above) 30\b"),
    ("priceRange", "moderate", rf"moderat(?:e|ely|ed)\b|mid(?:dle)? (?:level )?(?:pric|rang|cost)"
                               rf"|(?:averaged?|averagely|medium|reasonable|reasonably|fair|fairly) {_COST}"
                               rf"|{_COST}{_BE}{{0,4}} (?:average|medium|reasonable)\b"),
    ("priceRange", "cheap", rf"cheap(?:er|ly|est)?\b|inexpensive|affordabl[ey]|low(?:er|est)? (?:range )?{_COST}"
                            rf"|low range\b|(?:below|less than) average {_COST}"
                            rf"|{_COST}{_BE}{{0,4}} (?:low|below average)\b"
                            rf"|not expensive|budget\b"),
    ("priceRange", "high", rf"expensive|costly|pricey\b|(?:high(?:er|ly)?|above average|premium|overly) {_COST}"
                           rf"|{_COST}{_BE}{{0,4}} (?:high|higher|above average)\b|high(?:er)? (?:range|end)\b"),
)
# Idle words open no pattern; skipping them early doubles the speed.
_IDLE = r"(?:the|is|and|in|it|that|serves?|with|has|located|food|offers|providing|provides|called|its|there|which)\b"
_MENTION = re.compile(rf"(?<![\w{BARRED}])(?!{_IDLE})(?:%s)" % "|".join(
    f"(?:{pattern})(?P<_{i}>)" for i, (_, _, pattern) in enumerate(LEXICON)))
KNOWN = {row[:2] for row in LEXICON}


@lru_cache(maxsize=1 << 12)
def _parse_mr(source: str) -> dict[str, str] | None:
    slots, end = {}, 0
    while match := _MR.match(source, end):
        slots[match[1]], end = match[2].strip(), match.end()
    ordered = {slot: slots[slot] for slot in SLOTS if slot in slots}
    return ordered if ordered and end == len(source) else None


def has_slots(source: str) -> bool:
    """Whether a source is an E2E meaning representation such as `name[xname], food[Fast food], near[xnear]`."""
    return _parse_mr(source) is not None


def parse_slots(source: str) -> dict[str, str]:
    """slot -> value of a meaning representation, in one order of slots. Raises InputError for another text."""
    if (slots := _parse_mr(source)) is None:
        raise InputError(f"source {source[:80]!r}: expected slots such as name[xname], eatType[pub], food[Italian] "
                         f"(the reward `slot` is for E2E data)")
    return dict(slots)                                  # a copy: the caller may change it


@lru_cache(maxsize=1 << 14)
def _mentions(text: str) -> dict[str, Counter]:
    """slot -> how often each of its values is mentioned."""
    found: dict[str, Counter] = defaultdict(Counter)
    for match in _MENTION.finditer(" ".join(text.lower().replace("-", " ").replace("’", "'").split())):
        slot, value, _ = LEXICON[int(match.lastgroup[1:])]
        found[slot][value] += 1
    return dict(found)


def _slot_wrong(slot: str, value: str | None, text: str, found: Counter) -> bool:
    """Is this slot missing, wrong, or added (also: beside the right value), or said too often?"""
    said = found.keys() - {"restaurant"} if slot == "eatType" and value != "restaurant" else found.keys()
    if value is None:                                                   # "restaurant": any place may be called that
        return bool(said)
    if (slot, value) not in KNOWN:                                      # names put back, a cuisine that E2E lacks
        return value.lower() not in text.lower()
    often = max(found[value], found[IN_WORDS.get(value, value)])
    return not often or not said <= {value, IN_WORDS.get(value)} or (often > MOST_MENTIONS and slot != "name")


def slot_errors_by_kind(text: str, source: str) -> dict[str, int]:
    """How many of a source's slots are `missing` from a text, how many `wrong`, and how many `added`."""
    slots, found = parse_slots(source), _mentions(text)
    kinds = {"missing": 0, "wrong": 0, "added": 0}
    for slot in slots.keys() | found.keys():
        if _slot_wrong(slot, slots.get(slot), text, found.get(slot, _NOTHING)):
            kinds["missing" if slot not in found else "wrong" if slot in slots else "added"] += 1
    return kinds


def slot_errors(hypotheses: list[str], sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and slots of each text against its meaning representation, int (N,) each; the corpus slot error rate is
    errors.sum() / slots.sum().

    Each of the eight E2E slots is right or is one error: it is missing, has another value (alone or beside the right
    one), or is mentioned though the source lacks it. A number may be put in words (£20-25 as moderate), not the
    reverse; any place may be called a restaurant too; saying a fact twice is fine, a third time is an error, except
    for the name. Raises InputError for a source that is no meaning representation.
    """
    errors = [sum(slot_errors_by_kind(*pair).values()) for pair in zip(hypotheses, sources)]
    return np.array(errors, int), np.array([len(parse_slots(source)) for source in sources], int)


def slot(hypotheses: list[str], references: list[list[str]], sources: list[str]) -> np.ndarray:
    """Slot accuracy, float64 (N,) in 0..1: 1 - errors / slots, at least 0, counted by `slot_errors`."""
    errors, slots = slot_errors(hypotheses, sources)
    return np.maximum(0.0, 1 - errors / slots)


# ---- A second opinion on slots, never a reward: key words and what stands near them, no pattern in common ------------

_TOKEN = re.compile(r"n't|[a-z0-9é]+")
_GRADES = {word: grade for grade, words in enumerate((
    "cheap cheaply cheaper inexpensive affordable low lowly lower poor poorly bad one 1 20 twenty below",
    "average averagely moderate moderately mid medium reasonable reasonably decent three 3 25",
    "high highly higher expensive pricey costly excellent good great top five 5 30 thirty above"))
    for word in words.split()}
_PRICE_WORDS = frozenset(
    "cheap cheaply cheaper inexpensive affordable expensive pricey costly 20 25 30 twenty thirty".split())
_GRADE_OF = {"low": 0, "cheap": 0, "less than £20": 0, "1 out of 5": 0, "average": 1, "moderate": 1, "£20-25": 1,
             "3 out of 5": 1, "high": 2, "more than £30": 2, "5 out of 5": 2}
_NEGATIVE = frozenset("no not non none never n't isnt unfriendly without nor unsuitable prohibited cannot".split())
_CUES = (("area", "riverside", ("river", "water")), ("area", "city centre", ("centr", "center", "downtown", "town")),
         ("eatType", "coffee shop", ("coffee", "caf")), ("eatType", "pub", ("pub", "tavern")),
         ("eatType", "restaurant", ("restaurant",)), ("name", "xname", ("xname",)), ("near", "xnear", ("xnear",)),
         ("food", "English", ("english", "british")),
         *(("food", food, (food.lower(),)) for food in ("Chinese", "French", "Indian", "Italian", "Japanese")))


def _nearest(words: list[str], at: int, stems: tuple[str, ...]) -> int:
    """Steps from the word `at` to the nearest word with one of the stems; words after it are half a step nearer."""
    return min((2 * abs(i - at) - (i > at) for i, word in enumerate(words) if word.startswith(stems)), default=99)


@lru_cache(maxsize=1 << 14)
def _cues(text: str) -> dict[str, set]:
    words = _TOKEN.findall(text.lower().replace("’", "'").replace("n't", " n't"))
    found: dict[str, set] = defaultdict(set)
    for slot, value, stems in _CUES:
        if any(word.startswith(stems) for word in words):
            found[slot].add(value)
    for here, after in zip(words, words[1:]):
        if here == "fast" and after.startswith("food"):
            found["food"].add("Fast food")
    kin = [i for i, word in enumerate(words) if word.startswith(("famil", "kid", "child"))]
    if kin or {"adult", "adults"} & set(words):
        near_kin = {word for i in kin for word in words[max(0, i - 4) : i + 4]}
        found["familyFriendly"].add("no" if not kin or near_kin & _NEGATIVE else "yes")
    for i, word in enumerate(words):
        if word in _GRADES and not ("out" in words[max(0, i - 2) : i]               # in "3 out of 5" the 5 is the scale
                                    or word == "20" and "25" in words[i : i + 5]):  # £20-25 is graded by its 25
            price = 0 if word in _PRICE_WORDS else _nearest(words, i, ("pric", "cost", "range", "budget", "end"))
            rating = _nearest(words, i, ("rat", "star", "review", "out", "customer", "rank", "scor"))
            if min(price, rating) < 10:
                found["priceRange" if price <= rating else "customer rating"].add(_GRADES[word])
    return dict(found)


def slot_errors2(hypotheses: list[str], sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and slots, int (N,) each, as `slot_errors` counts them but found in another way, so that a policy that
    fools the reward's patterns is seen: word stems, negations within four words of a child, and grades (low, middle,
    high) given to the nearest word about money or ratings. Lenient where the first is strict: numbers and words of one
    grade are equal, a price or rating may be graded twice if one grade is right, and repetition is ignored."""
    errors = []
    for text, source in zip(hypotheses, sources):
        slots, found, wrong = parse_slots(source), _cues(text), 0
        for slot in SLOTS:
            value, said = slots.get(slot), found.get(slot, set()) - ({"restaurant"} - {slots.get(slot)})
            if value in _GRADE_OF:
                wrong += _GRADE_OF[value] not in said
            elif value is None or (slot, value) in KNOWN:
                wrong += said != ({value} if value else set())
            else:
                wrong += not set(_TOKEN.findall(value.lower())) <= set(_TOKEN.findall(text.lower()))
        errors.append(wrong)
    return np.array(errors, int), np.array([len(parse_slots(source)) for source in sources], int)


# ---- Rewards by name -------------------------------------------------------------------------------------------------

_BUILT_IN: dict[str, Reward] = {
    "rouge": lambda hypotheses, references, sources: rouge(hypotheses, references).mean(1),
    "bleu": lambda hypotheses, references, sources: sentence_bleu(hypotheses, references),
    "slot": slot,
}


def load_reward(spec: str) -> Callable[[list[str], list[list[str]], list[str]], np.ndarray]:
    """The reward that `spec` names: rouge (the mean of its three columns), bleu (of each text), slot, or
    module:function with module importable from here; several joined by + are averaged.

    The result maps (hypotheses, references, sources) to float64 (N,) and raises InputError when a reward returns
    anything but N finite numbers in 0..1; a part that is `known` already (rouge=values) is not computed again, and every
    part sees equal (hypothesis, references, source) once. Its `parts` are the names. Raises InputError when no such reward exists; errors inside a module or a function of the user
    are left to show their own traceback.
    """
    parts = [(name.strip(), _find_reward(name.strip())) for name in spec.split("+")]

    def reward(hypotheses: list[str], references: list[list[str]], sources: list[str], **known) -> np.ndarray:
        columns = [known[name] if name in known else _score(name, part, hypotheses, references, sources) for name, part in parts]
        return np.mean(columns, axis=0)

    reward.parts = tuple(name for name, _ in parts)
    return reward


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _find_reward(name: str) -> Reward:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        expected = f"expected {', '.join(_BUILT_IN)} or module:function"
        raise InputError(f"reward {name!r}: {expected}" + _suggest(name, _BUILT_IN))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise                                                       # the module exists; what it imports does not
        hint = _suggest(module, [path.stem for path in Path.cwd().glob("*.py")])
        raise InputError(f"reward {name!r}: no module {error.name!r} here or installed" + hint) from None
    if not callable(getattr(found, function, None)):
        callables = [key for key, value in vars(found).items() if callable(value)]
        hint = _suggest(function, callables)
        raise InputError(f"reward {name!r}: module {module!r} has no function {function!r}" + hint)
    return getattr(found, function)


def _score(name: str, part: Reward, hypotheses: list[str], references: list[list[str]], sources: list[str]) -> np.ndarray:
    """Samples of one source repeat each other, the more so the more a policy has learned: equal ones are scored once."""
    if name == "rouge":                                                 # which sees to it itself
        return _checked(name, part(hypotheses, references, sources), len(hypotheses))
    number = defaultdict(count().__next__)
    index = [number[case] for case in zip(hypotheses, map(tuple, references), sources, strict=True)]
    texts, known, where = zip(*number) if number else ((), (), ())
    return _checked(name, part(list(texts), list(map(list, known)), list(where)), len(number))[index]


def _checked(name: str, values: Iterable[float], n: int) -> np.ndarray:
    expected = f"expected {n} finite numbers in 0..1, one for each hypothesis"
    try:
        values = np.asarray(values if hasattr(values, "__array__") else list(values), np.float64)
    except (TypeError, ValueError):
        raise InputError(f"reward {name!r} returned {type(values).__name__}: {expected}") from None
    if values.shape != (n,):
        raise InputError(f"reward {name!r} returned shape {values.shape}: {expected}")
    bad = ~((values >= -1e-6) & (values <= 1 + 1e-6))                   # NaN compares false
    if bad.any():
        raise InputError(f"reward {name!r} returned {values[bad][0]} for hypothesis {bad.argmax()}: {expected}")
    return values.clip(0.0, 1.0)                                        # rounding may step over the ends
