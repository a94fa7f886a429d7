"""The two pictures of the method for a first reader."""
import math
import os
import re

import pytest
import torch

import data
from lab import lesson
from lab.policy import new_policy, policy_state, save
from lab.settings import make_config


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


@pytest.fixture
def checkpoint(tmp_path):
    cfg = make_config(dict(n_layer=1, n_embd=16, vocab_size=400, max_len=24))
    policy = new_policy(cfg, data.load_dataset("forecast"), torch.device("cpu"))
    save(policy_state(policy, cfg), str(tmp_path / "best.pt"))
    return str(tmp_path / "best.pt"), policy.tok


def test_picture(checkpoint, tmp_path, monkeypatch):
    """The costs and the cells that it paints, then the painting."""
    init, tok = checkpoint
    calls, plot = [], lesson.plot_settings
    monkeypatch.setattr(lesson, "plot_settings", lambda *args: calls.append(args) or plot(*args))
    lesson.main(["picture", "--init", init, "--out", str(tmp_path / "settings.png")])
    rows = {title.split("\n")[0]: (int(title.split()[1]), *more)
            for title, *more in calls[0][2]}
    assert list(rows) == ["online", "full", "masked", "static", "offline"]
    assert [rows[name][0] for name in ("masked", "static", "offline")] == [1, 1, 1]
    assert rows["online"][0] > rows["full"][0] > lesson.K
    for name, (_, fed, text, acted, decodes) in rows.items():
        assert torch.equal((fed == tok.mask) & (text != tok.pad), acted & (name == "masked")), name
        assert decodes == (name in ("online", "full")), name
        assert acted.any() == (name != "offline"), name
        assert torch.equal(fed, text) == (name in ("online", "full", "offline")), name
    assert os.path.getsize(tmp_path / "settings.png") > 20_000


@pytest.mark.parametrize("words, message", [
    (["picture", "--init", "none.pt"], "none.pt: no checkpoint that can be read"),
    (["picture", "--out", "missing/x.png"], "missing/x.png was not written"),
    (["paint"], "invalid choice: 'paint'"),
])
def test_mistakes_are_one_line(checkpoint, words, message, capsys):
    if words[0] == "picture" and "--init" not in words:
        words = [*words, "--init", checkpoint[0]]
    with pytest.raises(SystemExit, match="2"):
        lesson.main(words)
    error = capsys.readouterr().err
    assert error.startswith("lab.lesson: ") and message in error and error.count("\n") == 1
