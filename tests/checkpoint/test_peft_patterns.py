"""Regular expressions in adapter_config.json, against Python's own; and those that it would never finish."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import BASE, RECORDED

import phi3_jax
from phi3_jax.checkpoint import load_adapter
from phi3_jax.checkpoint.peft.patterns import matches
from phi3_jax.checkpoint.peft.settings import read_settings

NAMES = [
    f"model.layers.{i}.{name}" for i in (1, 12) for name in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.down_proj")
]


def changed(folder: Path, **settings: Any) -> Path:
    """A recorded adapter with other settings."""
    shutil.copytree(RECORDED / "lora", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("pattern", [r"(.*.*)*x", "(((a?){99}){99}){99}.*Q", "(m|m|.)*" * 20 + "x", ".*" * 200 + "x"])
def test_no_pattern_takes_for_ever(pattern, tmp_path):
    config = phi3_jax.load(BASE).config
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"names none of .*qkv_proj in any layer"):
        load_adapter(changed(tmp_path / "x", target_modules=pattern), config)
    load_adapter(changed(tmp_path / "y", rank_pattern={pattern: 5}), config)  # it matches nothing
    assert time.monotonic() - began < 30


PATTERNS = [
    r".*\.(q_proj|down_proj)", r"(\w+\.)+\w+", r"[^l]\w*.*?[a-z_]+", r".*(?<!q_proj)", r".*(?<=\d|s)\..*",
    r".*\Bproj", r"\bm.*\b", r"(?:\w+\.){3,4}[p-q]_proj|lm_head", r"(?=m)(?!l)\S*", r"(m?o?d?e?l?\.?)*ayers.*", r"",
    r"^model.*$", r".*\d{2}.*", r"(x*)*lm_head", r"[\d\w._]*?", r"(?P<x>m|l).*|\D+", r"(?s:.*)proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_to_python(pattern):
    for name in (*NAMES, "lm_head", "model.embed_tokens", "", "model.norm"):
        assert matches(pattern, name) == bool(re.fullmatch(pattern, name)), name


def test_random_patterns_mean_what_they_mean_to_python():
    rng = np.random.default_rng(3)

    def draw(depth: int) -> str:
        kind = rng.integers(9) if depth else 0
        if kind < 2:
            return str(rng.choice(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w"]))
        one, two = draw(depth - 1), draw(depth - 1)
        forms = [one + two, f"(?:{one}|{two})", f"(?:{one})*", f"({one})+?", f"(?:{one}){{1,3}}", f"(?!{one}){two}"]
        return forms[kind - 3] if kind > 2 else one + two

    found = 0
    for _ in range(1000):
        pattern, name = draw(4), "".join(rng.choice(list("ab."), rng.integers(7)))
        found += (expected := bool(re.fullmatch(pattern, name)))
        assert matches(pattern, name) == expected, (pattern, name)
    assert 50 < found < 950


@pytest.mark.parametrize(
    "key",
    ["q_proj", "self_attn.q_proj", "elf_attn.q_proj", "1.self_attn.q.proj", "^q_proj", "q_proj$", "proj", ".*[kv]_proj",
     "^model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "x.model.layers.1.self_attn.q_proj",
     "layers.[12].*"],
)  # fmt: skip
def test_keys_of_ranks_and_alphas_mean_what_they_mean_to_peft(key, tmp_path):
    settings = read_settings(
        changed(tmp_path / "x", rank_pattern={key: 5}, alpha_pattern={key: 2}) / "adapter_config.json"
    )
    for name in NAMES:
        lora = settings.of(name)
        matched = re.match(rf"(.*\.)?({key})$", name)
        assert (lora.rank, lora.alpha) == ((5, 2) if matched else (3, 7)), name


def test_a_rank_for_each_module_of_a_large_model_takes_no_time(tmp_path):
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(80) for part in "qkvo"]
    ranks = {name: 1 + i for i, name in enumerate(names)}
    path = changed(tmp_path / "x", rank_pattern=ranks, alpha_pattern=ranks) / "adapter_config.json"
    began, settings = time.monotonic(), read_settings(path)
    assert [settings.of(name).rank for name in names] == list(ranks.values())
    assert time.monotonic() - began < 10
