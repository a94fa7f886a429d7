"""GPT-2 from a folder. The folders are written here; the logits that they must give were computed
once by transformers' GPT2LMHeadModel (5.24) from the same files."""
import json
import math
import random
import shutil
import struct

import pytest
import tiktoken.load

import train
import torch

from data.tokenizer import Tokenizer
from model import EOS, MASK, PAD, SEP, load_gpt2
from runs import folder, metrics, refused, same, state  # noqa: F401

CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
              vocab_size=23, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_ctx=12,
              attn_pdrop=0.1, tie_word_embeddings=True)


def shapes_of(config: dict) -> dict[str, list[int]]:
    """GPT-2's names and shapes: layers as (in,out)."""
    C, V, T = config["n_embd"], config["vocab_size"], config["n_positions"]
    shapes = {"wte.weight": [V, C], "wpe.weight": [T, C]}
    for i in range(config["n_layer"]):
        layers = {"ln_1": [C], "attn.c_attn": [C, 3 * C], "attn.c_proj": [C, C],
                  "ln_2": [C], "mlp.c_fc": [C, 4 * C], "mlp.c_proj": [4 * C, C]}
        for name, shape in layers.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": [C], "ln_f.bias": [C]}


def numbers(shapes: dict[str, list[int]]) -> dict[str, list[float]]:
    """Numbers that look drawn, the same everywhere: sines, four times as dense for the layers."""
    values, k = {}, 0
    for name, shape in shapes.items():
        n = math.prod(shape)
        values[name] = [round(0.6 * math.sin(0.7 * (k + i) ** 1.1), 4) for i in range(n)]
        if "ln_" in name and name.endswith("weight"):
            values[name] = [1 + value / 2 for value in values[name]]
        k += n
    return values


def write_weights(path, config=CONFIG, prefix="", dtype=torch.float32, without="", more=()):
    """config.json and model.safetensors: 8 bytes of length, a JSON header, the numbers."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    header, content, shapes = {"__metadata__": {"format": "pt"}}, b"", shapes_of(config)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {prefix + name: (names[dtype], shapes[name], torch.tensor(values).to(dtype))
               for name, values in numbers(shapes).items() if name != without} | dict(more)
    for name, (kind, shape, tensor) in tensors.items():
        raw = bytes(tensor.view(torch.uint8).tolist())
        header[name] = dict(dtype=kind, shape=shape,
                            data_offsets=[len(content), len(content) + len(raw)])
        content += raw
    raw = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + content)
    return path


def write_vocabulary(path, pairs: list[tuple[bytes, bytes]]):
    """vocab.json and merges.txt, in which a character stands for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    name = {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    merges = [tuple("".join(map(name.get, part)) for part in pair) for pair in pairs]
    tokens = [*name.values(), *map("".join, merges), "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


PAIRS = [(b"t", b"h"), (b" ", b"th"), (b" th", b"e"), (b"i", b"n"), (b"in", b"g"), (b" ", b" "),
         (b"\xc3", b"\xa9"), (b"1", b"2"), (b"'", b"t"), (b"\n", b"\n"), (b"th", b"ing")]
IDS = [3, 17, 0, 9, 21, 5, 11]
LOGITS = {  # (column, id) -> logit: of all seven, and of the last five after two of padding
    0: {(0, 1): 0.32206, (0, 22): 0.85855, (3, 1): -0.32803, (3, 22): -0.84856,
        (6, 1): -0.69022, (6, 22): -1.55648},
    2: {(2, 1): 0.58089, (2, 22): 0.90115, (4, 1): -0.23344, (4, 22): -0.93035,
        (6, 1): -0.62670, (6, 22): -1.48766}}


@pytest.mark.parametrize("skip", LOGITS)
def test_logits_are_those_of_transformers(tmp_path, skip):
    """Beside a longer row, after left padding. Id 22, the last of GPT-2's, is our EOS."""
    model = load_gpt2(str(write_weights(tmp_path))).eval()
    V = model.config.vocab_size
    rows = torch.tensor([IDS, [V + PAD] * skip + IDS[skip:]])
    logits = model(rows, torch.tensor([0, skip]))[1]
    for (t, i), value in LOGITS[skip].items():
        assert logits[t, EOS if i == 22 else i].item() == pytest.approx(value, abs=1e-4)


def test_special_rows_and_training(tmp_path):
    """PAD, SEP and MASK are the mean embedding, EOS is <|endoftext|>, the others are as stored."""
    model = load_gpt2(str(write_weights(tmp_path)))
    wte, ours = torch.tensor(numbers(shapes_of(CONFIG))["wte.weight"]).view(23, 8), model.wte.weight
    assert model.config.vocab_size == len(ours) == 26 and model.config.block_size == 12
    assert torch.equal(ours[:22], wte[:22]) and torch.equal(ours[EOS], wte[22])
    assert all(torch.allclose(ours[i], wte.mean(0), atol=1e-6) for i in (PAD, SEP, MASK))
    model(torch.tensor([IDS])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype, error", [(torch.float16, 2 ** -11), (torch.bfloat16, 2 ** -7)])
def test_half_precision_and_other_names(tmp_path, dtype, error):
    """With `transformer.` in front, with the causal masks that transformers may add."""
    whole = load_gpt2(str(write_weights(tmp_path / "whole"))).state_dict()
    more = {"transformer.h.0.attn.bias": ("U8", [4], torch.ones(4, dtype=torch.uint8))}
    half = write_weights(tmp_path / "half", prefix="transformer.", dtype=dtype, more=more)
    for name, tensor in load_gpt2(str(half)).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, whole[name], rtol=error, atol=error), name


@pytest.mark.parametrize("change, expected", [
    (dict(model_type="llama"), "expected model_type 'gpt2', found 'llama'"),
    (dict(activation_function="relu"), "expected activation_function 'gelu_new', found 'relu'"),
    (dict(tie_word_embeddings=False), "expected tie_word_embeddings True"),
    (dict(n_layer=3), "h.2.ln_1.weight: expected shape (8,), found none"),
    (dict(n_layer=1), "'h.1.ln_1.weight': the network of config.json has none"),
    (dict(n_embd=16), "wte.weight: expected shape (23, 16), found (23, 8)")])
def test_another_network_is_refused(tmp_path, change, expected):
    write_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError) as e:
        load_gpt2(str(tmp_path))
    assert expected in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("content", [b"", b"\x80\2" + b"pickle" * 9, b"\xff" * 64, b"<!DOCTYPE html>",
                                     struct.pack("<Q", 2) + b"{}", None])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = write_weights(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=r"model.safetensors: [^\n]*$"):
        load_gpt2(str(tmp_path))


def test_ids_are_those_of_tiktoken_itself(tmp_path, monkeypatch):
    """Against ranks that tiktoken reads from the same files, after the space in front."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    tok = Tokenizer.load(str(write_vocabulary(tmp_path, PAIRS)))
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    oracle = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    words = ["the", " the", "thing", "don't", "'T", "<|endoftext|>", "é", "日本", "🙂", "\x85", "12",
             "½", "_", "!!", "   ", "\n\n", "\r\n", "\t", "\U0010ffff", " " * 70, "th" * 90]
    rng, n = random.Random(0), 256 + len(PAIRS)
    for text in ("".join(rng.choices(words, k=rng.randrange(20))) for _ in range(500)):
        assert tok.encode(text) == oracle.encode_ordinary(" " + text)
        assert tok.decode(tok.encode(text)) == text and max(tok.encode(text)) < n
    assert (tok.pad, tok.sep, tok.eos, tok.mask, tok.vocab_size) == (n, n + 1, n + 2, n + 3, n + 4)
    assert Tokenizer.load(tok.ranks).encode("the thing") == tok.encode("the thing")


@pytest.mark.parametrize("name, old, new", [
    ("vocab.json", "}", ""), ("vocab.json", ": 7,", ": 6,"), ("vocab.json", "endoftext", "end"),
    ("merges.txt", "t h\n", ""), ("merges.txt", "#version: 0.2\n", "#version: 0.2\na b\n")])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, name, old, new):
    path = write_vocabulary(tmp_path, PAIRS) / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.json[^\n]*$"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.slow
def test_from_gpt2_to_a_finished_masked_run(folder, tmp_path, capsys):
    """The base starts from the weights; a folder that was moved is the same base, and other
    weights are another."""
    small = CONFIG | dict(vocab_size=257 + len(PAIRS), n_positions=64, n_embd=12, n_head=3)
    gpt2 = write_vocabulary(write_weights(tmp_path / "gpt2", small), PAIRS)
    words = ["--data", folder, "--settings", "masked", "--out", str(tmp_path / "out"), *(
        "--batch_size 4 --steps 4 --eval_every 2 --eval_size 6 --base_steps 4 --base_batch 8 --K 3 "
        "--device cpu --pretrained").split()]
    train.main([*words, str(gpt2)])
    base = state(tmp_path / "out/base/best.pt")
    assert base["gpt"]["n_head"] == 3 and base["tokenizer"] == Tokenizer.load(str(gpt2)).ranks
    assert len(metrics(tmp_path / "out/masked")) == 5
    train.main([*words, str(shutil.move(gpt2, tmp_path / "elsewhere"))])
    write_weights(tmp_path / "elsewhere", small, dtype=torch.bfloat16)
    assert "another config (data_hash" in refused(capsys, *words, str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere/merges.txt").unlink()
    assert "merges.txt" in refused(capsys, *words, str(tmp_path / "elsewhere"))
