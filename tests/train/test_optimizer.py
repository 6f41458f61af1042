"""Update rules, rates and what decays, against numbers of torch and against formulas."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from phi3_jax.adapters import init_adapter
from phi3_jax.train.adam8bit import BLOCK, decode, encode
from phi3_jax.train.optimizer import decayed, make_optimizer, schedule
from phi3_jax.train.settings import Settings, adapter_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = Path(__file__).parents[1] / "goldens_training"
RATES = safetensors.numpy.load_file(GOLDENS / "schedules" / "expected.safetensors")


def constant(**changes):
    return Settings(**{"schedule": "constant", "warmup_steps": 0, "lr": 0.1, **changes})


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_rates_after_the_warm_up_are_those_of_transformers_and_end_where_they_should(name, final):
    rate = schedule(Settings(lr=0.3, schedule=name, warmup_steps=4, steps=23, final_lr=final))
    warm_up = [float(rate(count)) for count in range(4)]
    np.testing.assert_allclose(warm_up, [0.06, 0.12, 0.18, 0.24], rtol=1e-6)
    expected = RATES[name] * (1 - final) + 0.3 * final if name != "constant" else RATES[name]
    np.testing.assert_allclose([float(rate(count)) for count in range(4, 23)], expected, rtol=1e-5, atol=1e-8)
    assert float(rate(100)) == pytest.approx(0.3 if name == "constant" else 0.3 * final, abs=1e-7)


def run(settings, gradients, start):
    optimizer = make_optimizer(settings)
    params = {"w": jnp.asarray(start, jnp.float32)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"])


def slow(settings, gradients, start):
    """Number by number, in float64, as torch's documentation has AdamW and SGD, and the paper of Lion."""
    s = settings
    w = np.array(start, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if s.optimizer == "adamw":
            m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
            update = m / (1 - s.beta1**t) / (np.sqrt(v / (1 - s.beta2**t)) + s.epsilon)
        elif s.optimizer == "lion":
            update = np.sign(s.beta1 * m + (1 - s.beta1) * g)
            m = s.beta2 * m + (1 - s.beta2) * g
        else:
            m = s.beta1 * m + g
            update = m
        w = w - s.lr * (update + s.weight_decay * w)
    return w


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_updates_equal_the_formulas(optimizer, beta1):
    rng = np.random.default_rng(3)
    # Gradients near epsilon, too: it stands outside of the root and behind the correction of the bias.
    gradients = [rng.normal(size=(3, 5)) * 10.0 ** rng.integers(-7, 1, (3, 5)) for _ in range(7)]
    start = rng.normal(size=(3, 5))
    s = constant(optimizer=optimizer, beta1=beta1, beta2=0.97, epsilon=1e-4, weight_decay=0.3)
    np.testing.assert_allclose(run(s, gradients, start), slow(s, gradients, start), rtol=1e-5, atol=1e-6)


def test_adafactor_makes_its_second_moments_of_rows_and_columns():
    """One step: g / sqrt(mean of rows * mean of columns / mean of all), which has a root mean square of 1 at most."""
    rng = np.random.default_rng(4)
    g = rng.normal(size=(130, 140)) * np.exp(rng.normal(size=(130, 1)))
    squares = g**2
    scaled = g / np.sqrt(np.outer(squares.mean(1), squares.mean(0)) / squares.mean())
    expected = -0.1 * scaled / max(1, math.sqrt((scaled**2).mean()))
    np.testing.assert_allclose(run(constant(optimizer="adafactor"), [g], np.zeros_like(g)), expected, rtol=1e-4)
    state = make_optimizer(constant(optimizer="adafactor")).init({"w": jnp.zeros((130, 140))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 300


def test_weight_decay_spares_norms_and_nothing_else(tiny):
    names = jax.tree.map_with_path(lambda path, leaf: jax.tree_util.keystr(path), decayed(tiny.params))
    spared = {name for name, on in zip(*map(jax.tree.leaves, (names, decayed(tiny.params))), strict=True) if not on}
    norms = ("['layers']['input_layernorm']", "['layers']['post_attention_layernorm']", "['norm']")
    assert spared == {f"{norm}['weight']" for norm in norms}
    adapter = init_adapter(tiny.config, adapter_config(Settings(dora=True)), jax.random.key(0), tiny.params)
    assert all(jax.tree.leaves(decayed(adapter)))


# ---------------------------------------------------------------------------------------------- moments of one byte


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_precise_for_large_numbers_and_never_far_off_for_small_ones(signed):
    rng = np.random.default_rng(5)
    x = 10.0 ** rng.uniform(-4, 0, (7, 2 * BLOCK + 33)).astype(np.float32)
    x = x * rng.choice([-1, 1], x.shape).astype(np.float32) if signed else x
    back = np.asarray(decode(encode(jnp.asarray(x), signed)))
    # With k steps from 0 to the block's largest number, a code of power p is off by p / 2 / (k * root) at most.
    k, power = (127, 2) if signed else (255, 4)
    largest = np.asarray(encode(jnp.asarray(x), signed).scales).repeat(BLOCK, -1)[:, : x.shape[1]]
    root = (np.abs(x) / largest) ** (1 / power)
    bound = np.abs(x) * ((1 + 0.51 / (k * root)) ** power - 1)
    assert (np.abs(back - x) <= bound).all()
    assert (bound[root > 0.5] < 0.02 * np.abs(x[root > 0.5])).all()


def test_codes_of_extremes():
    x = jnp.zeros((2, BLOCK + 1)).at[1, 0].set(1e30).at[1, 1].set(1.0).at[1, BLOCK].set(1e-30)
    for signed in (True, False):
        back = decode(encode(x, signed))
        assert (back[0] == 0).all()
        assert back[1, 0] == pytest.approx(1e30)
        assert back[1, BLOCK] == pytest.approx(1e-30)  # another block
    assert decode(encode(x, False))[1, 1] > 0  # no second moment is rounded to 0


def test_eight_bits_follow_adam():
    """A small network learns as well as with AdamW, and takes the same way at first."""
    rng = np.random.default_rng(6)
    x, y = jnp.asarray(rng.normal(size=(64, 300))), jnp.asarray(rng.normal(size=(64, 3)))
    begin = {"a": jnp.asarray(rng.normal(size=(40, 300)) * 0.05), "b": jnp.asarray(rng.normal(size=(3, 40)) * 0.2)}

    @jax.jit
    def loss(params):
        return ((jnp.tanh(x @ params["a"].T) @ params["b"].T - y) ** 2).mean()

    curves = {}
    for name in ("adamw", "adamw8bit"):
        optimizer, params, curve = make_optimizer(constant(optimizer=name, lr=0.003)), begin, []
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(60):
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            curve.append(float(value))
        curves[name] = np.array(curve)
    assert curves["adamw"][-1] < 0.1 * curves["adamw"][0]
    np.testing.assert_allclose(curves["adamw8bit"], curves["adamw"], rtol=0.05, atol=0.005)


def test_eight_bits_take_two_bytes_for_each_weight():
    state = make_optimizer(constant(optimizer="adamw8bit")).init({"w": jnp.zeros((64, 1024))})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 2.05 * 64 * 1024
