"""The modules of a model that an adapter can change, in the spelling of the model that the adapter was made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from phi3_jax.config import Phi3Config
from phi3_jax.model import parameter_shapes, tensor_names

TABLE, HEAD = "model.embed_tokens", "lm_head"


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of transformers' model.

    Attributes:
      name: "model.layers.0.self_attn.q_proj".
      weight: the checkpoint's tensor that holds its weight: "model.layers.0.self_attn.qkv_proj.weight".
      path: the same in the tree of parameters, without the layer: "layers/self_attn/qkv_proj".
      layer: its number; None outside of the layers.
      start: the first of its rows in that tensor.
      shape: [outputs, inputs]; of the embedding [V, D], of a norm [D].
      kind: what PEFT makes of it.
    """

    name: str
    weight: str
    path: str
    layer: int | None
    start: int
    shape: tuple[int, ...]
    kind: Literal["linear", "embedding", "head", "norm"]

    @property
    def rows(self) -> slice:
        """Its rows in the tensor."""
        return slice(self.start, self.start + self.shape[0])


def modules(config: Phi3Config, unfused: bool) -> dict[str, Module]:
    """Every module with a weight, by name; `unfused` in the spelling of Llama and Mistral.

    The head is among them where it is tied, too: PEFT can change it alone.
    """
    shapes = parameter_shapes(config)
    shapes.setdefault("lm_head/weight", shapes["embed_tokens/weight"])
    found = {}
    for path, shape in shapes.items():
        place = path.removesuffix("/weight")
        stacked = path.startswith("layers/")
        for layer, name in enumerate(tensor_names(path, config.num_hidden_layers)):
            number, own = (layer, shape[1:]) if stacked else (None, shape)
            for each, start, rows in _parts(name.removesuffix(".weight"), own, config, unfused):
                found[each] = Module(each, name, place, number, start, (rows, *own[1:]), _kind(each, own))
    return found


def is_unfused(name: str) -> bool:
    """Whether a module, or a tensor, has a name that only the models with separate matrices have."""
    return not {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}.isdisjoint(name.split("."))


def is_fused(name: str) -> bool:
    """Whether a module, or a tensor, has a name that only Phi-3 has."""
    return not {"qkv_proj", "gate_up_proj"}.isdisjoint(name.split("."))


def _parts(name: str, shape: tuple[int, ...], config: Phi3Config, unfused: bool) -> Iterator[tuple[str, int, int]]:
    """(name, first row, rows) of the modules in one tensor."""
    place, _, last = name.rpartition(".")
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    parts = {
        "qkv_proj": {"q_proj": heads, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    if not unfused or last not in parts:
        yield name, 0, shape[0]
        return
    start = 0
    for part, rows in parts[last].items():
        yield f"{place}.{part}", start, rows
        start += rows


def _kind(name: str, shape: tuple[int, ...]) -> Literal["linear", "embedding", "head", "norm"]:
    if name == TABLE:
        return "embedding"
    if name == HEAD:
        return "head"
    return "linear" if len(shape) == 2 else "norm"
