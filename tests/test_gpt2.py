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
from model import DTYPES, EOS, MASK, PAD, SEP, load_gpt2
from runs import folder, metrics, refused, same, state  # noqa: F401

CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
              vocab_size=23, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_ctx=12)


def tensors_of(config) -> dict[str, torch.Tensor]:
    """GPT-2's names and shapes, layers as (in,out), and numbers that look drawn: sines."""
    C, V, T = config["n_embd"], config["vocab_size"], config["n_positions"]
    shapes, tensors, k = {"wte.weight": (V, C), "wpe.weight": (T, C)}, {}, 0
    for i in range(config["n_layer"]):
        for name, shape in (("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)),
                            ("ln_2", (C,)), ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    for name, shape in (shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}).items():
        n = math.prod(shape)
        values = [round(0.6 * math.sin(0.7 * (k + i) ** 1.1), 4) for i in range(n)]
        around = 1 if "ln_" in name and name.endswith("weight") else 0
        tensors[name] = around + torch.tensor(values).view(shape) / (1 + around)
        k += n
    return tensors


def write_weights(path, tensors=None, dtype=torch.float32, **config):
    """config.json, without what is None, and model.safetensors; bytes stay bytes."""
    config, header, content = CONFIG | config, {"__metadata__": {"format": "pt"}}, b""
    names = {torch_type: name for name, torch_type in DTYPES.items()} | {torch.uint8: "U8"}
    for name, tensor in (tensors or tensors_of(config)).items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=names[tensor.dtype], shape=[*tensor.shape],
                            data_offsets=[len(content), len(content) + len(raw)])
        content += raw
    path.mkdir(exist_ok=True)
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
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

LOGITS = {  # (column, id) -> logit: of all seven ids, and of the last five after two of padding
    0: {(0, 1): 0.32206, (0, 22): 0.85855, (3, 1): -0.32803, (3, 22): -0.84856,
        (6, 1): -0.69022, (6, 22): -1.55648},
    2: {(2, 1): 0.58089, (2, 22): 0.90115, (4, 1): -0.23344, (4, 22): -0.93035,
        (6, 1): -0.62670, (6, 22): -1.48766}}


@pytest.mark.parametrize("skip", LOGITS)
def test_logits_are_those_of_transformers(tmp_path, skip):
    """Beside a longer row, after left padding. Id 22, the last of GPT-2's, is our EOS."""
    model, ids = load_gpt2(str(write_weights(tmp_path))), [3, 17, 0, 9, 21, 5, 11]
    rows = torch.tensor([ids, [model.config.vocab_size + PAD] * skip + ids[skip:]])
    logits = model(rows, torch.tensor([0, skip]))[1]
    for (t, i), value in LOGITS[skip].items():
        assert logits[t, EOS if i == 22 else i].item() == pytest.approx(value, abs=1e-4)


def test_embeddings_and_gradients(tmp_path):
    """PAD, SEP and MASK are the mean embedding, EOS is <|endoftext|>, the others are as stored."""
    model, wte = load_gpt2(str(write_weights(tmp_path))), tensors_of(CONFIG)["wte.weight"]
    ours = model.wte.weight
    assert model.config.vocab_size == len(ours) == 26 and model.config.block_size == 12
    assert torch.equal(ours[:22], wte[:22]) and torch.equal(ours[EOS], wte[22])
    assert torch.allclose(ours[[PAD, SEP, MASK]], wte.mean(0), atol=1e-6)
    model(torch.tensor([[3, 17]])).sum().backward()
    assert all(p.grad is not None and p.is_contiguous() for p in model.parameters())


def test_files_that_vary(tmp_path):
    """Half precision, `transformer.` before the names, causal masks, the head that is wte again."""
    plain = load_gpt2(str(write_weights(tmp_path))).state_dict()
    for dtype, error in ((torch.float16, 2 ** -11), (torch.bfloat16, 2 ** -7)):
        half = load_gpt2(str(write_weights(tmp_path, dtype=dtype))).state_dict()
        for name, tensor in plain.items():
            assert half[name].dtype == torch.float32
            assert torch.allclose(half[name], tensor, rtol=error, atol=error), name
    more = {f"transformer.{name}": tensor for name, tensor in tensors_of(CONFIG).items()}
    more |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12).byte(),
             "transformer.h.1.attn.bias": torch.ones(1, 1, 12, 12),
             "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
             "lm_head.weight": tensors_of(CONFIG)["wte.weight"]}
    assert same(load_gpt2(str(write_weights(tmp_path, more))).state_dict(), plain)


@pytest.mark.parametrize("change, expected", [
    (dict(model_type="gpt_neo"), "expected model_type 'gpt2', found 'gpt_neo'"),
    (dict(model_type=None), "expected model_type 'gpt2', found None"),
    (dict(layer_norm_epsilon=1e-6), "expected layer_norm_epsilon 1e-05, found 1e-06"),
    (dict(tie_word_embeddings=False), "expected tie_word_embeddings True"),
    (dict(n_layer=None), "config.json: expected GPT-2's configuration"),
    (dict(n_layer=3), "h.2.ln_1.weight: expected shape (8,), found none"),
    (dict(n_layer=1), "'h.1.ln_1.weight': the network of config.json has none"),
    (dict(n_positions=99), "wpe.weight: expected shape (99, 8), found (12, 8)"),
])
def test_another_network_is_refused(tmp_path, change, expected):
    write_weights(tmp_path, tensors_of(CONFIG), **change)
    with pytest.raises(ValueError) as e:
        load_gpt2(str(tmp_path))
    assert expected in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [
    lambda content: content[:-1], lambda _: b"", lambda _: b"<!DOCTYPE html>",
    lambda _: b"\x80\2" + b"pickle" * 9, lambda _: struct.pack("<Q", 2) + b"[]"])
def test_a_file_of_another_kind_is_refused(tmp_path, name, change):
    path = write_weights(tmp_path) / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}: expected [^\n]*$"):
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
    small = dict(vocab_size=257 + len(PAIRS), n_positions=64, n_embd=12, n_head=3)
    gpt2 = write_vocabulary(write_weights(tmp_path / "gpt2", **small), PAIRS)
    words = ["--data", folder, "--settings", "masked", "--out", str(tmp_path / "out"), *(
        "--batch_size 4 --steps 4 --eval_every 2 --eval_size 6 --base_steps 4 --base_batch 8 --K 3 "
        "--device cpu --pretrained").split()]
    train.main([*words, str(gpt2)])
    base = state(tmp_path / "out/base/best.pt")
    assert base["gpt"]["n_head"] == 3 and base["tokenizer"] == Tokenizer.load(str(gpt2)).ranks
    assert len(metrics(tmp_path / "out/masked")) == 5
    train.main([*words, str(shutil.move(gpt2, tmp_path / "elsewhere"))])
    write_weights(tmp_path / "elsewhere", dtype=torch.bfloat16, **small)
    assert "another config (data_hash" in refused(capsys, *words, str(tmp_path / "elsewhere"))
    nan = {name: tensor * torch.nan for name, tensor in tensors_of(CONFIG | small).items()}
    write_weights(tmp_path / "elsewhere", nan, **small)
    line = refused(capsys, *words, str(tmp_path / "elsewhere"))
    assert "elsewhere: some weights are not finite" in line and "base_lr" not in line
    (tmp_path / "elsewhere/merges.txt").unlink()
    assert "merges.txt" in refused(capsys, *words, str(tmp_path / "elsewhere"))
