"""Tables and figures, from the files that runs leave behind: nothing here trains or samples.

    OUT/results.json                    one row for each setting and seed
    OUT/vary-FLAG.json                  rows of a sweep, with two more fields: flag and value
    OUT/[seedN/]NAME/metrics.jsonl      a run's curve: validation reward against FPs and seconds
    OUT/[seedN/]NAME/predictions.jsonl  its greedy texts of the test split

    python -m lab.report OUT ... --figure F

draws one panel for each comparison, validation reward against FPs; and for all sweeps of p_m in
these folders the spectrum from offline to online, test reward and wrong slots against FPs.

FPs are forward propagations, rows through the model, that sample or score. ± is the standard
deviation over seeds; s.e. is the standard error of a mean of differences paired by seed.
"""
import json
import math
import os
import shlex
import sys
import textwrap

import numpy as np

import data
from data import InputError
from lab.cli import Parser, run_command
from lab.files import read_fields, read_json, read_lines, write_text
from lab.plots import STRONG, Panel, draw_panels

ROW = ("name", "setting", "observation", "p_m", "K", "refresh", "reuse", "seed", "val_reward",
       "test_reward", "sampled_reward", "bleu", "rougeL", "slot_error", "entropy", "kl_to_base",
       "distinct2", "fp", "rows_grad", "fp_grad", "fp_mle", "tokens", "seconds", "steps")
CURVE = ("step", "fp", "tokens", "seconds", "val_reward")
SPREAD = ("val_reward", "test_reward", "sampled_reward", "facts", "slot_error", "bleu", "rougeL")
WIDTH = 100                 # columns of what is printed
LEVEL, MARGIN = 0.98, 0.02  # of reward, for cost at matched quality

# A field of a row -> heading, format, explanation: what is printed, and what report.txt adds.
COLUMNS = {
    "name": ("setting", "{}", ""),
    "p_m": ("p_m", "{:g}", "share of the tokens that the model samples; the rest is static text"),
    "K": ("K", "{:g}", "samples per static text (online: per source); offline: C, stored texts"),
    "refresh": ("refresh", "{:g}", "updates between two refreshes of the static text; 0: never"),
    "reuse": ("reuse", "{:g}", "updates that each sample serves"),
    "value": ("value", "{}", ""),
    "val_reward": ("val R", "{:.3f}", "reward of greedy validation texts, with the weights kept"),
    "test_reward": ("test R", "{:.3f}", "the same weights on the test split"),
    "reach_fp": (f"FP to {LEVEL}", "{:,.0f}", "median of FPs until val R first was that; -: never"),
    "reach_seconds": ("s", "{:.1f}", "seconds until then"),
    "facts": ("facts", "{:.0%}", "test texts that state every fact of their source correctly"),
    "slot_error": ("slots", "{:.2%}", "slots of the test sources that texts miss or get wrong"),
    "fp": ("FP", "{:,.0f}", "forward propagations that sample or score, in all of training"),
    "rows_grad": ("grad rows", "{:,.0f}", "rows through the model that carry a gradient of RL"),
    "seconds": ("seconds", "{:.1f}", "of training, evaluation not counted"),
    "steps": ("updates", "{:.0f}", "optimizer steps"),
}
MORE_COLUMNS = {
    "name": COLUMNS["name"],
    "sampled_reward": ("sampled", "{:.3f}", "reward of sampled test texts"),
    "bleu": ("BLEU", "{:.1f}", "of the greedy test texts, 0 to 100"),
    "rougeL": ("RougeL", "{:.1f}", "of the greedy test texts, 0 to 100"),
    "entropy": ("entropy", "{:.3f}", "of the next token, in nats"),
    "kl_to_base": ("KL", "{:.3f}", "from the base model, in nats per token"),
    "distinct2": ("dist2", "{:.3f}", "different pairs of words, as a share of all pairs"),
    "fp_mle": ("MLE FP", "{:,.0f}", "forward propagations of the imitation term"),
    "tokens": ("tokens", "{:,.0f}", "positions pushed through the model, padding not counted"),
}
NEUTRAL = {"refresh": 0, "reuse": 1}  # a column in which every row has this is left out
DROP_FIRST = ("steps", "K", "p_m", "refresh", "reuse", "seconds")  # if a table is too wide

# -------------------------------------------------------------------------------------------------
# Files

def readable(record, text: str) -> str:
    """A source or a text as people read it: names put back, on one line."""
    return " ".join(record.put_names_back(text).split())


def write_predictions(folder: str, records: list, texts: list[str]) -> None:
    """predictions.jsonl: one line per record, its source and its text."""
    lines = [json.dumps({"source": record.source, "text": text}, ensure_ascii=False) + "\n"
             for record, text in zip(records, texts)]
    write_text(f"{folder}/predictions.jsonl", "".join(lines))


def read_rows(path: str) -> list[dict]:
    """The rows of results.json or vary-FLAG.json, with all fields of ROW; the rewards of a run that
    diverged are None. [] if there is no such file. Raises InputError."""
    rows = read_json(path) or []
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected rows in a list, as train.py writes them")
    return [read_fields(row, ROW, f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def read_curve(folders: list[str]) -> dict:
    """The evaluations that all these runs have, E of them -> the fields of CURVE, means over the
    runs, (E,) each; and in `runs` the same of every run. Raises InputError."""
    runs = []
    for folder in folders:
        lines = read_lines(f"{folder}/metrics.jsonl", *CURVE)
        runs.append({line["step"]: line for line in lines if line["val_reward"] is not None})
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    if not steps:
        raise InputError(f"{folders[0]}/metrics.jsonl: expected evaluations")
    curves = [{key: np.array([run[step][key] for step in steps], float) for key in CURVE}
              for run in runs]
    means = {key: np.mean([curve[key] for curve in curves], 0) for key in CURVE}
    return means | {"runs": curves}


def folders_of(out: str, rows: list[dict], seeds: tuple) -> dict[str, list[str]]:
    """Setting -> the folders of its runs; `seeds` is empty without --seeds."""
    return {name: [f"{out}/seed{row['seed']}/{name}" if seeds else f"{out}/{name}" for row in group]
            for name, group in by_name(rows).items()}


# -------------------------------------------------------------------------------------------------
# Tables

def by_name(rows: list[dict], name_of=lambda row: row["name"]) -> dict[str, list[dict]]:
    """What name_of calls a row -> the rows that are called so, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    return groups


def align(lines: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        rows.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(rows)


def show(form: str, values: list, spread: bool) -> str:
    """One cell: the mean of the values, with ± their standard deviation if `spread`."""
    values = [value for value in values if value is not None]
    if not values or isinstance(values[0], str):
        return values[0] if values else "-"
    text = form.format(np.mean(values, dtype=float) if len(set(values)) > 1 else values[0])
    if spread and len(values) > 1:
        sd = form.format(np.std(values, ddof=1, dtype=float)).replace("%", "")
        text += "±" + (sd[1:] if sd.startswith("0.") else sd)
    return text


def tabulate(groups: dict, columns: dict) -> str:
    """One line for each group of rows (one row per seed), at most WIDTH columns; below it, what the
    columns mean. A column that says nothing is left out."""
    rows = [row for group in groups.values() for row in group]
    keys = [key for key in columns
            if any(row.get(key) not in (None, NEUTRAL.get(key)) for row in rows)]
    for dropped in (None, *DROP_FIRST):
        keys = [key for key in keys if key != dropped]
        lines = [[columns[key][0] for key in keys]]
        for group in groups.values():
            lines.append([show(columns[key][1], [row.get(key) for row in group], key in SPREAD)
                          for key in keys])
        table = align(lines)
        if max(map(len, table.splitlines())) <= WIDTH:
            break
    meanings = [(columns[key][0], columns[key][2]) for key in keys if columns[key][2]]
    meanings.append(("seeds", " ".join(dict.fromkeys(str(row["seed"]) for row in rows))))
    return table + "\n\n" + "\n".join(f"  {heading:<10} {meaning}" for heading, meaning in meanings)


def first_reach(curve: dict, level: float) -> dict | None:
    """Step and costs at the first evaluation whose validation reward is at least `level`: the
    median over the runs; None if half of them or more never get there."""
    keys, reached = CURVE[:-1], []
    for run in curve["runs"]:
        at = np.flatnonzero(run["val_reward"] >= level)
        reached.append([run[key][at[0]] if len(at) else math.inf for key in keys])
    median = dict(zip(keys, np.median(reached, 0).tolist()))
    return median if math.isfinite(median["step"]) else None


def cost_table(curves: dict[str, dict]) -> str:
    """What each setting has spent when its validation reward first reaches one level: LEVEL, or if
    online (without it, the best) does not get there, what that has at the end, less MARGIN."""
    best = max(curves, key=lambda name: curves[name]["val_reward"].max())
    aim = "online" if "online" in curves else best
    reward = curves[aim]["val_reward"]
    level, origin = LEVEL, "a fixed level"
    if reward.max() < LEVEL:
        level, origin = reward[-1] - MARGIN, f"{aim}'s last less {MARGIN}"
    reached = {name: first_reach(curve, level) for name, curve in curves.items()}
    online = reached.get("online")
    median = ", median over seeds" if any(len(c["runs"]) > 1 for c in curves.values()) else ""
    lines = [["setting", "FP", "seconds", "update", "fewer FP", "fewer sec.", "best", "last"]]
    for name, at in reached.items():
        cells = ["never"] * 3 + ["-"] * 2
        if at:
            cells[:3] = f"{at['fp']:,.0f}", f"{at['seconds']:.1f}", f"{at['step']:.0f}"
        if at and online:
            cells[3:] = [times_fewer(online[key], at[key]) for key in ("fp", "seconds")]
        reward = curves[name]["val_reward"]
        lines.append([name, *cells, f"{reward.max():.3f}", f"{reward[-1]:.3f}"])
    return f"""\
Cost until the validation reward first reaches {level:.3f} ({origin}){median}:
{align(lines)}

  fewer      how many times fewer FPs or seconds than online
  best       highest mean validation reward; a setting whose last is lower fell when it went on"""


def times_fewer(online: float, spent: float) -> str:
    """How many times less than online was spent, to two digits or more; "-" if nothing was."""
    ratio = online / spent if spent else math.nan
    return f"{ratio:,.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if spent else "-"


def facts_of(texts: list[str], records: list) -> float | None:
    """The share of texts that state every fact of their source; None if no source has facts."""
    stated = [data.stated(text, record.source) for text, record in zip(texts, records)]
    return np.mean([all(facts.values()) for facts in stated if facts]) if any(stated) else None


# -------------------------------------------------------------------------------------------------
# The report of a comparison, and of a sweep

def compare_report(out: str, rows: list[dict], records: list, machine: str, seeds: tuple) -> str:
    """What compare prints. Writes OUT/report.txt, outputs.txt and compare.png. Raises InputError.

    rows:    of results.json, which is written already
    records: the test split
    machine, seeds: where it ran, in words; what --seeds gave, empty without it
    """
    config = read_json(f"{out}/config.json")
    lost = {row["seed"] for row in rows if row["name"] == "base" and row["val_reward"] is None}
    rows = [row for row in rows if row["seed"] not in lost]
    if not rows:
        raise InputError("the base of every seed diverged; try a smaller --base_lr")
    notes = [f"note: the base of seed {seed} diverged, and is left out" for seed in sorted(lost)]
    groups, folders, texts = by_name(rows), folders_of(out, rows, seeds), {}
    curves = {name: read_curve(runs) for name, runs in folders.items() if name != "base"}
    for name, group in groups.items():
        if lost := diverged(group):
            notes.append(f"note: {name} {lost}; its texts and facts are left out")
            continue
        texts[name] = [[line["text"] for line in read_lines(f"{run}/predictions.jsonl", "text")]
                       for run in folders[name]]
        groups[name] = [row | {"facts": facts_of(run, records)}
                        for row, run in zip(group, texts[name])]
    tables = [tabulate(groups, COLUMNS) + f"; {machine}", *notes, cost_table(curves)]
    example = "Greedy texts of two test sources:\n" + samples(texts, records[:2])
    more = tabulate(groups, MORE_COLUMNS)
    write_text(f"{out}/report.txt", "\n\n".join([*tables, more, example]) + "\n")
    write_text(f"{out}/outputs.txt", samples(texts, records[:20]) + "\n")
    draw_panels(f"{out}/compare.png", [panel_of(config["data"], rows, curves)])
    take, best = advice(groups)
    return "\n\n".join([*tables, example, take + "\n" + what_next(out, folders[best][0], config)])


def diverged(rows: list[dict]) -> str:
    """Which runs of a group diverged, in words; "" if none did."""
    lost = [str(row["seed"]) for row in rows if row["val_reward"] is None]
    return f"diverged with seed {', '.join(lost)}" if lost else ""


def mean_reward(rows: list[dict]) -> float:
    """Of validation; -inf if one of the runs diverged."""
    rewards = [row["val_reward"] for row in rows]
    return -math.inf if None in rewards else np.mean(rewards)


def advice(groups: dict[str, list[dict]]) -> tuple[str, str]:
    """Which setting to take, in words and its name: that of the highest validation reward (of equal
    ones the cheapest), with its lead over the next; and the cheapest that has half of its gain."""
    reward = {name: mean_reward(rows) for name, rows in groups.items()}
    cost = {name: np.mean([row["fp"] for row in rows]) for name, rows in groups.items()}
    base = next(iter(groups))
    best, *others = sorted(groups, key=lambda name: (-round(reward[name], 3), cost[name]))
    if best == base:
        return f"Take   {base}: no setting has a higher validation reward", base
    lines = [f"Take   {best}: the highest validation reward, {reward[best]:.3f}, "
             f"for {cost[best]:,.0f} FPs"]
    others_reward = {row["seed"]: row["val_reward"] for row in groups[others[0]]}
    lead = np.array([row["val_reward"] - others_reward[row["seed"]] for row in groups[best]
                     if row["seed"] in others_reward])
    error = "one seed, no s.e."
    if len(lead) > 1:
        error = f"s.e. {lead.std(ddof=1) / math.sqrt(len(lead)):.3f}"
    lines.append(f"       against {others[0]}, the next: {lead.mean():+.3f} ({error})")
    half = (reward[base] + reward[best]) / 2
    cheapest = min((name for name in groups if reward[name] >= half), key=cost.get)
    if cheapest != best:
        lines.append(f"    or {cheapest}: {reward[cheapest]:.3f} ({base}: {reward[base]:.3f}), "
                     f"for {cost[cheapest]:,.0f} FPs")
    return "\n".join(lines), best


def samples(texts: dict[str, list[list[str]]], records: list) -> str:
    """Each record's source and what each setting's first seed wrote for it, folded at WIDTH."""
    lines = []
    for i, record in enumerate(records):
        lines.append(readable(record, record.source))
        lines += [f"  {name:<8} {readable(record, runs[0][i])}" for name, runs in texts.items()]
    lines.append("(ROUGE sees no punctuation: with that reward, a final full stop may be missing.)")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * 11) for line in lines)


def what_next(out: str, best: str, config: dict) -> str:
    """The files that were written, and the next commands: with the weights of a run, `best`, and
    on the same data with the same reward."""
    same = shlex.join(["--data", config["data"], "--reward", config["reward"]])
    return f"""\
Open   {out}/compare.png  reward against forward propagations
       {out}/report.txt   all of this, and more columns
       {out}/outputs.txt  test sources with every setting's text
Next   python -m lab.page {shlex.quote(out)}   writes a page that shows the method
       python train.py --mode sample --init {shlex.quote(best)}/best.pt
       python train.py --vary p_m 0.1 0.4 --settings masked {same} --out out/vary"""


def vary_report(out: str, flag: str, rows: list[dict]) -> str:
    """The table of a sweep, also in OUT/vary-FLAG.txt. The rows are those of vary-FLAG.json, which
    is written already. Raises InputError."""
    groups, notes = by_name(rows, lambda row: f"{row['name']}-{flag}_{row['value']}"), []
    for run, group in groups.items():
        if lost := diverged(group):
            notes.append(f"note: {run} {lost}")
        runs = [f"{out}/seed{row['seed']}/{run}" for row in group if row["steps"]]  # 0: no base
        if runs and (at := first_reach(read_curve(runs), LEVEL)):
            groups[run] = [row | {"reach_fp": at["fp"], "reach_seconds": at["seconds"]}
                           for row in group]
    columns = {key: COLUMNS[key] for key in COLUMNS if key not in ("p_m", "K", "refresh", "reuse")}
    columns["value"] = (flag, "{}", "")
    text = "\n".join([tabulate(groups, columns), *notes])
    write_text(f"{out}/vary-{flag}.txt", text + "\n")
    return text


# -------------------------------------------------------------------------------------------------
# Figures

def panel_of(name: str, rows: list[dict], curves: dict[str, dict]) -> Panel:
    """A comparison on the data `name` as a panel. mle, which samples with no FP, has no place on
    the axis."""
    lines = {}
    for setting, curve in curves.items():
        points = np.stack([curve["fp"], curve["val_reward"]], 1)[curve["fp"] > 0]
        if len(points):
            lines[setting] = points, ()
    ran = len({row["seed"] for row in rows})
    title = os.path.basename(name.rstrip("/")) + (f", mean of {ran} seeds" if ran > 1 else "")
    base = mean_reward(by_name(rows)["base"])
    panel = Panel(title, "reward of greedy texts, validation", lines, base)
    reached = {name: at["fp"] for name in STRONG if name in lines
               and (at := first_reach(curves[name], LEVEL)) and at["fp"]}
    if min(reached.values(), default=0) < reached.get("online", 0):
        panel.saving = LEVEL, min(reached.values()), reached["online"]
    return panel


def spectrum(rows: list[dict], field: str, title: str) -> Panel:
    """A field of sweeps of p_m: one line per setting, means over seeds, p_m beside each point."""
    lines = {}
    for name, group in by_name([row for row in rows if row[field] is not None]).items():
        runs = sorted(by_name(group, lambda row: row["p_m"]).items())
        means = [[np.mean([row[key] for row in same]) for key in ("fp", field)]
                 for _, same in runs]
        lines[name] = np.array(means), [f"{p_m:.3g}" for p_m, _ in runs]
    return Panel("from offline to online, by p_m", title, lines)


# -------------------------------------------------------------------------------------------------
# Command line

@run_command("lab.report")
def main(argv: list[str]) -> None:
    """Panels for each comparison, and for all sweeps of p_m."""
    parser = Parser(prog="lab.report", allow_abbrev=False)
    parser.add_argument("out", nargs="+", help="folders of comparisons or of sweeps of p_m")
    parser.add_argument("--figure", required=True, help="the file to write, such as spectrum.png")
    args = parser.parse_args(argv)
    panels, sweeps = [], []
    for out in args.out:
        rows, sweep = read_rows(f"{out}/results.json"), read_rows(f"{out}/vary-p_m.json")
        config = read_json(f"{out}/config.json")
        if not config or not rows + sweep:
            raise InputError(f"{out}: expected config.json, and results.json or vary-p_m.json")
        if rows:
            folders = folders_of(out, rows, config["seeds"])
            curves = {name: read_curve(runs) for name, runs in folders.items()}
            panels.append(panel_of(config["data"], rows, curves))
        sweeps += sweep
    for field, title in (("test_reward", "test reward of greedy texts"),
                         ("slot_error", "share of wrong slots, greedy texts")):
        if any(row[field] is not None for row in sweeps):
            panels.append(spectrum(sweeps, field, title))
    draw_panels(args.figure, panels)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    main(sys.argv[1:])
