"""What can be said of the values in a compiled program without running it.

Two questions about collectives need it: whether float32 values were 16-bit ones just before, and
which part of an array each device takes for itself.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from enat_jax.profiling.hlo_text import Array, Instruction, Module

# They pass values on as they are, in another order or another dtype at most.
_MOVES = ("bitcast", "copy", "reshape", "transpose", "convert")
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "and": np.bitwise_and,
    "shift-right-logical": np.right_shift,
    "select": np.where,
    "clamp": lambda low, x, high: np.clip(x, low, high),
}
_COMPARISONS = {"LT": np.less, "LE": np.less_equal, "EQ": np.equal, "GT": np.greater}
_16_BIT = ("bf16", "f16")


def narrow_dtype(module: Module, instruction: Instruction) -> str | None:
    """Returns the 16-bit float dtype that all values of a float32 result come from, or None.

    Looks through moves and fusions for the conversion that made the values wide.
    """
    if instruction.arrays[0].dtype in _16_BIT:
        return instruction.arrays[0].dtype
    if instruction.opcode == "fusion":
        return narrow_dtype(module, module.root(instruction))
    if instruction.opcode in _MOVES:
        return narrow_dtype(module, module.operand(instruction, 0))
    return None


# --- parts of an array ----------------------------------------------------------------------


def slices_of(
    module: Module, instruction: Instruction, place: int
) -> list[tuple[Array, Int[np.ndarray, "devices dimensions"]]] | None:
    """Returns the slices that are all that is used of an array.

    Args:
        module: the program.
        instruction: whose result the array is.
        place: of the array in the result.

    Returns:
        The type of each slice and where it begins on each device, int64. None if anything else is
        used, or if offsets are not known.
    """
    users = module.users(instruction)
    if len(instruction.arrays) > 1:
        users = [user for user in users if _index(user) == place]
        if len(users) != 1:
            return None
        (instruction,) = users
        users = module.users(instruction)
    found = []
    for user in users:
        if user.opcode == "fusion":
            places = [i for i, name in enumerate(user.operands) if name == instruction.name]
            inner = [slices_of(module, module.parameter(user, i), 0) for i in places]
        elif user.opcode in ("bitcast", "copy", "reshape", "convert") and not user.is_root:
            inner = [slices_of(module, user, 0)]
        elif user.opcode == "dynamic-slice" and user.operands[0] == instruction.name:
            starts = [value(module, module.operand(user, i)) for i in range(1, len(user.operands))]
            known = [start for start in starts if start is not None]
            if len(known) < len(starts):
                return None
            inner = [[(user.arrays[0], np.concatenate(known, axis=1))]]
        else:
            return None
        for part in inner:
            if part is None:
                return None
            found += part
    return found


def value(module: Module, instruction: Instruction) -> Int[np.ndarray, "devices size"] | None:
    """Returns the integers of a result on each device; None if they are not known."""
    opcode = instruction.opcode
    devices = module.num_partitions
    if opcode == "partition-id":
        return np.arange(devices)[:, None]
    if opcode == "constant":
        numbers = re.fullmatch(r"\{?(-?\d+(?:, *-?\d+)*)\}?", instruction.arguments)
        if numbers is None:
            return None
        return np.tile([int(x) for x in numbers.group(1).split(",")], (devices, 1))
    if opcode == "parameter":
        caller = module.caller(instruction.computation)
        if caller is None or caller.opcode != "fusion":
            return None
        return value(module, module.operand(caller, int(instruction.arguments)))
    if opcode == "fusion":
        return value(module, module.root(instruction))
    if opcode == "get-tuple-element":
        source = _element(module, module.operand(instruction, 0), _index(instruction))
        return None if source is None else value(module, source)
    operands = []
    for i in range(_arity(instruction)):
        operand = value(module, module.operand(instruction, i))
        if operand is None:
            return None
        operands.append(operand)
    if not operands:
        return None
    if opcode in ("bitcast", "copy", "reshape", "convert"):
        return operands[0]
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](*operands)
    if opcode == "compare":
        (direction,) = re.findall(r"direction=(\w+)", instruction.attributes)
        compare = _COMPARISONS.get(direction)
        return None if compare is None else compare(*operands)
    if opcode == "dynamic-slice" and len(operands) == 2 and instruction.arrays[0].size == 1:
        table, start = operands
        return np.take_along_axis(table, np.clip(start, 0, table.shape[1] - 1), axis=1)
    return None


def _arity(instruction: Instruction) -> int:
    known = (*_ARITHMETIC, "bitcast", "copy", "reshape", "convert", "dynamic-slice", "compare")
    return len(instruction.operands) if instruction.opcode in known else 0


def _index(instruction: Instruction) -> int:
    """Returns which element a get-tuple-element takes; -1 for any other instruction."""
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(found.group(1)) if found and instruction.opcode == "get-tuple-element" else -1


def _element(module: Module, source: Instruction, index: int) -> Instruction | None:
    """Returns what is behind one element of a tuple, through loops that do not change it."""
    if source.opcode == "tuple":
        return module.operand(source, index)
    if source.opcode == "while":
        return _before(module, source, index)
    if source.opcode == "parameter":
        caller = module.caller(source.computation)
        if caller is not None and caller.opcode == "while":
            return _before(module, caller, index)
    return None


def _before(module: Module, loop: Instruction, index: int) -> Instruction | None:
    """Returns the instruction behind an element before a loop whose body passes it on, or None."""
    (body,) = loop.called("body")
    root = next(x for x in module.computations[body].values() if x.is_root)
    if root.opcode != "tuple":
        return None
    last = module.operand(root, index)
    while last.opcode == "copy":
        last = module.operand(last, 0)
    if _index(last) != index or module.operand(last, 0).opcode != "parameter":
        return None
    return _element(module, module.operand(loop, 0), index)
