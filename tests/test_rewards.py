"""rewards.py against cases worked by hand, slow obvious versions, and the reference packages."""
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
from data import InputError
from data.rewards import (RewardError, bleu, blind_to, chrf, load_reward, rouge,
                          sentence_bleu)

HYPOTHESES = ["The Mill is a cheap pub near Café Sicilia, rated 5 out of 5.",
              "It costs £20-25; don't bring kids_or DOGS!", "", "a a a b a a",
              "आज सुबह भारी बारिश", "今天早上有大雨"]
REFERENCES = [["The Mill, a cheap pub by Café Sicilia, is rated 5 out of 5.",
               "A cheap pub: The Mill."],
              ["It costs £20-25 and don't bring kids or dogs.", "Kids & dogs: no!",
               "It's 20-25."],
              ["not empty"], ["a b a b", "b a a"],
              ["आज भारी बारिश होगी", "बारिश"], ["今天早上有小雨。"]]
# Computed with rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi, and
# sacrebleu 2.6.0: corpus_bleu (references padded with None), sentence_bleu, sentence_chrf.
ROUGE_SCORE = [[0.9285714286, 0.6153846154, 0.8571428571],
               [0.9523809524, 0.8421052632, 0.9523809524],
               [0, 0, 0], [0.6666666667, 0.5714285714, 0.6666666667], [0, 0, 0], [0, 0, 0]]
SACREBLEU_CORPUS = 44.09287107709119  # of the first four
SACREBLEU_SENTENCES = [0.4684107769, 0.4089601472, 0, 0.3976353644]
SACREBLEU_CHRF = [0.7152454743, 0.6517304331, 0, 0.7565789474, 0.5871914398, 0.425895533]


def random_texts(seed: int, pieces, longest: int, count: int):
    """Hypotheses and one to three references each, of pieces joined by nothing."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(pieces, k=rng.randrange(longest + 1)))
    hypotheses = [text() for _ in range(count)]
    return hypotheses, [[text() for _ in range(rng.randint(1, 3))] for _ in hypotheses]


NASTY = ["the ", "Cat", " sat.", "_a", "£20-25 ", "naïve", "İx", "a,b", "!", "don't ", "\u212a",
         "日本", "&amp;", "-\n", " ", "\0", "१२", "\u00a0", "1.5", "<skipped>"]


# ---- ROUGE

def test_rouge_by_hand():
    """Hypothesis `the cat the cat sat` (5 words), reference `the cat sat on the mat` (6 words).

    ROUGE-1: the 2 of 2, cat 1 of 2, sat 1: 4 hits, F1 = 2·4/(5+6) = 8/11. ROUGE-2: bigrams of the
    hypothesis: the-cat twice, cat-the, cat-sat; the reference has the-cat once and cat-sat: 2 hits
    of 4 and 5, F1 = 4/9. ROUGE-L: the longest common subsequence is `the cat sat`, F1 = 6/11."""
    got = rouge(["the cat the cat sat"], [["The cat sat on the mat."]])
    np.testing.assert_allclose(got, [[8 / 11, 4 / 9, 6 / 11]], atol=1e-12)


def test_rouge_takes_the_best_reference_in_each_column():
    """`a b c d` against `d c b a` (all words, no bigram, LCS 1: F1 1, 0, 1/4) and `a b x y` (2
    words, 1 of 3 bigrams, LCS 2: F1 1/2, 1/3, 1/2): the best of each column is 1, 1/3, 1/2."""
    got = rouge(["a b c d"], [["d c b a", "a b x y"]])
    np.testing.assert_allclose(got, [[1, 1 / 3, 1 / 2]], atol=1e-12)


def test_rouge_equals_values_of_rouge_score():
    np.testing.assert_allclose(rouge(HYPOTHESES, REFERENCES), ROUGE_SCORE, atol=1e-9)


def test_rouge_equals_rouge_score():
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = scorers.RougeScorer(names)
    hypotheses, references = random_texts(0, NASTY, 20, 200)
    expected = []
    for hypothesis, refs in zip(hypotheses, references):
        scores = scorer.score_multi(refs, hypothesis)
        expected.append([scores[name].fmeasure for name in names])
    np.testing.assert_allclose(rouge(hypotheses, references), expected, atol=1e-12)


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
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    return scores + [2 * table[-1][-1] / max(1, len(h) + len(r))]


@pytest.mark.parametrize("longest, count", [
    (1, 40), (4, 60), (24, 60), (63, 12), (66, 12), (130, 8), (260, 3)])
def test_rouge_equals_the_slow_version(longest, count):
    rng = random.Random(longest)
    pieces = [piece + " " for piece in rng.sample(NASTY, 7)]
    hypotheses, references = random_texts(longest, pieces, longest, count)
    expected = [np.max([slow_rouge(hypothesis, ref) for ref in refs], axis=0)
                for hypothesis, refs in zip(hypotheses, references)]
    np.testing.assert_allclose(rouge(hypotheses, references), expected, atol=1e-12)


def test_rouge_l_carries_through_integers_that_hold_no_match():
    """References of 3 to 5 integers, few hypothesis words in them: sums ripple through 64 bits
    without a match."""
    rng = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in rng.integers(0, 300, rng.integers(150, 300)))
                  for _ in range(60)]
    hypotheses = [" ".join(f"w{i}" for i in rng.integers(0, 300, 30)) for _ in references]
    expected = [slow_rouge(h, r) for h, r in zip(hypotheses, references)]
    got = rouge(hypotheses, [[r] for r in references])
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_rouge_of_repeated_and_of_no_texts():
    got = rouge(["a b", "c", "a b", "a b"], [["a"], ["c"], ["a"], ["b a"]])
    expected = [[2 / 3, 0, 2 / 3], [1, 0, 1], [2 / 3, 0, 2 / 3], [1, 0, 1 / 2]]
    np.testing.assert_allclose(got, expected)
    assert rouge([], []).shape == (0, 3)
    got = rouge(["", "", "a\0b \0"], [[""], ["!"], ["a b"]])
    np.testing.assert_array_equal(got, [[0, 0, 0], [0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("metric", [rouge, bleu, sentence_bleu, chrf])
def test_missing_references_are_refused(metric):
    with pytest.raises(ValueError):
        metric(["a"], [[]])
    with pytest.raises(ValueError):
        metric(["a"], [])


# ---- BLEU

def test_bleu_by_hand():
    """`the cat sat on mat` against `the cat sat on the mat`: 5/5 words, 3/4 bigrams (not on-mat),
    2/3, 1/2 (the cat sat on); brevity exp(1 - 6/5).
    BLEU = 100·e^-0.2·(1·3/4·2/3·1/2)^(1/4) = 100·e^-0.2·(1/4)^(1/4)."""
    expected = 100 * np.exp(-0.2) * 0.25 ** 0.25
    texts = ["the cat sat on mat"], [["the cat sat on the mat"]]
    assert bleu(*texts) == pytest.approx(expected)
    assert sentence_bleu(*texts) == pytest.approx([expected / 100])


def test_bleu_smoothing_by_hand():
    """`a b c d` against `a c b x`: 3/4 words, then no match of 3, 2, 1 n-grams: 1/(2·3), 1/(4·2),
    1/(8·1); no brevity penalty."""
    assert bleu(["a b c d"], [["a c b x"]]) == pytest.approx(100 * (3 / 4 / 6 / 8 / 8) ** 0.25)


def test_bleu_of_texts_shorter_than_four_words():
    """A corpus without any 4-gram scores 0; a sentence leaves out the orders it does not reach."""
    assert bleu(["x y"], [["x y"]]) == 0
    assert sentence_bleu(["x y"], [["x y"]]) == pytest.approx([1])


def test_bleu_closest_reference_and_clipping_by_hand():
    """`a a a b` (4) against `a a b` (3) and `a b c d e` (5): both are 1 away, the shorter counts,
    so no brevity. Clip: a 2 of 3, b 1: 3/4; aa 1 of 2, ab 1: 2/3; aab 1 of 2; aaab 0 of 1: 1/2."""
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu(["a a a b"], [["a b c d e", "a a b"]]) == pytest.approx(expected)


def test_bleu_equals_values_of_sacrebleu():
    got = bleu(HYPOTHESES[:4], REFERENCES[:4])
    assert got == pytest.approx(SACREBLEU_CORPUS, abs=1e-6)
    got = sentence_bleu(HYPOTHESES[:4], REFERENCES[:4])
    np.testing.assert_allclose(got, SACREBLEU_SENTENCES, atol=1e-9)


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    hypotheses, references = random_texts(1, NASTY, 20, 200)
    padded = [[refs[i] if i < len(refs) else None for refs in references] for i in range(3)]
    expected = sacrebleu.corpus_bleu(hypotheses, padded).score
    assert bleu(hypotheses, references) == pytest.approx(expected, abs=1e-9)
    expected = [sacrebleu.sentence_bleu(hypothesis, refs).score / 100
                for hypothesis, refs in zip(hypotheses, references)]
    np.testing.assert_allclose(sentence_bleu(hypotheses, references), expected, atol=1e-12)


def test_bleu_of_no_texts_and_case():
    assert bleu([], []) == 0 and sentence_bleu([], []).shape == (0,)
    assert bleu(["A B C D"], [["a b c d"]]) == 0


# ---- chrF

def test_chrf_by_hand():
    """`ab a` against `abab`: aba and abab without spaces. 1-grams: 3 of 3 and of 4; 2-grams: ab
    and ba, 2 of 2 and of 3; 3-grams: aba, 1 of 1 and of 2; longer ones do not exist in both.
    P = 1, R = (3/4 + 2/3 + 1/2)/3 = 23/36, F = 5PR/(4P + R) = 5·23/(4·36 + 23) = 115/167."""
    np.testing.assert_allclose(chrf(["ab a"], [["ab\tab"]]), [115 / 167], atol=1e-12)


def test_chrf_equals_values_of_sacrebleu():
    np.testing.assert_allclose(chrf(HYPOTHESES, REFERENCES), SACREBLEU_CHRF, atol=1e-9)


@pytest.mark.parametrize("pieces, longest", [
    (NASTY, 20), ("ab", 30), ("अआइ ि\u0301", 12), ("日本語天 a", 9), ("\U0001f600\u200d \0", 7)])
def test_chrf_equals_sacrebleu(pieces, longest):
    sacrebleu = pytest.importorskip("sacrebleu")
    hypotheses, references = random_texts(longest, pieces, longest, 100)
    expected = [sacrebleu.sentence_chrf(hypothesis, refs).score / 100
                for hypothesis, refs in zip(hypotheses, references)]
    np.testing.assert_allclose(chrf(hypotheses, references), expected, atol=1e-12)


def test_chrf_of_no_texts_and_its_ends():
    assert chrf([], []).shape == (0,)
    np.testing.assert_allclose(chrf(["日本語", "abc", " ", "x"], [["日本語"], ["d"], [""], [" "]]),
                               [1, 0, 0, 0])


# ---- rewards by name

def test_built_in_rewards_and_their_mean():
    texts, references = ["xname serves Italian food"], [["xname is Italian"]]
    sources = ["name[xname], food[French]"]
    one = {name: load_reward(name)(texts, references, sources)
           for name in ("rouge", "bleu", "chrf", "slot")}
    assert one["rouge"] == pytest.approx(rouge(texts, references).mean(1))
    assert one["bleu"] == pytest.approx(sentence_bleu(texts, references))
    assert one["chrf"] == pytest.approx(chrf(texts, references))
    assert one["slot"] == pytest.approx([0.5])
    got = load_reward("rouge + slot+bleu +chrf")(texts, references, sources)
    assert got.dtype == np.float64 and got == pytest.approx(sum(one.values()) / 4)


MODULE = """
class Odd(Exception):
    pass

def length(h, r, s): return [min(1, len(x) / 10) for x in h]
def few(h, r, s): return [0.5]
def nan(h, r, s): return [float('nan')] * len(h)
def big(h, r, s): return [0.5, 1.5]
def none(h, r, s): return None
def words(h, r, s): return ["good"] * len(h)
def lazy(h, r, s): return (min(1, len(x) / 10) for x in h)
def greedy(h, r, s):
    h.clear(), r[0].clear()
    return [1, 0]
def lazy_odd(h, r, s):
    yield 0.5
    raise Odd("at the second")

calls = []
def seen(h, r, s):
    calls.append((h, r, s))
    return [len(h) / 10 + len(r) / 5 + (s == 't') / 2 for h, r, s in zip(h, r, s)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current directory; modules imported from it are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def user_module(folder):
    (folder / "my_rewards.py").write_text(MODULE, "utf-8")


def test_rewards_of_the_user(user_module):
    cases = ["abcde", ""], [["", "x"]] * 2, ["", ""]
    for name in ("length", "lazy"):
        np.testing.assert_allclose(load_reward(f"my_rewards:{name}")(*cases), [0.5, 0])
    np.testing.assert_allclose(load_reward("my_rewards:greedy+my_rewards:length")(*cases),
                               [0.75, 0])
    assert cases == (["abcde", ""], [["", "x"]] * 2, ["", ""])  # inputs are copied


def test_equal_cases_are_scored_once(user_module):
    """A reward sees each (hypothesis, references, source) once, as lists; every hypothesis gets
    its value."""
    reward = load_reward("my_rewards:seen")
    got = reward(["a", "bb", "a", "a", "a"], [["x"], ["x"], ["x"], ["x", "y"], ["x"]],
                 ["s", "s", "s", "s", "t"])
    np.testing.assert_allclose(got, [0.3, 0.4, 0.3, 0.5, 0.8])
    calls, = [module.calls for name, module in sys.modules.items()
              if name.endswith(".my_rewards")]
    assert calls == [(["a", "bb", "a", "a"], [["x"], ["x"], ["x", "y"], ["x"]],
                      ["s", "s", "s", "t"])]
    assert reward([], [], []).shape == (0,)
    with pytest.raises(ValueError):
        reward(["a"], [], ["s"])


@pytest.mark.parametrize("name, says", [
    ("few", "shape .1,.: expected 2"), ("nan", "returned nan for hypothesis 0"),
    ("big", "1.5 for hypothesis 1"), ("none", "returned NoneType"), ("words", "returned list")])
def test_results_are_checked(user_module, name, says):
    with pytest.raises(InputError, match=says) as error:
        load_reward(f"my_rewards:{name}")(["a", "b"], [["a"], ["b"]], ["s", "s"])
    assert "\n" not in str(error.value)


def test_tensors_are_values_unless_they_need_gradients(folder):
    (folder / "tensors.py").write_text(
        "import torch\ndef fine(h, r, s): return torch.tensor([0.5])\n"
        "def learns(h, r, s): return torch.tensor([0.5], requires_grad=True)\n", "utf-8")
    assert load_reward("tensors:fine")(["a"], [["a"]], ["s"]) == [0.5]
    with pytest.raises(InputError, match="returned Tensor: expected 1 finite"):
        load_reward("tensors:learns")(["a"], [["a"]], ["s"])


RAISED = ["1 / 0", "raise ConnectionError('down')", "raise BrokenPipeError", "open('no such')",
          "raise SystemExit(0)", "import data; raise data.InputError('mine')",
          "import a_package_that_is_missing", "raise BaseException('odd')"]


@pytest.mark.parametrize("statement", RAISED)
def test_errors_of_the_user_are_theirs(folder, statement):
    """Whatever is raised, in a function or at import, is the cause of a RewardError, and its
    traceback ends in the user's file."""
    (folder / "calls.py").write_text(f"def f(h, r, s):\n    {statement}\n", "utf-8")
    (folder / "imports.py").write_text(f"{statement}\n", "utf-8")
    reward = load_reward("calls:f")
    for name, run in (("calls", lambda: reward(["a"], [["a"]], ["s"])),
                      ("imports", lambda: load_reward("imports:f"))):
        with pytest.raises(RewardError, match=f"reward '{name}:f' raised") as error:
            run()
        last = error.value.__cause__.__traceback__
        files = []
        while last:
            files.append(last.tb_frame.f_code.co_filename)
            last = last.tb_next
        assert str(folder / f"{name}.py") in files


def test_a_generator_raises_as_its_function_would(user_module):
    with pytest.raises(RewardError) as error:
        load_reward("my_rewards:lazy_odd")(["a", "b"], [["a"], ["b"]], ["s", "s"])
    assert type(error.value.__cause__).__name__ == "Odd"


def test_an_interrupt_passes(folder):
    (folder / "stops.py").write_text("def f(h, r, s): raise KeyboardInterrupt", "utf-8")
    with pytest.raises(KeyboardInterrupt):
        load_reward("stops:f")(["a"], [["a"]], ["s"])


@pytest.mark.parametrize("name", ["data", "model", "sorl", "lab", "theory", "train", "random"])
def test_a_module_of_the_user_may_have_any_name(folder, name):
    """It is found in the current directory, imports its neighbour and ours, and hides none of
    ours."""
    (folder / f"{name}.py").write_text(
        "from a_neighbour import VALUE\nimport data.rewards\n"
        "def f(h, r, s): return [VALUE for _ in data.rewards.chrf(h, r)]\n", "utf-8")
    (folder / "a_neighbour.py").write_text("VALUE = 0.25", "utf-8")
    assert load_reward(f"{name}:f")(["a"], [["a"]], ["s"]) == [0.25]
    assert sys.modules["data"] is data
    house = Path(data.__file__).parents[1]
    if (house / f"{name}.py").exists():
        assert importlib.util.find_spec(name).origin == str(house / f"{name}.py")


def test_packages_and_installed_modules(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "part.py").write_text(
        "from .other import f\nfrom pack.other import f as again\n", "utf-8")
    (folder / "pack" / "other.py").write_text("def f(h, r, s): return [1.0] * len(h)", "utf-8")
    assert load_reward("pack.part:f")(["a"], [["a"]], ["s"]) == [1]
    (folder / "statistics").mkdir()  # a folder of data hides no module
    with pytest.raises(InputError, match="'statistics' has no function 'meen'; did you mean 'mea"):
        load_reward("statistics:meen")
    assert callable(load_reward("statistics:mean")) and callable(load_reward("math:floor"))


@pytest.mark.parametrize("spec, says", [
    ("rogue", "did you mean 'rouge'"), ("", "expected rouge, bleu, chrf, slot"),
    ("rouge+", "expected rouge"), ("my_reward:length", "did you mean 'my_rewards'"),
    ("my_rewards.py:length", "no module 'my_rewards.py' here or installed; did you mean 'my_rew"),
    ("my_rewards:lenght", "did you mean 'length'"), ("no.such:f", "no module 'no.such'"),
    (".x:f", "expected rouge"), ("a/b:f", "expected rouge"), ("my_rewards:", "expected rouge"),
    (":f", "expected rouge"), ("my_rewards:calls", "no function 'calls'")])
def test_unknown_rewards_name_the_nearest(user_module, spec, says):
    with pytest.raises(InputError, match=says) as error:
        load_reward(spec)
    assert "\n" not in str(error.value)


# ---- what a reward cannot see

@pytest.mark.parametrize("spec, text, says", [
    ("rouge", "आज सुबह भारी बारिश", "rouge reads a to z"), ("rouge", "今天早上有12度", "rouge reads"),
    ("bleu+rouge", "Сегодня утром дождь", "100% of the letters"), ("bleu", "Сегодня дождь", None),
    ("bleu", "今天早上奥斯陆有大雨，气温十二度，北风二十节。", "bleu compares words between spaces"),
    ("chrf", "今天早上奥斯陆有大雨，气温十二度，北风二十节。", None), ("slot", "今天", None),
    ("rouge+bleu", "Sáng nay ở Hà Nội trời mưa to", None), ("rouge", "Très bien, été!", None),
    ("rouge", "...", None), ("module:rouge", "今天", None)])
def test_references_that_a_reward_cannot_read(spec, text, says):
    line = blind_to(spec, [[text, text], [text]])
    assert line is None if says is None else says in line and "\n" not in line
