"""What a TPU's program reads from its memory (HBM) and writes to it in one call.

Counted instruction by instruction as the program is scheduled, in the padded size that arrays have
in memory: operands and results of what runs, but for arrays that lie in the chip's vector memory,
of which the copies from and to HBM count. A fusion that takes slices of an operand reads these, and
one that changes a part of an array writes that part.
"""

import re
from collections.abc import Iterable

from enat_jax.profiling import collectives, hlo_products, hlo_text
from enat_jax.profiling.hlo_text import Instruction, Module

# They move nothing, or what they call does.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "iota", "copy-done", "slice-done", "async-done"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module) -> int:
    """Returns the bytes that one device reads and writes; a loop's body counts every time."""
    return sum(_moved(module, instruction) * count for instruction, count in scheduled(module))


def scheduled(module: Module) -> hlo_text.Visits:
    """Returns what runs one after another, fusions as a whole, with how often it does."""
    names = _scheduled(module)

    def wanted(instruction: Instruction) -> bool:
        return instruction.computation in names and instruction.opcode not in _FREE

    return hlo_text.visits(module, wanted, lambda x: _moved(module, x))


def _scheduled(module: Module) -> set[str]:
    """Returns the names of the computations whose instructions run one after another."""
    found, left = set(), [module.entry]
    keys = ("body", "condition", "branch_computations", "true_computation", "false_computation")
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for x in module.computations[name].values():
            if x.opcode in ("while", "conditional"):
                left += x.called(*keys)
            elif x.opcode == "call":
                left += x.called("to_apply")
    return found


def _moved(module: Module, instruction: Instruction) -> int:
    opcode = instruction.opcode
    sizes = [_size(instruction, i) for i in range(len(instruction.arrays))]
    if opcode == "copy-start":
        return sum(sizes[:2])
    if opcode == "slice-start":
        return 2 * min(sizes[:2])
    if opcode.endswith(("-start", "-done")):
        return sum(sizes) if opcode.endswith("-start") else 0
    sources = [module.operand(instruction, i) for i in range(len(instruction.operands))]
    if opcode in _SLICES:
        return sizes[0] + min(sizes[0], _size(sources[0]))
    if opcode == "dynamic-update-slice":
        return min(2 * _size(sources[1]), 2 * sizes[0])
    if opcode != "fusion":
        return sum(sizes) + sum(map(_size, sources))
    # The buffers of a collective that is under way are handed from one fusion to the next.
    role = collectives.role(module, instruction)
    if role == "begin":
        return _size(sources[0]) + sizes[1]
    if role == "end":
        return 0
    passed = dict(_passed(instruction)) if role == "part" else {}
    read = sum(
        min(_size(source), _read(module, instruction, i))
        for i, source in enumerate(sources)
        if i not in passed.values()
    )
    return read + sum(
        _written(module, instruction, i, size) for i, size in enumerate(sizes) if i not in passed
    )


def _size(instruction: Instruction, place: int = 0) -> int:
    """Returns the padded bytes of an array of a result; 0 where it does not lie in HBM."""
    if place >= len(instruction.arrays):
        return 0
    array = instruction.arrays[place]
    if not array.shape:
        return 0  # scalars have a memory of their own
    layout = instruction.layouts[place] if instruction.layouts else ""
    if re.search(r"S\([1-9]", layout):
        return 0
    shape = hlo_products.padded_shape(array.shape, layout)
    return hlo_text.Array(array.dtype, shape).num_bytes


def _passed(fusion: Instruction) -> Iterable[tuple[int, int]]:
    """Yields the places of results that are operands, and the places of these."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?)\}, \w+=", fusion.attributes)
    for result, operand in re.findall(r"\{(\d*)\}: \((\d+),", found.group(1) if found else ""):
        yield int(result or 0), int(operand)


def _read(module: Module, fusion: Instruction, place: int) -> int:
    """Returns the bytes of an operand that a fusion reads, if it lies in HBM."""
    return _used(module, module.parameter(fusion, place))


def _used(module: Module, value: Instruction) -> int:
    shape = hlo_products.padded_shape(value.arrays[0].shape, value.layouts[0])
    whole = hlo_text.Array(value.arrays[0].dtype, shape).num_bytes
    total = 0
    for user in module.users(value):
        first = user.operands[0] == value.name
        if user.opcode in _SLICES and first:
            total += user.arrays[0].num_bytes
        elif user.opcode == "bitcast" and not user.is_root:
            total += _used(module, user)
        elif user.opcode == "fusion":
            places = (i for i, name in enumerate(user.operands) if name == value.name)
            total += sum(_read(module, user, i) for i in places)
        elif user.opcode != "dynamic-update-slice" or not first:
            return whole
    return min(total, whole)


def _written(module: Module, fusion: Instruction, place: int, size: int) -> int:
    """Returns the bytes that a fusion writes of one of its results, which has ``size``."""
    root = module.root(fusion)
    if root.opcode == "tuple":
        root = module.operand(root, place)
    while root.opcode == "bitcast":
        root = module.operand(root, 0)
    if root.opcode == "dynamic-update-slice":
        return min(size, module.operand(root, 1).arrays[0].num_bytes)
    return size
