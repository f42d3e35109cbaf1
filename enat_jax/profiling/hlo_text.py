"""Reads XLA's optimised program text: what runs on one device, and how often.

``compiled.as_text()`` of a jitted function prints the program of one partition after XLA has
divided it: computations of instructions, which call each other. A loop's body is printed once;
``visits`` finds every instruction that runs, with the number of its runs in one call.

The programs of TPUs say more: they are printed in the order in which they run, and every array has
a layout such as ``{1,0:T(8,128)(2,1)S(1)}``, its dimensions from the least to the largest stride,
the tile that its last two are padded to, and where it lies: nothing behind is HBM, S(1) is the
chip's vector memory.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple


class Array(NamedTuple):
    """An array type: XLA's name of the dtype, such as "bf16", and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements, of types of less than 8 bits packed."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique within its computation.
        computation: the name of its computation.
        opcode: such as "all-reduce".
        arrays: types of the result, in order; a tuple has several.
        operands: names of instructions of the same computation.
        arguments: text between the parentheses.
        attributes: text behind the parentheses.
        is_root: whether its result is that of the computation.
        layouts: of the arrays, the text between the braces behind them; "" where there are none.
    """

    name: str
    computation: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool
    layouts: tuple[str, ...] = ()

    @property
    def op_name(self) -> str:
        """The place in the traced function that it comes from; "" if XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations under these attributes, such as "body"."""
        names: list[str] = []
        for key in keys:
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            names += re.findall(r"[\w.\-]+", found.group(1)) if found else []
        return names


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
        computations: name -> {instruction name -> ``Instruction``}, in the printed order.
        entry: name of the computation that is called from outside.
        num_partitions: devices that the program is divided over.
        is_of_tpu: whether it has the tiles of TPUs in its layouts.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_partitions: int
    is_of_tpu: bool = False

    def operand(self, instruction: Instruction, place: int) -> Instruction:
        """Returns the instruction whose result is this operand."""
        return self.computations[instruction.computation][instruction.operands[place]]

    def root(self, instruction: Instruction) -> Instruction:
        """Returns the instruction whose result is that of the computation that a fusion calls."""
        (name,) = instruction.called("calls")
        return next(x for x in self.computations[name].values() if x.is_root)

    def element(self, source: Instruction, place: int) -> Instruction:
        """Returns the instruction behind an element of a tuple, or the tuple where it is hidden."""
        return self.operand(source, place) if source.opcode == "tuple" else source

    def parameter(self, instruction: Instruction, place: int) -> Instruction:
        """Returns what stands for an operand within the computation that a fusion calls."""
        (name,) = instruction.called("calls")
        found = (x for x in self.computations[name].values() if x.opcode == "parameter")
        return next(x for x in found if int(x.arguments) == place)

    def users(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that have this one among their operands."""
        found = self.computations[instruction.computation].values()
        return [x for x in found if instruction.name in x.operands]

    def caller(self, computation: str) -> Instruction | None:
        """Returns the instruction that calls a computation; None if there is not exactly one."""
        callers = self._callers.get(computation, [])
        return callers[0] if len(callers) == 1 else None

    @functools.cached_property
    def _callers(self) -> dict[str, list[Instruction]]:
        callers: dict[str, list[Instruction]] = {}
        for instructions in self.computations.values():
            for instruction in instructions.values():
                for name in instruction.called("calls", "to_apply", "body", "condition"):
                    callers.setdefault(name, []).append(instruction)
        return callers


_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{\n((?:.*\n)*?)\}", re.MULTILINE
)
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TRIP_COUNT = re.compile(r'"?known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)"?\}')


def parse(text: str) -> Module:
    """Reads the text of ``compiled.as_text()``.

    Raises:
        ValueError: the text is no program, or has a line that cannot be read.
    """
    if not text.startswith("HloModule"):
        raise ValueError("this text is no compiled program: its first word is not HloModule")
    found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    computations: dict[str, dict[str, Instruction]] = {}
    entry: str | None = None
    for is_entry, name, body in _COMPUTATION.findall(text):
        instructions = [_instruction(line, name) for line in body.splitlines() if line.strip()]
        computations[name] = {x.name: x for x in instructions}
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("this program has no ENTRY computation")
    partitions = int(found.group(1)) if found else 1
    return Module(computations, entry, partitions, is_of_tpu=":T(" in text)


def _instruction(line: str, computation: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise ValueError(f"this line of a program cannot be read: {line.strip()[:200]}")
    root, name, rest = found.groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    found_arrays = _ARRAY.findall(rest[:end])
    arrays = tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes, _ in found_arrays
    )
    layouts = tuple(layout for *_, layout in found_arrays)
    opcode, _, tail = rest[end:].lstrip().partition("(")
    end = _closing("(" + tail)
    arguments, attributes = tail[: end - 2], tail[end - 1 :]
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        name, computation, opcode, arrays, operands, arguments, attributes, bool(root), layouts
    )


def _closing(text: str) -> int:
    """Returns the place behind the parenthesis that closes the one at the beginning."""
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")


Visits = list[tuple[Instruction, int]]


def visits(
    module: Module,
    wanted: Callable[[Instruction], bool],
    weight: Callable[[Instruction], float],
) -> Visits:
    """Returns the instructions that run in one call, with how often.

    A loop's body counts as often as XLA says that it runs, its condition once more. Of a
    conditional's branches the heaviest is taken, as if it always ran. An instruction that several
    calls reach appears several times.

    Args:
        module: the program.
        wanted: whether an instruction is returned.
        weight: of an instruction, to compare branches.

    Raises:
        ValueError: something wanted is in a loop whose number of runs XLA does not know.
    """

    @functools.cache
    def of(name: str) -> Visits:
        return [visit for x in module.computations[name].values() for visit in at(x)]

    def at(instruction: Instruction) -> Visits:
        found = [(instruction, 1)] if wanted(instruction) else []
        if instruction.opcode == "while":
            return found + loop(instruction)
        if instruction.opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [of(name) for name in instruction.called(*names)]
            return found + max(branches, key=lambda x: sum(weight(y) * count for y, count in x))
        return found + [x for name in instruction.called("calls", "to_apply") for x in of(name)]

    def loop(instruction: Instruction) -> Visits:
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        trips = _trips(module, instruction)
        if trips is None and (of(body) or of(condition)):
            raise ValueError(
                f"XLA does not say how often the loop {instruction.name} runs "
                f"({instruction.op_name or 'of unknown origin'}), so what is in it "
                "cannot be counted; give the loop a static length"
            )
        trips = trips or 0
        found = [(x, count * trips) for x, count in of(body)]
        return found + [(x, count * (trips + 1)) for x, count in of(condition)]

    return of(module.entry)


def _trips(module: Module, loop: Instruction) -> int | None:
    """Returns how often the body of a loop runs; None if the program does not say.

    XLA's note is taken, or, as programs of TPUs have none, the loop's counter: it begins as a
    constant, grows by another, and the loop ends where it is no longer less than a third.
    """
    if noted := _TRIP_COUNT.search(loop.attributes):
        return int(noted.group(1))
    ((body,), (condition,)) = loop.called("body"), loop.called("condition")
    ends = next(x for x in module.computations[condition].values() if x.is_root)
    if ends.opcode != "compare" or "direction=LT" not in ends.attributes:
        return None
    counter, last = (module.operand(ends, i) for i in (0, 1))
    place = re.search(r"\bindex=(\d+)", counter.attributes)
    root = next(x for x in module.computations[body].values() if x.is_root)
    if counter.opcode != "get-tuple-element" or place is None or root.opcode != "tuple":
        return None
    first = module.element(module.operand(loop, 0), int(place.group(1)))
    grown = _copied(module, module.operand(root, int(place.group(1))))
    if grown.opcode != "add":
        return None
    added = [_integer(module, module.operand(grown, i)) for i in (0, 1)]
    step = next((x for x in added if x), None)
    begin, end = _integer(module, first), _integer(module, last)
    if begin is None or end is None or step is None or step < 0:
        return None
    return max(-(-(end - begin) // step), 0)


def _copied(module: Module, instruction: Instruction) -> Instruction:
    """Returns what an instruction is a copy of, or the instruction."""
    while instruction.opcode in ("copy", "bitcast"):
        instruction = module.operand(instruction, 0)
    return instruction


def _integer(module: Module, instruction: Instruction) -> int | None:
    """Returns the value of a constant integer, also behind copies; None for anything else."""
    instruction = _copied(module, instruction)
    known = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if known else None
