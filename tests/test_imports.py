"""Imports run one way, from the rooms that know much to those that know little, and no room is crowded."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import phi3_jax

ROOT = Path(phi3_jax.__file__).parent.parent
STOREYS = ("phi3_jax", "infer", "train")
# Lowest first: a room imports itself and what stands in lines above its own. Those that share a line are strangers.
ORDER = """
config progress
presets text kernels
model
quantization
adapters
checkpoint
__init__
command_line
infer.prompts infer.sampling
infer.engine
infer.answer
infer.generate infer.conversation infer.beam infer.benchmark
infer.__init__
infer.programs
train.settings
train.data train.adam8bit train.sharding
train.loss train.dpo train.optimizer
train.forward
train.step
train.run train.evaluation train.recipes
train.__init__
train.programs
"""
LEVELS = {f"phi3_jax.{room}": level for level, line in enumerate(ORDER.split("\n")) for room in line.split()}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("phi3_jax.") else f"phi3_jax.{name}"


MODULES = {module_name(path): path for top in STOREYS for path in sorted((ROOT / top).rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, be it inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            asked = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for target in asked:
            if target.split(".")[0] == "phi3_jax":  # a module, a package, or a name inside of one of them
                around = target.rpartition(".")[0]
                candidates = (target, f"{target}.__init__", around, f"{around}.__init__")
                found.add(next(module for module in candidates if module in MODULES))
    return found


def room(module: str) -> str:
    return max((each for each in LEVELS if f"{module}.".startswith(f"{each}.")), key=len)


GRAPH = {name: imports(name) for name in MODULES}


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} == LEVELS.keys()


def test_no_room_imports_a_higher_one():
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(other) != room(name) and LEVELS[room(other)] >= LEVELS[room(name)]
    ]
    assert not wrong


def test_there_are_no_circles():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_generation_knows_nothing_of_training_and_training_only_its_public_names():
    for name, others in GRAPH.items():
        for other in others:
            assert not (name.startswith("phi3_jax.infer.") and other.startswith("phi3_jax.train.")), (name, other)
            public = not other.startswith("phi3_jax.infer.") or other == "phi3_jax.infer.__init__"
            assert public or not name.startswith("phi3_jax.train."), (name, other)


def test_only_programs_have_flags():
    for name, path in MODULES.items():
        is_program = room(name).endswith((".programs", ".command_line"))
        assert is_program or not any("phi3_jax.command_line" in other for other in GRAPH[name]), name
        assert is_program or "absl" not in path.read_text(encoding="utf-8"), name


def test_no_folder_has_more_than_fifteen_modules():
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    counts += Counter(path.parent for path in (ROOT / "tests").rglob("*.py"))
    assert {str(folder): count for folder, count in counts.items() if count > 15} == {}


def test_every_room_says_what_it_is_for():
    for folder in {path.parent for path in MODULES.values()}:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert docstring, f"{folder}: an __init__.py with a docstring is missing"
