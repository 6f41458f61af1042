"""A chat small enough for tests, and what the answers of the demo's should be."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import without_cache
from vocabularies import byte_level_spec, write

import phi3_jax
from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.conversation import Conversation

FRANCE, ITALY = "What is the capital of France?", "And of Italy?"
CONTEXT = 600  # of the tiny model, LongRoPE's border is at 16 and the window 19
USER, END, ASSISTANT = 94, 95, 96
PLAIN = Sampling(banned_tokens=[USER, END, ASSISTANT])  # then the answers come back as the same tokens
DROPS_SYSTEM = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not a word\nof that') }}{% endif %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|><|assistant|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def small_chat(tiny: phi3_jax.Checkpoint, folder: Path) -> phi3_jax.Checkpoint:
    """The tiny model with a tokenizer of one token per ASCII character, and a template like the first Phi-3-mini's."""
    spec = byte_level_spec()
    pieces = [chr(code) for code in range(0x21, 0x7E)] + ["Ġ"]
    spec["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    specials = ["<|user|>", "<|end|>", "<|assistant|>"]
    spec["added_tokens"] = [{"id": USER + i, "content": content, **blank} for i, content in enumerate(specials)]
    write(folder, {"tokenizer.json": spec, "chat_template.jinja": DROPS_SYSTEM})
    config = dataclasses.replace(tiny.config, max_position_embeddings=CONTEXT)
    settings = phi3_jax.GenerationSettings((END,))
    return phi3_jax.Checkpoint(config, tiny.params, phi3_jax.load_tokenizer(folder), settings, folder)


def answers_without_memory(demo: phi3_jax.Checkpoint) -> Callable[..., str]:
    """The demo's answer to messages, alternately the user's and the assistant's, without anything kept."""

    @functools.cache
    def answer(*texts: str, system: str | None = None, limit: int = 16) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": role, "content": t} for role, t in zip(itertools.cycle(["user", "assistant"]), texts)]
        ids = phi3_jax.encode_chat(demo.tokenizer, messages)
        return generate(demo, ids, max_new_tokens=limit, options=Options(room=512))[0].text

    return answer


def ask(conversation: Conversation, text: str, **options: object) -> str:
    pieces = list(conversation.ask(text, **options))
    assert "".join(piece.text for piece in pieces) == conversation.last.generation.text
    return conversation.last.generation.text


def greedy(checkpoint: phi3_jax.Checkpoint, prompt: Sequence[int], count: int) -> list[int]:
    """PLAIN, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        logits = without_cache.logits(checkpoint, ids)[-1]
        ids.append(int(logits[:USER].argmax()))
    return ids[len(prompt) :]
