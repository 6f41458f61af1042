import json

import numpy as np
import pytest

from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.inspection import Step, texts, timeline
from phi3_jax.infer.inspection.timeline import told
from phi3_jax.inspection import run

PROMPT, NEW = [5, 1, 7, 88], 20
CHUNK = Options(prefill_chunk=4)  # a ring of 22 slots, in which 24 tokens lie


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def same_step(step, logits, pattern):
    """Against NumPy: logits [V], pattern [L, N, S] with keys in order."""
    p = softmax(logits)
    np.testing.assert_allclose(step["probability"], p[step["id"]], rtol=1e-3)
    order = [int(i) for i in np.argsort(-p) if i != step["id"]][:5]
    assert [i for i, _ in step["runners"]] == order
    np.testing.assert_allclose([x for _, x in step["runners"]], p[order], rtol=1e-3)
    np.testing.assert_allclose(step["entropy"], -(p * np.log(p)).sum(), rtol=1e-3)
    np.testing.assert_allclose(step["looked"], 1000 * pattern.mean(axis=(0, 1)), atol=0.6)


def test_a_step_is_told_as_numpy_tells_it():
    """Slots of a ring: of 7 tokens, the first two have been overwritten by those at 5 and 6."""
    rng = np.random.default_rng(0)
    logits, pattern = 3 * rng.normal(size=13).astype(np.float32), rng.random((2, 3, 5), np.float32)
    slots = pattern[..., [3, 4, 0, 1, 2]]  # positions 5, 6, 2, 3, 4
    seen = {"logits": logits[None, None], "attn.pattern": slots[:, None, :, None]}
    for token in (int(logits.argmax()), int(logits.argmin())):
        same_step(told(Step(token, 7, seen)), logits, np.pad(pattern, [(0, 0), (0, 0), (2, 0)]))


@pytest.mark.slow
def test_a_timeline_is_that_of_whole_texts(tiny):
    """Every step of both runs, past the border of LongRoPE and the window."""
    found = json.loads(json.dumps(timeline(tiny, PROMPT, NEW, 1.4, 6, CHUNK)))
    assert (found["temperature"], found["seed"]) == (1.4, 6)
    for name, sampling in {"greedy": Sampling(), "sampled": Sampling(temperature=1.4, seed=6)}.items():
        ids = [step["id"] for step in found[name]]
        assert ids == generate(tiny, [PROMPT], NEW, sampling=sampling, options=CHUNK)[0].token_ids
        for number in (0, 1, 12, 13, NEW - 1):
            text = np.asarray([PROMPT + ids[:number]])
            positions = np.arange(32)[None]
            padded = np.pad(text, [(0, 0), (0, 32 - text.shape[1])])
            positions = np.where(positions < text.shape[1], positions, -1)
            seen = run(tiny.config, tiny.params, padded, ("attn.pattern", "logits"), token_positions=positions)
            last = text.shape[1] - 1
            pattern = np.asarray(seen["attn.pattern"])[:, 0, :, last, : last + 1]
            same_step(found[name][number], np.asarray(seen["logits"])[0, last], pattern)
    assert ids != [step["id"] for step in found["greedy"]]
    assert found["texts"]["sampled"] == "".join(f"<{token}>" for token in ids)  # there is no tokenizer


def test_characters_that_tokens_share_are_whole_in_a_text():
    parts = [" é".encode()[:2], " é".encode()[2:], b"a", b"\xff"]

    class ByBytes:
        vocab_size = 4

        def piece(self, token):
            return str(token)

        def token_bytes(self, token, opens_text=False):
            return parts[token]

    assert [texts.text_of(ByBytes(), token) for token in range(5)] == [" \ufffd", "\ufffd", "a", "\ufffd", "<4>"]
    assert texts.joined(ByBytes(), [0, 1, 2, 3, 4, 2]) == " éa\ufffd<4>a"
