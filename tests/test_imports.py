"""Imports run one way, from the rooms that know much to those that know little, and no room is crowded."""

import ast
import graphlib
import re
from collections import Counter
from pathlib import Path

import phi3_jax

ROOT = Path(phi3_jax.__file__).parent.parent
STOREYS = ("phi3_jax", "infer", "train")
# Lowest first: a room imports itself and what stands in lines above its own. Those that share a line are strangers.
ORDER = """
progress regular_file spelling user_cache
json_files
config_keys
config
presets text kernels
model
quantization inspection
adapters
checkpoint
__init__
command_line
infer.prompts infer.sampling
infer.engine
infer.answer
infer.generate infer.conversation infer.beam infer.benchmark
infer.inspection infer.serving.engine
infer.serving.http.errors
infer.serving.http.gate infer.serving.http.fields
infer.serving.http
infer.serving.batch
infer.serving
infer.__init__
infer.programs
train.values
train.settings
train.fingerprint
train.adapters train.data train.adam8bit train.sharding train.rounding
train.loss train.dpo train.optimizer
train.forward
train.step
train.checks
train.run train.evaluation train.recipes
train.__init__
train.programs
"""
LEVELS = {f"phi3_jax.{room}": level for level, line in enumerate(ORDER.split("\n")) for room in line.split()}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("phi3_jax.") else f"phi3_jax.{name}"


SOURCES = [path for top in STOREYS for path in sorted((ROOT / top).rglob("*.py"))]
MODULES = {module_name(path): path for path in SOURCES if path.parent.name != "notebooks"}  # these are documents


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, be it inside of a function, or reaches as attributes of phi3_jax."""
    asked = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            asked |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"phi3_jax(\.\w+)+", dotted := ast.unparse(node)):
            asked.add(dotted)
    assert not {target for target in asked if target.split(".")[0] in ("infer", "train")}, name
    found = set()
    for target in asked:
        parts = target.split(".")
        while parts[0] == "phi3_jax":  # a module, a package, or a name inside of one of them
            known = [each for each in (".".join(parts), ".".join([*parts, "__init__"])) if each in MODULES]
            if known:
                found.add(known[0])
                break
            parts.pop()
    return found - {name}


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


def test_only_programs_have_flags_and_print_and_nothing_imports_a_program():
    may_print = {
        "phi3_jax.kernels.native.build",  # ten silent seconds, or a run many times slower, would be worse
        "phi3_jax.infer.benchmark.peer_process",  # its requests and replies go through pipes
    }
    for name, tree in TREES.items():
        is_program = room(name).endswith((".programs", ".command_line"))
        assert is_program or not any("phi3_jax.command_line" in other for other in GRAPH[name]), name
        assert not any(other.endswith("_main") for other in GRAPH[name]), name
        source, words = ast.unparse(tree), {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert is_program or not re.search(r"(from|import) (absl|argparse)\b", source), name
        assert is_program or "print" not in words or name in may_print, name


def test_a_package_says_which_of_its_names_others_use():
    """They are imported from the package itself, or from a module that its docstring names."""
    untold = set()
    for name, others in GRAPH.items():
        for other in others:
            package = room(other)
            if package != room(name) and f"{package}.__init__" in MODULES and not other.endswith("__init__"):
                named = re.findall(r"\w+", ast.get_docstring(TREES[f"{package}.__init__"]) or "")
                untold |= set() if set(other.split(".")) & set(named) else {f"{other} (by {name})"}
    assert not untold


def test_no_folder_has_more_than_fifteen_modules():
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    counts += Counter(path.parent for path in (ROOT / "tests").rglob("*.py"))
    assert {str(folder): count for folder, count in counts.items() if count > 15} == {}


def test_every_room_says_what_it_is_for():
    for folder in {path.parent for path in MODULES.values()}:
        docstring = ast.get_docstring(TREES[module_name(folder / "__init__.py")])
        assert docstring, f"{folder}: an __init__.py with a docstring is missing"


def test_the_start_of_the_commands_imports_what_python_has_loaded_and_knows_all_programs():
    tree = ast.parse((ROOT / "phi3_start.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"importlib", "os", "signal", "sys"}
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {name for name in MODULES if name.endswith("_main")} <= named
