"""The trie of prefixes beside an obvious one: a dict of whole prefixes, with the time of each one's last use."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as some

from phi3_jax.infer.serving.engine.prefixes import Prefixes

CHUNK, MOST = 2, 20


@dataclasses.dataclass
class Entry:
    value: object
    size: int
    time: int


class Obvious:
    """Entries by (kind, all tokens up to the chunk's end); walks are lists of [kind, prompt, chunks, is it stuck]."""

    def __init__(self):
        self.entries, self.walks, self.time, self.evicted = {}, [], 0, 0

    def size(self):
        return sum(entry.size for entry in self.entries.values())

    def path(self, walk):
        kind, prompt, count, _ = walk
        return [(kind, prompt[: (i + 1) * CHUNK]) for i in range(count)]

    def use(self, walk):
        self.time += 1
        for key in self.path(walk):
            self.entries[key].time = self.time

    def open(self, kind, prompt):
        walk = [kind, prompt, 0, False]
        while (walk[2] + 1) * CHUNK < len(prompt) and (kind, prompt[: (walk[2] + 1) * CHUNK]) in self.entries:
            walk[2] += 1
        self.walks.append(walk)
        self.use(walk)
        return walk

    def add(self, walk, value, size):
        if walk[3]:
            return False
        key = (walk[0], walk[1][: (walk[2] + 1) * CHUNK])
        if key not in self.entries:
            used = {key for walk in self.walks for key in self.path(walk)}
            if sum(self.entries[key].size for key in used) + size > MOST:
                walk[3] = True
                return False
            while self.size() + size > MOST:
                inner = {(kind, tokens[:-CHUNK]) for kind, tokens in self.entries}
                leaves = [key for key in self.entries if key not in inner and key not in used]
                del self.entries[min(leaves, key=lambda key: self.entries[key].time)]
                self.evicted += 1
            self.entries[key] = Entry(value, size, 0)
        walk[2] += 1
        self.use(walk)
        return True


class BesideTheObvious(stateful.RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ours, self.theirs, self.open = Prefixes(CHUNK, MOST), Obvious(), []
        self.hits = self.misses = self.reused = self.values = 0

    @stateful.rule(kind=some.sampled_from(["short", "long"]), prompt=some.lists(some.integers(0, 1), max_size=9))
    def look_up(self, kind, prompt):
        walk, other = self.ours.walk(prompt, kind), self.theirs.open(kind, tuple(prompt))
        assert walk.values == [self.theirs.entries[key].value for key in self.theirs.path(other)]
        assert walk.tokens == CHUNK * len(walk.values) <= max(0, len(prompt) - 1)
        self.hits, self.reused = self.hits + bool(walk.values), self.reused + walk.tokens
        self.misses += len(prompt) > CHUNK and not walk.values
        self.open.append((walk, other))

    @stateful.precondition(lambda self: self.open)
    @stateful.rule(which=some.integers(0, 99), size=some.integers(1, 9), count=some.integers(1, 4))
    def add(self, which, size, count):
        walk, other = self.open[which % len(self.open)]
        for _ in range(count):
            if walk.tokens + CHUNK > len(other[1]):
                with pytest.raises(ValueError, match="no whole chunk after"):
                    walk.add(lambda: None, size)
                return
            self.values += 1
            value, is_made = self.values, []
            is_known = (other[0], other[1][: walk.tokens + CHUNK]) in self.theirs.entries
            kept = walk.add(lambda value=value, is_made=is_made: is_made.append(0) or value, size)
            assert kept == self.theirs.add(other, value, size)
            assert bool(is_made) == (kept and not is_known)  # nothing is copied for nothing

    @stateful.precondition(lambda self: self.open)
    @stateful.rule(which=some.integers(0, 99))
    def close(self, which):
        walk, other = self.open.pop(which % len(self.open))
        self.theirs.walks = [each for each in self.theirs.walks if each is not other]
        walk.close()
        walk.close()

    @stateful.invariant()
    def both_hold_the_same(self):
        found, todo = {}, [((None, ()), self.ours._root)]
        while todo:  # all that can be reached: there is no orphan
            (_, before), node = todo.pop()
            for (kind, tokens), child in node.children.items():
                key = (kind, (*before, *np.frombuffer(tokens, np.int32).tolist()))
                found[key] = (child.value, child.size)
                todo.append((key, child))
        assert found == {key: (entry.value, entry.size) for key, entry in self.theirs.entries.items()}
        assert len(self.ours) == len(found)
        assert self.ours.bytes == sum(size for _, size in found.values()) <= MOST
        numbers = self.ours.hits, self.ours.misses, self.ours.reused, self.ours.evictions
        assert numbers == (self.hits, self.misses, self.reused, self.theirs.evicted)


TestBesideTheObvious = BesideTheObvious.TestCase
TestBesideTheObvious.settings = settings(max_examples=50, stateful_step_count=25, deadline=None, database=None)


def keep(trie, prompt, size=1, kind=None):
    """Walks and adds what is missing -> how many tokens were found."""
    walk = trie.walk(prompt, kind)
    found = walk.tokens
    for end in range(found + trie.chunk, len(prompt) + 1, trie.chunk):
        walk.add(lambda end=end: tuple(prompt[:end]), size)
    walk.close()
    return found


def test_the_end_of_what_was_not_used_for_longest_goes_first():
    trie = Prefixes(3, 50)
    first, second = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8, 9, 10, 11, 12, 13, 14]
    keep(trie, first, 10)  # two chunks
    keep(trie, second, 10)  # two more
    assert keep(trie, first, 10) == 6  # used last
    keep(trie, [20] * 6, 10)  # a fifth, and one too many
    assert [trie.walk(prompt).tokens for prompt in (first, second, [20] * 7)] == [6, 6, 6]
    assert trie.evictions == 1
    assert trie.bytes == 50


def test_what_is_in_use_stays_and_others_wait():
    trie = Prefixes(2, 3)
    keep(trie, [1, 2, 3, 4, 5, 6])
    walk = trie.walk([1, 2, 3, 4, 9])
    assert keep(trie, [7] * 5) == 0
    assert trie.walk([7] * 5).tokens == 2
    assert walk.values == [(1, 2), (1, 2, 3, 4)]
    assert trie.walk([1, 2, 3, 4, 9]).tokens == 4


def test_what_is_in_use_stays_even_if_it_was_not_used_for_longest():
    trie = Prefixes(2, 2)
    walk = trie.walk([1, 2, 3, 4, 5])
    assert walk.add(lambda: "oldest", 1)
    for prompt in ([3, 4], [5, 6], [7, 8]):
        keep(trie, prompt)
    assert trie.evictions == 2
    assert [trie.walk([*prompt, 9]).tokens for prompt in ([1, 2], [3, 4], [5, 6], [7, 8])] == [2, 0, 0, 2]


def test_chunks_that_share_a_hash_are_two():
    class Kind(str):
        def __hash__(self):
            return 7

    trie, prompt = Prefixes(2, 99), [1, 2, 3, 4, 5]
    for kind in "ab":
        walk = trie.walk(prompt, Kind(kind))
        assert walk.values == []
        assert walk.add(lambda kind=kind: kind, 1)
    assert [trie.walk(prompt, Kind(kind)).values for kind in "abc"] == [["a"], ["b"], []]


def test_kinds_share_nothing():
    trie = Prefixes(2, 99)
    keep(trie, [1, 2, 3, 4, 5], kind=("french", False))
    assert [trie.walk([1, 2, 3, 4, 5], kind).tokens for kind in (("french", False), ("french", True), None)] == [
        4,
        0,
        0,
    ]


def test_a_value_that_cannot_be_made_leaves_the_trie_as_it_was():
    trie = Prefixes(2, 9)
    walk = trie.walk([1, 2, 3, 4, 5])
    with pytest.raises(MemoryError):
        walk.add(lambda: (_ for _ in ()).throw(MemoryError()), 1)
    assert len(trie) == trie.bytes == 0
    assert walk.add(lambda: "again", 1)
    assert walk.values == ["again"]


def test_nothing_is_held_of_what_was_evicted():
    class Value:
        pass

    trie, value = Prefixes(2, 1), Value()
    seen, walk = weakref.ref(value), trie.walk([1, 2, 3])
    assert walk.add(lambda value=value: value, 1)
    walk.close()
    del value
    keep(trie, [3, 4, 5])
    gc.collect()
    assert seen() is None
    assert trie.evictions == 1


def test_sizes_that_make_no_sense_are_refused():
    for chunk, most in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="makes no sense"):
            Prefixes(chunk, most)
    assert [keep(trie, [1, 2, 3]) for trie in [Prefixes(2, 0)] * 2] == [0, 0]
