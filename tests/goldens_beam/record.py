"""Records what transformers' beam search finds with the tiny checkpoints of tests/goldens.

Run in the parity environment (`make parity` makes it), from the root of the repository:

    .venv-parity/bin/python tests/goldens_beam/record.py

expected.json gets a list of searches: their settings, the prompts, and for each prompt all the beams with their scores,
best first. Every prompt runs alone, because transformers decides about LongRoPE for a whole batch, and without a cache.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3ForCausalLM

HERE = Path(__file__).parent
# Checkpoint, sliding window in place of its own, lengths of the prompts, new tokens, (beams, number of end ids).
MODELS: list[tuple[str, int | None, list[int], int, list[tuple[int, int]]]] = [
    ("theta", None, [3, 11, 6], 13, [(1, 1), (3, 2), (4, 0)]),
    ("gqa", 7, [5, 2, 12], 11, [(4, 1)]),
    ("partial_tied", None, [12, 4, 16, 19], 10, [(3, 1), (4, 2)]),  # LongRoPE, with the border at 16 tokens
]
LENGTH_PENALTIES = [0.0, 1.0, 2.0, -1.0]
# Of the logits: peaked enough for beams that finish early to win, flat enough for beams to differ from greedy.
SHARPNESS = 1.5


def main() -> None:
    torch.set_num_threads(1)
    searches = []
    for name, window, lengths, new, widths in MODELS:
        overrides = {} if window is None else {"sliding_window": window}
        model = Phi3ForCausalLM.from_pretrained(HERE.parent / "goldens" / name, dtype=torch.float32, **overrides).eval()
        model.model.norm.weight.data *= SHARPNESS  # and with it the logits
        random = torch.Generator().manual_seed(11)
        prompts = [torch.randint(6, model.config.vocab_size, (n,), generator=random).tolist() for n in lengths]
        # End ids that a search meets: what other beams than the best have halfway.
        seen = [search(model, prompt, new, 4, [], 1.0, False) for prompt in prompts]
        ends = [seen[0][1]["token_ids"][4], seen[1][2]["token_ids"][6]]
        for (beams, count), penalty, early in itertools.product(widths, LENGTH_PENALTIES, [False, True]):
            settings: dict[str, Any] = {
                "model": name,
                "sliding_window": window,
                "max_new_tokens": new,
                "beams": beams,
                "end_ids": ends[:count],
                "length_penalty": penalty,
                "early_stopping": early,
            }
            found = [search(model, prompt, new, beams, ends[:count], penalty, early) for prompt in prompts]
            searches.append(settings | {"prompts": prompts, "found": found})
    lines = ",\n".join(json.dumps(each) for each in searches)
    (HERE / "expected.json").write_text(f"[\n{lines}\n]\n")


def search(
    model: Phi3ForCausalLM, prompt: list[int], new: int, beams: int, ends: list[int], penalty: float, early: bool
) -> list[dict[str, Any]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=False,
        max_new_tokens=new,
        num_beams=beams,
        num_return_sequences=beams,
        eos_token_id=ends or None,
        pad_token_id=0,
        length_penalty=penalty if beams > 1 else None,
        early_stopping=early if beams > 1 else None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for i, row in enumerate(out.sequences):
        token_ids = until_end(row[len(prompt) :].tolist()[:new], ends)
        if beams > 1:
            score = out.sequences_scores[i].item()
        else:  # greedy decoding: transformers gives no score
            logprobs = [
                step[0].log_softmax(-1)[token].item() for step, token in zip(out.scores, token_ids, strict=False)
            ]
            score = sum(logprobs) / len(token_ids) ** penalty
        found.append({"token_ids": token_ids, "score": round(score, 6)})
    return found


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


if __name__ == "__main__":
    main()
