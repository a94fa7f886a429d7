"""Tables and figures: hand-worked values, files that cannot be trusted, figures that fail."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.text import Text

import data
from lab import plots, report

NAMES = ("base", "mle", "offline", "online", "full", "masked", "static", "refresh", "credit")
RECORDS = [data.Record("Oslo | 3", ["Oslo has 3 degrees."], names={"Oslo": "Øslo"}),
           data.Record("a source of another form", ["A text."]),
           data.Record("Cork | 7", ["Cork has 7 degrees."])]
TEXTS = ["Oslo has 4 degrees.", "A text.", "Cork has 7 degrees."]
CURVES = {"online": (.2, .6, .99), "masked": (.5, .985, .9), "offline": (.9, .7, .4)}


@pytest.fixture(autouse=True)
def stated(monkeypatch):
    """Facts of the records above, as a data set's module would find them."""
    def stated(text, source):
        if "|" not in source:
            return None
        place, degrees = source.split(" | ")
        return {"place": place in text, "degrees": f"{degrees} degrees" in text}
    monkeypatch.setattr(data, "stated", stated, raising=False)


def make_row(name, seed=0, reward=.5, **more):
    row = dict.fromkeys(report.ROW) | dict(name=name, setting="semi", seed=seed, fp=100, steps=9)
    row |= dict.fromkeys(("val_reward", "test_reward", "sampled_reward"), reward)
    return row | dict(fp_grad=0, fp_mle=0, tokens=1000, seconds=2.5) | more


def write_curve(folder, rewards, fp=10):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/metrics.jsonl", "w") as file:
        for step, reward in enumerate(rewards):
            line = dict.fromkeys(report.COSTS, 0) | dict(step=step, fp=fp * step, seconds=step)
            file.write(json.dumps(line | dict(val_reward=reward)) + "\n")
            file.write(json.dumps(line | dict(step=step + .5, val_reward=None)) + "\n")


def make_comparison(out, seeds=(), names=NAMES):
    """A finished comparison, as train.py leaves it -> its rows."""
    rows = []
    for seed in seeds or (0,):
        for name in names:
            folder = f"{out}/seed{seed}/{name}" if seeds else f"{out}/{name}"
            rewards = [*CURVES.get(name, (.3, .8, .97))]
            write_curve(folder, rewards, fp={"online": 5000, "mle": 0}.get(name, 50))
            report.write_predictions(folder, RECORDS, TEXTS)
            rows.append(make_row(name, seed, max(rewards) - .01 * seed))
    with open(f"{out}/results.json", "w") as file:
        json.dump(rows, file)
    with open(f"{out}/config.json", "w") as file:
        json.dump({"data": "some/forecast"}, file)
    return rows


# -------------------------------------------------------------------------------------------------
# Tables

def test_cells_are_mean_and_sd():
    """Rewards .5 and .7: mean .6, sd .1414; costs have a mean alone; one seed has no spread."""
    rows = [make_row("base", reward=.25), make_row("masked", 0, .5),
            make_row("masked", 1, .7, fp=300)]
    lines = report.tabulate(report.by_name(rows), report.COLUMNS).splitlines()
    assert lines[0].split() == ["setting", "val", "R", "test", "R", "FP", "seconds", "updates"]
    assert lines[1].split() == ["base", "0.250", "0.250", "100", "2.5", "9"]
    assert lines[2].split() == ["masked", "0.600±.141", "0.600±.141", "200", "2.5", "9"]
    assert report.show("{:.0%}", [1, 1], True) == "100%±0"
    assert report.show("{:.0%}", [None, None], True) == "-"


@pytest.mark.parametrize("name, scale, dropped", [
    ("refresh", 1, set()), ("masked_refresh", 1000, {"K", "p_m"}),
    ("a name of thirty characters..", 1, {"K", "p_m", "refresh"})])
def test_every_column_is_explained_within_the_width(name, scale, dropped):
    """Every column at once; larger figures and longer names cost columns, never the width."""
    rows = [make_row(name, seed, .95 + .01 * seed, p_m=.2, K=128, refresh=8, facts=.9 + .1 * seed,
                     slot_error=.02 + .03 * seed, fp=361_927 * scale, seconds=71.6 * scale,
                     steps=160)
            for seed in (0, 1)]
    lines = report.tabulate({name: rows}, report.COLUMNS).splitlines()
    assert max(map(len, lines)) <= 100
    explained = {line[2:13].strip() for line in lines[3:]} - {"seeds"}
    of_sweeps = {"value", "less", "reach_fp", "reach_seconds"}
    headings = {report.COLUMNS[key][0] for key in report.COLUMNS.keys() - of_sweeps} - {"setting"}
    assert explained == headings - dropped
    assert all(heading in lines[0] for heading in explained)


def test_differences_are_paired_by_seed():
    """masked less online: .1, .3, .2: mean .2, sd .1, s.e. .1/√3 = .058, whatever the seeds'
    levels; a seed that one of them lacks is left out."""
    rows = [make_row(name, seed, level + more)
            for seed, level in enumerate((.1, .5, .3))
            for name, more in (("online", 0), ("masked", (.1, .3, .2)[seed]))]
    rows.append(make_row("masked", 7, .9))
    lines = report.difference_table(report.by_name(rows)).splitlines()
    assert lines[-1].split() == ["masked", "+0.200", "(s.e.", "0.058)"]
    assert report.paired({0: .5}, {0: .25}) == "+0.250" and report.paired({0: .5}, {1: .5}) == "-"


def test_curve_is_the_mean_of_evaluations_that_all_seeds_have(tmp_path):
    write_curve(tmp_path / "a", (.1, .5, .9), fp=10)
    write_curve(tmp_path / "b", (.3, .7), fp=30)
    curve = report.read_curve([f"{tmp_path}/a", f"{tmp_path}/b"])
    np.testing.assert_allclose(curve["val_reward"], (.2, .6))
    np.testing.assert_allclose(curve["fp"], (0, 20))


def test_first_reach_is_the_median_of_what_each_seed_needed(tmp_path):
    """Three seeds get to .6 at evaluation 2, 1 and never: FPs 20, 30 and without end; with two
    that never do, neither does the median."""
    folders = []
    for name, rewards, fp in (("a", (.1, .5, .9), 10), ("b", (.3, .7, .7), 30), ("c", (.1,) * 3, 5)):
        write_curve(tmp_path / name, rewards, fp=fp)
        folders.append(f"{tmp_path}/{name}")
    reached = report.first_reach(report.read_curve(folders), .6)
    assert reached["fp"] == 30 and reached["step"] == 2
    assert report.first_reach(report.read_curve(folders[:1]), .6)["fp"] == 20
    assert report.first_reach(report.read_curve(folders[1:] + folders[2:]), .6) is None


@pytest.mark.parametrize("rewards, level", [
    ({"online": (.2, .99, .97), "masked": (.5,)}, .98),      # reached, if only once
    ({"online": (.2, .9, .85), "masked": (.99,)}, .83),      # online's last less .02
    ({"masked": (.2, .99, .5), "static": (.4,)}, .98),       # without online: the best
    ({"masked": (.2, .9, .5), "static": (.4,)}, .48)])
def test_level_at_which_costs_are_compared(rewards, level):
    curves = {name: {"val_reward": np.array(values)} for name, values in rewards.items()}
    assert report.matched_level(curves)[0] == pytest.approx(level)


def test_cost_table_by_hand(tmp_path):
    """Online reaches .98 with 10,000 FPs, masked with 50: 200 times fewer; offline fell."""
    make_comparison(str(tmp_path), names=("online", "masked", "offline", "mle"))
    curves = {name: report.read_curve([f"{tmp_path}/{name}"]) for name in (*CURVES, "mle")}
    lines = [line.split() for line in report.cost_table(curves).splitlines()]
    assert lines[2] == ["online", "10,000", "2.0", "2", "1.0x", "1.0x", "0.990", "0.990"]
    assert lines[3] == ["masked", "50", "1.0", "1", "200x", "2.0x", "0.985", "0.900"]
    assert lines[4] == ["offline", *["never"] * 3, "-", "-", "0.900", "0.400"]


def test_facts_of_mixed_records():
    """One record of three has no facts; of the others one states both, one the place alone."""
    said = report.facts_of(TEXTS, RECORDS)
    lines = report.fact_table({"base": said}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["setting", "place", "degrees", "all"], ["base", "100", "50", "50"]]
    assert report.facts_of(TEXTS[1:2], RECORDS[1:2]) == []


# -------------------------------------------------------------------------------------------------
# The report

@pytest.mark.parametrize("seeds", ((), (0, 1)))
def test_compare_report(tmp_path, seeds):
    rows = make_comparison(str(tmp_path), seeds)
    before = json.dumps(rows)
    text = report.compare_report(str(tmp_path), rows, RECORDS, "a machine", seeds)
    assert json.dumps(rows) == before
    assert "not written" not in text and "left out" not in text
    tables = text[:text.index("Take ")]
    assert max(map(len, tables.splitlines())) <= 100
    for part in ("Cost until", "Facts that", "two test sources", "Øslo has 4", "report.txt"):
        assert part in text
    assert text.splitlines()[0].split()[5] == "facts"
    assert text.splitlines()[1].split()[3] == ("50%±0" if seeds else "50%")  # base: no p_m, no K
    assert "KL" not in text and "less online's" not in text
    full = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert all(part in full for part in tables.split("\n\n")) and "less online's" in full
    assert all(heading in full for heading, _, _ in report.MORE_COLUMNS.values()
               if heading not in ("BLEU", "RougeL", "entropy", "KL", "dist2"))  # without values
    outputs = (tmp_path / "outputs.txt").read_text(encoding="utf-8")
    assert outputs.count("\n") == 3 * (1 + len(NAMES))
    assert (tmp_path / "compare.png").stat().st_size > 20_000


def test_files_of_other_commands_are_not_trusted(tmp_path):
    """Texts of other sources, broken lines, missing files: each costs its setting's part alone."""
    rows = make_comparison(str(tmp_path))
    report.write_predictions(f"{tmp_path}/masked", RECORDS[::-1], TEXTS)
    os.remove(tmp_path / "refresh/predictions.jsonl")
    (tmp_path / "online/predictions.jsonl").write_text('{"source": "Oslo | 3"}\n')
    (tmp_path / "full/predictions.jsonl").write_text('["torn')
    os.remove(tmp_path / "static/metrics.jsonl")
    text = report.compare_report(str(tmp_path), rows, RECORDS, "a machine", ())
    notes = [line for line in text.splitlines() if " is left out: " in line]
    assert [note.split()[0] for note in notes] == ["online", "full", "masked", "refresh", "static"]
    example = text[text.index("Greedy texts"):text.index(notes[0])]
    assert "  base " in example and "  static " in example and "  masked " not in example
    cost = text[text.index("Cost until"):text.index("Facts that")]
    assert "\nmasked" in cost and "\nstatic" not in cost


def test_a_figure_that_fails_is_one_line(tmp_path, monkeypatch):
    rows = make_comparison(str(tmp_path))
    def plot(*args):
        raise RuntimeError("latex could not be found\nand so on")
    monkeypatch.setattr(report, "plot", plot)
    text = report.compare_report(str(tmp_path), rows, RECORDS, "a machine", ())
    line = f"{tmp_path}/compare.png was not written: latex could not be found and so on"
    assert line in text.splitlines() and (tmp_path / "report.txt").exists()


def test_paths_that_cannot_be_written(tmp_path):
    rows = make_comparison(str(tmp_path))
    for name in ("report.txt", "outputs.txt", "compare.png"):
        os.mkdir(tmp_path / name)
    text = report.compare_report(str(tmp_path), rows, RECORDS, "a machine", ())
    assert text.count("was not written") == 3 and "Cost until" in text


def test_predictions_are_read_back(tmp_path):
    """JSONL holds what was written; the page for people has names put back and one line each."""
    texts = ["Oslo\nhas \u2028 3", "", "Cork é"]
    report.write_predictions(str(tmp_path), RECORDS, texts)
    assert report.read_predictions([str(tmp_path)], RECORDS) == [texts]
    page = (tmp_path / "predictions.txt").read_text(encoding="utf-8").split("\n")
    assert page[:2] == ["Øslo | 3", "  Øslo has 3"] and len(page) == 7


def test_vary_report(tmp_path):
    """Differences from the first value of the same setting: masked +.2, by seed; full +.1."""
    rows = [make_row(name, seed, reward + .1 * seed, flag="K", value=value)
            for name, value, reward in (("masked", 2, .3), ("masked", 8, .5),
                                        ("full", 2, .6), ("full", 8, .7))
            for seed in (0, 1)]
    text = report.vary_report(str(tmp_path), "K", rows)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["setting", "K"]
    assert lines[1][:4] == ["masked", "2", "0.350±.071", "0.350±.071"] and "(s.e." not in lines[1]
    assert lines[2][4:7] == ["+0.200", "(s.e.", "0.000)"] and lines[4][4] == "+0.100"
    assert json.loads((tmp_path / "vary-K.json").read_text()) == rows
    assert (tmp_path / "vary-K.txt").read_text(encoding="utf-8") == text + "\n"


# -------------------------------------------------------------------------------------------------
# Figures

@pytest.mark.parametrize("seed", range(3))
def test_names_of_curves_do_not_overlap(seed):
    """Nine curves that end close together; the names stay apart, in the axes, and complete."""
    rng = np.random.default_rng(seed)
    fig, axis = plots.pyplot().subplots(figsize=(4.5, 3.9))
    lines = {name: (name, np.stack([np.geomspace(10, 1000 * rng.uniform(1, 4), 6),
                                    np.append(rng.uniform(.2, .9, 5), rng.uniform(.97, 1))], 1), ())
             for name in NAMES if name != "base"}
    panel = report.Panel("reward", lines, base=.3, saving=(20, 900))
    report.draw(axis, panel)
    fig.tight_layout()
    others = len(axis.texts)
    report.name_lines(axis, panel)
    written, frame = axis.texts[others:], axis.get_window_extent()
    fig.canvas.draw()
    found = [Text.get_window_extent(text) for text in written]  # without its thin line
    plots.pyplot().close(fig)
    assert sorted(text.get_text() for text in written) == sorted(lines)
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:i])
        assert frame.contains(*box.min) and frame.contains(*box.max)


def test_looks_differ_in_grey():
    """Dash and marker tell any two settings apart; the strong three differ in lightness too."""
    looks = [(str(look["linestyle"]), look["marker"]) for look in plots.STYLE.values()]
    assert len({dash for dash, _ in looks}) >= len(looks) - 1
    assert len({marker for _, marker in looks}) == len(looks)
    light = sorted(np.dot([int(plots.STYLE[name]["color"][i:i + 2], 16) for i in (1, 3, 5)],
                          (.299, .587, .114)) for name in report.STRONG)
    assert min(np.diff(light)) > 40
    assert set(plots.style("a new setting")) == set(plots.STYLE["base"])


def run(*args, **env):
    argv = [sys.executable, "-m", "lab.report", *map(str, args)]
    return subprocess.run(argv, env=os.environ | env, capture_output=True, text=True)


def test_figures_of_finished_runs(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    make_comparison(str(a))
    make_comparison(str(b), (0, 1))
    report.main([str(a), str(b), "--figure", str(tmp_path / "two.png")])
    report.main([str(a), "--spectrum", "--figure", str(tmp_path / "spectrum.png")])
    (tmp_path / "c").mkdir()
    rows = [make_row("masked", 0, p, p_m=p, flag="p_m", value=p, fp=100 * p) for p in (.1, .5)]
    report.vary_report(f"{tmp_path}/c", "p_m", rows)
    report.main([str(tmp_path / "c"), str(a), "--figure", str(tmp_path / "sweep.png")])
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("two", "spectrum", "sweep")]
    assert min(sizes) > 20_000 and capsys.readouterr().out.count("wrote") == 3


def test_lines_of_the_spectrum():
    """A line for each refresh interval with p_m beside its points, and one for another flag."""
    rows = [make_row("refresh", seed, p, p_m=p, refresh=n, fp=1000 / n)
            for seed in (0, 1) for n in (4, 8) for p in (.1, .2)]
    rows += [make_row("masked", 0, .5, p_m=.2, flag="K", value=k) for k in (2, 8)]
    rows += [make_row("base", fp=0)]
    lines = report.spectrum(rows).lines
    assert list(lines) == ["refresh, every 4", "refresh, every 8", "masked, K"]
    np.testing.assert_allclose(lines["refresh, every 4"][1], [(250, .1), (250, .2)])
    assert [values for _, _, values in lines.values()] == [[.1, .2], [.1, .2], [2, 8]]


@pytest.mark.parametrize("content, expected", [
    (None, "expected results.json or vary-FLAG.json"), ("[{}]", "expected rows"),
    ("7", "expected rows"), ("[7]", "expected rows"), ("{", "expected JSON")])
def test_bad_input_is_one_line(tmp_path, capsys, content, expected):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--figure", str(tmp_path / "f.png")])
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and str(tmp_path) in error


def test_a_comparison_without_curves_is_one_line(tmp_path, capsys):
    make_comparison(str(tmp_path), names=("base", "masked"))
    os.remove(tmp_path / "masked/metrics.jsonl")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--figure", str(tmp_path / "f.png")])
    error = capsys.readouterr().err
    assert "masked/metrics.jsonl" in error and error.count("\n") == 1


def test_bad_flags_and_paths_are_one_line(tmp_path, capsys):
    make_comparison(str(tmp_path))
    for flags in ((), ("--figure",), ("--figure", f"{tmp_path}/none/f.png"),
                  ("--figure", f"{tmp_path}/f.nonsense"), ("--figur", "f.png")):
        with pytest.raises(SystemExit, match="2"):
            report.main([str(tmp_path), *flags])
        assert capsys.readouterr().err.count("\n") == 1


def test_figures_survive_a_notebook_and_a_matplotlibrc(tmp_path):
    """A backend that matplotlib does not know, LaTeX asked for, and an ASCII locale."""
    make_comparison(str(tmp_path))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    done = run(tmp_path, "--figure", tmp_path / "f.png", MPLBACKEND="nonsense",
               MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "f.png").stat().st_size > 20_000


def test_advice_names_the_best_setting_and_the_cheapest_with_half_of_its_gain():
    def rows(**reward_and_cost):
        return {name: [{"val_reward": reward, "fp": fp}]
                for name, (reward, fp) in reward_and_cost.items()}

    text = report.advice(rows(base=(.5, 0), mle=(.54, 0), online=(.6, 900), masked=(.55, 10)))
    assert text.split("\n") == [
        "Take   online: the highest validation reward, 0.600, for 900 FPs",
        "    or masked: 0.550 (base: 0.500), for 10 FPs"]
    assert report.advice(rows(base=(.5, 0), masked=(.6, 10))).count("\n") == 0
    assert report.advice(rows(base=(.5, 0), masked=(.4, 10))).startswith("Take   base: no setting")
