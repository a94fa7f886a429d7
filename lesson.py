"""Two pictures of the method for the README, computed by sorl.py itself.

    python lesson.py example                                the six-token example, step by step
    python lesson.py picture --init out/base/best.pt        what each setting feeds and samples, drawn from a real record
"""
import argparse
import sys

import torch

import data
import report
import sorl
import train
from data.rewards import rouge
from model import EOS

WORDS = "some wind rain fog in town later today on".split()  # ids 0..8; the four special ids follow
V = len(WORDS) + 4


def example() -> str:
    """Static text, coins, one forward pass's worth of logits, two samples, reward, advantage, loss, gradient."""
    text, reference = "some wind in town later on", "some rain in town today"
    static = torch.tensor([[WORDS.index(word) for word in text.split()] + [V + EOS]])  # (1,T)
    mask = sorl.sample_mask(torch.tensor([[.9, .1, .5, .8, .3, .6, .2]]), torch.tensor([7]), 1 / 3)  # (1,T), coins as drawn
    fed = sorl.observe(static, mask, "masked", V - 1)
    logits = torch.zeros(1, 7, V)  # in place of a model's: what it thinks of the two masks
    logits[0, 1, [WORDS.index(w) for w in ("wind", "rain", "fog")]] = torch.tensor([3.0, 3.0, 2.0])
    logits[0, 4, [WORDS.index(w) for w in ("later", "today")]] = torch.tensor([3.0, 2.5])
    logits.requires_grad_()
    u = torch.tensor([[.0, .55, 0, 0, .75, 0, 0], [.0, .60, 0, 0, .30, 0, 0]])[None]  # (1,K,T)
    rollout = sorl.rollout_one_pass(logits, static, mask, u)
    texts = [" ".join(WORDS[i] for i in ids[:6]) for ids in rollout.tokens[0].tolist()]
    rewards = torch.tensor(rouge(texts, [[reference]] * 2).mean(1), dtype=torch.float32)[None]
    A = sorl.advantage(rewards)
    loss = sorl.policy_loss(rollout, A)
    loss.backward()

    def line(name: str, cells: list[str], more: str = "") -> str:
        return f"{name:<10}" + "".join(f"{cell:>8}" for cell in cells) + more

    def shown(ids):
        return ["[MASK]" if i == V - 1 else WORDS[i] for i in ids[:6].tolist()]

    lines = [line("y", text.split(), "   written before training"),
             line("M", [str(int(m)) for m in mask[0, :6]], "   coins, p_m = 1/3"),
             line("fed", shown(fed[0]), "   one forward pass: the logits of both masks")]
    for k in range(2):
        p = rollout.logp[0, k].exp()
        lines.append(line(f"sample {k + 1}", shown(rollout.tokens[0, k]), f"   R = {rewards[0, k]:.3f}   A = {A[0, k]:+.3f}"))
        lines.append(line("  π", [f"{p[t]:.2f}" if mask[0, t] else "" for t in range(6)],
                          f"   Σ log π = {rollout.logp[0, k].sum():.3f}"))
    lines.append(f"L_RL = -mean of A · Σ log π = {loss.item():+.4f}")
    moves = [(WORDS[i], t, -logits.grad[0, t, i].item()) for t in (1, 4) for i in range(len(WORDS))
             if abs(logits.grad[0, t, i]) > 0.005]
    lines.append("a step against the gradient moves the logits of " + ", ".join(f"{w} {d:+.3f}" for w, t, d in moves))
    return "\n".join(lines) + f"\n(reward: mean of ROUGE-1, 2 and L against '{reference}')"


@torch.no_grad()
def picture(init: str, out: str) -> None:
    """One record of the embedded task's test split under every setting: what the model is fed, and the text that comes out."""
    policy = train.load_policy(init, torch.device("cpu"))
    model, tok = policy.model.eval(), policy.tok
    record = data.load_dataset("forecast")["test"][3]
    batch = data.make_batch([record], record.target[:1], [record.static[:1]], tok, policy.T)
    static, T = train.widen(batch.static[:, 0], policy.T, tok.pad), policy.T  # online may write up to T tokens
    mask = sorl.sample_mask(sorl.uniforms((1, T), 7, "mask"), batch.static_len[:, 0], 0.3)
    u = sorl.uniforms((1, 1, T), 4, "tokens")
    everywhere = torch.ones_like(mask)
    rows = []  # name, FPs of one sample, fed ids, text ids, which were sampled
    for name in ("online", "full", "masked", "static", "offline"):
        if name in ("online", "full"):
            acts = everywhere if name == "online" else mask
            r = sorl.decode(model, batch.src, batch.pad, static, acts, u)
            fed, text, acted, fp = r.tokens[0, 0], r.tokens[0, 0], r.acted[0, 0], int(r.fp)
        else:
            acts = mask if name != "offline" else ~everywhere
            fed = sorl.observe(static, acts, name, tok.mask)
            r = sorl.rollout_one_pass(sorl.target_logits(model, batch.src, batch.pad, fed), static, acts, u)
            fed, text, acted, fp = fed[0], r.tokens[0, 0], r.acted[0, 0], 1
        rows.append((name, fp, fed.tolist(), text.tolist(), acted.tolist()))
    draw_picture(record.source, rows, tok, out)


def draw_picture(source: str, rows: list, tok, out: str) -> None:
    plt = report.pyplot()
    T = max(text.index(tok.eos) + 1 if tok.eos in text else len(text) for _, _, _, text, _ in rows)
    fig, axis = plt.subplots(figsize=(15, 5.6))
    for i, (name, fp, fed, text, acted) in enumerate(rows):
        axis.text(-0.3, -2.6 * i - 0.5, f"{name}\n{fp} FP", ha="right", va="center", fontsize=10, weight="bold")
        for line, ids in enumerate((fed, text)):
            axis.text(T + 0.2, -2.6 * i - line, ("fed", "text")[line], va="center", fontsize=8, color="#555555")
            for t in range(T):
                if ids[t] == tok.pad or tok.eos in ids[:t] or line == 0 and ids[t] == tok.eos:  # the end is never fed
                    continue
                hidden, own = ids[t] == tok.mask, acted[t] and (line == 1 or name in ("online", "full"))
                colour = "#444444" if hidden else "#f4b183" if own else "#e8e8e8"
                word = "[MASK]" if hidden else "end" if ids[t] == tok.eos else tok.decode([ids[t]]).strip() or "␣"
                axis.add_patch(plt.Rectangle((t, -2.6 * i - line - 0.45), 0.94, 0.9, color=colour))
                axis.text(t + 0.47, -2.6 * i - line, word, ha="center", va="center", fontsize=6.5,
                          color="white" if hidden else "black", weight="bold" if own else "normal")
    axis.set_xlim(-2, T + 1.2)
    axis.set_ylim(-2.6 * len(rows) + 0.8, 1.4)
    axis.text(0, 1.0, f"source: {source}.   Grey: the static text's tokens; orange, bold: drawn by the model; dark: hidden "
              f"from it.", fontsize=9)
    axis.axis("off")
    report.finish(fig, out)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="lesson.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("example", "picture"))
    parser.add_argument("--init", default="out/base/best.pt", help="picture: a checkpoint of the embedded task")
    parser.add_argument("--out", default="settings.png", help="picture: the file to write")
    args = parser.parse_args(argv)
    if args.what == "example":
        print(example())
        return
    try:
        picture(args.init, args.out)
        print(f"wrote {args.out}")
    except data.InputError as e:
        print(f"lesson.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
