import ast
import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.config import LongRope, Phi3Config
from phi3_jax.config_keys import FIXED_KEYS
from phi3_jax.model.rope import attention_factor

SOURCE = Path(phi3_jax.__file__).parent

V4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 113,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2], "long_factor": [2.0, 3.0, 5.0]},
    "sliding_window": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "eos_token_id": [5, 7],
    "pad_token_id": 11,
    "torch_dtype": "bfloat16",
}


def v5() -> dict:
    raw = {k: v for k, v in V4.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    rope |= {"original_max_position_embeddings": 16}
    return raw | {"rope_parameters": rope | {k: v for k, v in V4["rope_scaling"].items() if k != "type"}}


def test_reads_every_value():
    assert Phi3Config.from_hf(V4) == Phi3Config(
        vocab_size=113,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=12,
        max_position_embeddings=64,
        rope_theta=500.0,
        rms_norm_eps=1e-6,
        partial_rotary_factor=0.5,
        long_rope=LongRope((1.0, 1.5, 2), (2.0, 3.0, 5.0), 16),
        bos_token_id=1,  # the default of transformers' class
        eos_token_id=(5, 7),
        pad_token_id=11,
    )


@pytest.mark.parametrize("name", ["su", "longrope", "yarn"])
def test_both_layouts_and_all_names_of_longrope_are_the_same(name):
    expected = Phi3Config.from_hf(V4)
    old, new = copy.deepcopy(V4), v5()
    old["rope_scaling"]["type"] = name
    new["rope_parameters"]["rope_type"] = name
    assert Phi3Config.from_hf(old) == expected
    assert Phi3Config.from_hf(new) == expected


def test_the_original_length_at_the_top_level_wins():
    raw = v5()
    raw["rope_parameters"]["original_max_position_embeddings"] = 32
    assert Phi3Config.from_hf(raw).long_rope.original_max_position_embeddings == 16
    del raw["original_max_position_embeddings"]
    with pytest.warns(UserWarning, match=r"=32 stands among the rope parameters only, .*it would take 4096"):
        assert Phi3Config.from_hf(raw).long_rope.original_max_position_embeddings == 32
    del raw["rope_parameters"]["original_max_position_embeddings"]
    assert Phi3Config.from_hf(raw).long_rope.original_max_position_embeddings == 4096  # the class's default


@pytest.mark.parametrize(
    "extra",
    [
        {"unsloth_version": "2024.9", "unsloth_fixed": True, "_attn_implementation_autoset": True, "pretraining_tp": 1},
        {
            "temperature": 0.7,
            "max_length": 20,
            "is_decoder": False,
            "pruned_heads": {},
            "num_beams": 1,
            "sep_token_id": None,
        },
        {"quantization_config": None, "logit_softcap": None, "mlp_bias": None, "hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 2},
        {"max_sequence_length": 2048, "neftune_noise_alpha": 5.0, "name_or_path": "x", "bos_token": "<s>"},
        {"_flash_attn_2_enabled": True, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},
    ],
)
def test_bookkeeping_and_nulls_change_nothing(extra):
    assert Phi3Config.from_hf(V4 | extra) == Phi3Config.from_hf(V4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"resid_pdrop": 0.1}, r"resid_pdrop=0\.1 is not applied when training here"),
        ({"attention_dropout": 0.25}, r"attention_dropout=0\.25 is not applied when training here"),
    ],
)
def test_dropout_changes_no_logit_but_is_named(extra, message):
    with pytest.warns(UserWarning, match=message):
        assert Phi3Config.from_hf(V4 | extra) == Phi3Config.from_hf(V4)


def test_ids_that_are_no_tokens_are_none():
    for key, value in (("bos_token_id", -1), ("bos_token_id", V4["vocab_size"]), ("pad_token_id", -1)):
        with pytest.warns(UserWarning, match=f"{key}={value} is no token of the vocabulary: taken as none"):
            assert getattr(Phi3Config.from_hf(V4 | {key: value}), key) is None
    assert Phi3Config.from_hf(V4 | {"initializer_range": 0.0}).initializer_range == 0
    with pytest.raises(ValueError, match="quantised by 'MLX or another program' cannot be read"):
        Phi3Config.from_hf(V4 | {"quantization": {"group_size": 64, "bits": 4}})


def test_absent_keys_have_the_defaults_of_their_class():
    """The values of transformers 5.23's Phi3Config(), LlamaConfig() and MistralConfig(), written down here."""
    phi3 = Phi3Config(32064, 3072, 8192, 32, 32, 32, 96, 4096, 10000.0, 1e-5, bos_token_id=1, eos_token_id=(32000,))
    assert Phi3Config.from_hf({"model_type": "phi3"}) == dataclasses.replace(phi3, pad_token_id=32000)
    llama = Phi3Config(32000, 4096, 11008, 32, 32, 32, 128, 2048, 10000.0, 1e-6, bos_token_id=1, eos_token_id=(2,))
    assert Phi3Config.from_hf({"model_type": "llama"}) == llama
    mistral = dataclasses.replace(llama, intermediate_size=14336, num_key_value_heads=8, sliding_window=4096)
    assert Phi3Config.from_hf({"model_type": "mistral"}) == dataclasses.replace(mistral, max_position_embeddings=131072)
    null = {"num_key_value_heads": None, "sliding_window": None, "head_dim": None, "eos_token_id": None}
    assert Phi3Config.from_hf({"model_type": "mistral", "hidden_size": 2048} | null) == dataclasses.replace(
        mistral,
        hidden_size=2048,
        head_dim=64,
        num_key_value_heads=32,
        max_position_embeddings=131072,
        sliding_window=None,
        eos_token_id=(),
    )
    small = Phi3Config.from_hf({"model_type": "phi3", "vocab_size": 97})
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id) == (1, (), None)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 113,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
SMOLLM2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "pretraining_tp": 1}


def test_llamas_scalings_are_divisors_of_the_frequencies():
    """Against the published formula of Llama 3.1, one frequency at a time."""
    plain = Phi3Config.from_hf(LLAMA | SMOLLM2)
    assert plain.long_rope is None
    linear = Phi3Config.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear == dataclasses.replace(plain, long_rope=LongRope((4.0,) * 6, (4.0,) * 6, 64, None, 1.0))
    assert attention_factor(linear) == 1
    assert Phi3Config.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 1}}) == plain
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    got = Phi3Config.from_hf(LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0} | scaling})
    expected = []
    for i in range(6):
        wavelength = 2 * math.pi * 100.0 ** (2 * i / 12)
        if wavelength < 32 / 4:
            expected.append(1.0)
        elif wavelength > 32 / 1:
            expected.append(8.0)
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert {1.0, 8.0} < set(expected)
    assert got.long_rope.short_factor == got.long_rope.long_factor == pytest.approx(tuple(expected))
    assert Phi3Config.from_hf(got.to_hf()) == got


def test_a_llama_has_no_window_and_a_mistral_has():
    assert (
        Phi3Config.from_hf(
            LLAMA | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 9}
        ).sliding_window
        == 9
    )
    with pytest.warns(UserWarning, match="sliding_window=9 is left out, as in transformers"):
        assert Phi3Config.from_hf(LLAMA | {"sliding_window": 9}) == Phi3Config.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"\['dynamic'\] is not supported; known for llama are"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"\['yarn'\] is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' needs a positive factor, .* not \{'factor': None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"'llama3' needs a positive factor, .*'low_freq_factor': None",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "head_dim": 10**9}, "more than any model has"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not defined for model_type 'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"text_config": {"hidden_size": 36}}, r"unsupported keys \['text_config'\]"),
    ],
)
def test_a_llama_of_another_graph_is_refused_by_name(extra, message):
    with pytest.raises(ValueError, match=message):
        Phi3Config.from_hf(LLAMA | extra)


@pytest.mark.parametrize("window", [None, 9])
def test_round_trip_as_llama_or_mistral(window):
    config = dataclasses.replace(Phi3Config.from_hf(LLAMA), sliding_window=window, pad_token_id=5)
    raw = config.to_hf("llama")
    assert raw["architectures"] == ["LlamaForCausalLM" if window is None else "MistralForCausalLM"]
    assert raw.keys().isdisjoint({"partial_rotary_factor", "original_max_position_embeddings"})
    assert Phi3Config.from_hf(raw) == config
    with pytest.raises(
        ValueError, match=r"does not compute this model: it rotates 6 of 12 .*; it has factors for its rotary"
    ):
        Phi3Config.from_hf(V4).to_hf("llama")


@pytest.mark.parametrize("name", phi3_jax.PRESETS)
def test_round_trip(name):
    config = dataclasses.replace(phi3_jax.PRESETS[name], eos_token_id=(7,), bos_token_id=1)
    assert Phi3Config.from_hf(config.to_hf()) == config


def test_round_trip_with_all_options():
    config = Phi3Config.from_hf(V4)
    config = dataclasses.replace(config, long_rope=LongRope((1.0,) * 3, (2.0,) * 3, 16, 2.0, 1.25), sliding_window=5)
    assert Phi3Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("original", "maximum", "factor", "expected"),
    [
        (4096, 131072, None, 1.1902380714),
        (16, 64, None, 1.2247448714),
        (16, 64, 2.0, 1.1180339887),
        (64, 64, None, 1.0),
    ],
)
def test_attention_factor(original, maximum, factor, expected):
    config = dataclasses.replace(
        Phi3Config.from_hf(V4),
        max_position_embeddings=maximum,
        long_rope=LongRope((1.0,) * 3, (2.0,) * 3, original, factor),
    )
    assert attention_factor(config) == pytest.approx(expected, abs=1e-10)


def with_rope(**changes) -> dict:
    raw = copy.deepcopy(V4)
    raw["rope_scaling"] |= changes
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (V4 | {"logit_softcap": 30.0}, r"unsupported keys \['logit_softcap'\]"),
        (V4 | {"quantization_config": {}}, "quantization_config"),
        (
            V4 | {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "by 'awq' cannot be read; load the checkpoint",
        ),
        (V4 | {"quantization_config": {"quant_method": "bitsandbytes"}}, "by 'bitsandbytes' .* quantise it here"),
        (V4 | {"logit_scale": None, "attn_logit_softcapping": 50.0}, r"unsupported keys \['attn_logit_softcapping'\]"),
        (V4 | {"model_type": "mixtral"}, "model_type is 'mixtral', but only these can be loaded: phi3, llama, mistral"),
        (V4 | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (V4 | {"attention_bias": True}, "attention_bias=True"),
        (V4 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        (V4 | {"hidden_size": None}, "hidden_size=None cannot be split"),
        (with_rope(type="llama3"), r"rope type \['llama3'\] is not supported"),
        (with_rope(rope_type="linear"), "is not supported"),
        (with_rope(short_factor=[1.0]), "short_factor must list rotary_dim/2 = 3 numbers, not 1"),
        (with_rope(long_factor=[1.0] * 4), "long_factor must list rotary_dim/2 = 3 numbers, not 4"),
        (with_rope(long_factor=[1.0, 2.0, -1.0]), "long_factor must hold positive numbers"),
        (with_rope(beta_fast=32), r"unsupported rope keys \['beta_fast'\]"),
        (with_rope(rope_theta=1.0), "rope_theta is 500.0 at the top level but 1.0"),
        (V4 | {"num_attention_heads": 3, "num_key_value_heads": 2}, "not a multiple"),
        (V4 | {"num_attention_heads": 37}, "hidden_size=36 cannot be split into num_attention_heads=37"),
        (V4 | {"partial_rotary_factor": 0.25}, "gives 3 rotated dimensions"),
        (V4 | {"partial_rotary_factor": 1.1}, "gives 13 rotated dimensions"),
        (V4 | {"vocab_size": "113"}, r"vocab_size must be a positive integer below 2\*\*31, not '113'"),
        (V4 | {"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer"),
        (V4 | {"pad_token_id": 113}, "pad_token_id=113 is not an id below vocab_size=113"),
        (V4 | {"rope_scaling": None, "rope_parameters": {"short_factor": [1.0]}}, "unsupported rope keys"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(raw, message):
    with pytest.raises(ValueError, match=rf"my/config\.json: .*{message}"):
        Phi3Config.from_hf(raw, "my/config.json")


def test_every_field_is_read_outside_of_this_file():
    """An option that nothing reads would be dropped silently: the numbers would be wrong and nobody would know."""
    readers = [p for folder in (SOURCE, SOURCE.parent / "infer") for p in folder.rglob("*.py") if p.name != "config.py"]
    read = {
        node.attr
        for path in readers
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Values that a checkpoint carries on and that only the round trip reads, by name.
    carried = set(re.findall(r'"(\w+_token_id)"', (SOURCE / "checkpoint" / "load_save.py").read_text()))
    for kind in (Phi3Config, LongRope):
        fields = {field.name for field in dataclasses.fields(kind)} - {"partial_rotary_factor"}
        assert fields - read - carried == set()
    assert "rotary_dim" in read  # which is head_dim x partial_rotary_factor


def test_fixed_keys_accept_their_one_value():
    raw = V4 | {key: allowed[0] for key, allowed in FIXED_KEYS.items()}
    assert Phi3Config.from_hf(raw) == Phi3Config.from_hf(V4)
