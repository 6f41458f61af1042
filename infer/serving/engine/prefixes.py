"""Beginnings of prompts that were read before: a trie of chunks of tokens, whose memory is bounded. No JAX here.

    walk = prefixes.walk(prompt, kind)  # as far as the prompt is known
    walk.values                         # what is kept of its first chunks
    walk.add(make, size)                # after each further chunk that was read
    walk.close()                        # it may be forgotten again

One thread calls all of it, the engine's.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(eq=False)
class _Node:
    """A chunk behind those of its parents.

    Attributes:
      key: of this chunk among its parent's: what its value depends on beside the tokens, and its tokens.
      value, size: what is kept for it, and how many bytes that is.
      users: how many walks stand on it, or below.
    """

    parent: _Node | None
    key: Hashable
    value: Any = None
    size: int = 0
    users: int = 0
    children: dict[Hashable, _Node] = dataclasses.field(default_factory=dict)


class Prefixes:
    """The trie.

    A chunk is found by the tokens of all chunks before it and its own. Dictionaries find them by hash, and compare them
    as a whole: two that share a hash are two. Where memory is short, what was not used for longest is evicted, the end
    of a prompt before its beginning.

    Attributes:
      chunk: tokens of a chunk.
      most_bytes: the most that all values together may take.
      bytes: what they take.
      hits, misses: prompts of which a beginning was found, and those of which none was. A prompt that is too short to
        have a chunk before its last token is neither.
      reused: tokens of all the beginnings that were found.
      evictions: chunks that had to go.
    """

    def __init__(self, chunk: int, most_bytes: int):
        """Raises ValueError for a chunk without tokens, or negative bytes."""
        if chunk < 1 or most_bytes < 0:
            raise ValueError(f"a prefix cache of {most_bytes} bytes in chunks of {chunk} tokens makes no sense")
        self.chunk, self.most_bytes = chunk, most_bytes
        self.bytes = self.hits = self.misses = self.reused = self.evictions = 0
        self._root = _Node(None, None)
        # Least recently used first. A chunk is used whenever one behind it is, and a moment later: children come before
        # their parent, so that the first is a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        """How many chunks are kept."""
        return len(self._order)

    def walk(self, prompt: Sequence[int], kind: Hashable = None) -> Walk:
        """Finds the longest known beginning of a prompt. It is kept until the walk is closed.

        The prompt's last token is never part of it: it has to be read for the token after it.

        Args:
          prompt: token ids, int32.
          kind: what values depend on beside the tokens, such as the weights.
        """
        ids = np.asarray(prompt, np.int32)
        ends = range(self.chunk, len(ids) + 1, self.chunk)
        keys: list[Hashable] = [(kind, ids[end - self.chunk : end].tobytes()) for end in ends]
        walk = Walk(self, self._root, keys)
        usable = max(0, len(ids) - 1) // self.chunk
        while len(walk.values) < usable and walk._step():
            pass
        self._use(walk._nodes)
        found = len(walk.values)
        self.hits += found > 0
        self.misses += usable > 0 == found
        self.reused += found * self.chunk
        return walk

    def _insert(self, parent: _Node, key: Hashable, make: Callable[[], Any], size: int) -> bool:
        """Keeps another chunk, if there is memory for it that nobody uses."""
        if not self._evict_for(size):
            return False
        node = _Node(parent, key, make(), size)
        parent.children[key] = node
        self._order[node] = None
        self.bytes += size
        return True

    def _evict_for(self, size: int) -> bool:
        """Evicts chunks until there is room for `size` bytes -> whether there is; if there cannot be, none is."""
        if self.bytes + size <= self.most_bytes:
            return True
        if sum(node.size for node in self._order if node.users) + size > self.most_bytes:
            return False
        while self.bytes + size > self.most_bytes:
            # Its children came earlier, and with one of them in use it would be, too: it has none left.
            oldest = next(node for node in self._order if not node.users)
            assert oldest.parent is not None
            assert not oldest.children
            del self._order[oldest], oldest.parent.children[oldest.key]
            self.bytes -= oldest.size
            self.evictions += 1
        return True

    def _use(self, nodes: Sequence[_Node]) -> None:
        """Makes chunks of one prompt, first to last, the most recently used ones."""
        for node in reversed(nodes):
            self._order.move_to_end(node)


class Walk:
    """How far one prompt is known. Made by `Prefixes.walk`.

    Attributes:
      values: of the prompt's chunks that are known, or were added.
    """

    def __init__(self, prefixes: Prefixes, root: _Node, keys: Sequence[Hashable]):
        self._prefixes, self._root, self._keys = prefixes, root, keys
        self._nodes: list[_Node] = []
        self._is_over = False
        self.values: list[Any] = []

    @property
    def tokens(self) -> int:
        """How many tokens these chunks have together."""
        return len(self._nodes) * self._prefixes.chunk

    def add(self, make: Callable[[], Any], size: int) -> bool:
        """Keeps the next chunk of the prompt, and the walk goes on to it.

        Args:
          make: makes its value; not called if the chunk is known by now, from another walk, or cannot be kept.
          size: the value's bytes.

        Returns:
          False if it is not kept, nor any after it: all memory is taken by what walks use.

        Raises:
          ValueError: the prompt has no further whole chunk, or the walk is closed.
        """
        if len(self._nodes) == len(self._keys):
            raise ValueError(f"the walk is closed, or its prompt has no whole chunk after the first {len(self._keys)}")
        if self._is_over:
            return False
        parent = self._nodes[-1] if self._nodes else self._root
        key = self._keys[len(self._nodes)]
        if key not in parent.children and not self._prefixes._insert(parent, key, make, size):
            self._is_over = True  # what comes after it would have no parent
            return False
        self._step()
        self._prefixes._use(self._nodes)
        return True

    def close(self) -> None:
        """What it found and added may be evicted from now on. Closing it again does nothing."""
        for node in self._nodes:
            node.users -= 1
        self._nodes, self.values, self._keys = [], [], []

    def _step(self) -> bool:
        """Goes on to the next chunk, if it is known."""
        parent = self._nodes[-1] if self._nodes else self._root
        node = parent.children.get(self._keys[len(self._nodes)])
        if node is None:
            return False
        node.users += 1
        self._nodes.append(node)
        self.values.append(node.value)
        return True
