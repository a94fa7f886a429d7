"""Tests import the method from the module that the environment variable SORL names (default sorl),
so that a student runs them against a file with functions written anew:

    SORL=my_sorl python -m pytest -k exercise_03
"""
import importlib
import os

# Tests compare to the last bit and fork, which a process that has used a GPU cannot.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from model import GPT, GPTConfig  # before torch: it tells torch's threads to wait quietly
import torch

torch.set_num_threads(1)  # the tensors of the tests are tiny: a second thread costs time
sorl = importlib.import_module(os.environ.get("SORL", "sorl"))


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when asked for: `-m slow`, or by name."""
    if config.getoption("-m") or config.getoption("-k"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; python -m pytest -m slow runs it"))


def tiny_model():
    """A GPT small enough to enumerate with, its weights large enough that logits differ."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=14, block_size=32, n_layer=2, n_head=2, n_embd=16,
                          init_std=0.06))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


@pytest.fixture
def tiny():
    return tiny_model()


# The tiny model's ids: 0..9 are ordinary; PAD 10, SEP 11, EOS 12, MASK 13.
V = 14


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def prompts(lengths, seed=0):
    """Random left-padded sources (B,S) that end in SEP, and pad (B,)."""
    lengths = torch.tensor(lengths)
    S = int(lengths.max()) + 1
    src = (uniform(len(lengths), S, seed=seed) * 10).long()
    pad = S - 1 - lengths
    src[torch.arange(S) < pad[:, None]] = 10
    src[:, -1] = 11
    return src, pad


def texts_of(lengths, T, seed=5):
    """Random texts (R,T) of these lengths, EOS included, PAD behind it; and the lengths."""
    lengths = torch.tensor(lengths)
    text = (uniform(len(lengths), T, seed=seed) * 10).long()
    text[torch.arange(T) >= lengths[:, None]] = 10
    text[torch.arange(len(lengths)), lengths - 1] = 12
    return text, lengths
