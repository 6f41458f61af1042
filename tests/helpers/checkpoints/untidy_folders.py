"""Folders of checkpoints as people have them: what is done to one that transformers saved, and what is refused.

Up to three things are done to a folder that were seen in published ones, or one that must be refused.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

VOCABULARY, HEADS, LAYERS = 61, 4, 2

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 9.0]}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# What differs between the kinds of models: the class, and arguments of its configuration.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"rope_parameters": _ROPE}),
    "phi3 longrope": (
        "Phi3",
        {"rope_parameters": _ROPE | _LONG | {"rope_type": "longrope"}, "original_max_position_embeddings": 8},
    ),
    "phi3 window": ("Phi3", {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}, "sliding_window": 5}),
    "llama": ("Llama", {"rope_parameters": _ROPE}),
    "llama3": ("Llama", {"rope_parameters": _ROPE | _LLAMA3 | {"rope_type": "llama3"}}),
    "llama longrope": (
        "Llama",
        {"rope_parameters": _ROPE | _LONG | {"rope_type": "longrope", "original_max_position_embeddings": 8}},
    ),
    "llama linear": ("Llama", {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("Mistral", {"rope_parameters": _ROPE, "sliding_window": 6}),
}


class Folder:
    """A checkpoint that is being changed."""

    def __init__(self, path: Path, base: str, tied: bool, rng: np.random.Generator) -> None:
        self.path, self.base, self.tied, self.rng = path, base, tied, rng

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def configure(self, change: Callable[[dict[str, Any]], Any]) -> None:
        file = self.path / "config.json"
        raw = json.loads(file.read_text(encoding="utf-8"))
        change(raw)
        file.write_text(json.dumps(raw), encoding="utf-8")

    @property
    def index(self) -> Path:
        return self.path / "model.safetensors.index.json"

    def files(self) -> list[Path]:
        if not self.index.exists():
            return [self.path / "model.safetensors"]
        return [self.path / name for name in sorted(set(json.loads(self.index.read_text())["weight_map"].values()))]

    def rewrite(self, change: Callable[[str, np.ndarray], dict[str, np.ndarray]]) -> None:
        """Replaces each tensor by what `change` gives for its name and value."""
        places = {}
        for file in self.files():
            tensors: dict[str, np.ndarray] = {}
            for name, tensor in safetensors.numpy.load_file(file).items():
                tensors |= {new: np.ascontiguousarray(value) for new, value in change(name, tensor).items()}
            safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file.name)
        if self.index.exists():
            self.index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        self.rewrite(
            lambda name, tensor: {name: tensor} | (tensors if name.endswith("layers.1.mlp.down_proj.weight") else {})
        )

    def shard(self, parts: int = 3) -> None:
        """Into several files with an index, if it is one."""
        if self.index.exists():
            return
        tensors = safetensors.numpy.load_file(self.path / "model.safetensors")
        (self.path / "model.safetensors").unlink()
        places = {}
        for i in range(parts):
            file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
            part = dict(list(tensors.items())[i::parts])
            safetensors.numpy.save_file(part, self.path / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        self.index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


# What is loaded.


def inert_keys(folder: Folder) -> None:
    options = {
        "unsloth_version": "2024.9",
        "unsloth_fixed": True,
        "_attn_implementation_autoset": True,
        "pretraining_tp": 1,
        "temperature": 0.7,
        "max_length": 20,
        "is_decoder": False,
        "gradient_checkpointing": False,
        "use_bfloat16": True,
        "is_llama_config": True,
        "transformers.js_config": {"dtype": "q4"},
        "embd_pdrop": 0.1,
        "_flash_attn_2_enabled": True,
        "layer_types": ["sliding_attention" if "sliding_window" in BASES[folder.base][1] else "full_attention"]
        * LAYERS,
    }
    chosen = {key: value for key, value in options.items() if folder.pick(True, False)}
    folder.configure(lambda raw: raw.update(chosen))


def nulls(folder: Folder) -> None:
    options = ["logit_softcap", "quantization_config", "pad_token_id", "bos_token_id", "head_dim"]
    chosen = {key: None for key in options if folder.pick(True, False)}
    folder.configure(lambda raw: raw.update(chosen))


def defaults_left_out(folder: Folder) -> None:
    """All keys of the reference's class that have their default, and the rotary base, 10000."""

    def change(raw: dict[str, Any]) -> None:
        import transformers

        defaults = getattr(transformers, f"{BASES[folder.base][0]}Config")()
        for key in [*raw]:
            if key not in ("model_type", "architectures", "rope_parameters") and raw[key] == getattr(
                defaults, key, ...
            ):
                del raw[key]
        for rope in (raw, raw.get("rope_parameters") or {}):
            rope.pop("rope_theta", None)

    folder.configure(change)


def full_dump(folder: Folder) -> None:
    def change(raw: dict[str, Any]) -> None:
        import transformers

        raw |= getattr(transformers, f"{BASES[folder.base][0]}Config").from_dict(raw).to_dict()

    folder.configure(change)


def version_4(folder: Folder) -> None:
    def change(raw: dict[str, Any]) -> None:
        if (rope := raw.pop("rope_parameters", None)) is None:
            return
        raw["torch_dtype"] = raw.pop("dtype", "float32")
        raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
        if (share := rope.pop("partial_rotary_factor", None)) is not None and folder.base.startswith("phi3"):
            raw["partial_rotary_factor"] = share
        kind = rope.pop("rope_type", "default")
        if kind == "longrope" and folder.base.startswith("phi3"):
            rope.pop("original_max_position_embeddings", None)
            kind = folder.pick("longrope", "yarn")
        raw["rope_scaling"] = None if kind == "default" else {folder.pick("type", "rope_type"): kind, **rope}

    folder.configure(change)


def dropout(folder: Folder) -> None:
    folder.configure(lambda raw: raw.update(attention_dropout=0.1))


def head_stored_too(folder: Folder) -> None:
    if folder.tied:
        folder.rewrite(
            lambda name, tensor: {name: tensor} | ({"lm_head.weight": tensor} if "embed_tokens" in name else {})
        )


def another_head_stored_too(folder: Folder) -> None:
    if folder.tied:
        folder.rewrite(
            lambda name, tensor: {name: tensor} | ({"lm_head.weight": tensor[::-1]} if "embed_tokens" in name else {})
        )


def only_the_head_stored(folder: Folder) -> None:
    if folder.tied:
        folder.rewrite(lambda name, tensor: {"lm_head.weight" if "embed_tokens" in name else name: tensor})


def buffers(folder: Folder) -> None:
    attention = f"model.layers.{folder.pick(0, 1)}.self_attn.rotary_emb"
    kind = folder.pick(np.float32, np.float64)
    folder.add({f"{attention}.inv_freq": np.ones(4, kind), "model.position_ids": np.arange(9)[None]})


def empty_tensors(folder: Folder) -> None:
    folder.add({"model.layers.0.self_attn.extra.bias": np.zeros(0, np.float32)})


def doubles(folder: Folder) -> None:
    folder.rewrite(lambda name, tensor: {name: tensor.astype(np.float64)})


def mixed_dtypes(folder: Folder) -> None:
    kinds = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
    folder.rewrite(lambda name, tensor: {name: tensor.astype(folder.pick(*kinds))})


def without_prefix(folder: Folder) -> None:
    folder.rewrite(lambda name, tensor: {name.removeprefix("model."): tensor})


def prefix_twice(folder: Folder) -> None:
    folder.rewrite(lambda name, tensor: {f"model.{name}": tensor})


def copies_in_two_shards(folder: Folder) -> None:
    folder.shard()
    first, second, *_ = folder.files()
    one, other = (safetensors.numpy.load_file(file) for file in (first, second))
    safetensors.numpy.save_file(other | dict(list(one.items())[:2]), second)


def one_file_beside_an_index(folder: Folder) -> None:
    """The index names shards of other values, or shards that are not there."""
    if folder.index.exists():
        return
    tensors = safetensors.numpy.load_file(folder.path / "model.safetensors")
    file = "model-00001-of-00001.safetensors"
    if folder.pick(True, False):
        safetensors.numpy.save_file({name: tensor[::-1].copy() for name, tensor in tensors.items()}, folder.path / file)
    folder.index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))
    shutil.copy(folder.path / "model.safetensors", folder.path / "kept")


def index_of_wrong_places(folder: Folder) -> None:
    folder.shard()
    places = json.loads(folder.index.read_text())["weight_map"]
    names, files = list(places), list(places.values())
    places = dict(zip(names, files[1:] + files[:1], strict=True)) | {"not.there": files[0]}
    del places[names[3]]
    folder.index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shards_of_other_names(folder: Folder) -> None:
    folder.shard()
    places = json.loads(folder.index.read_text())["weight_map"]
    new = {file.name: f"part_{i}.safetensors" for i, file in enumerate(folder.files())}
    for old, name in new.items():
        (folder.path / old).rename(folder.path / name)
    folder.index.write_text(
        json.dumps({"metadata": {}, "weight_map": {tensor: new[file] for tensor, file in places.items()}})
    )


def stray_files(folder: Folder) -> None:
    norm = {"model.norm.weight": np.zeros(32, np.float32)}
    safetensors.numpy.save_file(norm, folder.path / "consolidated.safetensors")
    safetensors.numpy.save_file(norm, folder.path / "model-00007-of-00007.safetensors")
    (folder.path / "pytorch_model.bin").write_bytes(b"pickle")
    (folder.path / "modeling_phi3.py").write_text("raise SystemExit('executed')")


def tokenizer_files(folder: Folder) -> None:
    """Flags without a vocabulary."""
    flags = {"add_bos_token": folder.pick(True, False, None), "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    (folder.path / "tokenizer_config.json").write_text(json.dumps(flags))
    (folder.path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder.path / "added_tokens.json").write_text(json.dumps({"<|end|>": 60}))
    (folder.path / "chat_template.jinja").write_text("{{ messages }}")


def generation_file(folder: Folder) -> None:
    content = folder.pick({"eos_token_id": [2, 5], "temperature": 0.7}, {"_from_model_config": True}, {})
    (folder.path / "generation_config.json").write_text(json.dumps(content))


LOADED = [
    inert_keys, nulls, defaults_left_out, full_dump, version_4, dropout, head_stored_too, another_head_stored_too,
    only_the_head_stored, buffers, empty_tensors, doubles, mixed_dtypes, without_prefix, prefix_twice,
    copies_in_two_shards, one_file_beside_an_index, index_of_wrong_places, shards_of_other_names, stray_files,
    tokenizer_files, generation_file,
]  # fmt: skip
# They choose files, so that what comes after them would change others; at most one of a draw, and last.
OF_FILES = {copies_in_two_shards, one_file_beside_an_index, index_of_wrong_places, shards_of_other_names}
OF_NAMES = {without_prefix, prefix_twice}
OF_HEADS = {head_stored_too, another_head_stored_too, only_the_head_stored}


# What is refused: the kind of fault, and words of the message.


def _bin_only(folder: Folder) -> None:
    folder.rewrite(lambda name, tensor: {name: tensor})
    for file in [*folder.files(), folder.index]:
        file.unlink(missing_ok=True)
    (folder.path / "pytorch_model.bin").write_bytes(b"pickle")


def _no_index(folder: Folder) -> None:
    folder.shard()
    folder.index.unlink()


def _other_copies(folder: Folder) -> None:
    folder.shard()
    first, second, *_ = folder.files()
    name, tensor = next(iter(safetensors.numpy.load_file(first).items()))
    other = safetensors.numpy.load_file(second)
    safetensors.numpy.save_file(other | {name: tensor + tensor.dtype.type(1)}, second)


def _cut(folder: Folder) -> None:
    file = folder.files()[0]
    file.write_bytes(file.read_bytes()[:-7])


def _other_form(folder: Folder) -> None:
    unfused = not folder.base.startswith("phi3")
    name = f"model.layers.0.mlp.{'gate_up' if unfused else 'up'}_proj.weight"
    folder.add({name: np.ones((96 if unfused else 48, 32), np.float32)})


def _integers(folder: Folder) -> None:
    folder.rewrite(lambda name, tensor: {name: tensor.astype(np.int8) if "o_proj" in name else tensor})


REFUSED: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "a key that changes numbers": (
        lambda f: f.configure(lambda raw: raw.update({f.pick("logit_softcap", "attn_logit_softcapping"): 30.0})),
        r"unsupported keys \['\w+softcap",
    ),
    "another architecture": (
        lambda f: f.configure(lambda raw: raw.update(model_type=f.pick("qwen2", "phimoe", "mixtral"))),
        "model_type is '.*only these can be loaded: phi3, llama, mistral",
    ),
    "biases": (
        lambda f: f.configure(lambda raw: raw.update({f.pick("attention_bias", "mlp_bias"): True})),
        "_bias=True is not supported",
    ),
    "another activation": (lambda f: f.configure(lambda raw: raw.update(hidden_act="gelu")), "hidden_act='gelu'"),
    "another rotary scaling": (
        lambda f: f.configure(lambda raw: raw.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0})),
        r"rope type \['dynamic'\] is not supported",
    ),
    "a nested configuration": (
        lambda f: f.configure(lambda raw: raw.update(text_config={"hidden_size": 32})),
        r"unsupported keys \['text_config'\]",
    ),
    "weights that others quantised": (
        lambda f: f.configure(lambda raw: raw.update(quantization_config={"quant_method": f.pick("awq", "fp8")})),
        r"quantised by '\w+' cannot be read; load the checkpoint",
    ),
    "sizes that contradict": (
        lambda f: f.configure(lambda raw: raw.update(intermediate_size=52)),
        "do not fit the configuration.*wrong shapes",
    ),
    "a tensor that is not the model's": (
        lambda f: f.add({"model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)}),
        "unknown tensors: .*q_norm",
    ),
    "a tensor that is missing": (
        lambda f: f.rewrite(lambda name, tensor: {} if name.endswith("1.mlp.down_proj.weight") else {name: tensor}),
        "missing tensors: .*down_proj",
    ),
    "fused and unfused": (_other_form, "is one matrix, but .*_proj.weight and others are parts of one"),
    "a wrapper's names": (
        lambda f: f.rewrite(lambda name, tensor: {f"{f.pick('module', '_orig_mod')}.{name}": tensor}),
        "was saved from within .* instead, for plain names",
    ),
    "integers": (_integers, r"has dtype I8, but only .* take the unquantised checkpoint"),
    "different copies": (_other_copies, "hold different tensors"),
    "a file that was cut": (_cut, "damaged or incomplete"),
    "pickled weights": (_bin_only, "pytorch_model.bin is pickled weights"),
    "shards without an index": (_no_index, "is shards without their"),
    "no configuration": (lambda f: (f.path / "config.json").unlink(), "there is no config.json"),
}  # fmt: skip
