"""Rewards from token ids against rewards of the decoded strings; the table of slot patterns against Python's re."""
import re

import numpy as np
import pytest
import torch

import train
from data import Batch, InputError
from data.characters import NOTHING, Characters, characters_of
from data.reward_ids import PAIRS, RewardIds, slot_ids
from data.rewards import _IDLE, BARRED, LEXICON, load_reward, rouge, slot
from data.tokenizer import Tokenizer
from data.transducer import OTHER, build, is_letter, kind_of, may_be_empty, parse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def strings(characters: torch.Tensor) -> list[str]:
    return ["".join(map(chr, (c for c in row if c != NOTHING))) for row in characters.tolist()]


def random_ids(top: int, N: int, T: int, tok: Tokenizer, generator) -> torch.Tensor:
    """Ids below `top` (N,T), PAD behind a random length, 0 included."""
    ids = torch.randint(0, top, (N, T), generator=generator)
    return torch.where(torch.arange(T) < torch.randint(0, T + 1, (N, 1), generator=generator), ids, tok.pad)


# ---- Characters

def test_characters_are_those_of_the_decoded_text():
    """Every sort of character, cut by tokens anywhere; and random bytes, where a broken sequence may count more than once."""
    rng = np.random.default_rng(0)
    sorts = [(32, 127), (0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x12A, 0x136), (0x2126, 0x212C)]
    texts = ["".join(chr(rng.integers(*sorts[rng.integers(len(sorts))])) for _ in range(rng.integers(0, 40))) for _ in range(300)]
    tok = Tokenizer.train(["the İstanbul café is cheap, isn't it? £20-25 日本 pounds"] * 3, 300)
    read = Characters(tok, DEVICE)
    rows = [tok.encode(text) for text in texts]
    ids = torch.full((len(rows), 1 + max(map(len, rows))), tok.pad)
    for row, i in zip(rows, ids):
        i[:len(row)] = torch.tensor(row)

    def same_sigma(text):  # which of its two forms a Greek sigma has depends on what follows it
        return text.replace("ς", "σ")
    assert [same_sigma(text).removeprefix(" ") for text in strings(read(ids.to(DEVICE)))] == [same_sigma(text.lower()) for text in texts]
    assert strings(characters_of(texts)) == [text.lower() for text in texts]
    ids = random_ids(256, 400, 12, tok, torch.Generator().manual_seed(0))
    got = [re.sub("\ufffd+", "\ufffd", text) for text in strings(read(ids.to(DEVICE)))]
    expected = [re.sub("\ufffd+", "\ufffd", tok.decode(row).lower()) for row in ids.tolist()]
    assert [text.strip() for text in got] == [text.strip() for text in expected]


def test_all_of_utf8_by_its_edges():
    """The first and last code point of each length; too long forms, surrogates, what is beyond, and what is cut off."""
    tok, read = (tok := Tokenizer.train([""], 260)), Characters(tok, DEVICE)
    for raw in ("00 7F", "C2 80 DF BF", "E0 A0 80 ED 9F BF EE 80 80 EF BF BF", "F0 90 80 80 F4 8F BF BF", "C0 80 C1 BF", "E0 9F BF",
                "ED A0 80 ED BF BF", "F0 8F BF BF", "F4 90 80 80", "F8 88 80 80 80", "80 BF", "C3", "E2 80", "F0 9F 98", "C3 41", "E2 80 41"):
        text = bytes.fromhex(raw).decode("utf-8", "replace").lower()
        got, = strings(read(torch.tensor([[*bytes.fromhex(raw), tok.eos]], device=DEVICE)))
        assert re.sub("\ufffd+", "\ufffd", got) == re.sub("\ufffd+", "\ufffd", text), raw


# ---- ROUGE

def test_rouge_from_ids_is_rouge_of_the_texts():
    """Random ids, so any bytes in any order, words across tokens, empty texts, up to four references; on a GPU where
    there is one. Words with a dotted capital I, a Kelvin sign and beside accents stand in the references."""
    tok = Tokenizer.train(["the İstanbul café is cheap, isn't it? 20-25 pounds"] * 3, 300)
    ids_reward, generator = RewardIds(tok, DEVICE), torch.Generator().manual_seed(0)

    def score(ids, references):
        return ids_reward(["rouge"], ids, references, [""] * len(references))["rouge"].cpu().numpy()
    for top in (tok.pad, 128):
        for N, T in ((1, 1), (7, 3), (40, 30), (25, 60)):
            ids = random_ids(top, N, T, tok, generator)
            texts = [tok.decode(row) for row in ids.tolist()]
            references = [[texts[(i + k) % N] + " İl a a b'a 5K" for k in range(1 + i % 3)] + [texts[-i] or "x"] for i in range(N)]
            got = score(ids[:, None].to(DEVICE), references)[:, 0]
            np.testing.assert_array_equal(got, rouge(texts, references).mean(1))
            assert N < 25 or 0 < got.mean() < 1
            several = score(ids.to(DEVICE).expand(3, N, T), [texts[:2] + ["x"], ["x"], references[0]])  # K texts a row
            np.testing.assert_array_equal(several[0], rouge(texts, [texts[:2] + ["x"]] * N).mean(1))
            np.testing.assert_array_equal(several[2], rouge(texts, [references[0]] * N).mean(1))


def test_words_with_signs_from_other_alphabets():
    """A Kelvin sign is a k in lower case; a dotted capital I is an i and a dot that ends the word."""
    tok = Tokenizer.train(["a"], 260)
    ids = torch.tensor([tok.encode("5\u212aelvin İx naïve") + [tok.eos]], device=DEVICE)
    reference = ["5kelvin i x na ve"]
    got = RewardIds(tok, DEVICE)(["rouge"], ids[:, None], [reference], [""])["rouge"]
    assert got.item() == rouge(["5\u212aelvin İx naïve"], [reference]).mean() == 1


# ---- Patterns as a table

def found(machine, text: str) -> list[int]:
    """How often each pattern, walking through the table."""
    state, total = 0, np.zeros(machine.counts.shape[1], int)
    for kind in [*(kind_of(c, machine.kinds) for c in text), machine.kinds[OTHER]]:
        total += machine.counts[machine.found[state, kind]]
        state = machine.next[state, kind]
    return total.tolist()


def found_by_re(patterns: list[str], text: str) -> list[int]:
    whole = re.compile(r"(?<![\w£])(?:%s)" % "|".join(f"(?:{p})(?P<_{i}>)" for i, p in enumerate(patterns)))
    names = [int(match.lastgroup[1:]) for match in whole.finditer(text)]
    return [names.count(i) for i in range(len(patterns))]


def random_pattern(rng, depth: int = 3) -> str:
    kind = rng.integers(8) if depth else 0
    if kind <= 2:
        return str(rng.choice(["a", "b", "c", " ", "[ab]", "ab", "£", "a b"]))
    if kind <= 4:
        return random_pattern(rng, depth - 1) + str(rng.choice(["", " ", r"\b"])) + random_pattern(rng, depth - 1)
    if kind == 5:
        return f"(?:{random_pattern(rng, depth - 1)})" + str(rng.choice(["?", "{0,2}", "{0,3}"]))
    return f"(?:{random_pattern(rng, depth - 1)}|{random_pattern(rng, depth - 1)})"


@pytest.mark.parametrize("seed", range(40))
def test_the_table_finds_what_re_finds(seed):
    """Random patterns over three letters, a space and a pound sign, in random texts."""
    rng, patterns = np.random.default_rng(seed), []
    while len(patterns) < 3:
        p = random_pattern(rng)
        patterns += [p] * (not may_be_empty(parse(p)))
    machine = build(patterns, "£")
    for _ in range(60):
        text = "".join(rng.choice([*"aaabbbcc £.é"], rng.integers(1, 30)))
        single = " ".join(text.split())
        assert found(machine, single) == found_by_re(patterns, single), (patterns, text)
        assert found(machine, single.replace(" ", "  ")) == found_by_re(patterns, single)  # a run of spaces is one


def test_the_preferred_thread_keeps_its_own_findings():
    """Behind `a b`, and behind `a cd`, two threads wait for the same x: one has read it all, the other has found `a`, and then
    read what follows."""
    for first, text, expected in (("(?:a )?b x", "a b x", [1, 0]), ("(?:a )?b x", "a b y", [0, 1]), ("(?:a )?b x", "a a b x", [1, 1]),
                                  ("(?:a c[de]|c[df]) x", "a cd x", [1, 0]), ("(?:a c[de]|c[df]) x", "a cf x", [1, 1])):
        assert found(build([first, "a"], ""), text) == found_by_re([first, "a"], text) == expected, text


def test_what_must_not_follow():
    patterns = [r"adults?\b(?! and| or)|kids", "bar"]
    for text in ("adults", "adult and kids", "adults or", "adultsor", "adults an", "adult, and bar", "adults oriental kids"):
        assert found(build(patterns, "£"), text) == found_by_re(patterns, text), text


@pytest.mark.parametrize("pattern", ["a*", "a+", "a.b", "^a", "(a)", "a{2}", "a{1,2}", "a)", "(?:a", r"\w", "a?", r"\b", "a|", "a_", "[a-z]",
                                     "[^a]", r"[\w]", "[a.]", "[a_]", "[]", "(?!a)b", "a(?! b)?", "a(?:(?! b)c)", "a(?!b){0,2}"])
def test_patterns_that_are_not_understood_are_refused(pattern):
    with pytest.raises(ValueError, match="not understood|unmatched|at least one"):
        build([pattern], "")


# ---- Slots

def sample_text(tree: tuple, rng) -> str:
    """A random string that a pattern's tree matches (edges aside)."""
    what, *rest = tree
    if what == "set":
        return str(rng.choice(sorted(rest[0])))
    if what == "or":
        return sample_text(rest[0][rng.integers(len(rest[0]))], rng)
    if what == "some":
        return "".join(sample_text(rest[1], rng) for _ in range(rng.integers(rest[0] + 1)))
    if what == "all":
        return "".join(sample_text(item, rng) for item in rest[0])
    return sample_text(rest[0], rng) if what == "not" and rng.random() < 0.5 else ""


def slot_texts(n: int, longest: int, rng) -> list[str]:
    """Strings made of what the patterns match, of idle words and of noise; some broken off inside, some in capitals."""
    trees, texts = [parse(pattern) for _, _, pattern in LEXICON], []
    noise = ["the", "is", "and", "in", "it", " and", " or", "-", "’", "'", "£", ",", ".", "\n", "\xa0", "  ", "ß", "日", "20", "5", "out of",
             *["xname"] * 5]
    for _ in range(n):
        parts = []
        for _ in range(rng.integers(0, longest + 1)):
            part = sample_text(trees[rng.integers(len(trees))], rng) if rng.random() < 0.7 else str(rng.choice(noise))
            parts += [part[:rng.integers(len(part) + 1)] if rng.random() < 0.1 else part, str(rng.choice([" ", " ", " ", "", ", ", "-"]))]
        text = "".join(parts).replace(" ", str(rng.choice([" ", " ", "  ", "-", " - ", "\n"]))).replace("'", str(rng.choice(["'", "’"])))
        texts.append(text.title() if rng.random() < 0.2 else text)
    return texts


def random_source(rng) -> str:
    chosen = {s: v for s, v in (PAIRS[i] for i in rng.permutation(len(PAIRS))[:rng.integers(1, 12)])}
    return ", ".join(f"{s}[{v}]" for s, v in chosen.items())


@pytest.mark.parametrize("longest", [1, 3, 8, 20])
def test_slots_from_characters_are_slots_of_the_texts(longest):
    """Texts that are full of what the patterns match, against random meaning representations, four texts each."""
    rng = np.random.default_rng(longest)
    texts, sources = slot_texts(400, longest, rng), [random_source(rng) for _ in range(100)]
    got = slot_ids(characters_of(texts).to(DEVICE).view(100, 4, -1), sources).cpu().numpy()
    expected = slot(texts, [], [source for source in sources for _ in range(4)]).reshape(100, 4)
    np.testing.assert_array_equal(got, expected)
    assert 0 < expected.mean() < 1 or longest == 1


def test_no_pattern_begins_with_an_idle_word():
    """The strings' search skips those words; the table does not, and need not."""
    machine = build([pattern for _, _, pattern in LEXICON], BARRED)

    def behind(text):
        state = 0
        for c in text:
            state = machine.next[state, kind_of(c, machine.kinds)]
        return state
    for word in "the is and in it that serve serves with has located food offers providing provides called its there which".split():
        assert re.match(_IDLE, word)
        for after in machine.kinds:  # as behind any word that is in no pattern, whatever follows but more letters
            assert is_letter(after) or behind(word + after) == behind("zzz" + after), word + after


def test_values_that_the_patterns_lack_are_left_to_strings():
    """A name put back, a cuisine of another country: no values from ids, and train.score takes the strings."""
    tok = Tokenizer.train(["Cotto serves Thai food, xname, riverside"] * 3, 300)
    ids = torch.tensor([[tok.encode("Cotto serves Thai food") + [tok.eos]]])
    ids_reward = RewardIds(tok, "cpu")
    assert ids_reward(["slot"], ids, [["x"]], ["name[Cotto], food[Thai]"]) == {}
    assert ids_reward(["slot", "rouge", "bleu"], ids, [["x"]], ["name[xname]"]).keys() == {"rouge", "slot"}
    policy = train.Policy(None, tok, 9, torch.device("cpu"))
    for source, expected in (("name[Cotto], food[Thai]", 1), ("name[Cotto], food[Thai], area[riverside]", 2 / 3), ("name[xname], food[Chinese]", 0)):
        batch = Batch(None, None, ids, None, None, None, [[["x"]]], [source])
        for policy.ids in (None, ids_reward):
            assert train.score(load_reward("slot"), policy, ids, batch).item() == pytest.approx(expected)
    with pytest.raises(InputError, match="expected slots such as"):
        ids_reward(["slot"], ids, [["x"]], ["Oslo | morning"])
