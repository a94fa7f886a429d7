"""rewards.py against cases worked by hand, slow obvious versions, and the reference packages."""
import random
import sys
from collections import Counter

import numpy as np
import pytest

import data
from data import InputError
from data.rewards import (RewardError, bleu, blind_to, chrf, load_reward, rouge,
                          sentence_bleu, source_of)

HYPOTHESES = ["The Mill is a cheap pub near Café Sicilia, rated 5 out of 5.",
              "It costs £20-25; don't bring kids_or DOGS!", "", "a a a b a a",
              "आज सुबह भारी बारिश", "今天早上有大雨"]
REFERENCES = [["The Mill, a cheap pub by Café Sicilia, is rated 5 out of 5.",
               "A cheap pub: The Mill."],
              ["It costs £20-25 and don't bring kids or dogs.", "Kids & dogs: no!",
               "It's 20-25."],
              ["not empty"], ["a b a b", "b a a"],
              ["आज भारी बारिश होगी", "बारिश"], ["今天早上有小雨。"]]
NASTY = ["the ", "Cat", " sat.", "_a", "£20-25 ", "naïve", "İx", "a,b", "!", "don't ", "\u212a",
         "日本", "&amp;", "-\n", " ", "\0", "१२", "\u00a0", "1.5", "<skipped>"]


def random_texts(seed: int, pieces, longest: int, count: int):
    """Hypotheses and one to three references each, of pieces joined by nothing."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(pieces, k=rng.randrange(longest + 1)))
    hypotheses = [text() for _ in range(count)]
    return hypotheses, [[text() for _ in range(rng.randint(1, 3))] for _ in hypotheses]


# ---- all metrics

@pytest.mark.parametrize("metric, hypothesis, references, expected", [
    # 5 words and 6. ROUGE-1: the 2 of 2, cat 1 of 2, sat 1: 4 hits, F1 = 2·4/(5+6). ROUGE-2: the
    # hypothesis has the-cat twice, cat-the, cat-sat; the reference the-cat once, cat-sat: 2 hits of
    # 4 and 5. ROUGE-L: the longest common subsequence is `the cat sat`.
    (rouge, "the cat the cat sat", ["The cat sat on the mat."], [8 / 11, 4 / 9, 6 / 11]),
    # All words, no bigram, LCS 1: F1 1, 0, 1/4; and 2 words, 1 of 3 bigrams, LCS 2: F1 1/2, 1/3,
    # 1/2: the best of each column.
    (rouge, "a b c d", ["d c b a", "a b x y"], [1, 1 / 3, 1 / 2]),
    (rouge, "", ["", "!"], [0, 0, 0]),
    (rouge, "a\0b \0", ["a b"], [1, 1, 1]),
    # 5/5 words, 3/4 bigrams (not on-mat), 2/3, 1/2 (the cat sat on); brevity exp(1 - 6/5).
    (bleu, "the cat sat on mat", ["the cat sat on the mat"], 100 * np.exp(-.2) * .25 ** .25),
    (sentence_bleu, "the cat sat on mat", ["the cat sat on the mat"], np.exp(-.2) * .25 ** .25),
    # 3/4 words, then no match of 3, 2, 1 n-grams: 1/(2·3), 1/(4·2), 1/(8·1); no brevity penalty.
    (bleu, "a b c d", ["a c b x"], 100 * (3 / 4 / 6 / 8 / 8) ** .25),
    # 4 words; 3 and 5 are both 1 away, the shorter counts, so no brevity. Clip: a 2 of 3, b 1: 3/4;
    # aa 1 of 2, ab 1: 2/3; aab 1 of 2; aaab 0 of 1: 1/2.
    (bleu, "a a a b", ["a b c d e", "a a b"], 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** .25),
    # A corpus without any 4-gram scores 0; a sentence leaves out the orders that it does not reach.
    (bleu, "x y", ["x y"], 0),
    (sentence_bleu, "x y", ["x y"], 1),
    (bleu, "A B C D", ["a b c d"], 0),
    # `aba` and `abab`. 1-grams: 3 of 3 and of 4; 2-grams: ab and ba, 2 of 2 and of 3; 3-grams: aba,
    # 1 of 1 and of 2; longer ones do not exist in both. P = 1, R = (3/4 + 2/3 + 1/2)/3 = 23/36,
    # F = 5PR/(4P + R) = 5·23/(4·36 + 23).
    (chrf, "ab a", ["ab\tab"], 115 / 167),
    (chrf, "日本語", ["日本語"], 1), (chrf, "abc", ["d"], 0), (chrf, " ", [""], 0), (chrf, "x", [" "], 0),
])
def test_by_hand(metric, hypothesis, references, expected):
    np.testing.assert_allclose(np.squeeze(metric([hypothesis], [references])), expected, atol=1e-12)


@pytest.mark.parametrize("metric, count, expected", [
    # Computed with rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi, and
    # sacrebleu 2.6.0: corpus_bleu (references padded with None), sentence_bleu, sentence_chrf.
    (rouge, 6, [[0.9285714286, 0.6153846154, 0.8571428571],
                [0.9523809524, 0.8421052632, 0.9523809524], [0, 0, 0],
                [0.6666666667, 0.5714285714, 0.6666666667], [0, 0, 0], [0, 0, 0]]),
    (bleu, 4, 44.0928710771),
    (sentence_bleu, 4, [0.4684107769, 0.4089601472, 0, 0.3976353644]),
    (chrf, 6, [0.7152454743, 0.6517304331, 0, 0.7565789474, 0.5871914398, 0.425895533]),
])
def test_values_of_the_packages(metric, count, expected):
    np.testing.assert_allclose(metric(HYPOTHESES[:count], REFERENCES[:count]), expected, atol=1e-9)


@pytest.mark.parametrize("metric", [rouge, bleu, sentence_bleu, chrf])
def test_missing_references_are_refused_and_no_texts_are_not(metric):
    for references in ([[]], [], ["a"]):  # a text in place of a list of them has letters, too
        with pytest.raises(ValueError):
            metric(["a"], references)
    shapes = {rouge: (0, 3), bleu: (), sentence_bleu: (0,), chrf: (0,)}
    assert np.shape(metric([], [])) == shapes[metric]


# ---- ROUGE in bulk

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
    hypotheses, references = hypotheses * 2, references + references[::-1]  # texts that repeat
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


# ---- rewards by name

def test_built_in_rewards_and_their_mean():
    case = texts, references, sources = (
        ["xname serves Italian food"], [["xname is Italian"]], ["name[xname], food[French]"])
    expected = {"rouge": rouge(texts, references).mean(1), "chrf": chrf(texts, references),
                "bleu": sentence_bleu(texts, references), "slot": np.array([0.5])}
    for name, values in expected.items():
        assert load_reward(name)(*case) == pytest.approx(values)
    got = load_reward("rouge + slot+bleu +chrf")(*case)
    assert got.dtype == np.float64 and got == pytest.approx(sum(expected.values()) / 4)


MODULE = """
import torch

def length(h, r, s): return [min(1, len(x) / 10) for x in h]
def tensor(h, r, s): return torch.tensor([0.5, 0.0])
def greedy(h, r, s):
    h.clear(), r[0].clear()
    return [0.5, 0]

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
    for name in ("length", "tensor", "greedy"):
        np.testing.assert_allclose(load_reward(f"my_rewards:{name}")(*cases), [0.5, 0])
    np.testing.assert_allclose(load_reward("my_rewards:greedy+my_rewards:length")(*cases), [.5, 0])
    assert cases == (["abcde", ""], [["", "x"]] * 2, ["", ""])  # inputs are copied


def test_equal_cases_are_scored_once(user_module):
    """A reward sees each (hypothesis, references, source) once, as lists; every hypothesis gets
    its value."""
    reward = load_reward("my_rewards:seen")
    got = reward(["a", "bb", "a", "a", "a"], [["x"], ["x"], ["x"], ["x", "y"], ["x"]],
                 ["s", "s", "s", "s", "t"])
    np.testing.assert_allclose(got, [0.3, 0.4, 0.3, 0.5, 0.8])
    calls = sys.modules["my_rewards"].calls
    assert calls == [(["a", "bb", "a", "a"], [["x"], ["x"], ["x", "y"], ["x"]],
                      ["s", "s", "s", "t"])]
    assert reward([], [], []).shape == (0,)
    with pytest.raises(ValueError):
        reward(["a"], [], ["s"])


@pytest.mark.parametrize("result, says", [
    ("[0.5]", "list of shape (1,): expected 2"), ("[[0.5], [0.5]]", "list of shape (2, 1): exp"),
    ("[float('nan')] * 2", "nan for the text 'a': expected 2 finite numbers in 0..1"),
    ("[0.5, 1.5]", "1.5 for the text 'b'"), ("[0.5, None]", "None for the text 'b'"),
    ("None", "NoneType of shape ()"), ("0.5", "float of shape ()"), ("'01'", "str of shape ()"),
    ("b'01'", "bytes of shape ()"), ("['good'] * 2", "list: expected 2"),
    ("{0.2, 0.7}", "set: expected 2 finite numbers in 0..1, one for each hypothesis, as a list"),
    ("{'a': 0.2, 'b': 0.7}", "dict: expected 2"), ("{0: 0.2}.values()", "dict_values: expected 2"),
    ("(x for x in [.2, .7])", "generator: expected 2"), ("frozenset([1])", "frozenset: expected 2"),
    ("torch.tensor([0.5, 0.5], requires_grad=True)", "Tensor: expected 2"),
    ("torch.tensor([0.5, 1.5])", "1.5 for the text 'b'")])
def test_results_are_checked(folder, result, says):
    """None is no number, a set and a dictionary have no order."""
    (folder / "mine.py").write_text(f"import torch\ndef f(h, r, s): return {result}", "utf-8")
    with pytest.raises(InputError) as error:
        load_reward("mine:f")(["a", "b"], [["a"], ["b"]], ["s", "s"])
    assert str(error.value).startswith(f"reward 'mine:f' returned {says}")
    assert "\n" not in str(error.value)


RAISED = ["1 / 0", "raise ConnectionError('down')", "raise BrokenPipeError", "open('no such')",
          "raise SystemExit(0)", "import data; raise data.InputError('mine')",
          "import a_package_that_is_missing", "raise BaseException('odd')"]


@pytest.mark.parametrize("statement", RAISED)
def test_errors_of_the_user_are_theirs(folder, statement):
    """What is raised in a function or at import is the cause of a RewardError, whatever its type,
    and its traceback ends in the user's file."""
    (folder / "calls.py").write_text(f"def f(h, r, s):\n    {statement}\n", "utf-8")
    (folder / "imports.py").write_text(f"{statement}\n", "utf-8")
    case = ["a", "b"], [["a"], ["b"]], ["s", "s"]
    for name in ("calls", "imports"):
        with pytest.raises(RewardError, match=f"reward '{name}:f' raised") as error:
            load_reward(f"{name}:f")(*case)
        last, files = error.value.__cause__.__traceback__, []
        while last:
            files.append(last.tb_frame.f_code.co_filename)
            last = last.tb_next
        assert str(folder / f"{name}.py") in files
    (folder / "stops.py").write_text("def f(h, r, s): raise KeyboardInterrupt", "utf-8")
    with pytest.raises(KeyboardInterrupt):  # which is not an error
        load_reward("stops:f")(*case)


def test_a_file_with_the_name_of_ours(folder):
    """The line says whose module was found."""
    (folder / "data.py").write_text("def f(h, r, s): return [1] * len(h)\n", "utf-8")
    with pytest.raises(InputError, match="<module 'data' from '.*__init__.py'> has no function"):
        load_reward("data:f")


def test_a_neighbour_is_imported(folder):
    (folder / "imports_neighbour.py").write_text(
        "from a_neighbour import VALUE\nimport data.rewards\n"
        "def f(h, r, s): return [VALUE for _ in data.rewards.chrf(h, r)]\n", "utf-8")
    (folder / "a_neighbour.py").write_text("VALUE = 0.25", "utf-8")
    assert load_reward("imports_neighbour:f")(["a"], [["a"]], ["s"]) == [0.25]
    assert sys.modules["data"] is data


def test_packages_and_installed_modules(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "part.py").write_text(
        "from .other import f\nfrom pack.other import f as again\n", "utf-8")
    (folder / "pack" / "other.py").write_text("def f(h, r, s): return [1.0] * len(h)", "utf-8")
    assert load_reward("pack.part:f")(["a"], [["a"]], ["s"]) == [1]
    (folder / "statistics").mkdir()  # a folder of data hides no module
    with pytest.raises(InputError, match="'statistics' .* no function 'meen'"):
        load_reward("statistics:meen")
    load_reward("statistics:mean+math:floor")


@pytest.mark.parametrize("spec, says", [
    ("rogue", "'rogue': expected rouge, bleu"), ("", "expected rouge, bleu, chrf, slot"),
    ("rouge+", "expected rouge"), ("my_reward:length", "no module 'my_reward' here"),
    ("my_rewards.py:length", "no module 'my_rewards.py' here or installed"),
    ("my_rewards:lenght", "no function 'lenght'"), ("no.such:f", "no module 'no.such'"),
    (".x:f", "expected rouge"), ("a/b:f", "expected rouge"), ("my_rewards:", "expected rouge"),
    ("my_rewards:calls", "no function 'calls'")])
def test_unknown_rewards_are_one_line(user_module, spec, says):
    with pytest.raises(InputError, match=says) as error:
        load_reward(spec)
    assert "\n" not in str(error.value)


# ---- what is known before a run

FILES = {
    "mine.py": "import helper, bundle.early\ndef f(h, r, s): return [1] * len(h)",
    "helper.py": "from deeper import *\nimport data.rewards", "deeper.py": "import helper, json",
    "bundle/__init__.py": "", "bundle/early.py": "", "unused.py": "", "bundle/unused.py": ""}


def test_the_code_of_a_reward_is_all_that_its_file_imports_from_its_folder(folder):
    """Directly or not; no other file, and none of ours."""
    for name, code in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code, "utf-8")
    load_reward("mine:f+rouge")
    first, changed = source_of("mine:f+rouge"), set()
    for name, code in FILES.items():
        (folder / name).write_text(code + " # edited", "utf-8")
        changed |= {name} if source_of("mine:f+rouge") != first else set()
        (folder / name).write_text(code, "utf-8")
    assert changed == FILES.keys() - {"unused.py", "bundle/unused.py"}
    assert source_of("rouge+slot") == b""


@pytest.mark.parametrize("spec, text, says", [
    ("rouge", "आज सुबह भारी बारिश", "rouge reads only a to z"), ("rouge", "今天早上有12度", "rouge"),
    ("bleu+rouge", "Сегодня утром дождь", "100% of the letters"), ("bleu", "Сегодня дождь", None),
    ("chrf", "今天早上奥斯陆有大雨，气温十二度，北风二十节。", None), ("slot", "今天", None),
    ("rouge+bleu", "Sáng nay ở Hà Nội trời mưa to", None), ("rouge", "Très bien, été!", None),
    ("rouge", "🙂🙂 👍", "100% of the letters and signs"), ("rouge", "→ ↑ ↓ 3", "75% of the letters"),
    ("rouge", "-- ... :-)", "rouge reads only"), ("chrf", "🙂🙂 👍", None),
    ("rouge", "It’s “5 °C” – fine", None), ("module:rouge", "今天", None)])
def test_references_that_a_reward_cannot_read(spec, text, says):
    line = blind_to(spec, [[text, text], [text]])
    assert line is None if says is None else says in line and "\n" not in line
