"""Rows of several adapters in one batch, beside each adapter multiplied into the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import dense, random_adapter, scalings

import phi3_jax
from phi3_jax.adapters import HEAD, TABLE, LoraConfig
from phi3_jax.adapters import attach as attach_one
from phi3_jax.checkpoint import save_adapter
from phi3_jax.infer import generate
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job
from phi3_jax.infer.serving.engine.adapters import Adapters
from phi3_jax.kernels import LoraRows, linear, split_layers
from phi3_jax.model import KVCache, Phi3

pytestmark = pytest.mark.usefixtures("quick_compilation")
KINDS = {
    "all": LoraConfig(3, 6.0),
    "some": LoraConfig(2, 1.0, ("o_proj", "down_proj", HEAD), rslora=True, alphas=(("o_proj", 3.0),)),
    "one": LoraConfig(1, 5.0, ("qkv_proj",)),
    "table": LoraConfig(4, 2.0, (TABLE, "gate_up_proj"), ranks=(("gate_up_proj", 2),)),
}
MIXED = ["some", None, "all", "table", "one", "all"]


def save(folder, config, kinds):
    made = {name: random_adapter(config, lora, seed) for seed, (name, lora) in enumerate(kinds.items())}
    for name, lora in kinds.items():
        save_adapter(folder / name, made[name], lora, config, "base")
    return {name: folder / name for name in kinds}, made


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return save(tmp_path_factory.mktemp("adapters"), tiny.config, KINDS)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens):
    cache = KVCache.create(config, len(tokens), 24, "float32")
    return Phi3(config).apply({"params": params}, tokens, cache=cache)[0]


def by_hand(checkpoint, made, name, kinds=KINDS):
    if name is None:
        return checkpoint.params
    return dense(checkpoint.params, made[name], kinds[name], scalings(kinds[name]))


def tokens_of(rows):
    return np.random.default_rng(5).integers(4, 97, (rows, 6))


def test_each_row_is_that_of_its_own_adapter_multiplied_out(tiny, saved):
    folders, made = saved
    adapters, tokens = Adapters.load(tiny, folders), tokens_of(len(MIXED))
    logits = np.asarray(run(tiny.config, adapters.rows(MIXED), tokens))
    plain = np.asarray(run(tiny.config, tiny.params, tokens))
    before = run._cache_size()
    for turned in (MIXED[::-1], [None] * len(MIXED), ["all"] * len(MIXED)):
        other = np.asarray(run(tiny.config, adapters.rows(turned), tokens))
        for row, (name, own) in enumerate(zip(turned, MIXED, strict=True)):
            if name is None:
                np.testing.assert_array_equal(other[row], plain[row])
            elif name == own:  # whatever its neighbours have
                np.testing.assert_array_equal(other[row], logits[row])
    assert run._cache_size() == before
    for row, name in enumerate(MIXED):
        expected = np.asarray(run(tiny.config, by_hand(tiny, made, name), tokens))[row]
        np.testing.assert_allclose(logits[row], expected, atol=2e-4 * abs(expected).max(), err_msg=str(name))
        assert name is None or abs(plain[row] - expected).max() > 0.1 * abs(expected).max()


def test_of_a_tied_model_the_head_follows_the_embedding_where_the_adapter_ties_them(tiny, tmp_path):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    tied = dataclasses.replace(tiny, config=config, params={k: v for k, v in tiny.params.items() if k != HEAD})
    kinds = {"both": LoraConfig(2, 3.0, (TABLE,), tied=True), "table": LoraConfig(3, 2.0, (TABLE,))}
    folders, made = save(tmp_path, config, kinds)
    names, tokens = [None, "both", "table"], tokens_of(3)
    logits = np.asarray(run(config, Adapters.load(tied, folders).rows(names), tokens))
    for row, name in enumerate(names):
        params = by_hand(tied, made, name, kinds)
        if name == "table":
            params = params | {HEAD: tied.params[TABLE]}
        expected = np.asarray(run(config, params, tokens))[row]
        np.testing.assert_allclose(logits[row], expected, atol=2e-4 * abs(expected).max(), err_msg=str(name))


def test_what_one_adapter_makes_infinite_stays_in_its_rows():
    draw = np.random.default_rng(0)
    base, a, b, x = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((5, 7), (3, 7), (3, 5), (3, 1, 7)))
    a = a.at[2].multiply(1e30).at[2, 0].set(3e38)
    x = x.at[:, :, 0].set(1e10)
    scaling = jnp.asarray([[0, 0, 1], [0.5, 0.5, 0], [0, 0, 0]], jnp.float32)
    found = np.asarray(linear.linear(x, LoraRows(base, a, b, scaling)))
    assert not np.isfinite(found[0]).all()
    expected = np.asarray(x[1], np.float64) @ np.asarray(base + 0.5 * b[:2].T @ a[:2], np.float64).T
    np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e5)
    np.testing.assert_array_equal(found[2], linear.linear(x, base)[2])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "layers"])
def test_on_weights_of_every_kind(tiny, tiny_folder, saved, quantize):
    folders, made = saved
    if quantize == "layers":
        checkpoint = dataclasses.replace(tiny, params=split_layers(tiny.params))
    else:
        options = {"dtype": "bfloat16"} if quantize is None else {"quantize": quantize}
        checkpoint = phi3_jax.load(tiny_folder, layout="packed", **options)
    without_table = {name: folder for name, folder in folders.items() if name != "table"}
    adapters, names, tokens = Adapters.load(checkpoint, without_table), ["some", None, "one", None], tokens_of(4)
    logits = np.asarray(run(checkpoint.config, adapters.rows(names), tokens))
    np.testing.assert_array_equal(logits[[1, 3]], np.asarray(run(checkpoint.config, checkpoint.params, tokens))[[1, 3]])
    for row in (0, 2):
        alone = attach_one(checkpoint.params, made[names[row]], KINDS[names[row]])
        expected = np.asarray(run(checkpoint.config, alone, tokens))[row]
        np.testing.assert_allclose(logits[row], expected, atol=0.02 * abs(expected).max())
    if quantize == "layers":
        return
    # With packed weights, bit for bit, whatever other rows and adapters there are.
    only = Adapters.load(checkpoint, {"some": folders["some"]})
    by_itself = np.asarray(run(checkpoint.config, only.rows(["some"]), tokens[:1]))
    np.testing.assert_array_equal(by_itself[0], logits[0])


def asked(engine, names, prompts):
    told = [[] for _ in names]
    for name, prompt, pieces in zip(names, prompts, told, strict=True):
        engine.submit(Job(prompt, 9, logprobs=0, adapter=name), pieces.append)
    while engine.turn():
        pass
    return [[entry for piece in pieces for entry in piece.logprobs] for pieces in told]


@pytest.mark.slow
def test_answers_are_those_of_each_adapter_alone(tiny, saved):
    folders, made = saved
    options = EngineOptions(slots=4, room=40, chunk=8)
    engine, prompts = Engine(tiny, options, adapters=folders), [tokens_of(1)[0].tolist() + [7] * 9] * 5
    names = [None, "all", "some", "table", None]
    answers = asked(engine, names, prompts)
    for name, answer in zip(names, answers, strict=True):
        own = dataclasses.replace(tiny, params=by_hand(tiny, made, name))
        (expected,) = generate(own, prompts[:1], 9)
        assert [entry.token_id for entry in answer] == expected.token_ids
    assert len({tuple(entry.token_id for entry in answer) for answer in answers}) == 4
    # What the prefix cache has of one adapter is not another's.
    (again,) = asked(engine, names[2:3], prompts[:1])
    assert [entry.token_id for entry in again] == [entry.token_id for entry in answers[2]]


def test_names_and_folders_that_are_refused(tiny, saved, tmp_path):
    folders, _ = saved
    engine = Engine(tiny, EngineOptions(slots=1, room=16), adapters=folders)
    with pytest.raises(ValueError, match="there is no adapter 'ale'; known are all, some, one, table"):
        engine.submit(Job([5], 1, adapter="ale"), print)
    with pytest.raises(ValueError, match="there is no adapter 'all'; there are none"):
        Engine(tiny, EngineOptions(slots=1, room=16)).submit(Job([5], 1, adapter="all"), print)
    lora = LoraConfig(2, 4.0, ("o_proj",), dora=True)
    save_adapter(tmp_path / "dora", random_adapter(tiny.config, lora), lora, tiny.config, "base")
    with pytest.raises(ValueError, match=r"adapter 'd' is DoRA, .* serve it alone"):
        Adapters.load(tiny, {"d": tmp_path / "dora"})
    bad = LoraConfig(2, 4.0, ("o_proj",))
    broken = jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.inf), random_adapter(tiny.config, bad))
    save_adapter(tmp_path / "broken", broken, bad, tiny.config, "base")
    with pytest.raises(ValueError, match="adapter 'b' has numbers in layers/self_attn/o_proj that are not finite"):
        Adapters.load(tiny, {"b": tmp_path / "broken"})
    other = dataclasses.replace(tiny.config, hidden_size=32)
    save_adapter(tmp_path / "other", random_adapter(other, bad), bad, other, "base")
    with pytest.raises(ValueError, match=r"adapter 'o': .*not an adapter of this model.*serve it alone"):
        Adapters.load(tiny, {"o": tmp_path / "other"})
