"""Texts with an added token for which the embedding has no row."""

import json
from pathlib import Path

import pytest
from training_runs import write_run

from phi3_jax.train.run.loop import train


def test_a_token_without_a_row_is_not_trained(tmp_path: Path) -> None:
    """JAX would read another row for it."""
    settings = write_run(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": 263, "content": "+new+", **blank})
    path.write_text(json.dumps(spec), encoding="utf-8")
    with Path(settings.train_file).open("a") as file:
        file.write(json.dumps({"text": "1+new+2"}) + "\n")
    with (
        pytest.warns(UserWarning, match=r"cannot read the added tokens \{263: '\+new\+'\}"),
        pytest.raises(ValueError, match=r"train\.jsonl: it has the token id 263 \('\+new\+'\).* has 263 rows"),
    ):
        train(settings)
