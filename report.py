"""Tables, statistics and figures, from the files that runs leave behind: nothing here trains or samples.

    OUT/results.json                     one row for each setting and seed
    OUT/[seedN/]NAME/metrics.jsonl       its curve: validation reward against FPs, tokens and seconds
    OUT/[seedN/]NAME/predictions.jsonl   its greedy texts of the test split

Spreads: ± is the standard deviation over seeds; "s.e." the standard error of a mean of differences paired by seed;
brackets are 95% bootstrap intervals over the test records, the seeds pooled (they hold for these trained models: that
another seed may train another model is what ± tells).
"""
import json
import math

import numpy as np

from data import Record
from data.forecast import facts_said
from data.rewards import bleu_counts, bleu_score, has_slots, rouge, slot_errors, slot_errors2, slot_errors_by_kind

STYLE = {  # one look per setting in every figure of the project; lightness, dash and marker differ, for print in grey
    "base": dict(color="#7f7f7f", linestyle=":", marker="x"),
    "mle": dict(color="#b3a369", linestyle=(0, (1, 1)), marker="+"),
    "offline": dict(color="#e69f00", linestyle="--", marker="s"),
    "online": dict(color="#000000", linestyle="-", marker="o"),
    "reuse": dict(color="#009e73", linestyle=(0, (3, 1, 1, 1)), marker="p"),
    "full": dict(color="#56b4e9", linestyle="-.", marker="D"),
    "masked": dict(color="#0072b2", linestyle="--", marker="^"),
    "static": dict(color="#cc79a7", linestyle="-.", marker="v"),
    "nocredit": dict(color="#8c3a00", linestyle="--", marker="h"),
    "refresh": dict(color="#d55e00", linestyle="-", marker="*"),
}
COLUMNS = (("name", "{:<8}"), ("p_m", "{:>4.2f}"), ("K", "{:>3}"), ("refresh", "{:>7}"), ("val_reward", "{:>6.3f}"),
           ("test_reward", "{:>6.3f}"), ("sampled_reward", "{:>7.3f}"), ("bleu", "{:>5.1f}"), ("rougeL", "{:>6.1f}"),
           ("slot_error", "{:>7.2%}"), ("slot_error2", "{:>7.2%}"), ("entropy", "{:>7.3f}"), ("kl_to_base", "{:>6.3f}"),
           ("distinct2", "{:>6.3f}"), ("fp", "{:>9,.0f}"), ("fp_grad", "{:>8,.0f}"), ("fp_mle", "{:>7,.0f}"),
           ("tokens", "{:>11,.0f}"), ("seconds", "{:>7.1f}"), ("steps", "{:>5}"))
FORMAT = dict(COLUMNS)
SHORT = {"val_reward": "val R", "test_reward": "test R", "sampled_reward": "sampled", "rougeL": "RougeL",
         "slot_error": "slots", "slot_error2": "slots2", "kl_to_base": "KL", "distinct2": "dist2", "bleu": "BLEU",
         "fp_grad": "grad FP", "fp": "FP", "fp_mle": "MLE FP"}
SPREAD = ("val_reward", "test_reward", "sampled_reward", "bleu", "rougeL", "slot_error", "slot_error2")
COSTS = ("fp", "fp_grad", "fp_mle", "tokens", "seconds")


def home_of(out: str, seeds: tuple, seed: int) -> str:
    """The folder of one seed's runs in a comparison."""
    return f"{out}/seed{seed}" if seeds else out


def names_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def aligned(lines: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:])])
                     for line in lines)


def show(key: str, values: list) -> str:
    """One cell: a value, or mean ± sd over seeds where the column has a spread; a mean for costs."""
    if values[0] is None:
        return "-"
    if isinstance(values[0], str):
        return values[0]
    mean = sum(values) / len(values) if len(set(values)) > 1 else values[0]
    text = FORMAT[key].format(mean).strip()
    if key in SPREAD and len(values) > 1:
        text += "±" + FORMAT[key].format(float(np.std(values, ddof=1))).strip().replace("%", "").removeprefix("0")
    return text


def table(rows: list[dict]) -> str:
    """A line for each setting, over the seeds that it has."""
    keys = [key for key, _ in COLUMNS if any(row[key] is not None for row in rows)]
    lines = [[SHORT.get(key, key) for key in keys]]
    for name in names_of(rows):
        mine = [row for row in rows if row["name"] == name]
        lines.append([show(key, [row[key] for row in mine]) for key in keys])
    return aligned(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Cost at matched quality

def read_lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def curve(homes: list[str], name: str) -> dict[str, np.ndarray]:
    """Every evaluation of one setting, over the seeds' folders: step, and mean costs, (E,); val_reward (seeds,E)."""
    runs = [[m for m in read_lines(f"{home}/{name}/metrics.jsonl") if m["val_reward"] is not None] for home in homes]
    E = min(map(len, runs))  # the same for all, unless a budget in FPs stopped them
    columns = {key: np.array([[m[key] for m in run[:E]] for run in runs], float) for key in ("step", *COSTS)}
    return {key: value.mean(0) for key, value in columns.items()} | {
        "val_reward": np.array([[m["val_reward"] for m in run[:E]] for run in runs])}


def first_reach(curve: dict[str, np.ndarray], level: float) -> dict | None:
    """Step and mean costs at the first evaluation at which the mean validation reward is at least `level`."""
    at = np.flatnonzero(curve["val_reward"].mean(0) >= level)
    return {key: float(curve[key][at[0]]) for key in ("step", *COSTS)} if len(at) else None


def threshold(curves: dict[str, dict], less: float = 0.02) -> str:
    """What each setting has spent when its mean validation reward first comes within `less` of online's last one."""
    level = curves["online"]["val_reward"].mean(0)[-1] - less
    reached = {name: first_reach(c, level) for name, c in curves.items()}
    lines = [["", "FP", "grad FP", "tokens", "seconds", "step", "fewer FP", "fewer seconds"]]
    for name, row in reached.items():
        if row is None:
            lines.append([name, *["never"] * 5, "", ""])
            continue
        share = [f"{reached['online'][key] / row[key]:.1f}x" if row[key] else "-" for key in ("fp", "seconds")]
        lines.append([name, *(FORMAT[key].format(row[key]).strip() for key in ("fp", "fp_grad", "tokens", "seconds")),
                      f"{row['step']:.0f}", *share])
    n = len(curves["online"]["val_reward"])
    return f"validation reward {level:.3f} (online's last less {less}), first reached by the mean over {n} seed" + (
        "s" if n > 1 else "") + ":\n" + aligned(lines)


def paired(values: list[float], others: list[float]) -> str:
    """Mean difference of two lists over the same seeds, with its standard error where there is more than one."""
    d = np.array(values) - np.array(others)
    return f"{d.mean():+.3f}" + (f" (s.e. {d.std(ddof=1) / math.sqrt(len(d)):.3f})" if len(d) > 1 else "")


def differences(rows: list[dict], key: str = "test_reward") -> str:
    """Differences paired by seed, with their standard errors: each setting against base, mle, offline and online."""
    value = {(row["name"], row["seed"]): row[key] for row in rows}
    against = [name for name in ("base", "mle", "offline", "online") if name in names_of(rows)]
    seeds = sorted({row["seed"] for row in rows})
    lines = [[SHORT[key], *(f"less {name}'s" for name in against)]]
    for name in names_of(rows)[1:]:
        cells = []
        for other in against:
            mine, theirs = ([value[n, seed] for seed in seeds] for n in (name, other))
            cells.append("" if name == other else paired(mine, theirs))
        lines.append([name, *cells])
    return "differences, paired by seed:\n" + aligned(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap over the test records

def write_predictions(folder: str, records: list[Record], texts: list[str]) -> None:
    """predictions.jsonl, and predictions.txt for people: two lines a record, source and text, names put back."""
    with open(f"{folder}/predictions.jsonl", "w", encoding="utf-8") as file:
        for r, text in zip(records, texts):
            file.write(json.dumps({"source": r.source, "text": text}, ensure_ascii=False) + "\n")
    with open(f"{folder}/predictions.txt", "w", encoding="utf-8") as file:
        for r, text in zip(records, texts):
            source, text = (" ".join(r.put_names_back(t).split()) for t in (r.source, text))
            file.write(f"{source}\n  {text}\n")


def predictions(homes: list[str], name: str) -> list[dict]:
    """What a setting's tested weights wrote, source and text, over the seeds' folders."""
    return [line for home in homes for line in read_lines(f"{home}/{name}/predictions.jsonl")]


def resampled(texts: list[str], records: list[Record], reward, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Quality with every record counted as often as a row of weights (M,N) says -> M values for each metric."""
    sources, references = [r.source for r in records], [r.references for r in records]
    counts = weights @ np.array([bleu_counts(text, refs) for text, refs in zip(texts, references)])  # (M,10)
    values = {"test_reward": weights @ np.asarray(reward(texts, references, sources)) / weights.sum(1),
              "bleu": np.array([100 * bleu_score(row, cut_order=False) for row in counts]),
              "rougeL": 100 * (weights @ rouge(texts, references)[:, 2]) / weights.sum(1)}
    if all(map(has_slots, sources)):
        for name, count in (("slot_error", slot_errors), ("slot_error2", slot_errors2)):
            errors, slots = count(texts, sources)
            values[name] = (weights @ errors) / (weights @ slots)
    return values


def bootstrap(homes: list[str], names: list[str], records: list[Record], reward, draws: int = 1000) -> str:
    """Mean over seeds of every metric, and its difference from base and from online, with 95% intervals."""
    N, rng = len(records), np.random.default_rng(0)
    weights = np.concatenate([np.ones((1, N), int), rng.multinomial(N, [1 / N] * N, draws)])  # row 0: the data as they are
    values = {}
    for name in names:
        mine = []
        for home in homes:
            lines = predictions([home], name)
            if [line["source"] for line in lines] != [r.source for r in records]:
                raise ValueError(f"{home}/{name}/predictions.jsonl: texts of another test split")
            mine.append(resampled([line["text"] for line in lines], records, reward, weights))
        values[name] = {key: np.mean([v[key] for v in mine], 0) for key in mine[0]}

    def interval(v: np.ndarray, key: str, sign: str = "") -> str:
        scale, form = (100, ".2f") if key.startswith("slot") else (1, ".3f" if key == "test_reward" else ".1f")
        low, high = np.percentile(v[1:], (2.5, 97.5)) * scale
        return f"{v[0] * scale:{sign}{form}} [{low:{sign}{form}}, {high:{sign}{form}}]"

    parts = []
    keys = list(values["base"])
    for title, other in (("mean over seeds", None), ("less base's", "base"), ("less online's", "online")):
        lines = [[title, *(SHORT[key] + (" (%)" if key.startswith("slot") else "") for key in keys)]]
        for name in values:
            if name != other:
                lines.append([name, *(interval(values[name][key] - (values[other][key] if other else 0), key,
                                               "+" if other else "") for key in keys)])
        parts.append(aligned(lines))
    return "95% bootstrap intervals over the test records, seeds pooled:\n" + "\n\n".join(parts)


def error_kinds(homes: list[str], names: list[str]) -> str:
    """What kinds of slot errors each setting makes, all seeds together, by the reward's matcher."""
    lines = [["slot errors", "missing", "wrong", "added"]]
    for name in names:
        kinds = [slot_errors_by_kind(line["text"], line["source"]) for line in predictions(homes, name)]
        lines.append([name, *(str(sum(k[kind] for k in kinds)) for kind in lines[0][1:])])
    return "slot errors by kind, all seeds together:\n" + aligned(lines)


def fact_table(homes: list[str], names: list[str]) -> str:
    """The embedded task: how many of a hundred texts state each fact rightly, all seeds together; what a reward hides."""
    lines = []
    for name in names:
        said = [facts_said(line["text"], line["source"]) for line in predictions(homes, name)]
        lines = lines or [["facts said right (%)", *said[0]]]
        lines.append([name, *(f"{100 * sum(s[fact] for s in said) / len(said):.0f}" for fact in said[0])])
    return "what the greedy test texts state, all seeds together:\n" + aligned(lines)


def omission_cost(homes: list[str], names: list[str], records: list[Record]) -> str:
    """ROUGE-L of each setting less the base's, 0..100: where the base made no slot error, and where it made one that the
    setting mended. Does ROUGE-L fall because texts say more, or for another reason?"""
    def read(name: str):  # over all seeds: who is complete, (N,) bool, and ROUGE-L, (N,)
        texts = [line["text"] for line in predictions(homes, name)]
        return (slot_errors(texts, [r.source for r in records] * len(homes))[0] == 0,
                100 * rouge(texts, [r.references for r in records] * len(homes))[:, 2])

    complete, before = read("base")
    lines = [["RougeL less base's", "texts", "base complete", "texts", "base incomplete, mended"]]
    for name in names[1:]:
        now_complete, after = read(name)
        cells = []
        for where in (complete, ~complete & now_complete):
            cells += [str(int(where.sum())), f"{(after - before)[where].mean():+.1f}" if where.any() else "-"]
        lines.append([name, *cells])
    return "what mending slots does to ROUGE-L, all seeds together:\n" + aligned(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The whole report of a comparison

def chosen(rows: list[dict]) -> str:
    """The semi-offline setting that validation chooses, on the mean over seeds, beside the base, on the test split."""
    def mean(name, key):
        return sum(row[key] for row in rows if row["name"] == name) / sum(row["name"] == name for row in rows)
    semi = list(dict.fromkeys(row["name"] for row in rows if row["setting"] == "semi" and row["p_m"] > 0))
    if not semi:
        return ""
    best = max(semi, key=lambda name: mean(name, "val_reward"))
    text = ", ".join(f"{SHORT.get(key, key)} {FORMAT[key].format(mean(best, key)).strip()} "
                     f"(base {FORMAT[key].format(mean('base', key)).strip()})"
                     for key in ("test_reward", "bleu", "slot_error", "slot_error2") if rows[0][key] is not None)
    return f"semi-offline setting chosen on validation: {best}; {text}"


def samples(home: str, names: list[str], count: int) -> str:
    """The first test sources, and what each setting's tested weights wrote for them."""
    texts = {}
    for name in names:
        with open(f"{home}/{name}/predictions.txt", encoding="utf-8") as file:
            texts[name] = file.read().splitlines()
    sources = next(iter(texts.values()))[::2][:count]
    return "\n".join("\n".join([f"  {source}"] + [f"    {name:<8} {lines[2 * i + 1].strip()}" for name, lines in texts.items()])
                     for i, source in enumerate(sources))


def compare_report(out: str, seeds: tuple, rows: list[dict], records: list[Record], reward, machine: str) -> str:
    """Everything that compare prints; also draws compare.png and writes outputs.txt and report.txt into `out`."""
    all_seeds, names = list(dict.fromkeys(row["seed"] for row in rows)), names_of(rows)
    homes = [home_of(out, seeds, seed) for seed in all_seeds]
    curves = {name: curve(homes, name) for name in names if name != "base"}
    base = sum(row["val_reward"] for row in rows if row["name"] == "base") / len(all_seeds)
    draw_compare(curves, base, f"{out}/compare.png")
    parts = [table(rows), f"seeds {' '.join(map(str, all_seeds))}; {machine}", chosen(rows)]
    if "online" in names:
        parts += [threshold(curves), differences(rows)]
    if "online" in names and (len(all_seeds) > 1 or rows[0]["slot_error"] is not None):
        parts.append(bootstrap(homes, names, records, reward))
    if rows[0]["slot_error"] is not None:
        parts += [error_kinds(homes, names), omission_cost(homes, names, records)]
    if facts_said("", records[0].source):
        parts.append(fact_table(homes, names))
    parts.append("samples (greedy, test sources)\n" + samples(homes[0], names, 2))
    text = "\n\n".join(part for part in parts if part)
    with open(f"{out}/report.txt", "w", encoding="utf-8") as file:
        file.write(text + "\n")
    with open(f"{out}/outputs.txt", "w", encoding="utf-8") as file:
        file.write(samples(homes[0], names, 20) + "\n")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def tidy(axis, xlabel: str, ylabel: str = "") -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def finish(fig, path: str, **layout) -> None:
    fig.tight_layout(**layout)
    fig.savefig(path, dpi=120)
    pyplot().close(fig)


def draw_compare(curves: dict[str, dict], base: float, path: str) -> None:
    """Validation reward against sampling FPs (log axis) and against seconds: mean over seeds, and a band of ± sd."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for name, c in curves.items():
        mean, sd = c["val_reward"].mean(0), c["val_reward"].std(0, ddof=1) if len(c["val_reward"]) > 1 else None
        look = STYLE[name] | dict(label=name, linewidth=1.8, markersize=5, markevery=max(1, len(mean) // 8))
        for axis, x in ((axes[0], c["fp"]), (axes[1], c["seconds"])):
            keep = x > 0 if axis is axes[0] else x >= 0
            if keep.any():
                axis.plot(x[keep], mean[keep], **look)
                if sd is not None:
                    axis.fill_between(x[keep], (mean - sd)[keep], (mean + sd)[keep], color=look["color"], alpha=0.15, lw=0)
    for axis in axes:
        axis.axhline(base, label="base", **{k: v for k, v in STYLE["base"].items() if k != "marker"})
    tidy(axes[0], "forward propagations that sample (log scale)", "reward of greedy texts, validation")
    tidy(axes[1], "seconds of training, evaluation excluded")
    axes[0].set_xscale("log")
    axes[1].set_xlim(left=0)
    handles, labels = axes[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    n = len(next(iter(curves.values()))["val_reward"])
    fig.suptitle("Reward against cost, from the same base model" + (f" (mean ± sd of {n} seeds)" if n > 1 else ""))
    finish(fig, path, rect=(0, 0.07, 1, 1))
