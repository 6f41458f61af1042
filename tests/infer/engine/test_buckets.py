"""The sizes of arrays: any work runs on few programs, and a row's answer does not depend on the rows beside it."""

import random

import numpy as np
import pytest

import phi3_jax
from phi3_jax.infer import Options, Run, Sampling, generate
from phi3_jax.infer.engine import buckets, decoding

PROGRAMS = (decoding.read, decoding.answer, decoding.decode)


@pytest.fixture(scope="module")
def long() -> phi3_jax.Checkpoint:
    """A random model of one layer with a context of 4096, LongRoPE's border at 70, and a window of 40."""
    config = phi3_jax.Phi3Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        rope_theta=1e4,
        long_rope=phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), 70),
        sliding_window=40,
        initializer_range=0.5,
    )
    settings = phi3_jax.GenerationSettings(eos_token_ids=(60,))
    return phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, settings)


def compiled() -> list[int]:
    return [program._cache_size() for program in PROGRAMS]


def work(model: phi3_jax.Checkpoint, rows: int, rng: random.Random, longest: int, options: Options) -> None:
    """A batch of ragged prompts, drawn and greedy, with limits of their own, from beginning to end."""
    lengths = [min(longest, int(rng.lognormvariate(3, 1.5)) + 1) for _ in range(rows - 1)] + [longest]
    prompts = [[rng.randrange(60) for _ in range(length)] for length in lengths]
    limits = [rng.choice((1, 2, 9, 33, 60)) for _ in prompts]
    sampling = [Sampling(temperature=rng.choice((0, 0.9)), seed=row) for row in range(rows)]
    generate(model, prompts, limits, sampling=sampling, options=options)


@pytest.mark.parametrize(("backend", "batches", "most"), [("gpu", (1, 3, 8, 9, 64), 12), ("cpu", (3, 4), 5)])
def test_any_work_runs_on_few_programs(long, monkeypatch, backend, batches, most, quick_compilation):
    """Ragged lengths up to 4096, in any order: reads in chunks, short last ones, rings, restarts, conversations."""
    monkeypatch.setattr(buckets, "_platform", lambda: backend)
    for program in PROGRAMS:
        program.clear_cache()
    rng = random.Random(1)
    for rows in batches:
        for longest in (5, 80, 200, 700) if rows < 9 else (100,):
            work(long, rows, rng, longest, Options())
    work(long, 1, rng, 4095, Options())
    text = [1, 2, 3]
    run = None
    for _ in range(5):  # a conversation
        run = Run(long, [text], [30], options=Options(prompt_cache=run and run.prompt_cache()))
        while not run.is_over:
            text += run.advance(32)[0].token_ids
        text += [4, 5, 6]
    assert run.reused > 0
    assert min(compiled()) > 0
    assert sum(compiled()) <= most + (5 if backend == "cpu" else 0)  # a row alone is another batch


def test_each_row_gives_what_its_prompt_gives_alone(long):
    """Three rows run as four; seeds are the rows' own."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 60, length).tolist() for length in (9, 30, 66)]
    for options in (Options(logprobs=2), Options(logprobs=2, echo=True), Options(logprobs=2, rows=20)):
        together = generate(long, prompts, 12, temperature=1.0, seed=5, options=options)
        assert len(together) == 3
        for row, prompt in enumerate(prompts):
            (alone,) = generate(long, prompt, 12, temperature=1.0, seed=5 + row, options=options)
            assert together[row].token_ids == alone.token_ids
            for name in ("logprobs", "prompt_logprobs") if options.echo else ("logprobs",):
                ours, expected = ([entry.logprob for entry in getattr(each, name)] for each in (together[row], alone))
                np.testing.assert_allclose(np.array(ours[1:]), np.array(expected[1:]), atol=1e-4)
    assert len({tuple(each.token_ids) for each in generate(long, [prompts[0]] * 3, 12, temperature=1.0)}) == 3
