"""Which texts share a row."""

from __future__ import annotations

import heapq

import numpy as np


class FirstFit:
    """Puts each text, in the order given, into the first row that has room for it, or else into a new one.

    First-fit needs at most 1.7 times the rows of the best packing (Dosa and Sgall, STACS 2013), and for texts much
    shorter than a row it leaves almost nothing empty. Here it takes O(T) operations of numpy for each text: for each
    amount of room, a heap holds the rows with exactly that much.

    Attributes:
      rows: how many have been begun.
    """

    def __init__(self, length: int):
        self.rows = 0
        self._length = length
        self._with_room: list[list[int]] = [[] for _ in range(length + 1)]
        self._first = np.full(length + 1, np.iinfo(np.int64).max)  # the least row in each heap

    def place(self, tokens: int) -> int:
        """The row of a text of so many tokens, at most the length of a row."""
        room = tokens + int(self._first[tokens:].argmin())
        heap = self._with_room[room]
        if heap:
            row = heapq.heappop(heap)
            self._first[room] = heap[0] if heap else np.iinfo(np.int64).max
        else:
            row, room = self.rows, self._length
            self.rows += 1
        left = room - tokens
        heapq.heappush(self._with_room[left], row)
        self._first[left] = self._with_room[left][0]
        return row
