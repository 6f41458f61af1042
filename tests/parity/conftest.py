"""The reference: transformers on torch. Only in this folder, which an ordinary test run leaves out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def reference() -> "Reference":
    pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")
    pytest.importorskip("transformers", reason="the reference needs torch and transformers: make parity")
    return Reference()


class Reference:
    """What the tests ask of transformers, as numpy arrays."""

    def create(self, sizes: dict[str, Any], folder: Path, seed: int, dtype: str, max_shard_size: str) -> None:
        """A random checkpoint, with norm weights that are not all 1."""
        import torch
        from transformers import Phi3Config, Phi3ForCausalLM

        torch.manual_seed(seed)
        model = Phi3ForCausalLM(Phi3Config(**sizes))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)

    def load(self, folder: Path, dtype: str = "float32", **options: Any) -> Any:
        from transformers import Phi3ForCausalLM

        return Phi3ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options)

    def logits(self, model: Any, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """tokens [B, T] -> float32 [B, T, V]; positions of ragged rows have -1 for padding."""
        import torch

        inputs = {"input_ids": torch.from_numpy(np.asarray(tokens, np.int64))}
        if positions is not None:
            mask = torch.from_numpy(positions >= 0).long()
            # As `generate` makes them.
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}
        with torch.no_grad():
            return model(**inputs).logits.float().numpy()

    def rewrite_as_version_4(self, folder: Path, longrope_type: str) -> None:
        """Turns the config.json of transformers 5 into the layout of the published checkpoints."""
        path = folder / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        rope = raw.pop("rope_parameters")
        raw["torch_dtype"] = raw.pop("dtype")
        raw["attention_bias"] = False
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
        kind = rope.pop("rope_type")
        if longrope_type != "su":  # transformers 5.23 finds the length elsewhere for all types but this one
            rope.pop("original_max_position_embeddings", None)
        raw["rope_scaling"] = None if kind == "default" else {"type": longrope_type, **rope}
        path.write_text(json.dumps(raw), encoding="utf-8")
