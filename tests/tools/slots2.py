"""A second matcher of E2E slots, against which no reward was ever trained.

It shares no pattern with data/e2e.py: it looks for word stems, for negations within four words of
a child, and gives grades (low, middle, high) to the nearest word about money or ratings. It accepts
what the first refuses: numbers and words of one grade are equal, a price or rating may be graded
twice if one grade is right, and repetition is ignored."""
import re
from collections import defaultdict

import numpy as np

from data.e2e import LEXICON, SLOTS, parse_slots

TOKEN = re.compile(r"n't|[a-z0-9é]+")
GRADES = {word: grade for grade, words in enumerate((
    "cheap cheaply cheaper inexpensive affordable low lowly lower poor poorly bad one 1 20 twenty "
    "below",
    "average averagely moderate moderately mid medium reasonable reasonably decent three 3 25",
    "high highly higher expensive pricey costly excellent good great top five 5 30 thirty above"))
    for word in words.split()}
PRICE_WORDS = frozenset(
    "cheap cheaply cheaper inexpensive affordable expensive pricey costly 20 25 30 twenty "
    "thirty".split())
GRADE_OF = {"low": 0, "cheap": 0, "less than £20": 0, "1 out of 5": 0,
            "average": 1, "moderate": 1, "£20-25": 1, "3 out of 5": 1,
            "high": 2, "more than £30": 2, "5 out of 5": 2}
NEGATIVE = frozenset(
    "no not non none never n't isnt unfriendly without nor unsuitable prohibited cannot".split())
CUES = (("area", "riverside", ("river", "water")),
        ("area", "city centre", ("centr", "center", "downtown", "town")),
        ("eatType", "coffee shop", ("coffee", "caf")),
        ("eatType", "pub", ("pub", "tavern")),
        ("eatType", "restaurant", ("restaurant",)),
        ("name", "xname", ("xname",)),
        ("near", "xnear", ("xnear",)),
        ("food", "English", ("english", "british")),
        *(("food", food, (food.lower(),))
          for food in ("Chinese", "French", "Indian", "Italian", "Japanese")))
KNOWN = {(slot, value) for slot, value, _ in LEXICON}


def nearest(words: list[str], at: int, stems: tuple[str, ...]) -> int:
    """Half steps from the word `at` to the nearest word with one of the stems; a word after it
    counts as half a step nearer."""
    return min((2 * abs(i - at) - (i > at) for i, word in enumerate(words)
                if word.startswith(stems)), default=99)


def cues(text: str) -> dict[str, set]:
    words = TOKEN.findall(text.lower().replace("’", "'").replace("n't", " n't"))
    found = defaultdict(set)
    for slot, value, stems in CUES:
        if any(word.startswith(stems) for word in words):
            found[slot].add(value)
    if any(word == "fast" and after.startswith("food") for word, after in zip(words, words[1:])):
        found["food"].add("Fast food")
    kin = [i for i, word in enumerate(words) if word.startswith(("famil", "kid", "child"))]
    if kin or {"adult", "adults"} & set(words):
        near_kin = {word for i in kin for word in words[max(0, i - 4):i + 4]}
        found["familyFriendly"].add("no" if not kin or near_kin & NEGATIVE else "yes")
    for i, word in enumerate(words):
        scale = "out" in words[max(0, i - 2):i]  # the 5 of "3 out of 5"
        range_start = word == "20" and "25" in words[i:i + 5]  # £20-25 is graded by its 25
        if word not in GRADES or scale or range_start:
            continue
        price = 0 if word in PRICE_WORDS else nearest(
            words, i, ("pric", "cost", "range", "budget", "end"))
        rating = nearest(words, i, ("rat", "star", "review", "out", "customer", "rank", "scor"))
        if min(price, rating) < 10:
            found["priceRange" if price <= rating else "customer rating"].add(GRADES[word])
    return found


def slot_errors2(hypotheses: list[str], sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and slots, int (N,) each, as data.e2e.slot_errors counts them."""
    errors, totals = [], []
    for text, source in zip(hypotheses, sources):
        slots, found, wrong = parse_slots(source), cues(text), 0
        for slot in SLOTS:
            value = slots.get(slot)
            said = found[slot] - ({"restaurant"} - {value})
            if value in GRADE_OF:
                wrong += GRADE_OF[value] not in said
            elif value is None or (slot, value) in KNOWN:
                wrong += said != ({value} if value else set())
            else:
                words = set(TOKEN.findall(text.lower()))
                wrong += not set(TOKEN.findall(value.lower())) <= words
        errors.append(wrong)
        totals.append(len(slots))
    return np.array(errors, int), np.array(totals, int)
