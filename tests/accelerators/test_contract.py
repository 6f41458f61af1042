"""The contract of text generation on accelerators: nothing copied, nothing materialised, each byte read once.

What is tested is what the compilers say, and what the text of their programs says (hlo.py): nothing runs here.
"""

from __future__ import annotations

from typing import Any

import pytest
from compiled import (
    ADAPTED,
    BATCHES,
    CASES,
    COMPILERS,
    DRAWN,
    GIB,
    INTEGER_CACHE,
    LOOPS,
    MIB,
    READS,
    WEIGHTS,
    WHOLE,
    WHOLE_INTEGERS,
    report,
    turn,
)

BYTES = 1.15  # times weights and used cache

targets = pytest.mark.parametrize("target", list(CASES))
turns = pytest.mark.parametrize(
    ("batch", "weights", "program"),
    [
        (batch, weights, program)
        for batch in BATCHES
        for weights in WEIGHTS
        for program in (["step", "decode"] if (batch, weights) in LOOPS else ["step"])
    ],
)


def _each(cases: list[str]) -> pytest.MarkDecorator:
    """The targets that these cases are compiled for, with each of them."""
    pairs = [(target, case) for target in CASES for case in cases if case in CASES[target]]
    return pytest.mark.parametrize(("target", "case"), pairs)


@targets
@turns
def test_a_token_copies_neither_weights_nor_cache(target: str, batch: int, weights: str, program: str) -> None:
    _copies_nothing(_program(target, turn(target, batch, weights), program))


@targets
@turns
def test_a_token_takes_little_memory(target: str, batch: int, weights: str, program: str) -> None:
    _is_small(_program(target, turn(target, batch, weights), program))


@targets
@turns
def test_a_token_reads_weights_and_used_cache_once(target: str, batch: int, weights: str, program: str) -> None:
    _moves_little(_program(target, turn(target, batch, weights), program))


@_each([WHOLE, WHOLE_INTEGERS])
def test_all_layers_are_as_few_of_them(target: str, case: str) -> None:
    facts = _program(target, case, "decode")
    assert facts["layers"] == 32
    _copies_nothing(facts)
    _is_small(facts)
    _moves_little(facts)


@_each([*ADAPTED, INTEGER_CACHE])
def test_an_adapter_copies_no_base_and_integers_in_the_cache_stay_integers(target: str, case: str) -> None:
    facts = _program(target, case, "step")
    _copies_nothing(facts)
    _is_small(facts)
    _moves_little(facts)


@_each(READS)
def test_a_prompt_makes_no_scores_and_copies_nothing(target: str, case: str) -> None:
    facts = _program(target, case, "read")
    assert not facts["scores"], _lines(facts["scores"])
    if COMPILERS[target] != "libtpu":  # a TPU's compiler may bring a weight into another order for thousands of tokens
        _copies_nothing(facts)
    assert facts["temporaries"] <= 0.5 * GIB, f"{facts['temporaries'] / GIB:.2f} GiB of temporaries"


@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize(("batch", "weights"), sorted(LOOPS))
def test_a_gpu_waits_for_no_host(target: str, batch: int, weights: str) -> None:
    """No branch in the loop over tokens, and no loop but that one whose turns only the device knows."""
    facts = _program(target, turn(target, batch, weights), "decode")
    assert not facts["conditionals"], _lines(facts["conditionals"])
    assert len(facts["open_loops"]) <= 1, _lines(facts["open_loops"])


def test_drawing_waits_for_no_host_either() -> None:
    """All settings are in one program, which takes some 130 kernels more and reads the logits some 70 times."""
    greedy, drawn = (_program("h100", case, "decode") for case in (turn("h100", 8, "bfloat16"), DRAWN))
    for facts, loops in ((drawn, 1), (_program("h100", DRAWN, "answer"), 0)):
        assert not facts["conditionals"], _lines(facts["conditionals"])
        assert len(facts["open_loops"]) == loops, _lines(facts["open_loops"])
    assert greedy["launches"] < drawn["launches"] <= greedy["launches"] + 140
    assert drawn["read"] - greedy["read"] < 100 * drawn["logits"]
    assert drawn["temporaries"] < greedy["temporaries"] + 8 * drawn["logits"]


def _program(target: str, case: str, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = report(target, case)["sizes"][name]
    return facts


def _copies_nothing(facts: dict[str, Any]) -> None:
    assert not facts["writes"], _lines(facts["writes"])


def _is_small(facts: dict[str, Any]) -> None:
    assert facts["temporaries"] < 20 * MIB + facts["logits"], f"{facts['temporaries'] / MIB:.1f} MiB of temporaries"


def _moves_little(facts: dict[str, Any]) -> None:
    moved = facts["read"] + facts["written"]
    said = f"{moved / 1e6:.0f} MB moved for each token, {moved / facts['needed']:.2f} times what is needed"
    assert moved <= BYTES * facts["needed"], said


def _lines(instructions: list[str]) -> str:
    return "\n".join([f"{len(instructions)} instructions:", *instructions])
