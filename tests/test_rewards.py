"""rewards.py against cases worked by hand, slow obvious versions of ROUGE, and values from the reference packages."""

import sys
from collections import Counter

import numpy as np
import pytest

from data import InputError
from data.rewards import (bleu, has_slots, load_reward, rouge, sentence_bleu, slot, slot_errors, slot_errors2)

HYPOTHESES = ["The Mill is a cheap pub near Café Sicilia, rated 5 out of 5.",
              "It costs £20-25; don't bring kids_or DOGS!", "", "a a a b a a"]
REFERENCES = [["The Mill, a cheap pub by Café Sicilia, is rated 5 out of 5.", "A cheap pub: The Mill."],
              ["It costs £20-25 and don't bring kids or dogs.", "Kids & dogs: no!", "It's 20-25."],
              ["not empty"], ["a b a b", "b a a"]]
ROUGE_SCORE = [[0.9285714286, 0.6153846154, 0.8571428571], [0.9523809524, 0.8421052632, 0.9523809524], [0, 0, 0],
               [0.6666666667, 0.5714285714, 0.6666666667]]
SACREBLEU_CORPUS, SACREBLEU_SENTENCES = 44.09287107709119, [0.4684107769, 0.4089601472, 0, 0.3976353644]


# ---- ROUGE

def test_rouge_by_hand():
    """Hypothesis `the cat the cat sat` (5 words), reference `the cat sat on the mat` (6 words).

    ROUGE-1: the 2 of 2, cat 1 of 2, sat 1: 4 hits, F1 = 2·4/(5+6) = 8/11. ROUGE-2: bigrams of the hypothesis: the-cat
    twice, cat-the, cat-sat; the reference has the-cat once and cat-sat: 2 hits of 4 and 5, F1 = 4/9. ROUGE-L: the
    longest common subsequence is `the cat sat`: 3, F1 = 6/11.
    """
    got = rouge(["the cat the cat sat"], [["The cat sat on the mat."]])
    np.testing.assert_allclose(got, [[8 / 11, 4 / 9, 6 / 11]], atol=1e-12)


def test_rouge_takes_the_best_reference_in_each_column():
    """`a b c d` against `d c b a` (all words, no bigram, LCS 1: F1 1, 0, 1/4) and `a b x y` (2 words, 1 of 3 bigrams,
    LCS 2: F1 1/2, 1/3, 1/2): the best of each column is 1, 1/3, 1/2."""
    np.testing.assert_allclose(rouge(["a b c d"], [["d c b a", "a b x y"]]), [[1, 1 / 3, 1 / 2]], atol=1e-12)


def test_rouge_equals_values_of_rouge_score():
    """Computed with rouge-score 0.1.2: RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi(references, text)."""
    np.testing.assert_allclose(rouge(HYPOTHESES, REFERENCES), ROUGE_SCORE, atol=1e-9)


def words(text: str) -> list[str]:
    kept = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(c if c in kept else " " for c in text.lower()).split()


def slow_rouge(hypothesis: str, reference: str) -> list[float]:
    h, r = words(hypothesis), words(reference)
    scores = []
    for n in (1, 2):
        a, b = (Counter(zip(*(text[i:] for i in range(n)))) for text in (h, r))
        scores.append(2 * (a & b).total() / max(1, a.total() + b.total()))
    table = [[0] * (len(r) + 1) for _ in range(len(h) + 1)]
    for i, x in enumerate(h):
        for j, y in enumerate(r):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return scores + [2 * table[-1][-1] / max(1, len(h) + len(r))]


@pytest.mark.parametrize("longest, count", [(1, 40), (4, 60), (24, 60), (63, 12), (66, 12), (130, 8), (260, 3)])
def test_rouge_equals_the_slow_version(longest, count):
    rng = np.random.default_rng(longest)
    lexicon = ["the", "Cat", "sat.", "on_a", "£20-25", "naïve", "İx", "a,b", "!", "don't", "Kelvin\u212a", "日本"]

    def text():
        return " ".join(rng.choice(lexicon[: rng.integers(2, 13)], rng.integers(0, longest + 1)))

    hypotheses = [text() for _ in range(count)]
    references = [[text() for _ in range(rng.integers(1, 4))] for _ in range(count)]
    expected = [np.max([slow_rouge(h, r) for r in rs], axis=0) for h, rs in zip(hypotheses, references)]
    np.testing.assert_allclose(rouge(hypotheses, references), expected, atol=1e-12)


def test_rouge_l_carries_through_words_of_the_bit_table_that_hold_no_match():
    """References of 3 to 5 bit words, few hypothesis words in them: sums ripple through 64 columns without a match."""
    rng = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in rng.integers(0, 300, rng.integers(150, 300))) for _ in range(60)]
    hypotheses = [" ".join(f"w{i}" for i in rng.integers(0, 300, 30)) for _ in references]
    expected = [slow_rouge(h, r) for h, r in zip(hypotheses, references)]
    np.testing.assert_allclose(rouge(hypotheses, [[r] for r in references]), expected, atol=1e-12)


def test_rouge_of_repeated_and_of_no_texts():
    got = rouge(["a b", "c", "a b", "a b"], [["a"], ["c"], ["a"], ["b a"]])
    np.testing.assert_allclose(got, [[2 / 3, 0, 2 / 3], [1, 0, 1], [2 / 3, 0, 2 / 3], [1, 0, 1 / 2]])
    assert rouge([], []).shape == (0, 3)
    np.testing.assert_array_equal(rouge(["", "", "a\0b \0"], [[""], ["!"], ["a b"]]), [[0, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert rouge([""], [[""]]).tolist() == rouge(["?"], [["?"]]).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError):
        rouge(["a"], [[]])
    with pytest.raises(ValueError):
        rouge(["a"], [])


def test_a_known_part_is_not_computed_again():
    known = np.array([0.25, 1.0])
    reward = load_reward("rouge+tests.test_rewards:half")
    assert reward.parts == ("rouge", "tests.test_rewards:half")
    np.testing.assert_allclose(reward(["a", "b"], [["x"], ["y"]], ["", ""], rouge=known), (known + 0.5) / 2)


def test_equal_cases_are_scored_once(tmp_path, monkeypatch):
    """A reward of the user sees each (hypothesis, references, source) once, as lists; every hypothesis gets its value."""
    (tmp_path / "seen_rewards.py").write_text("calls = []\ndef f(hypotheses, references, sources):\n"
                                              "    calls.append((hypotheses, references, sources))\n"
                                              "    return [len(h) / 10 + len(r) / 5 + (s == 't') / 2 for h, r, s in zip(*calls[-1])]\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("seen_rewards:f")
    got = reward(["a", "bb", "a", "a", "a"], [["x"], ["x"], ["x"], ["x", "y"], ["x"]], ["s", "s", "s", "s", "t"])
    np.testing.assert_allclose(got, [0.3, 0.4, 0.3, 0.5, 0.8])
    assert sys.modules["seen_rewards"].calls == [(["a", "bb", "a", "a"], [["x"], ["x"], ["x", "y"], ["x"]], ["s", "s", "s", "t"])]
    assert reward([], [], []).shape == (0,)
    with pytest.raises(ValueError):
        reward(["a"], [], ["s"])


def half(hypotheses, references, sources):
    return [0.5] * len(hypotheses)


# ---- BLEU

def test_bleu_by_hand():
    """`the cat sat on mat` against `the cat sat on the mat`: 5/5 words, 3/4 bigrams (not on-mat), 2/3, 1/2 (the cat
    sat on); brevity exp(1 - 6/5). BLEU = 100·e^-0.2·(1·3/4·2/3·1/2)^(1/4) = 100·e^-0.2·(1/4)^(1/4)."""
    expected = 100 * np.exp(-0.2) * 0.25 ** 0.25
    assert bleu(["the cat sat on mat"], [["the cat sat on the mat"]]) == pytest.approx(expected)
    assert sentence_bleu(["the cat sat on mat"], [["the cat sat on the mat"]]) == pytest.approx([expected / 100])


def test_bleu_smoothing_by_hand():
    """`a b c d` against `a c b x`: 3/4 words, then no match of 3, 2, 1 n-grams: 1/(2·3), 1/(4·2), 1/(8·1); no
    brevity penalty."""
    assert bleu(["a b c d"], [["a c b x"]]) == pytest.approx(100 * (3 / 4 / 6 / 8 / 8) ** 0.25)


def test_bleu_of_texts_shorter_than_four_words():
    """A corpus without any 4-gram scores 0; a sentence leaves out the orders that it does not reach."""
    assert bleu(["x y"], [["x y"]]) == 0
    assert sentence_bleu(["x y"], [["x y"]]) == pytest.approx([1])


def test_bleu_closest_reference_and_clipping_by_hand():
    """`a a a b` (4) against `a a b` (3) and `a b c d e` (5): both are 1 away, the shorter counts, so no brevity. Clip:
    a 2 of 3, b 1: 3/4; aa 1 of 2, ab 1: 2/3; aab 1 of 2; aaab 0 of 1 -> 1/2."""
    assert bleu(["a a a b"], [["a b c d e", "a a b"]]) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_bleu_equals_values_of_sacrebleu():
    """Computed with sacrebleu 2.6.0: corpus_bleu (references padded with None) and sentence_bleu, defaults."""
    assert bleu(HYPOTHESES, REFERENCES) == pytest.approx(SACREBLEU_CORPUS, abs=1e-6)
    np.testing.assert_allclose(sentence_bleu(HYPOTHESES, REFERENCES), SACREBLEU_SENTENCES, atol=1e-9)


def test_bleu_of_no_texts_and_case():
    assert bleu([], []) == 0 and sentence_bleu([], []).shape == (0,)
    assert bleu(["A B C D"], [["a b c d"]]) == 0


# ---- slots

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


@pytest.mark.parametrize("errors", [slot_errors, slot_errors2])
@pytest.mark.parametrize("name, value, right, wrong", SLOT_CASES)
def test_each_slot_both_ways(errors, name, value, right, wrong):
    source = f"name[xname], {name}[{value}]"
    counted, slots = errors([f"xname: {right}.", f"xname: {wrong}."], [source] * 2)
    assert counted[0] == 0 and counted[1] >= 1
    np.testing.assert_array_equal(slots, [2, 2])


@pytest.mark.parametrize("errors", [slot_errors, slot_errors2])
def test_a_whole_description(errors):
    source = ("name[xname], eatType[pub], food[Italian], priceRange[£20-25], customer rating[5 out of 5], "
              "area[city centre], familyFriendly[no], near[xnear]")
    good = ("xname is a pub in the city centre near xnear. It serves Italian food for £20-25, is not family-friendly "
            "and has a customer rating of 5 out of 5.")
    for text, expected in [(good, 0), (good.replace("Italian ", ""), 1), (good.replace("not ", ""), 1),
                           (good.replace("city centre", "riverside area"), 1), (good.replace("xname", "It"), 1),
                           ("", 8)]:
        assert errors([text], [source])[0] == [expected], text


@pytest.mark.parametrize("errors", [slot_errors, slot_errors2])
def test_what_the_source_lacks_is_an_error_once_per_slot(errors):
    text = "xname is a cheap French pub by the river near xnear, kid friendly and highly rated."
    assert errors([text], ["name[xname]"])[0] == [7]
    assert errors(["xname is a restaurant"], ["name[xname]"])[0] == [0]                 # any place may be called that
    assert errors(["xname is a Thai place"], ["name[xname], food[Thai]"])[0] == [0]     # a value that E2E lacks
    assert errors(["xname is a place"], ["name[xname], food[Thai]"])[0] == [1]


def test_saying_it_too_often_and_beside_the_right_value():
    source = ["name[xname], food[Italian]"]
    assert slot_errors(["xname: Italian food, Italian wine"], source)[0] == [0]
    assert slot_errors(["xname: Italian food, Italian wine, Italian staff"], source)[0] == [1]
    assert slot_errors(["xname: Italian and French food"], source)[0] == [1]
    assert slot_errors(["xname xname xname: Italian"], source)[0] == [0]


def test_numbers_may_be_put_in_words_but_not_the_reverse():
    texts, sources = ["xname is low rated", "xname has 1 star"], ["name[xname], customer rating[%s]"]
    assert slot_errors(texts, [sources[0] % "1 out of 5"] * 2)[0].tolist() == [0, 0]
    assert slot_errors(texts, [sources[0] % "low"] * 2)[0].tolist() == [0, 1]


def test_slot_accuracy_and_its_floor():
    """Two slots: no error 1, one error 1/2; five errors (food wrong, four added) stay at 0."""
    texts = ["xname: Italian", "xname", "xname: French, cheap, riverside, kids, pub"]
    np.testing.assert_allclose(slot(texts, [[""]] * 3, ["name[xname], food[Italian]"] * 3), [1, 0.5, 0])


def test_sources_that_are_no_meaning_representation():
    assert has_slots("name[xname], priceRange[£20-25]") and not has_slots("place: Oslo; sky: clear")
    assert not has_slots("") and not has_slots("name[xname], colour[red]") and not has_slots("name[xname] and more")
    with pytest.raises(InputError, match="place: Oslo"):
        slot(["x"], [["x"]], ["place: Oslo"])


# ---- rewards by name

def test_built_in_rewards_and_their_mean():
    texts, references, sources = ["xname serves Italian food"], [["xname is Italian"]], ["name[xname], food[French]"]
    one = {name: load_reward(name)(texts, references, sources) for name in ("rouge", "bleu", "slot")}
    assert one["rouge"] == pytest.approx(rouge(texts, references).mean(1)) and one["slot"] == pytest.approx([0.5])
    assert one["bleu"] == pytest.approx(sentence_bleu(texts, references))
    got = load_reward("rouge + slot+bleu")(texts, references, sources)
    assert got.dtype == np.float64 and got == pytest.approx(sum(one.values()) / 3)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(h, r, s): return [min(1, len(x) / 10) for x in h]\ndef few(h, r, s): return [0.5]\n"
        "def nan(h, r, s): return [float('nan')] * len(h)\ndef big(h, r, s): return [0.5, 1.5]\n"
        "def none(h, r, s): return None\ndef broken(h, r, s): return 1 / 0\n")
    (tmp_path / "my_broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


def test_rewards_of_the_user(user_module):
    np.testing.assert_allclose(load_reward("my_rewards:length")(["abcde", ""], [[""]] * 2, [""] * 2), [0.5, 0])
    with pytest.raises(ZeroDivisionError):
        load_reward("my_rewards:broken")(["a"], [["a"]], ["s"])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_reward("my_broken:f")


@pytest.mark.parametrize("name, says", [("few", "shape .1,.: expected 2"), ("nan", "returned nan for hypothesis 0"),
                                        ("big", "1.5 for hypothesis 1"), ("none", "returned NoneType")])
def test_results_are_checked(user_module, name, says):
    with pytest.raises(InputError, match=says) as error:
        load_reward(f"my_rewards:{name}")(["a", "b"], [["a"], ["b"]], ["s", "s"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec, says", [("rogue", "did you mean 'rouge'"), ("", "expected rouge, bleu, slot"),
                                        ("rouge+", "expected rouge"), ("my_reward:length", "did you mean 'my_rewards'"),
                                        ("my_rewards:lenght", "did you mean 'length'"),
                                        ("no.such:f", "no module 'no'")])
def test_unknown_rewards_name_the_nearest(user_module, spec, says):
    with pytest.raises(InputError, match=says):
        load_reward(spec)
