"""The other side of training.py: steps of torch's AdamW on transformers' model, or on PEFT's adapter of it.

Requests and replies are those of infer/benchmark/peer_process.py: load, measure. Nothing of phi3_jax is imported but
that file.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from pathlib import Path
from typing import Any


class Torch:
    """transformers with torch's own attention, and AdamW in its fused form: the fastest of what they offer."""

    def load(
        self, path: str, train: str, rows: list[list[int]], rank: int, alpha: float, lr: float, threads: int
    ) -> dict[str, Any]:
        """Gets ready for steps on these rows and takes one."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        if train == "lora":
            import peft

            targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        self._model, self._tokens = model.train(), torch.tensor(rows)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr, weight_decay=0.0, fused=True)
        return self.measure()

    def measure(self) -> dict[str, Any]:
        """A step."""
        begin = time.perf_counter()
        loss = self._model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - begin, "loss": float(loss.detach())}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(__file__).parents[1] / "infer" / "benchmark" / "peer_process.py"
    spec = importlib.util.spec_from_file_location("peer_process", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.serve(Torch())
