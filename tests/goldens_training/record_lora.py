"""Records adapters that PEFT made, what it computes with them, and ten training steps; README.md tells the format.

Run in the parity environment (`make parity` makes it), from the root of the repository:

    .venv-parity/bin/python tests/goldens_training/record_lora.py
"""

import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from transformers import Phi3ForCausalLM

HERE = Path(__file__).parent
BASE = "tests/goldens/gqa"
TIED = "tests/goldens/partial_tied"
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
Tensors = dict[str, torch.Tensor]


def main() -> None:
    torch.manual_seed(5)
    record_adapter("lora", {"r": 3, "lora_alpha": 7, "target_modules": TARGETS})
    record_adapter("rslora", {"r": 4, "lora_alpha": 3, "target_modules": TARGETS[::3], "use_rslora": True})
    record_adapter("dora", {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "use_dora": True})
    record_steps("lora_steps", {"r": 3, "lora_alpha": 6, "target_modules": TARGETS})
    record_embeddings()


def record_embeddings() -> None:
    """Of the embedding and the head, with ranks and alphas of their own."""
    torch.manual_seed(6)
    both = {"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "lm_head", "o_proj"]}
    patterns = {"rank_pattern": {"lm_head": 2, "o_proj": 4}, "alpha_pattern": {"embed_tokens": 3}}
    record_adapter("embeddings", {**both, **patterns})
    one = {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "down_proj"]}
    record_adapter("embedding_alone", {**one, "use_rslora": True}, TIED)
    record_adapter("embedding_tied", {**one, "ensure_weight_tying": True}, TIED)


def new_model(options: dict[str, Any], base: str = BASE) -> peft.PeftModel:
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def save(model: peft.PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)


def save_tensors(tensors: Tensors, name: str) -> None:
    path = HERE / name / "expected.safetensors"
    safetensors.torch.save_file(tensors, path)
    path.chmod(0o644)  # the package makes files that only their owner can read


def gradients(model: peft.PeftModel) -> Tensors:
    named = {name: p.grad.contiguous().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {f"gradient/{saved_name(name)}": gradient for name, gradient in named.items()}


def saved_name(name: str) -> str:
    """A parameter's name in PEFT's files."""
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def record_adapter(name: str, options: dict[str, Any], base: str = BASE) -> None:
    """An adapter far from zero, logits with it, and gradients of the mean cross-entropy of the next tokens."""
    model = new_model(options, base)
    for path, parameter in model.named_parameters():
        if "lora_B" in path or "embedding_A" in path:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "magnitude" in path:
            parameter.data *= torch.empty_like(parameter).uniform_(0.7, 1.4)
    save(model, HERE / name)
    tokens = torch.randint(6, model.config.vocab_size, (2, 11))
    if "embed_tokens" in options["target_modules"]:
        tokens[0, 4] = model.config.pad_token_id  # whose row gets no gradient
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    expected = {"tokens": tokens.int(), "logits": logits.detach(), **gradients(model)}
    save_tensors(expected, name)


def record_steps(name: str, options: dict[str, Any]) -> None:
    """Ten AdamW steps on one batch of padded rows, of which the ends are learned."""
    model = new_model(options)
    save(model, HERE / name)
    lengths, learned = [13, 8, 11], [6, 5, 9]
    B, T = len(lengths), max(lengths)
    tokens = torch.randint(6, model.config.vocab_size, (B, T))
    positions, weights = torch.full((B, T), -1), torch.zeros(B, T)
    for row, (length, count) in enumerate(zip(lengths, learned, strict=True)):
        positions[row, :length] = torch.arange(length)
        weights[row, length - count : length] = 1
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for _ in range(10):
        logits = model(input_ids=tokens, attention_mask=(positions >= 0).long()).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (each * weights[:, 1:]).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        losses.append(loss.detach())
    after = {f"after/{saved_name(path)}": p.detach() for path, p in model.named_parameters() if p.requires_grad}
    curves = {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    batch = {"tokens": tokens.int(), "positions": positions.int(), "weights": weights}
    save_tensors({**batch, **curves, **after}, name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
