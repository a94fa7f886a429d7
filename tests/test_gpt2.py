"""GPT-2 from a folder: weights, vocabulary, and what a large vocabulary costs.

The folders are written here, byte by byte. The logits that they must give were computed once by
transformers' GPT2LMHeadModel (5.24) from the same files."""
import errno
import io
import json
import math
import random
import shutil
import struct
import tracemalloc

import pytest
import tiktoken.load

import train
import torch

from data.tokenizer import GPT2_LONGEST, Tokenizer
from lab import evaluate, policy
from model import EOS, MASK, PAD, SEP, Cache, load_gpt2
from runs import folder, metrics, refused, same, state, weights  # noqa: F401

CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
              vocab_size=23, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_ctx=12,
              attn_pdrop=0.1, tie_word_embeddings=True)


# --------------------------------------------------------------------------------------------------
# Folders


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


def packed(values: list[float], dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of an F32
        whole = struct.pack(f"<{len(values)}f", *values)
        return b"".join(whole[i + 2:i + 4] for i in range(0, len(whole), 4))
    return struct.pack(f"<{len(values)}{dict(F32='f', F16='e')[dtype]}", *values)


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> tuple[dict, bytes]:
    """(header, numbers) of a file that holds name -> dtype, shape, bytes."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in tensors.items():
        place = [len(content), len(content) + len(raw)]
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=place)
        content += raw
    return header, content


def write_safetensors(path, header, content: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content)


def tensors_of(config=CONFIG, prefix="", dtype="F32") -> dict:
    shapes = shapes_of(config)
    return {prefix + name: (dtype, shapes[name], packed(values, dtype))
            for name, values in numbers(shapes).items()}


def write_weights(path, config=CONFIG, prefix="", dtype="F32", more=()):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    header, content = safetensors(tensors_of(config, prefix, dtype) | dict(more))
    write_safetensors(path / "model.safetensors", header, content)
    return path


def characters() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's files."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def write_vocabulary(path, pairs: list[tuple[bytes, bytes]]):
    path.mkdir(exist_ok=True)
    name = characters()
    merges = [tuple("".join(map(name.get, part)) for part in pair) for pair in pairs]
    tokens = [*name.values(), *map("".join, merges), "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# " the", "ing", "é", "  " and a few more, each of two tokens before it
PAIRS = [(b"t", b"h"), (b" ", b"th"), (b" th", b"e"), (b"i", b"n"), (b"in", b"g"), (b" ", b" "),
         (b"\xc3", b"\xa9"), (b"1", b"2"), (b"'", b"t"), (b"\n", b"\n"), (b"th", b"in"),
         (b"th", b"ing"), (b" ", b"in"), (b"  ", b"  "), (b"!", b"!")]


# --------------------------------------------------------------------------------------------------
# Weights

IDS = [3, 17, 0, 9, 21, 5, 11]
LOGITS = {  # (column, id) -> logit: of all seven, and of the last five behind two of padding
    "whole": {(0, 1): 0.32206, (0, 22): 0.85855, (3, 1): -0.32803, (3, 22): -0.84856,
              (6, 1): -0.69022, (6, 22): -1.55648},
    "padded": {(2, 1): 0.58089, (2, 22): 0.90115, (4, 1): -0.23344, (4, 22): -0.93035,
               (6, 1): -0.62670, (6, 22): -1.48766},
}
COLUMNS = {"whole": 0, "padded": 2}


def ordinary(logits):
    """The logits of GPT-2's 23 ids: the last is <|endoftext|>, our EOS."""
    return torch.cat([logits[..., :22], logits[..., EOS, None]], -1)


@pytest.mark.parametrize("kind", COLUMNS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    """Alone, beside a longer row behind left padding, and column by column with a cache."""
    model = load_gpt2(str(write_weights(tmp_path))).eval()
    V, skip = model.config.vocab_size, COLUMNS[kind]

    def close(logits, first=0):
        return all(abs(ordinary(logits)[t - first, i].item() - value) < 1e-4
                   for (t, i), value in LOGITS[kind].items())

    assert close(model(torch.tensor([IDS[skip:]]))[0], first=skip)
    rows = torch.tensor([IDS, [V + PAD] * skip + IDS[skip:]])
    pad = torch.tensor([0, skip])
    assert close(model(rows, pad)[1])
    cache = Cache(model.config, 7)
    columns = [model(rows[:, t, None], pad, cache)[1] for t in range(7)]
    assert close(torch.cat(columns))


def test_special_rows(tmp_path):
    """PAD, SEP and MASK are the mean embedding, EOS is <|endoftext|>, the others are as stored."""
    model = load_gpt2(str(write_weights(tmp_path)))
    wte = torch.tensor(numbers(shapes_of(CONFIG))["wte.weight"]).view(23, 8)
    ours = model.wte.weight
    assert model.config.vocab_size == len(ours) == 26 and model.config.block_size == 12
    assert torch.equal(ours[:22], wte[:22]) and torch.equal(ours[EOS], wte[22])
    for row in (PAD, SEP, MASK):
        assert torch.allclose(ours[row], wte.mean(0), atol=1e-6)


def test_a_loaded_model_can_be_trained_and_counts(tmp_path):
    model = load_gpt2(str(write_weights(tmp_path)))
    model(torch.tensor([IDS])).sum().backward()
    assert model.pushed.tolist() == [1, 7]
    assert all(p.grad is not None and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_read(tmp_path, dtype):
    """Rounded to 11 or 8 bits, and otherwise the same."""
    whole = load_gpt2(str(write_weights(tmp_path / "whole"))).state_dict()
    half = load_gpt2(str(write_weights(tmp_path / "half", dtype=dtype))).state_dict()
    error = {"F16": 2 ** -11, "BF16": 2 ** -7}[dtype]
    for name, tensor in whole.items():
        assert half[name].dtype == torch.float32
        assert torch.allclose(half[name], tensor, rtol=error, atol=error), name
        assert name.endswith("ln_f.bias") or not torch.equal(half[name], tensor)


def test_names_and_tensors_that_vary(tmp_path):
    """With `transformer.` in front, with causal masks and the head that transformers may add."""
    plain = load_gpt2(str(write_weights(tmp_path / "plain")))
    more = {f"transformer.h.{i}.attn.bias": ("U8", [1, 1, 12, 12], b"\1" * 144) for i in (0, 1)}
    more["transformer.h.0.attn.masked_bias"] = ("F32", [], packed([-1e4], "F32"))
    more["lm_head.weight"] = tensors_of()["wte.weight"]
    prefixed = load_gpt2(str(write_weights(tmp_path / "more", prefix="transformer.", more=more)))
    assert same(plain.state_dict(), prefixed.state_dict())


@pytest.mark.parametrize("change, expected", [
    (dict(model_type="llama"), "expected model_type 'gpt2', found 'llama'"),
    (dict(model_type=None), "expected model_type 'gpt2', found None"),
    (dict(activation_function="relu"), "expected activation_function 'gelu_new', found 'relu'"),
    (dict(layer_norm_epsilon=1e-6), "expected layer_norm_epsilon 1e-05, found 1e-06"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx False"),
    (dict(tie_word_embeddings=False), "expected tie_word_embeddings True"),
    (dict(n_layer="2"), "n_layer: expected a whole number from 1 to 1,000, found '2'"),
    (dict(n_layer=10 ** 9), "n_layer: expected a whole number from 1 to 1,000"),
    (dict(n_embd=None), "n_embd: expected a whole number"),
    (dict(n_positions=-1), "n_positions: expected a whole number"),
    (dict(n_head=3), "n_embd 8: expected a multiple of n_head = 3"),
    (dict(n_layer=3), "h.2.ln_1.weight: expected (8,)"),
    (dict(n_layer=1), "'h.1.attn.c_attn.bias': the network of config.json has none"),
    (dict(vocab_size=24), "wte.weight: expected (24, 8)"),
    (dict(n_positions=1024), "wpe.weight: expected (1024, 8)"),
    (dict(n_embd=16), "wte.weight: expected (23, 16)"),
])
def test_another_network_is_refused(tmp_path, change, expected):
    write_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError) as e:
        load_gpt2(str(tmp_path))
    assert expected in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def lie(name, **entry):
    """Change one entry of the header; an offset is moved by so many bytes."""
    def change(header, content):
        return header | {name: header[name] | entry}, content
    return change


def moved(begin, end, name="wpe.weight"):
    def change(header, content):
        first, last = header[name]["data_offsets"]
        return lie(name, data_offsets=[first + begin, last + end])(header, content)
    return change


@pytest.mark.parametrize("change, expected", [
    (lambda header, content: (header, content[:-1]), "cut short"),
    (lambda header, content: (header, content + b"\0"), "cut short, or sizes that are not true"),
    (moved(0, 4), "sizes that are not true"),
    (moved(-4, 0), "sizes that are not true"),
    (moved(10 ** 15, 10 ** 15), "sizes that are not true"),
    (moved(-10 ** 9, 0), "sizes that are not true"),
    (lie("wpe.weight", shape=[8, 12]), "wpe.weight: expected (12, 8)"),
    (lie("wpe.weight", shape=[96]), "wpe.weight: expected (12, 8)"),
    (lie("wpe.weight", shape=[12, 8, 1]), "wpe.weight: expected (12, 8)"),
    (lie("wpe.weight", shape=[10 ** 9, 10 ** 9]), "wpe.weight: expected (12, 8)"),
    (lie("wpe.weight", dtype="F16"), "wpe.weight: expected (12, 8) in F32, F16 or BF16, found (12"),
    (lie("wpe.weight", dtype="I64"), "found (12, 8) in 'I64', 384 bytes"),
    (lie("wpe.weight", dtype="F\n32"), r"found (12, 8) in 'F\n32', 384 bytes"),
    (lie("wpe.weight", dtype=["F32"]), "wpe.weight: expected (12, 8)"),
    (lie("wpe.weight", shape=None), "not a safetensors header"),
    (lie("wpe.weight", data_offsets=[0.0, 4.0]), "not a safetensors header"),
    (lie("wpe.weight", data_offsets=["a", "b"]), "not a safetensors header"),
    (lie("wpe.weight", data_offsets=[0]), "not a safetensors header"),
    (lambda header, content: ({"wte.weight": 1}, content), "not a safetensors header"),
    (lambda header, content: ({}, content), "not a safetensors header"),
    (lambda header, content: (b"[1, 2]", content), "not a safetensors header"),
    (lambda header, content: (b"[" * 100_000, content), "not a safetensors header"),
    (lambda header, content: (b"\xff\xfe", content), "not a safetensors header"),
    (lambda header, content: ({name.replace("ln_f", "ln_g"): entry for name, entry
                               in header.items()}, content), "'ln_g.bias': the network"),
    (lambda header, content: (header | {"score.weight": header.pop("ln_f.bias")}, content),
     "'score.weight': the network of config.json has none"),
])
def test_a_header_that_lies_is_refused(tmp_path, change, expected):
    write_weights(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", *change(*safetensors(tensors_of())))
    with pytest.raises(ValueError) as e:
        load_gpt2(str(tmp_path))
    assert expected in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"\1\0", b"\x80\2" + b"pickle" * 9, b"\xff" * 64,
                                     struct.pack("<Q", 2 ** 62) + b"{}"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    write_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors"):
        load_gpt2(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_refused(tmp_path, name):
    write_weights(tmp_path)
    (tmp_path / name).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{name}: cannot be read .No such file"):
        load_gpt2(str(tmp_path))


def test_mutated_files_load_or_are_refused(tmp_path):
    """Bytes of the header and of its length changed at random: a model of the right shape, or
    one line."""
    path, rng = write_weights(tmp_path) / "model.safetensors", random.Random(0)
    content, loaded = path.read_bytes(), 0
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            mutated[rng.randrange(end)] = rng.choice(b'0123456789",:[]{}-eE.\0' + b"wtF\xff")
        path.write_bytes(mutated)
        try:
            load_gpt2(str(tmp_path))
            loaded += 1
        except ValueError as e:
            assert "\n" not in str(e)
    assert loaded < 30


# --------------------------------------------------------------------------------------------------
# Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), PAIRS)


def nasty(rng: random.Random) -> str:
    words = ["the", " the", "thing", "don't", "'T", "<|endoftext|>", "é", "e\u0301", "日本", "🙂",
             "\x00", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "12", "½", "_", "!!", " ", "   ",
             "\n", "\n\n", "\r\n", "\t", "\ufeff", "\U0010ffff", "ÿ", "­", " " * 70, "th" * 90]
    return "".join(rng.choice(words) for _ in range(rng.randrange(20)))


def test_ids_are_those_of_tiktoken_itself(vocabulary, monkeypatch):
    """Against ranks that tiktoken reads from the same files, behind the space in front."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    tok = Tokenizer.load(str(vocabulary))
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(vocabulary / "merges.txt"), str(vocabulary / "vocab.json"))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    oracle = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(0)
    for text in (nasty(rng) for _ in range(1000)):
        assert tok.encode(text) == oracle.encode_ordinary(" " + text)
        assert tok.decode(tok.encode(text)) == text


def test_special_ids_stand_behind_the_ordinary_ones(vocabulary):
    tok = Tokenizer.load(str(vocabulary))
    n = 256 + len(PAIRS)
    assert (tok.pad, tok.sep, tok.eos, tok.mask, tok.vocab_size) == (n, n + 1, n + 2, n + 3, n + 4)
    assert tok.decode([*tok.encode("the"), tok.eos, 3]) == "the"
    assert max(tok.encode("<|endoftext|>")) < n  # in a text it is text


def test_cut_by_hand(tmp_path):
    """What may be a token: every part of these texts is one, so that pieces can be seen."""
    texts = {"don't  STOP'T\n\n 12ab!?": [" don", "'t", " ", " STOP", "'", "T", "\n\n", " 12", "ab",
                                          "!?"],
             "we'll've, it's\t1": [" we", "'ll", "'ve", ",", " it", "'s", "\t", "1"]}
    pairs = {}  # token -> two parts of it, the shorter tokens first
    for size in range(2, 7):
        for text in texts:
            raw = b" " + text.encode()
            for i in range(len(raw) - size + 1):
                pairs.setdefault(raw[i:i + size], (raw[i:i + 1], raw[i + 1:i + size]))
    tok = Tokenizer.load(str(write_vocabulary(tmp_path, [*pairs.values()])))
    for text, pieces in texts.items():
        assert [tok.bytes[i].decode() for i in tok.encode(text)] == pieces


@pytest.mark.parametrize("run", [" ", "\n", "x", "é", "!", "7", " x"])
def test_long_runs_do_not_stop_the_engine(vocabulary, run):
    """A million of them come back; shorter ones are cut nowhere."""
    tok = Tokenizer.load(str(vocabulary))
    text = run * 1_000_000 + "b"
    assert tok.decode(tok.encode(text)) == text
    text = "a" + run * (GPT2_LONGEST // len(run) - 2) + "b"
    assert tok.encode(text) == tok.encoding.encode_ordinary(" " + text)


def test_ranks_are_the_whole_tokenizer(vocabulary):
    """A checkpoint holds them: the folder is not needed any more."""
    tok = Tokenizer.load(str(vocabulary))
    again, rng = Tokenizer.load(tok.ranks), random.Random(1)
    for text in ["x" * (GPT2_LONGEST + 5), *(nasty(rng) for _ in range(100))]:
        assert again.encode(text) == tok.encode(text)


VOCAB = {"vocab.json", "merges.txt"}


@pytest.mark.parametrize("name, change, expected", [
    ("merges.txt", None, "merges.txt: cannot be read (No such file"),
    ("vocab.json", None, "vocab.json: cannot be read (No such file"),
    ("vocab.json", lambda text: text[:-1], "in UTF-8"),
    ("vocab.json", lambda text: "[" * 100_000, "in UTF-8"),
    ("vocab.json", lambda text: "[]", "expected an object of tokens and their ids"),
    ("vocab.json", lambda text: text.replace(": 7,", ": 7.0,"), "expected an object of tokens"),
    ("vocab.json", lambda text: text.replace(": 7,", ": 6,"), "do not fit together"),
    ("vocab.json", lambda text: text.replace(": 7,", ": -1,"), "do not fit together"),
    ("vocab.json", lambda text: text.replace("endoftext", "end"), "do not fit together"),
    ("vocab.json", lambda text: text.replace('"b": ', '"日": '), "do not fit together"),
    ("vocab.json", lambda text: text.replace('"b": ', '"bb": '), "do not fit together"),
    ("vocab.json", lambda text: '{"a": 0}', "do not fit together"),
    ("vocab.json", lambda text: "{}", "do not fit together"),
    ("merges.txt", lambda text: text.replace("t h\n", ""), "do not fit together"),
    ("merges.txt", lambda text: text + "a b\n", "do not fit together"),
    ("merges.txt", lambda text: "\n".join(text.splitlines()[::-1]), "do not fit together"),
    ("merges.txt", lambda text: "", "do not fit together"),
])
def test_a_vocabulary_that_does_not_fit_is_refused(vocabulary, tmp_path, name, change, expected):
    for file in VOCAB:
        shutil.copy(vocabulary / file, tmp_path)
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError) as e:
        Tokenizer.load(str(tmp_path))
    assert expected in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


# --------------------------------------------------------------------------------------------------
# A large vocabulary


def test_evaluation_takes_fewer_rows_of_a_large_vocabulary(vocabulary):
    """256 texts, as long as their logits fill no more than 2 ** 27 numbers."""
    tok = Tokenizer.load(str(vocabulary))
    for T, V, rows in ((24, 1000, 256), (128, 4000, 256), (64, 50_260, 41), (10 ** 6, 10 ** 6, 1)):
        tok.vocab_size = V
        assert evaluate.rows_at_once(policy.Policy(None, tok, T, torch.device("cpu"))) == rows


def test_a_checkpoint_is_written_without_a_second_copy(tmp_path):
    """Python's memory while 8 MB are saved."""
    state = {"a": torch.zeros(2_000_000), "b": [torch.ones(3)]}
    tracemalloc.start()
    policy.save(state, str(tmp_path / "x.pt"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["a"], state["a"])


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch, number, always):
    """From the n-th write on, or at that one alone: torch.save may say something else."""
    path, writes = tmp_path / "x.pt", [0]
    policy.save({"a": torch.zeros(3)}, str(path))
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, content):
            writes[0] += 1
            if writes[0] == number or always and writes[0] > number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)
    monkeypatch.setattr(policy, "open", lambda path, mode: io.BufferedWriter(Full(path, "w")),
                        raising=False)
    state = {f"a{i}": torch.zeros(300_000) for i in range(3)}
    with pytest.raises(policy.InputError, match="cannot be written .*No space left on device"):
        policy.save(state, str(path))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


# --------------------------------------------------------------------------------------------------
# --pretrained

SMALL = CONFIG | dict(vocab_size=257 + len(PAIRS), n_positions=64, n_embd=12, n_head=3)
RUN = ("--batch_size 4 --steps 4 --eval_every 2 --eval_size 6 --base_steps 4 --base_batch 8 --K 3 "
       "--device cpu").split()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of two layers, with all that is published with GPT-2."""
    return write_vocabulary(write_weights(tmp_path_factory.mktemp("gpt2"), SMALL), PAIRS)


@pytest.mark.parametrize("flags, expected", [
    ("--n_layer 3", "--n_layer: the setting masked, or a base that is there, fixes"),
    ("--vocab_size 1000", "--vocab_size: the setting"),
    ("--max_len 64", "--max_len 64: expected less than block_size = 64"),
    ("--init x.pt", "the setting masked, or a base that is there, fixes"),
    ("--pretrained nowhere", "--pretrained nowhere/config.json: cannot be read (No such file"),
])
def test_flags_that_do_not_fit_are_refused(gpt2, folder, tmp_path, capsys, flags, expected):
    words = ["--mode", "train", "--data", folder, "--out", str(tmp_path / "out"), *RUN]
    line = refused(capsys, *words, "--pretrained", str(gpt2), *flags.split())
    assert expected.format(gpt2) in line


@pytest.mark.parametrize("name, expected", [
    ("merges.txt", "merges.txt: cannot be read"), ("model.safetensors", "in several files"),
    ("config.json", "config.json: cannot be read")])
def test_a_folder_that_lacks_a_file_is_refused(gpt2, folder, tmp_path, capsys, name, expected):
    shutil.copytree(gpt2, tmp_path / "gpt2")
    (tmp_path / "gpt2" / name).unlink()
    for mode in ("train", "compare"):
        words = ["--mode", mode, "--data", folder, "--out", str(tmp_path / mode), *RUN]
        assert expected in refused(capsys, *words, "--pretrained", str(tmp_path / "gpt2"))


def test_a_vocabulary_of_another_model_is_refused(gpt2, folder, tmp_path, capsys):
    shutil.copytree(gpt2, tmp_path / "gpt2")
    write_vocabulary(tmp_path / "gpt2", PAIRS[:-1])
    line = refused(capsys, "--mode", "train", "--data", folder, "--out", str(tmp_path / "out"),
                   *RUN, "--pretrained", str(tmp_path / "gpt2"))
    assert "vocab.json has 271 tokens, the model 272" in line


def typed(gpt2, folder, out, *flags) -> list[str]:
    return ["--pretrained", str(gpt2), "--data", folder, "--out", str(out), *RUN, *flags]


def test_the_base_starts_from_the_weights_and_rates_are_small(gpt2, folder, tmp_path):
    """The network is the folder's, whatever the data set recommends; rates may be given."""
    cfg = train.make_config(dict(pretrained=str(gpt2), lr=0.01))
    shape = cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.vocab_size
    assert shape == (2, 3, 12, 64, 275)
    assert cfg.base_lr == 1e-4 and cfg.lr == 0.01 and train.make_config({}).base_lr > 1e-3
    cfg = train.base_config(train.make_config(dict(pretrained=str(gpt2), data=folder)))
    assert cfg.n_head == 3
    fresh = train.Work(cfg).new_policy(cfg)
    assert same(fresh.model.state_dict(), load_gpt2(str(gpt2)).state_dict())
    assert fresh.tok.vocab_size == 275 and not fresh.model.config.dropout


def table(out) -> list[dict]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_from_gpt2_to_a_finished_masked_run(gpt2, folder, tmp_path, capsys):
    """In train mode and in compare the same runs; resumed, from a folder that was moved, too."""
    alone, both, moved_to = tmp_path / "alone", tmp_path / "both", tmp_path / "elsewhere"
    train.main(typed(gpt2, folder, alone, "--mode", "train", "--setting", "masked"))
    train.main(typed(gpt2, folder, both, "--settings", "masked", "refresh", "online"))
    assert [row["name"] for row in table(both)] == ["base", "online", "masked", "refresh"]
    assert all(math.isfinite(row["test_reward"]) for row in table(both))
    assert same(weights(alone / "ckpt.pt"), weights(both / "masked/ckpt.pt"))
    assert [line["step"] for line in metrics(alone)] == [0, 1, 2, 3, 4]
    base = state(alone / "base/best.pt")
    assert base["gpt"]["n_head"] == 3 and base["tokenizer"] == Tokenizer.load(str(gpt2)).ranks
    assert not same(weights(alone / "ckpt.pt"), base["model"])

    shutil.copytree(gpt2, moved_to)
    row = table(alone)
    train.main(typed(moved_to, folder, alone, "--mode", "train", "--setting", "masked"))
    assert table(alone) == row
    sample = ["--mode", "sample", "--init", str(alone / "best.pt"), "--K", "2"]
    train.main(sample)  # a checkpoint needs no folder

    write_weights(moved_to, SMALL, dtype="BF16")  # other weights are another base
    line = refused(capsys, *typed(moved_to, folder, both, "--settings", "masked"))
    assert "holds a run of another config (data_hash" in line
