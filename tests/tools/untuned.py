"""Two data sets such as users may bring: no flag is tuned for them.

    python -m tests.tools.untuned datasets/e2e datasets

writes datasets/drafts (900 sources: the static text is a stiff draft with one template per slot,
references and targets are one or two human texts) and datasets/few (300 sources, human texts only).
Both are drawn from the output of `python -m data.e2e`.
"""
import random
import sys
from pathlib import Path

from data import SPLITS, Record, load_dataset, save_records
from data.e2e import parse_slots

SENTENCES = {
    "eatType": "{} is a {}.", "food": "{} serves {} food.", "priceRange": "{} has {} prices.",
    "customer rating": "{} has a customer rating of {}.", "area": "{} is in the {} area.",
    "near": "{} is near {}."}
FAMILIES = {"yes": "{} is family friendly.", "no": "{} is not family friendly."}


def draft(source: str) -> str:
    """One sentence per slot, in the order of the source."""
    sentences = []
    for slot, value in parse_slots(source).items():
        pattern = FAMILIES[value] if slot == "familyFriendly" else SENTENCES.get(slot, "")
        subject = "It" if sentences else "xname"
        sentences += [pattern.format(subject, value)] if pattern else []
    return " ".join(sentences) or "It is xname."


def build(records: list[Record], sizes: list[int], drafts: bool, folder: Path) -> None:
    """`sizes` records per split, each with one or two human texts, and with a draft if asked."""
    rng = random.Random(1)
    chosen = iter(rng.sample(records, sum(sizes)))
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in zip(SPLITS, sizes):
        made = []
        for _ in range(size):
            r = next(chosen)
            texts = rng.sample(r.references, min(len(r.references), rng.choice((1, 2))))
            made.append(Record(r.source, texts, static=[draft(r.source)] if drafts else []))
        save_records(made, str(folder / f"{split}.jsonl"))


if __name__ == "__main__":
    home, out = sys.argv[1:]
    records = [r for part in load_dataset(home).values() for r in part]
    build(records, [700, 100, 100], True, Path(out, "drafts"))
    build(records, [200, 50, 50], False, Path(out, "few"))
