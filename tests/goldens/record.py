"""Records the goldens: tiny random Phi-3 checkpoints, and what transformers computes with them in float32.

Run in the parity environment (`make parity` makes it), from the root of the repository:

    .venv-parity/bin/python tests/goldens/record.py

Each folder gets a checkpoint, and an expected.safetensors whose names are `case/what`: `tokens` in, `logits` out,
`positions` where rows are ragged (-1 is padding), `greedy/*` for a continuation, `gradient/*` for a loss.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import Phi3Config, Phi3ForCausalLM

HERE = Path(__file__).parent
Expected = dict[str, torch.Tensor]
# As large as the weights stay well-behaved: a wrong angle, mask or norm must not hide below the tolerance.
COMMON = {"initializer_range": 0.2, "bos_token_id": 1, "pad_token_id": 3, "eos_token_id": [2, 5], "use_cache": True}
WINDOW = COMMON | {
    "vocab_size": 97,
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LONGROPE = COMMON | {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "sliding_window": 262144,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.25, 2.0],
        "long_factor": [1.5, 3.0, 7.0, 21.0],
    },
}
GQA = COMMON | {
    "vocab_size": 103,
    "hidden_size": 36,
    "intermediate_size": 43,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.01,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
PARTIAL_TIED = COMMON | {
    "vocab_size": 109,
    "hidden_size": 24,
    "intermediate_size": 47,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "sliding_window": 262144,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.3, 1.7],
        "long_factor": [2.0, 5.0, 11.0],
    },
    # The published checkpoints of this shape carry these, at values that change nothing.
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
}
THETA = COMMON | {
    "vocab_size": 113,
    "hidden_size": 26,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
}
# Keys of the published config.json files that the old layout has and transformers 5 no longer writes.
PUBLISHED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
}


def main() -> None:
    record("window", WINDOW, seed=1, published=True, cases=[ragged_batch, greedy], lengths=[29])
    record("longrope", LONGROPE, seed=29, published=True, cases=[ragged_rows, greedy], lengths=[16, 17, 40])
    rename_longrope(HERE / "longrope/config.json")
    record("gqa", GQA, seed=1, shard="30KB", cases=[gradient], lengths=[19])
    record("partial_tied", PARTIAL_TIED, seed=1, cases=[gradient], lengths=[16, 17])
    record("theta", THETA, seed=2, published=True, cases=[greedy], lengths=[23])
    record("window_one_layer", WINDOW | {"num_hidden_layers": 1}, seed=1, cases=[window_edge], lengths=[])


def record(
    name: str,
    sizes: dict[str, Any],
    seed: int,
    cases: list[Callable[[Phi3ForCausalLM], Expected]],
    lengths: list[int],
    published: bool = False,
    shard: str = "5GB",
) -> None:
    """Writes one folder. `published` asks for bfloat16 weights and the config.json of transformers 4."""
    torch.manual_seed(seed)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = Phi3ForCausalLM(Phi3Config(**sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.bfloat16 if published else torch.float32).save_pretrained(folder, max_shard_size=shard)
    if published:
        rewrite_as_published(folder / "config.json")
    # Read back, so that the reference meets the same files as the reader under test.
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected: Expected = {}
    for length in lengths:
        expected |= logits_of(model, f"length{length}", random_tokens(model, 1, length))
    for case in cases:
        expected |= case(model)
    expected = {key: tensor.detach().contiguous() for key, tensor in expected.items()}
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


def rewrite_as_published(path: Path) -> None:
    """Turns a config.json of transformers 5 into the layout of version 4, which is the one of the published models."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    rope = raw.pop("rope_parameters")
    raw.pop("dtype")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rope = {key: rope[key] for key in ("short_factor", "long_factor") if key in rope}
    raw["rope_scaling"] = None if kind == "default" else {"type": "longrope", **rope}
    path.write_text(json.dumps(dict(sorted((raw | PUBLISHED).items())), indent=2) + "\n", encoding="utf-8")


def rename_longrope(path: Path) -> None:
    """The first published checkpoints say `su`, which transformers 5.23 fails on: so this comes after recording."""
    path.write_text(path.read_text(encoding="utf-8").replace('"type": "longrope"', '"type": "su"'), encoding="utf-8")


def random_tokens(model: Phi3ForCausalLM, batch: int, length: int) -> torch.Tensor:
    return torch.randint(6, model.config.vocab_size, (batch, length))


def logits_of(
    model: Phi3ForCausalLM, case: str, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> Expected:
    """What one call computes; `positions` of ragged rows have -1 for padding, which becomes an attention mask."""
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
    expected = {f"{case}/tokens": tokens.int()}
    if positions is not None:
        mask = (positions >= 0).long()
        # As `generate` makes them.
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}
        expected[f"{case}/positions"] = positions.int()
    with torch.no_grad():
        logits = model(**inputs).logits
    check_clear(logits if positions is None else logits[positions >= 0])
    return expected | {f"{case}/logits": logits}


def check_clear(logits: torch.Tensor) -> None:
    """Raises ValueError where the two best tokens are so close that rounding on another machine could swap them."""
    best = logits.topk(2, dim=-1).values
    if (margin := float((best[..., 0] - best[..., 1]).min())) < 2e-3:
        raise ValueError(f"two tokens are only {margin:.1e} apart: take another seed")


def pad(model: Phi3ForCausalLM, rows: list[torch.Tensor], length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (tokens, positions), both [B, length]."""
    tokens = torch.full((len(rows), length), model.config.pad_token_id)
    positions = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], positions[i, where] = row, torch.arange(len(row))
    return tokens, positions


def ragged_batch(model: Phi3ForCausalLM) -> Expected:
    rows = [random_tokens(model, 1, length)[0] for length in (3, 8, 15)]
    expected: Expected = {}
    for side in ("left", "right"):
        expected |= logits_of(model, f"ragged_{side}", *pad(model, rows, 15, side))
    return expected


def ragged_rows(model: Phi3ForCausalLM) -> Expected:
    """Each row alone: the reference would pick the LongRoPE factors of the longest row for all of them."""
    rows = [random_tokens(model, 1, length)[0] for length in (5, 17)]
    expected: Expected = {}
    for side in ("left", "right"):
        alone = [logits_of(model, "", *pad(model, [row], 19, side)) for row in rows]
        expected |= {f"ragged_{side}{what}": torch.cat([row[what] for row in alone]) for what in alone[0]}
    return expected


def window_edge(model: Phi3ForCausalLM) -> Expected:
    """Three rows: some tokens; the same with token 11 - 4 changed; the same with token 11 - 5 changed."""
    tokens = random_tokens(model, 1, 13).repeat(3, 1)
    tokens[1, 11 - 4] = (tokens[0, 11 - 4] + 1) % model.config.vocab_size
    tokens[2, 11 - 5] = (tokens[0, 11 - 5] + 1) % model.config.vocab_size
    return logits_of(model, "edge", tokens)


def greedy(model: Phi3ForCausalLM) -> Expected:
    """12 tokens continued by 24 (across LongRoPE's border of 16, where there is one), without a cache."""
    prompt = random_tokens(model, 1, 12)
    keep = {"return_dict_in_generate": True, "output_logits": True}
    result = model.generate(prompt, max_new_tokens=24, do_sample=False, use_cache=False, **keep)
    check_clear(torch.cat(result.logits))
    return {"greedy/prompt": prompt[0].int(), "greedy/answer": result.sequences[0, 12:].int()}


def gradient(model: Phi3ForCausalLM) -> Expected:
    """Gradients of the mean cross-entropy of the next tokens, of a batch that has the pad id among them."""
    tokens = random_tokens(model, 2, 11)
    tokens[0, 4] = tokens[1, 9:] = model.config.pad_token_id
    logits = model(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"]
    gradients = {f"gradient/{name}": model.get_parameter(name).grad for name in names}
    return {"gradient/tokens": tokens.int()} | gradients


if __name__ == "__main__":
    main()
