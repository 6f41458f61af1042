"""Reads the text of a compiled program (XLA's HLO): its computations, instructions, loops and branches."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # of the dtypes whose names do not end in their bits
# What does nothing by itself. What a "-done" waits for was done by the "-start" before it.
_NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
}
NESTING = {"while", "conditional", "call", "async-start"}
_SAME = {"bitcast", "copy", "reshape", "get-tuple-element", "convert"}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction gives: "bf16", (32, 96), and the memory that it lies in (0: the main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[1]) if digits else 0
        return math.ceil(self.elements * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is its text after the operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str  # the text between the brackets, for parameters and constants

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """Where in the Python code it comes from, as JAX names it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        names = [name for _, name in _CALLED.findall(self.attributes)]
        for group in _BRANCHES.findall(self.attributes):
            names += re.findall(r"%?([\w.\-]+)", group)
        return tuple(names)

    def __str__(self) -> str:
        arrays = ", ".join(map(str, self.arrays))
        return f"{self.name} = {arrays} {self.target or self.opcode}: {self.source}"


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions; the last one, or that marked ROOT, is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, number: int) -> Instruction:
        return self._parameters[number]

    @functools.cached_property
    def _parameters(self) -> dict[int, Instruction]:
        return {int(each.argument): each for each in self.instructions.values() if each.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found.setdefault(name, []).append(each)
        return found


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that is not inside of a fusion, and the computation that it stands in."""

    instruction: Instruction
    computation: Computation


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and the one that it starts with."""

    computations: dict[str, Computation]
    entry: Computation

    def steps(self, start: Computation | None = None) -> Iterator[Step]:
        """The instructions of the entry, and of loops and branches inside of it."""
        computation = start or self.entry
        for each in computation.instructions.values():
            yield Step(each, computation)
            for name in each.called if each.opcode in NESTING else ():
                yield from self.steps(self.computations[name])

    def turns(self, loop: Instruction, where: Computation) -> int | None:
        """How many turns a while loop takes; None if the compiler does not know."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        # libtpu does not write it down. A loop counts if its condition is `number < constant`, with the number from 0.
        condition = self.computations[loop.attribute(r"\bcondition=%?([\w.\-]+)") or ""]
        root = condition.root
        if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT" or root.arrays[0].dims:
            return None
        number, limit = (condition.instructions[name] for name in root.operands)
        begin = where.instructions[loop.operands[0]]
        if number.opcode != "get-tuple-element" or limit.opcode != "constant" or begin.opcode != "tuple":
            return None
        first = where.instructions[begin.operands[int(number.attribute(r"index=(\d+)") or 0)]]
        while first.opcode in _SAME:
            first = where.instructions[first.operands[0]]
        return int(limit.argument) if (first.opcode, first.argument) == ("constant", "0") else None


def conditionals(program: Program) -> list[str]:
    """The branches that are taken while the program runs: on a GPU the host waits for each."""
    return [str(step.instruction) for step in program.steps() if step.instruction.opcode == "conditional"]


def open_loops(program: Program) -> list[str]:
    """The loops whose number of turns only the device knows: on a GPU the host waits at every turn."""
    return [
        str(step.instruction)
        for step in program.steps()
        if step.instruction.opcode == "while" and program.turns(step.instruction, step.computation) is None
    ]


def loops(program: Program, start: Computation | None = None) -> list[tuple[Instruction, int | None, Computation]]:
    """The loops of one computation, by default the entry, without those inside: (loop, turns if known, its body)."""
    where = start or program.entry
    return [
        (each, program.turns(each, where), program.computations[each.attribute(r"\bbody=%?([\w.\-]+)") or ""])
        for each in where.instructions.values()
        if each.opcode == "while"
    ]


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`. Raises ValueError if it is no HLO."""
    computations: dict[str, Computation] = {}
    entry, name, instructions, root, is_entry = None, "", dict[str, Instruction](), None, False
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions, root, is_entry = header[2], {}, None, bool(header[1])
        elif line == "}":
            last = root or next(reversed(instructions.values()))
            computations[name] = Computation(name, instructions, last)
            entry = computations[name] if is_entry else entry
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            instructions[instruction.name] = instruction
            root = instruction if found[1] else root
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY")
    return Program(computations, entry)


def runs(each: Instruction) -> bool:
    """Whether an instruction does something by itself: on a GPU, whether a kernel or a copy is started for it."""
    return not (each.opcode in _NOTHING or each.opcode in NESTING or each.opcode.endswith("-done"))


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = closing(rest, 0, " ")
    arguments = rest.index("(", shape_end)
    end = closing(rest, arguments + 1, ")")
    inside = rest[arguments + 1 : end]
    opcode = rest[shape_end:arguments].strip()
    operands = () if opcode in {"parameter", "constant"} else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, _arrays(rest[:shape_end]), operands, rest[end + 1 :], inside)


def closing(text: str, begin: int, end: str) -> int:
    """The place of the first `end` that is not inside of brackets that open after `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        if depth == 0 and text[place] == end:
            return place
        depth += (text[place] in "({[") - (text[place] in ")}]")
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(each.strip("<= ")) for each in dims.split(",") if each.strip())
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)
