"""Is masked observation optimal? The paper's three claims, checked in worlds small enough to list.

    python theory.py                   everything: a table and two figures, about a minute
    python theory.py overfitting       one part: cost, asymptotic, overfitting, use, gradient, tail
    python theory.py P5 P13 --quick    two propositions, fewer instances
    python theory.py --plan            what a budget buys in each setting on this machine

The world. A source has a static text y ~ D of T tokens. At every position a coin M_t ~ Bernoulli(p)
decides whose token is taken: the model's action a_t (M_t = 1) or the static y_t. The text that
results earns one reward R at its end. This is the semi-offline process; p = 1 is online: the model
writes all tokens and reads its own. The state before an action is (M_0..M_t, the tokens so far).

An observation is what the model is shown before it acts:
    full           the state (the setting `full` of sorl.py shows its tokens, without the coins)
    masked         the coins, the static tokens that were kept, and [MASK] for the model's own
    static         the static tokens so far, without the coins, like the setting of sorl.py
    static+coins   the static tokens so far and the coins
    blind          the position alone
It is causal if it shows nothing that comes later, one-pass if it shows nothing that depends on an
action, and made from the state if it is a function of the state. A static token that was replaced
is not in the state, but static shows it: so static can beat full.

P10 and P12, about phi-models alone, have no row: tests/test_theory.py checks them. P10: a phi-model
is right about the policy it was made under and wrong about others. P12: for uniform texts 14
observations have the worst eps of masked's 26, so the asymptotic bound does not single masked out.
"""
import copy
import math
import sys
import textwrap
import time
import timeit
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path

from lab.cli import Parser, run_command
from lab.plots import pyplot, save_figure, style, tidy
from model import EOS, GPT, MASK, SEP, GPTConfig, generate, log_probs  # before torch: see there

import numpy as np
import torch

import sorl

# A row: [verdict] a claim in one sentence, and below it what was computed. The verdicts:
HOLDS = "holds"                          # it came out as claimed
EMPTY = "holds, empty"                   # true, and so weak that it tells nothing
FALSE = "false"                          # the numbers are a counterexample
BREAKS = "fails without its assumption"  # as it should: the assumption was taken away on purpose


@dataclass
class Row:
    claim: str        # one sentence
    computed: str     # what was computed, with {} for each number
    measured: list
    verdict: str
    stated: str = ""  # what the numbers should have been, if they are not: the exit code is then 1

    def __str__(self):
        verdict = f"UNEXPECTED, stated: {self.stated}" if self.stated else self.verdict
        found = self.computed.format(*numbers(self.measured))
        lines = ("  ", f"[{verdict}] {self.claim}"), (" " * 6, found)
        return "\n".join(textwrap.fill(text, 98, initial_indent=indent, subsequent_indent=" " * 6)
                         for indent, text in lines)


def numbers(values) -> list:
    return [f"{0 if abs(x) < 1e-9 else x:.4g}" for x in np.ravel(values)]


def equal(claim, computed, measured, stated, tolerance=1e-9, verdict=HOLDS) -> Row:
    """As many numbers as stated, each within the tolerance, or its own."""
    measured, stated = np.ravel(measured), np.ravel(stated)
    ok = measured.shape == stated.shape and (abs(measured - stated) <= tolerance).all()
    return Row(claim, computed, measured, verdict, "" if ok else " ".join(numbers(stated)))


def falls(claim, computed, measured, margin=0.0, verdict=HOLDS) -> Row:
    """Each number is smaller than the one before it, by more than the margin."""
    ok = (-np.diff(measured) > margin).all()
    return Row(claim, computed, measured, verdict, "" if ok else f"steps of more than {margin:g}")


# --------------------------------------------------------------------------------------------------
# Exact worlds: everything that can happen to one source

# What is seen before the action at t, of static text y, coins M and the text so far.
SEES = {
    "full": lambda y, M, text, t: (M[:t + 1], text[:t]),
    "masked": lambda y, M, text, t: (M[:t + 1], tuple(-1 if M[j] else y[j] for j in range(t))),
    "static+coins": lambda y, M, text, t: (M[:t + 1], y[:t]),
    "static": lambda y, M, text, t: y[:t],
    "blind": lambda y, M, text, t: (),
}
ONE_PASS = ("masked", "static+coins", "static", "blind")


def texts(T: int, k: int = 2) -> list:
    return list(product(range(k), repeat=T))


def table(T: int, f, k: int = 2) -> dict:
    """A number for each text: f of its tokens."""
    return {text: float(f(*text)) for text in texts(T, k)}


@dataclass(eq=False)
class Process:
    """D: static text -> probability. R: text -> reward, 0 to 1. p: the coins' rate."""
    T: int
    D: dict
    R: dict
    p: float
    k: int = 2

    def contexts(self):
        """Every (probability, static text, coins)."""
        for (y, d), M in product(self.D.items(), texts(self.T)):
            weight = d * self.p ** sum(M) * (1 - self.p) ** (self.T - sum(M))
            if weight > 0:
                yield weight, y, M

    def worlds(self, mu=None):
        """Every (probability, static text, coins, actions, text) under a behaviour mu: the chances
        of the k actions, or a function of (y, M, text so far, t) that gives them; uniform if None.
        At a coin of 0 there is an action, too; it changes nothing."""
        mu = mu or (1 / self.k,) * self.k
        for weight, y, M in self.contexts():
            for actions in texts(self.T, self.k):
                text = tuple(a if coin else token for a, coin, token in zip(actions, M, y))
                w = weight
                for t, a in enumerate(actions):
                    w *= (mu(y, M, text[:t], t) if callable(mu) else mu)[a]
                if w > 0:
                    yield w, y, M, actions, text


def value(process, mu) -> float:
    return sum(w * process.R[text] for w, *_, text in process.worlds(mu))


def phi_model(process, phi, mu=None) -> list:
    """The Markov model that one would estimate under mu, which must try every action: for each
    position (observation, action) -> {next observation: weight}; at the end that is the text."""
    P = [defaultdict(Counter) for _ in range(process.T)]
    for w, y, M, actions, text in process.worlds(mu):
        seen = [SEES[phi](y, M, text, t) for t in range(process.T)] + [text]
        for t, a in enumerate(actions):
            P[t][seen[t], a][seen[t + 1]] += w
    return P


def plan(P, R):
    """Backward induction -> Q[t][observation, action] and greedy[t][observation]. Ties, to 12
    digits, go to the lowest action."""
    V, Q, greedy = R, [], []
    for layer in reversed(P):
        q = {key: sum(w * V[o] for o, w in to.items()) / to.total() for key, to in layer.items()}
        best = {}
        for o, a in sorted(q):
            if o not in best or round(q[o, a], 12) > round(q[o, best[o]], 12):
                best[o] = a
        V = {o: q[o, a] for o, a in best.items()}
        Q.insert(0, q)
        greedy.insert(0, best)
    return Q, greedy


def follow(greedy, phi, k=2):
    """The behaviour that takes the greedy actions, and action 0 after what was never seen."""
    def mu(y, M, text, t):
        choice = greedy[t].get(SEES[phi](y, M, text, t), 0)
        return [float(a == choice) for a in range(k)]
    return mu


def planner(process, phi, mu=None):
    """The behaviour that is planned in the phi-model; for full it is the optimum."""
    _, greedy = plan(phi_model(process, phi, mu), process.R)
    return follow(greedy, phi, process.k)


def best_in_class(process, phi) -> float:
    """What the best deterministic policy of a one-pass observation earns: all are tried."""
    T, k, see = process.T, process.k, SEES[phi]
    cells = sorted({(t, see(y, M, y, t)) for _, y, M in process.contexts() for t in range(T)
                    if M[t]})
    every = np.array(list(product(range(k), repeat=len(cells))))  # (policies,cells)
    action = dict(zip(cells, every.T))
    R, worth = np.array([process.R[text] for text in texts(T, k)]).reshape([k] * T), 0.
    for w, y, M in process.contexts():
        text = (action[t, see(y, M, y, t)] if M[t] else y[t] for t in range(T))
        worth = worth + w * R[tuple(text)]
    return worth.max()


def epsilon(process, phi, mu=None):
    """eps = 2 (1 - Pr(state | seen)), the L1 distance between the belief and the one true state:
    for each position the worst of the states that are reached, and the mean: (T,), (T,)."""
    worst, mean = np.zeros(process.T), np.zeros(process.T)
    for t in range(process.T):
        joint, seen = Counter(), Counter()
        for w, y, M, _, text in process.worlds(mu):
            state, o = SEES["full"](y, M, text, t), SEES[phi](y, M, text, t)
            joint[state, o] += w
            seen[o] += w
        eps = {key: 2 * (1 - w / seen[key[1]]) for key, w in joint.items()}
        worst[t], mean[t] = max(eps.values()), sum(joint[key] * eps[key] for key in joint)
    return worst, mean


def random_process(rng, T=3, product_D=False) -> Process:
    """p ~ U[.15, .85], R ~ U[0, 1] for each text; D of independent tokens, or of any."""
    D = dict(zip(texts(T), rng.dirichlet(np.full(2 ** T, .3))))
    if product_D:
        ones = rng.uniform(.05, .95, T)
        D = table(T, lambda *y: np.prod(np.where(y, ones, 1 - ones)))
    return Process(T, D, dict(zip(texts(T), rng.random(2 ** T))), rng.uniform(.15, .85))


# The toy tasks. In the first, Y_0 and Y_1 should be equal.
COPY = Process(2, table(2, lambda a, b: 1 / 4), table(2, lambda a, b: a == b), p=.9)
# Y_1 and Y_2 should be equal; a y_0 that was replaced tells what y_2 will be.
TELLS = Process(3, {(0, 0, 0): .5, (1, 1, 1): .5}, table(3, lambda a, b, c: b == c), p=.5)
# Y_0 and Y_1 should differ; the second action must know whether the first one counted.
COINS = Process(2, {(0, 0): 1.}, table(2, lambda a, b: a != b), p=.3)
# Y_0 = 0 earns .5 or .7, Y_0 = 1 earns 0 or 1, by Y_1. The policy can make Y_1 = 1; the static text
# has it one time in five.
BET = Process(2, table(2, lambda a, b: .1 if b else .4),
              {(0, 0): .5, (0, 1): .7, (1, 0): 0., (1, 1): 1.}, p=.2)
# The better text differs from the usual one in two tokens, and the texts between them earn nothing.
BRANCH = Process(2, {(0, 0): .8, (1, 1): .2}, {(0, 0): .5, (0, 1): 0., (1, 0): 0., (1, 1): 1.}, .2)
FLAT = Process(3, table(3, lambda *y: 1 / 8), table(3, lambda *y: 1), p=.5)  # nothing to choose


def threshold(p, T) -> Process:
    """Static 0^T, R(0^T) = .3, R(1^T) = .6, else 0: exploring pays if all coins are 1."""
    return Process(T, {(0,) * T: 1.}, table(T, lambda *y: .6 * all(y) + .3 * (not any(y))), p)


# --------------------------------------------------------------------------------------------------
# The project's GPT in the same worlds


def tiny_gpt(k: int, columns: int, seed=0, std=.1) -> GPT:
    """One layer of 32; ids 0 to k-1 are the world's tokens. std is that of all matrices."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(k + 4, columns, n_layer=1, n_head=2, n_embd=32))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def source(model, columns=1):
    """The one source, some SEPs -> src (1,columns), pad (1,)."""
    return torch.full((1, columns), model.config.vocab_size + SEP), torch.tensor([0])


def law(model, T: int, seen: str):
    """Pr(text | static text, coins) of the GPT: (N static, 2^T coins, N texts), differentiable.

    seen: masked or static, as sorl.feed feeds it; or full: the GPT reads the text that results."""
    k = model.config.vocab_size - 4
    every, coins = torch.tensor(texts(T, k)), torch.tensor(texts(T)).bool()  # (N,T) (C,T)
    N, C = len(every), len(coins)
    fed = every
    if seen != "full":
        static, mask = every.repeat_interleave(C, 0), coins.repeat(N, 1)     # (N·C,T)
        fed, _ = sorl.feed(model, *source(model), static, mask, None, seen)
    logp = log_probs(sorl.target_logits(model, *source(model), fed), end=False)
    logp = logp[:, torch.arange(T), every].double()   # (rows,N,T) of each text's tokens
    if seen == "full":                                # row i is text i
        logp = logp.diagonal().T.expand(N, C, N, T)
    acted = coins[:, None]                            # (C,1,T)
    same = every == every[:, None]                    # (N,N,T) static text and text
    possible = (same[:, None] | acted).all(-1)        # (N,C,N)
    return (logp.reshape(N, C, N, T) * acted).sum(-1).exp() * possible


def tail_share(t: int, T: int, p: float) -> float:
    """Pr(cut <= t): how often sorl.sample_tail leaves column t of T to the model; 0 for t = -1."""
    return ((t + 1) / T) ** ((1 - p) / p) if t >= 0 else 0.


def expected(model, process, setting: str):
    """E R of the GPT in the process, exact and differentiable. setting: full, masked or static;
    online, which is full at p = 1; tail, which is full with coins 0 up to a cut and 1 from it."""
    T, p = process.T, 1. if setting == "online" else process.p
    chance = {M: p ** sum(M) * (1 - p) ** (T - sum(M)) for M in texts(T)}
    if setting == "tail":
        chance = {(0,) * cut + (1,) * (T - cut): tail_share(cut, T, p) - tail_share(cut - 1, T, p)
                  for cut in range(T)}
    D, coins, R = (torch.tensor([of.get(text, 0.) for text in texts(T, k)], dtype=torch.float64)
                   for of, k in ((process.D, process.k), (chance, 2), (process.R, process.k)))
    seen = setting if setting in ("masked", "static") else "full"
    return torch.einsum("n,c,ncm,m->", D, coins, law(model, T, seen), R)


def gradient(J, model):
    """That of J, of all weights in one vector."""
    found = torch.autograd.grad(J, [*model.parameters()], retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def own_texts(model, T: int) -> dict:
    """What the model writes alone, reading its own tokens: text -> probability."""
    alone = law(model, T, "full")[0, -1]  # all coins are 1: the static text changes nothing
    return dict(zip(texts(T, model.config.vocab_size - 4), alone.tolist()))


def climb(model, objective, updates=150, rate=.002) -> GPT:
    """Adam's ascent on objective(update); the rate falls in the second half."""
    adam = torch.optim.Adam(model.parameters(), fused=True)
    for update in range(updates):
        adam.param_groups[0]["lr"] = rate * min(1, 2 - 2 * update / updates)
        adam.zero_grad()
        (-objective(update)).backward()
        adam.step()
    return model


def train_gpt(process, setting: str, refresh=0, seed=0, model=None, rate=.002) -> GPT:
    """The method without its noise: exact ascent on E R, from a new GPT if no model is given. The
    static texts are D's; with refresh = n the policy writes them anew every n updates."""
    model = model or tiny_gpt(process.k, process.T, seed, std=.02)

    def objective(update):
        nonlocal process
        if refresh and update and update % refresh == 0:
            process = replace(process, D=own_texts(model, process.T))
        return expected(model, process, setting)
    return climb(model, objective, rate=rate)


COST = """CLAIM 1: masked has the least cost, one forward propagation (FP) per input.
If nothing that is fed depends on a drawn token, one pass gives the probabilities at all positions,
and any number of samples can be drawn from it. So it is with masked (P1, P2); of all one-pass
observations made from the text that results it shows the most (P3). The price: tokens drawn in one
pass do not know each other. A deterministic policy can work out what it wrote and loses nothing
(P4). Two neighbours cannot agree and stay random (P5)."""


def counted(seen: str, K: int, p=.4, T=8, L=5) -> Counter:
    """Costs of K samples of one text of T tokens after a prompt of L, mean over all masks: fp, FPs
    to sample, and fp_grad, further ones for the gradient, by sorl.py's counters; rows and tokens,
    what the GPT counted as pushed through it to sample."""
    model, every, mean = tiny_gpt(2, L + T), torch.tensor(texts(T)).bool(), Counter()
    for heads in range(T + 1):  # masks of one probability are one batch
        mask = torch.nn.functional.pad(every[every.sum(1) == heads], (0, 1))  # EOS is never masked
        static = torch.tensor([[0] * T + [model.config.vocab_size + EOS]]).expand(len(mask), -1)
        u = torch.zeros(len(mask), K, T + 1)  # draws token 0, never the end
        model.pushed.zero_()
        prompts = [x.repeat_interleave(len(mask), 0) for x in source(model, L)]
        fed, decoded = sorl.feed(model, *prompts, static, mask, u, seen)
        by_decoding = model.pushed.clone()
        logits = sorl.target_logits(model, *prompts, fed)
        rollout = sorl.act(logits, static, mask, u, decoded)
        rows, tokens = by_decoding if decoded else model.pushed  # full: the rest is for gradients
        chance = p ** heads * (1 - p) ** (T - heads)
        mean.update(fp=chance * int(rollout.fp), fp_grad=chance * rollout.fp_grad,
                    rows=chance * int(rows), tokens=chance * int(tokens))
    return mean


def p1_passes(quick):
    """What an input costs"""
    masked, many = counted("masked", 1), counted("masked", 16)
    full, four = counted("full", 1), counted("full", 4)
    yield equal("One FP per input is enough, whatever the number K of samples.",
                "masked: {} row pushed at K = 1, {} at K = 16, {} more for the gradient",
                [masked["rows"], many["rows"], many["fp_grad"]], [1, 1, 0])
    yield equal("A sample that sees its own tokens takes T p FPs, and one more for its gradient.",
                "full, T = 8, p = .4: {} FPs, gradient {}; K = 4: {} FPs, gradient {}",
                [full["fp"], full["fp_grad"], four["fp"], four["fp_grad"]], [3.2, 1, 12.8, 4])
    yield equal("Masked pushes the fewest tokens to sample, the gradient not counted.",
                "with a cache, K = 1: full {}, masked {}; K = 4: full {}, masked {}",
                [full["tokens"], masked["tokens"], four["tokens"], many["tokens"]],
                [10.46, 13, 23.06, 13], .005, FALSE)


def p2_one_pass(quick):
    """One pass gives all logits if nothing that is fed depends on a sampled token"""
    k, T, rows = 3, 6, 64
    model, u = tiny_gpt(k, T), sorl.uniforms((rows, 1, T), "tokens")
    static = (sorl.uniforms((rows, T), "static") * k).long()
    mask = sorl.sample_mask(sorl.uniforms((rows, T), "mask"), torch.full((rows,), T + 1), .5)
    exchanged = torch.where(mask, (static + 1) % k, static)  # other tokens under the masks

    def change(seen, text, u):
        """The largest change of a logit that this static text and these draws make."""
        fed = (sorl.feed(model, *source(model), y, mask, draws, seen)[0]
               for y, draws in ((static, torch.zeros_like(u)), (text, u)))
        before, after = (sorl.target_logits(model, *source(model), ids) for ids in fed)
        return min(.1, (before - after).abs().max().item())

    yield equal("In masked and static nothing depends on a sampled token, in full it does.",
                "largest change of the GPT's logits if other tokens are sampled: masked {}, "
                "static {}, full at least {}",
                [change(seen, static, u) for seen in ("masked", "static", "full")], [0, 0, .1], 0)
    yield equal("Masked hides the static tokens that are replaced, static shows them.",
                "the same if those are exchanged: masked {}, static at least {}",
                [change(seen, exchanged, u) for seen in ("masked", "static")], [0, .1], 0)


def p3_finest(quick):
    """What one pass cannot tell apart: states that differ in drawn tokens alone"""
    must, hides = set(), set()  # pairs of states
    for t in range(3):
        drawn, seen = defaultdict(set), defaultdict(set)
        for _, y, M, _, text in FLAT.worlds():
            state = SEES["full"](y, M, text, t)
            drawn[y, M].add(state)  # the same static text and coins: only actions differ
            seen[SEES["masked"](y, M, text, t)].add(state)
        for pairs, groups in ((must, drawn), (hides, seen)):
            pairs.update(*(combinations(sorted(group), 2) for group in groups.values()))
    yield equal("Masked is the finest one-pass observation made from the state: it hides no more.",
                "T = 3, pairs of states that one pass cannot tell apart: {}; masked tells apart {} "
                "of them, and confuses {} others",
                [len(must), len(must - hides), len(hides - must)], [22, 0, 0])


def p4_worth(quick):
    """A deterministic policy can recompute the tokens that [MASK] hides"""
    rng = np.random.default_rng(4)
    found = [random_process(rng) for _ in range(10 if quick else 40)]
    off = [best_in_class(q, "masked") - value(q, planner(q, "full")) for q in found]
    yield equal("The best deterministic masked policy earns what the best full one earns.",
                f"difference in {len(found)} processes, all policies tried: {{}} to {{}}",
                [min(off), max(off)], [0, 0])


def optima(tau):
    """For R = 1[Y_0 = Y_1] the highest E R + tau * entropy of full and of masked, and masked's m.
    Full's is the Gibbs policy's, exp(R / tau). Masked's tokens are independent, each is 1 with
    probability (1 + m)/2, and m = tanh(m / 2 tau), which is 0 for tau >= 1/2."""
    m = 1.
    for _ in range(2000):
        m = math.tanh(m / (2 * tau))
    entropy = -sum(q * math.log(q) for q in ((1 + m) / 2, (1 - m) / 2))  # of one token
    return tau * math.log(2 * math.exp(1 / tau) + 2), (1 + m * m) / 2 + 2 * tau * entropy, m


def p5_price(quick):
    """Two tokens that should be equal, p = 1: neighbours drawn in one pass"""
    full, masked, m = optima(.43)
    gibbs, agree = 1 / (1 + math.exp(-1 / .43)), (1 + m * m) / 2  # Pr(Y_0 = Y_1), which is E R
    yield equal("A policy that has to stay random loses nothing by masking.",
                "E R + .43 * entropy: full {} + .43 * {} = {}, masked {} + .43 * {} = {}; masked "
                "leans to one side, Pr(1) = {} for both",
                [gibbs, (full - gibbs) / .43, full, agree, (masked - agree) / .43, masked,
                 (1 + m) / 2], [.911, .993, 1.338, .687, .986, 1.110, .805], 6e-4, FALSE)


ASYMPTOTIC = """CLAIM 2: masked has the smallest asymptotic error, which remains if data never end.
A policy that is not shown the whole state has to guess it. eps = 2 (1 - Pr(state | seen)) says how
uncertain the guess is, and the bound on the loss is a sum of eps over positions (our form, sharper
than the paper's, which was recalled). It is true, and empty: once a token is hidden it exceeds the
largest reward (P8). It uses the worst eps, which grows as a policy becomes surer, though it guesses
better (P7). It is for a planner that credits the last action only, and stops where policy gradient
climbs (P9). The real limit is the best policy of an observation; none is best everywhere (P6)."""


def p6_ceilings(quick):
    """What the best policy of each observation earns"""
    yield equal("Masked is the best one-pass observation.",
                "D(000) = D(111), R = 1[Y_1 = Y_2]: masked {}, static+coins {}, static {}, "
                "blind {}", [best_in_class(TELLS, phi) for phi in ONE_PASS],
                [.9375, 1, 1, .75], verdict=FALSE)
    yield equal("Masked is better than static if the coins matter.",
                "static 00, R = 1[Y_0 != Y_1]: masked {}, static+coins {}, static {}, blind {}",
                [best_in_class(COINS, phi) for phi in ONE_PASS], [.51, .51, .42, .42])
    yield equal("The GPT climbs to just that.",
                "first world: masked {}, static {}; second world: masked {}, static {}",
                [expected(train_gpt(task, seen), task, seen).item()
                 for task, seen in product((TELLS, COINS), ("masked", "static"))],
                [.9375, 1, .51, .42], .002)


def p7_eps(quick):
    """The surer a policy, the better it guesses what it cannot see"""
    uniform, surer = (np.array(epsilon(FLAT, "masked", mu)) for mu in ((.5, .5), (.9, .1)))
    yield equal("A surer policy has a smaller mean eps, but a larger worst one, which bounds use.",
                "masked, p = .5, eps at t = 0 1 2: actions uniform, mean {} {} {}, worst {} {} {}; "
                "drawn from (.9, .1), mean {} {} {}, worst {} {} {}",
                [uniform[::-1], surer[::-1]],
                [0, .5, .875, 0, 1, 1.5, 0, .18, .3438, 0, 1.8, 1.98], 5e-5)


def p8_bound(quick):
    """The bound on the asymptotic error is larger than all that can be lost"""
    mu, weight = (.01, .99), np.arange(3) + 1
    # Of two states that look alike the rarer has a probability of at most 1/2, so eps_u >= 1 if
    # anything is hidden at u >= 1. Then the bound is at least 2R: it is true by its size.
    worst, mean = (weight[:2] @ eps for eps in epsilon(COPY, "masked", mu))
    lost = value(COPY, planner(COPY, "full")) - value(COPY, planner(COPY, "masked", mu))
    yield equal("Masked loses at most R sum (u+1) eps_u, the largest reward R = 1.",
                "R = 1[Y_0 = Y_1], actions (.01, .99), ties to 0: lost {}, bound {}; T = 3: {}",
                [lost, worst, weight @ epsilon(FLAT, "masked")[0]], [.81, 3.96, 6.5], verdict=EMPTY)
    yield equal("The same is true with the mean eps in place of the worst.",
                "lost {}, bound with the mean {}", [lost, mean], [.81, .07128], verdict=FALSE)


def credit(process, phi, mu=(.3, .7)) -> list:
    """For each position how much Q of the phi-model depends on the action, at most."""
    Q, _ = plan(phi_model(process, phi, mu), process.R)
    return [max(abs(q[o, 0] - q[o, 1]) for o, _ in q) for q in Q]


def p9_credit(quick):
    """The planner that the bound is about is not what policy gradient does"""
    n, rng = 5 if quick else 20, np.random.default_rng(9)
    found = [random_process(rng) for _ in range(n)]
    early = [sum(max(credit(q, phi)[:-1]) > 1e-9 for q in found) for phi in (*ONE_PASS, "full")]
    yield equal("In one pass only the last action gets credit, if the behaviour sees no more.",
                "of {} processes, Q differs before the last action: masked {}, static+coins {}, "
                "static {}, blind {}, full {}", [len(found), *early], [n, 0, 0, 0, 0, n])
    yield equal("So the planner can stop short of the .51 to which the GPT climbs in P6.",
                "static 00, R = 1[Y_0 != Y_1], p = .3: masked's planner, ties to 0, earns {}",
                [value(COINS, planner(COINS, "masked"))], [.21])


OVERFITTING = """CLAIM 3: masked has the smallest overfitting error, which comes from data that end.
A model of the world estimated from n samples is wrong in places, and a plan made in it makes use of
its errors. The bound on that loss grows with the number of observations, so the one that shows less
has the smaller bound, as its own source says (Francois-Lavet et al. 2019: a smaller representation
overfits less). It holds inside the model. In the true world half of all draws break it (P11)."""


def estimated(P, n: int, rng) -> list:
    """The phi-model as n draws of each (observation, action)'s next observation show it."""
    return [{key: Counter(dict(zip(to, rng.multinomial(n, np.array([*to.values()]) / to.total()))))
             for key, to in layer.items()} for layer in P]


def overfitting(n: int, seed: int) -> float:
    """(train - test) - (train* - test*), of the masked policy that is best for n static texts and
    of the one that is best for all (*), which is 0 on average; both are found as full's (P4).
    train: value on these n texts; test: in the world they are from. Y_0 is chosen before y_1 is
    seen, so the sample's most frequent y_1 is a tempting bet."""
    test = Process(2, table(2, lambda a, b: 1 / 16, 4), table(2, lambda a, b: a == b, 4), .5, 4)
    counts = np.random.default_rng((seed, n)).multinomial(n, list(test.D.values()))
    train = replace(test, D={y: c / n for y, c in zip(test.D, counts) if c})
    found, best = (planner(process, "full") for process in (train, test))
    return value(train, found) - value(test, found) - value(train, best) + value(test, best)


def p11_overfitting(quick):
    """The bound on the overfitting error: 2T sqrt(ln(2 |Phi| k / delta) / 2n)"""
    seen = [{(t, see(y, M, text, t)) for _, y, M, _, text in FLAT.worlds() for t in range(3)}
            for see in (SEES[phi] for phi in ("blind", "static", "masked", "full"))]
    yield equal("Masked has the smallest bound (fewer observations, smaller bound).",
                "observations at T = 3: blind {}, static {}, masked {}, full {}",
                [*map(len, seen)], [3, 7, 26, 42], verdict=FALSE)

    def bound(n, observations, k):  # for delta = .05 and T = 2
        return 2 * 2 * math.sqrt(math.log(2 * observations * k / .05) / (2 * n))

    P, rng = phi_model(COPY, "masked"), np.random.default_rng(11)
    lost = np.array([[.95 - value(COPY, follow(plan(estimated(P, n, rng), COPY.R)[1], "masked"))
                      for _ in range(200 if quick else 600)] for n in (10 ** 3, 10 ** 5)])
    # Y_0 gets no credit (P9): noise decides its tie, rightly in half of the plans.
    yield equal("In the true world, outside the phi-model, the loss does not fall with the bound.",
                "R = 1[Y_0 = Y_1], n = 1000, 100000: bound {}, {}; the loss is {} or {}, which is "
                "in {}, {} of the draws",
                [bound(1000, 8, 2), bound(100000, 8, 2), lost.min(), lost.max(),
                 *(lost > .4).mean(1)],
                [.2274, .02274, 0, .81, .5, .5], [5e-5] * 4 + [.1] * 2, BREAKS)
    ns = (2, 32) if quick else (2, 8, 32, 128)
    gaps = [np.mean([overfitting(n, seed) for seed in range(40)]) for n in ns]
    yield falls("Value in training less value in test falls with the number n of static texts.",
                f"k = 4, n = {ns}: best masked policy, 40 samples: " + "{} " * len(ns), gaps)
    # It is for a regret, two such gaps at most, and for n draws of each (observation, action).
    yield equal("The bound, not proved for this gap, tells how large it is.",
                "it is {} at n = 2, and above 5 gaps for {} of these n",
                [bound(2, 12, 4), sum(5 * gap < bound(n, 12, 4) for n, gap in zip(ns, gaps))],
                [5.499, len(ns)], 5e-4, FALSE)


USE = """USE: a policy is trained in one process and used in another.
A masked policy is trained on static text and [MASK]; in use it reads its own. It may meet a
beginning that it was never shown, or bet on a next token that was the static text's in training. If
the static texts show all beginnings, a bound on the loss holds and is attained. Texts that the
policy wrote itself mend both faults in the worlds of P13, but not in that of P17."""


def written_alone(process) -> tuple:
    """What the best masked policy writes if its earlier tokens are shown to it as static text."""
    _, greedy = plan(phi_model(process, "full"), process.R)
    text = ()
    for t in range(process.T):
        text += (greedy[t].get(((0,) * t + (1,), text), 0),)
    return text


def loss_and_bound(process):
    """R* - R of what is written alone, and R* (1 - p^(T-1)), which needs a D of independent tokens:
    then every prefix that is written occurs in D, and the text so far and the last coin decide what
    a state is worth: after the best action, the mean over the next coin. Coin 1, which may choose,
    is worth no less than coin 0, so this never falls along the text that is written. At its start,
    M_0 = 1, it is at least R* p^(T-1), since all other coins may be 1."""
    best = max(process.R.values())
    return best - process.R[written_alone(process)], best * (1 - process.p ** (process.T - 1))


KEPT = ("stored", "uniform", "refreshed")  # texts: from D; all alike; the policy's, every 4 updates
RATES = (1e-4, .1, .25, .5, .75, 1.)


@lru_cache(maxsize=None)
def lost_alone(task, kept: str, p: float) -> float:
    """1 - E R of masked GPTs that write alone after training at rate p: mean of 3 seeds."""
    D = dict.fromkeys(task.R, 1 / 4) if kept == "uniform" else task.D
    refresh = 4 if kept == "refreshed" else 0
    models = [train_gpt(replace(task, D=D, p=p), "masked", refresh, seed) for seed in range(3)]
    return 1 - np.mean([expected(model, task, "online").item() for model in models])


def p13_use(quick):
    """A policy of stored texts, used: it reads what it wrote in place of static text and [MASK]"""
    rng, excess = np.random.default_rng(13), []
    for T in (2, 3, 4):
        found = [random_process(rng, T, product_D=True) for _ in range(5 if quick else 20)]
        found.append(threshold(.5 ** (1 / (T - 1)), T))
        excess.append(max(loss - bound for loss, bound in map(loss_and_bound, found)))
    yield equal("If the tokens of D are independent, it loses at most R* (1 - p^(T-1)) alone.",
                "largest loss - bound, T = 2 3 4: {} {} {}: it is attained", excess, [0, 0, 0])
    yield equal("If D shows 00 only, it reads a 1 that it was never shown, and loses more.",
                "R(00) = .3, R(11) = .6, p = .8: loss {}, bound {}",
                [*loss_and_bound(threshold(.8, 2))], [.6, .12], verdict=BREAKS)
    yield equal("The GPT fails so, too; texts with all beginnings or of its own mend it.",
                "static 00, R = 1[Y_0 != Y_1], p = .2, lost alone: texts stored {}, uniform {}, "
                "refreshed {}", [lost_alone(COINS, kept, .2) for kept in KEPT], [1, 0, 0], .01)
    yield equal("If texts are not its own, it misjudges a bet on its next token.",
                "R(00, 01, 10, 11) = .5 .7 0 1, p = .2, lost alone: best policy {}; GPT, texts "
                "stored {}, uniform {}, refreshed {}; p = .6, stored {}",
                [loss_and_bound(BET)[0], *(lost_alone(BET, kept, .2) for kept in KEPT),
                 lost_alone(BET, "stored", .6)], [.3, .3, .3, 0, 0], .01)


GRADIENT = """GRADIENT: what the estimator estimates, and where it points.
sorl.py estimates the gradient of the semi-offline process without bias (P14, for one logit). But
this process is not online's: what a setting hides turns its gradient away, and at small p all
settings point alike, not as online (P15: random, nearly uniform GPTs; surer ones agree less)."""


def one_logit(q, p, K, **choices):
    """Mean and variance of sorl.py's estimate of d E R / d logit, exact, for T = 1, k = 2, R = a.
    The logit is that of token 1, which has probability q; all K-tuples of actions occur once."""
    actions = torch.tensor(texts(K))                           # (rows,K)
    rows, chance = len(actions), torch.tensor([1 - q, q], dtype=torch.float64)[actions]
    u = torch.where(actions == 1, 1 - chance / 2, chance / 2)  # in the middle of its share
    logits = torch.zeros(rows, 1, 6, dtype=torch.float64)
    logits[:, 0, 1] = math.log(q / (1 - q))
    logits.requires_grad_()
    static, mask = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=torch.bool)
    rollout = sorl.act(logits, static, mask, u[..., None])
    A = sorl.advantage((rollout.tokens[..., 0] == 1).double(), **choices)
    (-rows * sorl.policy_loss(rollout, A)).backward()          # the loss is a mean over rows
    estimate, weight = logits.grad[:, 0, 1], p * chance.prod(1)  # a coin of 0 estimates 0
    mean = float(weight @ estimate)
    return mean, float(weight @ estimate ** 2) - mean ** 2


def p14_estimator(quick):
    """What sorl.py's advantage and loss estimate: the gradient of the semi-offline process"""
    means = [one_logit(.2, .5, K, baseline=b)[0] for b in ("loo", "mean") for K in (2, 3, 8)]
    yield equal("Leave-one-out is unbiased; the mean of all K gives (1 - 1/K) of it.",
                "one logit, gradient .08, K = 2 3 8: leave-one-out {} {} {}, mean {} {} {}", means,
                .5 * .16 * np.array([1, 1, 1, 1 / 2, 2 / 3, 7 / 8]), 1e-12)
    yield equal("More samples help, down to a floor: the variance is p(1-p)/16 + p/(8K(K-1)).",
                "q = .5, K = 2 4 8: p = 1: {} {} {}, p = .5: {} {} {}",
                [one_logit(.5, p, K, baseline="loo")[1] for p in (1, .5) for K in (2, 4, 8)],
                [1 / 16, 1 / 96, 1 / 448, 3 / 64, 1 / 48, 15 / 896], 1e-12)
    yield equal("Divided by its row's deviation (GRPO) it is right up to a constant factor.",
                "estimate / gradient, K = 8: {} at q = .5, {} at q = .1",
                [one_logit(q, 1, 8, scale="source")[0] / (q - q * q) for q in (.5, .1)],
                [1.856, 2.328], 5e-4, FALSE)


@lru_cache(maxsize=None)
def directions(quick: bool) -> dict:
    """Cosines with online's gradient, all exact, of random GPTs in random processes:
    (setting, static texts: stored, the policy's own, uniform) -> p -> (GPTs,)."""
    rng, found = np.random.default_rng(15), defaultdict(lambda: defaultdict(list))
    for i in range(30 if quick else 80):
        process, model = random_process(rng), tiny_gpt(2, 3, seed=i).double()
        D = dict(stored=process.D, own=own_texts(model, 3), uniform=FLAT.D)
        online = gradient(expected(model, process, "online"), model)
        for (setting, kept), p in product((("full", "stored"), ("static", "stored"),
                                           ("masked", "stored"), ("masked", "own"),
                                           ("tail", "own"), ("masked", "uniform")), RATES):
            if kept != "uniform" or p == .1:
                g = gradient(expected(model, replace(process, D=D[kept], p=p), setting), model)
                found[setting, kept][p].append(torch.cosine_similarity(g, online, 0).item())
    return {key: {p: np.array(x) for p, x in by_p.items()} for key, by_p in found.items()}


def p15_direction(quick):
    """Where the gradients of the settings point, compared with online's"""
    found = directions(quick)
    full, static, masked, own, _, uniform = found.values()
    yield falls("What a setting hides turns its gradient away from online's.",
                "mean cosine at p = .5: full {}, static {}, masked {}; at p = 1: masked {}",
                [full[.5].mean(), static[.5].mean(), masked[.5].mean(), masked[1.].mean()])
    yield equal("At small p full, static and masked point the same way, but not online's way.",
                "p = .0001, largest difference of cosines from full's: static {}, masked {}; mean "
                "cosine {}", [*(abs(x[1e-4] - full[1e-4]).max() for x in (static, masked)),
                              full[1e-4].mean()],
                [0, 0, .63], [1e-3, 1e-3, .25 if quick else .05])
    yield falls("At small p texts of the policy itself turn masked back to online.",
                "mean cosine at p = .1: own texts {}, uniform texts {}, stored texts {}",
                [own[.1].mean(), uniform[.1].mean(), masked[.1].mean()], .05)


TAIL = """TAIL: a static text is kept up to a cut, and the policy writes the rest.
Then no drawn token is followed by an old one. On texts of its own the expected gradient is online's
with each position weighted by how often the cut leaves it to the policy (P16); for small p that is
the end alone, so tail is for p from 1/2 on. Masked keeps the old suffix: if a better text differs
in two tokens, it punishes the first, because the old suffix does not complete it (P17)."""


def p16_tail(quick):
    """Tail on texts of its own: online's gradient, each position weighted by Pr(cut <= t)"""
    T = k = 3
    model, every = tiny_gpt(k, T, std=.3).double(), torch.tensor(texts(T, k))
    R = dict(zip(texts(T, k), np.random.default_rng(16).random(k ** T)))
    logp = log_probs(sorl.target_logits(model, *source(model), every), end=False)
    logp = logp.gather(-1, every[..., None])[..., 0]  # (27,T) of each text's tokens
    weight = logp.sum(1).exp().detach() * torch.tensor(list(R.values()))
    parts = [gradient(weight @ logp[:, t], model) for t in range(T)]

    def off(p, D):
        found = gradient(expected(model, Process(T, D, R, p, k), "tail"), model)
        weighted = sum(tail_share(t, T, p) * part for t, part in enumerate(parts))
        return float((found - weighted).norm() / weighted.norm())

    yield equal("Tail's gradient is the sum of Pr(cut <= t) g_t, g_t online's at position t.",
                "GPT, k = T = 3, relative difference on its own texts, p = .2 .5 1: {} {} {}; on "
                "uniform texts, p = .5, at least {}",
                [*(off(p, own_texts(model, T)) for p in (.2, .5, 1.)),
                 min(.01, off(.5, dict.fromkeys(R, k ** -T)))], [0, 0, 0, .01], 1e-12)
    found = directions(quick)
    yield equal("So tail needs p from 1/2 on to point where online does, and masked a small p.",
                "mean cosine on own texts, p = .1 .5 1: tail {} {} {}; masked {} {} {}",
                [found[x, "own"][p].mean() for x in ("tail", "masked") for p in (.1, .5, 1.)],
                [.6, .94, 1, .97, .86, .59], .08 if quick else .03)


class Bigram(torch.nn.Module):
    """A model that reads the last token alone: a row of logits for each id. It opens with 1 with
    probability q, completes 1 by 1 and 0 by 0 with probability s; [MASK] tells it nothing."""

    def __init__(self, q: float, s: float):
        super().__init__()
        self.config, table = GPTConfig(vocab_size=6), torch.zeros(6, 6, dtype=torch.float64)
        table[[SEP, MASK, 0, 1], 1] = torch.tensor([q, q, 1 - s, s], dtype=table.dtype).logit()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids, pad=None, cache=None, start=0):
        return self.table[ids[:, start:]]


@lru_cache(maxsize=None)
def branch_runs(quick: bool) -> dict:
    """What policies write alone after training in BRANCH: setting, updates between refreshes ->
    own_texts of a table and of GPTs of some seeds, which begin by imitating the static texts."""
    bases, D = [Bigram(.2, .99)], torch.tensor([.8, 0, 0, .2], dtype=torch.float64)
    for seed in range(1 if quick else 3):
        base = tiny_gpt(2, 2, seed, std=.02)
        bases.append(climb(base, lambda _: sum(
            D @ law(base, 2, seen)[0, -1].log() for seen in ("full", "masked")), rate=.01))
    runs = {("start", 0): [own_texts(base, 2) for base in bases]}
    for how in (("online", 0), ("tail", 4), ("masked", 0), ("masked", 4)):
        runs[how] = [own_texts(train_gpt(BRANCH, *how, model=copy.deepcopy(base), rate=rate), 2)
                     for base, rate in zip(bases, (.1, .002, .002, .002))]
    return runs


def p17_branching(quick):
    """R(11) = 1, R(00) = 1/2, else 0; the policy writes mostly 00: does it learn to open with 1?"""
    model = Bigram(.2, .99)
    own = replace(BRANCH, D=own_texts(model, 2))
    g = torch.stack([gradient(expected(model, own, setting), model)
                     for setting in ("online", "tail", "masked")])
    yield equal("On its own texts masked pushes the opening token where online does.",
                "table, Pr(open) = .2, p = .2, gradient of its logit: online {}, tail {}, masked "
                "{}; cosine of the whole gradient with online's: tail {}, masked {}",
                torch.cat([g.view(3, 6, 6)[:, SEP, 1], torch.cosine_similarity(g[1:], g[:1])]),
                [.0792, .00495, -.00617, .7814, -.9653], 5e-5, FALSE)
    ends = [[sum(R * own[text] for text, R in BRANCH.R.items()) for own in found]
            for found in branch_runs(quick).values()]
    yield equal("So tail learns to open with 1; masked unlearns it, and refreshing is no help.",
                "E R alone, the table: start {}, online {}, tail {}, masked {}, refreshed {}",
                [end[0] for end in ends], [.594, 1, 1, .5, .5], 5e-3)
    yield equal("So does the GPT, from one that imitates the static texts.",
                "E R alone, least and most of the seeds: start {} {}, online {} {}, tail {} {}, "
                "masked {} {}, refreshed {} {}", [(min(end[1:]), max(end[1:])) for end in ends],
                [.6, .6, 1, 1, 1, 1, .5, .5, .5, .5], .01)


# --------------------------------------------------------------------------------------------------
# Figures: each returns one; a setting looks as it does in all figures of the project


def plot_deployed(quick):
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.8))
    rates = (.2, .6) if quick else (.2, .4, .6, .8)
    for kept, look, label in (("stored", "masked", "stored: one in five has a second token 1"),
                              ("uniform", "base", "uniform: all four texts equally often"),
                              ("refreshed", "refresh", "refreshed: its own, every 4 updates")):
        left.plot(rates, [lost_alone(BET, kept, p) for p in rates], **style(look), label=label)
    left.set_title("A bet: first token 0 earns .5 or .7, first token 1 earns 0 or 1,\n"
                   "by the second. Static texts of masked in training:", fontsize=9)
    tidy(left, "mask rate $p_m$ in training", "reward lost when it writes alone")
    for (setting, kept), by_p in directions(quick).items():
        look = "refresh" if (setting, kept) == ("masked", "own") else setting
        if kept != "uniform":
            right.plot(RATES[1:], [by_p[p].mean() for p in RATES[1:]], **style(look),
                       label=f"{setting}, {kept} texts")
    right.set_title("Gradients of random GPTs, by their static texts:\n"
                    "stored ones, at random, or the policy's own", fontsize=9)
    tidy(right, "share $p_m$ that the model writes", "mean cosine with online's gradient")
    for axis in (left, right):
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(.5, -.16))
    return fig


def plot_branch(quick):
    """Four texts, their rewards, how often policies write them; what a setting can do to 0 0."""
    fig, axis = pyplot().subplots(figsize=(6.5, 4))
    middle, black = dict(ha="center", va="center"), dict(color="black", shrinkA=65, shrinkB=65)
    for (a, b), R in BRANCH.R.items():
        start, _, tail, _, masked = (100 * np.mean([run[a, b] for run in runs[1:]])
                                     for runs in branch_runs(quick).values())
        axis.text(a, b, f"{a} {b}, earns {R:g}\nat the start {start:.0f}%\nafter masked "
                  f"{masked:.0f}%\nafter tail {tail:.0f}%", bbox=dict(fc="white", pad=8), **middle)
    for to, label in (((1, 0), "masked: the first alone"), ((0, 1), "masked: the second alone"),
                      ((1, 1), "tail: both tokens")):
        axis.annotate("", to, (0, 0), arrowprops=dict(arrowstyle="-|>", **black))
        axis.text(to[0] / 2, to[1] / 2, label, bbox=dict(fc="white", lw=0), **middle)
    axis.set(xlim=(-.2, 1.2), ylim=(-.2, 1.2), title="How often a GPT writes each of four texts")
    axis.axis("off")
    return fig


def print_plan(B=32, K=16, T=32, refresh=8, stored=3, rows=32) -> None:
    """What a minute and 10,000 FPs buy in each setting, by times measured on this machine: B
    sources per update, K samples, texts of T tokens, prompts of 16, a GPT of 0.9M weights."""
    model, u = GPT(GPTConfig(512, 16 + T)), sorl.uniforms((rows, 4, T), "plan")
    (src, pad), text = source(model, 16), torch.zeros(rows, T, dtype=torch.long)
    train, sample = (min(timeit.repeat(action, number=1, repeat=3)) for action in (
        lambda: sorl.mle_loss(sorl.target_logits(model, src, pad, text), text, pad + T).backward(),
        lambda: generate(model, src.expand(rows, -1), pad.expand(rows), T, u, end=False)))
    drawn = sum(tail_share(t, T, .5) for t in range(T))  # tokens of a text that tail draws
    print(f"{B} sources per update, K = {K}, texts of {T} tokens; full: p_m = .2; tail: p_m = .5;\n"
          f"offline: {stored} stored texts per source; refresh: new texts every {refresh} updates"
          "\n\nsetting        FPs  rows with gradient   seconds  updates a minute, 10,000 FPs")
    for name, fp, with_gradient, tokens in (
            ("offline", B * stored, B * stored, 0),
            ("masked", B, B, 0),  # and static
            ("refresh", B + B * T / refresh, B, B * T / refresh),
            ("tail", B * K * drawn, B * K, B * K * drawn),
            ("full", B * K * T * .2, B * K, B * K * T),
            ("online", B * K * T, B * K, B * K * T)):
        with_gradient += B  # every update also imitates one target text per source
        cost = with_gradient * train / rows + tokens * sample / u.numel()
        print(f"{name:<8}{fp:>10,.0f}{with_gradient:>20,.0f}{cost:>10.3f}{60 / cost:>20,.1f}"
              f"{1e4 / fp:>16,.1f}")


PARTS = {  # part -> what it is about, and its propositions
    "cost": (COST, dict(P1=p1_passes, P2=p2_one_pass, P3=p3_finest, P4=p4_worth, P5=p5_price)),
    "asymptotic": (ASYMPTOTIC, dict(P6=p6_ceilings, P7=p7_eps, P8=p8_bound, P9=p9_credit)),
    "overfitting": (OVERFITTING, dict(P11=p11_overfitting)),
    "use": (USE, dict(P13=p13_use)),
    "gradient": (GRADIENT, dict(P14=p14_estimator, P15=p15_direction)),
    "tail": (TAIL, dict(P16=p16_tail, P17=p17_branching)),
}


@run_command("theory.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="theory.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    names = [*PARTS, *(name for _, rows in PARTS.values() for name in rows)]
    parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer instances, shorter runs")
    parser.add_argument("--plan", action="store_true", help="what a budget buys in each setting")
    args, start, rows = parser.parse_args(argv), time.time(), []
    for part in set(args.parts) - set(names):
        parser.error(f"unknown part {part!r}; expected {' '.join(names)}")
    if args.plan:
        return print_plan()
    torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
    for part, (paragraph, propositions) in PARTS.items():
        chosen = [name for name in propositions if not args.parts or {part, name} & {*args.parts}]
        if chosen:
            print(f"\n{paragraph}")
        for name in chosen:
            print(f"\n{name}  {propositions[name].__doc__}", flush=True)
            for row in propositions[name](args.quick):
                print(row, flush=True)
                rows.append(row)
    for plot in (plot_deployed, plot_branch) if not args.parts else ():
        file = Path("out/theory", plot.__name__.removeprefix("plot_") + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_figure(plot(args.quick), file)
        print(f"\nfigure {file}", end="")
    wrong = sum(bool(row.stated) for row in rows)
    print(f"\n{len(rows)} rows, {wrong} otherwise than stated; {time.time() - start:.0f} s")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
