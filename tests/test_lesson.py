"""The example of the method for a first reader."""
import math
import re

import pytest

from lab import lesson


def rows_of(text: str) -> dict[str, str]:
    """The printed lines by their names: "y", "5 sees", "sample 1"."""
    return {name.strip(): rest for name, rest in re.findall(r"^(.{8})(.*)$", text, re.M)}


def test_example_by_hand():
    """ROUGE of five words against six: 5 words agree, 4 of 4 and 5 pairs, a subsequence of 5."""
    rows, text = rows_of(lesson.example()), lesson.example()
    R = (10 / 11 + 8 / 9 + 10 / 11) / 3, (8 / 11 + 6 / 9 + 8 / 11) / 3
    A = (R[0] - R[1]) / 2
    e = [math.exp(z) for z in (3, 3, 2, 0, 0, 0, 0, 0, 0)]  # "rain" after "some", of nine words
    f = [math.exp(z) for z in (3, 2.5, 0, 0, 0, 0, 0, 0, 0)]  # "later" and "today" after "town"
    sums = [math.log(e[1] / sum(e) * f[i] / sum(f)) for i in (1, 0)]
    assert f"R = {R[0]:.3f}   A = {A:+.3f}" in rows["sample 1"]
    assert f"R = {R[1]:.3f}   A = {-A:+.3f}" in rows["sample 2"]
    assert [f"{total:.3f}" in text for total in sums] == [True, True]
    assert f"Σ log π = {-A * (sums[0] - sums[1]) / 2:+.4f}" in text
    # d loss / d logit of "later" is -A/2 · ((0 - π) - (1 - π)) = A/2, and a step goes against it.
    assert f"town -> later {-A / 2:+.3f}, town -> today {A / 2:+.3f}\n" in text
    assert "rain" not in text.splitlines()[-2], "its two advantages cancel"


def test_example_shows_that_the_model_is_causal():
    """What a draw sees is what is fed before it; [MASK] hides the draw from later columns only."""
    text = lesson.example()
    cells = {name: rest[:48].split() for name, rest in rows_of(text).items()}
    assert cells["fed"] == ["some", "[MASK]", "in", "town", "[MASK]", "on"]
    assert cells["2 sees"] == cells["fed"][:1] and cells["5 sees"] == cells["fed"][:4]
    assert "So [MASK] hides a draw from later columns only" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("words, message", [
    ([], "required: what"), (["paint"], "invalid choice: 'paint'"),
    (["example", "x"], "unrecognized arguments: x")])
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        lesson.main(words)
    error = capsys.readouterr().err
    assert error.startswith("lab.lesson: ") and message in error and error.count("\n") == 1
