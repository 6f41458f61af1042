"""Records what transformers' logits processors make of a few rows of odd logits.

Run in the parity environment (`make parity` makes it), from the root of the repository:

    .venv-parity/bin/python tests/goldens_sampling/record.py

expected.safetensors gets the inputs, and the logits [B, V] that come out of each case; its metadata has each case's
settings as JSON, in the words of `phi3_jax.infer.Sampling`. The processors come from `generate` itself,
in its own order. Every row runs alone, because transformers has one setting for a whole batch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import GenerationConfig, LogitsProcessorList, Phi3Config, Phi3ForCausalLM

B, V, S = 5, 131, 23
END_IDS = [2, 5]
DRAW = {"temperature": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "off": DRAW,
    "temperature": {"temperature": 0.37},
    **{f"top_k={k}": DRAW | {"top_k": k} for k in (1, 2, 7, 130, 500)},
    **{f"top_p={p}": DRAW | {"top_p": p} for p in (1e-9, 0.11, 0.5, 0.9, 0.999)},
    **{f"min_p={p}": DRAW | {"min_p": p} for p in (0.0, 0.03, 0.5, 1.0)},
    **{f"typical_p={p}": DRAW | {"typical_p": p} for p in (0.01, 0.3, 0.92)},
    **{f"repetition_penalty={p}": {"repetition_penalty": p} for p in (0.7, 1.0, 1.3)},
    **{f"no_repeat_ngram_size={n}": {"no_repeat_ngram_size": n} for n in (1, 2, 3, 19)},
    **{f"min_new_tokens={n}": {"min_new_tokens": n} for n in (3, 4, 50)},
    "logit_bias": {"logit_bias": {0: 1.5, 130: -2.25, 77: 30.0}},
    "banned": {"banned_tokens": [130, 0, 41]},
    "forced": {"forced_tokens": [17]},
    "forced and banned": {"forced_tokens": [17], "banned_tokens": [17], "temperature": 0.5, "top_p": 0.7},
    "greedy": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "logit_bias": {2: 9.0, 60: 4.0},
        "banned_tokens": [60, 3],
    },
    "two cuts": {"temperature": 1.9, "top_k": 40, "top_p": 0.8},
    "everything": {
        "temperature": 1.7,
        "top_k": 90,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "logit_bias": {2: 9.0, 60: 4.0, 61: -3.0},
        "banned_tokens": [60, 3],
    },
}


def inputs() -> dict[str, torch.Tensor]:
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (B, V)).astype(np.float32)
    logits[1] = np.round(logits[1] * 2) / 2  # many ties, also at 0 and -0
    logits[2, random.permutation(V)[:90]] = -np.inf
    logits[3, :6] = [1e4, -1e30, 9.9990e3, -1e4, 1e-30, 9.9985e3]
    logits[4] = 0.5
    # Few different tokens, so that n-grams repeat.
    history = random.integers(2, 6, (B, S)).astype(np.int32)
    return {
        "logits": torch.from_numpy(logits),
        "history": torch.from_numpy(history),
        "lengths": torch.tensor([19, 7, 23, 12, 4], dtype=torch.int32),
        "prompt_lengths": torch.tensor([16, 4, 20, 8, 1], dtype=torch.int32),
        "end_ids": torch.tensor(END_IDS, dtype=torch.int32),
    }


def processors(case: dict[str, Any], prompt_length: int) -> LogitsProcessorList:
    config = GenerationConfig(
        do_sample="temperature" in case,
        sequence_bias={(token,): bias for token, bias in case["logit_bias"].items()} if "logit_bias" in case else None,
        bad_words_ids=[[token] for token in case["banned_tokens"]] if "banned_tokens" in case else None,
        forced_bos_token_id=case["forced_tokens"][0] if "forced_tokens" in case else None,
        **{"top_k": 0}
        | {name: case[name] for name in case if name not in ("logit_bias", "banned_tokens", "forced_tokens")},
    )
    config._eos_token_tensor = torch.tensor(END_IDS)
    tiny = Phi3Config(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    return Phi3ForCausalLM(tiny)._get_logits_processor(config, prompt_length, device="cpu")


def main() -> None:
    tensors = inputs()
    for name, case in CASES.items():
        rows = []
        for row in range(B):
            length, prompt_length = int(tensors["lengths"][row]), int(tensors["prompt_lengths"][row])
            if "forced_tokens" in case:
                length = prompt_length = 1  # transformers forces the token after the first one
            history = tensors["history"][row : row + 1, :length].long()
            rows.append(processors(case, prompt_length)(history, tensors["logits"][row : row + 1].clone()))
        tensors[f"{name}/logits"] = torch.cat(rows)
    metadata = {name: json.dumps(case) for name, case in CASES.items()}
    safetensors.torch.save_file(tensors, Path(__file__).with_name("expected.safetensors"), metadata)


if __name__ == "__main__":
    main()
