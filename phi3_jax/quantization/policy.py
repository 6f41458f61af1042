"""The formats of quantised weights (`Format`), and which of a model's weights get which format (`formats`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.kernels.linear.quantized import GROUPS, ZERO, QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Format:
    """The format of a quantised matrix.

    Attributes:
      bits: 8 or 4.
      group: how many inputs share a scale: 32, 64 or 128.
      symmetric: no offsets. With 4 bits, offsets improve the accuracy more than smaller groups do; with 8 bits they do
        not improve it.

    Raises:
      ValueError: from the constructor, for other bits or groups.
    """

    bits: int
    group: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in ZERO or self.group not in GROUPS:
            raise ValueError(f"there are {[*ZERO]} bits and groups of {[*GROUPS]}, not {self.bits} bits, {self.group}")

    def __str__(self) -> str:
        """The name that `parse_format` reads."""
        return f"int{self.bits}-g{self.group}" + ("" if self.symmetric else "-asymmetric")

    @property
    def bits_per_weight(self) -> float:
        """The average size of a weight, scales and offsets included."""
        return self.bits + (16 if self.symmetric else 32) / self.group


_NAME = re.compile(r"int(4|8)(?:-g(32|64|128))?(-asymmetric)?")


def parse_format(name: str) -> Format:
    """Reads "int8" or "int4", with details where they are not the usual ones: "int4-g64", "int4-g32-asymmetric".

    Raises:
      ValueError: the name is not one of these.
    """
    if not (match := _NAME.fullmatch(name)):
        raise ValueError(
            f"there is no quantisation {name!r}: name int4-mixed, or int8 or int4, perhaps with a group of 32, 64 or "
            "128 and with offsets, as in int4-g64-asymmetric"
        )
    bits, group, asymmetric = match.groups()
    return Format(int(bits), int(group or 32), asymmetric is None)


def formats(policy: str, paths: Iterable[str]) -> dict[str, Format | None]:
    """The format of each leaf of a parameter tree, by path ("layers/mlp/down_proj/weight"); None: it stays floats.

    Args:
      policy: a name that `parse_format` knows, for all matrices (an embedding that is not the head gets 8 bits); or
        "int4-mixed", which gives 8 bits to the embedding, the head and qkv_proj, and 4 bits to other matrices.
      paths: of the whole tree, which tells whether the embedding is the output head, too.

    Raises:
      ValueError: there is no such policy.
    """
    paths = list(paths)
    is_mixed = policy == "int4-mixed"
    usual, fine = parse_format("int4" if is_mixed else policy), Format(8)
    kinds: dict[str, Format | None] = {
        "embed_tokens": fine,  # only one row is read for each token: 8 bits cost no time
        "lm_head": fine if is_mixed else usual,
        "qkv_proj": fine if is_mixed else usual,  # here 4 bits lose the most accuracy for the memory they save
        "o_proj": usual,
        "gate_up_proj": usual,
        "down_proj": usual,
    }
    if "lm_head/weight" not in paths:
        kinds["embed_tokens"] = kinds["lm_head"]
    return {path: kinds.get(path.split("/")[-2]) for path in paths}


def policy_of(forms: Mapping[str, Format | None]) -> str:
    """The name of the policy that gives these formats; "stored" where none does, "" where all are floats."""
    if not any(forms.values()):
        return ""
    usual = [Format(bits, group, symmetric) for bits in ZERO for group in GROUPS for symmetric in (True, False)]
    for policy in (*(f"int{bits}" for bits in ZERO), "int4-mixed", *map(str, usual)):
        if formats(policy, forms) == forms:
            return policy
    return "stored"


def quantized_shapes(policy: str, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """What `quantize_params` makes of leaves by path, as shapes: nothing is computed.

    Raises:
      ValueError: there is no such policy.
    """

    def of_leaf(leaf: jax.ShapeDtypeStruct, form: Format | None) -> Any:
        if form is None:
            return leaf
        *outer, columns = leaf.shape
        groups = -(-columns // form.group)
        values: Any = jax.ShapeDtypeStruct((*outer, groups * form.group * form.bits // 8), jnp.uint8)
        scales: Any = jax.ShapeDtypeStruct((*outer, groups), jnp.float16)
        return QuantizedTensor(values, scales, None if form.symmetric else scales, form.bits, columns)

    return {path: of_leaf(leaves[path], form) for path, form in formats(policy, leaves).items()}
