"""Records: how they are read, and how they become batches of token ids.

The texts of a record have three roles: maximum likelihood imitates `target`, semi-offline RL
starts from `static` (and offline RL learns from it), and only the reward sees `references`. On
disk a data set is a folder with train.jsonl, val.jsonl and test.jsonl in UTF-8, one record per
line:

    {"source": "...", "references": ["...", ...], "target": ["..."], "static": ["..."],
     "names": {"xname": "..."}}

`target` defaults to references, `static` to target; `names` says what to put back into generated
text before a person reads it. A flags.json in the folder may hold flags tuned for the data. Left
out: streaming from disk (records stay in memory as strings and are tokenized batch by batch) and
padding by length buckets.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass, field

import torch

from data.tokenizer import Tokenizer

SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """A mistake in the user's input. The message is one line: which file, which line, what was
    expected."""


@dataclass(slots=True)
class Record:
    """One source and its texts. Empty `target` means references, empty `static` means target."""
    source: str
    references: list[str]
    target: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)  # file and line, for messages

    def __post_init__(self):
        self.target = self.target or self.references
        self.static = self.static or self.target

    def others(self, text: str) -> list[str]:
        """The references that a text is scored against: all but the text itself, with which it
        would agree. An only reference stays."""
        return [other for other in self.references if other != text] or self.references

    def put_names_back(self, text: str) -> str:
        """The text with names for their placeholders: all in one pass, the longest placeholder
        first, because ENTITY_1 is a part of ENTITY_10, and a name may look like a placeholder."""
        if not self.names:
            return text
        longest_first = sorted(self.names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(pattern, lambda match: self.names[match[0]], text)


# -------------------------------------------------------------------------------------------------
# Reading and writing JSONL

def parse_json(text: str):
    """JSON -> Python. Raises ValueError or RecursionError for anything else, and ValueError for a
    key that is given twice, of which Python's parser would keep the last."""
    def check_keys(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"key {max(keys, key=keys.count)!r} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=check_keys)


def parse_record(line: bytes, where: str) -> Record:
    """One JSONL line -> Record. Raises InputError that begins with `where` (file and line)."""
    def check(holds: bool, expected: str, found) -> None:
        if not holds:
            raise InputError(f"{where}: {expected}, found {found!r:.60}")

    try:
        row = parse_json(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # fails for half a pair of surrogates
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: expected one JSON object per line, in UTF-8, "
                         f"found {line.decode(errors='replace')[:40]!r} ({e!s:.80})") from None
    check(isinstance(row, dict), "expected a JSON object with source and references", row)
    fields = {"source": "", "references": [], "target": [], "static": [], "names": {}}
    for name in row:
        check(name in fields, f"expected the fields {', '.join(fields)}", name)
    source, *lists, names = (fields | row).values()
    check(is_text(source), "field 'source': expected a non-empty string", source)
    for name, texts in zip(("references", "target", "static"), lists):
        check(isinstance(texts, list) and all(map(is_text, texts)),
              f"field {name!r}: expected a list of non-empty strings", texts)
    check(lists[0], "field 'references': expected at least one text", lists[0])
    check(isinstance(names, dict) and all(names)
          and all(isinstance(name, str) for name in names.values()),
          "field 'names': expected an object of placeholders and names", names)
    return Record(source, *lists, names, where)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def load_records(path: str) -> list[Record]:
    """Read one JSONL file. Raises InputError that names the file and the line."""
    expected = "expected JSONL with source and references on every line"
    try:
        with open(path, "rb") as file:
            lines = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in file]  # no UTF-8 BOM
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); {expected}") from None
    records = [parse_record(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line]
    if not records:
        raise InputError(f"{path}: empty; {expected}")
    return records


def save_records(records: list[Record], path: str) -> None:
    """Write JSONL that `load_records` reads back unchanged. Writes atomically: a crash keeps the
    old file."""
    with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as file:
        for r in records:
            row = {"source": r.source, "references": r.references}
            if r.target is not r.references:
                row["target"] = r.target
            if r.static is not r.target:
                row["static"] = r.static
            if r.names:
                row["names"] = r.names
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".tmp", path)


# -------------------------------------------------------------------------------------------------
# Data sets. forecast.py and e2e.py build on Record and InputError, so the functions that need them
# import them; and `python -m data.e2e` must find e2e.py not yet imported.

def load_dataset(name: str) -> dict[str, list[Record]]:
    """`forecast`, `forecast2` (generated) or a folder -> {"train": records, "val": …, "test": …}.

    Raises InputError for a folder that does not exist or whose files are not as expected. (A
    folder that is called forecast is typed ./forecast.)"""
    from data import forecast
    if name in forecast.GRAMMARS:
        return forecast.generate(name)
    if not os.path.isdir(name):
        raise InputError(f"--data {name}: no such folder; expected {', '.join(forecast.GRAMMARS)} "
                         f"or a folder with train.jsonl, val.jsonl and test.jsonl")
    return {split: load_records(os.path.join(name, split + ".jsonl")) for split in SPLITS}


def flags_of(name: str) -> dict[str, dict]:
    """The flags tuned for a data set: setting ("" for all) -> {flag: value}; {} without any.

    The flags.json of a folder holds such an object, or {"preset": "e2e"} for e2e.FLAGS. Raises
    InputError when it holds neither. Flags and their values are checked by lab.settings, as those
    of the command line are."""
    from data import e2e, forecast
    if name in forecast.GRAMMARS:
        return forecast.FLAGS
    path = os.path.join(name, "flags.json")
    try:
        with open(path, encoding="utf-8-sig") as file:
            flags = parse_json(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected JSON in UTF-8 ({e!s:.80})") from None
    if flags == {"preset": "e2e"}:
        return e2e.FLAGS
    if not isinstance(flags, dict) or not all(isinstance(v, dict) for v in flags.values()):
        raise InputError(f"{path}: expected {{setting: {{flag: value}}}}, \"\" for every setting, "
                         f"or {{\"preset\": \"e2e\"}}, found {flags!r:.60}")
    return flags


def stated(text: str, source: str) -> dict[str, bool] | None:
    """Fact -> does the text state it correctly? For the six facts of a forecast source and the
    slots of an E2E source; None for any other source."""
    from data import e2e, forecast
    facts = forecast.stated(text, source)
    return e2e.stated(text, source) if facts is None else facts


def data_hash(dataset: dict[str, list[Record]]) -> str:
    """A hash of every text: a base model belongs to the data that it was trained on."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for r in dataset[split]:
            texts = [split, r.source, *r.references, "\x1e", *r.target, "\x1e", *r.static]
            digest.update("\x1f".join(texts).encode())
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------------------------------------
# Batches

@dataclass(slots=True)
class Batch:
    """B sources as tensors, and as strings what the reward needs.

    A row is `[PAD ... source SEP | y_0 ... EOS PAD ...]`."""
    src: torch.Tensor  # (B,S) left-padded source ids, SEP in the last column
    pad: torch.Tensor  # (B,) how many of the S columns are padding
    static: torch.Tensor  # (B,C,T) static texts: each ends in EOS, then PAD
    static_len: torch.Tensor  # (B,C) their lengths, EOS included
    target: torch.Tensor  # (B,T) one text per source for maximum likelihood
    target_len: torch.Tensor  # (B,)
    references: list[list[list[str]]]  # (B,C) what a text made from this static text is scored by
    all_references: list[list[str]]  # (B,) and a text that owes nothing to a stored one
    sources: list[str]  # (B,)

    def to(self, device) -> "Batch":
        tensors = (self.src, self.pad, self.static, self.static_len, self.target, self.target_len)
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return Batch(*moved, self.references, self.all_references, self.sources)


def encode_sources(sources: list[str], tok: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """B strings -> ids (B,S), left-padded so that every text starts in the same column, and how
    many columns of each row are padding (B,)."""
    ids = [tok.encode(source) + [tok.sep] for source in sources]
    width = max(map(len, ids))
    src = torch.tensor([[tok.pad] * (width - len(row)) + row for row in ids])
    return src, torch.tensor([width - len(row) for row in ids])


def encode_texts(texts: list[str], tok: Tokenizer,
                 max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """N strings -> ids (N,T), each text ending in EOS and right-padded, and lengths (N,).

    Longer texts are cut to max_len ids, the last of which is EOS. Raises ValueError when max_len
    leaves no room for it."""
    if max_len < 1:
        raise ValueError(f"max_len {max_len}: expected at least 1")
    ids = [tok.encode(text)[:max_len - 1] + [tok.eos] for text in texts]
    width = max(map(len, ids))
    out = torch.tensor([row + [tok.pad] * (width - len(row)) for row in ids])
    return out, torch.tensor([len(row) for row in ids])


def make_batch(records: list[Record], targets: list[str], statics: list[list[str]],
               tok: Tokenizer, max_len: int) -> Batch:
    """B records, one target each and C static texts each -> Batch.

    A text made from a stored static text keeps much of it, and is not scored against it. A text
    that keeps nothing of it may be scored against every reference (one more, which raises a reward
    that takes the best: by .018 of ROUGE on E2E)."""
    B = len(records)
    if not len(targets) == len(statics) == B or len(set(map(len, statics))) > 1:
        raise ValueError(f"expected a target and equally many static texts for {B} records")
    src, pad = encode_sources([r.source for r in records], tok)
    flat = [text for texts in statics for text in texts]
    ids, lengths = encode_texts(targets + flat, tok, max_len)  # one call, one width T for both
    return Batch(
        src, pad,
        static=ids[B:].view(B, -1, ids.size(1)), static_len=lengths[B:].view(B, -1),
        target=ids[:B], target_len=lengths[:B],
        references=[[r.others(text) for text in texts] for r, texts in zip(records, statics)],
        all_references=[r.references for r in records],
        sources=[r.source for r in records])
