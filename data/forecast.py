"""The embedded task: weather records to forecasts, from a seeded generator. No download, no file.

A source is a record: place | day part | sky | temperature | wind direction and speed. The *drafts*
(target and static) state each of the five facts vaguely about three times in four: imitating them
gives fluent text that says little. The *references* state every fact precisely, in each of three
orders. The reward compares with the references, so it pays for facts. Some vague phrases have the
length of the precise one ("wind from the sea at some point", "wind from the north at 20 knots"),
so words can be exchanged in place, sometimes two at a time; others are shorter or longer and need
a new sentence.

    Oslo | morning | heavy rain | 12 | north 20
    draft      Expect heavy rain and mild temperatures around here later on, with some wind.
    reference  Expect heavy rain and 12 degrees in Oslo this morning, with wind from the north at
               20 knots.

Two data sets: `forecast` is for development; `forecast2` (vaguer, with other phrases and orders)
repeats every headline, and no flag was tuned on it. Both are frozen: a test pins the hash of their
output.
"""
import random
import re
from dataclasses import dataclass

from data import Record

# Tuned flags: "" for every setting, then what differs in one.
FLAGS = {
    "": dict(n_layer=2, init_std=0.06, lr=2.4e-3, mle_weight=0.1, kl_weight=0.0),
    "mle": dict(steps=60),
    "offline": dict(steps=60, num_static=3, lr=1.2e-3),
    "online": dict(steps=30, K=4, mle_weight=0.02),
    "full": dict(steps=20, K=4, lr=1.2e-3),
    "tail": dict(steps=30, K=4, p_m=0.5, reuse=1, adv_scale="source", mle_weight=0.02,
                 stored="best"),
    "masked": dict(steps=40, K=64, stored="best"),
    "refresh": dict(steps=60, K=64, stored="best", refresh=8),
}

PLACES = ("Oslo Bergen Lisbon Porto Madrid Paris Lyon Geneva Vienna Prague Berlin Hamburg Dublin "
          "Cork Turin Naples").split()
PARTS = ("morning", "afternoon", "evening", "night")
SKIES = ("clear skies", "broken clouds", "light rain", "heavy rain", "wet snow", "dense fog",
         "bright sun", "soft hail")
DIRECTIONS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")


@dataclass(frozen=True)
class Grammar:
    seed: int
    vague_rate: float  # how often a draft states a fact vaguely
    orders: tuple[str, ...]  # sentences, the facts' phrases in braces
    precise: dict[str, str]  # fact -> its precise phrase
    vague: dict[str, tuple[str, ...]]


GRAMMARS = {
    "forecast": Grammar(
        seed=1,
        vague_rate=0.75,
        orders=("{part} {place} we expect {sky} with {temperature} and {wind}.",
                "expect {sky} and {temperature} {place} {part}, with {wind}.",
                "there will be {wind} {place} {part}, {temperature} and {sky}."),
        precise=dict(
            part="this {part}",
            place="in {place}",
            sky="{sky}",
            temperature="{temperature} degrees",
            wind="wind from the {direction} at {speed} knots"),
        vague=dict(
            part=("later on", "at some point", "this time"),
            place=("in town", "around here", "in the area"),
            sky=("mixed weather", "some weather", "a bit of everything"),
            temperature=("mild temperatures", "the usual temperatures"),
            wind=("wind from the sea at some point", "a little wind at times", "some wind"))),
    "forecast2": Grammar(
        seed=2,
        vague_rate=0.85,
        orders=("{place} will have {sky} {part}, {temperature} and {wind}.",
                "look for {temperature} and {wind} in {place} {part}, with {sky}.",
                "{part} {place} can count on {wind} and {sky} at {temperature}."),
        precise=dict(
            part="in the {part}",
            place="{place}",
            sky="{sky}",
            temperature="{temperature} degrees Celsius",
            wind="{speed} knots from the {direction}"),
        vague=dict(
            part=("during the day", "in the coming hours", "once more"),
            place=("our town", "this region", "the coast"),
            sky=("changing conditions", "a mixed sky"),
            temperature=("average values", "some warmth today"),
            wind=("some air from the sea", "a breeze", "a bit of a breeze"))),
}
SIZES = {"train": 4000, "val": 200, "test": 400}
DRAFTS = 3  # per record

_SOURCE = re.compile(r"(?P<place>\w+) \| (?P<part>\w+) \| (?P<sky>[\w ]+) \| (?P<temperature>\d+) "
                     r"\| (?P<direction>\w+) (?P<speed>\d+)")
_SAID = dict(  # how to recognize a precise phrase of either grammar
    place="{place}", part="{part}", sky="{sky}", temperature="{temperature} degrees",
    direction="from the {direction}", speed="{speed} knots")


def render(order: str, phrases: dict[str, str]) -> str:
    text = order.format(**phrases)
    return text[0].upper() + text[1:]


def make_record(grammar: Grammar, rng: random.Random) -> Record:
    fact = dict(
        place=rng.choice(PLACES),
        part=rng.choice(PARTS),
        sky=rng.choice(SKIES),
        temperature=rng.randrange(1, 31),
        direction=rng.choice(DIRECTIONS),
        speed=rng.randrange(5, 45, 5))
    precise = {name: phrase.format(**fact) for name, phrase in grammar.precise.items()}
    drafts = []
    for _ in range(DRAFTS):
        phrases = {}
        for name in precise:
            vague = rng.random() < grammar.vague_rate
            phrases[name] = rng.choice(grammar.vague[name]) if vague else precise[name]
        drafts.append(render(rng.choice(grammar.orders), phrases))
    source = "{place} | {part} | {sky} | {temperature} | {direction} {speed}".format(**fact)
    references = [render(order, precise) for order in grammar.orders]
    return Record(source, references, target=drafts)


def generate(name: str = "forecast") -> dict[str, list[Record]]:
    """All three splits, the same on every machine; no source occurs twice. Raises KeyError for a
    name that is not in GRAMMARS."""
    grammar = GRAMMARS[name]
    rng, seen, dataset = random.Random(grammar.seed), set(), {}
    for split, size in SIZES.items():
        records = dataset[split] = []
        while len(records) < size:
            record = make_record(grammar, rng)
            if record.source not in seen:
                seen.add(record.source)
                records.append(record)
    return dataset


def stated(text: str, source: str) -> dict[str, bool] | None:
    """Fact -> does the text state it correctly? None when the source is not one of this task."""
    record = _SOURCE.fullmatch(source)
    if record is None:
        return None
    words = " " + " ".join(re.findall(r"\w+", text.lower())) + " "
    return {name: f" {phrase.format(**record.groupdict()).lower()} " in words
            for name, phrase in _SAID.items()}
