"""The loss of training, in chunks and at once, against sums over single tokens and texts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_adapter
from training_batches import close, rows, slow_loss

from phi3_jax.train.data import Batch
from phi3_jax.train.forward import batch_sums, neftune
from phi3_jax.train.loss import cross_entropy, row_sums
from phi3_jax.train.settings import Settings, adapter_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, V = 3, 29, 11, 53


def settings(**changes):
    return Settings(**{"train": "all", "loss_chunk": 0, **changes})


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (0.03, 0.0), (0.0, 0.2), (0.01, 0.1)])
def test_cross_entropy_equals_the_formula_token_by_token(z_loss, label_smoothing):
    rng = np.random.default_rng(1)
    logits, targets = 5 * rng.normal(size=(B, T, V)).astype(np.float32), rng.integers(0, V, (B, T))
    loss, correct = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), z_loss, label_smoothing)
    for i in range(B):
        for t in range(T):
            exact = [float(z) for z in logits[i, t]]
            log_z = math.log(sum(map(math.exp, exact)))
            wished = [label_smoothing / V + (1 - label_smoothing) * (v == targets[i, t]) for v in range(V)]
            expected = sum(p * (log_z - z) for p, z in zip(wished, exact, strict=True)) + z_loss * log_z**2
            assert loss[i, t] == pytest.approx(expected, rel=2e-6)
            assert correct[i, t] == (max(exact) == exact[targets[i, t]])


@functools.cache
def case():
    rng = np.random.default_rng(2)
    x, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (V, D)))
    batch = rows([[29], [12, 9], [3, 4, 5]], T, V)
    return x, head, jax.tree.map(jnp.asarray, batch)


def sums_and_gradients(chunk):
    x, head, batch = case()

    def loss(x, head):
        sums = row_sums(lambda x: x @ head.T, x, batch, chunk, z_loss=0.01, label_smoothing=0.1)
        return sums.loss @ jnp.arange(1.0, B + 1), sums  # rows that count differently, as those of preferences do

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, head)


@pytest.mark.parametrize("chunk", [1, 7, 40, 86, 87, 1000])  # columns of 1, 2, 13, 28 and all 29
def test_chunked_equals_dense_in_loss_and_gradients(chunk):
    close(sums_and_gradients(chunk), sums_and_gradients(0), 1e-6)


def test_chunks_never_hold_the_logits_of_all_tokens():
    x, head, batch = case()

    def program(chunk):
        loss = lambda x, head: row_sums(lambda x: x @ head.T, x, batch, chunk).loss.sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1))).lower(x, head).compile()

    # A row of four columns is the most that is held: [3, 4, 53].
    sizes = [program(chunk).memory_analysis().temp_size_in_bytes for chunk in (0, 12)]
    assert sizes[0] > 4 * B * T * V
    assert sizes[1] < sizes[0] - 3 * B * T * V
    assert f"f32[{B},{T},{V}]" in program(0).as_text()
    assert f"f32[{B},4,{V}]" in program(12).as_text()
    assert f"f32[{B},{T},{V}]" not in program(12).as_text()


def test_what_is_not_learned_may_be_infinite():
    x, head, batch = case()
    unlearned = np.asarray(batch.weights[0, 1:] == 0).nonzero()[0][0]  # the column before predicts it
    sums = row_sums(lambda x: x @ head.T, x.at[0, unlearned].set(1e30), batch)
    assert jnp.isfinite(sums.loss).all()


def test_sums_count_weights_and_the_most_likely_tokens():
    x, head, batch = case()
    batch = Batch(batch.tokens, batch.weights * 0.25, batch.positions, batch.segments)
    sums = row_sums(lambda x: x @ head.T, x, batch)
    best = np.argmax(x @ head.T, -1)
    hits = (best[:, :-1] == batch.tokens[:, 1:]) * batch.weights[:, 1:]
    np.testing.assert_allclose(sums.correct, hits.sum(1))
    np.testing.assert_allclose(sums.weight, batch.weights.sum(1))


def test_there_is_no_loss_across_a_seam_or_of_padding_whatever_the_weights_say():
    x, head, batch = case()
    everywhere = Batch(batch.tokens, jnp.ones((B, T)), batch.positions, batch.segments)
    sums = row_sums(lambda x: x @ head.T, x, everywhere)
    np.testing.assert_array_equal(sums.weight, [28, 11 + 8, 2 + 3 + 4])


@pytest.mark.parametrize("chunk", [pytest.param(0, marks=pytest.mark.slow), 20])
def test_packed_texts_have_the_loss_and_gradients_of_texts_in_rows_of_their_own(tiny, chunk):
    """LongRoPE's border is 16 and the window 19: texts of 5 and 7 are short, those of 17 and 21 long."""
    batch = rows([[5, 7], [17, 6], [21]], 24, 97)

    def mean(params):
        sums = batch_sums(settings(loss_chunk=chunk), tiny.config, params, {}, batch)
        return sums["loss"] / sums["weight"]

    slow = functools.partial(slow_loss, tiny.config, batch=batch)
    close(jax.jit(jax.value_and_grad(mean))(tiny.params), jax.jit(jax.value_and_grad(slow))(tiny.params))


def test_z_loss_and_label_smoothing_are_of_training_and_not_of_evaluation(tiny):
    batch, key = rows([[9], [13]], 13, 97), jax.random.key(0)

    def loss(key, **changes):
        sums = jax.jit(lambda params: batch_sums(settings(**changes), tiny.config, params, {}, batch, key))(tiny.params)
        return float(sums["loss"])

    plain = loss(None)
    assert loss(None, z_loss=0.1, label_smoothing=0.1) == plain
    assert loss(key) == pytest.approx(plain)
    for change in ({"z_loss": 0.1}, {"label_smoothing": 0.1}):
        assert abs(loss(key, **change) - plain) > 0.5


def test_neftunes_noise_is_uniform_and_as_strong_as_the_length_of_the_text_says():
    D, alpha = 64, 5.0
    batch = jax.tree.map(jnp.asarray, rows([[200, 50], [256]], 256, V))
    noise = np.asarray(neftune(jnp.zeros((2, 256, D)), batch, alpha, jax.random.key(3)))
    for length, part in ((200, noise[0, :200]), (50, noise[0, 200:250]), (256, noise[1])):
        bound = alpha / math.sqrt(length * D)
        assert 0.999 * bound < np.abs(part).max() <= bound
        assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
        assert abs(part.mean()) < 0.02 * bound
    one, other = noise[0, :200] * math.sqrt(200), noise[1, :200] * math.sqrt(256)  # rows have numbers of their own
    assert np.abs(one - other).mean() == pytest.approx(2 / 3 * alpha / math.sqrt(D), rel=0.03)


def test_each_chunk_has_its_own_number():
    """By which what is random in the head differs from chunk to chunk."""
    x, head, batch = case()
    numbers = np.repeat(np.arange(5), 7)[:T]  # columns of 7
    dense = row_sums(lambda x: x @ head.T * (1 + numbers[:, None]), x, batch)
    for chunk, shown in ((7 * B, dense), (0, row_sums(lambda x: x @ head.T, x, batch))):
        close(row_sums(lambda x, number: x @ head.T * (1 + number), x, batch, chunk, numbered=True), shown)


def test_dropout_at_the_head_differs_from_chunk_to_chunk(tiny):
    """Where all tokens are alike, so are their features, and a loss differs only by what is dropped."""
    changes = {"lora_targets": ("lm_head",), "lora_dropout": 0.5, "loss_chunk": 5}
    s, length = Settings(batch_size=1, **changes), 15
    adapter = random_adapter(tiny.config, adapter_config(s))
    positions = np.arange(length, dtype=np.int32)[None]
    batch = Batch(np.full((1, length), 9, np.int32), np.zeros((1, length), np.float32), positions, 0 * positions)

    @jax.jit
    def loss(weights, key):
        learned = dataclasses.replace(batch, weights=weights)
        return batch_sums(s, tiny.config, adapter, tiny.params, learned, key)["loss"]

    columns = np.eye(length, dtype=np.float32)[:, None]
    losses = [float(loss(columns[i], jax.random.key(3))) for i in (1, 6, 11)]
    assert min(abs(losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    assert float(loss(columns[6], jax.random.key(3))) == losses[1]
