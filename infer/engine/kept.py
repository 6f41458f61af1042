"""A bound on the compiled programs that are kept.

Every size of a batch has programs of its own, large and small, which jax keeps: 30 to 60 MB and 400 to 800 mappings of
memory, of which Linux allows a process 65,530. A file of questions that are answered one by one, each with its own
limit of tokens, has some 25 sizes; with a bound below that, nearly every answer would be compiled anew.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import jax

MOST = 32  # sizes
_kept: set[Hashable] = set()
_lock = threading.Lock()


def keep_programs_for(size: Hashable) -> None:
    """Says that a run begins whose arrays have this size: if it is one too many, all compiled programs are dropped.

    What is still needed is compiled again, or comes from jax's cache on the disk. Others' programs in this process are
    dropped, too: jax cannot drop ours alone with all that it keeps of them.
    """
    with _lock:
        if size not in _kept and len(_kept) >= MOST:
            jax.clear_caches()
            _kept.clear()
        _kept.add(size)
