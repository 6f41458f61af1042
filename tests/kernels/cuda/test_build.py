"""Compiling the kernels for NVIDIA cards: once, for those that are there, and with a clear line where it fails."""

import ctypes
import types

import jax
import pytest

from phi3_jax import user_cache
from phi3_jax.kernels import Unavailable
from phi3_jax.kernels.cuda import build, nvrtc
from phi3_jax.kernels.native import compiler
from phi3_jax.kernels.native.compiler import Refused


class FakeNvrtc:
    """Compiles what it is given to its name and architecture, and counts how often."""

    def __init__(self):
        self.compiled, self.failure = [], None

    def compile_cubin(self, source, headers, architecture):
        self.compiled.append((source.name, sorted(path.name for path in headers), architecture))
        if self.failure:
            raise self.failure
        return f"{source.name} for {architecture}".encode(), ""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two small sources, a cache folder of the test's own, and no NVRTC."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    (tmp_path / "sources").mkdir()
    for name in ("a.cu", "b.cu", "both.h"):
        (tmp_path / "sources" / name).write_text(f"// {name}\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = FakeNvrtc()
    monkeypatch.setattr(nvrtc, "compile_cubin", fake.compile_cubin)
    monkeypatch.setattr(nvrtc, "architecture", lambda capability: capability)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return fake


def test_kernels_are_compiled_once_for_a_card_and_checked_before_use(fake, capsys):
    paths = build.cubins(90)
    assert [path.read_bytes() for path in paths] == [b"a.cu for 90", b"b.cu for 90"]
    assert sorted(fake.compiled) == [("a.cu", ["both.h"], 90), ("b.cu", ["both.h"], 90)]
    assert "compiling the kernels of a.cu for cards of compute capability 9.0" in capsys.readouterr().err
    assert build.cubins(90) == paths
    assert len(fake.compiled) == 2
    paths[1].write_bytes(b"b.cu for 91")
    assert build.cubins(90)[1].read_bytes() == b"b.cu for 90"
    assert len(fake.compiled) == 3
    assert {path.name for path in build.cubins(80)} == {"sm_80.cubin"}
    assert len(fake.compiled) == 5


def test_kernels_are_named_after_all_that_they_are_made_from(fake, monkeypatch):
    keys = [build.cubin_key(90), build.cubin_key(89)]
    for name in ("a.cu", "both.h", "table.inc"):
        (build.SOURCES / name).write_text("// changed\n")
        keys.append(build.cubin_key(90))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    keys.append(build.cubin_key(90))
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-G"))
    keys.append(build.cubin_key(90))
    assert len(set(keys)) == len(keys)


def test_what_nvrtc_refuses_is_not_tried_again_and_what_failed_otherwise_is(fake):
    fake.failure = Refused("NVRTC 13.0 does not compile a.cu: error")
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"does not compile a\.cu: error; tried again once .* deleted"):
            build.cubins(90)
    assert len(fake.compiled) == 2  # each of the two once
    fake.failure = Unavailable("out of memory")
    for _ in range(2):
        with pytest.raises(Unavailable, match="out of memory"):
            build.cubins(80)
    assert len(fake.compiled) == 6
    fake.failure = None
    assert len(build.cubins(80)) == 2


def card(capability, platform="gpu", kind="a card"):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


def test_cards_from_ampere_on_can_run_them(monkeypatch):
    for cards, expected in (
        ([card("9.0"), card("8.6"), card("9.0")], [86, 90]),
        ([card("12.1")], [121]),
        ([types.SimpleNamespace(platform="cpu", device_kind="cpu")], []),  # it compiles for cards that are not here
    ):
        monkeypatch.setattr(jax, "local_devices", lambda cards=cards: cards)
        assert build._capabilities() == expected
    for one, reason in (
        (card("7.5", kind="Tesla T4"), r"Tesla T4 has compute capability 7\.5; they need 8\.0 or newer"),
        (card("gfx942", kind="MI300X"), "MI300X is no NVIDIA card"),
    ):
        monkeypatch.setattr(jax, "local_devices", lambda one=one: [card("9.0"), one])
        with pytest.raises(Unavailable, match=reason):
            build._capabilities()


@pytest.fixture
def loading(monkeypatch):
    """`_load_once` as in a new process, where nothing is compiled or registered, on a card of Hopper's."""
    added = []
    loaded = types.SimpleNamespace(phi3_cuda_add=lambda *args: added.append(args[:2]))
    monkeypatch.delenv("PHI3_JAX_NATIVE", raising=False)
    monkeypatch.setattr(jax, "local_devices", lambda: [card("9.0")])
    monkeypatch.setattr(build, "_launcher", lambda: None)
    monkeypatch.setattr(build.native, "open_library", lambda path: loaded)
    monkeypatch.setattr(build, "register", lambda loaded, platform: None)
    monkeypatch.setattr(build, "_load_once", build._load_once.__wrapped__)
    return added


def test_the_kernels_of_all_cards_are_handed_over(fake, loading, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [card("9.0"), card("8.0")])
    assert build.why_unavailable() is None
    assert loading == [(each, f"{name} for {each}".encode()) for each in (80, 90) for name in ("a.cu", "b.cu")]


def test_one_line_says_why_they_cannot_be_used(fake, loading, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: [card("7.0", kind="Tesla V100")])
    reason = build.why_unavailable()
    assert reason.startswith("Tesla V100 has compute capability 7.0")
    assert capsys.readouterr().err == (
        f"phi3_jax: the compiled kernels for NVIDIA cards cannot be used, and XLA alone is slower: {reason}\n"
    )
    with pytest.raises(Unavailable, match="Tesla V100"):
        build.library()
    monkeypatch.setenv("PHI3_JAX_NATIVE", "0")
    assert build.why_unavailable() == "switched off by PHI3_JAX_NATIVE=0"
    monkeypatch.delenv("PHI3_JAX_NATIVE")
    monkeypatch.setattr(jax, "local_devices", lambda: [card("9.0")])
    monkeypatch.setattr(user_cache, "cache_folder", None)
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    assert "set XDG_CACHE_HOME" in build.why_unavailable()


def test_without_nvrtc_the_reason_says_what_to_install(monkeypatch):
    nvrtc._library.cache_clear()
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)

    def not_there(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", not_there)
    with pytest.raises(Unavailable, match=r"NVRTC is not installed.*pip install 'jax\[cuda13\]'"):
        nvrtc.version()
    nvrtc._library.cache_clear()


@pytest.mark.parametrize(("plugin", "first"), [("jax_cuda12_plugin", "12"), ("jax_cuda13_plugin", "13")])
def test_nvrtc_is_of_the_cuda_that_jax_has(tmp_path, monkeypatch, plugin, first):
    """Another package may have brought the other one along, whose code an older driver does not load."""
    for folder, number in (("cu13", "13"), ("cuda_nvrtc", "12")):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "lib" / f"libnvrtc.so.{number}").touch()
    specs = {"nvidia": types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]), plugin: True}
    tried = []

    def not_there(name):
        tried.append(name.rpartition(".")[2])
        raise OSError(name)

    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(ctypes, "CDLL", not_there)
    nvrtc._library.cache_clear()
    with pytest.raises(Unavailable, match="NVRTC is not installed"):
        nvrtc.version()
    nvrtc._library.cache_clear()
    other = {"12": "13", "13": "12"}[first]
    assert tried == [first, other, first, other, "so"]


@pytest.mark.parametrize(("code", "passes"), [(1, True), (5, False), (6, False), (7, True), (11, True)])
def test_what_nvrtc_lacks_may_be_there_the_next_time(tmp_path, monkeypatch, code, passes):
    """Among others, NVRTC's second library (code 7)."""
    log = b"a.cu(1): warning: odd\nnvrtc: error: failed to open libnvrtc-builtins.so.13.0\n\0"

    class Library:
        def __getattr__(self, name):
            return lambda *given: 0

        def nvrtcCompileProgram(self, *given):  # noqa: N802 - NVRTC's name
            return code

        def nvrtcGetErrorString(self, code):  # noqa: N802
            return b"unknown"

        def nvrtcGetProgramLogSize(self, program, size):  # noqa: N802
            size._obj.value = len(log)

        def nvrtcGetProgramLog(self, program, buffer):  # noqa: N802
            buffer.raw = log

    monkeypatch.setattr(nvrtc, "_library", Library)
    (tmp_path / "a.cu").touch()
    with pytest.raises(Unavailable, match=r"nvrtc: error: failed to open libnvrtc-builtins\.so\.13\.0") as told:
        nvrtc.compile_cubin(tmp_path / "a.cu", [], 90)
    assert isinstance(told.value, Refused) is not passes


def test_an_architecture_that_the_card_runs_is_taken(monkeypatch):
    known = (75, 80, 86, 90, 100, 120)

    def count(pointer):
        pointer._obj.value = len(known)

    def archs(array):
        array[:] = known

    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    library = types.SimpleNamespace(nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=archs)
    monkeypatch.setattr(nvrtc, "_library", lambda: library)
    assert {card: nvrtc.architecture(card) for card in (80, 86, 89, 90, 103, 121)} == {
        80: 80, 86: 86, 89: 86, 90: 90, 103: 100, 121: 120,
    }  # fmt: skip
    for card in (110, 130):
        with pytest.raises(Unavailable, match=rf"NVRTC 13\.0 knows no card of compute capability {card / 10}"):
            nvrtc.architecture(card)


@pytest.mark.slow
@pytest.mark.skipif(compiler.find() is None, reason="there is no C++ compiler: apt install g++")
def test_a_kernel_without_a_driver_is_an_error(tmp_path):
    """What starts kernels compiles and loads where there is neither a card nor its driver."""
    loaded = ctypes.CDLL(str(build._launcher()))
    build.native.check_version(loaded)
    assert all(hasattr(loaded, name) for name in build.HANDLERS)
