"""One update on six tokens, step by step, computed by the functions of sorl.py.

    python -m lab.lesson example
"""
import sys

import torch

import sorl
from data.rewards import rouge
from lab.cli import Parser, run_command

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


def command(argv: list[str]) -> None:
    parser = Parser(prog="lab.lesson", allow_abbrev=False)
    parser.add_argument("what", choices=("example",), help="print one update, step by step")
    parser.parse_args(argv)
    print(example())


def main(argv: list[str]) -> None:
    run_command("lab.lesson", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
