"""Reports of the form that infer/inspection/report.py describes, with random numbers and hostile texts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

# What may stand in a prompt or a vocabulary: ends of elements, scripts, directions, controls, halves of characters.
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "{{report}} {{policy}}",
    "\u202egnihtemos \u2066",
    "\u2028&amp;'\"`${1}\\u003c",
    " \x00\x07\n\t\ud800",
    "",
)


def random_report(
    length: int = 7,
    layers: int = 3,
    heads: int = 5,
    vocab: int = 211,
    window: int | None = 4,
    steps: int = 3,
    texts: tuple[str, ...] = HOSTILE,
) -> dict[str, Any]:
    """A whole report; ids i of the vocabulary have the text texts[i % len(texts)]. `vocab` is at least 20."""
    T, L, N, V = length, layers, heads, vocab
    rng = np.random.default_rng(7)

    def numbers(*shape: int, scale: float = 1.0) -> Any:
        return np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])(scale * rng.gamma(0.7, 1.0, shape)).tolist()

    def guesses(*shape: int, among: int) -> Any:
        """[..., among] of [id, probability], the likeliest first."""
        if shape:
            return [guesses(*shape[1:], among=among) for _ in range(shape[0])]
        share = np.sort(rng.dirichlet(np.full(among + 1, 0.4))[:among])[::-1]
        return [[int(i), float(f"{p:.5g}")] for i, p in zip(rng.choice(V, among, False), share, strict=True)]

    def pattern() -> list[list[int]]:
        rows = []
        for t in range(T):
            first = max(0, t - window + 1) if window else 0
            weights = np.zeros(t + 1)
            weights[first:] = rng.dirichlet(np.full(t + 1 - first, 0.5))
            rows.append(np.rint(1000 * weights).astype(int).tolist())
        return rows

    def walk() -> list[dict[str, Any]]:
        return [
            {
                "id": int(rng.integers(V)),
                "probability": numbers(1, scale=0.1)[0],
                "runners": guesses(among=5),
                "entropy": numbers(1)[0],
                "looked": rng.integers(0, 1000, T + i).tolist(),
            }
            for i in range(steps)
        ]

    ids = rng.integers(0, V, T).tolist()
    logits = (3 * rng.normal(size=V)).astype("<f4")
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-logits, kind="stable")[:20]
    tokens = [texts[i % len(texts)] for i in ids]
    counts = {"embedding": V * 24, "attention": L * 999, "norms": 24}
    return {
        "format": "phi3-inspect",
        "version": 1,
        "model": {
            "name": texts[0],
            "layers": L,
            "heads": N,
            "kv_heads": 1,
            "head_dim": 8,
            "width": 24,
            "ffn": 40,
            "vocab": V,
            "window": window,
            "tied": False,
            "weights": "float32",
            "total": sum(counts.values()),
            "parameters": [{"part": part, "formula": "a x b", "count": count} for part, count in counts.items()],
        },
        "prompt": "".join(tokens),
        "tokens": [
            {"id": i, "piece": text, "text": text, "bytes": list(text.encode("utf-8", "surrogatepass"))}
            for i, text in zip(ids, tokens, strict=True)
        ],
        "vocabulary": {str(i): texts[i % len(texts)] for i in range(V)},
        "embedding": {"norms": numbers(T), "nearest": guesses(T, among=8)},
        "attention": {"thousandths": [[pattern() for _ in range(N)] for _ in range(L)]},
        "residual": {
            "embed": numbers(T),
            "attention": numbers(L, T),
            "mid": numbers(L, T),
            "mlp": numbers(L, T),
            "post": numbers(L, T, scale=50),
        },
        "lens": {"mid": guesses(L, T, among=3), "post": guesses(L, T, among=3)},
        "heads": {name: numbers(L, N, scale=0.2) for name in ("previous", "first", "self", "entropy", "induction")},
        "rollout": numbers(T, scale=0.2),
        "attribution": {
            "id": int(best[0]),
            "logit": 3.25,
            "rest": -0.25,
            "embed": -0.5,
            "heads": (np.array(numbers(L, N)) - 0.5).round(4).tolist(),
            "mlps": (np.array(numbers(L)) - 0.5).round(4).tolist(),
        },
        "surprise": [None, *numbers(T - 1)],
        "entropy": numbers(T),
        "next": {
            "logits": base64.b64encode(logits.tobytes()).decode(),
            "top": [[int(i), float(f"{logits[i]:.5g}"), float(f"{probabilities[i]:.5g}")] for i in best],
            "sampling": {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": None},
        },
        "generation": {
            "greedy": walk(),
            "sampled": walk(),
            "texts": {"greedy": texts[0], "sampled": texts[-1]},
            "temperature": 0.8,
            "seed": 0,
        },
        "comparison": {
            "name": texts[1],
            "kl": numbers(T, scale=0.1),
            "layers": [{"cosine": numbers(T, scale=0.5), "kl": numbers(T)} for _ in range(L)],
            "top": guesses(among=5),
            "parted": 1,
            "note": None,
        },
        "code": {
            "tokens": {"module": "phi3_jax/text/tokenizer.py", "line": 110, "name": "Tokenizer.encode"},
            "next": {"module": "phi3_jax/infer/sampling/pick.py", "line": 28, "name": "pick"},
            "lens": {"module": "phi3_jax/nowhere.py", "line": 1, "name": "gone"},
        },
    }
