"""An engine with a prefix cache answers as one without, bit for bit, and reads less."""

import dataclasses

import numpy as np
import pytest

from phi3_jax.infer.engine.buckets import slot_bytes
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job
from phi3_jax.infer.serving.engine.chunks import chunk_bytes
from phi3_jax.infer.serving.engine.options import Sizes
from phi3_jax.infer.serving.engine.prefixes import Prefixes
from phi3_jax.infer.serving.engine.reader import Reader
from phi3_jax.infer.serving.engine.sequence import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHUNK, MOST = 4, 1 << 20
OPTIONS = EngineOptions(slots=1, room=60, chunk=CHUNK, top_logprobs=2)


def ids(seed, count):
    return np.random.default_rng(seed).integers(4, 97, count).tolist()


SYSTEM = ids(1, 45)
# prompt, new tokens, what can be reused of it; the tiny model's border is at 16 tokens, its window 19, its ring 24
WALK = {
    "nothing is known yet": (SYSTEM[:9] + ids(2, 4), 2, 0),
    "the whole chunks in common": (SYSTEM[:9] + ids(3, 4), 2, 8),
    "all but the last piece": (SYSTEM[:9] + ids(2, 4), 2, 12),
    "the last token is always read": (SYSTEM[:8], 3, 4),
    "too short for a chunk": (SYSTEM[:4], 2, 0),
    "the long factors know nothing of the short ones": (SYSTEM[:9] + ids(2, 14), 2, 0),
    "what has long factors is known to its like": (SYSTEM[:9] + ids(2, 14) + ids(5, 3), 2, 20),
    "the short factors know nothing of the long ones": (SYSTEM[:9] + ids(2, 7), 2, 12),
    "it crosses the border while it writes": (SYSTEM[:9] + ids(4, 5), 5, 8),
    "the text that has crossed, read again": (SYSTEM[:9] + ids(4, 5) + ids(7, 6), 2, 12),
    "longer than the ring": (SYSTEM, 2, 8),
    "only the newest chunks are placed": (SYSTEM[:41] + ids(6, 6), 3, 40),
    "the beginning of what a ring has lost": (SYSTEM[:27] + ids(6, 6), 3, 24),
}


def ask(engine, prompt, count):
    """-> (token ids, log-probabilities of them and of those beside them, ticket)."""
    pieces = []
    ticket = engine.submit(Job(prompt, count, logprobs=2), pieces.append)
    while engine.turn():
        pass
    assert pieces[-1].finish_reason == "length"
    return [t for piece in pieces for t in piece.token_ids], [t for piece in pieces for t in piece.logprobs], ticket


def engines(tiny, **options):
    """Without a prefix cache, and with one."""
    return [Engine(tiny, dataclasses.replace(OPTIONS, prefix_bytes=most, **options)) for most in (0, MOST)]


def is_free(engine):
    return not any(node.users for node in engine._prefixes._order)


def walk_through(plain, engine):
    for name, (prompt, count, reused) in WALK.items():
        expected, answer = ask(plain, prompt, count), ask(engine, prompt, count)
        assert answer[:2] == expected[:2], name
        assert (expected[2].reused, answer[2].reused) == (0, reused), name
        assert is_free(engine)
    assert engine.statistics.reused_tokens == sum(reused for _, _, reused in WALK.values())
    assert engine.statistics.prefix_bytes == engine.statistics.prefix_chunks * chunk_bytes(engine._batch._cache, CHUNK)


def test_answers_are_the_same_bits_with_windows_and_across_the_border(tiny):
    walk_through(*engines(tiny))


@pytest.mark.slow
@pytest.mark.parametrize(("window", "dtype"), [(None, "float32"), (6, "float32"), (19, "int8"), (19, "bfloat16")])
def test_so_they_are_with_other_windows_and_dtypes(tiny, window, dtype):
    model = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, sliding_window=window))
    walk_through(*engines(model, cache_dtype=dtype))


def test_a_small_cache_stays_small_and_answers_stay_the_same(tiny):
    size = CHUNK * slot_bytes(tiny.config, "float32")
    plain, small = (Engine(tiny, dataclasses.replace(OPTIONS, prefix_bytes=most)) for most in (0, 5 * size + 1))
    for seed in (0, 1, 0, 0, 2, 0):
        prompt = SYSTEM[:9] + ids(seed, 3 + 2 * seed)
        assert ask(small, prompt, 1)[:2] == ask(plain, prompt, 1)[:2]
        assert small.statistics.prefix_bytes <= 5 * size
    counts = small.statistics
    assert (counts.prefix_hits, counts.prefix_misses) == (5, 1)
    assert (counts.prefix_chunks, counts.prefix_evictions) == (5, 1)
    with pytest.raises(ValueError, match="prefix_bytes=99 is less than the 1536 bytes of one chunk of 4 tokens"):
        Engine(tiny, dataclasses.replace(OPTIONS, prefix_bytes=99))
    # The longest prompt is one token less than there is room for, and its last token is not reused.
    rooms = [Sizes.of(tiny, dataclasses.replace(OPTIONS, room=CHUNK + more)) for more in (1, 2)]
    assert [sizes.prefix_bytes > 0 for sizes in rooms] == [False, True]


def test_one_that_goes_while_it_is_read_leaves_nothing_in_use(tiny):
    engine = Engine(tiny, dataclasses.replace(OPTIONS, prefix_bytes=MOST))
    ticket = engine.submit(Job(SYSTEM, 2), lambda piece: None)
    engine.turn()
    engine.turn()
    assert not is_free(engine)
    engine.cancel(ticket)
    engine.turn()
    assert is_free(engine)
    assert engine.statistics.prefix_chunks == 2


def test_adapters_share_nothing(tiny):
    sizes, prefixes = Sizes.of(tiny, OPTIONS), Prefixes(CHUNK, MOST)
    for adapter, reused in ((None, 0), ("french", 0), ("german", 0), ("french", 12), (None, 12)):
        row = Row.of(Job(SYSTEM[:13], 1, adapter=adapter), lambda piece: None, tiny, sizes)
        reader, before = Reader(tiny, sizes, row, prefixes), prefixes.reused
        while not reader.is_over:
            reader.read_piece(tiny.params)
        assert prefixes.reused - before == reused


@pytest.mark.slow
def test_with_echo_everything_is_read(tiny):
    engine = Engine(tiny, dataclasses.replace(OPTIONS, prefix_bytes=MOST))
    plain = ask(engine, SYSTEM[:13], 2)
    ticket = engine.submit(Job(SYSTEM[:13], 2, logprobs=0, echo=True), lambda piece: None)
    while engine.turn():
        pass
    assert plain[2].reused == ticket.reused == 0
    assert len(ticket.prompt_logprobs) == 13
