"""How every figure looks: the colour, dash and marker of each setting, axes, panels, files."""
import math
import os
import warnings
from dataclasses import dataclass

from data import InputError

# What figures are about; the others are drawn thinner.
STRONG = ("online", "tail", "masked", "refresh")
# Dash and marker differ, for print in grey. The strong ones differ in lightness, too, which every
# reader sees, colour-blind or not.
STYLE = {
    "base": dict(color="#7f7f7f", linestyle=":", marker="x"),
    "mle": dict(color="#b3a369", linestyle=(0, (1, 1)), marker="+"),
    "offline": dict(color="#e69f00", linestyle=(0, (4, 1.5)), marker="s"),
    "online": dict(color="#000000", linestyle="-", marker="o"),
    "full": dict(color="#56b4e9", linestyle=(0, (5, 1, 1, 1, 1, 1)), marker="P"),
    "tail": dict(color="#6200b3", linestyle=(0, (3, 1, 1, 1)), marker="p"),
    "masked": dict(color="#2470b0", linestyle="--", marker="^"),
    "static": dict(color="#cc79a7", linestyle="-.", marker="v"),
    "refresh": dict(color="#e0743a", linestyle=(0, (8, 1)), marker="D"),
}


def style(name: str) -> dict:
    """Keyword arguments of matplotlib's plot for a setting; a plain look for one not in STYLE."""
    return dict(STYLE.get(name, dict(color="#555555", linestyle="-", marker="d")))


def pyplot():
    """matplotlib.pyplot, set to draw into files and to look the same everywhere, whatever backend
    a notebook has set and whatever a matplotlibrc asks for (LaTeX, which may not be installed)."""
    os.environ["MPLBACKEND"] = "Agg"  # a name that matplotlib does not know stops its import
    import matplotlib
    import matplotlib.pyplot as plt
    matplotlib.rcdefaults()
    matplotlib.use("Agg")
    return plt


def tidy(axis, xlabel: str, ylabel: str = "", title: str = "") -> None:
    """Name the axes and take away what does not inform.

    title: a user's text, such as a folder's name, drawn literally: $ does not begin mathematics."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if title:
        axis.set_title(title.encode(errors="replace").decode(), parse_math=False,
                       fontsize=11, fontweight="bold")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(fig, path: str) -> None:
    """Lay out, write and close a figure. Prints one note if matplotlib warns, for example that its
    font lacks letters. Raises InputError if the figure cannot be written."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fig.tight_layout()
            fig.savefig(path, dpi=180)
    except Exception as error:  # matplotlib fails in more ways than can be listed
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be written ({reason:.200})") from None
    finally:
        pyplot().close(fig)
    if caught:
        print(f"note: {path}: {' '.join(str(caught[0].message).split())}")


# -------------------------------------------------------------------------------------------------
# Panels

@dataclass
class Panel:
    """Rewards against FPs, on a log axis."""
    title: str
    ylabel: str
    lines: dict  # setting -> points (P,2), and P texts to write beside them, or ()
    base: float | None = None  # its reward, a dotted line
    saving: tuple = ()  # a reward, and the FPs at which the cheapest setting and online reached it


def draw_panels(path: str, panels: list[Panel]) -> None:
    """Panels side by side, with one legend. Raises InputError if it cannot be written."""
    size = (1.5 + 5.5 * len(panels), 3.9)
    fig, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        draw_panel(axis, panel)
    names = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    axis.legend(names.values(), names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False,
                handlelength=4)
    save_figure(fig, path)


def draw_panel(axis, panel: Panel) -> None:
    """The lines of a panel, the base, and an arrow above them for what is saved."""
    tidy(axis, "forward propagations that sample (log scale)", panel.ylabel, panel.title)
    axis.set_xscale("log")
    axis.margins(x=0.1)
    for name, (points, _) in panel.lines.items():
        wide = name in STRONG
        axis.plot(*points.T, **style(name), label=name, markevery=max(1, len(points) // 8),
                  linewidth=2.2 if wide else 1.1, markersize=5 if wide else 3.5, zorder=2 + wide)
    if panel.base is not None:
        axis.axhline(panel.base, **style("base") | dict(marker=""), label="base")
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= high])
    if panel.saving:
        level, left, right = panel.saving
        top = high + 0.2 * (high - low)  # room for the arrow
        y = top - 0.1 * (top - low)
        axis.set_ylim(low, top)
        axis.vlines((left, right), level, y, color="#999999", linewidth=0.8, zorder=1)
        axis.annotate("", (left, y), (right, y), arrowprops=dict(arrowstyle="->", linewidth=1.4))
        axis.text(math.sqrt(left * right), y + 0.02 * (top - low), ha="center", fontsize=9,
                  s=f"reward {level:.2f}: {right / left:.0f}x fewer passes")
    label_points(axis, panel)


def label_points(axis, panel: Panel) -> None:
    """Write texts to the right of their points; where two of a line would meet, one below another.
    """
    for name, (points, texts) in panel.lines.items():
        from_the_top = sorted(zip(points.tolist(), texts), key=lambda pair: pair[0][::-1])[::-1]
        free = math.inf  # the height below which nothing is written; in points, as font sizes are
        for at, text in from_the_top:
            y = axis.transData.transform(at)[1] * 72 / axis.figure.dpi
            free = min(y, free)
            axis.annotate(text, at, (6, free - y), textcoords="offset points", fontsize=7,
                          va="center", color=style(name)["color"])
            free -= 9
