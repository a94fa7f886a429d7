"""Records, batches, the tokenizer and the embedded task."""
import hashlib
import json
import random

import pytest
import torch

import data
from data import forecast
from data.tokenizer import Tokenizer, merge, train_bpe


@pytest.mark.parametrize("setting, expected", [("forecast", "a2502775d5f9a1db"), ("forecast2", "09c9b5248fd2188c")])
def test_forecast_is_frozen(setting, expected):
    """Committed before the first RL run: a change here would make every figure of the README incomparable."""
    assert data.data_hash(forecast.generate(setting)) == expected


def test_forecast_splits_share_no_source():
    dataset = forecast.generate("forecast")
    sources = [r.source for split in data.SPLITS for r in dataset[split]]
    assert len(set(sources)) == len(sources) == sum(forecast.SIZES.values())
