"""The reader of compiled programs, on programs that show one thing each."""

from __future__ import annotations

from pathlib import Path

import hlo
import pytest
import traffic

# A loop of three turns over a stack [3, 64, 32]: its layer is copied out, multiplied, and a cache is written in place.
LOOP = (Path(__file__).parent / "loop.hlo").read_text()
LAYER, X, NEW, CACHE = 64 * 32 * 2, 2 * 32 * 4, 16 * 2, 3 * 8 * 16 * 2  # bytes


def test_a_copied_layer_is_found_and_nothing_else() -> None:
    writes = traffic.large_writes(hlo.parse(LOOP), 3 * 8 * 16)
    assert writes == ["bf16[64,32] by layer = bf16[64,32] fusion: jit(f)/layers/slice"]
    assert not traffic.large_writes(hlo.parse(LOOP), 64 * 32 + 1)
    assert not traffic.large_writes(hlo.parse(LOOP), 3 * 8 * 16, rows=[64])


def test_bytes_and_kernels_of_a_loop() -> None:
    program = hlo.parse(LOOP)
    (loop, turns, body) = hlo.loops(program)[0]
    assert (loop.name, turns) == ("loop", 3)
    turn = traffic.cost(program, body, {(3, 8, 16): 0.25})
    slice_, gemm, new = (LAYER + 4, LAYER), (X + LAYER, 2 * 64 * 4 + 128), (4, NEW)
    update, attention, add = (NEW + 4, NEW), (0.25 * CACHE + X, X), (8, 4)
    kernels = [slice_, gemm, new, update, attention, add]
    assert turn == traffic.Cost(*map(sum, zip(*kernels, strict=True)), tuple(map(sum, kernels)))
    whole = traffic.cost(program, shares={(3, 8, 16): 0.25})
    # In each turn the condition's comparison, too, and before the loop a copy of its first number.
    expected = traffic.Cost(4, 4, (8,)) + (turn + traffic.Cost(8, 1, (9,))).times(3)
    assert (whole.read, whole.written) == (expected.read, expected.written)
    assert sorted(whole.kernels) == sorted(expected.kernels)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("%zero = s32[] constant(0)", "%zero = s32[] constant(1)"),
        ("copy(%zero)", "custom-call(%p2)"),
    ],
)
def test_a_loop_is_open_unless_its_turns_are_plain(old: str, new: str) -> None:
    assert not hlo.open_loops(hlo.parse(LOOP))
    changed = LOOP.replace(old, new)
    assert changed != LOOP
    assert len(hlo.open_loops(hlo.parse(changed))) == 1
    known = changed.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert not hlo.open_loops(hlo.parse(known))


def test_a_custom_call_that_is_not_in_place_writes_the_cache() -> None:
    program = hlo.parse(LOOP.replace(", output_to_operand_aliasing={{0}: (0, {})}", ""))
    assert any("phi3_attention" in write for write in traffic.large_writes(program, 3 * 8 * 16))


def test_a_custom_call_that_only_writes_in_place_reads_nothing_of_it() -> None:
    before, shape = "%attended = (bf16[3,8,16]{2,1,0}, f32[2,32]{1,0})", "%attended = (bf16[3,8,16]{2,1,0}, f32[0]{0})"
    text = LOOP.replace(before, shape)
    assert traffic.cost(hlo.parse(text)).read == traffic.cost(hlo.parse(LOOP)).read - 3 * CACHE


def test_an_update_of_another_array_than_a_parameter_writes_it_all() -> None:
    """A fusion that changes a copy, not the cache itself."""
    text = LOOP.replace(
        "ROOT %dynamic-update-slice.1 = bf16[3,8,16]{2,1,0} dynamic-update-slice(%param_0.2,",
        "%n = bf16[3,8,16]{2,1,0} negate(%param_0.2)\n"
        "  ROOT %dynamic-update-slice.1 = bf16[3,8,16]{2,1,0} dynamic-update-slice(%n,",
    )
    assert any(
        write.startswith("bf16[3,8,16] by written") for write in traffic.large_writes(hlo.parse(text), 3 * 8 * 16)
    )


def test_an_update_without_a_fusion_is_in_place_too() -> None:
    fused = "fusion(%cache, %new, %number), kind=kLoop, calls=%fused_update"
    text = LOOP.replace(fused, "dynamic-update-slice(%cache, %new, %number)")
    assert text != LOOP
    assert len(traffic.large_writes(hlo.parse(text), 3 * 8 * 16)) == 1  # the copied layer
    assert traffic.cost(hlo.parse(text)).read == traffic.cost(hlo.parse(LOOP)).read


def test_fast_memory_does_not_count() -> None:
    """A TPU's compiler copies weights ahead into fast memory: that is a read, not a write."""
    text = LOOP.replace("%layer = bf16[64,32]{1,0} fusion", "%layer = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion")
    program = hlo.parse(text)
    assert not traffic.large_writes(program, 3 * 8 * 16)
    assert traffic.cost(program).written == traffic.cost(hlo.parse(LOOP)).written - 3 * LAYER
    assert traffic.cost(program).read == traffic.cost(hlo.parse(LOOP)).read - 3 * LAYER


def test_scores_and_branches() -> None:
    new = "%new = bf16[1,1,16]{2,1,0} broadcast"
    text = LOOP.replace(new, f"%scores = f32[4,100,200]{{2,1,0}} broadcast(%number)\n  {new}")
    assert len(traffic.scores(hlo.parse(text), 100, 200)) == 1
    assert not traffic.scores(hlo.parse(text), 100, 100)
    assert not traffic.scores(hlo.parse(text), 200, 201)
    branch = "%one = s32[] conditional(%p, %number, %number), true_computation=%big, false_computation=%small\n"
    text = LOOP.replace("%one = s32[] constant(1)\n", branch)
    text = text.replace("%body (state", _branch("big", 100) + _branch("small", 10) + "%body (state", 1)
    program = hlo.parse(text)
    assert len(hlo.conditionals(program)) == 1
    assert traffic.cost(program).written == traffic.cost(hlo.parse(LOOP)).written + 3 * 400  # the larger branch alone


def _branch(name: str, size: int) -> str:
    return f"""%{name} (p.{name}: s32[]) -> s32[] {{
  %p.{name} = s32[] parameter(0)
  %b.{name} = s32[{size}]{{0}} broadcast(%p.{name}), dimensions={{}}
  ROOT %r.{name} = s32[] bitcast(%b.{name})
}}

"""


def test_text_that_is_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")
