"""E2E restaurant descriptions: CSVs to records, and which slots a text states.

    python -m data.e2e devset.csv testset_w_refs.csv --out datasets/e2e

The CSVs are at https://github.com/tuetschek/e2e-dataset (Novikova, Dušek and Rieser 2017; CC BY-SA
4.0). A source is a meaning representation such as `name[xname], food[Italian], near[xnear]`. The
values of name and near become xname and xnear in both columns of the CSVs, because a restaurant's
name says nothing about how to describe it; a record keeps the names of its first line, so that they
can be put back. The split is by delexicalised representation, not by line: otherwise a tenth of the
test set would be seen in training. Left out: spelling correction, and any cleaning of references
that state something false (about 8% of slots); the reward has to cope.
"""
import csv
import difflib
import random
import re
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import InputError, Record, load_records, save_records

TEST, VAL, SEED = 200, 150, 0  # representations held out; fixed, so that results compare

# Tuned flags: "" for every setting, then what differs in one. The static texts are several
# references per source, which are ranked against each other; masks are rare: they add no words.
_RANKED = dict(num_static=8, stored="random", batch_size=16)
FLAGS = {
    "": dict(reward="rouge+bleu+slot", n_layer=4, init_std=0.02, block_size=96, max_len=48,
             base_steps=1200, base_batch=64, base_lr=2e-3, base_masked=1.0, eval_size=0, lr=1e-4,
             mle_weight=1.0, kl_weight=0.0),
    "mle": dict(steps=60),
    "offline": dict(steps=24, **_RANKED, mle_weight=0.06),
    "online": dict(steps=40, K=8, reuse=2, adv_scale="batch", lr=3e-4, batch_size=16,
                   mle_weight=0.3),
    "full": dict(steps=24, K=8),
    "tail": dict(steps=40, K=8, p_m=0.5, reuse=2, adv_scale="batch", stored="random", lr=3e-4,
                 batch_size=16, mle_weight=0.3),
    "masked": dict(steps=24, **_RANKED, p_m=0.05, credit=8.0, mle_weight=0.5),
    "refresh": dict(steps=24, **_RANKED, p_m=0.05, refresh=8, mle_weight=0.1),
}


# -------------------------------------------------------------------------------------------------
# Slots: what a text says about a restaurant

SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly",
         "near")
MOST_MENTIONS = 2  # people do say a fact twice; a third time is an error (the name apart)
# What a value may be called: a text may put a number in words, but not words in a number.
IN_WORDS = {"less than £20": "cheap", "£20-25": "moderate", "more than £30": "high",
            "1 out of 5": "low", "3 out of 5": "average", "5 out of 5": "high"}

_BE = (r"(?: (?:is|are|was|of|by|as|it|at|in|an?|the|very|been|rather|its|only|just|considered"
       r"|range|to|be|customers?))")
_RATE = (r"(?:customer service |service )?"
         r"(?:rat(?:ed?|es|ings?)|reviews?|reviewed|scor(?:es?|ed)|rank(?:s|ed|ings?)?"
         r"|satisfaction)\b")
_COST = r"(?:pric(?:es?|ed|ing|ey)|costs?|costing|budget)\b"
_KIN = r"(?:famil(?:y|ies)|kids?|child(?:s|rens?)?|youngsters?)\b"
_NO = (r"(?:not?|non|none|never|without|less|nor|unsuitable|isn't|aren't|doesn't|don't|wouldn't"
       r"|isnt|doesnt)\b")
_NO_MORE = (r"(?: (?:an?|the|very|really|good|suitable|ideal|recommend|recommended|appropriate"
            r"|for|to|with|be|considered|allow|allows|permit|place|any|so|as|that|at|all|your|of"
            r"|friendly|cater|welcome|welcoming|openly|actively|take|bring|bringing|conducive"
            r"|facilities|however|exactly|particularly))")
_MONEY = r"(?:£|pounds?\b|euros?\b|dollars?\b|quid\b)"


def _rating_patterns(words: str, digit: str) -> tuple[str, str]:
    """Patterns of a customer rating in words, and in figures."""
    figure = (rf"(?:{digit})(?: stars?)?(?: ?(?:out of|of|out|/) ?(?:5|five)\b| stars?\b)"
              rf"|{_RATE}{_BE}{{0,4}} (?:{digit})\b")
    return (rf"(?:{words})(?: (?:customer|costumer|consumer)s?)? {_RATE}"
            rf"|{_RATE}{_BE}{{0,4}} (?:{words})\b", figure)


_LOW, _1 = _rating_patterns("low|lowly|lower|poor|poorly|bad|badly", "1|one")
_AVERAGE, _3 = _rating_patterns(
    "average|averagely|moderate|moderately|decent|mediocre|mid range|reasonable|ok", "3|three")
_HIGH, _5 = _rating_patterns("high|highly|higher|good|great|excellent|perfect|well|top", "5|five")

# (slot, value, pattern) against lower-cased text without hyphens. If two match at one place, the
# upper one wins.
LEXICON = (
    ("name", "xname", r"xname\b"),
    ("near", "xnear", r"xnear\b"),
    ("familyFriendly", "no", rf"{_NO}{_NO_MORE}{{0,5}} {_KIN}"),
    ("familyFriendly", "no",
     rf"{_KIN}(?: friendly)?(?: are| is)? (?:not?|aren't|isn't|unfriendly|prohibited)\b"
     r"|adults?\b(?! and| or)"),
    ("familyFriendly", "yes", rf"{_KIN}|all ages\b"),
    ("eatType", "coffee shop", r"coffee|caf[eé]s?\b"),
    ("eatType", "pub", r"pubs?\b|bar\b|tavern\b"),
    ("eatType", "restaurant", r"restaurants?\b|bistro\b|diner\b|eatery\b"),
    ("food", "Fast food", r"fast foods?\b"),
    ("food", "Chinese", r"chinese\b"),
    ("food", "French", r"french\b"),
    ("food", "Indian", r"indian\b"),
    ("food", "Italian", r"italian\b"),
    ("food", "Japanese", r"japanese\b"),
    ("food", "English", r"(?:english|british)\b"),
    ("area", "riverside", r"river ?(?:side|bank|front|s)?\b|waterside\b|waterfront\b"),
    ("area", "city centre",
     r"(?:(?:city|town) ?)?(?:cent(?:re|er|ral)\b|centrally\b)|downtown\b"
     r"|(?:middle|heart) of (?:the )?(?:city|town)\b"),
    ("customer rating", "1 out of 5", _1),
    ("customer rating", "3 out of 5", _3),
    ("customer rating", "5 out of 5", _5),
    ("customer rating", "low", _LOW),
    ("customer rating", "average", _AVERAGE),
    ("customer rating", "high", _HIGH),
    ("priceRange", "£20-25", rf"£? ?20 ?{_MONEY}? ?(?:to|and)? ?£? ?25\b"),
    ("priceRange", "less than £20",
     rf"[£$l] ?20\b|(?:20|twenty) ?{_MONEY}|(?:th[ae]n|under|below) 20\b"),
    ("priceRange", "more than £30",
     rf"[£$l] ?30\b|(?:30|thirty) ?{_MONEY}|(?:th[ae]n|over|above) 30\b"),
    ("priceRange", "moderate",
     r"moderat(?:e|ely|ed)\b|mid(?:dle)? (?:level )?(?:pric|rang|cost)"
     rf"|(?:averaged?|averagely|medium|reasonable|reasonably|fair|fairly) {_COST}"
     rf"|{_COST}{_BE}{{0,4}} (?:average|medium|reasonable)\b"),
    ("priceRange", "cheap",
     rf"cheap(?:er|ly|est)?\b|inexpensive|affordabl[ey]|low(?:er|est)? (?:range )?{_COST}"
     rf"|low range\b|(?:below|less than) average {_COST}"
     rf"|{_COST}{_BE}{{0,4}} (?:low|below average)\b|not expensive|budget\b"),
    ("priceRange", "high",
     rf"expensive|costly|pricey\b|(?:high(?:er|ly)?|above average|premium|overly) {_COST}"
     rf"|{_COST}{_BE}{{0,4}} (?:high|higher|above average)\b|high(?:er)? (?:range|end)\b"),
)
_KNOWN = {(slot, value) for slot, value, _ in LEXICON}
# No mention begins right after a letter or a pound sign.
_MENTION = re.compile(r"(?<![\w£])(?:%s)" % "|".join(
    f"(?:{pattern})(?P<_{i}>)" for i, (_, _, pattern) in enumerate(LEXICON)))
_MR = re.compile(r"\s*(%s)\s*\[([^\[\]]+)\]\s*(?:,|$)" % "|".join(SLOTS))


@lru_cache(maxsize=1 << 12)
def parse_slots(source: str) -> dict[str, str] | None:
    """slot -> value of a meaning representation, in the order of SLOTS; None for any other text.
    The dictionary is shared: copy it before you change it."""
    slots, end = {}, 0
    while (match := _MR.match(source, end)) and match[1] not in slots:  # none is given twice
        slots[match[1]], end = match[2].strip(), match.end()
    ordered = {slot: slots[slot] for slot in SLOTS if slot in slots}
    return ordered if ordered and end == len(source) else None


@lru_cache(maxsize=1 << 14)
def _mentions(text: str) -> dict[str, Counter]:
    """slot -> how often each of its values is mentioned."""
    words = " ".join(text.lower().replace("-", " ").replace("’", "'").split())
    found = defaultdict(Counter)
    for match in _MENTION.finditer(words):
        slot, value, _ = LEXICON[int(match.lastgroup[1:])]
        found[slot][value] += 1
    return dict(found)


def _is_right(slot: str, value: str | None, text: str, found: Counter) -> bool:
    """Does a text state this value of a slot, and no other? Value None: the source lacks it."""
    said = set(found)
    if slot == "eatType" and value != "restaurant":
        said.discard("restaurant")  # any place may be called that
    if value is None:
        return not said
    if (slot, value) not in _KNOWN:  # names put back, a cuisine that E2E lacks
        return value.lower() in text.lower()
    in_words = IN_WORDS.get(value, value)
    times = max(found[value], found[in_words])
    return said <= {value, in_words} and times > 0 and (times <= MOST_MENTIONS or slot == "name")


def stated(text: str, source: str) -> dict[str, bool] | None:
    """Slot -> does the text state it correctly? None when the source is no meaning
    representation."""
    slots = parse_slots(source)
    if slots is None:
        return None
    found = _mentions(text)
    return {slot: _is_right(slot, value, text, found.get(slot, Counter()))
            for slot, value in slots.items()}


def slot_errors(hypotheses: list[str], sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and slots of each text against its meaning representation, int (N,) each; the corpus
    slot error rate is errors.sum() / slots.sum().

    Each of the eight E2E slots is right or is one error: it is missing, has another value (alone
    or beside the right one), or is mentioned though the source lacks it. A number may be put in
    words (£20-25 as moderate), not the reverse; any place may be called a restaurant, too; a text
    may say a fact twice, but only the name more often. Raises InputError for a source that is no
    meaning representation, ValueError when the lists differ in length."""
    errors, totals = [], []
    for text, source in zip(hypotheses, sources, strict=True):
        slots, found = parse_slots(source), _mentions(text)
        if slots is None:
            raise InputError(f"source {source[:80]!r}: expected slots such as name[xname], "
                             f"eatType[pub], food[Italian] (the reward `slot` is for E2E data)")
        right = [_is_right(slot, slots.get(slot), text, found.get(slot, Counter()))
                 for slot in slots.keys() | found.keys()]
        errors.append(right.count(False))
        totals.append(len(slots))
    return np.array(errors, int), np.array(totals, int)


def slot(hypotheses: list[str], references: list[list[str]], sources: list[str]) -> np.ndarray:
    """Slot accuracy, float64 (N,) in 0..1: 1 - errors / slots, at least 0, by `slot_errors`."""
    errors, slots = slot_errors(hypotheses, sources)
    return np.maximum(0.0, 1 - errors / slots)


# -------------------------------------------------------------------------------------------------
# The converter

def read_rows(path: Path) -> list[tuple[str, str]]:
    """(mr, ref) of every line of a CSV. Raises InputError for a header, a line or a representation
    that is not as expected, OSError for a file that cannot be read."""
    rows, place = [], str(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if names.count("mr") != 1 or names.count("ref") != 1:
                raise InputError(f"{path}:1: expected a CSV with the columns mr and ref, "
                                 f"found {names}")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():  # more fields than names, or fewer
                    raise InputError(f"{place}: expected {len(names)} fields as in the header, "
                                     f"with quotes around a text that has commas")
                if not parse_slots(row["mr"]):
                    raise InputError(f"{place}: expected slots such as name[The Mill], "
                                     f"food[Italian], found {row['mr'][:60]!r}")
                rows.append((row["mr"], row["ref"]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{place}: expected a readable CSV in UTF-8 from here on: "
                         f"{error}") from None
    return rows


def _replace(text: str, name: str, token: str) -> str | None:
    """`text` with every mention of `name` as `token`; None when it has none.

    Case, accents and a leading The do not matter; failing an exact mention, the words most like
    the name will do (Crown Plaza for Crowne Plaza Hotel)."""
    core = re.sub(r"^the\s+", "", name, flags=re.IGNORECASE)
    pattern = r"\s+".join(map(re.escape, core.split())).replace("é", "[eé]")
    replaced, times = re.subn(rf"(?:\bthe\s+)?\b{pattern}\b", token, text, flags=re.IGNORECASE)
    if times:
        return replaced
    words, size = list(re.finditer(r"\w+", text)), len(core.split())
    spans = [(words[i].start(), words[i + n - 1].end())
             for n in {size, max(1, size - 1)} for i in range(len(words) - n + 1)]

    def likeness(span: tuple[int, int]) -> float:
        return difflib.SequenceMatcher(None, text[slice(*span)].lower(), core.lower()).ratio()

    best = max(spans, key=likeness, default=None)
    if best is None or likeness(best) < 0.75:
        return None
    return re.sub(r"\bthe\s+$", "", text[:best[0]], flags=re.IGNORECASE) + token + text[best[1]:]


def delexicalise(mr: str, ref: str) -> tuple[str, str | None, dict[str, str]]:
    """(mr with xname and xnear, its slots in the order of SLOTS; ref with them, None when a name
    is not in it; the names)."""
    slots, names = dict(parse_slots(mr)), {}
    text = " ".join(ref.split())
    named = [slot for slot in ("name", "near") if slot in slots]
    for slot in sorted(named, key=lambda slot: -len(slots[slot])):  # the longer name first
        names["x" + slot], slots[slot] = slots[slot], "x" + slot
        text = text and _replace(text, names["x" + slot], "x" + slot)
    source = ", ".join(f"{slot}[{value}]" for slot, value in slots.items())
    return source, text or None, dict(sorted(names.items()))


def convert(rows: list[tuple[str, str]]) -> tuple[dict[str, list[Record]], int]:
    """Rows of `read_rows` -> ({"train": records, "val": …, "test": …}, how many references were
    dropped because their name or near place could not be found). Raises InputError when there are
    too few to split."""
    records, dropped = {}, 0
    for raw_mr, raw_ref in rows:
        mr, ref, names = delexicalise(raw_mr, raw_ref)
        if ref is None:
            dropped += 1
            continue
        references = records.setdefault(mr, Record(mr, [], names=names)).references
        if ref not in references:
            references.append(ref)
    if len(records) <= TEST + VAL:
        raise InputError(f"expected more than {TEST + VAL} different representations to hold out "
                         f"{TEST} for test and {VAL} for validation, found {len(records)}")
    order = sorted(records)  # the split must not depend on the order of the files
    random.Random(SEED).shuffle(order)
    parts = {"train": order[TEST + VAL:], "val": order[TEST:TEST + VAL], "test": order[:TEST]}
    return {part: [records[mr] for mr in mrs] for part, mrs in parts.items()}, dropped


def write(parts: dict[str, list[Record]], out: Path) -> None:
    """Writes the splits, and flags.json if there is none. Raises InputError rather than overwrite
    other records, OSError when `out` cannot be written."""
    paths = {out / f"{part}.jsonl": records for part, records in parts.items()}
    for path, records in paths.items():
        if path.exists() and load_records(str(path)) != records:
            raise InputError(f"{path}: holds other data; expected a new --out; nothing was written")
    out.mkdir(parents=True, exist_ok=True)
    for path, records in paths.items():
        save_records(records, str(path))
    if not (out / "flags.json").exists():
        (out / "flags.json").write_text('{"preset": "e2e"}\n', "utf-8")  # FLAGS above


def command(paths: list[Path], out: Path) -> None:
    rows = [row for path in paths for row in read_rows(path)]
    parts, dropped = convert(rows)
    write(parts, out)
    print(f"{len(rows)} lines read; {dropped} dropped, their name or near place was not found")
    for part, records in parts.items():
        references = sum(len(r.references) for r in records)
        print(f"{part}: {len(records)} representations, {references} references")
    print(f"written to {out}")


def main(argv: list[str]) -> None:
    from lab.cli import Parser, run_command  # not at the top: lab stands above data

    parser = Parser(prog="python -m data.e2e", description="E2E NLG CSVs to records for train.py.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CSV",
                        help="a file with the columns mr and ref")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the records")
    with run_command("data.e2e"):
        command(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
