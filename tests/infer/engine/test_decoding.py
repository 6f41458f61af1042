import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from without_points import Bare

import phi3_jax
from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.sampling import SamplingArrays
from phi3_jax.inspection import add, scale, zero
from phi3_jax.model import decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[5, 1, 7], [11, 11, 11, 2, 31, 8], [90, 4, 77, 15, 60]]
STEPS = 6


@pytest.fixture(scope="module")
def short(tiny):
    """Without LongRoPE."""
    return dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, long_rope=None))


def settings_of(seeds, temperature=1.0, policy="length"):
    return decoding.Settings(
        limits=jnp.full((3,), STEPS + 1),
        end_ids=jnp.zeros((0,), jnp.int32),
        sampling=dataclasses.replace(SamplingArrays.of([Sampling(temperature)] * 3, 97), seed=seeds),
        prompt_lengths=jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32),
        rope_policy=policy,
    )


def written(config, params, settings):
    """The state after a whole run, as a function of the weights."""
    tokens = jnp.asarray([prompt + [0] * (23 - len(prompt)) for prompt in PROMPTS])
    state = decoding.begin(config, settings, tokens, 23, jnp.float32, logprobs=0)
    state, last = decoding.read(config, params, state, jnp.zeros((3, 24)), jnp.int32(0), 8, edits=settings.edits)
    return decoding.unroll(config, params, decoding.answer(config, params, state, last, settings), settings, STEPS)


def programs(tiny):
    """The programs of a run without edits as text; `decode` has the parts of `answer` and `step`."""
    settings = settings_of(jnp.asarray([4, 5, 6], jnp.uint32))
    tokens, place, steps = jnp.zeros((3, 23), jnp.int32), jnp.int32(0), jnp.int32(3)
    state, last = decoding.begin(tiny.config, settings, tokens, 26, jnp.float32, logprobs=0), jnp.zeros((3, 24))
    read, decode = (each.__wrapped__ for each in (decoding.read, decoding.decode))
    return [
        jax.jit(lambda *args: read(tiny.config, *args, 8, True)).lower(tiny.params, state, last, place).as_text(),
        jax.jit(lambda *args: decode(tiny.config, *args)).lower(tiny.params, state, settings, steps).as_text(),
    ]


@pytest.mark.slow
def test_without_edits_the_programs_are_the_same_text_as_without_points(tiny, monkeypatch):
    with_points = programs(tiny)
    for module in (decoder, decoding):
        monkeypatch.setattr(module, "Tap", Bare)
        monkeypatch.setattr(module, "NO_TAP", Bare())
    assert programs(tiny) == with_points


@pytest.mark.slow
def test_unrolled_steps_are_those_of_the_loop(short):
    """With edits, too: of a layer everywhere, of a head of the answer, of the logits."""
    seeds, config = jnp.asarray([4, 5, 6], jnp.uint32), short.config
    edits = (
        scale(config, "mlp_out", 0.5, layers=[1]),
        zero(config, "attn.z", layers=[2], positions=[7, 9], heads=[0]),
        add(config, "logits", 30 * np.eye(97)[13], positions=[10]),
    )
    state = written(config, short.params, dataclasses.replace(settings_of(seeds), edits=edits))
    rows = [Sampling(1.0, seed=seed) for seed in (4, 5, 6)]
    expected = generate(short, PROMPTS, STEPS + 1, sampling=rows, options=Options(logprobs=0, edits=edits))
    assert expected[1].token_ids[11 - 6] == 13
    plain = generate(short, PROMPTS, STEPS + 1, sampling=rows)
    assert all(row.token_ids != other.token_ids for row, other in zip(plain, expected, strict=True))
    for row, (prompt, result) in enumerate(zip(PROMPTS, expected, strict=True)):
        end = len(prompt) + STEPS + 1
        assert state.tokens[row, :end].tolist() == prompt + result.token_ids
        values = [entry.logprob for entry in result.logprobs]
        np.testing.assert_allclose(state.logprobs.chosen[row, len(prompt) : end], values, atol=5e-5)


@pytest.mark.slow
def test_unrolled_steps_can_be_mapped(short):
    """Three sets of seeds at once."""
    seeds = jnp.arange(9, dtype=jnp.uint32).reshape(3, 3)
    run = jax.jit(jax.vmap(lambda seeds: written(short.config, short.params, settings_of(seeds)).tokens))
    alone = [written(short.config, short.params, settings_of(each)).tokens for each in seeds]
    assert run(seeds).tolist() == [each.tolist() for each in alone]
    assert not (alone[0] == alone[1]).all()


@pytest.mark.slow
def test_gradients_of_unrolled_steps_are_those_of_the_whole_text(short):
    """A policy gradient: the log-probability of what was drawn, through the cache or by one call over all tokens."""
    settings = settings_of(jnp.asarray([4, 5, 6], jnp.uint32))
    weights = jnp.asarray([1.0, -0.5, 2.0])
    state = written(short.config, short.params, settings)
    places = jnp.arange(23)
    answers = (places >= settings.prompt_lengths[:, None]) & (places < state.lengths[:, None])

    def through_the_cache(params):
        chosen = written(short.config, params, settings).logprobs.chosen
        return (jnp.where(answers, chosen, 0.0).sum(axis=1) * weights).sum()

    def at_once(params):
        logits = phi3_jax.Phi3(short.config).apply({"params": params}, state.tokens)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(logprobs, state.tokens[:, 1:, None], axis=-1)[..., 0]
        return (jnp.where(answers[:, 1:], chosen, 0.0).sum(axis=1) * weights).sum()

    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(f))(short.params) for f in (through_the_cache, at_once)), strict=True
    )
    np.testing.assert_allclose(*values, rtol=1e-5)
    for one, another in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert jnp.abs(another).max() > 0
        np.testing.assert_allclose(one, another, atol=1e-4 * float(jnp.abs(another).max()))


@pytest.mark.slow
def test_unrolling_across_longropes_border_is_refused(tiny):
    settings = settings_of(jnp.zeros(3, jnp.uint32))
    with pytest.raises(ValueError, match="rope_policy='length'"):
        written(tiny.config, tiny.params, settings)
    long = written(tiny.config, tiny.params, settings_of(jnp.zeros(3, jnp.uint32), 0.0, "capacity"))
    expected = generate(tiny, PROMPTS, STEPS + 1, options=Options(rope_policy="capacity"))
    assert long.tokens[1, 6:13].tolist() == expected[1].token_ids
