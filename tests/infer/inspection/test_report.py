"""Every number of a report against a slow NumPy decoder, written down from the papers alone; and the schema."""

import base64
import dataclasses
import json
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.adapters import LoraConfig, attach, init_adapter
from phi3_jax.infer import inspection
from phi3_jax.infer.engine.buckets import own_cache_dtype
from phi3_jax.infer.inspection import readings
from phi3_jax.infer.inspection.report import require_size, sampling_defaults
from phi3_jax.infer.inspection.texts import add_vocabulary
from phi3_jax.kernels import why_unavailable

IDS = [5, 96, 17, 3, 41, 5, 96, 60, 0, 88, 17, 17, 23, 71, 9, 34, 52, 41, 5, 96, 2, 77, 13]  # behind the window of 19
T, TOP = len(IDS), 3


def decoder(config, params, ids):
    """Values of each place in float64: a dict of arrays, those of layers with L in front."""
    c, p = config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    N, K, H, F = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    places, T = np.arange(len(ids)), len(ids)
    factors = c.long_rope.long_factor if len(ids) > c.long_rope.original_max_position_embeddings else None
    wave = np.asarray(factors or c.long_rope.short_factor) * c.rope_theta ** (np.arange(0, H, 2) / H)
    grow = np.sqrt(1 + np.log(c.max_position_embeddings / 16) / np.log(16))
    angles = places[:, None] / wave
    cos, sin = np.cos(angles)[:, None] * grow, np.sin(angles)[:, None] * grow
    seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - c.sliding_window)

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * weight

    def turn(x):
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = p["embed_tokens"]["weight"][ids]
    out = {name: [] for name in ("pattern", "head", "attention", "mid", "mlp", "post")} | {"embed": x}
    for layer in range(c.num_hidden_layers):
        own = jax.tree.map(operator.itemgetter(layer), p["layers"])
        qkv = (norm(x, own["input_layernorm"]["weight"]) @ own["self_attn"]["qkv_proj"]["weight"].T).reshape(T, -1, H)
        q, k, v = turn(qkv[:, :N]), turn(qkv[:, N : N + K]), qkv[:, N + K :]
        pattern = np.zeros((N, T, T))
        heads = np.zeros((N, T, c.hidden_size))
        for n in range(N):
            scores = np.where(seen, q[:, n] @ k[:, n // (N // K)].T / np.sqrt(H), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            pattern[n] = weights / weights.sum(-1, keepdims=True)
            o_proj = own["self_attn"]["o_proj"]["weight"][:, n * H : (n + 1) * H]
            heads[n] = pattern[n] @ v[:, n // (N // K)] @ o_proj.T
        mid = x + heads.sum(0)
        gate_up = norm(mid, own["post_attention_layernorm"]["weight"]) @ own["mlp"]["gate_up_proj"]["weight"].T
        mlp = (gate_up[:, F:] * gate_up[:, :F] / (1 + np.exp(-gate_up[:, :F]))) @ own["mlp"]["down_proj"]["weight"].T
        x = mid + mlp
        for name, value in zip(out, (pattern, heads, heads.sum(0), mid, mlp, x), strict=False):
            out[name].append(value)
    out = {name: np.asarray(value) for name, value in out.items()}
    head = p["lm_head"]["weight"]
    return out | {
        "logits": norm(x, p["norm"]["weight"]) @ head.T,
        "say": lambda x: norm(x, p["norm"]["weight"]) @ head.T,
    }


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def close(found, wanted, tolerance=2e-4):
    """Equal within rounding to five digits and float32."""
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, tolerance, tolerance)


@pytest.fixture(scope="module")
def report(tiny):
    jax.config.update("jax_disable_most_optimizations", True)
    yield inspection.collect(tiny, IDS, "the prompt", name="tiny")
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def seen(tiny):
    return decoder(tiny.config, tiny.params, IDS)


def test_the_residual_stream_and_attention(report, seen):
    for name in ("embed", "attention", "mid", "mlp", "post"):
        close(report["residual"][name], np.linalg.norm(seen[name], axis=-1))
    for layer, rows in enumerate(report["attention"]["thousandths"]):
        for head, places in enumerate(rows):
            for t, weights in enumerate(places):
                assert len(weights) == t + 1
                assert np.abs(np.asarray(weights) - 1000 * seen["pattern"][layer, head, t, : t + 1]).max() <= 0.51
                assert not any(weights[: max(0, t + 1 - 19)])  # the window
    rolled = np.eye(T)
    for weights in seen["pattern"]:
        rolled = (weights.mean(0) + np.eye(T)) / 2 @ rolled
    close(report["rollout"], rolled[-1])


def test_what_each_layer_would_say(report, seen):
    for name in ("mid", "post"):
        said = softmax(seen["say"](seen[name]))
        for layer in range(3):
            for t, pairs in enumerate(report["lens"][name][layer]):
                assert [pair[0] for pair in pairs] == np.argsort(-said[layer, t])[:TOP].tolist()
                close([pair[1] for pair in pairs], np.sort(said[layer, t])[::-1][:TOP])
    last = [[token, probability] for token, _, probability in report["next"]["top"][:TOP]]
    assert [pair[0] for pair in last] == [pair[0] for pair in report["lens"]["post"][-1][-1]]
    close([pair[1] for pair in last], [pair[1] for pair in report["lens"]["post"][-1][-1]])


def test_the_next_token(report, seen):
    logits = seen["logits"][-1]
    close(np.frombuffer(base64.b64decode(report["next"]["logits"]), "<f4"), logits)
    order = np.argsort(-logits)[:20]
    assert [entry[0] for entry in report["next"]["top"]] == order.tolist()
    close([entry[1:] for entry in report["next"]["top"]], np.stack([logits[order], softmax(logits)[order]], 1))
    logs = np.log(softmax(seen["logits"]))
    assert report["surprise"][0] is None
    close(report["surprise"][1:], [-logs[t, IDS[t + 1]] for t in range(T - 1)])
    close(report["entropy"], -(np.exp(logs) * logs).sum(-1))


def test_the_parts_of_the_logit(tiny, report, seen):
    found, token = report["attribution"], int(seen["logits"][-1].argmax())
    stream = seen["post"][-1, -1]
    scale = np.sqrt((stream * stream).mean() + tiny.config.rms_norm_eps)
    direction = np.asarray(tiny.params["lm_head"]["weight"], np.float64)[token] / scale  # the norm's weights are 1
    assert found["id"] == token
    close(found["logit"], seen["logits"][-1, token])
    close(found["embed"], seen["embed"][-1] @ direction)
    close(found["heads"], seen["head"][:, :, -1] @ direction)
    close(found["mlps"], seen["mlp"][:, -1] @ direction)
    whole = found["embed"] + np.sum(found["heads"]) + np.sum(found["mlps"])
    assert abs(found["rest"]) < 1e-3
    assert abs(whole - found["logit"]) < 2e-3


def test_embeddings_and_heads(tiny, report, seen):
    table = np.asarray(tiny.params["embed_tokens"]["weight"], np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    close(report["embedding"]["norms"], np.linalg.norm(table[IDS], axis=1))
    for token, pairs in zip(IDS, report["embedding"]["nearest"], strict=True):
        cosines = unit @ unit[token]
        cosines[token] = -2
        assert [pair[0] for pair in pairs] == np.argsort(-cosines)[:8].tolist()
        close([pair[1] for pair in pairs], np.sort(cosines)[::-1][:8])
    pattern, later = seen["pattern"], np.arange(1, T)
    close(report["heads"]["previous"], pattern[:, :, later, later - 1].mean(-1))
    close(report["heads"]["self"], pattern[:, :, later, later].mean(-1))
    close(report["heads"]["first"], pattern[:, :, 1:19, 0].mean(-1))  # those that see it
    logs = np.log(np.where(pattern > 0, pattern, 1))
    close(report["heads"]["entropy"], -(pattern * logs).sum(-1)[:, :, 1:].mean(-1))
    once = np.random.default_rng(0).integers(0, 97, 19)
    copied = decoder(tiny.config, tiny.params, np.tile(once, 2))["pattern"]
    scores = []
    for t in range(38):
        after = [s + 1 for s in range(t) if np.tile(once, 2)[s] == np.tile(once, 2)[t] and t - 19 < s + 1 < t]
        scores += [copied[:, :, t, after].sum(-1)] if after else []
    close(report["heads"]["induction"], np.mean(scores, axis=0))


def test_texts_and_sizes(tiny, report):
    assert report["model"]["total"] == sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    assert [token["id"] for token in report["tokens"]] == IDS
    assert report["vocabulary"]["96"] == "<96>"  # there is no tokenizer
    root = Path(phi3_jax.__file__).parent.parent
    page = (root / "infer/inspection/page/template.html").read_text(encoding="utf-8")
    named = {key for keys in re.findall(r'data-code="(.*?)"', page) for key in keys.split()}
    assert named == report["code"].keys()  # each part of the page has its code
    for place in report["code"].values():
        line = (root / place["module"]).read_text(encoding="utf-8").splitlines()[place["line"] - 1]
        name = place["name"].rsplit(".", 1)[-1]
        assert re.match(rf"\s*(@|(def|class) {name}\b)", line), place


def test_files_are_as_the_schema_says(tiny, report):
    sizes = {"T": T, "L": 3, "N": 6}
    assert problems(report, "The report", sizes) == []
    table = inspection.weigh(tiny.config, tiny.params, name="tiny", context=9, cache_dtype="float32")
    assert problems(table, "The table of parameters", sizes) == []
    json.dumps(report, allow_nan=False)
    assert problems(report | {"odd": 1}, "The report", sizes) == ["odd is not documented"]
    assert problems(report | {"rollout": [0.5] * (T - 1)}, "The report", sizes) == ["rollout: 22, not T"]
    assert problems(report | {"prompt": 5}, "The report", sizes) == ["prompt: 5 is not text"]
    assert problems({k: v for k, v in report.items() if k != "prompt"}, "The report", sizes) == ["prompt is missing"]


@pytest.mark.slow
def test_the_whole_file(tiny, int4_folder, report):
    """With a timeline and a comparison."""
    report = dict(report)
    report["generation"] = inspection.timeline(tiny, IDS, 3, 1.5, 7)
    report["comparison"] = inspection.compare(tiny, phi3_jax.load(int4_folder), IDS, "int4")
    add_vocabulary(report, None)
    assert problems(report, "The report", {"T": T, "L": 3, "N": 6}) == []
    steps = report["generation"]["greedy"] + report["generation"]["sampled"]
    named = {step["id"] for step in steps} | {pair[0] for pair in report["comparison"]["top"]}
    named |= {pair[0] for step in steps for pair in step["runners"]}
    assert {str(token) for token in named} <= report["vocabulary"].keys()
    assert report["generation"]["greedy"][0]["id"] == report["next"]["top"][0][0]
    close(report["generation"]["greedy"][0]["probability"], report["next"]["top"][0][2])


TYPES = {
    "int": int,
    "id": int,
    "text": str,
    "bool": bool,
    "number": (int, float),
    "null": type(None),
}


def problems(value, title, sizes):
    """What of a file is not as the table below `title` of SCHEMA.md has it."""
    text = (Path(inspection.__file__).parent / "SCHEMA.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S.*?) \| (.*?) \| .*\|$", text.split(f"\n## {title}\n")[1].split("\n## ")[0], re.M)
    tree = {}
    for names, kind in rows[1:]:
        for name in names.split(", "):
            node = tree
            for part in re.findall(r"[\w*]+\??|\[[^]]*\]", name):
                node = node.setdefault(part, {})
            node["is"] = kind
    return list(_problems(value, tree, "", sizes))


def _problems(value, node, where, sizes):
    if "is" in node:
        if not _fits(value, node["is"]):
            yield f"{where}: {str(value)[:40]} is not {node['is']}"
        return
    (first, *_) = node
    if first.startswith("["):
        size = first[1:-1]
        if size == "t+1":
            allowed = [int(re.findall(r"\[(\d+)\]$", where)[-1]) + 1]
        else:
            allowed = range(10**6) if not size else range(int(size) + 1) if size.isdigit() else [sizes[size]]
        if not isinstance(value, list) or len(value) not in allowed:
            yield f"{where}: {len(value)}, not {size}"
            return
        for place, each in enumerate(value):
            yield from _problems(each, node[first], f"{where}[{place}]", sizes)
        return
    known = {name.rstrip("?"): own for name, own in node.items()}
    for name, each in value.items():
        own = known.get(name, node.get("*"))
        if own is None:
            yield f"{where}{name} is not documented"
        else:
            yield from _problems(each, own, f"{where}.{name}" if where else name, sizes)
    yield from (f"{name} is missing" for name in node if name not in value and not name.endswith("?") and name != "*")


def _fits(value, kind):
    if kind == "any":
        return True
    if kind == "texts by id":
        return all(key.isdigit() and isinstance(text, str) for key, text in value.items())
    if "," in kind:
        kinds = kind.split(", ")
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind == "numbers or null":
        return value is None or all(_fits(each, "number") for each in value)
    return any(isinstance(value, TYPES[each]) and (each == "bool" or value is not True) for each in kind.split(" or "))


def test_prompts_that_are_too_long(tiny):
    large = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, max_position_embeddings=4096))
    with pytest.raises(ValueError, match=r"257 tokens: .*3 layers x 6 heads x 257 x 257.* to at most 256 tokens"):
        require_size(large, 257)
    mini = dataclasses.replace(tiny, config=phi3_jax.PRESETS["phi-3-mini"])
    with pytest.raises(ValueError, match=r"report of 84 MB; shorten it to at most 192 tokens"):
        require_size(mini, 256)
    require_size(mini, 192)
    with pytest.raises(ValueError, match="the prompt is empty"):
        inspection.collect(tiny, [], "")


def test_numbers_that_are_none_are_told(tiny, monkeypatch):
    monkeypatch.setattr(readings, "read", lambda *_: {"logits": np.asarray([[[1.0, np.nan]]])})
    with pytest.raises(ValueError, match="logits are not finite numbers: the weights may be damaged"):
        inspection.collect(tiny, IDS, "")


def test_how_a_checkpoint_draws(tiny, tmp_path):
    assert sampling_defaults(tiny).temperature == 1
    checkpoint = dataclasses.replace(tiny, folder=tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 0, "max_length": 3}')
    found = sampling_defaults(checkpoint)
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.9, None, None)
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"generation_config.json: top_p=7 must be in"):
        sampling_defaults(checkpoint)


def kinds(tiny, folder):
    """The model with weights of every kind, by name."""
    phi3_jax.save(tiny, folder / "floats")
    lora = LoraConfig(rank=2, alpha=4, targets=("qkv_proj", "o_proj", "down_proj"))
    adapter = init_adapter(tiny.config, lora, jax.random.key(1))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    yield "int4", phi3_jax.load(folder / "floats", quantize="int4", layout="rows")
    yield "float32", phi3_jax.load(folder / "floats", layout="layers")
    yield "float32 with an adapter", dataclasses.replace(tiny, params=attach(tiny.params, adapter, lora))
    if why_unavailable() is None:
        yield "int8", phi3_jax.load(folder / "floats", quantize="int8")
        yield "bfloat16", phi3_jax.load(folder / "floats", "bfloat16")


@pytest.mark.slow
def test_weights_of_every_kind(tiny, tmp_path, quick_compilation):
    """The report of each is about what the model computes with them, and its parts are the logit."""
    plain = None
    for name, checkpoint in kinds(tiny, tmp_path):
        found = inspection.collect(checkpoint, IDS, "")
        assert found["model"]["weights"] == name
        cache = phi3_jax.KVCache.create(checkpoint.config, 1, T, own_cache_dtype(checkpoint))
        model = phi3_jax.Phi3(checkpoint.config)
        logits = np.asarray(model.apply({"params": checkpoint.params}, jnp.asarray([IDS]), cache=cache)[0])
        ours = np.frombuffer(base64.b64decode(found["next"]["logits"]), "<f4")
        close(ours, logits[0, -1], 1e-3)
        assert [entry[0] for entry in found["lens"]["post"][-1][-1]] == np.argsort(-ours)[:TOP].tolist()
        parts = found["attribution"]
        whole = parts["embed"] + np.sum(parts["heads"]) + np.sum(parts["mlps"])
        assert abs(whole + parts["rest"] - parts["logit"]) < 2e-3
        assert abs(parts["rest"]) < (1e-3 if name.startswith("float32") else 0.1)
        plain = found if name == "float32" else plain
        if name == "int4":
            other = found
    assert plain["residual"]["post"] != other["residual"]["post"]
