"""What the instructions of a compiled program write and read.

Only what is stored in the device's main memory counts: not what lies inside of a fusion, and not what the compiler put
into a TPU's fast memory (memory spaces other than 0). Writing into an array in place counts as what is written, not as
the array.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from hlo import NESTING, Array, Computation, Instruction, Program, Step, closing, runs

_SLICES = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that holds what is written; the target is the first
_STARTED = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}  # which result is the copy
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+)")
_UNKNOWN = Array("opaque", ())  # what a kernel of ours writes in place: little


def stored(program: Program, step: Step) -> list[Array]:
    """The arrays of the main memory that an instruction writes as a whole."""
    return [array for array, update in _results(program, step) if update is None and array.space == 0]


def written(program: Program, step: Step) -> list[Array]:
    """All that an instruction writes into the main memory: of an array that is written in place, the new part."""
    results = [update or array for array, update in _results(program, step) if array.space == 0]
    return [array for array in results if array is not _UNKNOWN]


def _results(program: Program, step: Step) -> list[tuple[Array, Array | None]]:
    """An instruction's results, each with what is written of it if it lies where one of the operands lay."""
    each = step.instruction
    if not runs(each):
        return []
    arrays = (each.arrays[_STARTED[each.opcode]],) if each.opcode in _STARTED else each.arrays
    if each.opcode in _IN_PLACE:
        return [(arrays[0], step.computation.instructions[each.operands[_IN_PLACE[each.opcode]]].arrays[0])]
    if each.opcode == "fusion":
        fused = program.computations[each.called[0]]
        parts = fused.root.operands if fused.root.opcode == "tuple" else [fused.root.name]
        roots = [part for part in parts for _ in fused.instructions[part].arrays]
        updates = [_update_in_place(program, fused, root) for root in roots]
        return [(array, update and update[0]) for array, update in zip(arrays, updates, strict=True)]
    aliased = _aliased(each) if each.opcode == "custom-call" else {}
    return [(array, _UNKNOWN if number in aliased else None) for number, array in enumerate(arrays)]


def _update_in_place(program: Program, fused: Computation, root: str) -> tuple[Array, int] | None:
    """What a fusion writes into a parameter, and this one's number, if a result is a parameter with a new part."""
    each = _source(fused, root)
    if each.opcode in _IN_PLACE:
        update, target = fused.instructions[each.operands[_IN_PLACE[each.opcode]]].arrays[0], each.operands[0]
    elif each.opcode == "fusion" and len(each.arrays) == 1:
        inner = program.computations[each.called[0]]
        found = _update_in_place(program, inner, inner.root.name)
        if found is None:
            return None
        update, target = found[0], each.operands[found[1]]
    else:
        return None
    parameter = _source(fused, target)
    while parameter.opcode in _IN_PLACE:  # several updates after one another
        parameter = _source(fused, parameter.operands[0])
    return (update, int(parameter.argument)) if parameter.opcode == "parameter" else None


def read(program: Program, step: Step, shares: Mapping[tuple[int, ...], float] | None = None) -> float:
    """The bytes of the main memory that an instruction reads.

    Args:
      shares: by an array's shape, the share of it that a kernel of ours reads, which the text does not tell.
    """
    each = step.instruction
    if not runs(each):
        return 0
    total, overwritten = 0.0, _overwritten(each)
    for number, name in enumerate(each.operands):
        if (name in each.operands[:number] and each.opcode != "fusion") or number in overwritten:
            continue
        array = step.computation.instructions[name].arrays[0]
        if array.space != 0:
            continue
        if each.opcode == "fusion":
            total += _read_of_parameter(program, program.computations[each.called[0]], number)
        elif each.opcode.removesuffix("-start") in _SLICES:
            total += min(each.arrays[_STARTED.get(each.opcode, 0)].bytes, array.bytes)
        elif each.opcode == "custom-call":
            total += array.bytes * (shares or {}).get(array.dims, 1)
        elif not (each.opcode in _IN_PLACE and number == 0):
            total += array.bytes
    return total


def _read_of_parameter(program: Program, fused: Computation, number: int) -> int:
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
                inner = program.computations[user.called[0]]
                read += sum(
                    _read_of_parameter(program, inner, i) for i, each in enumerate(user.operands) if each == name
                )
            elif not (user.opcode in _IN_PLACE and user.operands[0] == name):
                return whole
    return min(read, whole)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a program takes.

    Attributes:
      read, written: bytes of the main memory.
      kernels: the bytes of each instruction that runs by itself: on a GPU, of each kernel or copy that is started.
    """

    read: float = 0
    written: float = 0
    kernels: tuple[float, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.kernels + other.kernels)

    def times(self, turns: int) -> Cost:
        """What this many turns of it take."""
        return Cost(turns * self.read, turns * self.written, turns * self.kernels)


def cost(
    program: Program, start: Computation | None = None, shares: Mapping[tuple[int, ...], float] | None = None
) -> Cost:
    """Adds up a program, or one of its computations, with the loops inside, and of branches those that take most.

    Of loops whose number of turns only the device knows, one turn is counted. `shares` is that of `read`.
    """
    computation = start or program.entry
    total = Cost()
    for each in computation.instructions.values():
        inside = [cost(program, program.computations[name], shares) for name in each.called if each.opcode in NESTING]
        if each.opcode == "conditional":
            total += max(inside, key=lambda branch: branch.read + branch.written)
        elif each.opcode in NESTING:
            turns = program.turns(each, computation) or 1 if each.opcode == "while" else 1
            for part in inside:
                total += part.times(turns)
        elif runs(each):
            step = Step(each, computation)
            old, new = read(program, step, shares), sum(array.bytes for array in written(program, step))
            total += Cost(old, new, (old + new,))
    return total


def large_writes(program: Program, elements: int, rows: Collection[int] = ()) -> list[str]:
    """The instructions that write an array of at least so many elements, as text.

    Args:
      rows: arrays with an axis of one of these lengths are activations, and do not count.
    """
    return [
        f"{array} by {step.instruction}"
        for step in program.steps()
        for array in stored(program, step)
        if array.elements >= elements and not set(rows) & set(array.dims)
    ]


def scores(program: Program, queries: int, keys: int) -> list[str]:
    """The instructions that write an array with an axis for queries and another for keys, as text."""
    found = []
    for step in program.steps():
        for array in stored(program, step):
            dims = list(array.dims)
            if queries in dims and (dims.remove(queries) or keys in dims):
                found.append(f"{array} by {step.instruction}")
    return found


def _source(fused: Computation, name: str) -> Instruction:
    each = fused.instructions[name]
    while each.opcode == "bitcast":
        each = fused.instructions[each.operands[0]]
    return each


def _aliased(call: Instruction) -> dict[int, int]:
    """Of a custom call's results that are written into its operands' memory: {result: operand}, by their numbers."""
    begin = call.attributes.find("output_to_operand_aliasing={")
    if begin < 0:
        return {}
    begin += len("output_to_operand_aliasing={")
    text = call.attributes[begin : closing(call.attributes, begin, "}")]
    return {int(result or 0): int(operand) for result, operand in _ALIAS.findall(text)}


def _overwritten(call: Instruction) -> set[int]:
    """The numbers of the operands that a custom call does not read, because all that it does is to write into them."""
    aliased = _aliased(call) if call.opcode == "custom-call" else {}
    others = (array for number, array in enumerate(call.arrays) if number not in aliased)
    return set() if any(array.elements for array in others) else set(aliased.values())
