"""What is read, against the slow decoder: any layers, places and heads, with a cache, and of weights of every kind."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_decoder

import phi3_jax
from phi3_jax import adapters, inspection
from phi3_jax.inspection import POINTS
from phi3_jax.inspection.running import compiled, matching
from phi3_jax.kernels import PerLayer
from phi3_jax.kernels.attention import why_not_cpu
from phi3_jax.kernels.attention.masks import positions_from_mask
from phi3_jax.model.points import OUTER

pytestmark = pytest.mark.usefixtures("quick_compilation")

T = 23  # past the window of 19 and LongRoPE's border of 16
TOKENS = np.random.default_rng(4).integers(0, 97, (2, T))
HEADS = np.array([5, 1, 2])
FOREIGN = inspection.Edit("embed", jnp.ones(4, bool), None, None, jnp.ones(()), jnp.zeros(()))


def slow(tiny, row, **options):
    """All points of one row, as `run` returns them but without the axis B."""
    seen = {name: [] for name in POINTS}

    def at(name, layer, value):
        seen[name].append(value)
        return value

    slow_decoder.logits(tiny.config, tiny.params, row, at, **options)
    return {name: values[0] if name in OUTER else np.stack(values) for name, values in seen.items()}


def axis(name, letter):
    """The number of an axis in what `slow` returns."""
    return (("" if name in OUTER else "L") + POINTS[name].replace("B", "")).index(letter)


def close(got, wanted, name, atol=1e-4):
    if name == "attn.scores":
        assert (np.asarray(got)[wanted < -1e30] < -1e30).all()
        got, wanted = (np.where(wanted < -1e30, 0, each) for each in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "reads", [("ln2.scale", "attn.k", "attn.pattern", "attn.z", "logits"), pytest.param("*", marks=pytest.mark.slow)]
)
def test_chosen_layers_places_and_heads_of_ragged_rows(tiny, reads):
    """The second row has padding before it, is short, and is read at other places."""
    mask = np.arange(T) >= np.array([[0], [9]])
    chosen = {"layers": [2, 0], "positions": [[0, T - 1], [-1, 11]], "heads": HEADS.tolist()}
    got = inspection.run(tiny.config, tiny.params, TOKENS, reads, token_positions=positions_from_mask(mask), **chosen)
    assert set(got) == set(POINTS if reads == "*" else reads)
    for row, (start, places) in enumerate([(0, [0, T - 1]), (9, [T - 10, 2])]):
        expected = slow(tiny, TOKENS[row, start:])
        for name, value in got.items():
            wanted = expected[name].take(places, axis(name, "T"))
            wanted = wanted if name in OUTER else wanted[[2, 0]]
            if "N" in POINTS[name]:
                wanted = wanted.take(HEADS, axis(name, "N"))
            if "K" in POINTS[name]:
                wanted = wanted.take(HEADS // 3, axis(name, "K"))
            mine = np.asarray(value[row] if name in OUTER else value[:, row])
            close(mine[..., start:] if "S" in POINTS[name] else mine, wanted, name)
    before = compiled._cache_size()
    other = {"layers": [1, 2], "positions": [[3, 4], [20, 21]], "heads": [0, 1, 5]}
    inspection.run(tiny.config, tiny.params, TOKENS, reads, token_positions=positions_from_mask(mask), **other)
    assert compiled._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "unset"])
def test_decoding_with_a_ring_of_slots(tiny, kind):
    """Fewer slots than tokens; memory that was left as it came is not looked at."""
    config = dataclasses.replace(tiny.config, sliding_window=7)
    changed = dataclasses.replace(tiny, config=config)
    expected = [slow(changed, row, length=T) for row in TOKENS]
    cache = phi3_jax.KVCache.create(config, 2, 11, jnp.int8 if kind == "int8" else jnp.float32, kind == "unset")
    if kind == "unset" and why_not_cpu(jnp.float32) is None:  # the worst that memory may hold
        cache = dataclasses.replace(cache, k=jnp.full_like(cache.k, jnp.nan), v=jnp.full_like(cache.v, jnp.nan))
    start, reads = 0, ["*"] if kind == "unset" else ["attn.k", "attn.pattern", "logits"]
    for size in (5, 1, 1, 5, 5, 5, 1):
        where = slice(start, start + size)
        got, cache = inspection.run(
            config, tiny.params, TOKENS[:, where], reads, cache=cache, rope_lengths=[[T]], layers=[2, 1]
        )
        for row, whole in enumerate(expected):
            slots = np.asarray(cache.positions[row])
            for name, value in got.items():
                wanted = whole[name] if name in OUTER else whole[name][[2, 1]]
                wanted = wanted.take(range(start, start + size), axis(name, "T"))
                mine = np.asarray(value[row] if name in OUTER else value[:, row])
                if "S" in POINTS[name]:
                    wanted, mine = wanted[..., slots[slots >= 0]], mine[..., slots >= 0]
                if kind == "int8":
                    assert np.abs(mine - wanted).mean() < 0.1 * np.abs(wanted).mean(), name
                else:
                    close(mine, wanted, name, atol=2e-4)
        start += size
    assert start == T


def close_runs(got, wanted, names, share):
    """Each value differs by less than a share of its spread."""
    for name in names:
        spread = float(np.std(np.asarray(wanted[name], np.float64)))
        off = np.abs(np.asarray(got[name], np.float64) - np.asarray(wanted[name], np.float64))
        assert off.mean() < share * spread, (name, off.mean() / spread)


NAMES = [
    "attn.rot_k",
    "attn.pattern",
    "attn.result",
    "resid_mid",
    "ln2.scale",
    "mlp.pre",
    "mlp.post",
    "ln_final.out",
    "logits",
]


@pytest.mark.slow
def test_packed_and_unrolled_weights_and_adapters(tiny, tmp_path):
    phi3_jax.save(tiny, tmp_path / "floats")
    packed = phi3_jax.load(tmp_path / "floats", quantize="int8", layout="packed")
    lora = adapters.LoraConfig(rank=3, alpha=2.0, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    adapter = adapters.init_adapter(tiny.config, lora, jax.random.key(0))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), adapter)
    edits = [
        inspection.scale(tiny.config, "attn.z", 0.5, layers=[1]),
        inspection.zero(tiny.config, "mlp_out", [2], [4]),
    ]
    plain, merged = (
        inspection.run(tiny.config, each, TOKENS, NAMES, edits=edits)
        for each in (tiny.params, adapters.merge(tiny.params, adapter, lora))
    )
    split = tiny.params | {"layers": jax.tree.map(lambda leaf: PerLayer(tuple(leaf)), tiny.params["layers"])}
    for params, wanted, share in (
        (split, plain, 1e-5),
        (adapters.attach(packed.params, adapter, lora), merged, 0.1),
    ):
        close_runs(inspection.run(tiny.config, params, TOKENS, NAMES, edits=edits), wanted, NAMES, share)


@pytest.mark.slow
def test_a_bfloat16_model_keeps_its_types(tiny):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    vector = np.random.default_rng(1).normal(size=24).astype(np.float32)
    edits = [inspection.add(tiny.config, "resid_mid", vector, [1], [2]), inspection.scale(tiny.config, "attn.q", 2.0)]
    got = inspection.run(tiny.config, low, TOKENS, NAMES, edits=edits)
    names = {name for name, value in got.items() if value.dtype == jnp.float32}
    assert names == {"ln2.scale", "attn.pattern", "logits"}
    assert {value.dtype for name, value in got.items() if name not in names} == {jnp.dtype(jnp.bfloat16)}
    close_runs(got, inspection.run(tiny.config, wide, TOKENS, NAMES, edits=edits), NAMES, 0.1)


@pytest.mark.slow
def test_packed_sequences_equal_runs_of_their_own(tiny):
    """9 tokens and 14 in one row: edits count positions in each sequence."""
    positions = np.array([[*range(9), *range(14)]])
    edits = [inspection.zero(tiny.config, "resid_mid", [1], [3])]
    packed = inspection.run(
        tiny.config,
        tiny.params,
        TOKENS[:1],
        NAMES,
        edits=edits,
        token_positions=positions,
        segments=positions * 0 + [[0] * 9 + [1] * 14],
    )
    for part in (slice(0, 9), slice(9, T)):
        alone = inspection.run(tiny.config, tiny.params, TOKENS[:1, part], NAMES, edits=edits)
        for name, wanted in alone.items():
            mine = packed[name].take(np.arange(T)[part], POINTS[name].index("T") + (name not in OUTER))
            np.testing.assert_allclose(
                mine[..., part] if "S" in POINTS[name] else mine, wanted, atol=1e-4, err_msg=name
            )


@pytest.mark.slow
def test_layer_by_layer_is_the_same(tiny):
    whole = inspection.run(tiny.config, tiny.params, TOKENS, ["attn.pattern", "embed"])
    for layers, some in inspection.by_layer(
        tiny.config, tiny.params, TOKENS, ["attn.pattern", "embed"], layers=[2, 0], at_once=1
    ):
        np.testing.assert_array_equal(some["attn.pattern"], whole["attn.pattern"][jnp.asarray(layers)])
        np.testing.assert_array_equal(some["embed"], whole["embed"])


def test_names_are_those_that_a_field_knows():
    assert matching(["blocks.*.hook_resid_pre"]) == ("resid_pre",)
    assert matching(["blocks.*.attn.hook_z", "hook_embed"]) == ("embed", "attn.z")
    assert matching(["blocks.*.attn.hook_attn_scores"]) == ("attn.scores",)
    assert matching(["ln_final.hook_normalized", "blocks.*.ln1.hook_scale"]) == ("ln1.scale", "ln_final.normalized")
    assert matching("z") == ("attn.z",)
    assert matching(["mlp.*", "resid_m*"]) == ("resid_mid", "mlp.pre", "mlp.pre_linear", "mlp.post")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reads": ["resid_pst"]}, r"no point 'resid_pst'; did you mean resid_post\? known are embed"),
        ({"reads": ["blocks.7.hook_resid_pre"]}, r"names a layer: write blocks.\*.hook_resid_pre and layers=\[7\]"),
        ({"reads": ["embed"], "layers": [3]}, r"layers \[3\]: there are 3, 0 to 2"),
        ({"reads": ["embed"], "layers": [0, -3]}, r"layers \[0, 0\]: each can be named once"),
        ({"reads": ["embed"], "layers": []}, "no layers are named to be read: leave layers= out"),
        ({"reads": ["embed"], "heads": [6]}, r"heads \[6\]: there are 6"),
        ({"reads": ["embed"], "positions": [23]}, r"positions \[23\]: there are 23"),
        ({"reads": ["embed"], "positions": [0.5]}, r"positions are numbers, not \[0.5\]"),
        (
            {"reads": ["embed"], "token_positions": [[0] * T] * 3},
            r"token_positions of shape \[3, 23\], where .* \[2, 23\]",
        ),
        ({"reads": ["embed"], "edits": [FOREIGN]}, "embed: an edit for 4 layers, where there are 3"),
        ({"reads": ["embed"], "positions": [[0], [1], [2]]}, r"positions of shape \(3, 1\): .* for 2 rows"),
        (
            {"reads": ["attn.pattern", "embed"], "limit": 38000},
            r"would take 0.0 GB, attn.pattern \[3, 2, 6, 23, 23\] alone 0.0 GB, and the limit",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        inspection.run(tiny.config, tiny.params, TOKENS, **arguments)


def test_the_size_of_what_is_refused_is_counted(tiny):
    """1.6 TB of a prompt of 100,000 tokens, though one place and head is read: a layer has the scores of all."""
    long = np.zeros((1, 100_000), np.int32)
    with pytest.raises(
        ValueError, match=r"take 240.0 GB, attn.pattern of one layer \[1, 6, 100000, 100000\] alone 240.0 GB"
    ):
        inspection.run(tiny.config, tiny.params, long, ["attn.pattern"], layers=[0], positions=[-1], heads=[0])
    with pytest.raises(ValueError, match=r"attn.result of one layer \[1, 100000, 6, 24\] alone 0.1 GB"):
        inspection.run(tiny.config, tiny.params, long, ["attn.result"], layers=[0], positions=[-1], limit=1 << 20)


@pytest.mark.slow
def test_tokens_that_do_not_fit_into_the_cache_are_refused(tiny):
    """Compiled, they would give NaN, which an edit could replace."""
    cache = phi3_jax.KVCache.create(tiny.config, 2, 23)
    cache = cache.claim(jnp.broadcast_to(jnp.arange(T), (2, T)))
    with pytest.raises(ValueError, match="positions up to 28 do not fit into a cache of 23 slots"):
        inspection.run(tiny.config, tiny.params, TOKENS[:, :6], cache=cache)


@pytest.mark.slow
def test_the_python_of_the_guide_runs_as_printed(tiny):
    """All blocks but the first, which loads the demo."""
    text = (Path(inspection.__file__).parent / "README.md").read_text(encoding="utf-8")
    names = {"config": tiny.config, "params": tiny.params, "tokens": jnp.asarray(TOKENS[:1, :5])}
    names |= {"jax": jax, "jnp": jnp, "inspection": inspection}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1:]
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["seen"]["resid_post"].shape == (2, 1, 1, 24)
    assert names["seen"]["attn.pattern"].shape == (2, 1, 1, 1, 5)
    assert names["each"].shape == (6, 1, 1, 97)
    assert names["found"].slopes["attn.z"].shape == names["found"].values["attn.z"].shape == (3, 1, 5, 6, 8)
    assert all(f"`{name}`" in text or f"`.{name.split('.')[-1]}`" in text for name in POINTS)
