"""Statistics of the reports against hand-worked cases and brute force, and the experiments end to end."""
import json
import os

import numpy as np
import pytest

import data
import experiments
import report
import train
from data.forecast import facts_said
from data.rewards import bleu, load_reward, rouge, slot_errors
from test_train import TINY, folder, metrics  # noqa: F401 (folder is a fixture)

MR = ["name[xname], food[Chinese], area[riverside]", "name[xname], priceRange[cheap], near[xnear]",
      "name[xname], eatType[pub], familyFriendly[no]", "name[xname], food[Thai], priceRange[high]"]
TEXTS = ["xname serves Chinese food in the riverside area.", "xname is near xnear.",
         "xname is a pub. It is not family friendly.", "xname is cheap."]
RECORDS = [data.Record(source, [text, "xname is a place."], [text], [text]) for source, text in zip(MR, TEXTS[::-1])]


def row(name, seed, value, fp=100, **more):
    return dict.fromkeys(train.ROW) | dict(name=name, seed=seed, setting="semi", test_reward=value, val_reward=value, fp=fp) | more


def test_table_shows_mean_and_sd():
    """Rewards .5, .7: mean .6, sd .1414; costs have a mean alone; a single seed has no ±."""
    rows = [row("base", 0, .25), row("base", 1, .25), row("masked", 0, .5, 100), row("masked", 1, .7, 300)]
    cells = [line.split() for line in report.table(rows).splitlines()]
    assert cells[0] == ["name", "val", "R", "test", "R", "FP"]
    assert cells[2] == ["masked", "0.600±.141", "0.600±.141", "200"]
    assert report.table(rows[2:3]).split()[-3:] == ["0.500", "0.500", "100"]


def test_differences_are_paired_by_seed():
    """masked less online: .1, .3, .2: mean .2, sd .1, s.e. .1/√3 = .058, however far the seeds lie apart."""
    rows = [row(name, seed, level + more) for seed, level in enumerate((.1, .5, .3))
            for name, more in (("base", 0), ("online", .2), ("masked", .2 + (.1, .3, .2)[seed]))]
    assert "+0.200 (s.e. 0.058)" in report.differences(rows).splitlines()[-1]


def write_curve(path, values, fp):
    os.makedirs(path)
    with open(f"{path}/metrics.jsonl", "w") as file:
        for step, value in enumerate(values):
            costs = dict.fromkeys(report.COSTS, 0) | dict(fp=fp * step, seconds=step)
            file.write(json.dumps(dict(step=step, val_reward=value, **costs)) + "\n")
            file.write(json.dumps(dict(step=step + .5, val_reward=None, **costs)) + "\n")


def test_threshold_is_crossed_by_the_mean_curve(tmp_path):
    """Online ends at .9 and .7: level .78. Masked's mean .5, .75, .8 crosses at its third evaluation, 1/10 of online's FPs."""
    for seed, online, masked in ((0, (.1, .5, .9), (.1, .9, .9)), (1, (.1, .5, .7), (.9, .6, .7))):
        write_curve(tmp_path / f"seed{seed}/online", online, 100)
        write_curve(tmp_path / f"seed{seed}/masked", masked, 10)
        write_curve(tmp_path / f"seed{seed}/mle", (.1, .1, .1), 0)
    curves = {name: report.curve([f"{tmp_path}/seed{seed}" for seed in (0, 1)], name) for name in ("online", "masked", "mle")}
    assert report.first_reach(curves["masked"], .78) == dict(step=2, fp=20, seconds=2, fp_grad=0, fp_mle=0, tokens=0)
    lines = report.threshold(curves).splitlines()
    assert lines[0].startswith("validation reward 0.780") and "10.0x" in lines[3] and "never" in lines[4]
    report.draw_compare(curves, .1, str(tmp_path / "figure.png"))
    assert os.path.getsize(tmp_path / "figure.png") > 10_000


def test_resampled_equals_metrics_of_the_resampled_texts():
    """Every metric with weights (2,0,1,1) is the metric of the texts 0, 0, 2, 3."""
    reward, at = load_reward("rouge+slot"), [0, 0, 2, 3]
    values = report.resampled(TEXTS, RECORDS, reward, np.array([[2, 0, 1, 1]]))
    texts, records = [TEXTS[i] for i in at], [RECORDS[i] for i in at]
    references, sources = [r.references for r in records], [r.source for r in records]
    errors, slots = slot_errors(texts, sources)
    assert values["bleu"][0] == pytest.approx(bleu(texts, references))
    assert values["rougeL"][0] == pytest.approx(100 * rouge(texts, references)[:, 2].mean())
    assert values["test_reward"][0] == pytest.approx(reward(texts, references, sources).mean())
    assert values["slot_error"][0] == pytest.approx(errors.sum() / slots.sum()) and errors.sum() > 0


def test_bootstrap_intervals_hold_what_they_say(tmp_path):
    """The estimate is the mean over seeds; a setting that writes what the base writes differs from it by 0 [0, 0];
    records of another split are refused."""
    for seed in (0, 1):
        for name in ("base", "online", "masked"):
            os.makedirs(tmp_path / f"seed{seed}/{name}")
            texts = TEXTS if name == "masked" and seed == 1 else TEXTS[::-1]
            report.write_predictions(str(tmp_path / f"seed{seed}/{name}"), RECORDS, texts)
    homes, names = [f"{tmp_path}/seed{seed}" for seed in (0, 1)], ["base", "online", "masked"]
    text = report.bootstrap(homes, names, RECORDS, load_reward("rouge"), draws=200)
    first, base, online = (part.splitlines() for part in text.split("\n\n"))
    assert "+0.000 [+0.000, +0.000]" in base[1] and base[1].startswith("online")
    expected = np.mean([rouge(t, [r.references for r in RECORDS]).mean() for t in (TEXTS, TEXTS[::-1])])
    assert f"{expected:.3f} [" in first[-1]
    low, high = map(float, online[-1].split("[")[1].split("]")[0].split(","))
    assert low < high <= 0
    with pytest.raises(ValueError, match="another test split"):
        report.bootstrap(homes, names, RECORDS[::-1], load_reward("rouge"))


def test_kinds_of_slot_errors(tmp_path):
    """By hand: the first text leaves out its area and says a cuisine that is wrong, the second adds a price."""
    sources = ["name[xname], food[Chinese], area[riverside]", "name[xname], near[xnear]"]
    texts = ["xname serves Italian food.", "xname is a cheap place near xnear."]
    os.makedirs(tmp_path / "base")
    report.write_predictions(str(tmp_path / "base"), [data.Record(s, [t], [t], [t]) for s, t in zip(sources, texts)], texts)
    assert report.error_kinds([str(tmp_path)], ["base"]).splitlines()[-1].split() == ["base", "1", "1", "1"]


def test_what_mending_slots_does_to_rouge(tmp_path):
    """The base is complete on the first record and leaves out the food of two others. The setting loses a word of the
    first (ROUGE-L from 1 to 8/9), mends the second (from 8/9 to 1), and spoils the third without mending it."""
    french = data.Record("name[xname], eatType[pub], food[French]", ["xname is a French pub"])
    records = [data.Record("name[xname], eatType[pub], priceRange[cheap]", ["xname is a cheap pub"]), french, french]
    for name, texts in (("base", ["xname is a cheap pub", "xname is a pub", "xname is a pub"]),
                        ("rl", ["xname is cheap pub", "xname is a French pub", "xname pub"])):
        os.makedirs(tmp_path / name)
        report.write_predictions(str(tmp_path / name), records, texts)
    last = report.omission_cost([str(tmp_path)], ["base", "rl"], records).splitlines()[-1].split()
    assert last == ["rl", "1", f"{100 * (8 / 9 - 1):+.1f}", "1", f"{100 * (1 - 8 / 9):+.1f}"]


def test_facts_that_a_forecast_states(tmp_path):
    """Every reference of both settings states all six; by hand: a wrong direction ("northwest" is not "north"), no
    temperature, and another place."""
    for name in ("forecast", "forecast2"):
        for r in data.load_dataset(name)["test"][:50]:
            assert all(all(facts_said(text, r.source).values()) for text in r.references)
    source = "Oslo | night | wet snow | 3 | north 20"
    text = "This night in Cork we expect wet snow, with 13 degrees, and wind from the northwest at 20 knots."
    assert facts_said(text, source) == dict(place=False, part=True, sky=True, temperature=False, direction=False, speed=True)
    assert facts_said(text, "name[xname]") is None
    os.makedirs(tmp_path / "base")
    report.write_predictions(str(tmp_path / "base"), [data.Record(source, [text])] * 3, [text, text, "This night 3 degrees"])
    assert report.fact_table([str(tmp_path)], ["base"]).splitlines()[-1].split() == ["base", "0", "100", "67", "33", "0", "67"]


def test_compare_writes_its_report(folder, tmp_path, capsys):
    """Two seeds, chosen settings, then one more setting: only that one is trained; the report is what was printed."""
    flags = [*TINY, "--data", folder, "--out", str(tmp_path), "--seeds", "0", "1", "--settings", "online", "refresh"]
    flags[flags.index("--steps") + 1] = "2"
    train.main(flags)
    first = capsys.readouterr().out
    assert open(tmp_path / "report.txt").read().strip() in first and "reuse" not in first and "bootstrap" in first
    stamp = os.path.getmtime(tmp_path / "seed1/online/ckpt.pt")
    train.main([*flags, "reuse"])
    rows = json.load(open(tmp_path / "results.json"))
    assert [r["name"] for r in rows] == ["base", "online", "reuse", "refresh"] * 2
    assert [r["p_m"] for r in rows[:4]] == [None, 1.0, 0.0, 0.2]
    assert os.path.getmtime(tmp_path / "seed1/online/ckpt.pt") == stamp
    outputs = open(tmp_path / "outputs.txt").read().splitlines()
    assert len(outputs) == 6 * 5 and outputs[1].split()[0] == "base"


@pytest.fixture
def two_lines(monkeypatch):
    lines = [("masked", dict(p_m=p), f"{p}") for p in (0.2, 0.5)] + [("refresh", dict(refresh=2), "0.9")]
    monkeypatch.setitem(experiments.EXPERIMENTS, "p_m", experiments.Experiment("title", "p_m", lines))


def test_experiments_go_on_and_aggregate(folder, tmp_path, capsys, two_lines):
    """Every line and seed once; a finished line is not trained again; table, rows and figure are there."""
    flags = ["p_m", *TINY, "--data", folder, "--out", str(tmp_path), "--seeds", "0", "1"]
    flags[flags.index("--steps") + 1] = "2"
    experiments.main(flags)
    text = open(tmp_path / "p_m.txt").read()
    assert text.strip() in capsys.readouterr().out and len(text.splitlines()) == 6
    rows = json.load(open(tmp_path / "p_m.json"))
    assert [(r["seed"], r["label"], r["p_m"]) for r in rows[:3]] == [(0, "0.2", .2), (0, "0.5", .5), (0, "0.9", .2)]
    assert len(rows) == 6 and os.path.getsize(tmp_path / "p_m.png") > 5_000
    with pytest.raises(SystemExit, match="2"):  # finished runs of other flags are not passed off as these
        experiments.main([*flags, "--lr", "0.5"])
    assert "another config (lr" in capsys.readouterr().err and json.load(open(tmp_path / "p_m.json")) == rows
    stamp = os.path.getmtime(tmp_path / "seed1/masked-p_m_0.5/ckpt.pt")
    os.remove(tmp_path / "seed0/refresh-refresh_2/row.json")
    experiments.main(flags)
    assert json.load(open(tmp_path / "p_m.json")) == rows
    assert os.path.getmtime(tmp_path / "seed1/masked-p_m_0.5/ckpt.pt") == stamp


def test_experiments_refuse(capsys, tmp_path):
    for argv, expected in ((["p_n"], "no experiment 'p_n'"), (["p_m", "--K", "0", "--out", str(tmp_path / "o")], "--K 0"),
                           (["p_m", "--n_hed", "3"], "--n_head")):
        with pytest.raises(SystemExit, match="2"):
            experiments.main(argv)
        assert expected in capsys.readouterr().err
    experiments.main([])
    assert "Samples a forward propagation" in capsys.readouterr().out


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_is_well_formed(name):
    """Flags that no run could use would only show after hours."""
    e = experiments.EXPERIMENTS[name]
    configs = [train.checked(train.replace(train.make_config({}, setting), **flags)) for setting, flags, _ in e.lines]
    assert len({(setting, repr(cfg)) for (setting, _, _), cfg in zip(e.lines, configs)}) == len(configs)  # no line twice
    if e.axis and name != "spectrum":
        assert [float(label) for _, _, label in e.lines]
