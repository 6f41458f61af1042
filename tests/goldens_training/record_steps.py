"""Records twenty AdamW steps that torch makes with transformers' model, and learning rates; README.md tells the format.

Run in the parity environment (`make parity` makes it), from the root of the repository:

    .venv-parity/bin/python tests/goldens_training/record_steps.py
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import Phi3ForCausalLM, get_scheduler

HERE = Path(__file__).parent
STEPS = 20
# batch rows as [tokens, of which the last so many are learned]
WHOLE = [(13, 12)] * 3
PADDED = [(13, 6), (8, 7), (11, 2), (16, 11)]
Tensors = dict[str, torch.Tensor]


def main() -> None:
    torch.manual_seed(7)
    save("full_steps", record("gqa", [WHOLE], lr=3e-3, schedule="constant", weight_decay=0.0, clip=1e9))
    batches = [PADDED, PADDED[::-1], WHOLE + PADDED[1:2]]
    save("full_steps_padded", record("partial_tied", batches, lr=1e-3, schedule="cosine", weight_decay=0.1, clip=1.0))
    save("schedules", {name: learning_rates(name) for name in ("cosine", "linear", "constant")})


def save(name: str, tensors: Tensors) -> None:
    path = HERE / name / "expected.safetensors"
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    path.chmod(0o644)  # the package makes files that only their owner can read


def make_batch(rows: list[tuple[int, int]], vocab: int, width: int) -> Tensors:
    tokens = torch.randint(6, vocab, (len(rows), width))
    positions, weights = torch.full(tokens.shape, -1), torch.zeros(tokens.shape)
    for i, (length, learned) in enumerate(rows):
        positions[i, :length] = torch.arange(length)
        weights[i, length - learned : length] = 1
    return {"tokens": tokens, "positions": positions, "weights": weights}


def record(
    base: str, batches: list[list[tuple[int, int]]], lr: float, schedule: str, weight_decay: float, clip: float
) -> Tensors:
    """Steps that take the batches in turn; all but the weights of norms decay, as in transformers' Trainer."""
    model = Phi3ForCausalLM.from_pretrained(f"tests/goldens/{base}", dtype=torch.float32, attn_implementation="eager")
    width = max(length for rows in batches for length, _ in rows)
    made = [make_batch(rows, model.config.vocab_size, width) for rows in batches]
    decayed = {p for name, p in model.named_parameters() if "norm" not in name}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    rates = scheduler(optimizer, schedule, warmup=0, steps=STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        batch = made[step % len(made)]
        attended = (batch["positions"] >= 0).long()
        logits = model(input_ids=batch["tokens"], attention_mask=attended).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:], reduction="none")
        loss = (each * batch["weights"][:, 1:]).sum() / batch["weights"].sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        rates.step()
        losses.append(loss.detach())
    data = {name: torch.stack([batch[name] for batch in made]) for name in made[0]}
    data = {name: tensor if name == "weights" else tensor.int() for name, tensor in data.items()}
    after = {"after/model.norm.weight": model.model.norm.weight.detach()}
    return {**data, "losses": torch.stack(losses), "grad_norms": torch.stack(norms), **after}


def scheduler(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int) -> Any:
    """With 0 at the end, as `final_lr=0`."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def learning_rates(name: str) -> torch.Tensor:
    """Of 23 steps with a warm-up of 4, after it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    made = scheduler(optimizer, "constant_with_warmup" if name == "constant" else name, 4, 23)
    rates = []
    for _ in range(23):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return torch.tensor(rates[4:])


if __name__ == "__main__":
    main()
