"""Token ids to the characters of their texts, in lower case, on the device that holds the ids.

What `Tokenizer.decode(ids).lower()` gives, as code points: broken UTF-8 becomes U+FFFD here, too (a byte, where Python may
take several together; no reward looks at them). One character has a lower case of two, İ.
"""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer

NOTHING = -1  # no byte, no character: a gap behind a short token, what stands behind the text


def every_character(function, device) -> torch.Tensor:
    """function(character) -> int for every code point: (0x110001,), the last one for NOTHING, which is as U+FFFD."""
    return torch.tensor([function(chr(point)) for point in (*range(0x110000), 0xFFFD)], dtype=torch.int32, device=device)


@lru_cache
def lower_case(device) -> torch.Tensor:
    return every_character(lambda c: ord(c.lower()[0]), device)


def together(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Move what every row holds to its left end, NOTHING behind it: (N,L) -> (N,width)."""
    there = rows != NOTHING
    place = torch.where(there, there.cumsum(1) - 1, width)
    return rows.new_full((rows.size(0), width + 1), NOTHING).scatter_(1, place, rows)[:, :width]


def code_points(raw: torch.Tensor) -> torch.Tensor:
    """UTF-8 bytes (N,L), NOTHING behind the text -> code points (N,L), at the place of their first byte."""
    lead, *after = (F.pad(raw, (0, 3), value=NOTHING)[:, i:i + raw.size(1)] for i in range(4))
    goes_on = [(byte & 0xC0) == 0x80 for byte in after]
    low = [byte & 0x3F for byte in after]
    two = (lead >= 0xC2) & (lead < 0xE0) & goes_on[0]
    three = (lead >= 0xE0) & (lead < 0xF0) & goes_on[0] & goes_on[1]
    four = (lead >= 0xF0) & goes_on[0] & goes_on[1] & goes_on[2]
    point2 = (lead & 0x1F) << 6 | low[0]
    point3 = (lead & 0x0F) << 12 | low[0] << 6 | low[1]
    point4 = (lead & 0x07) << 18 | low[0] << 12 | low[1] << 6 | low[2]
    three &= (point3 >= 0x800) & ((point3 < 0xD800) | (point3 > 0xDFFF))  # not written too long; no surrogates
    four &= (lead < 0xF8) & (point4 >= 0x10000) & (point4 < 0x110000)
    point = torch.where(lead < 0x80, lead, 0xFFFD)  # NOTHING is less, too
    for which, value in ((two, point2), (three, point3), (four, point4)):
        point = torch.where(which, value, point)
    for back, which in ((1, two | three | four), (2, three | four), (3, four)):
        point[:, back:].masked_fill_(which[:, :-back], NOTHING)
    return point


class Characters:
    """Reads the token ids of one tokenizer on one device."""

    def __init__(self, tok: Tokenizer, device):
        longest = max(map(len, tok.bytes))
        rows = [list(token) + [NOTHING] * (longest - len(token)) for token in tok.bytes]
        self.bytes = torch.tensor(rows, dtype=torch.int32, device=device)  # (V,longest); special tokens have none

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (...,T), PAD behind EOS -> characters (...,L), NOTHING behind the text."""
        raw = self.bytes[ids.flatten(0, -2)].flatten(1)
        width = max(1, int((raw != NOTHING).sum(1).amax()))  # waits for the device
        points = code_points(together(raw, width))
        dotted = points == ord("İ")
        points = torch.where(points == NOTHING, NOTHING, lower_case(ids.device)[points])
        points[:, 1:].masked_fill_(dotted[:, :-1], ord("İ".lower()[1]))
        return together(points, width).view(*ids.shape[:-1], width)


def characters_of(texts: list[str]) -> torch.Tensor:
    """The same of strings, on the CPU: N texts -> (N,L)."""
    rows = [np.frombuffer(text.lower().encode("utf-32-le", "replace"), np.int32) for text in texts]
    table = np.full((len(rows), max(1, *map(len, rows), 1)), NOTHING, np.int32)
    for row, points in zip(table, rows):
        row[:len(points)] = points
    return torch.from_numpy(table)
