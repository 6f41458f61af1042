"""Edits against the slow decoder, which changes its values by plain loops. All of them are in one program, as data."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import slow_decoder

from phi3_jax import inspection
from phi3_jax.inspection import POINTS
from phi3_jax.inspection.running import compiled

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 9
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 97, (B, T))
READS = ("attn.pattern", "mlp.post", "resid_post", "logits")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One change, to be made by `inspection` and by loops."""

    point: str
    kind: str
    layers: list[int] | None = None
    positions: list[int] | None = None
    heads: list[int] | None = None
    value: np.ndarray | float = 0.0

    def edit(self, config):
        where = {"layers": self.layers, "positions": self.positions, "heads": self.heads}
        if self.kind == "zero":
            return inspection.zero(config, self.point, **where)
        if self.kind == "change":
            return inspection.change(config, self.point, jnp.sin, **where)
        return getattr(inspection, self.kind)(config, self.point, self.value, **where)

    def by_loops(self, row, layer, old):
        """old: one row's values."""
        axes, new = POINTS[self.point], old.copy()
        value = np.broadcast_to(self.value, (*(1,) * (len(axes) + 1 - np.ndim(self.value)), *np.shape(self.value)))
        for place in np.ndindex(old.shape):
            at = {"B": row, **dict(zip(axes[1:], place, strict=True))}
            if self.positions is not None and at["T"] not in self.positions:
                continue
            if self.heads is not None and at.get("N", at.get("K")) not in self.heads:
                continue
            at["L"] = 0 if layer is None else layer
            if self.layers is not None and at["L"] not in self.layers:
                continue
            if self.positions is not None:
                at["T"] = self.positions.index(at["T"])
            own = value[tuple(at[axis] if size > 1 else 0 for axis, size in zip("L" + axes, value.shape, strict=True))]
            factor = {"zero": 0, "add": 1, "replace": 0, "scale": own}
            plus = {"add": own, "replace": own}
            if self.kind == "change":
                new[place] = np.sin(old[place])
            else:
                new[place] = factor[self.kind] * old[place] + plus.get(self.kind, 0)
        return new


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


WANTED = (
    Wanted("embed", "add", None, [2, 0], None, normal(B, 2, 24)),
    Wanted("ln1.scale", "replace", [0, 2], None, None, 0.7),
    Wanted("ln1.normalized", "scale", [2], [8], None, normal(24)),
    Wanted("attn.q", "replace", [1], [7, 3], [5, 0], normal(3, B, 2, 6, 8)),
    Wanted("attn.k", "zero", [0, 1], None, [1]),
    Wanted("attn.v", "scale", [2], [1, 4, 6], [0], -1.5),
    Wanted("attn.rot_k", "add", None, [5], None, normal(1, 1, 1, 2, 8)),
    Wanted("attn.scores", "add", [1], None, [2, 3], 2 * normal(T, T)),
    Wanted("attn.scores", "zero", [0], [8], [4]),
    Wanted("attn.pattern", "zero", [2], [6, 7], [1]),
    Wanted("attn.z", "scale", [0], None, [3], normal(1, 1, 1, 6, 8)),
    Wanted("attn.result", "zero", [1], [4], [0, 5]),
    Wanted("attn_out", "add", [2], [0], None, normal(24)),
    Wanted("resid_mid", "change", [1], [3, 5]),
    Wanted("ln2.out", "zero", [0], [1]),
    Wanted("mlp.pre", "add", [1], None, None, normal(1, B, T, 40)),
    Wanted("mlp.pre_linear", "scale", [2], [2], None, 0.0),
    Wanted("mlp.post", "replace", None, [8], None, normal(3, 1, 1, 40)),
    Wanted("mlp_out", "change", None, [1, 2]),
    Wanted("resid_post", "scale", [1], [7], None, 0.5),
    Wanted("resid_post", "add", [1], [7], None, 3.0),  # after the line before: 0.5 x + 3
    Wanted("ln_final.scale", "scale", None, [8], None, 2.0),
    Wanted("logits", "add", None, [8, 0], None, normal(97)),
)


def by_loops(tiny, wanted):
    """READS, with the changes."""
    seen = {name: [[] for _ in range(B)] for name in READS}
    for row in range(B):

        def at(name, layer, value, row=row):
            for each in wanted:
                value = each.by_loops(row, layer, value) if each.point == name else value
            if name in READS:
                seen[name][row].append(value)
            return value

        slow_decoder.logits(tiny.config, tiny.params, TOKENS[row], at)
    whole = {name: np.stack([np.stack(row) for row in rows], axis=1) for name, rows in seen.items()}
    return whole | {"logits": whole["logits"][0]}


def elsewhere(each):
    """The same change at other layers, positions and heads."""
    layers = each.layers and [(i + 1) % 3 for i in each.layers]
    positions = each.positions and [(t + 4) % T for t in each.positions]
    heads = each.heads and [(h + 1) % (2 if "K" in POINTS[each.point] else 6) for h in each.heads]
    return dataclasses.replace(each, layers=layers, positions=positions, heads=heads, value=-0.5 * each.value)


def test_every_edit_equals_loops_and_other_numbers_compile_nothing(tiny):
    others = tuple(map(elsewhere, WANTED))
    before = compiled._cache_size()
    for wanted in (WANTED, others):
        got = inspection.run(tiny.config, tiny.params, TOKENS, READS, edits=[each.edit(tiny.config) for each in wanted])
        expected = by_loops(tiny, wanted)
        for name in READS:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-3, err_msg=name)
    assert compiled._cache_size() == before + 1
