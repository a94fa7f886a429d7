"""Two pictures of the method for a first reader, computed by the verbs of sorl.py.

    python -m lab.lesson example                           six tokens by hand, step by step
    python -m lab.lesson picture --init out/base/best.pt   one text under five settings, a figure
"""
import argparse
import sys

import torch

import data
import sorl
from data import InputError
from data.rewards import rouge
from lab.cli import Parser, run_command
from lab.policy import load, load_policy
from lab.plots import pyplot, save_figure
from lab.report import attempt

WORDS = "some wind rain fog in town later today on PAD SEP end [MASK]".split()  # the example's ids


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def words_of(ids) -> list[str]:
    return [WORDS[i] for i in ids.tolist()]


def line(name: str, cells: list, remark: str) -> str:
    columns = "".join(f"{cell:>8}" for cell in cells)
    return f"{name:<8}{columns:<48}   {remark}".rstrip()


def example() -> str:
    """One update on one static text: coins, what is fed, two samples, rewards, loss, gradient."""
    text, reference = "some wind in town later on", "some rain in town today"
    static, src, pad = torch.tensor([ids_of(text + " end")]), torch.tensor([ids_of("SEP")]), None
    coins = torch.tensor([[.9, .1, .5, .8, .3, .6, .2]])
    u = torch.tensor([[[.0, .55, .0, .0, .75, .0, .0], [.0, .60, .0, .0, .30, .0, .0]]])

    # The model is a table of bigrams here: the word before -> logits of the next word.
    table = torch.zeros(len(WORDS), len(WORDS))
    table[ids_of("some"), ids_of("wind rain fog")] = torch.tensor([3.0, 3.0, 2.0])
    table[ids_of("town"), ids_of("later today")] = torch.tensor([3.0, 2.5])
    table.requires_grad_()

    def model(ids, pad, start):
        return table[ids[:, start:]]

    mask = sorl.sample_mask(coins, torch.tensor([7]), p_m=1 / 3)
    fed, decoded = sorl.feed(model, src, pad, static, mask, u, "masked", WORDS.index("[MASK]"))
    logits = sorl.target_logits(model, src, pad, fed)
    rollout = sorl.act(logits, static, mask, u, decoded)
    texts = [" ".join(words_of(ids[:6])) for ids in rollout.tokens[0]]
    R = torch.tensor(rouge(texts, [[reference]] * 2).mean(1), dtype=torch.float32)[None]
    A = sorl.advantage(R)
    loss = sorl.policy_loss(rollout, A)
    loss.backward()

    lines = [line("column", range(1, 7), ""),
             line("y", text.split(), "static text, written before training"),
             line("M", mask[0, :6].int().tolist(), "coins, p_m = 1/3: 2 and 5 are the model's"),
             line("fed", words_of(fed[0, :6]), "one forward propagation (FP)")]
    for t in mask[0].nonzero()[:, 0].tolist():
        lines.append(line(f"{t + 1} sees", words_of(fed[0, :t]), f"{t + 1} is drawn after these"))
    lines.append("The logits of a column come from the columns before it. So [MASK] hides a draw "
                 "from later columns\nonly: 5 is drawn without knowing what 2 became, and one FP "
                 "serves every sample.")
    for k in range(2):
        logp, shown = rollout.logp[0, k], [""] * 6
        for t in mask[0].nonzero()[:, 0].tolist():
            shown[t] = f"{logp[t].exp():.2f}"
        lines += [line(f"sample {k + 1}", words_of(rollout.tokens[0, k, :6]),
                       f"R = {R[0, k]:.3f}   A = {A[0, k]:+.3f}"),
                  line("  π", shown, f"Σ log π = {logp.sum():.3f}")]
    moved = [f"{WORDS[i]} -> {WORDS[j]} {-table.grad[i, j]:+.3f}"
             for i, j in (table.grad.abs() > 0.005).nonzero().tolist()]
    lines += [f"L_RL = -mean of A · Σ log π = {loss.item():+.4f}",
              f"a step against the gradient moves the logits {', '.join(moved)}",
              f"(R: mean of ROUGE-1, 2 and L against '{reference}'; the model: bigrams)"]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The picture

SETTINGS = {  # name -> what the model observes, p_m
    "online": ("full", 1.0),
    "full": ("full", 0.3),
    "masked": ("masked", 0.3),
    "static": ("static", 0.3),
    "offline": ("masked", 0.0),
}
K = 16
CAPTION = f"""\
White: the static text. Orange, bold: drawn by the model. Black: a draw that later columns
do not see. The model is causal: what is drawn in a column comes from the columns before it,
as they are fed (arrows), so [MASK] hides a draw from later columns only. Shown is one of {K}
samples; FPs, forward propagations of one row, are those of all {K}."""


@torch.no_grad()
def picture(init: str, path: str) -> None:
    """One text of the test split: what each setting feeds, and its first sample."""
    state = load(init)
    policy = load_policy(init, torch.device("cpu"), state)
    model, tok, T, rows = policy.model.eval(), policy.tok, policy.T, []
    records = data.load_dataset(state["config"]["data"])["test"][:50]
    record = min(records, key=lambda r: len(r.static[0]))  # the figure is narrow
    batch = data.make_batch([record], record.target[:1], [record.static[:1]], tok, T)
    static = torch.full((1, T), tok.pad)  # the model may write up to T tokens
    static[:, :batch.static.size(2)] = batch.static[:, 0]
    coins, u = sorl.uniforms((1, T), 7, "mask"), sorl.uniforms((1, K, T), 4, "tokens")
    for name, (observation, p_m) in SETTINGS.items():
        sees = observation == "full"  # a model that sees its own tokens ends where it likes
        lengths = torch.tensor([T + 1]) if sees else batch.static_len[:, 0]
        mask = sorl.sample_mask(coins, lengths, p_m)
        fed, decoded = sorl.feed(model, batch.src, batch.pad, static, mask, u,
                                 observation, tok.mask)
        src, pad = batch.src.expand(len(fed), -1), batch.pad.expand(len(fed))
        rollout = sorl.act(sorl.target_logits(model, src, pad, fed), static, mask, u, decoded)
        rows.append((f"{name}\n{int(rollout.fp)} FP", fed[0], rollout.tokens[0, 0],
                     rollout.acted[0, 0], sees))
    if failed := attempt(path, plot_settings, record.source, rows, tok):
        raise InputError(failed[0])


def plot_settings(path: str, source: str, rows: list, tok) -> None:
    """Two lines of cells a setting, what is fed and the text; a cell is as wide as its word."""
    fig, axis = pyplot().subplots(figsize=(9, 5.6))
    font = dict(va="center", ha="center", family="monospace", fontsize=7.5)
    special = {tok.mask: "[MASK]", tok.eos: "end"}

    def words(ids) -> list[str]:
        return [special.get(i, tok.decode([i]).strip() or "␣") for i in ids.tolist()]

    def cell(left, y, width, word, drawn):
        back = "black" if word == "[MASK]" else "#f0a04b" if drawn else "white"
        axis.text(left + width / 2, y, word, color="white" if back == "black" else "black",
                  weight="bold" if drawn else "normal", **font)
        axis.add_patch(pyplot().Rectangle((left + 0.1, y - 0.5), width - 0.2, 1, facecolor=back,
                                          edgecolor="black", linewidth=0.5))

    right = 0
    for number, (title, fed, text, acted, sees) in enumerate(rows):
        y, left = 4.2 * number, 8.0
        axis.text(-0.5, y + 0.9, title, **font | dict(fontsize=9, weight="bold"))
        axis.text(5.5, y, "fed", **font)
        axis.text(5.5, y + 1.8, "text", **font)
        length = int(sorl.text_mask(text, tok.vocab_size).sum())
        cells = zip(words(fed[:length - 1]) + [""], words(text[:length]), acted.tolist())
        for upper, lower, drawn in cells:
            width = 1.6 + max(len(upper), len(lower))
            if upper:  # the last column is predicted, and never fed
                cell(left, y, width, upper, drawn and sees)
            cell(left, y + 1.8, width, lower, drawn)
            if drawn:
                axis.annotate("", (left + 0.8, y + 1.3), (left - 0.6, y + 0.5),
                              arrowprops=dict(arrowstyle="->", linewidth=0.8))
            left += width
        right = max(right, left)
    axis.set(xlim=(-5.5, right), ylim=(4.2 * len(rows) - 1, -6))
    axis.text(-5.5, -3.6, f"Source: {source}\n{CAPTION}", va="center", fontsize=8)
    axis.axis("off")
    save_figure(fig, path)


def command(argv: list[str]) -> None:
    parser = Parser(prog="lab.lesson", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("example", "picture"))
    parser.add_argument("--init", default="out/base/best.pt", help="picture: a checkpoint")
    parser.add_argument("--out", default="settings.png", help="picture: the file to write")
    args = parser.parse_args(argv)
    if args.what == "example":
        return print(example())
    picture(args.init, args.out)
    print(f"wrote {args.out}")


def main(argv: list[str]) -> None:
    run_command("lab.lesson", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
