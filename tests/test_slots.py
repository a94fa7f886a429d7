"""Slots of E2E: each by itself, both matchers, whole descriptions, and what is no source."""
import numpy as np
import pytest

from data import InputError, e2e
from data.e2e import parse_slots, slot, slot_errors
from tests.tools.slots2 import slot_errors2

SLOT_CASES = [  # slot, value, a text that states it, a text that does not
    ("eatType", "pub", "a pub", "a coffee shop"),
    ("eatType", "coffee shop", "a coffee shop", "a restaurant"),
    ("eatType", "restaurant", "a restaurant", "a pub"),
    ("food", "Fast food", "serving fast food", "serving food fast"),
    ("food", "English", "British food", "Indian food"),
    ("food", "Chinese", "Chinese food", "French food"),
    ("food", "Japanese", "Japanese meals", "meals"),
    ("priceRange", "cheap", "low prices", "high prices"),
    ("priceRange", "cheap", "It is inexpensive", "It is expensive"),
    ("priceRange", "moderate", "moderately priced", "cheap"),
    ("priceRange", "moderate", "in the mid-price range", "with a moderate customer rating"),
    ("priceRange", "high", "a high price range", "a high customer rating"),
    ("priceRange", "less than £20", "less than £20", "£20-25"),
    ("priceRange", "less than £20", "cheap", "for more than £30"),
    ("priceRange", "£20-25", "£20 - £25", "more than £30"),
    ("priceRange", "£20-25", "20 to 25 pounds", "less than £20"),
    ("priceRange", "more than £30", "over 30 pounds", "£20-25"),
    ("customer rating", "1 out of 5", "one star", "5 out of 5"),
    ("customer rating", "1 out of 5", "1 out of 5 stars", "a high rating"),
    ("customer rating", "3 out of 5", "rated 3 out of 5", "rated 1 out of 5"),
    ("customer rating", "5 out of 5", "a 5-star place", "a 3-star place"),
    ("customer rating", "low", "The customer rating is low", "The price is low"),
    ("customer rating", "average", "an average customer rating", "average prices"),
    ("customer rating", "high", "highly rated", "poorly rated"),
    ("area", "riverside", "by the river", "in the city centre"),
    ("area", "city centre", "in the center of town", "at the riverside"),
    ("familyFriendly", "yes", "family-friendly", "not family-friendly"),
    ("familyFriendly", "yes", "Children are welcome", "adults only"),
    ("familyFriendly", "no", "not really suitable for kids", "kid friendly"),
    ("familyFriendly", "no", "It isn't child friendly", "families are welcome"),
    ("familyFriendly", "no", "a non-family-friendly place", "bring the kids"),
    ("near", "xnear", "near xnear", "nearby"),
]
FULL = ("name[xname], eatType[pub], food[Italian], priceRange[£20-25], "
        "customer rating[5 out of 5], area[city centre], familyFriendly[no], near[xnear]")
GOOD = ("xname is a pub in the city centre near xnear. It serves Italian food for £20-25, is "
        "not family-friendly and has a customer rating of 5 out of 5.")
COUNTS = [  # a source, a text, its errors
    (FULL, GOOD, 0), (FULL, GOOD.replace("Italian ", ""), 1), (FULL, GOOD.replace("not ", ""), 1),
    (FULL, GOOD.replace("city centre", "riverside area"), 1),
    (FULL, GOOD.replace("xname", "It"), 1), (FULL, "", 8),
    # what the source lacks is one error per slot, but any place may be called a restaurant
    ("name[xname]",
     "xname is a cheap French pub by the river near xnear, kid friendly and highly rated.", 7),
    ("name[xname]", "xname is a restaurant", 0),
    # a value that E2E lacks is looked for as it stands
    ("name[xname], food[Thai]", "xname is a Thai place", 0),
    ("name[xname], food[Thai]", "xname is a place", 1)]
STRICT = [  # of the first matcher alone
    # too often, and beside the right value
    ("name[xname], food[Italian]", "xname: Italian food, Italian wine", 0),
    ("name[xname], food[Italian]", "xname: Italian food, Italian wine, Italian staff", 1),
    ("name[xname], food[Italian]", "xname: Italian and French food", 1),
    ("name[xname], food[Italian]", "xname xname xname: Italian", 0),
    # a number may be put in words, not the reverse
    ("name[xname], customer rating[1 out of 5]", "xname is low rated", 0),
    ("name[xname], customer rating[1 out of 5]", "xname has 1 star", 0),
    ("name[xname], customer rating[low]", "xname is low rated", 0),
    ("name[xname], customer rating[low]", "xname has 1 star", 1)]


@pytest.mark.parametrize("errors", [slot_errors, slot_errors2])
@pytest.mark.parametrize("name, value, right, wrong", SLOT_CASES)
def test_each_slot_both_ways(errors, name, value, right, wrong):
    source = f"name[xname], {name}[{value}]"
    counted, slots = errors([f"xname: {right}.", f"xname: {wrong}."], [source] * 2)
    assert counted[0] == 0 and counted[1] >= 1
    np.testing.assert_array_equal(slots, [2, 2])
    assert e2e.stated(f"xname: {right}.", source) == {"name": True, name: True}
    assert e2e.stated(f"xname: {wrong}.", source) == {"name": True, name: False}


@pytest.mark.parametrize("errors, cases", [(slot_errors, COUNTS + STRICT), (slot_errors2, COUNTS)])
def test_errors_of_whole_descriptions(errors, cases):
    sources, texts, expected = zip(*cases)
    assert list(zip(texts, errors(texts, sources)[0])) == list(zip(texts, expected))


def test_slot_accuracy_and_its_floor():
    """Two slots: no error 1, one error 1/2; five errors (food wrong, four added) stay at 0."""
    texts = ["xname: Italian", "xname", "xname: French, cheap, riverside, kids, pub"]
    accuracy = slot(texts, [[""]] * 3, ["name[xname], food[Italian]"] * 3)
    np.testing.assert_allclose(accuracy, [1, 0.5, 0])


def test_sources_that_are_no_meaning_representation():
    assert parse_slots("name[xname], priceRange[£20-25]")
    for other in ("place: Oslo; sky: clear", "", "name[xname], colour[red]",
                  "name[xname] and more", "name[xname], food[French], food[Thai]"):
        assert not parse_slots(other)
    with pytest.raises(InputError, match="place: Oslo"):
        slot(["x"], [["x"]], ["place: Oslo"])
    with pytest.raises(ValueError):
        slot(["xname", "x"], [["x"]] * 2, ["name[xname]"])
