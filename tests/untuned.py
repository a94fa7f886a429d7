"""Two data sets that stand for what users bring: nothing is tuned for them.

    python -m tests.untuned datasets/e2e datasets

writes datasets/drafts (900 sources: a stiff draft from a template a slot as the static text, one
or two human texts as references and targets) and datasets/few (300 sources, with human texts
alone). Both are drawn from what `python -m data.e2e` wrote.
"""
import random
import sys
from pathlib import Path

from data import Record, load_records, save_records
from data.e2e import parse_slots

SENTENCES = {
    "eatType": "{} is a {}.", "food": "{} serves {} food.", "priceRange": "{} has {} prices.",
    "customer rating": "{} has a customer rating of {}.", "area": "{} is in the {} area.",
    "near": "{} is near {}."}
FAMILIES = {"yes": "{} is family friendly.", "no": "{} is not family friendly."}


def draft(source: str) -> str:
    """A sentence a slot, in the order of the source."""
    sentences = []
    for slot, value in parse_slots(source).items():
        pattern = FAMILIES[value] if slot == "familyFriendly" else SENTENCES.get(slot, "")
        subject = "It" if sentences else "xname"
        sentences += [pattern.format(subject, value)] if pattern else []
    return " ".join(sentences) or "It is xname."


def build(records: list[Record], sizes: dict[str, int], drafts: bool) -> dict[str, list[Record]]:
    """So many records of each split, each with one or two human texts, and a draft if asked."""
    rng = random.Random(1)
    records = rng.sample(records, sum(sizes.values()))
    splits, begin = {}, 0
    for split, size in sizes.items():
        splits[split] = []
        for r in records[begin:begin + size]:
            texts = rng.sample(r.references, min(len(r.references), rng.choice((1, 2))))
            static = [draft(r.source)] if drafts else []
            splits[split].append(Record(r.source, texts, static=static))
        begin += size
    return splits


def main(home: str, out: str) -> None:
    records = [r for split in ("train", "val", "test")
               for r in load_records(f"{home}/{split}.jsonl")]
    for name, sizes, drafts in (("drafts", dict(train=700, val=100, test=100), True),
                                ("few", dict(train=200, val=50, test=50), False)):
        folder = Path(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in build(records, sizes, drafts).items():
            save_records(part, str(folder / f"{split}.jsonl"))


if __name__ == "__main__":
    main(*sys.argv[1:])
