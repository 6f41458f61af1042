import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import inspection
from phi3_jax.kernels import split_layers, why_unavailable
from phi3_jax.kernels.linear.packed import pack
from phi3_jax.quantization import quantize_params

rng = np.random.default_rng(3)
# A whole row, past LongRoPE's 16 and the window of 19; one with padding on the left; a short one, padded on the right.
B, T = 3, 23
TOKENS, OTHER = rng.integers(4, 97, (2, B, T))
STEPS = np.arange(T)
POSITIONS = np.stack([STEPS, (STEPS - 4).clip(-1), np.where(STEPS < 13, STEPS, -1)]).astype(np.int32)
RAGGED = {"token_positions": POSITIONS}
LAST = POSITIONS.argmax(axis=1)[:, None]
METRIC = inspection.logit_difference(jnp.array([5, 60, 7]), 96)


def values(config, params, tokens, point):
    seen = inspection.run(config, params, tokens, (point,), token_positions=POSITIONS)
    return np.asarray(seen[point])


def single(config, params, edit):
    """The metric of one run with one change."""
    hooks = {"positions": LAST, "token_positions": POSITIONS, "edits": [edit]}
    logits = np.asarray(inspection.run(config, params, TOKENS, ("logits",), **hooks)["logits"])[:, 0]
    return np.mean([row[right] - row[96] for row, right in zip(logits, (5, 60, 7), strict=True)])


def at_position(array, position, axis=0):
    """[L, B, T, ...] -> [L, B, 1, ...]: what each row has at a position, or anything where it has no such token."""
    columns = (position == POSITIONS).argmax(axis=1)
    return np.stack([np.take(array[:, b], [c], axis=1 + axis) for b, c in enumerate(columns)], axis=1)


def check(config, params, point, at_once=40, where=((0, 3), (0, 12), (1, 5), (1, 18), (2, 22), (2, 12))):
    """A sweep over layers and positions beside runs of one change."""
    found = inspection.patch_sweep(
        config, params, TOKENS, OTHER, METRIC, point=point, token_positions=POSITIONS, at_once=at_once
    )
    assert found.shape == (3, T)
    other = values(config, params, OTHER, point)
    assert len({*np.asarray(found)[tuple(zip(*where, strict=True))].round(3)}) == len(where)  # else nothing would show
    for layer, position in where:
        axis = inspection.POINTS[point].index("T") - 1
        edit = inspection.replace(config, point, at_position(other, position, axis), [layer], np.array([position]))
        expected = single(config, params, edit)
        np.testing.assert_allclose(found[layer, position], expected, atol=1e-4)


def test_sweep_equals_single_runs(tiny, quick_compilation):
    check(tiny.config, tiny.params, "resid_pre")


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["attn.z", "attn.rot_k", "attn.v", "mlp_out", "mlp.post", "attn.pattern", "ln1.scale"]
)
def test_sweep_at_other_points(tiny, point, quick_compilation):
    check(tiny.config, tiny.params, point)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "int8", "apart"])
def test_sweep_with_other_weights(tiny, kind, quick_compilation):
    params = tiny.params
    if kind == "int8":
        params = quantize_params(params, "int8")
    if kind == "apart":
        params = split_layers(params)
    elif why_unavailable() is None:
        params = pack(params)
    check(tiny.config, params, "resid_mid")


@pytest.mark.slow
def test_sweep_over_heads(tiny, quick_compilation):
    found = inspection.sweep(
        tiny.config, tiny.params, TOKENS, inspection.zero(tiny.config, "attn.z"), METRIC, heads=None, **RAGGED
    )
    assert found.shape == (3, 6)
    for layer, head in ((0, 0), (1, 4), (2, 5)):
        edit = inspection.zero(tiny.config, "attn.z", [layer], heads=[head])
        np.testing.assert_allclose(found[layer, head], single(tiny.config, tiny.params, edit), atol=1e-4)


@pytest.mark.slow
def test_sweep_over_positions_and_heads(tiny, quick_compilation):
    factor = rng.normal(size=(3, B, T, 2, 8)).astype(np.float32)
    edit = inspection.scale(tiny.config, "attn.k", factor)
    options = {"layers": [2, 0], "positions": np.array([5, -1]), "heads": np.array([1]), **RAGGED}
    found = inspection.sweep(tiny.config, tiny.params, TOKENS, edit, METRIC, **options)
    assert found.shape == (2, 2, 1)
    for i, layer in enumerate((2, 0)):
        for j, position in enumerate((5, 22)):
            own = at_position(factor, position)
            edit = inspection.scale(tiny.config, "attn.k", own, [layer], np.array([position]), [1])
            np.testing.assert_allclose(found[i, j, 0], single(tiny.config, tiny.params, edit), atol=1e-4)


@pytest.mark.slow
def test_sweep_of_whole_runs(tiny, quick_compilation):
    """Functions, edits with positions of their own, and points without layers."""
    edit = inspection.change(tiny.config, "resid_mid", jnp.flip)
    found = inspection.sweep(tiny.config, tiny.params, TOKENS, edit, METRIC, positions=[3, 22], layers=[1], **RAGGED)
    for i, position in enumerate((3, 22)):
        edit = inspection.change(tiny.config, "resid_mid", jnp.flip, [1], np.array([position]))
        np.testing.assert_allclose(found[0, i], single(tiny.config, tiny.params, edit), atol=1e-4)
    where = np.array([4, 9])
    edit = inspection.zero(tiny.config, "attn.z", positions=where)
    found = inspection.sweep(tiny.config, tiny.params, TOKENS, edit, METRIC, heads=[2], **RAGGED)
    assert found.shape == (3, 1)
    edit = inspection.zero(tiny.config, "attn.z", [1], where, [2])
    np.testing.assert_allclose(found[1, 0], single(tiny.config, tiny.params, edit), atol=1e-4)
    found = inspection.patch_sweep(tiny.config, tiny.params, TOKENS, OTHER, METRIC, point="embed", **RAGGED)
    assert found.shape == (1, T)
    other = values(tiny.config, tiny.params, OTHER, "embed")[None]
    edit = inspection.replace(tiny.config, "embed", at_position(other, 7), positions=np.array([7]))
    np.testing.assert_allclose(found[0, 7], single(tiny.config, tiny.params, edit), atol=1e-4)


@pytest.mark.slow
def test_attribution_equals_differences(tiny, quick_compilation):
    """Where the other run is nearly the same, the estimate is the difference that a patch makes."""
    found = inspection.attribution_patching(
        tiny.config, tiny.params, TOKENS, OTHER, METRIC, point="attn.z", token_positions=POSITIONS
    )
    assert found.shape == (3, T, 6)
    own, other = (values(tiny.config, tiny.params, each, "attn.z") for each in (TOKENS, OTHER))
    for layer, position, head in ((0, 3, 1), (1, 12, 0), (2, 22, 5)):
        change = at_position(other - own, position)
        ends = []
        for part in (-1e-2, 1e-2):
            edit = inspection.add(tiny.config, "attn.z", part * change, [layer], np.array([position]), [head])
            ends.append(single(tiny.config, tiny.params, edit))
        np.testing.assert_allclose(found[layer, position, head], (ends[1] - ends[0]) / 2e-2, rtol=2e-2, atol=2e-3)


def test_a_difference_of_logits_of_one_place_or_more():
    logits = rng.normal(size=(B, 2, 97)).astype(np.float32)
    right = np.array([5, 60, 7])
    each = [logits[b, :, right[b]] - logits[b, :, 96] for b in range(B)]
    prefers = inspection.logit_difference(right, 96)
    np.testing.assert_allclose(prefers(jnp.asarray(logits)), np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(prefers(jnp.asarray(logits[:, 1])), np.mean(each, axis=0)[1], rtol=1e-5)
    assert np.isnan(inspection.logit_difference(97, 96)(jnp.asarray(logits)))


def test_refused(tiny):
    def sweep(edit, tokens=TOKENS, **options):
        return inspection.sweep(tiny.config, tiny.params, tokens, edit, METRIC, **options)

    with pytest.raises(ValueError, match="resid_pre has no heads to sweep over"):
        sweep(inspection.zero(tiny.config, "resid_pre"), heads=None)
    with pytest.raises(ValueError, match="make it without positions"):
        sweep(inspection.zero(tiny.config, "resid_pre", positions=np.array([1])), positions=None)
    with pytest.raises(ValueError, match="make it without heads"):
        sweep(inspection.zero(tiny.config, "attn.z", heads=[1]), heads=None)
    with pytest.raises(ValueError, match="make it without layers"):
        sweep(inspection.zero(tiny.config, "attn.z", layers=[1]))
    with pytest.raises(ValueError, match="make it without positions"):  # an array of one is not an empty one
        sweep(inspection.zero(tiny.config, "resid_pre", positions=[1]), positions=np.array([2]))
    with pytest.raises(ValueError, match="embed has no layers"):
        sweep(inspection.zero(tiny.config, "embed"), layers=[1], positions=None)
    with pytest.raises(ValueError, match=r"positions \[23\]: there are 23"):
        sweep(inspection.zero(tiny.config, "resid_pre"), positions=[23])
    for shape in ((B, T - 1, 24), (B - 1, 1, 24)):
        with pytest.raises(ValueError, match=r"resid_pre: an edit of shape \[1, .*, 24\] for tokens \[3, 23\]"):
            sweep(inspection.replace(tiny.config, "resid_pre", np.zeros(shape)), positions=None)
    with pytest.raises(ValueError, match=r"token_positions of shape \[2, 23\], where tokens are \[3, 23\]"):
        sweep(inspection.zero(tiny.config, "resid_pre"), token_positions=POSITIONS[:2])
    with pytest.raises(ValueError, match="must have the same shape"):
        inspection.patch_sweep(tiny.config, tiny.params, TOKENS, OTHER[:, 1:], METRIC)
    with pytest.raises(ValueError, match=r"did you mean resid_pre\?"):
        inspection.attribution_patching(tiny.config, tiny.params, TOKENS, OTHER, METRIC, point="resid_per")
    with pytest.raises(ValueError, match=r"attn\.pattern .* has no values"):
        inspection.attribution_patching(tiny.config, tiny.params, TOKENS, OTHER, METRIC, point="attn.pattern")
