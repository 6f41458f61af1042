"""Random tokenizer folders with tiny vocabularies: kinds of vocabulary, flags of added tokens, settings beside them."""

import random
from typing import Any

from vocabularies import byte_level_spec

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = ["<s>", "</s>", "<|end|>", "<|user|>", "<|tool_call|>", "<think>", "[PAD]", "word", "new one", "<|x|>"]
_CLASSES = ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer", "TokenizersBackend"]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}


def random_folder(rng: random.Random) -> dict[str, Any]:
    """The contents of the files of a Phi-3 folder's tokenizer, by name."""
    spec = rng.choice([_byte_level, _pieces])(rng)
    vocab = spec["model"]["vocab"]
    names = rng.sample(NAMES, rng.randrange(2, 8))
    inside, beside = names[: rng.randrange(1, len(names) + 1)], []
    spec["added_tokens"] = []
    for name in inside:
        token_id = vocab.get(name, len(vocab) + sum(e["id"] >= len(vocab) for e in spec["added_tokens"]))
        spec["added_tokens"].append({"id": token_id, **_entry(rng, name, vocab)})
    spec["post_processor"] = _post_processor(rng, [entry["content"] for entry in spec["added_tokens"]], spec)
    config: dict[str, Any] = {
        "tokenizer_class": rng.choice(_CLASSES),
        "clean_up_tokenization_spaces": rng.random() < 0.5,
        "add_bos_token": rng.random() < 0.5,
        "add_prefix_space": rng.random() < 0.5,
        "legacy": rng.random() < 0.5,
    }
    files = {"tokenizer.json": spec, "tokenizer_config.json": config, "config.json": {"model_type": "phi3"}}
    config |= {key: rng.choice(inside) for key in ("bos_token", "eos_token") if rng.random() < 0.7}
    if rng.random() < 0.3:
        config["pad_token"] = "[PAD]"  # new, if it is not among the names
    if rng.random() < 0.3:
        config[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = rng.sample(NAMES, 2)
    elif rng.random() < 0.3:
        config["extra_special_tokens"] = {"image_token": "<image>"}
    beside = [
        _entry(rng, name, vocab) for name in (inside if rng.random() < 0.5 else inside[:1]) + names[len(inside) :]
    ]
    known = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    for entry in beside:
        known.setdefault(entry["content"], max(len(vocab), max(known.values()) + 1))
    layout = rng.randrange(3)
    if layout == 0:
        config["added_tokens_decoder"] = {str(known[e["content"]]): e for e in beside}
    elif layout == 1:
        files["added_tokens.json"] = {e["content"]: known[e["content"]] for e in beside}
        files["special_tokens_map.json"] = {"eos_token": _entry(rng, inside[0], vocab), "bos_token": inside[-1]}
    return files


def random_text(rng: random.Random) -> str:
    """Words, spaces, special tokens, emoji and odd characters, in any order."""
    odd = ["é", "e\u0301", "漢字", "🙂", "👩‍🚀", "\u00a0", "\x00", "▁", "<0x0A>", "image", "<image>", "13", "the cat"]
    kinds = [NAMES, [" ", "  ", "\n", "\t", " \n "], odd, list("abct the.")]
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(14)))


def _entry(rng: random.Random, content: str, vocab: dict[str, int]) -> dict[str, Any]:
    flags = {name: rng.random() < 0.25 for name in ("lstrip", "rstrip", "single_word")}
    # Beside a letter, where it does not match, the reference's merges could spell such a token; ours never do.
    flags["single_word"] &= content not in vocab
    return {"content": content, **flags, "normalized": rng.random() < 0.4, "special": rng.random() < 0.6}


def _byte_level(rng: random.Random) -> dict[str, Any]:
    spec = byte_level_spec(*rng.sample(["</s>", "<|x|>", "word"], rng.randrange(3)))
    byte_level = {"type": "ByteLevel", "add_prefix_space": rng.random() < 0.3, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": rng.choice(["Isolated", "Removed"])}
    steps = [
        [{**byte_level, "use_regex": rng.random() < 0.7}],
        [{**split, "invert": split["behavior"] == "Removed"}, {**byte_level, "use_regex": False}],
        [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}],
    ]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rng.choice(steps)}
    spec["normalizer"] = rng.choice([None, None, {"type": "NFC"}])
    spec["model"]["ignore_merges"] = rng.random() < 0.3
    return spec


def _pieces(rng: random.Random) -> dict[str, Any]:
    """As sentencepiece's: `▁` for a space, byte tokens or an unknown token."""
    merges = [["t", "h"], ["th", "e"], ["▁", "the"], ["▁", "▁"], ["c", "a"], ["▁", "<"], ["▁", "w"]]
    letters = [chr(c) for c in range(33, 127)] + ["▁", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *(a + b for a, b in merges)]
    spec = byte_level_spec()
    spec["model"] = {
        "type": "BPE",
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": merges if rng.random() < 0.5 else [" ".join(merge) for merge in merges],
        "unk_token": "<unk>",
        "fuse_unk": rng.random() < 0.5,
        "byte_fallback": rng.random() < 0.7,
    }
    scheme = {"prepend_scheme": rng.choice(["always", "first", "never"]), "split": rng.random() < 0.5}
    metaspace = {"type": "Metaspace", "replacement": "▁", **scheme}
    both = {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
    spec["normalizer"], spec["pre_tokenizer"] = rng.choice([(both, None), (_REPLACE, None), (None, metaspace)])
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders = [[*steps, strip], steps, [metaspace], [back, {"type": "Fuse"}, strip], [back]]
    spec["decoder"] = {"type": "Sequence", "decoders": rng.choice(decoders)}
    return spec


def _post_processor(rng: random.Random, names: list[str], spec: dict[str, Any]) -> dict[str, Any] | None:
    ids = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    first, last = rng.choice(names), rng.choice(names)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    opening, closing = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (first, last))
    known = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {first, last}}
    template = {
        "type": "TemplateProcessing",
        "single": rng.choice([[opening, text], [opening, text, closing], [text, closing], [opening, opening, text]]),
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": known,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    roberta = {"type": "RobertaProcessing", "sep": [last, ids[last]], "cls": [first, ids[first]]}
    return rng.choice(
        [
            None,
            byte_level,
            template,
            template,
            {"type": "Sequence", "processors": [byte_level, template]},
            {**roberta, "trim_offsets": True, "add_prefix_space": False},
        ]
    )
