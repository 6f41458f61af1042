"""Reads the text of a compiled program (XLA's HLO): which arrays it writes, what it moves, how often, and its loops.

Only what is stored in the device's main memory counts: not what lies inside of a fusion, and not what the compiler put
into a TPU's fast memory (memory spaces other than 0). Writing into an array in place counts as what is written, not as
the array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # of the dtypes whose names do not end in their bits
# What stores nothing. The results of "-done" were stored by the "-start" before it.
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
_NESTING = {"while", "conditional", "call", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that holds what is written; the target is the first
_STARTED = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}  # which result is the copy
_SAME = {"bitcast", "copy", "reshape", "get-tuple-element", "convert"}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \(\d+")


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


_UNKNOWN = Array("opaque", ())  # what a kernel of ours writes in place: little


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
            for name in each.called if each.opcode in _NESTING else ():
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

    def stored(self, step: Step) -> list[Array]:
        """The arrays of the main memory that an instruction writes as a whole."""
        return [array for array, update in self._results(step) if update is None and array.space == 0]

    def written(self, step: Step) -> list[Array]:
        """All that an instruction writes into the main memory: of an array that is written in place, the new part."""
        results = [update or array for array, update in self._results(step) if array.space == 0]
        return [array for array in results if array is not _UNKNOWN]

    def _results(self, step: Step) -> list[tuple[Array, Array | None]]:
        """An instruction's results, each with what is written of it if it lies where one of the operands lay."""
        each = step.instruction
        if not runs(each):
            return []
        arrays = (each.arrays[_STARTED[each.opcode]],) if each.opcode in _STARTED else each.arrays
        if each.opcode in _IN_PLACE:
            return [(arrays[0], step.computation.instructions[each.operands[_IN_PLACE[each.opcode]]].arrays[0])]
        if each.opcode == "fusion":
            fused = self.computations[each.called[0]]
            parts = fused.root.operands if fused.root.opcode == "tuple" else [fused.root.name]
            roots = [part for part in parts for _ in fused.instructions[part].arrays]
            updates = [self._update_in_place(fused, root) for root in roots]
            return [(array, update and update[0]) for array, update in zip(arrays, updates, strict=True)]
        aliased = _aliased(each) if each.opcode == "custom-call" else set[int]()
        return [(array, _UNKNOWN if number in aliased else None) for number, array in enumerate(arrays)]

    def _update_in_place(self, fused: Computation, root: str) -> tuple[Array, int] | None:
        """What a fusion writes into a parameter, and this one's number, if a result is a parameter with a new part."""
        each = _source(fused, root)
        if each.opcode in _IN_PLACE:
            update, target = fused.instructions[each.operands[_IN_PLACE[each.opcode]]].arrays[0], each.operands[0]
        elif each.opcode == "fusion" and len(each.arrays) == 1:
            inner = self.computations[each.called[0]]
            found = self._update_in_place(inner, inner.root.name)
            if found is None:
                return None
            update, target = found[0], each.operands[found[1]]
        else:
            return None
        parameter = _source(fused, target)
        while parameter.opcode in _IN_PLACE:  # several updates after one another
            parameter = _source(fused, parameter.operands[0])
        return (update, int(parameter.argument)) if parameter.opcode == "parameter" else None

    def read(self, step: Step, shares: Mapping[tuple[int, ...], float] | None = None) -> float:
        """The bytes of the main memory that an instruction reads.

        Args:
          shares: by an array's shape, the share of it that a kernel of ours reads, which the text does not tell.
        """
        each = step.instruction
        if not runs(each):
            return 0
        total = 0.0
        for number, name in enumerate(each.operands):
            if name in each.operands[:number] and each.opcode != "fusion":
                continue
            array = step.computation.instructions[name].arrays[0]
            if array.space != 0:
                continue
            if each.opcode == "fusion":
                total += self._read_of_parameter(self.computations[each.called[0]], number)
            elif each.opcode.removesuffix("-start") in _SLICES:
                total += min(each.arrays[_STARTED.get(each.opcode, 0)].bytes, array.bytes)
            elif each.opcode == "custom-call":
                total += array.bytes * (shares or {}).get(array.dims, 1)
            elif not (each.opcode in _IN_PLACE and number == 0):
                total += array.bytes
        return total

    def _read_of_parameter(self, fused: Computation, number: int) -> int:
        """How many bytes of a parameter a fusion reads: all, or the slices that it takes, or none if it writes it."""
        whole = fused.parameter(number).arrays[0].bytes
        read, names = 0, [fused.parameter(number).name]
        while names:
            name = names.pop()
            for user in fused.users.get(name, []):
                if user.opcode in {"bitcast", "get-tuple-element"}:
                    names.append(user.name)
                elif user.opcode in _SLICES and user.operands[0] == name:
                    read += user.arrays[0].bytes
                elif user.opcode == "fusion":
                    inner = self.computations[user.called[0]]
                    read += sum(
                        self._read_of_parameter(inner, i) for i, each in enumerate(user.operands) if each == name
                    )
                elif not (user.opcode in _IN_PLACE and user.operands[0] == name):
                    return whole
        return min(read, whole)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a program takes.

    Attributes:
      read, written: bytes of the main memory.
      launches: instructions that run by themselves: on a GPU, kernels and copies that are started.
    """

    read: float
    written: float
    launches: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.launches + other.launches)


def cost(
    program: Program, start: Computation | None = None, shares: Mapping[tuple[int, ...], float] | None = None
) -> Cost:
    """Adds up a program, or one of its computations, with the loops inside, and of branches those that take most.

    Of loops whose number of turns only the device knows, one turn is counted. `shares` is that of `Program.read`.
    """
    computation = start or program.entry
    total = Cost(0, 0, 0)
    for each in computation.instructions.values():
        inside = [cost(program, program.computations[name], shares) for name in each.called if each.opcode in _NESTING]
        if each.opcode == "conditional":
            total += max(inside, key=lambda branch: branch.read + branch.written)
        elif each.opcode in _NESTING:
            turns = program.turns(each, computation) or 1 if each.opcode == "while" else 1
            for part in inside:
                total += Cost(turns * part.read, turns * part.written, turns * part.launches)
        elif runs(each):
            step = Step(each, computation)
            written = sum(array.bytes for array in program.written(step))
            total += Cost(program.read(step, shares), written, 1)
    return total


def large_writes(program: Program, elements: int, rows: Collection[int] = ()) -> list[str]:
    """The instructions that write an array of at least so many elements, as text.

    Args:
      rows: arrays with an axis of one of these lengths are activations, and do not count.
    """
    return [
        f"{array} by {step.instruction}"
        for step in program.steps()
        for array in program.stored(step)
        if array.elements >= elements and not set(rows) & set(array.dims)
    ]


def scores(program: Program, queries: int, keys: int) -> list[str]:
    """The instructions that write an array with an axis for queries and another for keys, as text."""
    found = []
    for step in program.steps():
        for array in program.stored(step):
            dims = list(array.dims)
            if queries in dims and (dims.remove(queries) or keys in dims):
                found.append(f"{array} by {step.instruction}")
    return found


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
    return not (each.opcode in _NOTHING or each.opcode in _NESTING or each.opcode.endswith("-done"))


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0, " ")
    arguments = rest.index("(", shape_end)
    end = _closing(rest, arguments + 1, ")")
    inside = rest[arguments + 1 : end]
    opcode = rest[shape_end:arguments].strip()
    operands = () if opcode in {"parameter", "constant"} else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, _arrays(rest[:shape_end]), operands, rest[end + 1 :], inside)


def _closing(text: str, begin: int, end: str) -> int:
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


def _source(fused: Computation, name: str) -> Instruction:
    each = fused.instructions[name]
    while each.opcode == "bitcast":
        each = fused.instructions[each.operands[0]]
    return each


def _aliased(call: Instruction) -> set[int]:
    """The numbers of a custom call's results that are written into its operands' memory."""
    begin = call.attributes.find("output_to_operand_aliasing={")
    if begin < 0:
        return set()
    begin += len("output_to_operand_aliasing={")
    text = call.attributes[begin : _closing(call.attributes, begin, "}")]
    return {int(path or 0) for path in (each.replace(" ", "") for each in _ALIAS.findall(text)) if "," not in path}
