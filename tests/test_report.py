"""Tables and figures: hand-worked values, files that cannot be trusted, figures that fail."""
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from data import InputError, Record
from lab import plots, report

NAMES = ("base", "mle", "offline", "online", "full", "tail", "masked", "static", "refresh")
FACTS = "This evening in {} we expect dense fog with {} degrees and wind from the north at 5 knots."
RECORDS = [Record("Oslo | evening | dense fog | 3 | north 5", ["A text."], names={"Oslo": "Øslo"}),
           Record("a source of another form", ["A text."]),
           Record("Cork | evening | dense fog | 7 | north 5", ["A text."])]
TEXTS = [FACTS.format("Oslo", 4), "Å\n\u2028 text", FACTS.format("Cork", 7)]  # Oslo: 3 is right
CURVES = {"online": (.2, .6, .99), "masked": (.5, .985, .9), "offline": (.9, .7, .4)}
LINE = '{"step": 1, "fp": 2, "seconds": 3, "val_reward": 0.4}'  # of metrics.jsonl


def make_row(name, seed=0, reward=.5, **more):
    row = dict.fromkeys(("val_reward", "test_reward", "sampled_reward"), reward)
    return row | dict(name=name, seed=seed, fp=100, steps=9, tokens=1000, seconds=2.5) | more


def write_curve(folder, rewards, fp=10):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/metrics.jsonl", "w") as file:
        for step, reward in enumerate(rewards):
            line = dict(step=step, fp=fp * step, seconds=step, val_reward=reward)
            file.write(json.dumps(line) + "\n")
            file.write(json.dumps(line | dict(step=step + .5, val_reward=None)) + "\n")


def make_comparison(out, seeds=(), names=NAMES, **config):
    """A finished comparison, as train.py leaves it -> its rows."""
    rows = []
    for seed in seeds or (0,):
        for name in names:
            folder = f"{out}/seed{seed}/{name}" if seeds else f"{out}/{name}"
            rewards = CURVES.get(name, (.3, .8, .97))
            write_curve(folder, rewards, fp={"online": 5000, "mle": 0}.get(name, 50))
            report.write_predictions(folder, RECORDS, TEXTS)
            rows.append(make_row(name, seed, max(rewards) - .01 * seed))
    config = {"data": "some/weather", "reward": "rouge", "seeds": seeds} | config
    (out / "results.json").write_text(json.dumps(rows))
    (out / "config.json").write_text(json.dumps(config))
    return rows


def compare(out, rows, seeds=()):
    return report.compare_report(str(out), rows, RECORDS, "a machine", seeds)


def test_cells_are_mean_and_sd():
    """Rewards .5 and .7: mean .6, sd .1414; costs have a mean alone; one seed has no spread."""
    rows = [make_row("base", reward=.25), make_row("masked", 0, .5, reuse=1),
            make_row("masked", 1, .7, fp=300, reuse=1, rows_grad=40)]
    lines = report.tabulate(report.by_name(rows), report.COLUMNS).splitlines()
    assert lines[0].split() == "setting val R test R FP grad rows seconds updates".split()
    assert lines[1].split() == ["base", "0.250", "0.250", "100", "-", "2.5", "9"]
    assert lines[2].split() == ["masked", "0.600±.141", "0.600±.141", "200", "40", "2.5", "9"]
    assert [report.show("{:.0%}", [x, x], True) for x in (1, None)] == ["100%±0", "-"]


@pytest.mark.parametrize("name, scale, dropped", [
    ("refresh", 1, ["steps", "K"]), ("masked_refresh", 1000, ["steps", "K", "p_m", "refresh"]),
    ("a name of thirty characters..", 1, report.DROP_FIRST)])
def test_every_column_is_explained_within_the_width(name, scale, dropped):
    """Every column at once; larger figures and longer names cost columns, never the width."""
    rows = [make_row(name, seed, .95 + .01 * seed, p_m=.2, K=128, refresh=8, facts=.9 + .1 * seed,
                     slot_error=.02 + .03 * seed, fp=361_927 * scale, rows_grad=3_840 * scale,
                     reuse=4, seconds=71.6 * scale, steps=160)
            for seed in (0, 1)]
    lines = report.tabulate({name: rows}, report.COLUMNS).splitlines()
    assert max(map(len, lines)) <= 100
    explained = {line[2:13].strip() for line in lines[3:]} - {"seeds"}
    others = {"name", "value", "reach_fp", "reach_seconds", *dropped}
    assert explained == {report.COLUMNS[key][0] for key in report.COLUMNS.keys() - others}
    assert all(heading in lines[0] for heading in explained)


def test_curves_of_several_seeds(tmp_path):
    """Means over the evaluations that all have. Three seeds get to .6 at evaluation 2, 1 and never:
    FPs 20, 30 and without end; with two that never do, neither does the median."""
    a, b, c = folders = [f"{tmp_path}/{name}" for name in "abc"]
    write_curve(a, (.1, .5, .9), fp=10)
    write_curve(b, (.3, .7), fp=30)
    write_curve(c, (.1, .1, .1), fp=5)
    curve = report.read_curve([a, b])
    np.testing.assert_allclose([curve["val_reward"], curve["fp"]], [(.2, .6), (0, 20)])
    write_curve(b, (.3, .7, .7), fp=30)
    reached = report.first_reach(report.read_curve(folders), .6)
    assert reached["fp"] == 30 and reached["step"] == 2
    assert report.first_reach(report.read_curve([a]), .6)["fp"] == 20
    assert report.first_reach(report.read_curve([b, c, c]), .6) is None


@pytest.mark.parametrize("rewards, level", [
    ({"online": (.2, .99, .97), "masked": (.5,)}, "0.980 (a fixed level)"),  # reached, if only once
    ({"online": (.2, .9, .85), "masked": (.99,)}, "0.830 (online's last less 0.02)"),
    ({"masked": (.2, .9, .5), "static": (.4,)}, "0.480 (masked's last less 0.02)")])
def test_level_at_which_costs_are_compared(tmp_path, rewards, level):
    for name, values in rewards.items():
        write_curve(f"{tmp_path}/{name}", values)
    curves = {name: report.read_curve([f"{tmp_path}/{name}"]) for name in rewards}
    assert f"first reaches {level}:" in report.cost_table(curves)


def test_cost_table_by_hand(tmp_path):
    """Online reaches .98 with 10,000 FPs, masked with 50: 200 times fewer; offline fell."""
    make_comparison(tmp_path, names=CURVES)
    curves = {name: report.read_curve([f"{tmp_path}/{name}"]) for name in CURVES}
    lines = [line.split() for line in report.cost_table(curves).splitlines()]
    assert lines[2] == ["online", "10,000", "2.0", "2", "1.0x", "1.0x", "0.990", "0.990"]
    assert lines[3] == ["masked", "50", "1.0", "1", "200x", "2.0x", "0.985", "0.900"]
    assert lines[4] == ["offline", *["never"] * 3, "-", "-", "0.900", "0.400"]


@pytest.mark.parametrize("seeds", ((), (0, 1)))
def test_compare_report(tmp_path, seeds):
    rows = make_comparison(tmp_path, seeds)
    before = json.dumps(rows)
    text = compare(tmp_path, rows, seeds)
    assert json.dumps(rows) == before and "note: " not in text
    tables, end = text.split("Take ")
    assert max(map(len, tables.splitlines())) <= 100
    assert "Cost until" in tables and "  online   This evening in Øslo" in tables
    assert text.splitlines()[0].split()[5] == "facts"
    assert text.splitlines()[1].split()[3] == ("50%±0" if seeds else "50%")  # base: no p_m, no K
    full = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert all(part in full for part in tables.split("\n\n"))
    assert "sampled" in full and "sampled" not in text
    outputs = (tmp_path / "outputs.txt").read_text(encoding="utf-8")
    assert "full stop may be missing" in text and "full stop may be missing" in outputs
    assert all(outputs.count(f"\n  {name} ") == len(RECORDS) for name in NAMES)
    folder = f"{tmp_path}/seed1/full" if seeds else f"{tmp_path}/full"
    with open(f"{folder}/predictions.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["source"], line["text"]) for line in lines] == [
        (record.source, text) for record, text in zip(RECORDS, TEXTS)]
    opened = [word for word in end.split("Next ")[0].split() if word.startswith(str(tmp_path))]
    assert len(opened) >= 3 and all(map(os.path.exists, opened))


def test_a_setting_that_diverged_is_a_row_and_a_note(tmp_path):
    """It has no texts; its curve, up to where it diverged, stays."""
    rows = make_comparison(tmp_path, (0, 1))
    next(row for row in rows if (row["name"], row["seed"]) == ("tail", 1))["val_reward"] = None
    os.remove(tmp_path / "seed1/tail/predictions.jsonl")
    text = compare(tmp_path, rows, (0, 1))
    tables, example = text.split("Greedy texts")
    assert "\nnote: tail diverged with seed 1; its texts and facts are left out\n" in tables
    assert tables.count("\ntail ") == 2 and "  base " in example and "  tail " not in example
    with pytest.raises(InputError, match="the base of every seed diverged; try a smaller --b"):
        compare(tmp_path, [row | {"val_reward": None} for row in rows], (0, 1))


@pytest.mark.parametrize("broken, content, expected", [
    ("mle/metrics.jsonl", "", "mle/metrics.jsonl: expected evaluations"),
    ("tail/predictions.jsonl", "{}", "tail/predictions.jsonl:1: text: expected text, found None"),
    ("report.txt.tmp", None, "report.txt: cannot be written"),
    ("compare.png", None, "compare.png: cannot be written")])
def test_a_report_that_fails_is_one_line(tmp_path, broken, content, expected):
    """Broken lines, and folders (None) where files are to be written."""
    rows = make_comparison(tmp_path)
    if content is None:
        os.mkdir(tmp_path / broken)
    else:
        (tmp_path / broken).write_text(content)
    with pytest.raises(InputError, match=expected):
        compare(tmp_path, rows)


def test_what_to_open_and_to_try(tmp_path):
    """The best run; the same data and reward, as a shell reads them."""
    rows = make_comparison(tmp_path, (0, 1), data="a b", reward="my:own")
    text = compare(tmp_path, rows, (0, 1))
    assert text.endswith("--settings masked --data 'a b' --reward my:own --out out/vary")
    assert f"--init {tmp_path}/seed0/online/best.pt\n" in text


def test_advice_names_the_best_setting_and_the_cheapest_with_half_of_its_gain():
    """online less masked: .1, .3, .2 by seed: mean .2, sd .1, s.e. .1/√3 = .058, whatever the
    seeds' levels. A setting that diverged is not advised."""
    def advice(**rewards_and_cost):
        return report.advice({name: [make_row(name, seed, reward, fp=fp)
                                     for seed, reward in enumerate(rewards)]
                              for name, (*rewards, fp) in rewards_and_cost.items()})[0].split("\n")

    assert advice(base=(.1, .1, .1, 0), mle=(.3, .3, .3, 0), online=(.6, .6, .6, 900),
                  masked=(.5, .3, .4, 10), static=(.9, None, .9, 10)) == [
        "Take   online: the highest validation reward, 0.600, for 900 FPs",
        "       against masked, the next: +0.200 (s.e. 0.058)",
        "    or masked: 0.400 (base: 0.100), for 10 FPs"]
    assert advice(base=(.5, 0), masked=(.6, 10))[1:] == [
        "       against base, the next: +0.100 (one seed, no s.e.)"]
    assert advice(base=(.5, 0), masked=(.6, 10), full=(.6, 9))[0].startswith("Take   full")
    assert advice(base=(.5, 0), masked=(.4, 10))[0].startswith("Take   base: no setting")


def test_vary_report(tmp_path):
    """Two seeds of three values: the second value reaches .98 with 20 and 40 FPs, the third
    diverged."""
    rows = []
    for value, rewards in (("2", (.3, .4)), ("8", (.5, .5)), ("99", (None, None))):
        for seed, reward in enumerate(rewards):
            rows.append(make_row("masked", seed, reward, flag="K", value=value))
            write_curve(f"{tmp_path}/seed{seed}/masked-K_{value}",
                        (.1, .5, .99 if value == "8" else .6), fp=10 + 10 * seed)
    text = report.vary_report(str(tmp_path), "K", rows)
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["masked", "2", "0.350±.071", "0.350±.071", "-", "-", "100", "2.5", "9"]
    assert lines[2][4:6] == ["30", "2.0"] and lines[3][:4] == ["masked", "99", "-", "-"]
    assert text.endswith("\nnote: masked-K_99 diverged with seed 0, 1")
    assert (tmp_path / "vary-K.txt").read_text(encoding="utf-8") == text + "\n"
    assert not (tmp_path / "vary-K.json").exists()  # compare writes it


def test_looks_differ_in_grey():
    """Dash and marker tell any two settings apart; the strong ones differ in lightness too."""
    looks = [(str(look["linestyle"]), look["marker"]) for look in plots.STYLE.values()]
    assert len({dash for dash, _ in looks}) >= len(looks) - 1
    assert len({marker for _, marker in looks}) == len(looks)
    light = sorted(np.dot([int(plots.STYLE[name]["color"][i:i + 2], 16) for i in (1, 3, 5)],
                          (.299, .587, .114)) for name in plots.STRONG)
    assert len(light) == 4 and min(np.diff(light)) > 40


@pytest.mark.parametrize("name, lines", [("$x^{2$", 0), ("\udcff", 0), ("天气 예보", 1)])
def test_text_of_users_is_drawn_literally(tmp_path, capsys, name, lines):
    """$ is no mathematics, not even broken; what the font lacks is one note, not a warning each."""
    rows = make_comparison(tmp_path, data=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "note: " not in compare(tmp_path, rows)
    assert capsys.readouterr().out.count("\n") == lines


def test_figures_of_finished_runs(tmp_path, monkeypatch):
    """Two comparisons and a sweep of p_m, of reward and of slots where they are known: a line for
    each setting, means over seeds, p_m beside each point, and covering nothing. A legend names
    every setting that samples."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda fig, to: figures.append(fig) or save(fig, to))
    rows = [make_row(name, seed, reward + seed / 10, p_m=p, fp=fp,
                     slot_error=p if name == "full" else None)
            for seed in (0, 1) for p in (.8, .1, .2, .05, .4)
            for name, reward, fp in (("full", .9 + p / 1000, 300 + 100 * p), ("masked", .9, 30))]
    rows += [make_row("full", 2, None, p_m=.1)]  # it diverged, and is left out
    for name, seeds in (("a", ()), ("b", (0, 1)), ("c", ())):
        make_comparison(tmp_path / name, seeds)
    os.remove(tmp_path / "c/results.json")
    (tmp_path / "c/vary-p_m.json").write_text(json.dumps(rows))
    report.main([*(str(tmp_path / name) for name in "abc"), "--figure", str(tmp_path / "f.png")])
    (a, b, c, slots), = [figure.axes for figure in figures]
    assert a.get_title() == "weather" and b.get_title() == "weather, mean of 2 seeds"
    assert [text.get_text() for text in a.texts] == ["", "reward 0.98: 200x fewer passes"]
    np.testing.assert_allclose(c.lines[0].get_xydata()[:2], [(305, .95005), (310, .9501)])
    np.testing.assert_allclose(slots.lines[0].get_xydata()[:2], [(305, .05), (310, .1)])
    assert len(slots.lines) == 1
    assert [text.get_text() for text in c.texts] == ["0.8", "0.4", "0.2", "0.1", "0.05"] * 2
    figures[0].draw_without_rendering()  # at the resolution in which the texts were placed
    boxes = [text.get_window_extent() for text in c.texts]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    assert {text.get_text() for text in slots.get_legend().get_texts()} == set(NAMES) - {"mle"}


@pytest.mark.parametrize("file, content, expected", [
    ("results.json", None, ": expected config.json, and results.json or vary-p_m.json"),
    ("config.json", None, ": expected config.json, and results.json or vary-p_m.json"),
    ("results.json", "{", "results.json: expected JSON"),
    ("results.json", '{"a": 1}', "results.json: expected rows in a list"),
    ("results.json", json.dumps([make_row("a"), make_row("b", fp="1")]), "row 2: fp: expected a"),
    ("results.json", json.dumps([make_row("a", reward=[1])]), "row 1: val_reward: expected a num"),
    ("full/metrics.jsonl", "", "full/metrics.jsonl: expected evaluations"),
    ("full/metrics.jsonl", LINE + "\n7", "full/metrics.jsonl:2: step: expected a number"),
    ("full/metrics.jsonl", LINE + "\n" + "[" * 100_000, "full/metrics.jsonl:2: expected JSON"),
    ("full/predictions.jsonl", "", "f.nonsense: cannot be written")])
def test_bad_files_are_one_line(tmp_path, capsys, file, content, expected):
    make_comparison(tmp_path)
    os.remove(tmp_path / file)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--figure", str(tmp_path / "f.nonsense")])
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and str(tmp_path) in error


def test_figures_survive_a_notebook_and_a_matplotlibrc(tmp_path):
    """A backend that matplotlib does not know, LaTeX asked for, and an ASCII locale."""
    make_comparison(tmp_path, names=(*NAMES, "a new setting"))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    env = os.environ | {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": f"{tmp_path}/matplotlibrc",
                        "LC_ALL": "C", "PYTHONUTF8": "0"}
    argv = [sys.executable, "-m", "lab.report", str(tmp_path), "--figure", f"{tmp_path}/f.png"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "f.png").stat().st_size > 20_000
