"""E2E NLG CSVs (columns mr, ref) -> DIR/{train,val,test}.jsonl, one record per delexicalised meaning representation.

    python -m data.e2e devset.csv testset_w_refs.csv --out datasets/e2e
    python -m data.e2e --download --out datasets/e2e        (needs a network)

The values of name and near become xname and xnear in both columns, because a restaurant's name says nothing about how
to describe it; the names of the first line are kept in the record to be put back for output. The split is by
delexicalised representation, never by line, or a tenth of the test set would be seen in training. Left out: spelling
correction, and any cleaning of references that state something false (about 8% of slots); the reward has to cope.
Data: Novikova, Dušek and Rieser (2017), CC BY-SA 4.0, https://github.com/tuetschek/e2e-dataset.
"""

import argparse
import csv
import difflib
import json
import random
import re
import sys
import urllib.request
from pathlib import Path

from data import InputError
from data.rewards import has_slots, parse_slots

URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
RELEASE = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
TEST, VAL, SEED = 200, 150, 0                           # representations held out; fixed, so that results compare
FLAGS = {"preset": "e2e"}  # what train.py should use for this data


def read_rows(path: Path) -> list[tuple[str, str, str]]:
    """(place, mr, ref) of every line of a CSV, place as FILE:LINE. Raises InputError for a file, a column or a
    representation that is not as expected."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"mr", "ref"} <= set(reader.fieldnames or ()):
                raise InputError(f"{path}:1: expected a CSV with the columns mr and ref, found {reader.fieldnames}")
            rows = [(f"{path}:{reader.line_num}", row["mr"] or "", row["ref"] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a readable CSV in UTF-8: {error}") from None
    if not rows:
        raise InputError(f"{path}:2: expected at least one line below the header")
    for place, mr, _ in rows:
        if not has_slots(mr):
            raise InputError(f"{place}: expected slots such as name[The Mill], food[Italian], found {mr[:60]!r}")
    return rows


def _replace(text: str, name: str, token: str) -> str | None:
    """`text` with every mention of `name` as `token`; None when it has none. Case, accents and a leading The do not
    matter; failing an exact mention, the words most like the name will do (Crown Plaza for Crowne Plaza Hotel)."""
    core = re.sub(r"^the\s+", "", name, flags=re.IGNORECASE)
    pattern = r"\s+".join(map(re.escape, core.split())).replace("é", "[eé]")
    replaced, times = re.subn(rf"(?:\bthe\s+)?\b{pattern}\b", token, text, flags=re.IGNORECASE)
    if times:
        return replaced
    words, size = list(re.finditer(r"\w+", text)), len(core.split())
    spans = [(words[i].start(), words[i + n - 1].end())
             for n in {size, max(1, size - 1)} for i in range(len(words) - n + 1)]
    likeness = lambda span: difflib.SequenceMatcher(None, text[slice(*span)].lower(), core.lower()).ratio()
    best = max(spans, key=likeness, default=None)
    if best is None or likeness(best) < 0.75:
        return None
    return re.sub(r"\bthe\s+$", "", text[: best[0]], flags=re.IGNORECASE) + token + text[best[1] :]


def delexicalise(mr: str, ref: str) -> tuple[str, str | None, dict[str, str]]:
    """(mr with xname, xnear and its slots in one order; ref likewise, None when a name is not in it; the names)."""
    slots, names = parse_slots(mr), {}
    ref = " ".join(ref.split())
    for slot in sorted([slot for slot in ("name", "near") if slot in slots], key=lambda slot: -len(slots[slot])):
        names["x" + slot], slots[slot] = slots[slot], "x" + slot
        ref = ref and _replace(ref, names["x" + slot], "x" + slot)
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items()), ref or None, dict(sorted(names.items()))


def relexicalise(text: str, name: str, near: str = "") -> str:
    """Puts the names back: xname becomes `name`, and xnear `near` (left alone when empty)."""
    text = re.sub(r"\bxname\b", lambda _: name, text)
    return re.sub(r"\bxnear\b", lambda _: near, text) if near else text


def convert(rows: list[tuple[str, str, str]]) -> tuple[dict[str, list[dict]], list[str]]:
    """Rows of `read_rows` -> ({"train": records, "val": …, "test": …}, the places of references that were dropped
    because their name or near place could not be found). Raises InputError when there are too few to split."""
    records, dropped = {}, []
    for place, mr, ref in rows:
        mr, ref, names = delexicalise(mr, ref)
        if ref is None:
            dropped.append(place)
            continue
        record = records.setdefault(mr, {"source": mr, "references": [], "names": names})
        if ref not in record["references"]:
            record["references"].append(ref)
    if len(records) <= TEST + VAL:
        raise InputError(f"{rows[0][0].rpartition(':')[0]}: expected more than {TEST + VAL} different representations "
                         f"to hold out {TEST} for test and {VAL} for validation, found {len(records)}")
    order = sorted(records)                             # the split must not depend on the order of the files
    random.Random(SEED).shuffle(order)
    parts = {"test": order[:TEST], "val": order[TEST : TEST + VAL], "train": order[TEST + VAL :]}
    return {part: [records[mr] for mr in parts[part]] for part in ("train", "val", "test")}, dropped


def write(files: dict[str, str], out: Path) -> bool:
    """Writes name -> text into `out`; False when all were there already. Never overwrites: raises InputError when one
    is there with another content, or when `out` cannot be written."""
    try:
        there = {name: (out / name).read_text("utf-8") for name in files if (out / name).exists()}
        if changed := [name for name in there if there[name] != files[name]]:
            raise InputError(f"{out / changed[0]}: holds other data; expected a new --out; nothing was written")
        out.mkdir(parents=True, exist_ok=True)
        for name in files.keys() - there.keys():
            (out / name).write_text(files[name], "utf-8", newline="\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{out}: expected a directory that can be written: {error}") from None
    return len(there) < len(files)


def download(folder: Path) -> list[Path]:
    """Fetches the release's CSVs into `folder`, unless they are there. Raises InputError without a network."""
    paths = [folder / name for name in RELEASE]
    for path in paths:
        if not path.exists():
            try:
                with urllib.request.urlopen(URL + path.name, timeout=30) as reply:
                    text = reply.read()
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
            except OSError as error:
                raise InputError(f"{URL}{path.name}: could not be downloaded to {path} ({error}); "
                                 f"with the CSVs at hand: python -m data.e2e CSV … --out DIR") from None
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.e2e", description="E2E NLG CSVs to records for train.py.")
    parser.add_argument("csv", nargs="*", type=Path, help="files with the columns mr and ref")
    parser.add_argument("--out", required=True, type=Path, help="directory for train.jsonl, val.jsonl and test.jsonl")
    parser.add_argument("--download", action="store_true", help="fetch the release into --out first, and use it")
    args = parser.parse_args(argv)
    if not args.csv and not args.download:
        parser.error("expected CSV files, or --download")
    try:
        rows = [row for path in args.csv + (download(args.out) if args.download else []) for row in read_rows(path)]
        parts, dropped = convert(rows)
        files = {f"{part}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                 for part, records in parts.items()}
        new = write(files | {"flags.json": json.dumps(FLAGS) + "\n"}, args.out)
    except InputError as error:
        print(f"data.e2e: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(rows)} lines read; {len(dropped)} dropped, their name or near place was not found"
          + (f": {', '.join(dropped[:5])}{' …' if len(dropped) > 5 else ''}" if dropped else ""))
    for part, records in parts.items():
        references = sum(len(record["references"]) for record in records)
        print(f"{part}: {len(records)} representations, {references} references")
    print(f"written to {args.out}" if new else f"{args.out} holds exactly this already; nothing was written")


if __name__ == "__main__":
    main()
