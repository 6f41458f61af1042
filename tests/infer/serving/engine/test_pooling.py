import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import dense, random_adapter, scalings

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import save_adapter
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.serving.engine import Engine, EngineOptions, Job, QueueFull, pooling
from phi3_jax.infer.serving.engine.adapters import Adapters
from phi3_jax.infer.serving.engine.pooling import Pooler
from phi3_jax.model import Phi3

# Those of test_engine.py, whose programs are shared.
SMALL = EngineOptions(slots=2, room=64, queue=64, chunk=16, top_logprobs=2)
pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(5)
# Below and beyond a chunk, the window (19) and LongRoPE's border (16).
TEXTS = [RNG.integers(0, 97, size).tolist() for size in (1, 7, 16, 17, 41, 53)]


@pytest.fixture(scope="module")
def pooler(tiny: phi3_jax.Checkpoint) -> Pooler:
    return Pooler(tiny, Adapters.load(tiny, {}), room=64, chunk=16, queue=3)


def read_all(pooler: Pooler) -> int:
    turns = 0
    while pooler.turn():
        turns += 1
    return turns


@pytest.fixture(scope="module")
def hidden(tiny: phi3_jax.Checkpoint) -> list[np.ndarray]:
    return hidden_of(tiny)


def hidden_of(tiny: phi3_jax.Checkpoint) -> list[np.ndarray]:
    """Of each text [T, D]: all at once, without a cache."""
    tokens = np.zeros((len(TEXTS), 53), np.int32)
    positions = np.full(tokens.shape, -1, np.int32)
    for row, text in enumerate(TEXTS):
        tokens[row, : len(text)], positions[row, : len(text)] = text, range(len(text))
    apply = jax.jit(lambda *args: Phi3(tiny.config).apply({"params": tiny.params}, *args, method="hidden")[0])
    x = np.asarray(apply(tokens, positions), np.float64)
    return [x[row, : len(text)] for row, text in enumerate(TEXTS)]


def slowly(x: np.ndarray, way: str) -> np.ndarray:
    vector = x[-1] if way == "last" else sum(x) / len(x)
    return vector / np.sqrt(sum(vector**2))


@pytest.mark.parametrize("way", ["mean", "last"])
def test_vectors_are_the_pooled_hidden_states(pooler: Pooler, hidden: list[np.ndarray], way):
    future = pooler.submit(TEXTS, way)
    read_all(pooler)
    vectors = future.result(timeout=0)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [slowly(x, way) for x in hidden], atol=2e-6)


def test_a_vector_does_not_depend_on_its_neighbours_nor_on_their_order(pooler: Pooler):
    futures = [pooler.submit(TEXTS), pooler.submit(TEXTS[::-1]), pooler.submit([TEXTS[4]])]
    read_all(pooler)
    forwards, backwards, alone = (future.result(timeout=0) for future in futures)
    np.testing.assert_array_equal(forwards, backwards[::-1])
    np.testing.assert_array_equal(forwards[4], alone[0])


def test_nothing_is_left_of_the_text_before_that_attention_would_read(pooler: Pooler):
    pooler.submit([TEXTS[3], TEXTS[1]])
    read_all(pooler)
    assert pooler._state is not None
    assert pooler._state.cache.lengths.tolist() == [7]


def test_a_turn_reads_one_chunk_and_requests_take_turns(pooler: Pooler):
    long, short = pooler.submit([TEXTS[5]] * 3), pooler.submit([TEXTS[1]])
    for _ in range(4):  # 53 tokens in chunks of 16
        assert not short.done()
        assert pooler.turn()
    assert pooler.turn()
    assert short.done()
    assert not long.done()
    assert read_all(pooler) == 8


def test_a_request_that_is_cancelled_is_not_read_on(pooler: Pooler):
    wanted = pooler.submit([TEXTS[4]])
    read_all(pooler)
    gone, other = pooler.submit([TEXTS[5]] * 3), pooler.submit([TEXTS[4]])
    pooler.turn()
    assert gone.cancel()
    assert read_all(pooler) == 3
    np.testing.assert_array_equal(other.result(timeout=0), wanted.result(timeout=0))


def test_what_cannot_be_read_is_refused_at_once(pooler: Pooler):
    for texts, message in [([[]], "input 0 has 0 tokens"), ([[1], [1] * 65], "input 1 has 65 tokens"), ([], "no inp")]:
        with pytest.raises(ValueError, match=message):
            pooler.submit(texts)
    with pytest.raises(ValueError, match="input 0 has ids \\[97\\] outside"):
        pooler.submit([[1, 97]])
    with pytest.raises(ValueError, match="pooling='max'"):
        pooler.submit([[1]], "max")
    futures = [pooler.submit([[1]]) for _ in range(3)]
    with pytest.raises(QueueFull):
        pooler.submit([[1]])
    pooler.fail(RuntimeError("stopped"))
    assert [type(future.exception(timeout=0)) for future in futures] == [RuntimeError] * 3
    assert not pooler.turn()


@pytest.mark.slow
def test_an_adapter_is_that_of_its_request(tiny: phi3_jax.Checkpoint, hidden: list[np.ndarray], tmp_path):
    lora = LoraConfig(2, 3.0)
    save_adapter(tmp_path / "mine", made := random_adapter(tiny.config, lora, 0), lora, tiny.config, "base")
    params = dense(tiny.params, made, lora, scalings(lora))
    merged = hidden_of(phi3_jax.Checkpoint(tiny.config, params, None, tiny.generation))
    pooler = Pooler(tiny, Adapters.load(tiny, {"mine": tmp_path / "mine"}), 64, 16, 2)
    futures = [pooler.submit(TEXTS, adapter=name) for name in (None, "mine")]
    read_all(pooler)
    own, adapted = (future.result(timeout=0) for future in futures)
    np.testing.assert_allclose(own, [slowly(x, "mean") for x in hidden], atol=2e-6)
    np.testing.assert_allclose(adapted, [slowly(x, "mean") for x in merged], atol=2e-5)
    assert abs(own - adapted).max() > 0.01
    with pytest.raises(ValueError, match="no adapter 'other'"):
        pooler.submit(TEXTS, adapter="other")


def test_hidden_states_that_are_no_numbers_are_an_error_of_their_request_alone(tiny: phi3_jax.Checkpoint, monkeypatch):
    params = dict(tiny.params)
    weight = tiny.params["embed_tokens"]["weight"]
    params["embed_tokens"] = {"weight": weight.at[13].set(jnp.nan)}
    bad_model = phi3_jax.Checkpoint(tiny.config, params, None, tiny.generation)
    monkeypatch.setattr(pooling, "own_cache_dtype", lambda checkpoint: "float16")  # which no CPU kernel reads
    pooler = Pooler(bad_model, Adapters.load(bad_model, {}), 64, 16, 2)
    bad, good = pooler.submit([[5], [13, 5], [5]]), pooler.submit([[5]])
    read_all(pooler)
    later = pooler.submit([[5]])  # into the same memory
    read_all(pooler)
    with pytest.raises(ValueError, match="input 1 gave hidden states that are no finite numbers"):
        bad.result(timeout=0)
    assert np.isfinite(good.result(timeout=0)).all()
    np.testing.assert_array_equal(later.result(timeout=0), good.result(timeout=0))


def test_warm_up_compiles_all(tiny: phi3_jax.Checkpoint):
    fresh = Pooler(tiny, Adapters.load(tiny, {}), 60, 24, 2)
    assert list(fresh.warm_up()) == [16, 24]
    before = pooling._read._cache_size()
    fresh.submit([[1] * size for size in (3, 17, 33, 60)])
    read_all(fresh)
    assert pooling._read._cache_size() == before


def test_the_engine_reads_one_piece_in_a_turn_be_it_of_a_prompt_or_a_text(tiny: phi3_jax.Checkpoint, monkeypatch):
    engine = Engine(tiny, SMALL)
    told, order = [], []
    for module, name in ((pooling, "_read"), (decoding, "read")):
        monkeypatch.setattr(module, name, noting(getattr(module, name), order))
    engine.submit(Job(TEXTS[4], 3), told.append)
    embedding = engine.submit_embedding([TEXTS[5]] * 2)
    turns = 0
    while engine.turn():
        turns += 1
        assert len(order) <= turns
    # In turns; the text, of which there is more, goes on alone.
    assert order == ["_read", "read"] * 3 + ["_read"] * 5
    assert [len(piece.token_ids) for piece in told] == [1, 1, 1]
    vectors = embedding.result(timeout=0)
    np.testing.assert_array_equal(vectors[0], vectors[1])


def noting(function, order: list[str]):
    def noted(*args, **options):
        order.append(function.__name__)
        return function(*args, **options)

    noted.lower = function.lower
    return noted


def test_an_engine_that_stops_tells_those_who_wait(tiny: phi3_jax.Checkpoint):
    engine = Engine(tiny, SMALL)
    future = engine.submit_embedding([TEXTS[5]])
    engine.stop()
    engine.run()
    assert isinstance(future.exception(timeout=0), RuntimeError)
    with pytest.raises(QueueFull, match="about to stop"):
        engine.submit_embedding([[1]])
