"""Sweeps and ablations: many short runs that differ in one flag, a table and a figure each.

    python experiments.py                      list them
    python experiments.py p_m K                run some: OUT/NAME.txt (table), NAME.json (rows), NAME.png
    python experiments.py all --seeds 0 1 2    all of them; an interrupted command goes on where it stopped

Every line starts from the base model of its seed (made once, in OUT/seedN/base) and is one run of train.py in a folder
named by its flags, so experiments that share a run share its folder. Other flags are train.py's own, for every line
(--data forecast2, --lr 1e-3). To try an idea, add an entry to EXPERIMENTS.
"""
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np

import train  # first: it tells torch's threads to wait quietly
import data
import report
from data import InputError
from data.rewards import load_reward
from report import STYLE, aligned


@dataclass
class Experiment:
    """What is varied: lines (name of a setting, its flags, what the table calls it)."""
    title: str
    axis: str                  # what `values` are, for the figure's x axis
    lines: list[tuple[str, dict, str]]
    log: bool = False          # x axis


def sweep(settings: dict[str, dict], key: str, values, also: dict | None = None) -> list[tuple[str, dict, str]]:
    """Every value of one flag for each of these settings, with what else each needs."""
    return [(name, more | (also or {}) | {key: value}, f"{value:g}" if isinstance(value, float) else str(value))
            for name, more in settings.items() for value in values]


SHORT = dict(steps=60, eval_every=20)             # runs of an ablation
DECODED = dict(steps=30, K=4, eval_every=15)      # … that decodes
FRESH = SHORT | dict(refresh=8)
EXPERIMENTS = {
    "rates": Experiment("Learning rates: three for every setting", "learning rate", log=True, lines=sweep(
        {name: {} for name in ("mle", "offline", "online", "masked", "static", "nocredit")}, "lr", (6e-4, 1.2e-3, 2.4e-3))),
    "p_m": Experiment("How many tokens the model re-draws", "p_m", sweep(
        {"masked": SHORT, "nocredit": FRESH}, "p_m", (0.05, 0.1, 0.2, 0.4, 0.8))),
    "K": Experiment("Samples a forward propagation, as many FPs in all (online: 50,000)", "K", log=True, lines=sweep(
        {"masked": SHORT, "nocredit": FRESH}, "K", (2, 8, 64)) + sweep(
        {"online": dict(steps=200, budget_fp=50_000)}, "K", (2, 8))),
    "text": Experiment("Where the static text comes from", "", [
        ("masked", SHORT | dict(static=kind), kind) for kind in ("data", "best", "worst", "random")] + [
        ("nocredit", SHORT | dict(refresh=n), f"refresh {n}") for n in (64, 16, 4, 1)]),
    "mle": Experiment("Weight of the MLE term", "mle_weight", sweep(
        {"masked": SHORT, "nocredit": FRESH}, "mle_weight", (0.0, 0.1, 1.0))),
    "baseline": Experiment("Baseline, scale of the advantage, length normalisation", "", [
        ("masked", SHORT | flags, label) for flags, label in (
            ({}, "mean, scaled"), (dict(adv_scale=False), "mean"), (dict(adv_scale=False, baseline="loo"), "loo"),
            (dict(adv_scale=False, baseline="greedy"), "greedy"),
            (dict(length_norm="masked"), "mean, scaled, length norm"))]),
    "mask": Experiment("How positions are chosen, with and without [MASK]", "", [
        ("masked", SHORT | dict(mask=kind), kind) for kind in ("bernoulli", "count", "word")] + [
        ("static", SHORT, "bernoulli"), ("nocredit", FRESH, "bernoulli, fresh"), ("static", FRESH, "bernoulli, fresh")]),
    "spectrum": Experiment("From offline to online: p_m beside each point, a line for each way to use it", "p_m", [
        *sweep({"masked": SHORT}, "p_m", (0.1, 0.2, 0.4, 0.8)),
        *(("nocredit", SHORT | dict(refresh=n, p_m=p), f"{p:g} every {n}") for n in (16, 8, 4) for p in (0.1, 0.2, 0.4, 0.8)),
        *(("reuse", SHORT | dict(refresh=n), f"0 every {n}") for n in (16, 4)),
        *sweep({"full": DECODED}, "p_m", (0.2, 0.5, 1.0)),
        ("offline", SHORT, "0"), ("online", DECODED, "1")]),
}


def slug(name: str, cfg: train.Config, usual: train.Config) -> str:
    """A folder's name that says which run this is: the setting, and what differs from how it usually runs."""
    other = {key: value for key, value in asdict(cfg).items() if value != getattr(usual, key)}
    return "-".join([name, *(f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"
                             for key, value in other.items())])


def run_lines(experiment: Experiment, given: dict, seeds: list[int]) -> list[dict]:
    """Train (or read) every line for every seed -> rows of results.json with `label` and `flags`."""
    cfg = train.make_config(given)
    usual = {name: train.make_config(given, name) for name, _, _ in experiment.lines}
    configs = [train.checked(replace(usual[name], **flags)) for name, flags, _ in experiment.lines]  # before any work
    device, dataset, reward = train.pick_device(cfg.device), data.load_dataset(cfg.data), load_reward(cfg.reward)
    tok, fingerprint, rows = train.check_data(cfg, dataset, device), data.data_hash(dataset), []
    for seed in seeds:
        home = f"{cfg.out}/seed{seed}"
        base = train.make_base(replace(cfg, seed=seed), f"{home}/base", dataset, reward, device, tok)
        for (name, flags, label), config in zip(experiment.lines, configs):
            folder = f"{home}/{slug(name, config, usual[name])}"
            config = replace(config, seed=seed)
            train.claim(folder, config, fingerprint)  # a finished run of other flags is refused like an unfinished one
            row = train.read_json(f"{folder}/row.json")
            if row is None:
                row = train.run_one(config, name, folder, base, dataset, reward, device)
                train.write_json(row, f"{folder}/row.json")
            rows.append(row | {"label": label, "flags": flags})
    return rows


def group(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row["label"]), []).append(row)
    return groups


def write_table(name: str, experiment: Experiment, rows: list[dict], out: str, machine: str) -> str:
    """The experiment's table as text; also written to OUT/NAME.txt."""
    keys = ("val_reward", "test_reward", "sampled_reward", "entropy", "kl_to_base", "fp", "fp_grad", "seconds")
    lines = [["setting", experiment.axis or "which", *(report.SHORT.get(key, key) for key in keys),
              "test R less the first's"]]
    first = {}  # of each setting
    for (setting, label), mine in group(rows).items():
        tested = [row["test_reward"] for row in mine]
        lines.append([setting, label, *(report.show(key, [row[key] for row in mine]) for key in keys),
                      report.paired(tested, first[setting]) if setting in first else ""])
        first.setdefault(setting, tested)
    seeds = " ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in rows))
    text = (f"{experiment.title}\n{aligned(lines)}\nmean±sd of seeds {seeds}; the last column is paired by seed; "
            f"best weights by validation; {machine}\n")
    with open(f"{out}/{name}.txt", "w", encoding="utf-8") as file:
        file.write(text)
    return text


def draw(name: str, experiment: Experiment, rows: list[dict], out: str) -> None:
    """Test reward with its standard deviation: lines against a number, dots where the values are words."""
    plt = report.pyplot()
    groups = {key: np.array([row["test_reward"] for row in mine]) for key, mine in group(rows).items()}
    labels = list(dict.fromkeys(label for _, label in groups))
    fig, axis = plt.subplots(figsize=(6.4, 3.8))
    for setting in dict.fromkeys(setting for setting, _ in groups):
        mine = {label: values for (s, label), values in groups.items() if s == setting}
        x = [float(label) if experiment.axis else labels.index(label) for label in mine]
        error = [values.std(ddof=1) if len(values) > 1 else 0 for values in mine.values()]
        axis.errorbar(x, [values.mean() for values in mine.values()], error, label=setting, capsize=3,
                      **STYLE[setting] | ({} if experiment.axis else dict(linestyle="none")))
    if not experiment.axis:
        axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    if experiment.log:
        axis.set_xscale("log")
        ticks = sorted({float(label) for _, label in groups})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    report.tidy(axis, experiment.axis, "test reward, greedy")
    axis.set_title(experiment.title, fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    report.finish(fig, f"{out}/{name}.png")


def draw_spectrum(name: str, experiment: Experiment, rows: list[dict], out: str) -> None:
    """Test reward against sampling FPs: a line for each refresh interval (darker: more often), along which p_m grows."""
    plt = report.pyplot()
    fig, axis = plt.subplots(figsize=(8, 5))
    lines = {}
    for (setting, label), mine in group(rows).items():
        p_m, _, every = label.partition(" every ")
        lines.setdefault(setting, {}).setdefault(every, []).append(
            (np.mean([row["fp"] for row in mine]), np.mean([row["test_reward"] for row in mine]), p_m))
    for setting, ways in lines.items():
        for alpha, (every, points) in zip((0.3, 0.6, 1.0), ways.items()):
            fp, reward, p_m = zip(*points)
            label = f"{setting}, every {every}" if setting == "nocredit" else setting if alpha == 0.3 else None
            axis.plot(fp, reward, alpha=alpha if every else 1, label=label, **STYLE[setting])
            for x, y, text in zip(fp, reward, p_m):
                axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    report.tidy(axis, "forward propagations that sample (log scale)", "test reward, greedy")
    axis.set_title(experiment.title, fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    report.finish(fig, f"{out}/{name}.png")


def main(argv: list[str]) -> None:
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names = list(EXPERIMENTS) if argv[:at] == ["all"] else argv[:at]
    if not names:
        print(__doc__ + "\n" + "\n".join(f"{name:<10}{e.title}" for name, e in EXPERIMENTS.items()))
        return
    try:
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            raise InputError(f"no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
        given = {"out": "out/experiments"} | train.parse_args(argv[at:])
        seeds = list(given.pop("seeds", (given.get("seed", 0),)))
        for name in names:
            rows = run_lines(EXPERIMENTS[name], given, seeds)
            train.write_json(rows, f"{given['out']}/{name}.json")
            machine = train.machine_of(train.pick_device(given.get("device", "auto")))
            print("\n" + write_table(name, EXPERIMENTS[name], rows, given["out"], machine))
            (draw_spectrum if name == "spectrum" else draw)(name, EXPERIMENTS[name], rows, given["out"])
    except (InputError, OSError) as e:
        print("experiments.py: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except (train.Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    finally:
        train.unlock_all()


if __name__ == "__main__":
    main(sys.argv[1:])
