"""Exported files in llama.cpp: the same logits and token ids as here.

llama-cpp-python is not in the extra `parity`, because pip compiles it for ten minutes: pip install llama-cpp-python.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi3_jax
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.text import load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")

TEXT = (
    "The capital of France is Paris. It's 1234 years old,\n  and the river Seine flows through it. \U0001f600 caf\u00e9"
)


def llama(path: Path, n_ctx: int = 256, **options: Any) -> Any:
    """A model with keys and values in float32, as here."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=n_ctx,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
        **options,
    )


def llama_logits(path: Path, ids: list[int], n_ctx: int = 256) -> np.ndarray:
    """Logits of every token, [T, V]."""
    model = llama(path, n_ctx)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return logits


def logits(checkpoint: phi3_jax.Checkpoint, ids: list[int]) -> np.ndarray:
    """The same here."""
    variables = {"params": checkpoint.params}
    return np.asarray(phi3_jax.Phi3(checkpoint.config).apply(variables, np.array([ids])))[0]


def random_checkpoint(**changes: Any) -> phi3_jax.Checkpoint:
    config = phi3_jax.Phi3Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=1e4,
        initializer_range=0.2,
    )
    config = dataclasses.replace(config, **changes)
    return phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())


LONG_ROPE = phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0, 2.5, 3.0), (2.0, 3.0, 5.0, 9.0, 12.0, 20.0), 300)


@pytest.mark.parametrize(("length", "n_ctx"), [(150, 256), (350, 512)], ids=["short factors", "long factors"])
def test_grouped_queries_longrope_and_partial_rotary(tmp_path, length, n_ctx):
    original = random_checkpoint(
        long_rope=LONG_ROPE, partial_rotary_factor=0.75, tie_word_embeddings=True, sliding_window=400
    )
    save_gguf(original, tmp_path / "x.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, 97, length).tolist()
    np.testing.assert_allclose(llama_logits(tmp_path / "x.gguf", ids, n_ctx), logits(original, ids), atol=2e-3)
    plain = dataclasses.replace(original, config=dataclasses.replace(original.config, long_rope=None))
    assert np.abs(logits(original, ids) - logits(plain, ids)).max() > 0.5


def test_llama_cpp_ignores_the_window_as_the_remark_says(tmp_path):
    original = random_checkpoint(sliding_window=20)
    assert "ignores the sliding window of 20" in " ".join(save_gguf(original, tmp_path / "x.gguf", "f32"))
    ids = np.random.default_rng(0).integers(0, 97, 40).tolist()
    theirs, ours = llama_logits(tmp_path / "x.gguf", ids), logits(original, ids)
    np.testing.assert_allclose(theirs[:20], ours[:20], atol=2e-3)
    assert np.abs(theirs[20:] - ours[20:]).max(-1).min() > 1e-2
    without = dataclasses.replace(original, config=dataclasses.replace(original.config, sliding_window=None))
    np.testing.assert_allclose(theirs, logits(without, ids), atol=2e-3)


# llama.cpp rounds activations to what the weights are (to 8 bits for both quantised types), and this library's XLA path
# does not: the logits' scatter about ours, beside that of the logits themselves.
@pytest.mark.parametrize(("kind", "most"), [("f32", 2e-5), ("f16", 5e-3), ("bf16", 4e-2), ("q8_0", 0.1), ("q4_0", 0.1)])
def test_the_demo(tmp_path, demo, kind, most):
    path = tmp_path / "demo.gguf"
    save_gguf(demo, path, kind)
    ids = demo.tokenizer.encode(TEXT)
    ours, theirs = logits(phi3_jax.load(path), ids), llama_logits(path, ids)
    assert (theirs - ours).std() < most * ours.std()
    assert (theirs.argmax(-1) == ours.argmax(-1)).mean() > 0.9
    if kind == "f32":
        np.testing.assert_allclose(theirs, ours, atol=1e-3)


def llama_ids(model: Any, text: str, special: bool) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=special)


TEXTS = [
    TEXT,
    "  two  spaces\n\n\tand a tab \r\n x",
    "def f(x):\n    return x**2  # 1234567",
    "Ελλάδα 中文字符 \u0301",
    "",
]


def test_the_demos_vocabulary(tmp_path, demo):
    save_gguf(demo, tmp_path / "demo.gguf", "q4_0")
    model = llama(tmp_path / "demo.gguf")
    chat = "<|im_start|>user\n  Hello there 2024!<|im_end|>\n<|im_start|>assistant\n"
    for text in [*TEXTS, chat]:
        assert llama_ids(model, text, special=True) == demo.tokenizer.encode(text, parse_special=True), text
    assert (model.token_bos(), model.token_eos()) == (demo.tokenizer.bos_id, demo.tokenizer.eos_id)
    assert model.metadata["tokenizer.chat_template"] == demo.tokenizer.chat_template
    model.close()


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_the_phi3_vocabulary(tmp_path, file):
    folder = os.environ.get("PHI3_TOKENIZER_DIR")
    if not folder:
        pytest.skip("PHI3_TOKENIZER_DIR, a folder with the real Phi-3 vocabulary, is not set")
    tokenizer = load_tokenizer(folder, {"tokenizer.model": "sentencepiece", "tokenizer.json": "tokenizers"}[file])
    original = random_checkpoint(vocab_size=32064, num_hidden_layers=1, eos_token_id=(32000,))
    ends = phi3_jax.GenerationSettings((32000, 32001, 32007))
    original = dataclasses.replace(original, tokenizer=tokenizer, generation=ends)
    remarks = save_gguf(original, tmp_path / "x.gguf", "q8_0")
    assert remarks == []
    loaded = phi3_jax.load(tmp_path / "x.gguf")
    assert loaded.generation == ends
    model = llama(tmp_path / "x.gguf")
    chat = "<|system|>\nBe brief.<|end|>\n<|user|>\nHello there<|end|>\n<|assistant|>\n"
    for text in [*TEXTS, chat, "<s> a<|endoftext|> b"]:
        expected = tokenizer.encode(text, parse_special=True, add_bos=False)
        assert loaded.tokenizer.encode(text, parse_special=True, add_bos=False) == expected, text
        assert llama_ids(model, text, special=True) == expected, text
    model.close()
