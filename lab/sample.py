"""The commands that need no training: --mode eval, sample and candidates, on a checkpoint."""
import os
from dataclasses import replace

import torch

import data
import sorl
from data import SPLITS, InputError, Record
from data.rewards import load_reward
from lab.batches import best_first, widen
from lab.cli import flags_of, value_of
from lab.evaluate import slices, test_policy, write_texts
from lab.files import write_json
from lab.run import Progress, Run
from lab.settings import Config
from lab.task import Policy, count_cut_texts, load, load_policy, pick_device


def run_mode(mode: str, given: dict, reinforce) -> None:
    """--mode eval, sample or candidates on --init's policy; what is not given is as in its run.

    reinforce: train.reinforce, which --mode sample shows at work."""
    if "init" not in given:
        raise InputError(f"--mode {mode}: expected --init, a checkpoint such as "
                         f"out/refresh/best.pt")
    if given.get("p_m") == 0:
        raise InputError("--p_m 0.0: expected above 0, or nothing is drawn")
    state = load(given["init"])
    cfg = config_of(state, given)
    policy = load_policy(cfg.init, pick_device(cfg.device), state)
    print(f"{cfg.init}: data {cfg.data}, reward {cfg.reward}")
    dataset, reward = data.load_dataset(cfg.data), load_reward(cfg.reward)
    count_cut_texts(dataset, policy)
    cfg = replace(cfg, out=given.get("out", ""))
    if mode == "eval":
        evaluate(cfg, policy, dataset, reward)
    elif mode == "candidates":
        write_candidates(cfg, policy, dataset, reward)
    else:
        show_samples(cfg, policy, dataset, reward, reinforce)


def config_of(state: dict, given: dict) -> Config:
    """The flags of a checkpoint's run, and over them those that were given. Raises InputError."""
    where = f"{given['init']}: its config: "
    try:
        cfg = Config(**state["config"])
    except TypeError as e:
        raise InputError(f"{where}other flags than this edition's ({e})") from None
    values = {name: value_of(f, str(getattr(cfg, name)), where)
              for name, f in flags_of(Config).items()
              if name not in given and type(f.default) is not tuple}
    return replace(cfg, **values | {"device": Config.device} | given)


def new_folder(path: str) -> None:
    """Make a folder. Raises InputError when there is something in it already."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"--out {path}: holds files already; expected a new folder")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {path}: cannot be made ({e.strerror})") from None


def evaluate(cfg: Config, policy: Policy, dataset, reward) -> None:
    """Quality of a checkpoint's greedy texts on the test split."""
    row, _ = test_policy(policy, None, dataset["test"], reward, cfg.seed)
    row.pop("kl_to_base")
    for name, value in row.items():
        if value is not None:
            print(f"{name:<15}{value:10.4f}")


def write_candidates(cfg: Config, policy: Policy, dataset, reward) -> None:
    """Write the data again, with K texts of the policy per source, best first, as static texts."""
    if not cfg.out:
        raise InputError("--mode candidates: expected --out, the folder of the new data")
    new_folder(cfg.out)
    made, fp = {split: [] for split in SPLITS}, 0
    for split, records in made.items():
        total, progress = len(dataset[split]), Progress("sample")
        for at in slices(total, max(1, 512 // cfg.K)):
            part = dataset[split][at]
            sources = [r.source for r in part]
            u = sorl.uniforms((len(part), cfg.K, policy.T), cfg.seed, split, at.start,
                              "candidates")
            tokens = write_texts(policy, sources, u, temperature=cfg.temperature,
                                 top_k=cfg.top_k)
            fp += int(sorl.text_mask(tokens, policy.tok.vocab_size).sum())
            texts = [[text for text in policy.texts(rows) if text.strip()] or r.static
                     for r, rows in zip(part, tokens)]
            ranked = best_first(part, texts, reward)
            records += [replace(r, static=of_r) for r, of_r in zip(part, ranked)]
            progress.show(len(records), total, f"FP {fp:>8,}", len(records) == total)
    for split, records in made.items():  # at the end, so that a stopped command leaves no file
        data.save_records(records, f"{cfg.out}/{split}.jsonl")
    write_json(data.flags_of(cfg.data), f"{cfg.out}/flags.json")
    print(f"wrote {cfg.out}: {cfg.K} candidates per source, {fp:,} FP")


@torch.no_grad()
def show_samples(cfg: Config, policy: Policy, dataset, reward, reinforce) -> None:
    """The method on one source: static text, what is fed, samples with their rewards, greedy text.

    A source of the data has its static text and references; another starts from the policy's
    greedy text, and there is nothing to compare the samples with."""
    tok, model = policy.tok, policy.model
    source = os.fsencode(cfg.source).decode("utf-8", "replace").strip()  # in an ASCII locale, too
    source = source or dataset["test"][0].source
    if len(tok.encode(source)) + policy.T > model.config.block_size:
        raise InputError(f"--source: {len(tok.encode(source))} tokens; expected at most "
                         f"{model.config.block_size - policy.T}")
    greedy = policy.texts(write_texts(policy, [source]))[0]
    known = [r for split in SPLITS for r in dataset[split] if r.source == source]
    record = known[0] if known else Record(source, [greedy or source])
    text = record.static[0]
    batch = data.make_batch([record], [text], [[text]], tok, policy.T).to(policy.device)
    if cfg.observation == "full":  # it may write up to T tokens
        batch = widen(batch, policy)
    # A run that draws nothing (mle, offline) is shown as masked.
    cfg = replace(cfg, p_m=cfg.p_m or Config.p_m, reuse=1, credit=0.0, kl_weight=0.0)
    run = Run(cfg, policy, reward, folder="", optimizer=None)
    log = reinforce(run, batch, number=0, slot=0)[1]

    words = []
    for i in log["fed"][0].tolist():
        if i in (tok.eos, tok.pad):
            break
        words.append("[MASK]" if i == tok.mask else tok.decode([i]))
    print(f"source   {source}\nstatic   {text}\nfed      {' '.join(words)}")
    texts, R, A = policy.texts(log["rollout"].tokens), log["rewards"][0], log["A"][0]
    for text in list(dict.fromkeys(texts))[:8]:
        k = texts.index(text)
        figures = f"   R {R[k]:.3f}  A {A[k]:+.2f}" if known else ""
        print(f"sample   {text}{figures}   ({texts.count(text)} of {cfg.K})")
    print(f"greedy   {greedy}")
