"""OUT/page.html: watch the method at work, in a browser. One file, no network, no library.

    python -m lab.page OUT [--weights NAME NAME]

OUT is the folder of a finished comparison; of several seeds the first is shown. lab/page.html is
filled with twenty validation sources, the curve and greedy texts of every setting, and the weights
of the base and of two settings, which the browser runs."""
import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import data
from data import InputError
from data.rewards import blind_to
from data.tokenizer import PATTERN
from lab.cli import Parser, run_command
from lab.files import read_json, read_lines, write_text
from lab.plots import style
from lab.report import read_rows
from lab.settings import make_config
from lab.task import Policy, load_policy

TABS = ("offline", "masked", "static", "tail", "full", "online")  # the settings that it shows
FLAGS = ("p_m", "observation", "mask", "stored", "baseline", "adv_scale")  # what it needs of each
SOURCES, EVALUATIONS = 20, 24         # the most that it shows
LARGEST, SIZE = 10 ** 6, 8 * 10 ** 6  # parameters that a browser runs well; bytes of the page
DASHES = {"-": [], "--": [4, 2], "-.": [5, 2, 1, 2], ":": [1, 2]}  # in widths of a line


def read_course(folder: str, name: str) -> dict:
    """A run's evaluations (step, FPs, reward), the greedy texts of each, its look in figures."""
    lines = read_lines(f"{folder}/metrics.jsonl", "step", "fp", "val_reward")
    points = [(row["step"], row["fp"], round(row["val_reward"], 4))
              for row in lines if row["val_reward"] is not None]
    points = points[::-1][::1 + len(points) // EVALUATIONS][::-1]  # the last one stays
    texts = {row["step"]: row["texts"][:SOURCES]
             for row in read_lines(f"{folder}/texts.jsonl", "step")}
    color, dash = style(name)["color"], style(name)["linestyle"]
    return {"points": points, "texts": [texts.get(step, []) for step, *_ in points],
            "color": color, "dash": DASHES[dash] if isinstance(dash, str) else dash[1]}


def choose_settings(rows: list[dict]) -> list[str]:
    """Of the settings within .02 of the best validation reward, the dearest and the cheapest."""
    paid = [row for row in rows if row["fp"] and row["val_reward"] is not None]
    level = max((row["val_reward"] for row in paid), default=0) - 0.02
    reached = [row for row in paid if row["val_reward"] >= level]
    ends = [of(reached, key=lambda row: row["fp"])["name"] for of in (max, min) if reached]
    return list(dict.fromkeys(ends))


def why_not_live(policy: Policy, records: list[data.Record]) -> str | None:
    """Why the page does not run the models; None if it does."""
    size = sum(p.numel() for p in policy.model.parameters())
    if size > LARGEST:
        return f"a page runs {LARGEST:,} parameters at most, not {size:,}"
    return blind_to("rouge", [r.references for r in records])


def encode_models(policies: dict[str, Policy]) -> dict:
    """Policies of one shape and one tokenizer; their weights are 16-bit floats in base64."""
    model, tok, T = policies["base"].model, policies["base"].tok, policies["base"].T
    flat = {name: torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach()
            for name, policy in policies.items()}
    return {"shape": asdict(model.config), "T": T, "pattern": PATTERN,
            "parameters": [(name, p.numel()) for name, p in model.named_parameters()],
            "tokens": [base64.b64encode(token).decode() for token in tok.bytes[:tok.pad]],
            "weights": {k: base64.b64encode(w.half().numpy()).decode() for k, w in flat.items()}}


def make_page(out: str, chosen: list[str]) -> str:
    """The page of a comparison. Raises InputError if the folder holds none."""
    config, rows = read_json(f"{out}/config.json") or {}, read_rows(f"{out}/results.json")
    seed = (config.get("seeds") or [config.get("seed")])[0]
    home = f"{out}/seed{seed}" if config.get("seeds") else out
    rows = {row["name"]: row for row in rows if row["seed"] == seed and row["name"] != "base"}
    if not rows or not set(chosen) <= set(rows):
        raise InputError(f"{out}: expected a finished comparison of {chosen or 'settings'}")
    records = data.load_dataset(config["data"])["val"][:SOURCES]
    policies = {name: load_policy(f"{home}/{name}/best.pt", torch.device("cpu"))
                for name in ("base", *(chosen or choose_settings([*rows.values()])))}
    tabs = {name: read_json(f"{home}/{name}/config.json")
            or asdict(make_config({"data": config["data"]}, name)) for name in TABS}
    why_not = why_not_live(policies["base"], records)
    content = {
        "data": Path(config["data"]).name, "seed": seed, "reward": config["reward"],
        "why_not": why_not, "live": None if why_not else encode_models(policies),
        "records": [[r.source, r.references, r.static] for r in records],
        "tabs": {name: {flag: of[flag] for flag in FLAGS} for name, of in tabs.items()},
        "courses": {name: read_course(f"{home}/{name}", name) for name in rows}}
    weights = content["live"]["weights"] if content["live"] else {}
    while len(weights) > 1 and len(json.dumps(content)) > SIZE - 50_000:  # what the template takes
        weights.popitem()
    text = json.dumps(content).replace("<", "\\u003c")  # nothing in it can end the script
    return Path(__file__).with_suffix(".html").read_text("utf-8").replace("{{DATA}}", text)


@run_command("lab.page")
def main(argv: list[str]) -> None:
    parser = Parser(prog="lab.page", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", help="the folder of a comparison")
    parser.add_argument("--weights", nargs=2, default=[], help="the two settings to carry")
    args = parser.parse_args(argv)
    write_text(f"{args.out}/page.html", make_page(args.out, args.weights))
    print(f"wrote {args.out}/page.html")


if __name__ == "__main__":
    main(sys.argv[1:])
