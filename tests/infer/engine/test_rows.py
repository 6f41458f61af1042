"""Rows of a batch have seeds of their own, and log-probabilities are the model's own: mistakes that results hide."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import without_cache

from phi3_jax.infer import DraftModel, Options, PromptLookup, Run, Sampling, generate
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.sampling import SamplingArrays
from phi3_jax.kernels.attention import cpu, why_not_cpu

pytestmark = pytest.mark.usefixtures("quick_compilation")
# The first two are the same; the last two repeat themselves, so that a lookup guesses.
PROMPTS = [[90, 4, 77], [90, 4, 77], [11, 2, 31, 8, 11, 2, 31, 8], [5, 1, 7, 5, 1]]
LAST_SEED = 2**32 - 1


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [None, PromptLookup(3, 2, 1)])
def test_each_row_draws_as_its_prompt_does_alone(tiny, speculation):
    options, seeds = Options(room=24, speculation=speculation), [LAST_SEED - 1, LAST_SEED, 0, 1]
    alone = [
        generate(tiny, [prompt], 7, sampling=[Sampling(1.3, seed=seed)], options=options)[0].token_ids
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert alone[0] != alone[1]
    for given in (
        {"temperature": 1.3, "seed": LAST_SEED - 1},
        {"sampling": Sampling(1.3, seed=LAST_SEED - 1)},
        {"sampling": [Sampling(1.3, seed=seed) for seed in seeds]},
    ):
        together = generate(tiny, PROMPTS, 7, **given, options=options)
        assert [result.token_ids for result in together] == alone


@pytest.mark.slow
def test_logprobs_are_those_of_the_model_whatever_may_be_taken(tiny):
    """Not those of what a grammar, a ban or a temperature leaves."""
    config, prompts = tiny.config, PROMPTS[1:]
    rows = [Sampling(), Sampling(banned_tokens=range(40, 50), repetition_penalty=2.0), Sampling(0.3, top_k=2, seed=6)]
    settings = decoding.Settings(
        limits=jnp.full((3,), 5),
        end_ids=jnp.zeros((0,), jnp.int32),
        sampling=SamplingArrays.of(rows, 97),
        prompt_lengths=jnp.asarray([len(prompt) for prompt in prompts]),
    )
    tokens = jnp.asarray([prompt + [0] * (16 - len(prompt)) for prompt in prompts])
    state = decoding.begin(config, settings, tokens, 16, jnp.float32, logprobs=4)
    state, last = decoding.read(config, tiny.params, state, jnp.zeros((3, 24)), jnp.int32(0), 8)
    allowed = jnp.full((3, 4), 0b1000_0010_0000_0000, jnp.uint32)  # 9, 15, 41, 47 and so on
    state = decoding.answer(config, tiny.params, state, last, settings, allowed)
    state, last = decoding.step(config, tiny.params, state)
    state = decoding.answer(config, tiny.params, state, last, settings, allowed)
    for row, prompt in enumerate(prompts):
        text = state.tokens[row, : len(prompt) + 2].tolist()
        assert {token % 32 for token in text[len(prompt) :]} <= {9, 15}
        expected = jax.nn.log_softmax(without_cache.logits(tiny, text))[-3:-1]
        places = slice(len(prompt), len(prompt) + 2)
        chosen = np.take_along_axis(expected, np.asarray(text[-2:])[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(state.logprobs.chosen[row, places], chosen, atol=2e-5)
        np.testing.assert_allclose(state.logprobs.top[row, places], -np.sort(-expected, axis=1)[:, :4], atol=2e-5)


needs_kernels = pytest.mark.skipif(why_not_cpu("float32") is not None, reason="no kernels")


def left(garbage: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Memory that is left as it came holds NaN, or as int8 a number -> the shapes that are asked for from now on."""
    shapes = []

    def reserve(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        shapes.append(shape)
        return jnp.full(shape, garbage if jnp.dtype(dtype) == jnp.int8 else jnp.nan, dtype)

    monkeypatch.setattr(cpu, "reserve", reserve)
    return shapes


@needs_kernels
def test_what_the_memory_of_a_cache_holds_is_never_read(tiny, monkeypatch):
    given = {"temperature": 1.3, "seed": LAST_SEED - 1, "options": Options(room=24)}
    expected, shapes = generate(tiny, PROMPTS, 7, **given), left(0, monkeypatch)
    assert generate(tiny, PROMPTS, 7, **given) == expected
    assert len(shapes) == 2


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "has_draft"), [("float32", False), ("int8", False), ("float32", True)])
def test_nor_across_the_border_nor_from_a_prompt_cache_nor_by_a_draft_model(tiny, monkeypatch, dtype, has_draft):
    options = Options(cache_dtype=dtype, logprobs=2, echo=True, speculation=DraftModel(tiny, 2) if has_draft else None)

    def answers() -> list[Any]:
        run = Run(tiny, PROMPTS, [9, 15, 12, 3], options=options)
        found = run.advance()
        first = run.prompt_cache(2)
        while not run.is_over:
            found += run.advance(5)
        again = generate(tiny, PROMPTS[2:], 12, options=dataclasses.replace(options, prompt_cache=first, echo=False))
        return [found, [run.prompt_logprobs(row) for row in range(4)], again]

    expected, shapes = answers(), left(127, monkeypatch)
    assert answers() == expected
    assert len(shapes) == {"float32": 4, "int8": 8}[dtype] * (1 + has_draft)
