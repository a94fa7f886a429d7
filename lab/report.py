"""Tables and figures, from the files that runs leave behind: nothing here trains or samples.

    OUT/results.json                    one row for each setting and seed
    OUT/vary-FLAG.json                  rows of a sweep, with two more fields: flag and value
    OUT/[seedN/]NAME/metrics.jsonl      a run's curve: validation reward against FPs and seconds
    OUT/[seedN/]NAME/predictions.jsonl  its greedy texts of the test split

    python -m lab.report OUT ... --figure F [--spectrum]

A comparison becomes a panel: validation reward against FPs. Sweeps, or whatever is given with
--spectrum, become one panel of test reward against FPs (see `spectrum`).

FPs are forward propagations, rows through the model, that sample or score. ± is the standard
deviation over seeds; s.e. is the standard error of a mean of differences paired by seed.
"""
import glob
import itertools
import json
import math
import os
import shlex
import sys
import textwrap
from dataclasses import dataclass

import numpy as np

import data
from data import InputError
from lab.cli import Parser, run_command
from lab.files import COSTS, read_json, write_json, write_text
from lab.plots import pyplot, save_figure, style, tidy

ROW = ("name", "setting", "observation", "p_m", "K", "refresh", "seed", "val_reward",
       "test_reward", "sampled_reward", "bleu", "rougeL", "slot_error", "entropy", "kl_to_base",
       "distinct2", "fp", "fp_grad", "fp_mle", "rows_grad", "tokens", "seconds", "steps", "reuse",
       "diverged")
SPREAD = ("val_reward", "test_reward", "sampled_reward", "facts", "slot_error", "bleu", "rougeL")
STRONG = ("online", "masked", "refresh")  # what a figure is about; the others are drawn thinner
WIDTH = 100                               # columns of what is printed
LEVEL, MARGIN = 0.98, 0.02                # of reward, for cost at matched quality

# A field of a row -> heading, format, explanation: what is printed, and what report.txt adds.
COLUMNS = {
    "name": ("setting", "{}", ""),
    "p_m": ("p_m", "{:g}", "share of the tokens that the model samples; the rest is static text"),
    "K": ("K", "{:g}", "samples of each static text; online: of a source; offline: stored texts"),
    "refresh": ("refresh", "{:g}", "updates between two refreshes of the static text; 0: never"),
    "value": ("value", "{}", ""),
    "val_reward": ("val R", "{:.3f}", "reward of greedy validation texts, with the weights kept"),
    "test_reward": ("test R", "{:.3f}", "the same weights on the test split"),
    "less": ("less first", "{}", "test R less that of the setting's first value"),
    "reach_fp": (f"FP to {LEVEL}", "{}", "FPs until validation first reached it (median)"),
    "reach_seconds": ("s", "{}", "seconds until then"),
    "facts": ("facts", "{:.0%}", "test texts that state every fact of their source rightly"),
    "slot_error": ("slots", "{:.2%}", "slots of the test sources that texts miss or get wrong"),
    "fp": ("FP", "{:,.0f}", "forward propagations that sample or score, in all of training"),
    "seconds": ("seconds", "{:.1f}", "of training, evaluation not counted"),
    "steps": ("updates", "{:.0f}", "optimizer steps"),
}
MORE_COLUMNS = {
    "name": COLUMNS["name"],
    "sampled_reward": ("sampled", "{:.3f}", "reward of sampled test texts"),
    "bleu": ("BLEU", "{:.1f}", "of the greedy test texts, 0 to 100"),
    "rougeL": ("RougeL", "{:.1f}", "of the greedy test texts, 0 to 100"),
    "entropy": ("entropy", "{:.3f}", "of the next token, in nats"),
    "kl_to_base": ("KL", "{:.3f}", "from the base model, in nats a token"),
    "distinct2": ("dist2", "{:.3f}", "different pairs of words, as a share of all pairs"),
    "fp_grad": ("grad FP", "{:,.0f}", "forward propagations for the gradient alone"),
    "fp_mle": ("MLE FP", "{:,.0f}", "forward propagations of the imitation term"),
    "tokens": ("tokens", "{:,.0f}", "positions pushed through the model, padding not counted"),
}
DROP_FIRST = ("K", "p_m", "refresh", "steps")  # columns that a table too wide does without

# -------------------------------------------------------------------------------------------------
# Files

def attempt(path: str, write, *args) -> list[str]:
    """write(path, *args) -> []; or one line on why not: no file costs what was written before."""
    try:
        write(path, *args)
        return []
    except Exception as error:  # matplotlib fails in more ways than can be listed
        return [f"{path} was not written: {' '.join(str(error).split())[:200]}"]


def readable(record, text: str) -> str:
    """A source or a text as people read it: names put back, on one line."""
    return " ".join(record.put_names_back(text).split())


def write_predictions(folder: str, records: list, texts: list[str]) -> None:
    """predictions.jsonl, and predictions.txt for people: two lines a record, source and text."""
    lines, pages = [], []
    for record, text in zip(records, texts):
        pair = {"source": record.source, "text": text}
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
        pages.append(f"{readable(record, record.source)}\n  {readable(record, text)}\n")
    write_text(f"{folder}/predictions.jsonl", "".join(lines))
    write_text(f"{folder}/predictions.txt", "".join(pages))


def read_lines(path: str, *keys: str) -> list[dict]:
    """The objects of a JSONL file, each with these keys. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return [{key: line[key] for key in keys} for line in map(json.loads, file)]
    except (OSError, ValueError, KeyError, TypeError):
        wanted = ", ".join(keys)
        raise InputError(f"{path}: expected a run's file, each line with {wanted}") from None


def read_predictions(folders: list[str], records: list) -> list[list[str]]:
    """What each run wrote for the test split. Raises InputError for texts of other sources."""
    runs = []
    for folder in folders:
        lines = read_lines(f"{folder}/predictions.jsonl", "source", "text")
        if [line["source"] for line in lines] != [record.source for record in records]:
            raise InputError(f"{folder}/predictions.jsonl: expected texts of this test split")
        runs.append([str(line["text"]) for line in lines])
    return runs


def read_curve(folders: list[str]) -> dict:
    """The evaluations that all these runs have, E of them -> step, costs and val_reward, means over
    the runs, (E,) each; and in `runs` the same of every run. Raises InputError."""
    keys, runs = ("step", *COSTS, "val_reward"), []
    for folder in folders:
        lines = read_lines(f"{folder}/metrics.jsonl", *keys)
        runs.append({line["step"]: line for line in lines if line["val_reward"] is not None})
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    if not steps:
        raise InputError(f"{folders[0]}/metrics.jsonl: expected evaluations")
    curves = [{key: np.array([run[step][key] for step in steps]) for key in keys} for run in runs]
    means = {key: np.mean([curve[key] for curve in curves], 0) for key in keys}
    return means | {"runs": curves}


def read_rows(path: str) -> list[dict]:
    """The rows of results.json or vary-FLAG.json; [] without such a file. Raises InputError."""
    rows = read_json(path)
    try:
        if all(set(ROW) <= set(row) for row in rows or []):
            return rows or []
    except TypeError:
        pass
    raise InputError(f"{path}: expected rows as train.py writes them")


def gather(read, folders: dict[str, list[str]], notes: list) -> dict:
    """Setting -> read(folders of its runs); one that cannot be read adds a line to `notes`."""
    found = {}
    for name, runs in folders.items():
        try:
            found[name] = read(runs)
        except InputError as error:
            notes.append(f"{name} is left out: {error}")
    return found


def folders_of(out: str, rows: list[dict], seeds: tuple) -> dict[str, list[str]]:
    """Setting -> the folders of its runs; `seeds` is empty without --seeds."""
    return {name: [f"{out}/seed{row['seed']}/{name}" if seeds else f"{out}/{name}" for row in group]
            for name, group in by_name(rows).items()}


# -------------------------------------------------------------------------------------------------
# Tables

def unique(values) -> list:
    return list(dict.fromkeys(values))


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    return {name: [row for row in rows if row["name"] == name]
            for name in unique(row["name"] for row in rows)}


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
    text = form.format(np.mean(values) if len(set(values)) > 1 else values[0])
    if spread and len(values) > 1:
        sd = form.format(np.std(values, ddof=1)).replace("%", "")
        text += "±" + (sd[1:] if sd.startswith("0.") else sd)
    return text


def tabulate(groups: dict, columns: dict) -> str:
    """A line for each group of rows (one row a seed), at most WIDTH columns; below it, what the
    columns mean. A column without any value is left out."""
    rows = [row for group in groups.values() for row in group]
    keys = [key for key in columns if any(row.get(key) is not None for row in rows)]
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
    meanings.append(("seeds", " ".join(str(seed) for seed in unique(row["seed"] for row in rows))))
    return table + "\n\n" + "\n".join(f"  {heading:<10} {meaning}" for heading, meaning in meanings)


def first_reach(curve: dict, level: float) -> dict | None:
    """Step and costs at the first evaluation whose validation reward is at least `level`: the
    median over the runs; None where half of them or more never get there."""
    keys, reached = ("step", *COSTS), []
    for run in curve["runs"]:
        at = np.flatnonzero(run["val_reward"] >= level)
        reached.append([run[key][at[0]] if len(at) else math.inf for key in keys])
    median = dict(zip(keys, np.median(reached, 0).tolist()))
    return median if math.isfinite(median["step"]) else None


def matched_level(curves: dict[str, dict]) -> tuple[float, str]:
    """The reward at which costs are compared, and what it is."""
    best = max(curves, key=lambda name: curves[name]["val_reward"].max())
    name = "online" if "online" in curves else best
    reward = curves[name]["val_reward"]
    if reward.max() >= LEVEL:
        return LEVEL, "a fixed level"
    return reward[-1] - MARGIN, f"{name}'s last less {MARGIN}"


def cost_table(curves: dict[str, dict]) -> str:
    """What each setting has spent when its validation reward first reaches one level."""
    level, origin = matched_level(curves)
    reached = {name: first_reach(curve, level) for name, curve in curves.items()}
    online = reached.get("online")
    median = ", median over seeds" if any(len(c["runs"]) > 1 for c in curves.values()) else ""
    lines = [["setting", "FP", "seconds", "update", "fewer FP", "fewer sec.", "best", "last"]]
    for name, at in reached.items():
        cells = ["never"] * 3 + ["-"] * 2
        if at:
            cells[:3] = f"{at['fp']:,.0f}", f"{at['seconds']:.1f}", f"{at['step']:.0f}"
        if at and online:
            cells[3:] = [times(online[key], at[key]) for key in ("fp", "seconds")]
        reward = curves[name]["val_reward"]
        lines.append([name, *cells, f"{reward.max():.3f}", f"{reward[-1]:.3f}"])
    return f"""\
Cost until the validation reward first reaches {level:.3f} ({origin}){median}:
{align(lines)}

  fewer      how many times fewer FPs or seconds than online
  best       highest mean validation reward; a setting whose last is lower fell when it went on"""


def times(online: float, spent: float) -> str:
    """How many times less than online was spent; "-" where nothing was."""
    ratio = online / spent if spent else math.nan
    return f"{ratio:,.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if spent else "-"


def facts_of(texts: list[str], records: list) -> list[dict[str, bool]]:
    """What each text states of its source's facts, and whether it states all of them; a source of
    another form is left out."""
    said = [data.stated(text, record.source) for text, record in zip(texts, records)]
    return [facts | {"all": all(facts.values())} for facts in said if facts]


def fact_table(said: dict[str, list[dict]]) -> str:
    """Setting -> what its texts state -> percent of the texts, for each fact and for all facts."""
    facts = unique(fact for texts in said.values() for text in texts for fact in text)
    facts = [fact for fact in facts if fact != "all"] + ["all"]
    lines = [["setting", *facts]]
    for name, texts in said.items():
        right = [[text[fact] for text in texts if fact in text] for fact in facts]
        lines.append([name, *(f"{100 * np.mean(values):.0f}" for values in right)])
    return "Facts that greedy test texts state rightly, in percent:\n" + align(lines)


def paired(values: dict, others: dict) -> str:
    """Two times seed -> value: their mean difference over common seeds, with its standard error."""
    d = np.array([values[seed] - others[seed] for seed in values if seed in others])
    if not len(d):
        return "-"
    error = f" (s.e. {d.std(ddof=1) / math.sqrt(len(d)):.3f})" if len(d) > 1 else ""
    return f"{d.mean():+.3f}{error}"


def difference_table(groups: dict[str, list[dict]]) -> str:
    """Test reward of each setting less that of base, mle, offline and online, paired by seed."""
    tested = {name: {row["seed"]: row["test_reward"] for row in group}
              for name, group in groups.items()}
    against = [name for name in ("base", "mle", "offline", "online") if name in tested]
    lines = [["test reward", *(f"less {name}'s" for name in against)]]
    for name, values in tested.items():
        lines.append([name, *(paired(values, tested[other]) if other != name else ""
                              for other in against)])
    return "Differences paired by seed:\n" + align(lines)


# -------------------------------------------------------------------------------------------------
# The report of a comparison, of one run, and of a sweep

def compare_report(out: str, rows: list[dict], records: list, machine: str, seeds: tuple) -> str:
    """What compare prints. Writes OUT/report.txt, outputs.txt, and last compare.png.

    rows:    of results.json, which is written already
    records: the test split
    machine: where it ran, in words
    seeds:   what --seeds gave; empty without it

    A file that is missing, foreign or cannot be written is one line in the text, not an error.
    """
    groups, folders, notes = by_name(rows), folders_of(out, rows, seeds), []
    texts = gather(lambda runs: read_predictions(runs, records), folders, notes)
    pooled = {}
    for name, runs in texts.items():
        said = [facts_of(run, records) for run in runs]
        if any(said):
            pooled[name] = sum(said, [])
            groups[name] = [row | {"facts": np.mean([facts["all"] for facts in run])}
                            for row, run in zip(groups[name], said)]
    panel, curves = panel_of(out, rows, seeds, notes)
    parts = [tabulate(groups, COLUMNS) + f"; {machine}"]
    parts += [cost_table(curves)] if curves else []
    parts += [fact_table(pooled)] if pooled else []
    more = [tabulate(groups, MORE_COLUMNS), difference_table(groups)]

    example = "Greedy texts of two test sources:\n" + samples(texts, records[:2], WIDTH)
    report = "\n\n".join([*parts, *more, example, *notes]) + "\n"
    notes += attempt(f"{out}/report.txt", write_text, report)
    notes += attempt(f"{out}/outputs.txt", write_text, samples(texts, records[:20]) + "\n")
    notes += attempt(f"{out}/compare.png", plot, [panel]) if curves else []
    best = max(rows, key=lambda row: (round(row["val_reward"], 3), -row["fp"]))
    run, = folders_of(out, [best], seeds)[best["name"]]
    return "\n\n".join([*parts, example, *notes, advice(groups) + "\n" + closing(out, run)])


def advice(groups: dict[str, list[dict]]) -> str:
    """Which setting to take: the one of the highest validation reward, and the cheapest that has
    at least half of its gain over the base."""
    reward = {name: np.mean([row["val_reward"] for row in rows]) for name, rows in groups.items()}
    cost = {name: np.mean([row["fp"] for row in rows]) for name, rows in groups.items()}
    first = next(iter(groups))  # the base
    best = max(reward, key=lambda name: (round(reward[name], 3), -cost[name]))
    if best == first:
        return f"Take   {first}: no setting has a higher validation reward"
    lines = [f"Take   {best}: the highest validation reward, {reward[best]:.3f}, "
             f"for {cost[best]:,.0f} FPs"]
    middle = (reward[first] + reward[best]) / 2
    cheapest = min((name for name in groups if reward[name] >= middle), key=cost.get)
    if cheapest != best:
        lines.append(f"    or {cheapest}: {reward[cheapest]:.3f} ({first}: {reward[first]:.3f}), "
                     f"for {cost[cheapest]:,.0f} FPs")
    return "\n".join(lines)


def run_report(row: dict) -> str:
    """The table of one run, as --mode train prints it."""
    return tabulate({row["name"]: [row]}, COLUMNS)


def samples(texts: dict[str, list[list[str]]], records: list, width: int = 0) -> str:
    """Each record's source and what each setting's first seed wrote for it; folded at `width`."""
    lines = []
    for i, record in enumerate(records):
        lines.append(readable(record, record.source))
        for name, runs in texts.items():
            lines.append(f"  {name:<8} {readable(record, runs[0][i])}")
    if width:
        lines = [textwrap.fill(line, width, subsequent_indent=" " * 11) for line in lines]
    return "\n".join(lines)


def closing(out: str, run: str) -> str:
    """What to open, and what to try next."""
    name = data_of(out)
    other = f"--vary p_m 0.1 0.4 --settings masked --data {shlex.quote(name)} --out out/vary"
    if name == "forecast":
        other = "--data forecast2 --out out/forecast2"
    return f"""\
Open   {out}/compare.png  reward against forward propagations
       {out}/report.txt   all of this, more columns, differences with their errors
       {out}/outputs.txt  test sources with every setting's text
Next   python train.py --mode sample --init {shlex.quote(run)}/best.pt
       python train.py {other}"""


def data_of(out: str) -> str:
    """The data set of a comparison, as its config.json names it; else the folder's name."""
    try:
        return str(read_json(f"{out}/config.json")["data"])
    except (InputError, KeyError, TypeError):
        return out


def vary_report(out: str, flag: str, rows: list[dict]) -> str:
    """The table of a sweep, also in OUT/vary-FLAG.txt; its rows in OUT/vary-FLAG.json.

    rows: rows as in results.json with two more fields, flag and value.
    Raises InputError where the rows cannot be written.
    """
    write_json(rows, f"{out}/vary-{flag}.json")
    groups, folders, first, notes = {}, {}, {}, []  # first: setting -> test rewards, first value
    for row in rows:
        run = f"{row['name']}-{flag}_{row['value']}"
        groups.setdefault(run, []).append(row)
        folders.setdefault(run, []).append(f"{out}/seed{row['seed']}/{run}")
    curves = gather(read_curve, folders, notes)
    hidden = dict.fromkeys(("p_m", "K", "refresh"))  # a table has columns for what has values
    for run, group in groups.items():
        name, tested = group[0]["name"], {row["seed"]: row["test_reward"] for row in group}
        more = {"less": paired(tested, first[name]) if name in first else ""}
        first.setdefault(name, tested)
        if run in curves:
            at = first_reach(curves[run], LEVEL)
            more["reach_fp"] = f"{at['fp']:,.0f}" if at else "never"
            more["reach_seconds"] = f"{at['seconds']:.1f}" if at else "-"
        groups[run] = [row | hidden | more for row in group]
    columns = COLUMNS | {"value": (flag, "{}", "")}
    text = "\n".join([tabulate(groups, columns), *notes])
    return "\n".join([text, *attempt(f"{out}/vary-{flag}.txt", write_text, text + "\n")])


# -------------------------------------------------------------------------------------------------
# Figures

@dataclass
class Panel:
    """Rewards against FPs, on a log axis."""
    ylabel: str
    lines: dict  # label -> setting, points (P,2), and what to write beside the points, or ()
    title: str = ""
    base: float | None = None  # its reward, a dotted line
    saving: tuple = ()  # FPs of the cheapest setting and of online when they reached LEVEL


def panel_of(out: str, rows: list[dict], seeds: tuple, notes: list) -> tuple[Panel, dict]:
    """A comparison as a panel, and setting -> curve. mle, which samples with no FP, has no place
    on the axis."""
    folders = folders_of(out, rows, seeds)
    folders.pop("base", None)
    curves, lines = gather(read_curve, folders, notes), {}
    for name, curve in curves.items():
        points = np.stack([curve["fp"], curve["val_reward"]], 1)[curve["fp"] > 0]
        if len(points):
            lines[name] = (name, points, ())
    panel = Panel("reward of greedy texts, validation", lines)
    ran = len({row["seed"] for row in rows})
    panel.title = os.path.basename(data_of(out).rstrip("/"))
    panel.title += f", mean of {ran} seeds" if ran > 1 else ""
    if base := [row["val_reward"] for row in rows if row["name"] == "base"]:
        panel.base = np.mean(base)
    reached = {name: at["fp"] for name in STRONG if name in lines
               and (at := first_reach(curves[name], LEVEL)) and at["fp"]}
    if min(reached.values(), default=0) < reached.get("online", 0):
        panel.saving = min(reached.values()), reached["online"]
    return panel, curves


def spectrum(rows: list[dict]) -> Panel:
    """Test rewards: a line for each setting and refresh interval, p_m beside each point; or for
    each setting and flag varied, its value beside each point."""
    lines = {}  # what a line is called -> (setting, {a point's value: its rows})
    for row in rows:
        if row["fp"] <= 0:
            continue
        line, point = row["name"], row["p_m"]
        line += f", every {row['refresh']}" if row["refresh"] else ""
        if row.get("flag", "p_m") != "p_m":
            line, point = f"{row['name']}, {row['flag']}", row["value"]
        lines.setdefault(line, (row["name"], {}))[1].setdefault(point, []).append(row)
    for line, (name, groups) in lines.items():
        points = [np.mean([(row["fp"], row["test_reward"]) for row in group], 0)
                  for group in groups.values()]
        lines[line] = name, np.array(points), [*groups]
    return Panel("test reward of greedy texts", lines)


def plot(path: str, panels: list[Panel]) -> None:
    """Panels side by side; each curve is named at its end."""
    size = (max(6.5, 4.5 * len(panels)), 3.9)
    fig, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        tidy(axis, "forward propagations that sample (log scale)")
        axis.set_title(panel.title, fontsize=11, fontweight="bold")
        draw(axis, panel)
    axes[0][0].set_ylabel(panels[0].ylabel)
    fig.tight_layout()  # names are placed where the axes will be
    for axis, panel in zip(axes[0], panels):
        name_lines(axis, panel)
    save_figure(fig, path)


def draw(axis, panel: Panel) -> None:
    """The lines of a panel, the base, and an arrow above them for what is saved."""
    axis.set_xscale("log")
    for name, points, _ in panel.lines.values():
        wide = name in STRONG
        axis.plot(*points.T, **style(name), markevery=max(1, len(points) // 8), zorder=2 + wide,
                  linewidth=2.2 if wide else 1.1, markersize=5 if wide else 3.5)
    if panel.base is not None:
        axis.axhline(panel.base, color=style("base")["color"], linestyle=":")
        axis.text(axis.get_xlim()[0], panel.base, " base", va="bottom", fontsize=8, color="#555555")
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= 1])
    top = high + (0.25 if panel.saving else 0.1) * (high - low)  # room for an arrow
    axis.set_ylim(low, top)
    if panel.saving:
        left, right = panel.saving
        y = top - 0.1 * (top - low)
        axis.vlines((left, right), LEVEL, y, color="#999999", linewidth=0.8, zorder=1)
        axis.annotate("", (left, y), (right, y), arrowprops=dict(arrowstyle="->", linewidth=1.4))
        axis.text(math.sqrt(left * right), y + 0.02 * (top - low), ha="center", fontsize=9,
                  s=f"reward {LEVEL:.2f}: {right / left:.0f}x fewer passes")


def name_lines(axis, panel: Panel) -> None:
    """Write values beside their points and names beside the ends of the lines, strong ones first,
    each where it covers the least. A thin line leads to a text that had to move away."""
    frame = axis.get_window_extent()
    curves = np.concatenate([line.get_transform().transform_path(line.get_path())
                             .interpolated(30).vertices for line in axis.lines])
    taken = [text.get_window_extent() for text in axis.texts if text.get_text()]
    texts = [(str(value), point, dict(fontsize=7)) for _, points, values in panel.lines.values()
             for value, point in zip(values, points)]
    ends = [(label, name, points[-1]) for label, (name, points, _) in panel.lines.items()]
    for label, name, end in sorted(ends, key=lambda line: line[1] not in STRONG):
        font = dict(fontsize=10, fontweight="bold") if name in STRONG else dict(fontsize=8)
        texts.append((label, end, font | dict(color=style(name)["color"])))
    for text, point, font in texts:
        color = font.get("color", "black")
        artist = axis.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", **font,
            arrowprops=dict(arrowstyle="-", linewidth=0.6, color=color, shrinkB=2))
        box, at = artist.get_window_extent(), axis.transData.transform(point)

        def badness(shift) -> float:
            """Over another text, out of the axes, over a curve, far away: in pixels."""
            moved = box.translated(*shift).padded(4)
            outside = frame.count_contains(moved.corners()) < 4
            gap = np.maximum(moved.min - at, at - moved.max).clip(0)
            return (1e6 * moved.count_overlaps(taken) + 1e4 * outside
                    + 3 * moved.count_contains(curves) + np.hypot(*gap) + abs(shift[0]) / 9)

        shift = min(itertools.product(np.linspace(-1, 1, 7) * (box.width / 2 + 8),
                                      np.linspace(-9, 9, 37) * box.height), key=badness)
        taken.append(box.translated(*shift))
        artist.set_position(np.array(shift) * 72 / axis.figure.dpi)
        artist.arrow_patch.set_visible(not taken[-1].padded(box.height).contains(*at))


# -------------------------------------------------------------------------------------------------
# Command line

def panels_of(folders: list[str], as_spectrum: bool, notes: list) -> list[Panel]:
    """A panel for each comparison, or the spectrum of all rows. Raises InputError."""
    rows, panels = [], []
    for out in folders:
        results = read_rows(f"{out}/results.json")
        files = sorted(glob.glob(f"{glob.escape(out)}/vary-*.json"))
        sweeps = [row for file in files for row in read_rows(file)]
        if not results + sweeps:
            raise InputError(f"{out}: expected results.json or vary-FLAG.json of train.py")
        rows += results + sweeps
        if results:
            seeds = [row["seed"] for row in results
                     if os.path.isdir(f"{out}/seed{row['seed']}/{row['name']}")]
            panels.append(panel_of(out, results, tuple(seeds), notes)[0])
    if as_spectrum or len(panels) < len(folders):
        panels, notes[:] = [spectrum(rows)], []
    if not all(panel.lines for panel in panels):
        raise InputError(" ".join(notes[:1]) or "expected a setting beside the base")
    return panels


def command(argv: list[str]) -> None:
    parser = Parser(prog="lab.report", allow_abbrev=False)
    parser.add_argument("out", nargs="+", help="folders of comparisons or sweeps")
    parser.add_argument("--figure", required=True, help="the file to write, such as spectrum.png")
    parser.add_argument("--spectrum", action="store_true", help="test reward of all rows")
    args, notes = parser.parse_args(argv), []
    if failed := attempt(args.figure, plot, panels_of(args.out, args.spectrum, notes)):
        raise InputError(failed[0])
    print("\n".join([*notes, f"wrote {args.figure}"]))


def main(argv: list[str]) -> None:
    run_command("lab.report", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
