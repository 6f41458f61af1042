"""Edits against the slow decoder, which changes its values by plain loops. All of them are in one program, as data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_decoder

import phi3_jax
from phi3_jax import inspection
from phi3_jax.inspection import POINTS, Hooks
from phi3_jax.inspection.running import compiled
from phi3_jax.kernels.attention import xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 9
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 97, (B, T))
READS = ("attn.pattern", "resid_post", "logits")


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


SOME = tuple(each for each in WANTED if each.point in ("attn.q", "attn.v", "attn.pattern", "resid_mid", "resid_post"))


@pytest.mark.parametrize("some", [SOME, pytest.param(WANTED, marks=pytest.mark.slow)])
def test_edits_equal_loops_and_other_numbers_compile_nothing(tiny, some):
    before = compiled._cache_size()
    for wanted in (some, tuple(map(elsewhere, some))):
        got = inspection.run(tiny.config, tiny.params, TOKENS, READS, edits=[each.edit(tiny.config) for each in wanted])
        expected = by_loops(tiny, wanted)
        for name in READS:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-3, err_msg=name)
    assert compiled._cache_size() == before + 1


def test_values_of_named_layers_and_heads_are_put_where_they_belong(tiny):
    """As `run` returns them for the same layers and heads, in any order."""
    value = normal(2, B, 1, 3, 8)
    edit = inspection.replace(tiny.config, "attn.z", value, layers=[2, 0], positions=[4], heads=[5, 1, 2])
    expected = np.zeros((3, B, 1, 6, 8), np.float32)
    for i, layer in enumerate([2, 0]):
        for j, head in enumerate([5, 1, 2]):
            expected[layer, :, :, head] = value[i, :, :, j]
    np.testing.assert_array_equal(edit.value, expected)
    np.testing.assert_array_equal(edit.layers, [True, False, True])
    np.testing.assert_array_equal(edit.heads, [False, True, True, False, False, True])


@pytest.mark.parametrize("name", ["attn.z", "z", "blocks.*.attn.hook_z"])
def test_names_of_an_edit_are_those_that_can_be_read(tiny, name):
    assert inspection.zero(tiny.config, name).point == "attn.z"


def test_an_edit_is_moved(tiny):
    """By numbers that are known, and by those that a program runs through."""
    edit = inspection.zero(tiny.config, "attn.k")
    masks = jax.vmap(lambda n: inspection.moved(tiny.config, edit, n, n + 2, n).layers)(jnp.arange(-2, 3))
    np.testing.assert_array_equal(masks, np.eye(3)[[1, 2, 0, 1, 2]])
    found = inspection.moved(tiny.config, edit, -1, 4, -2)
    np.testing.assert_array_equal(found.layers, [False, False, True])
    np.testing.assert_array_equal(found.heads, [True, False])
    np.testing.assert_array_equal(found.positions, [4])


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_no_score_shows_a_query_what_it_must_not_see(lowest):
    """Neither padding, nor later tokens, nor those outside of the window, even if all that it sees gets the lowest."""
    positions = np.array([[-1, 0, 1, 2, 3]])
    visible = Visibility(jnp.asarray(positions), jnp.asarray(positions), window=3)
    q, k, v = (jnp.asarray(normal(1, 5, heads, 4)) for heads in (2, 1, 1))
    seen = {}

    def at(name, value):
        seen[name] = np.asarray(value)
        return jnp.full_like(value, lowest) if name == "attn.scores" else value

    z = xla.attention(q, KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2)), visible, at)
    for t, keys in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [2, 3, 4])):
        expected = np.isin(np.arange(5), keys) / len(keys)
        np.testing.assert_allclose(seen["attn.pattern"][0, :, t], [expected] * 2, atol=1e-6)
        np.testing.assert_allclose(z[0, t], [v[0, keys, 0].mean(axis=0)] * 2, atol=1e-6)


def test_numbers_that_a_function_has_bound_are_data(tiny):
    """Programs are told apart by the structure of what they are given."""

    def edit(number):
        function = jax.tree_util.Partial(jnp.multiply, jnp.float32(number))
        return inspection.change(tiny.config, "mlp_out", function)

    assert jax.tree.structure(edit(2)) == jax.tree.structure(edit(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: inspection.zero(c, "resid_pst"), r"did you mean resid_post\?"),
        (lambda c: inspection.zero(c, "blocks.1.hook_resid_pre"), r"write blocks.\*.hook_resid_pre and layers=\[1\]"),
        (lambda c: inspection.zero(c, "resid_pre", heads=[0]), "resid_pre has no heads: its axes are BTD"),
        (lambda c: inspection.zero(c, "embed", layers=[0]), "embed has no layers"),
        (lambda c: inspection.zero(c, "attn.k", heads=[2]), r"heads \[2\]: there are 2, 0 to 1"),
        (lambda c: inspection.zero(c, "attn.q", layers=[1.5]), r"layers are numbers, not \[1.5\]"),
        (lambda c: inspection.zero(c, "attn.q", positions=[-1]), r"positions \[-1\]: an edit counts them from 0 on"),
        (lambda c: inspection.zero(c, "attn.q", positions=[[2, -1], [3, 3]]), r"positions \[3, 3\]: each can be named"),
        (lambda c: inspection.moved(c, inspection.zero(c, "attn.k"), layer=3), r"layers \[3\]: there are 3"),
        (lambda c: inspection.moved(c, inspection.zero(c, "attn.k"), head=2), r"heads \[2\]: there are 2"),
        (
            lambda c: inspection.moved(c, inspection.zero(c, "attn.k"), position=-1),
            r"\[-1\]: an edit counts them from 0",
        ),
        (lambda c: inspection.moved(c, inspection.zero(c, "mlp_out"), head=0), "mlp_out has no heads"),
        (lambda c: inspection.moved(c, inspection.zero(c, "logits"), layer=0), "logits has no layers"),
        (lambda c: inspection.add(c, "resid_pre", np.zeros(23)), r"\(LBTD\): D must be 24 or 1"),
        (lambda c: inspection.add(c, "embed", np.zeros((3, 1, 1, 24))), r"\(LBTD\): L must be 1"),
        (lambda c: inspection.add(c, "resid_pre", np.zeros((3, 1)), positions=[2]), r"\(LBTD\): T must be 1"),
        (lambda c: inspection.add(c, "embed", np.zeros((1, 1, 1, 1, 24))), "it has the axes LBTD"),
    ],
)
def test_edits_that_cannot_be_are_named(tiny, make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny.config)


@pytest.mark.slow
def test_a_batch_of_edits_is_a_loop_over_them(tiny):
    """What another run had there is put at each layer, position and head; one program runs all."""
    other = inspection.run(tiny.config, tiny.params, TOKENS[::-1], ["attn.z"])["attn.z"]
    places = [(layer, position, head) for layer in (0, 2) for position in (0, 5, 8) for head in (1, 4)]

    def patched(layer, position, head):
        edit = inspection.replace(config := tiny.config, "attn.z", other)
        edit = inspection.moved(config, dataclasses.replace(edit, value=edit.value[:, :, 0:1]), layer, position, head)
        return compiled(config, tiny.params, jnp.asarray(TOKENS), None, None, Hooks(("logits",), edits=(edit,)))[0][
            "logits"
        ]

    together = jax.jit(jax.vmap(patched))(*jnp.asarray(places).T)
    for got, (layer, position, head) in zip(together, places, strict=True):
        value = other[layer, :, :1, head][None, :, :, None]
        edit = inspection.replace(tiny.config, "attn.z", value, [layer], [position], [head])
        expected = inspection.run(tiny.config, tiny.params, TOKENS, edits=[edit])["logits"]
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert position == 0 or np.abs(got[:, :position] - together[-1][:, :position]).max() < 1e-4


@pytest.mark.slow
def test_positions_are_those_of_the_text_while_decoding(tiny):
    """An edit of position 5 is made once: in the step that position 5 is in."""
    edits = [
        inspection.add(tiny.config, "resid_mid", normal(24), [1], [5]),
        inspection.zero(tiny.config, "logits", positions=[7]),
    ]
    whole = inspection.run(tiny.config, tiny.params, TOKENS, edits=edits)["logits"]
    cache, parts = phi3_jax.KVCache.create(tiny.config, B, T), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        seen, cache = inspection.run(tiny.config, tiny.params, TOKENS[:, start:end], edits=edits, cache=cache)
        parts.append(seen["logits"])
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-4)
    assert (np.asarray(whole[:, 7]) == 0).all()


@pytest.mark.slow
def test_an_edit_of_all_logits_is_one_of_those_that_are_read(tiny):
    value = normal(B, T, 97)
    edits = [inspection.add(tiny.config, "logits", value)]
    plain = inspection.run(tiny.config, tiny.params, TOKENS)["logits"]
    got = inspection.run(tiny.config, tiny.params, TOKENS, edits=edits, positions=[[4, 0], [8, 3]])["logits"]
    places, rows = np.array([[4, 0], [8, 3]]), np.arange(B)[:, None]
    np.testing.assert_allclose(got, (plain + value)[rows, places], atol=1e-4)
    found = inspection.gradients(
        tiny.config, tiny.params, TOKENS, lambda x: x[0, 0, 7], ["embed"], edits=edits, logits_at=places
    )
    np.testing.assert_allclose(found.metric, (plain + value)[0, 4, 7], atol=1e-4)


@pytest.mark.slow
def test_a_frozen_norm_is_that_of_another_run(tiny):
    """With all scales replaced by their own, nothing changes; what is added then passes the last norm linearly."""
    scales = inspection.run(tiny.config, tiny.params, TOKENS, ["*.scale"])
    frozen = [inspection.replace(tiny.config, name, value) for name, value in scales.items()]
    plain = inspection.run(tiny.config, tiny.params, TOKENS)["logits"]
    np.testing.assert_allclose(
        inspection.run(tiny.config, tiny.params, TOKENS, edits=frozen)["logits"], plain, atol=1e-4
    )
    vector = normal(24)

    def moved(times):
        edits = [*frozen, inspection.add(tiny.config, "resid_post", times * vector, [2])]
        return inspection.run(tiny.config, tiny.params, TOKENS, edits=edits)["logits"] - plain

    np.testing.assert_allclose(moved(3.0), 3 * moved(1.0), atol=1e-3)
    assert np.abs(moved(1.0)).max() > 0.1
