import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.adapters import LoraConfig, attach, init_adapter
from phi3_jax.infer import DraftModel, Options, PromptCache, PromptLookup, Run, Sampling, engine, generate
from phi3_jax.infer.inspection import stepping, steps
from phi3_jax.inspection import add, change, replace, run, scale, zero

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPT, NEW = [5, 1, 7], 24  # the window of 19 has wrapped, LongRoPE's border at 16 is crossed
WIDTH = 32  # of the reference, so that it is compiled once
CHUNK = Options(prefill_chunk=4)  # 19 + 4 - 1 slots
READS = ("resid_post", "attn.pattern", "attn.z", "attn.rot_k", "mlp.post", "embed", "logits")


def edits_of(config, factor=0.5):
    steering = np.random.default_rng(1).normal(size=config.hidden_size) * factor
    return (
        add(config, "resid_post", steering, layers=[1]),
        zero(config, "attn.z", layers=[0, 2], positions=[2, 21], heads=[1, 4]),  # of the prompt, and of the answer
        replace(config, "embed", steering, positions=[17]),
        add(config, "logits", 40 * np.eye(97)[11], positions=[9]),
    )


def at_once(checkpoint, ids, edits=(), reads=READS):
    """What is read at the last token of a text that runs whole, without a cache; keys S in order, WIDTH of them."""
    tokens = np.asarray([[*ids, *[0] * (WIDTH - len(ids))]])
    positions = np.where(np.arange(WIDTH) < len(ids), np.arange(WIDTH), -1)[None]
    where = jnp.asarray([len(ids) - 1])
    found = run(
        checkpoint.config, checkpoint.params, tokens, reads, positions=where, edits=edits, token_positions=positions
    )
    return {name: np.asarray(values, np.float32) for name, values in found.items()}


def same_values(step, expected, tolerance=2e-4):
    for name, values in expected.items():
        found = np.asarray(step.seen[name], np.float32)
        if name in ("attn.pattern", "attn.scores"):
            found, values = step.by_position(found), values[..., : step.place]
        error = np.linalg.norm(found - values) / np.linalg.norm(values)
        assert error < tolerance, f"{name} at {step.place}"
        if tolerance < 1e-3:
            np.testing.assert_allclose(found, values, atol=2e-4, rtol=2e-4, err_msg=f"{name} at {step.place}")


def test_values_and_tokens_are_those_of_whole_texts_with_the_same_changes(tiny):
    """Greedily; changes at all tokens, and at places in prompt and answer."""
    edits, ids = edits_of(tiny.config), list(PROMPT)
    for step in steps(tiny, PROMPT, NEW, READS, edits, options=CHUNK):
        expected = at_once(tiny, ids, edits)
        assert (step.token, step.place) == (expected["logits"][0, 0].argmax(), len(ids))
        same_values(step, expected)
        ids.append(step.token)
    assert len(ids) == len(PROMPT) + NEW
    assert ids[10] == 11  # the logits of position 9 were changed
    other = [step.token for step in steps(tiny, PROMPT, NEW, READS, edits_of(tiny.config, -2.0), options=CHUNK)]
    assert other != ids[len(PROMPT) :]
    assert stepping._turn._cache_size() == stepping._answer._cache_size() == 1  # edits are data


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["length", "batch"])
def test_tokens_are_those_of_generate(tiny, policy):
    checkpoint = dataclasses.replace(tiny, generation=dataclasses.replace(tiny.generation, eos_token_ids=(69, 90)))
    options, lengths = dataclasses.replace(CHUNK, rope_policy=policy), set()
    for sampling in (
        Sampling(temperature=1.3, seed=2**32 - 1, top_k=30, repetition_penalty=1.2),
        Sampling(temperature=0.7, seed=3, top_p=0.9, presence_penalty=1.0, banned_tokens=[56, 37], min_new_tokens=4),
        Sampling(forced_tokens=[8, 8], no_repeat_ngram_size=2),
        Sampling(),
    ):
        expected = generate(checkpoint, [PROMPT], NEW, sampling=sampling, options=options)[0].token_ids
        found = [step.token for step in steps(checkpoint, PROMPT, NEW, sampling=sampling, options=options)]
        assert found == expected
        lengths.add(len(found))
    assert len(lengths) > 1  # some met an end


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "int4 rows", "int4 packed, int8 cache", "a buffer per layer"])
def test_all_kinds_of_weights_and_an_integer_cache(tiny, int4_folder, kind):
    options, reads = CHUNK, ("resid_post", "attn.pattern", "attn.z")
    if kind == "adapter":
        lora = LoraConfig(rank=2, alpha=8.0)
        adapter = jax.tree.map(lambda x: x + 0.3, init_adapter(tiny.config, lora, jax.random.key(1)))
        checkpoint = dataclasses.replace(tiny, params=attach(tiny.params, adapter, lora))
    elif kind == "a buffer per layer":
        checkpoint = phi3_jax.load(int4_folder.parent / "floats", layout="layers")
    else:
        checkpoint = phi3_jax.load(int4_folder, layout="packed" if "packed" in kind else "rows")
    is_rough = "int8 cache" in kind
    options = dataclasses.replace(options, cache_dtype="int8" if is_rough else "float32")
    found = [step.token for step in steps(checkpoint, PROMPT, NEW, options=options)]
    assert found == generate(checkpoint, [PROMPT], NEW, options=options)[0].token_ids
    # Values of heads are not computed by the kernels, which round otherwise: beside int8, tokens may differ for it.
    read = list(steps(checkpoint, PROMPT, NEW, reads, options=options))
    assert is_rough or found == [step.token for step in read]
    for number in (0, 1, 17, NEW - 1):
        ids = [*PROMPT, *(step.token for step in read[:number])]
        expected = at_once(checkpoint, ids, reads=reads)
        same_values(read[number], expected, 0.05 if is_rough else 1e-5)  # 0.036 and 4e-6 at most


class Everything:
    words, mask, push = 4, staticmethod(lambda row: np.full(4, 0xFFFFFFFF, np.uint32)), staticmethod(lambda *_: None)


@pytest.mark.slow
def test_steering_in_the_engine(tiny, tmp_path, monkeypatch):
    """In batches, with guesses, a grammar, a prompt cache: tokens are those of steps, past the border of LongRoPE."""
    edits, prompts = edits_of(tiny.config), [PROMPT, [11, 2, 31, 8, 11, 2, 31], [90, 4]]
    sampling = Sampling(temperature=0.8, seed=5)
    expected = [[s.token for s in steps(tiny, p, 12, (), edits, sampling, options=CHUNK)] for p in prompts]
    plain = [[s.token for s in steps(tiny, p, 12, (), (), sampling, options=CHUNK)] for p in prompts]
    assert all(a != b for a, b in zip(expected, plain, strict=True))
    for speculation in (None, PromptLookup(3, 2, 1), DraftModel(tiny, 2), "a grammar"):
        if speculation == "a grammar":  # one that allows everything: the host acts between the halves of a turn
            monkeypatch.setattr(engine.run, "_grammar_masks", lambda *_: Everything)
            speculation = None
        options = dataclasses.replace(CHUNK, edits=edits, speculation=speculation)
        found = generate(tiny, prompts, 12, sampling=[sampling] * 3, options=options)
        assert [row.token_ids for row in found] == expected
    monkeypatch.undo()
    options = dataclasses.replace(CHUNK, edits=edits)
    first = Run(tiny, [prompts[1][:4]], [2], [sampling], options)
    first.advance()
    first.prompt_cache().save(tmp_path / "prompt")
    cached = dataclasses.replace(options, prompt_cache=PromptCache.load(tmp_path / "prompt", tiny, edits))
    again = Run(tiny, [prompts[1]], [12], [sampling], cached)
    assert again.reused == 4
    found = []
    while not again.is_over:
        found += again.advance()[0].token_ids
    assert found == expected[1]
    other = dataclasses.replace(cached, edits=edits_of(tiny.config, 2.0))
    with pytest.raises(ValueError, match="another model, or with other edits"):
        Run(tiny, [prompts[1]], [12], [sampling], other)
    function = change(tiny.config, "mlp.post", jnp.abs)
    for others, told in (((), "configuration or edits"), (edits[:2], "or edits"), ((function,), "is a function")):
        with pytest.raises(ValueError, match=told):
            PromptCache.load(tmp_path / "prompt", tiny, others)


@pytest.mark.slow
def test_a_function_changes_values_at_every_step(tiny):
    edit = change(tiny.config, "mlp.post", jnp.abs, layers=[1])
    first = next(steps(tiny, PROMPT, 2, ("mlp.post",), [edit], layers=[0, 1]))
    assert (np.asarray(first.seen["mlp.post"][1]) >= 0).all()
    assert (np.asarray(first.seen["mlp.post"][0]) < 0).any()
    assert first.seen["mlp.post"].shape == (2, 1, 1, 40)
    infinite = steps(tiny, PROMPT, 3, edits=[add(tiny.config, "logits", np.inf, positions=[3])])
    next(infinite)
    with pytest.raises(ValueError, match=r"logits for token 2 of the answer are not finite"):
        next(infinite)


def test_what_makes_no_sense_is_refused(tiny):
    config = tiny.config
    for edit, words in (
        (add(config, "embed", np.zeros((3, 24))), "T must be 1, or the edit must name the positions"),
        (scale(config, "attn.pattern", np.zeros(7)), "S must be 1"),
        (add(config, "embed", np.zeros((2, 1, 24))), "B must be 1"),
        (zero(config, "embed", positions=[[1], [2]]), "positions for each row"),
    ):
        with pytest.raises(ValueError, match=words):
            Options(edits=(edit,))
    for arguments, words in (
        (([], 3), "is empty"),
        ((PROMPT, 0), "at least 1"),
        ((PROMPT, 3, ("nothing",)), "no point 'nothing'"),
    ):
        with pytest.raises(ValueError, match=words):
            steps(tiny, *arguments)
    with pytest.raises(ValueError, match=r"options\.logprobs: leave it out"):
        steps(tiny, PROMPT, 3, options=Options(logprobs=0))
