"""The sizes of arrays: any work runs on few programs, and a row's answer does not depend on the rows beside it."""

import dataclasses
import random

import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.infer import Options, Run, Sampling, generate
from phi3_jax.infer.engine import buckets, decoding
from phi3_jax.infer.sampling import params
from phi3_jax.kernels.attention import cuda

PROGRAMS = (decoding.read, decoding.answer, decoding.decode)
pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def on(monkeypatch: pytest.MonkeyPatch, platform: str, gigabytes: float = 1000) -> None:
    monkeypatch.setattr(buckets, "_platform", lambda: platform)
    monkeypatch.setattr(buckets, "_memory", lambda: int(gigabytes * 2**30))
    if platform != "cpu":
        monkeypatch.setattr(buckets, "why_not_kernels", lambda *_: None)


@pytest.mark.parametrize(("platform", "batches", "reads"), [("gpu", 3, 3), ("tpu", 3, 3), ("cpu", 7, 35)])
def test_the_ladder_has_few_rungs(long, monkeypatch, platform, batches, reads):
    """Up to 64 rows of 4096 tokens: 3 reads, 3 first tokens, 6 loops; on the CPU 35, 7, 7. A room more has as many."""
    on(monkeypatch, platform)
    config = dataclasses.replace(long.config, max_position_embeddings=1 << 17)
    model, options = dataclasses.replace(long, config=config), Options()
    lengths = [*range(1, 600, 7), 1000, 2047, 2048, 4000, 4096]
    sizes = {buckets.sizes_for(model, rows, n, options, jnp.float32) for rows in range(1, 65) for n in lengths}
    assert sizes == {(batch, 4096) for batch, _ in sizes}
    assert len(sizes) == batches
    assert buckets.sizes_for(model, 64, 4097, options, jnp.float32) == (64, 8192)
    pieces = {(b, buckets.piece_length(n, b, options.prefill_chunk, 4096)) for n in lengths for b, _ in sizes}
    assert len(pieces) == reads
    for n in lengths:
        read = calls = 0
        while read < n:
            read += buckets.piece_length(n - read, 1, 512, 4096)
            calls += 1
        assert n <= read <= max(1.6 * n if platform == "cpu" else 0, 16, -(-n // 512) * 512)
        assert calls <= n // 512 + 8


def test_a_rung_takes_no_memory_that_would_be_missed(long, monkeypatch):
    config = dataclasses.replace(phi3_jax.PRESETS["phi-3-mini-4k"], sliding_window=None)
    model = dataclasses.replace(long, config=config)  # 0.4 MB a token

    def sizes(gigabytes, rows, tokens, platform="gpu", dtype="bfloat16"):
        on(monkeypatch, platform, gigabytes)
        return buckets.sizes_for(model, rows, tokens, Options(), jnp.dtype(dtype))

    assert sizes(70, 1, 300) == (1, 4096)
    assert sizes(70, 64, 300) == (64, 512)
    assert sizes(70, 9, 4000) == (16, 4096)
    assert sizes(20, 9, 300) == (16, 512)
    assert sizes(20, 9, 1025) == (16, 1152)
    assert sizes(8, 9, 1025) == (9, 1152)
    monkeypatch.undo()
    assert sizes(70, 8, 300, "cpu", "float16") == (8, 512)  # the kernels do not know it: XLA reads every slot


def test_a_server_has_as_many_slots_as_half_of_the_memory_holds(long, monkeypatch):
    config = dataclasses.replace(phi3_jax.PRESETS["phi-3-mini-4k"], sliding_window=None)
    model = dataclasses.replace(long, config=config)  # 1.5 GiB for 4096 tokens
    found = []
    for gigabytes, most in ((100, 64), (100, 16), (25, 64), (23, 64), (1, 64)):
        on(monkeypatch, "cpu", gigabytes)
        found.append(buckets.rows_that_fit(model, 4096, jnp.bfloat16, most))
    assert found == [32, 16, 8, 4, 1]


def test_without_kernels_rooms_are_no_larger_than_needed(long, monkeypatch):
    """XLA reads every slot: of heads that no kernel is made for, of a card that is too old."""
    monkeypatch.setattr(buckets.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    for head_dim, room in ((80, 512), (96, 4096)):
        model = dataclasses.replace(long, config=dataclasses.replace(long.config, head_dim=head_dim, long_rope=None))
        assert buckets.sizes_for(model, 3, 300, Options(), jnp.float32) == (8, room)
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "an old card")
    assert buckets.sizes_for(model, 3, 300, Options(), jnp.float32) == (8, 512)


@pytest.mark.slow
def test_any_work_of_a_batch_size_runs_on_seven_programs(long):
    """Ragged lengths up to 4096, in any order: whole and short chunks, rings, restarts, prompt caches."""
    for program in PROGRAMS:
        program.clear_cache()
    rng = random.Random(1)
    for longest, rows in ((5, 4), (700, 3), (80, 3), (30, 4), (4090, 3)):
        work(long, rows, rng, longest, Options(rows=4))
    text, run = [1, 2, 3], None
    for _ in range(4):  # a conversation
        run = Run(long, [text], [30], options=Options(prompt_cache=run and run.prompt_cache(), rows=4))
        while not run.is_over:
            text += run.advance(32)[0].token_ids
        text += [4, 5, 6]
    assert run.reused > 0
    assert compiled() == [5, 1, 1]


def test_each_row_draws_what_its_prompt_draws_alone(long):
    """Three rows run as four; the seeds of the rows are 5, 6 and 7."""
    rng, options = np.random.default_rng(3), Options(rows=4)
    prompts = [rng.integers(0, 60, length).tolist() for length in (9, 30, 66)]
    together = generate(long, prompts, 12, temperature=1.0, seed=5, options=options)
    assert len(together) == 3
    for row, prompt in enumerate(prompts):
        (alone,) = generate(long, prompt, 12, temperature=1.0, seed=5 + row, options=options)
        assert together[row].token_ids == alone.token_ids
    same = generate(long, [prompts[0]] * 3, 12, temperature=1.0, options=options)
    assert len({tuple(each.token_ids) for each in same}) == 3


def test_rows_without_a_prompt_are_done_from_the_start(long):
    run = Run(long, [[5] * 9] * 3, [3, 2, 3], options=Options(rows=4))
    assert [len(new.token_ids) for new in run.advance()] == [1] * 3
    assert run._state.done.tolist() == [False, False, False, True]
    run.advance(32)
    assert run.done == [True] * 3
    assert run._state.lengths.tolist()[3] == 0
    with pytest.raises(ValueError, match="row 3 is not one of the run's 3 rows"):
        run.prompt_cache(3)


def test_rows_share_no_more_of_a_prompt_cache_than_all_begin_with(long):
    rng, options = np.random.default_rng(4), Options(rows=4)
    prefix, other = rng.integers(0, 30, 31).tolist(), rng.integers(30, 60, 31).tolist()
    run = Run(long, [prefix], [1], options=options)
    run.advance()
    cache = run.prompt_cache()
    prompts = [prefix + other[:5], prefix[:12] + other, prefix[:20] + other[:3]]
    for rows in (prompts, prompts[::-1], prompts[1:]):
        run = Run(long, rows, [9] * len(rows), options=dataclasses.replace(options, prompt_cache=cache))
        assert run.reused == 12
        found = [new.token_ids for new in run.advance()]
        while not run.is_over:
            found = [old + new.token_ids for old, new in zip(found, run.advance(32), strict=True)]
        assert found == [each.token_ids for each in generate(long, rows, 9, options=options)]


@pytest.mark.slow
def test_any_work_runs_on_twelve_programs(long, monkeypatch):
    """On the ladder of an accelerator: batches of 1 to 64, greedy ones and others."""
    on(monkeypatch, "gpu")
    monkeypatch.setattr(params.jax, "default_backend", lambda: "gpu")
    for program in PROGRAMS:
        program.clear_cache()
    rng = random.Random(2)
    for rows, longest in ((64, 100), (1, 700), (3, 150), (9, 20), (8, 4095), (1, 3), (33, 600)):
        work(long, rows, rng, longest, Options())
        generate(long, [[rng.randrange(60) for _ in range(longest)]] * rows, 3)
    assert compiled() == [3, 3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("options", [Options(logprobs=2), Options(logprobs=2, echo=True)])
def test_rows_without_a_prompt_change_nothing(long, options):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 60, length).tolist() for length in (9, 30, 66)]
    padded = generate(long, prompts, 12, temperature=1.0, options=dataclasses.replace(options, rows=8))
    for row, (prompt, ours) in enumerate(zip(prompts, padded, strict=True)):
        (alone,) = generate(long, prompt, 12, temperature=1.0, seed=row, options=options)
        assert ours.token_ids == alone.token_ids
        for name in ("logprobs", "prompt_logprobs") if options.echo else ("logprobs",):
            found, expected = ([entry.logprob for entry in getattr(each, name)] for each in (ours, alone))
            np.testing.assert_allclose(found[1:], expected[1:], atol=1e-4)
