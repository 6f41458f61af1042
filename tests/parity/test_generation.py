"""Whole answers beside transformers' `generate`: a ragged batch that crosses LongRoPE's border and fills the window."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi3_jax
from phi3_jax.infer import Options, beam_search, generate

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")

BORDER, WINDOW, STEPS = 16, 19, 18
PROMPTS = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8], [90, 4, 77, 15, 60, 3, 22, 9, 41, 13, 58]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = phi3_jax.Phi3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_theta=1e4,
        long_rope=phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), BORDER),
        sliding_window=WINDOW,
        initializer_range=0.3,
    )
    checkpoint = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    phi3_jax.save(checkpoint, folder / "model")
    return folder / "model"


def reference_answers(reference, folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    model = reference.load(folder)
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return out[:, width:].tolist()


def test_one_row_at_a_time(reference, folder):
    checkpoint = phi3_jax.load(folder)
    for prompt in PROMPTS:
        (result,) = generate(checkpoint, prompt, STEPS)
        assert result.token_ids == reference_answers(reference, folder, [prompt])[0]


def test_the_batch_rule_is_the_references(reference, folder):
    """With rope_policy="batch" a ragged batch gets the reference's tokens, which are not those of the rows alone."""
    checkpoint = phi3_jax.load(folder)
    expected = reference_answers(reference, folder, PROMPTS)
    results = generate(checkpoint, PROMPTS, STEPS, options=Options(rope_policy="batch"))
    assert [result.token_ids for result in results] == expected
    assert [result.token_ids for result in generate(checkpoint, PROMPTS, STEPS)] != expected


@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search(reference, folder, beams):
    checkpoint = phi3_jax.load(folder)
    for prompt in PROMPTS:
        (best,) = beam_search(checkpoint, prompt, STEPS, beams)[0]
        assert best.token_ids == reference_answers(reference, folder, [prompt], num_beams=beams)[0]


def test_draws_follow_the_references_distribution(reference, folder):
    """First tokens of 2000 draws with top-k and top-p, against the reference's probabilities after its processors."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    checkpoint, count, prompt = phi3_jax.load(folder), 2000, PROMPTS[1]
    sampling = phi3_jax.infer.Sampling(temperature=3.0, top_k=20, top_p=0.9)
    drawn = [result.token_ids[0] for result in generate(checkpoint, [prompt] * count, 1, sampling=sampling)]
    scores = torch.tensor(reference.logits(reference.load(folder), np.asarray([prompt]))[:, -1])
    for processor in (TemperatureLogitsWarper(3.0), TopKLogitsWarper(20), TopPLogitsWarper(0.9)):
        scores = processor(torch.tensor([prompt]), scores)
    probs = scores.softmax(-1)[0].numpy().astype(np.float64)
    counts = np.bincount(drawn, minlength=97)
    assert not counts[probs == 0].any()
    often = probs * count >= 5
    expected = (probs * count)[often]
    chi_squared = ((counts[often] - expected) ** 2 / expected).sum()
    # Mean n and standard deviation sqrt(2 n).
    assert often.sum() > 5
    assert chi_squared < often.sum() + 5 * np.sqrt(2 * often.sum())
