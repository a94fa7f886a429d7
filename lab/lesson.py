"""The worked example of the README and the numbers of lab/LESSON.md.

    python -m lab.lesson [example|gradient|neighbours|cost|ratio|branch]
"""
import math
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import sorl
import torch

from data.rewards import rouge
from lab.cli import Parser, run_command
from lab.files import read_json
from lab.settings import SETTINGS, make_config

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WORDS = "some wind rain fog in town later today on PAD SEP end [MASK]".split()  # id -> word
# The example's model. Logits of a word by the word before it; others are 0.
NEXT = {"some wind": 5, "some rain": 5, "some fog": 4, "town later": 5, "town today": 5}
# What any earlier word adds: wind was often read with later, rain with today.
LATER = {"wind later": 0.5, "wind today": -0.5, "rain later": -0.5, "rain today": 0.5}


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def model_by_hand(ids, pad, start: int = 0):
    """A causal model without weights: ids (N,L) -> logits (N,L-start,V), for which autograd gives
    gradients."""
    tables = torch.zeros(2, len(WORDS), len(WORDS))
    for table, logits in zip(tables, (NEXT, LATER)):
        for pair, logit in logits.items():
            table[tuple(ids_of(pair))] = logit
    return (tables[0][ids] + tables[1][ids].cumsum(1))[:, start:].requires_grad_()


def example() -> str:
    """One update from one static text: coins, what is fed, two samples, rewards, the push."""
    text, reference = "some wind in town later on", "some rain in town today"
    src, pad = torch.tensor([ids_of("SEP")]), torch.tensor([0])
    static, u = torch.tensor([ids_of(f"{text} end")]), torch.zeros(1, 2, 7)
    coins = torch.tensor([[0.9, 0.1, 0.5, 0.8, 0.3, 0.6, 0.2]])
    u[0, :, [1, 4]] = torch.tensor([[0.6, 0.7], [0.2, 0.3]])

    mask = sorl.sample_mask(coins, torch.tensor([7]), p_m=1 / 3)
    fed = sorl.observe(static, mask, "masked", len(WORDS))
    logits = sorl.target_logits(model_by_hand, src, pad, fed)
    rollout = sorl.rollout_one_pass(logits, static, mask, u)
    texts = [[WORDS[i] for i in ids[:-1]] for ids in rollout.tokens[0]]
    R = torch.tensor(rouge([*map(" ".join, texts)], [[reference]] * 2).mean(1))[None]
    A = sorl.advantage(R)
    push, = torch.autograd.grad(-sorl.policy_loss(rollout, A), logits)

    lines = []

    def show(name: str, cells, remark: str = "") -> None:
        lines.append((f"{name:<9}" + "".join(f"{x:>7}" for x in cells) + f"   {remark}").rstrip())

    show("column", range(1, 7))
    show("y", text.split(), "static text")
    show("M", mask[0, :-1].int().tolist(), "coins, p_m = 1/3: the model draws 2 and 5")
    lines.append(f"\n{'fed':<54}column 5 is drawn from")
    for name, ids in (("masked", fed), ("static", static), ("full, 1", rollout.tokens[:, 0]),
                      ("full, 2", rollout.tokens[:, 1])):
        logp = sorl.log_probs(sorl.target_logits(model_by_hand, src, pad, ids)[0, 4], end=False)
        chances = [f"{word} {logp[WORDS.index(word)].exp():.2f}" for word in ("later", "today")]
        show(name, [WORDS[i] for i in ids[0, :-1]], "  ".join(chances))
    lines.append("\ntwo samples of masked")
    for k in range(2):
        show(f"sample {k + 1}", texts[k], f"R = {R[0, k]:.3f}   A = {A[0, k]:+.3f}")
    for t in (1, 4):
        moved = [f"{WORDS[i]} {push[0, t, i]:+.3f}" for i in push[0, t].abs().topk(2).indices]
        lines.append(f"push on the logits of column {t + 1}: {', '.join(sorted(moved))}")
    return "\n".join(lines)


def gradient() -> str:
    """One token, R = 1 for action 1 and 0 for action 0, both likely by half: mean and deviation of
    the estimate of dE[R] / d(logit of action 1), over all that K samples can be."""
    lines = ["baseline  " + "".join(f"{f'K = {K}':>16}" for K in (1, 2, 4, 8))]
    for baseline in ("none", "mean", "loo"):
        cells = ""
        for K in (1, 2, 4, 8):
            actions = torch.tensor([*product((0., 1.), repeat=K)], dtype=torch.float64)  # (2^K,K)
            A = actions if baseline == "none" else sorl.advantage(actions, baseline)
            found = (A * (actions - 1 / 2)).mean(1)  # d log π / d logit = 1[action 1] - π
            cells += f"{f'{found.mean():.4f} ± {found.std(correction=0):.3f}':>16}"
        lines.append(f"{baseline:<10}{cells}")
    return "\n".join(lines)


def neighbours(tau: float = 0.43) -> str:
    """Two tokens, R = 1 if they are equal: the policies of the highest E[R] + tau · entropy."""
    lean = 1.0  # Pr(1) - Pr(0) of both tokens, if drawn in one pass: a fixed point is the best
    for _ in range(1000):
        lean = math.tanh(lean / (2 * tau))
    single = (1 - lean) / 2, (1 + lean) / 2
    equal = 1 / (1 + math.exp(-1 / tau)) / 2  # Pr(00) = Pr(11) of the policy that may read
    lines = []
    for name, p in (("reads its first token", (equal, .5 - equal, .5 - equal, equal)),
                    ("both in one pass", [a * b for a, b in product(single, single)])):
        R, entropy = p[0] + p[3], -sum(x * math.log(x) for x in p)
        lines += [f"{name:<24}second 0   second 1", f"   first 0 {p[0]:>20.3f}{p[1]:>11.3f}",
                  f"   first 1 {p[2]:>20.3f}{p[3]:>11.3f}",
                  f"   E[R] {R:.3f} + {tau} · entropy {entropy:.3f} = {R + tau * entropy:.3f}"]
    return "\n".join(lines)


def cost(T: int = 21) -> str:
    """FPs that sample or score, of every setting on forecast, whose texts have T tokens."""
    rows = read_json(f"{ASSETS}/forecast.json")
    lines = ["setting   per source   updates   sources      FPs   measured, mean of five seeds"]
    for name in SETTINGS:
        cfg = make_config({"data": "forecast"}, name)
        written = (cfg.steps - 1) // cfg.refresh if cfg.refresh else 0  # how often
        drawn = T * cfg.p_m + (0.5 if cfg.mask == "tail" else 0)  # per text; cuts are rounded down
        each = {"mle": 0, "offline": cfg.num_static, "masked": 1, "static": 1,
                "refresh": 1 + written * T / cfg.steps}.get(name, cfg.K * drawn / cfg.reuse)
        found = [row["fp"] for row in rows if row["name"] == name]
        measured = f"{mean(found):>11,.0f}" if found else ""
        lines.append(f"{name:<8}{each:>12.1f}{cfg.steps:>10}{cfg.batch_size:>10}"
                     f"{each * cfg.steps * cfg.batch_size:>9,.0f}{measured}")
    return "\n".join(lines)


def ratio() -> str:
    """The push on log π of a token that is now ρ times as likely as when it was drawn."""
    rho = torch.tensor([0.70, 0.85, 1.00, 1.15, 1.30])
    lines = ["ρ        " + "".join(f"{x:>7.2f}" for x in rho)]
    for A in (1, -1):
        logp = rho.log().view(1, 5, 1).requires_grad_()
        rollout = sorl.Rollout(None, logp, torch.ones(1, 5, 1).bool())
        loss = sorl.policy_loss(rollout, torch.full((1, 5), A), before=torch.zeros(1, 5, 1))
        push, = torch.autograd.grad(-5 * loss, logp)  # the loss is a mean over five samples
        lines.append(f"A = {A:+}   " + "".join(f"{x:>7.2f}" for x in push.flatten()))
    return "\n".join(lines)


def branch(q: float = 0.2, s: float = 0.99, r: float = 0.5) -> str:
    """Texts 00 and 11 earn r and 1, others 0. The policy opens with 1 with probability q, and its
    second token equals the first with probability s."""
    old = q * s + (1 - q) * (1 - s)  # Pr(the second token of a text that it has written is 1)
    lines = [f"{'mean reward if it opens with':<31}0       1   q(1 - q) · difference"]
    for name, zero, one in (("it writes the second token", s * r, s),
                            ("the old second token stays", (1 - old) * r, old)):
        lines.append(f"   {name:<26}{zero:>6.3f}{one:>8.3f}{q * (1 - q) * (one - zero):>+12.4f}")
    return "\n".join(lines)


PARTS = {part.__name__: part for part in (example, gradient, neighbours, cost, ratio, branch)}


@run_command("lab.lesson")
def main(argv: list[str]) -> None:
    parser = Parser(prog="lab.lesson", allow_abbrev=False)
    parser.add_argument("part", nargs="?", choices=PARTS)
    chosen = parser.parse_args(argv).part
    for name in [chosen] if chosen else PARTS:
        print(f"{name}: {' '.join(PARTS[name].__doc__.split())}\n\n{PARTS[name]()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
