"""The example and the numbers of the lesson, by other ways than lab/lesson.py's; and its pages."""
import math
import re
from pathlib import Path

import pytest

import theory
from lab import lesson

ROOT = Path(__file__).parent.parent
LESSON = (ROOT / "lab/LESSON.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def numbers(text: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"[+-]?\d[\d,]*\.?\d*", text)]


def rows_of(text: str) -> dict[str, str]:
    """The example's lines by their names: "y", "full, 1", "sample 1"."""
    return {name.strip(): rest for name, rest in re.findall(r"^(.{9})(.+)$", text, re.M)}


# --------------------------------------------------------------------------------------------------
# Numbers


def test_example_rewards_and_push():
    """ROUGE of five words against six: shared words, pairs of words, subsequence. The push on a
    drawn word is A / 2 for each of two samples, and the other sample's is its opposite."""
    text = lesson.example()
    R = (10 / 11 + 8 / 9 + 10 / 11) / 3, (6 / 11 + 2 / 9 + 6 / 11) / 3
    A = (R[0] - R[1]) / 2
    assert f"R = {R[0]:.3f}   A = {A:+.3f}" in rows_of(text)["sample 1"]
    assert f"R = {R[1]:.3f}   A = {-A:+.3f}" in rows_of(text)["sample 2"]
    assert f"column 2: rain {A / 2:+.3f}, wind {-A / 2:+.3f}\n" in text
    assert text.endswith(f"column 5: later {-A / 2:+.3f}, today {A / 2:+.3f}")


def test_example_shows_what_a_column_sees():
    """Column 5 is drawn from what stands in column 2 as it is fed: [MASK], the old word, a draw."""
    rows = rows_of(lesson.example())
    seen = {"masked": ("[MASK]", 5, 5), "static": ("wind", 5.5, 4.5), "full, 1": ("rain", 4.5, 5.5),
            "full, 2": ("wind", 5.5, 4.5)}
    for name, (word, *logits) in seen.items():
        e = [math.exp(z) for z in (*logits, *[0] * 7)]  # later, today and the other seven words
        assert rows[name].split()[1] == word
        assert rows[name].endswith(f"later {e[0] / sum(e):.2f}  today {e[1] / sum(e):.2f}"), name
    assert rows["masked"].split()[4] == "[MASK]"


def test_gradient():
    """Closed forms: K independent samples; THEORY's variance of leave-one-out; 1 - 1/K of that."""
    found = {line.split()[0]: numbers(line.replace("K =", "")) for line in
             lesson.gradient().splitlines()}
    for i, K in enumerate((1, 2, 4, 8)):
        deviation = {"none": math.sqrt(1 / 16 / K),
                     "loo": math.sqrt(1 / (8 * K * (K - 1))) if K > 1 else 1 / 4}
        deviation["mean"] = (1 - 1 / K) * deviation["loo"]
        expected = {"none": 1 / 4, "loo": 1 / 4, "mean": (1 - 1 / K) / 4}
        for name in expected:
            assert found[name][2 * i:2 * i + 2] == pytest.approx(
                [expected[name], deviation[name]], abs=6e-4), (name, K)


def test_neighbours():
    """The optima that theory.py states and tests."""
    joint, J, lean = theory.optima(0.43)
    one = (1 + lean) / 2  # Pr(1)
    reads, both = lesson.neighbours().split("both in one pass")
    assert reads.endswith(f"= {joint:.3f}\n") and both.endswith(f"= {J:.3f}")
    assert f"{(1 - one) ** 2:.3f}" in both and f"{one ** 2:.3f}" in both
    assert f".{1e4 * one:.0f} · .{1e4 * one:.0f} = " in LESSON


def test_cost_is_what_was_measured():
    """Formulas by the flags of the main job, and FPs that runs counted: within three percent."""
    rows = {line.split()[0]: numbers(line) for line in lesson.cost().splitlines()[1:]}
    measured = {name: row for name, row in rows.items() if len(row) == 5}
    assert {"offline", "online", "full", "masked", "static", "refresh"} <= measured.keys()
    for name, (*_, formula, counted) in measured.items():
        assert formula == pytest.approx(counted, rel=0.03), name
        assert name not in ("masked", "static", "offline") or formula == counted
    each, updates, sources, total = rows["tail"][:4]
    assert total == each * updates * sources > 0


def test_ratio():
    """PPO's formula, differentiated by differences."""
    lines = lesson.ratio().splitlines()
    for line, A in zip(lines[1:], (1, -1)):
        for rho, push in zip(numbers(lines[0]), numbers(line.split("  ", 1)[1])):
            def clipped(z):
                return min(A * math.exp(z), A * min(max(math.exp(z), 0.8), 1.2))
            z = math.log(rho)
            assert (clipped(z + 1e-6) - clipped(z - 1e-6)) / 2e-6 == pytest.approx(push, abs=1e-4)


def test_branch():
    """Mean rewards by listing the policy's texts; gradients by differences of E[R]."""
    reward = {(0, 0): 0.5, (1, 1): 1.0, (0, 1): 0.0, (1, 0): 0.0}

    def texts(q):  # the policy's texts and their probabilities
        return {(a, b): (q if a else 1 - q) * (0.99 if a == b else 0.01) for a, b in reward}

    def expected(q, old) -> float:
        """E[R] if Pr(first token is 1) = q; the second one is written by the policy, or stays."""
        if not old:
            return sum(p * reward[text] for text, p in texts(q).items())
        return sum((q if a else 1 - q) * p * reward[a, y]
                   for a in (0, 1) for (_, y), p in texts(0.2).items())

    def of_logit(z):
        return 1 / (1 + math.exp(-z))

    z = math.log(0.2 / 0.8)
    for old, line in enumerate(lesson.branch().splitlines()[1:]):
        zero, one, push = numbers(line)
        assert (zero, one) == pytest.approx((expected(0, old), expected(1, old)), abs=6e-4)
        slope = (expected(of_logit(z + 1e-5), old) - expected(of_logit(z - 1e-5), old)) / 2e-5
        assert push == pytest.approx(slope, abs=6e-5)
    assert sum(p * reward[text] for text, p in texts(0.2).items()) == pytest.approx(0.594)


# --------------------------------------------------------------------------------------------------
# Pages


def test_lesson_shows_what_is_computed():
    blocks = dict(re.findall(r"<!-- python -m lab.lesson (\w+) -->\n```\n(.*?)\n```", LESSON, re.S))
    assert blocks.keys() == lesson.PARTS.keys() - {"example"}  # which is the README's
    for name, block in blocks.items():
        assert block == lesson.PARTS[name](), f"python -m lab.lesson {name} prints something else"
    assert len(LESSON.splitlines()) <= 250


def test_calculations_by_hand_are_right():
    """Everything like `2 · .3 · .7 = .42`, to the digits that it shows."""
    prose = re.sub(r"```.*?```", "", LESSON + README, flags=re.S)
    terms = r"[\d.½¼()\[\]\s]*"
    found = re.findall(rf"([\d.½(]{terms}(?:[·+−/]{terms})+)\s=\s([−\d.]*\d)", prose)
    assert len(found) > 25
    symbols = {"·": "*", "−": "-", "½": "0.5", "¼": "0.25", "[": "(", "]": ")", "\n": " "}
    for left, right in found:
        for symbol, meaning in symbols.items():
            left, right = left.replace(symbol, meaning), right.replace(symbol, meaning)
        digits = len(right.partition(".")[2])
        assert eval(left) == pytest.approx(float(right), abs=0.5001 * 10 ** -digits), (left, right)


def test_commands(capsys):
    lesson.main(["branch"])
    assert capsys.readouterr().out.endswith(f"\n\n{lesson.branch()}\n\n")
    lesson.main([])
    assert all(part() in text for text in [capsys.readouterr().out]
               for part in lesson.PARTS.values())
    with pytest.raises(SystemExit, match="2"):
        lesson.main(["paint"])
    error = capsys.readouterr().err
    assert error.startswith("lab.lesson: ") and "'paint'" in error and error.count("\n") == 1
