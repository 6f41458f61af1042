"""Preferences, against the formula computed text by text."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import dense, random_adapter, scalings
from training_batches import close, rows, stack, text_loss, texts

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.train.data import Pair
from phi3_jax.train.forward import Reference, batch_sums
from phi3_jax.train.settings import Settings, adapter_config
from phi3_jax.train.step import make_train_step, start

pytestmark = pytest.mark.usefixtures("quick_compilation")

BETA = 0.3
OTHER = LoraConfig(3, 7, ("o_proj", "gate_up_proj", "lm_head"), rslora=True, ranks=(("o_proj", 1),))
PAIR = Pair(rows([[5], [17]], 21, 97, seed=1), rows([[21], [8]], 21, 97, seed=2))


def settings(**changes):
    return Settings(
        **{
            "method": "dpo",
            "pack": False,
            "dpo_beta": BETA,
            "batch_size": 2,
            "lora_rank": 2,
            "lora_alpha": 2.0,
            **changes,
        }
    )


def slow_dpo(config, params, reference):
    """-log sigmoid(beta * ((log p - log p_reference) of the chosen - the same of the rejected)), the mean of pairs."""
    losses, margins = [], []
    for chosen, rejected in zip(texts(PAIR.chosen), texts(PAIR.rejected), strict=True):
        rewards = [
            BETA * (text_loss(config, reference, *text) - text_loss(config, params, *text))
            for text in (chosen, rejected)
        ]
        margins.append(rewards[0] - rewards[1])
        losses.append(jnp.log1p(jnp.exp(-margins[-1])))
    return sum(losses) / len(losses), jnp.stack(margins)


@pytest.mark.parametrize("train", [pytest.param("all", marks=pytest.mark.slow), "lora"])
def test_loss_gradients_and_metrics_equal_the_formula(tiny, train):
    config, s = tiny.config, settings(train=train, loss_chunk=30)
    if train == "lora":
        trainable = random_adapter(config, adapter_config(s), seed=4)
        slow_params = lambda adapter: dense(tiny.params, adapter, adapter_config(s), 1.0)  # noqa: E731
    else:
        noise = phi3_jax.random_params(config, seed=5)
        trainable = jax.tree.map(lambda w, n: w + 0.05 * n, tiny.params, noise)
        slow_params = lambda params: params  # noqa: E731

    def fast(trainable):
        sums = batch_sums(s, config, trainable, tiny.params, PAIR, jax.random.key(0))
        return sums["loss"] / sums["weight"], sums

    def slow(trainable):
        return slow_dpo(config, slow_params(trainable), tiny.params)

    (loss, sums), gradient = jax.jit(jax.value_and_grad(fast, has_aux=True))(trainable)
    (expected, margins), slow_gradient = jax.jit(jax.value_and_grad(slow, has_aux=True))(trainable)
    assert float(jnp.abs(margins).min()) > 0.01  # the two models differ
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    close(gradient, slow_gradient, 2e-5)
    assert float(sums["margin"]) == pytest.approx(float(margins.sum()), rel=1e-4)
    assert float(sums["correct"]) == int((margins > 0).sum())
    assert (float(sums["weight"]), float(sums["tokens"])) == (
        2,
        PAIR.chosen.weights.sum() + PAIR.rejected.weights.sum(),
    )


@pytest.mark.parametrize("train", ["all", "lora"])
def test_training_starts_at_log_2_and_learns_the_preference(tiny, train):
    s = settings(train=train, lr=0.01, warmup_steps=0, accumulation=1)
    state, frozen = start(s, tiny.config, tiny.params)
    step = make_train_step(s, tiny.config)
    curve = []
    for _ in range(8):
        state, metrics = step(state, frozen, stack(PAIR))
        curve.append({name: float(value) for name, value in metrics.items()})
    assert curve[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert curve[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert curve[-1]["loss"] < 0.2
    assert curve[-1]["accuracy"] == 1


def test_pairs_of_padding_do_not_count(tiny):
    empty = jax.tree.map(np.zeros_like, PAIR)
    longer = jax.tree.map(lambda a, b: np.concatenate([a, b]), PAIR, empty)
    sums = [
        jax.jit(lambda batch: batch_sums(settings(train="all"), tiny.config, tiny.params, tiny.params, batch))(batch)
        for batch in (PAIR, longer)
    ]
    close(sums[1], sums[0])


# ----------------------------------------------------------------------------------------------- the reference


def case(tiny, named):
    """Training that began with an adapter: settings, the adapter now, what is frozen, the reference multiplied out."""
    s = settings(dpo_reference=named, loss_chunk=30, lora_targets=("qkv_proj", "down_proj"))
    lora = adapter_config(s)
    begun, now = random_adapter(tiny.config, lora, 4), random_adapter(tiny.config, lora, 5)
    other = (OTHER, random_adapter(tiny.config, OTHER, 6)) if named == "other" else None
    state, frozen = start(s, tiny.config, tiny.params, begun, other)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, begun)
    assert isinstance(frozen, Reference) == (named != "base")
    reference = {
        "start": lambda: dense(tiny.params, begun, lora, 1.0),
        "base": lambda: tiny.params,
        "other": lambda: dense(tiny.params, other[1], OTHER, scalings(OTHER)),
    }[named]()
    return s, now, frozen, reference


_text_loss = jax.jit(text_loss, static_argnums=0)


@pytest.mark.parametrize("named", ["start", "base", "other"])
def test_the_reference_is_what_the_setting_names(tiny, named):
    s, now, frozen, reference = case(tiny, named)
    sums = jax.jit(lambda adapter, frozen: batch_sums(s, tiny.config, adapter, frozen, PAIR))(now, frozen)
    ours, losses = dense(tiny.params, now, adapter_config(s), 1.0), []
    for both in zip(texts(PAIR.chosen), texts(PAIR.rejected), strict=True):
        chosen, rejected = (
            BETA * float(_text_loss(tiny.config, reference, *text) - _text_loss(tiny.config, ours, *text))
            for text in both
        )
        losses.append(math.log1p(math.exp(rejected - chosen)))
    assert abs(sum(losses) / 2 - math.log(2)) > 0.01
    assert float(sums["loss"]) == pytest.approx(sum(losses), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["start", "other"])
def test_gradients_where_the_reference_has_an_adapter(tiny, named):
    s, now, frozen, reference = case(tiny, named)

    def fast(adapter):
        sums = batch_sums(s, tiny.config, adapter, frozen, PAIR, jax.random.key(0))
        return sums["loss"] / sums["weight"]

    def slow(adapter):
        return slow_dpo(tiny.config, dense(tiny.params, adapter, adapter_config(s), 1.0), reference)[0]

    (loss, gradient), (expected, slow_gradient) = (jax.jit(jax.value_and_grad(each))(now) for each in (fast, slow))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    close(gradient, slow_gradient, 5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_targets": ("embed_tokens", "o_proj")},
        pytest.param({"dora": True, "compute_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_training_on_from_an_adapter_starts_at_log_2(tiny, changes):
    s = settings(warmup_steps=0, **changes)
    begun = random_adapter(tiny.config, adapter_config(s), 4)
    state, frozen = start(s, tiny.config, tiny.params, begun)
    _, metrics = make_train_step(s, tiny.config)(state, frozen, stack(PAIR))
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx(0, abs=2e-6)
    assert float(metrics["grad_norm"]) > 0.01
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((begun, frozen)))  # only the state is donated
