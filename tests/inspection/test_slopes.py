"""The metric's slopes at the points against differences of two runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import inspection
from phi3_jax.inspection import slopes
from phi3_jax.inspection.running import compiled

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 21  # past LongRoPE's border and the window


def metric(logits):
    return jnp.sin(logits[:, -1]).sum()


@pytest.mark.slow
def test_slopes_at_every_point_equal_finite_differences(tiny):
    """One program has an edit at every point, all of which add nothing but one."""
    config, params = tiny.config, tiny.params
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 97, (B, T)))
    found = inspection.gradients(config, params, tokens, metric, ["*"])
    zeros = {name: jnp.zeros(slope.shape) for name, slope in found.slopes.items()}

    def moved(name, step):
        values = zeros | {name: step * found.slopes[name]}
        edits = [
            inspection.add(config, each, value if value.ndim > len(inspection.POINTS[each]) else value[None])
            for each, value in values.items()
        ]
        hooks = inspection.Hooks(("logits",), edits=tuple(edits))
        return float(metric(compiled(config, params, tokens, None, None, hooks)[0]["logits"]))

    assert found.metric == pytest.approx(moved("embed", 0.0), abs=1e-4)
    assert found.slopes.keys() == inspection.POINTS.keys()
    for name, slope in found.slopes.items():
        norm = float(jnp.linalg.norm(slope))
        step = 1e-2 / norm**2
        assert norm > 0.1, name
        assert (moved(name, step) - moved(name, -step)) / 2e-2 == pytest.approx(1, rel=0.02), name


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(6).integers(0, 97, (B, T))


READS = ["resid_pre", "attn.v", "attn.pattern", "logits"]


@pytest.mark.slow
def test_slopes_of_chosen_layers_places_and_heads(tiny, tokens):
    """They are parts of the whole; a value that two heads use has its whole slope for each."""

    def third(weight, logits):
        assert logits.shape == (B, 2, 97)
        return weight * jnp.sin(logits[:, 1]).sum()

    def of(weight, **options):
        run = jax.tree_util.Partial(third, weight)
        return inspection.gradients(tiny.config, tiny.params, tokens, run, READS, logits_at=[4, -1], **options)

    whole = inspection.gradients(tiny.config, tiny.params, tokens, metric, READS)
    some = of(2.0, layers=[2, 0], positions=[[1, 20], [7, 20]], heads=[5, 3, 0])
    assert some.metric == pytest.approx(2 * float(whole.metric), abs=1e-3)
    places, layers = np.array([[1, 20], [7, 20]]), np.array([2, 0])[:, None, None]
    rows = np.arange(B)[:, None]
    expected = {
        "resid_pre": whole.slopes["resid_pre"][layers, rows, places],
        "attn.v": whole.slopes["attn.v"][layers, rows, places][..., np.array([1, 1, 0]), :],
        "attn.pattern": whole.slopes["attn.pattern"]
        .swapaxes(2, 3)[layers, rows, places]
        .swapaxes(2, 3)[:, :, [5, 3, 0]],
        "logits": whole.slopes["logits"][rows, places],
    }
    for name in READS:
        np.testing.assert_allclose(some.slopes[name], 2 * expected[name], atol=1e-3, err_msg=name)
    before = slopes._compiled._cache_size()
    other = of(3.0, layers=[1, 0], positions=[[1, 2], [7, 20]], heads=[5, 3, 1])
    assert other.metric == pytest.approx(1.5 * float(some.metric), abs=1e-3)
    assert slopes._compiled._cache_size() == before


@pytest.mark.slow
def test_slopes_on_packed_integers(tiny, tokens, tmp_path):
    """They are multiplied by XLA on the way back: as those of rows are."""
    phi3_jax.save(tiny, tmp_path / "floats")
    loaded = [phi3_jax.load(tmp_path / "floats", quantize="int8", layout=layout) for layout in ("rows", "packed")]
    expected, got = (
        inspection.gradients(tiny.config, each.params, tokens, metric, ["attn.v"]).slopes["attn.v"] for each in loaded
    )
    np.testing.assert_allclose(got, expected, atol=1e-3 * float(jnp.abs(expected).max()))
