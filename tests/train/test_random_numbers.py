"""Dropout and noise: new numbers for each batch, step and seed, and none where the plain model is asked for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_adapter
from training_batches import PARTS, rows, settings, stack, text_loss, texts

from phi3_jax.train.data import Pair
from phi3_jax.train.dpo import interleave
from phi3_jax.train.forward import adapter_config, batch_sums
from phi3_jax.train.step import make_eval_step, make_train_step, start

pytestmark = pytest.mark.usefixtures("quick_compilation")

DROPOUT, NOISE = {"lora_dropout": 0.3}, {"neftune_alpha": 5.0}
KINDS = pytest.mark.parametrize("noise", [DROPOUT, NOISE], ids=["dropout", "noise"])


PAIR = Pair(rows([[17]], 21, 97, seed=1), rows([[12]], 21, 97, seed=2))


@pytest.fixture(scope="module")
def reference(tiny):
    """log p of PAIR's chosen answer less that of the rejected one, text by text."""
    chosen, rejected = (texts(each)[0] for each in (PAIR.chosen, PAIR.rejected))
    log_p = jax.jit(lambda params: [-text_loss(tiny.config, params, *each) for each in (chosen, rejected)])
    one, other = log_p(tiny.params)
    return one - other


@pytest.mark.parametrize("noise", [pytest.param(DROPOUT, marks=pytest.mark.slow), NOISE], ids=["dropout", "noise"])
def test_each_batch_step_and_seed_has_numbers_of_its_own(tiny, noise):
    """Told by the loss of one batch among others that have nothing to learn."""
    empty = dataclasses.replace(PARTS[1], weights=np.zeros_like(PARTS[1].weights))
    losses = {}
    for seed in (3, 4) if noise is NOISE else (3,):
        s = settings(train="lora", accumulation=3, seed=seed, **noise)
        first, frozen = start(s, tiny.config, tiny.params)
        step = make_train_step(s, tiny.config)
        adapter = random_adapter(tiny.config, adapter_config(s))

        def loss(number, part, bad=0, first=first, frozen=frozen, step=step, adapter=adapter):
            counters = {"step": jnp.int32(number), "bad_steps": jnp.int32(bad)}
            state = jax.tree.map(jnp.copy, dataclasses.replace(first, trainable=adapter, **counters))
            batch = stack(*(PARTS[1] if part == each else empty for each in range(3)))
            return float(step(state, frozen, batch)[1]["loss"])

        losses |= {(seed, *place): loss(*place) for place in itertools.product(range(2), range(3))}
        assert loss(1, 2) == loss(1, 2, bad=1) == losses[seed, 1, 2]  # nothing else counts
    for one, other in itertools.combinations(losses, 2):
        assert abs(losses[one] - losses[other]) > 1e-4, (one, other)


@KINDS
def test_evaluation_is_without_them(tiny, noise):
    noisy, plain = (settings(train="lora", **each) for each in (noise, {}))
    adapter = random_adapter(tiny.config, adapter_config(plain))
    sums = [make_eval_step(s, tiny.config)(adapter, tiny.params, PARTS[1]) for s in (noisy, plain)]
    jax.tree.map(np.testing.assert_array_equal, *sums)


@KINDS
def test_the_reference_of_preferences_is_without_them(tiny, noise, reference):
    """The margin is beta * (log p - log p_reference), of the chosen answer less that of the rejected one.

    The log p of training is that of the same answers as texts, with the same random numbers.
    """
    lora = {"train": "lora", "loss_chunk": 30, **noise}
    dpo, sft = settings(method="dpo", pack=False, dpo_beta=0.3, batch_size=1, **lora), settings(**lora)
    adapter, key = random_adapter(tiny.config, adapter_config(dpo)), jax.random.key(5)

    @jax.jit
    def sums(params, both):
        margin = batch_sums(dpo, tiny.config, adapter, params, PAIR, key)["margin"]
        sides = [dataclasses.replace(both, weights=both.weights * np.eye(2)[side][:, None]) for side in range(2)]
        ours = [-batch_sums(sft, tiny.config, adapter, params, side, key)["loss"] for side in sides]
        return margin, ours[0] - ours[1]

    margin, ours = sums(tiny.params, interleave(PAIR))
    assert abs(margin - 0.3 * (ours - reference)) < 2e-4
    assert abs(margin) > 0.01
