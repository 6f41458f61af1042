"""Adapters for tests, and the slow obvious way to compute with them."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import phi3_jax
from phi3_jax.adapters import Adapter, LoraConfig, LoraTensor, adapter_shapes, attach
from phi3_jax.checkpoint import load_adapter, named_tensors

RECORDED = Path(__file__).parents[2] / "goldens_training"
BASE = Path(__file__).parents[2] / "goldens" / "gqa"
TIED = BASE.parent / "partial_tied"


def random_adapter(config: phi3_jax.Phi3Config, lora: LoraConfig, seed: int = 0) -> Adapter:
    """An adapter that is far from zero."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: jnp.asarray(rng.uniform(0.5, 2, shape) if path.endswith("magnitude") else rng.normal(0, 0.3, shape))
        for path, shape in adapter_shapes(config, lora).items()
    }
    return flax.traverse_util.unflatten_dict({k: v.astype(jnp.float32) for k, v in leaves.items()}, sep="/")


def scalings(lora: LoraConfig) -> dict[str, float]:
    """The scaling of each target."""
    return {target: lora.scaling_of(target) for target in lora.targets}


def dense(params: Any, adapter: Adapter, lora: LoraConfig, scaling: float | dict[str, float]) -> Any:
    """Parameters with the adapter multiplied out, differentiable, for whole stacks at a time.

    One scaling, or one for each target.
    """
    weights = flax.traverse_util.flatten_dict(params, sep="/")
    parts = flax.traverse_util.flatten_dict(adapter, sep="/")
    for path in [path for path in parts if path.endswith("/a")]:
        place = path.removesuffix("/a")
        own = scaling[place.split("/")[-1]] if isinstance(scaling, dict) else scaling
        sums = weights[f"{place}/weight"] + own * jnp.einsum("...or,...ri->...oi", parts[f"{place}/b"], parts[path])
        if lora.dora:
            norms = jax.lax.stop_gradient(jnp.sqrt((sums**2).sum(-1)))
            sums = sums * (parts[f"{place}/magnitude"] / norms)[..., None]
        weights[f"{place}/weight"] = sums
    return flax.traverse_util.unflatten_dict(weights, sep="/")


# ------------------------------------------------------------------------------------------- the model with one


@functools.cache
def base() -> phi3_jax.Checkpoint:
    return phi3_jax.load(BASE)


@functools.cache
def recorded(kind: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(RECORDED / kind / "expected.safetensors")


@functools.partial(jax.jit, static_argnames=("config", "walk", "remat"))
def run(config: Any, params: Any, tokens: Any, walk: Any = None, remat: Any = "none", **kwargs: Any) -> Any:
    return phi3_jax.Phi3(config, walk, remat).apply({"params": params}, tokens, **kwargs)


@functools.partial(jax.jit, static_argnames=("config", "lora", "multiplied_out", "walk"))
def loss_and_gradient(
    config: Any,
    params: Any,
    adapter: Any,
    lora: LoraConfig,
    tokens: Any,
    key: Any = None,
    walk: Any = "slice",
    multiplied_out: bool = False,
) -> Any:
    """Of the mean cross-entropy of the next tokens, by the adapter; through slices with remat, as in training."""

    def mean_loss(adapter: Any) -> jax.Array:
        adapted = dense(params, adapter, lora, lora.scaling) if multiplied_out else attach(params, adapter, lora, key)
        logits = run(config, adapted, tokens, walk, remat="full" if walk == "slice" else "none")[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    return jax.value_and_grad(mean_loss)(adapter)


def tokens_for(config: phi3_jax.Phi3Config, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(6, config.vocab_size, shape, dtype=np.int32))


def one_layer(base: Any, seed: int = 0, dtype: Any = jnp.float32, **fields: Any) -> LoraTensor:
    """An update of rank 3 of a weight [29, 37]."""
    rng = np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 37), (29, 3)))
    return LoraTensor(base, a, b, **({"gain": None, "keys": None, "scaling": 0.7, "dropout": 0.0} | fields))


# ------------------------------------------------------------------------------------- PEFT's files, tensor by tensor


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    """The two files, in a folder of their own."""
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    return folder


def peft_tensors(weights: dict[str, np.ndarray], ranks: dict[str, int], dora: bool = False) -> dict[str, np.ndarray]:
    """Random updates of modules {"model.layers.0.self_attn.q_proj": 3}, with PEFT's names."""
    rng, found = np.random.default_rng(len(ranks)), {}
    for module, rank in ranks.items():
        outputs, inputs = weights[f"{module}.weight"].shape
        a, b = "lora_A.weight", "lora_B.weight"
        if module.endswith("embed_tokens"):  # PEFT adapts its transpose
            a, b, outputs, inputs = "lora_embedding_A", "lora_embedding_B", inputs, outputs
        found[f"base_model.model.{module}.{a}"] = rng.normal(size=(rank, inputs))
        found[f"base_model.model.{module}.{b}"] = rng.normal(size=(outputs, rank))
        if dora:
            found[f"base_model.model.{module}.lora_magnitude_vector"] = rng.uniform(0.5, 2, outputs)
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def multiplied_out(
    weights: dict[str, np.ndarray], tensors: dict[str, np.ndarray], scaling: float | dict[str, float]
) -> dict[str, np.ndarray]:
    """Weights by name with PEFT's tensors added, in float64; one scaling, or one for each module."""
    found = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    for name in tensors:
        if not (match := re.fullmatch(r"base_model\.model\.(.*)\.(lora_A\.weight|lora_embedding_A)", name)):
            continue
        module, key = match[1], f"{match[1]}.weight"
        a, b = (tensors[each].astype(np.float64) for each in (name, name.replace("_A", "_B")))
        turned = "embedding" in match[2]
        sums = found[key].T if turned else found[key]
        sums = sums + (scaling[module] if isinstance(scaling, dict) else scaling) * b @ a
        if (magnitude := tensors.get(f"base_model.model.{module}.lora_magnitude_vector")) is not None:
            sums = sums * (magnitude / np.sqrt((sums**2).sum(1)))[:, None]
        found[key] = sums.T if turned else sums
    return found


def separate(weights: dict[str, np.ndarray], config: phi3_jax.Phi3Config) -> dict[str, np.ndarray]:
    """Weights by name, with the fused ones in the parts that Llama has."""
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            parts = zip("qkv", np.split(weight, [heads, heads + keys]), strict=True)
            found |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), np.split(weight, 2), strict=True)
            found |= {name.replace("gate_up_proj", f"{part}_proj"): rows for part, rows in parts}
        else:
            found[name] = weight
    return found


@functools.cache
def weights(unfused: bool) -> dict[str, np.ndarray]:
    fused = dict(named_tensors(base().params))
    return separate(fused, base().config) if unfused else fused


def modules(names: Any, layers: Any = (0, 1), rank: int = 3) -> dict[str, int]:
    """Names of modules, each with its rank: "model.layers.0.mlp.down_proj"."""
    attention = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
    place = {name: "self_attn" if name in attention else "mlp" for name in names}
    return {f"model.layers.{i}.{place[name]}.{name}": rank for i in layers for name in names}


def check_merged(folder: Path, expected: dict[str, np.ndarray], model: Path = BASE) -> phi3_jax.Checkpoint:
    """`load` with the adapter gives the expected weights, and no others."""
    loaded = phi3_jax.load(model, adapter=folder)
    unfused = any(".q_proj." in name for name in expected)
    found = dict(named_tensors(loaded.params))
    found = separate(found, loaded.config) if unfused else found
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=2e-5, rtol=1e-5, err_msg=name)
    return loaded


def check_both(folder: Path, expected: dict[str, np.ndarray]) -> LoraConfig:
    """Merged while loading, and as a tree of its own, whose weights are multiplied out here."""
    merged = check_merged(folder, expected)
    lora, adapter = load_adapter(folder, base().config)
    whole = dense(base().params, adapter, lora, scalings(lora))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-5), whole, merged.params)
    return lora
