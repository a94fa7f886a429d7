"""How every figure looks: the colour, dash and marker of each setting, axes, files."""
import os

STYLE = {  # a setting's look in every figure; dash and marker differ, for print in grey
    "base": dict(color="#7f7f7f", linestyle=":", marker="x"),
    "mle": dict(color="#b3a369", linestyle=(0, (1, 1)), marker="+"),
    "offline": dict(color="#e69f00", linestyle=(0, (4, 1.5)), marker="s"),
    "online": dict(color="#000000", linestyle="-", marker="o"),
    "full": dict(color="#56b4e9", linestyle=(0, (5, 1, 1, 1, 1, 1)), marker="P"),
    "masked": dict(color="#00609c", linestyle="--", marker="^"),
    "static": dict(color="#cc79a7", linestyle="-.", marker="v"),
    "refresh": dict(color="#e0600a", linestyle=(0, (8, 1)), marker="D"),
    "credit": dict(color="#8c3a00", linestyle=(0, (6, 2)), marker="h"),
    "reuse": dict(color="#009e73", linestyle=(0, (3, 1, 1, 1)), marker="p"),
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


def tidy(axis, xlabel: str, ylabel: str = "") -> None:
    """Name the axes; take away what does not inform."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(fig, path: str) -> None:
    """Lay out, write and close a figure."""
    try:
        fig.tight_layout()
        fig.savefig(path, dpi=180)
    finally:
        pyplot().close(fig)
