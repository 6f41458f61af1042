"""Sixty checkpoints as people have them: the reference's logits, or a refusal on the list below.

Each begins as a folder that transformers has saved; up to three things are then done to it that were seen in
published folders, or one that must be refused.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from untidy_folders import (
    BASES,
    HEADS,
    LAYERS,
    LOADED,
    OF_FILES,
    OF_HEADS,
    OF_NAMES,
    REFUSED,
    VOCABULARY,
    Folder,
    another_head_stored_too,
    head_stored_too,
    one_file_beside_an_index,
    only_the_head_stored,
)

import phi3_jax

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")

COUNT = 60
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 21))


@dataclasses.dataclass(frozen=True)
class Draw:
    base: str
    tied: bool
    dtype: str
    max_shard_size: str
    changes: tuple[Callable[[Folder], None], ...]
    refused: str | None


def draw(seed: int) -> Draw:
    rng = np.random.default_rng(1000 + seed)
    base = list(BASES)[rng.integers(len(BASES))]
    refused = list(REFUSED)[seed // 3 % len(REFUSED)] if seed % 3 == 2 else None
    changes: list[Callable[[Folder], None]] = []
    if refused is None:
        first = LOADED[(seed - seed // 3) % len(LOADED)]  # each of them is the first of some draw
        more = [LOADED[i] for i in rng.permutation(len(LOADED))[: rng.integers(0, 3)]]
        for change in [first, *more]:
            groups = [group for group in (OF_FILES, OF_NAMES, OF_HEADS) if change in group]
            if change not in changes and not any(group & set(changes) for group in groups):
                changes.append(change)
        changes.sort(key=lambda change: (change in OF_NAMES, change in OF_FILES))
    return Draw(
        base,
        tied=bool(rng.integers(2)) or any(change in OF_HEADS for change in changes),
        dtype=["float32", "bfloat16", "float16"][rng.integers(3)],
        max_shard_size="5GB" if one_file_beside_an_index in changes else ["5GB", "7KB"][rng.integers(2)],
        changes=tuple(changes),
        refused=refused,
    )


def test_the_draws_cover_everything():
    draws = [draw(seed) for seed in range(COUNT)]
    assert {change for each in draws for change in each.changes} == set(LOADED)
    assert {each.refused for each in draws} == {None, *REFUSED}
    loaded = [each for each in draws if each.refused is None]
    assert {each.base for each in loaded} == set(BASES)
    assert {(each.tied, each.max_shard_size) for each in loaded} == {
        (t, s) for t in (True, False) for s in ("5GB", "7KB")
    }


@functools.cache
def model(base: str, tied: bool) -> Any:
    """A random model of the reference's, with norm weights that are not all 1."""
    import torch
    import transformers

    name, options = BASES[base]
    torch.manual_seed(len(base) + tied)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS if base in ("phi3", "llama") else 2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=None,
        **({"eos_token_id": 2} | copy.deepcopy(options)),
    )
    made = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def saved(one: Draw, path: Path, seed: int) -> Folder:
    import torch

    as_kind = copy.deepcopy(model(one.base, one.tied)).to(getattr(torch, one.dtype))
    as_kind.save_pretrained(path, max_shard_size=one.max_shard_size)
    return Folder(path, one.base, one.tied, np.random.default_rng(2000 + seed))


def expected_logits(folder: Path, reference: Any) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    return reference.logits(loaded, TOKENS)


@functools.partial(jax.jit, static_argnames="config")
def run(config: phi3_jax.Phi3Config, params: Any) -> Any:
    return phi3_jax.Phi3(config).apply({"params": params}, TOKENS)


def logits(folder: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = phi3_jax.load(folder)
    # Without what differs between draws and changes no logit, so that they share programs.
    same = dataclasses.replace(loaded.config, bos_token_id=None, eos_token_id=(), pad_token_id=None)
    return np.asarray(run(dataclasses.replace(same, initializer_range=0.02), loaded.params))


@pytest.mark.parametrize("seed", range(COUNT))
def test_the_logits_are_the_references_or_the_refusal_is_on_the_list(reference, quick_compilation, tmp_path, seed):
    one = draw(seed)
    folder = saved(one, tmp_path / "x", seed)
    for change in one.changes:
        change(folder)
    if one.refused is not None:
        break_it, words = REFUSED[one.refused]
        break_it(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            phi3_jax.load(folder.path)
        return
    np.testing.assert_allclose(logits(folder.path), expected_logits(folder.path, reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["phi3 window", "llama"])
@pytest.mark.parametrize(
    "change", [head_stored_too, another_head_stored_too, only_the_head_stored, one_file_beside_an_index]
)
def test_two_sources_of_one_tensor(reference, quick_compilation, tmp_path, base, change):
    folder = saved(Draw(base, True, "float32", "5GB", (change,), None), tmp_path / "x", 0)
    before = expected_logits(folder.path, reference)
    change(folder)
    expected = expected_logits(folder.path, reference)
    assert np.array_equal(before, expected) == (change is not another_head_stored_too)
    np.testing.assert_allclose(logits(folder.path), expected, rtol=0, atol=1e-4)
