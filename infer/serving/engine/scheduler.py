"""Who waits, who is read, who writes: the engine's decisions, without JAX.

    waiting -> reading -> writing -> ended     (back from writing to reading where LongRoPE's border is crossed)

Jobs are known by their numbers. One that is read or writes has a slot, which it keeps until it ends.
"""

from __future__ import annotations

from collections import deque

from .jobs import QueueFull


class Scheduler:
    """Keeps every job in exactly one place.

    Attributes:
      slots: how many jobs are read or write at a time.
      queue: how many jobs may be there beside as many as there are slots.
      readers: no other job is admitted while so many texts are read, chunk by chunk in turn, so that a long prompt does
        not stall a short one.
    """

    def __init__(self, slots: int, queue: int, readers: int):
        self.slots, self.queue, self.readers = slots, queue, readers
        self._waiting: deque[int] = deque()
        self._reading: deque[int] = deque()  # the next to read is the first
        self._writing: list[int] = []

    def __len__(self) -> int:
        """How many jobs there are."""
        return len(self._waiting) + len(self._reading) + len(self._writing)

    @property
    def waiting(self) -> list[int]:
        """The jobs without a slot, in the order in which they will get one."""
        return list(self._waiting)

    @property
    def reading(self) -> list[int]:
        """The jobs that are read, in the order of their turns."""
        return list(self._reading)

    @property
    def writing(self) -> list[int]:
        """The jobs that write, in the order in which they began."""
        return list(self._writing)

    def add(self, number: int) -> None:
        """A new job waits. Raises QueueFull if there are too many."""
        if len(self) >= self.slots + self.queue:
            raise QueueFull(f"{self.queue} requests wait already; try again later")
        self._waiting.append(number)

    def admit(self, texts: int) -> int | None:
        """Gives a free slot to the one that waits longest -> it is read from now on; None if none is free for it.

        Args:
          texts: how many are being read: fewer than jobs, where some have the same one.
        """
        if texts >= self.readers or len(self._reading) + len(self._writing) >= self.slots or not self._waiting:
            return None
        self._reading.append(self._waiting.popleft())
        return self._reading[-1]

    def next_to_read(self) -> int | None:
        """The job whose turn it is to be read a piece further; it is the last in line then."""
        if not self._reading:
            return None
        self._reading.rotate(-1)
        return self._reading[-1]

    def has_read(self, number: int) -> None:
        """A job's text has been read to its end: it writes from now on."""
        self._reading.remove(number)
        self._writing.append(number)

    def must_read(self, number: int) -> None:
        """A job that writes has to be read again."""
        self._writing.remove(number)
        self._reading.append(number)

    def end(self, number: int) -> None:
        """A job is over, wherever it is."""
        for place in (self._waiting, self._reading, self._writing):
            if number in place:
                place.remove(number)
                return
        raise KeyError(number)
