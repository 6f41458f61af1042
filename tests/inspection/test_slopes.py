"""The metric's slopes at the points against differences of two runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import inspection
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
