"""What a step of training keeps, skips and draws; precision; evaluation and export."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import PARTS, close, run, settings, slow_loss, stack, train_step

from phi3_jax.adapters import merge
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear import linear
from phi3_jax.quantization import quantize_params
from phi3_jax.train.forward import batch_sums
from phi3_jax.train.run.memory import ahead
from phi3_jax.train.settings import adapter_config
from phi3_jax.train.step import make_eval_step, make_train_step, start

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_step_that_is_not_finite_changes_only_the_counters(tiny):
    """An infinite weight on one token stands for an overflow."""
    good = stack(PARTS[1])
    bad = dataclasses.replace(good, weights=np.where(good.weights > 0, np.inf, 0).astype(np.float32))
    s = settings(schedule="linear", steps=9, optimizer="adamw8bit")
    state, _, metrics = run(s, tiny.config, tiny.params, [good, bad, bad, good])
    without, _, expected = run(s, tiny.config, tiny.params, [good, good])
    assert metrics["finite"].tolist() == [1, 0, 0, 1]
    assert (int(state.step), int(state.bad_steps), int(state.bad_in_row)) == (4, 2, 0)
    for got, wanted in zip(
        jax.tree.leaves((state.trainable, state.opt_state)),
        jax.tree.leaves((without.trainable, without.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(metrics["lr"][[0, 3]], expected["lr"])
    state, _, _ = run(s, tiny.config, tiny.params, [good, bad, bad])
    assert (int(state.bad_steps), int(state.bad_in_row)) == (2, 2)


def test_a_step_without_learned_tokens_is_finite(tiny):
    nothing = stack(dataclasses.replace(PARTS[1], weights=np.zeros_like(PARTS[1].weights)))
    _, _, metrics = run(settings(), tiny.config, tiny.params, [nothing])
    assert (metrics["finite"][0], metrics["loss"][0], metrics["grad_norm"][0]) == (1, 0, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_state_is_updated_in_its_own_memory(tiny, optimizer):
    s = settings(optimizer=optimizer, accumulation=2)
    state, frozen = start(s, tiny.config, tiny.params)
    compiled = make_train_step(s, tiny.config).lower(state, frozen, stack(*PARTS[:2])).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_the_callers_weights_stay_usable_and_the_old_state_does_not(tiny):
    s = settings()
    state, frozen = start(s, tiny.config, tiny.params)
    make_train_step(s, tiny.config)(state, frozen, stack(PARTS[0]))
    assert state.trainable["norm"]["weight"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tiny.params))


def test_random_numbers_depend_on_seed_step_and_part_alone(tiny):
    """Dropout and noise: a run goes on from its second step as if it had never stopped."""
    noisy = {"train": "lora", "lora_dropout": 0.3, "neftune_alpha": 5.0, "accumulation": 2}
    s, batch = settings(**noisy), stack(PARTS[1], PARTS[1])
    state, frozen, metrics = run(s, tiny.config, tiny.params, [batch] * 3)
    first, frozen, _ = run(s, tiny.config, tiny.params, [batch])
    resumed = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), first)
    for _ in range(2):
        resumed, last = train_step(s, tiny.config)(resumed, frozen, batch)
    for got, wanted in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert float(last["loss"]) == metrics["loss"][2]


@pytest.mark.parametrize("noise", [{"lora_dropout": 0.3}, {"neftune_alpha": 5.0}])
def test_noise_differs_from_step_to_step_and_is_not_in_evaluation(tiny, noise):
    s = settings(train="lora", lr=1e-30, **noise)
    state, frozen, metrics = run(s, tiny.config, tiny.params, [stack(PARTS[1])] * 2)
    first, second = metrics["grad_norm"]  # an adapter that is still zero has the same loss whatever it drops
    assert first != second
    evaluate = functools.partial(make_eval_step(s, tiny.config), state.trainable, frozen)
    assert float(evaluate(PARTS[1])["loss"]) == float(evaluate(PARTS[1])["loss"])


@pytest.mark.slow
# ---------------------------------------------------------------------------------------------- precision, export


def test_bfloat16_multiplies_with_float32_master_weights_or_without(tiny):
    batches = [stack(PARTS[1])] * 12
    _, _, wanted = run(settings(lr=1e-3), tiny.config, tiny.params, batches)
    master, _, near = run(settings(lr=1e-3, compute_dtype="bfloat16"), tiny.config, tiny.params, batches)
    low = {"compute_dtype": "bfloat16", "dtype": "bfloat16"}
    pure, _, rough = run(settings(lr=1e-3, **low), tiny.config, tiny.params, batches)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(master.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pure.trainable)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pure.opt_state)} == {"float32", "int32"}
    np.testing.assert_allclose(near["loss"], wanted["loss"], rtol=0.03)
    # Weights are rounded by chance at each step.
    np.testing.assert_allclose(rough["loss"], wanted["loss"], rtol=0.15)
    assert wanted["loss"][-1] < 0.8 * wanted["loss"][0]
    program = make_train_step(settings(compute_dtype="bfloat16"), tiny.config)
    state, frozen = start(settings(), tiny.config, tiny.params)
    assert "bf16[2,21,24]" in program.lower(state, frozen, batches[0]).as_text("hlo")


@pytest.mark.slow
def test_an_adapter_learns_on_integers_and_can_be_merged_into_their_floats(tiny):
    s, base = settings(train="lora", quantize="int8"), quantize_params(tiny.params, "int8")
    state, frozen, metrics = run(s, tiny.config, base, [stack(PARTS[1])] * 8)
    assert metrics["loss"][-1] < 0.9 * metrics["loss"][0]
    assert isinstance(frozen["layers"]["mlp"]["down_proj"]["weight"], QuantizedTensor)
    sums = make_eval_step(s, tiny.config)(state.trainable, frozen, PARTS[1])
    floats = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedTensor) else w,
        frozen,
        is_leaf=lambda w: isinstance(w, QuantizedTensor),
    )
    merged = merge(floats, state.trainable, adapter_config(s))
    whole = make_eval_step(settings(), tiny.config)(merged, {}, PARTS[1])
    close(whole, sums)


def test_integers_cannot_be_trained(tiny):
    with pytest.raises(ValueError, match="train=all: the checkpoint's weights are integers"):
        start(settings(), tiny.config, quantize_params(tiny.params, "int8"))


def test_evaluation_sums_what_the_model_says(tiny):
    s = settings()
    state, frozen = start(s, tiny.config, tiny.params)
    sums = make_eval_step(s, tiny.config)(state.trainable, frozen, PARTS[1])
    mean = jax.jit(lambda params: slow_loss(tiny.config, params, PARTS[1]))(tiny.params)
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(mean), rel=1e-5)
    assert float(sums["weight"]) == float(sums["tokens"]) == PARTS[1].weights.sum()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("policy", ["int4", "int8-g64-asymmetric"])
def test_the_backward_pass_keeps_integers_and_not_their_floats(tiny, remat, policy):
    """What it keeps are the leaves of jax.vjp's function; here they are shapes."""
    s = settings(train="lora", quantize=policy, remat=remat)
    like = ahead.start_like(s, tiny.config, ahead.params_like(tiny.config, "float32", policy))

    def pull_back(state, frozen):
        def loss(adapter):
            return batch_sums(s, tiny.config, adapter, frozen, PARTS[0])["loss"]

        return jax.vjp(loss, state.trainable)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, *like))
    matrices = {leaf.shape[-2:] for leaf in jax.tree.leaves(tiny.params) if leaf.ndim > 1} - {(3, 24)}  # norms
    assert any(leaf.dtype == jnp.uint8 and leaf.ndim == 3 for leaf in kept)
    floats = [leaf.shape for leaf in kept if leaf.dtype == jnp.float32]
    # Groups of padded inputs, [O, A, group], are floats before they are cut to the matrix.
    group = 64 if "g64" in policy else 32
    assert not [shape for shape in floats if shape[-2:] in matrices or group in shape[-2:]]


def test_the_gradient_of_a_product_with_integers(tiny):
    """Alone, and as a layer of a stack."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (3, 24, 32), dtype=np.uint8)
    scales, mins = (rng.normal(size=(3, 24, 2)).astype(np.float16) for _ in range(2))
    weight = QuantizedTensor(*map(jnp.asarray, (values, scales, mins)), bits=4, columns=40)
    x = jax.random.normal(jax.random.key(0), (5, 7, 40))

    def total(x, weight, layer=None):
        return (linear(x, weight, layer, dtype=jnp.float32) ** 2).sum()

    for number in range(3):
        floats = weight.layer(jnp.int32(number)).dequantize()
        expected = 2 * (x @ floats.T) @ floats
        close(jax.grad(total)(x, weight, jnp.int32(number)), expected)
        close(jax.grad(total)(x, weight.layer(jnp.int32(number))), expected)
