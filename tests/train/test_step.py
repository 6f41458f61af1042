"""The step of training: against steps recorded from torch and PEFT, and against itself in other guises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from adapters import BASE, RECORDED
from training_batches import PARTS, PLAIN, close, run, settings, stack, texts

import phi3_jax
from phi3_jax.checkpoint import load_adapter
from phi3_jax.train.data import Batch
from phi3_jax.train.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def recorded(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(RECORDED / name / "expected.safetensors")


def recorded_batches(tensors: dict[str, np.ndarray], count: int) -> list[Batch]:
    """[1, B, T] each; those that are recorded, in turn."""
    data = [tensors[name] for name in ("tokens", "weights", "positions")]
    data = [leaf if leaf.ndim == 3 else leaf[None] for leaf in data]
    made = [Batch(*(leaf[i][None] for leaf in data), np.zeros_like(data[0][i])[None]) for i in range(len(data[0]))]
    return [made[step % len(made)] for step in range(count)]


def check_curve(metrics, expected):
    np.testing.assert_allclose(metrics["loss"], expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norms"], rtol=1e-3)


# ---------------------------------------------------------------------------------------------- the recorded numbers


@pytest.mark.parametrize("remat", ["none", "full"])
def test_twenty_steps_of_torch(remat):
    expected, base = recorded("full_steps"), phi3_jax.load(BASE)
    settings = Settings(**PLAIN, lr=3e-3, clip_norm=0, batch_size=3, remat=remat)
    state, _, metrics = run(settings, base.config, base.params, recorded_batches(expected, 20))
    check_curve(metrics, expected)
    np.testing.assert_allclose(state.trainable["norm"]["weight"], expected["after/model.norm.weight"], atol=1e-4)


def test_twenty_steps_of_torch_with_padding_weights_decay_clipping_and_a_schedule():
    expected, base = recorded("full_steps_padded"), phi3_jax.load(BASE.parent / "partial_tied")
    changes = {"schedule": "cosine", "final_lr": 0.0, "steps": 20, "weight_decay": 0.1, "clip_norm": 1.0}
    settings = Settings(**PLAIN | changes | {"loss_chunk": 20}, lr=1e-3, batch_size=4)
    state, _, metrics = run(settings, base.config, base.params, recorded_batches(expected, 20))
    check_curve(metrics, expected)
    assert (metrics["grad_norm"] > 2).all()  # clipped in every step
    np.testing.assert_allclose(state.trainable["norm"]["weight"], expected["after/model.norm.weight"], atol=1e-4)


def test_ten_lora_steps_of_peft():
    expected, base = recorded("lora_steps"), phi3_jax.load(BASE)
    lora, adapter = load_adapter(RECORDED / "lora_steps", base.config)
    settings = Settings(
        **PLAIN | {"train": "lora"}, lr=0.02, weight_decay=0.1, batch_size=3, lora_rank=lora.rank, lora_alpha=lora.alpha
    )
    _, _, metrics = run(settings, base.config, base.params, recorded_batches(expected, 10), adapter)
    check_curve(metrics, expected)


# ---------------------------------------------------------------------------------------------- equalities


@functools.cache
def gradient_step(**changes):
    """A step of plain descent at rate 1 without momentum, whose change is the gradient, and its metrics."""
    tiny = tiny_model()
    s = settings(optimizer="sgd", beta1=0.0, lr=1.0, clip_norm=0, **changes)
    parts = PARTS if s.accumulation == 3 else [jax.tree.map(lambda *leaves: np.concatenate(leaves), *PARTS)]
    state, _, metrics = run(s, tiny.config, tiny.params, [stack(*parts)])
    return jax.tree.map(jnp.subtract, tiny.params, state.trainable), metrics


@functools.cache
def tiny_model():
    return phi3_jax.load(BASE.parent / "longrope")


def test_accumulation_equals_one_large_batch_weighted_by_tokens():
    """The three parts have very different numbers of learned tokens: a mean of means would be far off."""
    counts = [sum(w[1:].sum() for _, w in texts(part)) for part in PARTS]
    assert max(counts) > 5 * min(counts)
    (many, metrics), (one, expected) = gradient_step(accumulation=3), gradient_step(batch_size=6)
    close(many, one)
    assert metrics["tokens"] == expected["tokens"] == sum(counts)
    for name in ("loss", "accuracy", "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("changes", [{"remat": "dots"}, {"remat": "full"}, {"loss_chunk": 30}])
def test_remat_and_chunks_do_not_change_loss_or_gradient(changes):
    (got, metrics), (expected, plain) = gradient_step(accumulation=3, **changes), gradient_step(accumulation=3)
    close(got, expected)
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.slow
def test_clipping_scales_the_whole_gradient(tiny):
    s = settings(optimizer="sgd", beta1=0.0, lr=1.0)
    for clip, length in ((0.5, 0.5), (1e6, None)):
        state, _, metrics = run(dataclasses.replace(s, clip_norm=clip), tiny.config, tiny.params, [stack(PARTS[1])])
        change = float(optax.tree.norm(jax.tree.map(jnp.subtract, tiny.params, state.trainable)))
        assert change == pytest.approx(length or metrics["grad_norm"][0], rel=1e-3)
