"""The bound on compiled programs that are kept."""

import jax
import numpy as np
import pytest

from phi3_jax.infer import Options, Run, beam, beam_search
from phi3_jax.infer.engine import kept, run
from phi3_jax.infer.engine.buckets import padded_length, room_for


def test_programs_of_so_many_sizes_are_kept(monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    monkeypatch.setattr(kept, "_kept", set())
    add = jax.jit(lambda x: x + 1)
    compiled = []
    for rows in (1, 2, 1, 3, 1):
        kept.keep_programs_for(rows)
        assert np.array_equal(add(np.zeros(rows)), np.ones(rows))
        compiled.append(add._cache_size())
    assert compiled == [1, 2, 2, 1, 2]


def test_lines_that_are_answered_one_by_one_are_not_compiled_again_and_again():
    """Prompts of 4 to 450 tokens, and their own limits."""
    options = Options()
    lengths, limits = (4, 9, 20, 40, 90, 150, 300, 450), (4, 140, 270, 400)
    sizes = {
        (padded_length(n, options.prefill_chunk), room_for(n, limit, options)) for n in lengths for limit in limits
    }
    assert 20 < len(sizes) <= kept.MOST


class SizeTold(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("kind", ["run", "beams"])
def test_every_run_tells_its_size(tiny, monkeypatch, kind):
    """Two runs that share their programs tell the same, others do not."""

    def tell(size):
        raise SizeTold(size)

    def size(*prompts, limit=3, **options):
        monkeypatch.setattr(beam if kind == "beams" else run, "keep_programs_for", tell)
        begin = beam_search if kind == "beams" else Run
        with pytest.raises(SizeTold) as told:
            begin(tiny, prompts, [limit] * len(prompts), options=Options(**options))
        (found,) = told.value.args
        return found

    short, long = [5, 1, 7], [5] * 20
    assert size(short) == size([9, 9]) != size(short, short)
    assert size(short) != size(short, room=300)
    assert size(short) != size(long)
    assert size(long) == size(long[1:])
