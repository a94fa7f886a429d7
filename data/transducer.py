r"""Regular expressions as one table, so that a device that knows no strings can search a million texts at once.

`build` makes a machine that reads a text a character at a time and looks up (state, character) -> (next state, what has
been found). It finds what `re.finditer` of the patterns joined by | finds: from the left, of two patterns that match at
one place the upper one, of one pattern the match that a backtracking search meets first, and never two that overlap.

A state is all that such a search could still be doing: an ordered list of threads, each at its place in a pattern
(Thompson 1968; Cox 2009). A thread that was started later, or took a later branch, counts only if those before it fail;
what it has found meanwhile is pending, and is given out as soon as all threads agree on it. Bounded patterns keep the list
bounded, so the states are finitely many (about 3,000 for the slots of E2E, made in a second).

Understood: characters, [sets] of them, (?:groups), |, ?, {0,n}, \b, and (?!…) at the end of a branch, provided that no other
match begins in what that branch matches or forbids. Left out: everything else that regular expressions have.
"""
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

LETTER, OTHER = "_", "."  # stand for all letters and digits that no pattern names, and for every other character


@dataclass(frozen=True)
class Transducer:
    kinds: dict[str, int]  # C kinds of characters, by number: a space, those that the patterns name, LETTER, OTHER
    next: np.ndarray   # (states,C) the next state; the first state is 0
    found: np.ndarray  # (states,C) which row of `counts` is found on the way
    counts: np.ndarray  # (rows,patterns) how often each pattern; row 0 is nothing


def is_letter(character: str) -> bool:
    r"""What \w says."""
    return character.isalnum() or character == "_"


def kind_of(character: str, kinds: dict[str, int]) -> int:
    """Which of a transducer's kinds a character is; white space of any sort is a space."""
    if character in kinds:
        return kinds[character]
    return kinds[" " if character.isspace() else LETTER if is_letter(character) else OTHER]


# ---- A pattern as a tree: ("set", characters), ("edge",), ("not", tree), ("some", most, tree), ("all", trees), ("or", trees)

def parse(pattern: str) -> tuple:
    tree, end = parse_branches(pattern, 0)
    if end < len(pattern):
        raise ValueError(f"{pattern[:end]} … {pattern[end:]}: unmatched )")
    return tree


def parse_branches(p: str, at: int) -> tuple[tuple, int]:
    """Up to the end, or to the ) that closes this group -> tree, where it ended."""
    branches = [[]]
    while at < len(p) and p[at] != ")":
        if p[at] == "|":
            branches.append([])
            at += 1
        else:
            item, at = parse_item(p, at)
            branches[-1].append(item)
    return ("or", tuple(("all", tuple(items)) for items in branches)), at


def parse_item(p: str, at: int) -> tuple[tuple, int]:
    if p.startswith(("(?:", "(?!"), at):
        tree, end = parse_branches(p, at + 3)
        if end == len(p):
            raise ValueError(f"{p[:at]} … {p[at:]}: unmatched (")
        item, at = tree if p[at + 2] == ":" else ("not", tree), end + 1
    elif p[at] == "[" and (characters := re.match(r"\[([^\]\[^\\._-]+)\]", p[at:])):
        item, at = ("set", frozenset(characters[1])), at + characters.end()
    elif p.startswith(r"\b", at):
        item, at = ("edge",), at + 2
    elif p[at] in r"._*+^$\(){}[]?":
        raise ValueError(f"{p[:at]} … {p[at:]}: not understood; see the head of data/transducer.py")
    else:
        item, at = ("set", frozenset(p[at])), at + 1
    if item[0] == "not" and p[at:at + 1] not in ("", "|", ")"):
        raise ValueError(f"{p[:at]} … {p[at:]}: not understood; expected the end of a branch behind (?!…)")
    if times := re.match(r"\?|\{0,(\d+)\}", p[at:]):
        return ("some", int(times[1] or 1), item), at + times.end()
    return item, at


def may_be_empty(tree: tuple) -> bool:
    what, *rest = tree
    if what == "all":
        return all(map(may_be_empty, rest[0]))
    return any(map(may_be_empty, rest[0])) if what == "or" else what != "set"


# ---- The search as a program: numbered nodes (what, value, node that follows)

class Program:
    def __init__(self, patterns: list[str], barred: str):
        self.nodes, self.number, self.steps, self.barred = [], {}, {}, barred
        trees = [parse(pattern) for pattern in patterns]
        for pattern, tree in zip(patterns, trees):
            if may_be_empty(tree):
                raise ValueError(f"{pattern}: expected a pattern that matches at least one character")
        self.start = self.node("or", tuple(self.add(tree, self.node("found", (i,))) for i, tree in enumerate(trees)))

    def node(self, what: str, value=None, then: int | None = None) -> int:
        """Equal nodes are one, or there would be many more states."""
        key = (what, value, then)
        if key not in self.number:
            self.number[key] = len(self.nodes)
            self.nodes.append(key)
        return self.number[key]

    def add(self, tree: tuple, then: int) -> int:
        """Nodes that match a tree and go on at `then` -> the first of them."""
        what, *rest = tree
        if what == "set":
            return self.node("set", rest[0], then)
        if what == "edge":
            return self.node("edge", None, then)
        if what == "or":
            return self.node("or", tuple(self.add(branch, then) for branch in rest[0]))
        if what == "some":  # greedy: once more, if that is possible
            more = then
            for _ in range(rest[0]):
                more = self.node("or", (self.add(rest[1], more), then))
            return more
        items = rest[0]
        if items and items[-1][0] == "not":  # with what must not follow it: a match of nothing, tried first
            kept, (_, forbidden) = items[:-1], items[-1]
            return self.node("or", (self.add(("all", (*kept, forbidden)), self.node("found", ())),
                                    self.add(("all", kept), then)))
        for item in reversed(items):
            then = self.add(item, then)
        return then

    def step(self, node: int, letter_before: bool, kind: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """A thread at a node reads a character -> the nodes it may then be at, the preferred one first; and, after those,
        what it found before that character, or None."""
        key = (node, letter_before, kind)
        if key not in self.steps:
            nodes, found, stack, seen = [], None, [node], set()
            while stack and found is None:
                node = stack.pop()
                if node not in seen:
                    seen.add(node)
                    what, value, then = self.nodes[node]
                    if what == "set" and kind in value:
                        nodes.append(then)
                    elif what == "edge" and letter_before != is_letter(kind):
                        stack.append(then)
                    elif what == "or":
                        stack.extend(reversed(value))
                    elif what == "found":
                        found = value
            self.steps[key] = tuple(nodes), found
        return self.steps[key]


@dataclass(frozen=True)
class State:
    before: str = " "                       # the last character, as far as it matters
    threads: tuple[tuple[int, tuple], ...] = ()  # (node, what is pending), the preferred thread first
    pending: tuple[int, ...] = ()           # of the thread that searches on, after all others


def read(program: Program, state: State, kind: str) -> tuple[State, tuple[int, ...]]:
    """The next state, and the patterns that have been found for certain."""
    if kind == " " == state.before:  # a run of spaces is one space
        return state, ()
    letter_before = is_letter(state.before)
    threads, searching = {}, state.pending
    for node, pending in state.threads:
        nodes, found = program.step(node, letter_before, kind)
        for n in nodes:
            threads.setdefault(n, pending)
        if found is not None:  # the search goes on from here; less preferred threads are given up
            searching = pending + found
            break
    if not letter_before and state.before not in program.barred:
        for n in program.step(program.start, letter_before, kind)[0]:
            threads.setdefault(n, searching)
    certain = Counter(searching)
    for pending in threads.values():
        certain &= Counter(pending)

    def rest(pending: tuple) -> tuple:
        return tuple(sorted((Counter(pending) - certain).elements()))
    before = kind if kind == " " or kind in program.barred else LETTER if is_letter(kind) else OTHER
    return (State(before, tuple((n, rest(pending)) for n, pending in threads.items()), rest(searching)),
            tuple(sorted(certain.elements())))


def build(patterns: list[str], barred: str) -> Transducer:
    """Of patterns over lower-case text with single spaces. No match begins behind a letter or a `barred` character. A match
    is given out once the character behind it is read, so read one OTHER behind the text. Raises ValueError for a pattern
    that is not understood, or could match nothing."""
    program = Program(patterns, barred)
    named = set(barred).union(*(value for what, value, _ in program.nodes if what == "set"))
    kinds = [" ", *sorted(named - {" "}), LETTER, OTHER]
    number, rows = {State(): 0}, {(): 0}
    next_, found = [], []
    for state in (states := [State()]):  # which grows meanwhile
        there = [read(program, state, kind) for kind in kinds]
        for after, _ in there:
            if after not in number:
                number[after] = len(states)
                states.append(after)
        next_.append([number[after] for after, _ in there])
        found.append([rows.setdefault(what, len(rows)) for _, what in there])
    counts = np.array([np.bincount(np.array(row, int), minlength=len(patterns)) for row in rows])
    return Transducer({kind: i for i, kind in enumerate(kinds)}, np.array(next_), np.array(found), counts)
