"""What a compiled program communicates: its collectives, from XLA's text of one partition.

Bytes come in two kinds. The payload is the array that a collective is about: what is reduced, what
has been gathered. The moved bytes are what each device sends by the usual ring algorithm, in a
group of g devices:

    all-reduce            2 (g - 1) / g x payload
    all-gather              (g - 1) / g x payload, the gathered array
    reduce-scatter          (g - 1) / g x payload, the array before
    all-to-all              (g - 1) / g x payload
    collective-permute                1 x payload

XLA's CPU backend, on which a program for many devices can be compiled without having them, differs
from accelerators in two ways that matter here. It has no pass that turns an all-reduce of which
each device keeps a part of its own into a reduce-scatter. And it carries out collectives of
bfloat16 in float32. ``Collective.on_accelerator`` undoes both, where the text shows them.

The text of a program for TPUs is what they run, and ``on_accelerator`` changes nothing in it but
the name of a fusion of an all-reduce and the part of it that a device keeps. It also says what runs
beside computation: a collective may be begun by one instruction and waited for by another, and the
program is printed in the order in which it runs. TPUs may carry out parts of a collective within
the products between the two; all of these parts are one collective.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Self

import numpy as np
from jaxtyping import Int

from enat_jax.profiling import hlo_text, hlo_values

Groups = tuple[tuple[int, ...], ...]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These would move bytes that are not counted.
_UNCOUNTED = ("collective-broadcast", "ragged-all-to-all", "send", "recv")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of one collective instruction; combined instructions have several arrays.

    Attributes:
        kind: one of ``KINDS``.
        dtype: of the payload, by XLA's name.
        shape: of the payload.
        groups: the devices (places in the mesh's order) that communicate with each other; for a
            collective-permute the pairs (source, target).
        count: runs in one call of the program.
        computation: where the text has it.
        instruction: its name there.
        op_name: where it comes from in the traced function.
        values_dtype: the 16-bit dtype that all values come from, where XLA widened it; else
            ``dtype``.
        scattered: whether it is an all-reduce of which each device of a group uses a part of its
            own, one g-th of the array, and nothing else.
        beside: whether it runs beside computation: some is scheduled between its begin and its end.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: Groups
    count: int
    computation: str
    instruction: str
    op_name: str
    values_dtype: str
    scattered: bool = False
    beside: bool = False

    @property
    def group_size(self) -> int:
        """Devices of the largest group."""
        return max(map(len, self.groups), default=1)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the array of one run."""
        return hlo_text.Array(self.dtype, self.shape).num_bytes

    @property
    def moved_bytes(self) -> float:
        """Bytes that each device sends in one run."""
        if self.kind == "collective-permute":
            return float(self.payload_bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (self.group_size - 1) / self.group_size * self.payload_bytes

    def on_accelerator(self) -> Self:
        """Returns what accelerators do: in the dtype of the values, scattered where it can be."""
        kind = "reduce-scatter" if self.scattered else self.kind
        return dataclasses.replace(self, kind=kind, dtype=self.values_dtype, scattered=False)


def find(text: str) -> list[Collective]:
    """Returns all collectives that one call of a compiled program runs, as the text has them.

    They come in the order of the text of each computation.

    Args:
        text: of ``compiled.as_text()``.

    Raises:
        ValueError: a line cannot be read, a collective is in a loop whose length XLA does not
            know, or is of a kind that is not counted here.
    """
    return find_in(hlo_text.parse(text))


def find_in(module: hlo_text.Module) -> list[Collective]:
    """Returns what ``find`` does of a program that has been read."""

    def wanted(instruction: hlo_text.Instruction) -> bool:
        return _is_collective(instruction) and not _continues(module, instruction)

    def moved_bytes(instruction: hlo_text.Instruction) -> float:
        return sum(x.moved_bytes for x in _arrays(module, instruction, 1))

    return [
        collective
        for instruction, count in hlo_text.visits(module, wanted, moved_bytes)
        for collective in _arrays(module, instruction, count)
    ]


def _is_collective(instruction: hlo_text.Instruction) -> bool:
    kind = instruction.opcode.removesuffix("-start")
    if kind in _UNCOUNTED:
        raise ValueError(f"{instruction.name} is a {kind}, whose bytes are not counted here")
    return kind in KINDS


def _arrays(
    module: hlo_text.Module, instruction: hlo_text.Instruction, count: int
) -> Iterator[Collective]:
    """Yields the ``Collective`` of each operand, which asynchronous forms have like all others."""
    kind = instruction.opcode.removesuffix("-start")
    groups = _groups(instruction, module.num_partitions)
    beside = _runs_beside(module, instruction)
    # XLA's pass that widens 16-bit reductions leaves this in the name of the sum.
    widened_sum = any("promoted" in name for name in instruction.called("to_apply"))
    for place, name in enumerate(instruction.operands):
        source = module.computations[instruction.computation][name]
        (array,) = source.arrays
        shape = array.shape
        if kind == "all-gather":
            (dimension,) = map(int, re.findall(r"\bdimensions=\{(\d+)\}", instruction.attributes))
            gathered = shape[dimension] * len(groups[0])
            shape = (*shape[:dimension], gathered, *shape[dimension + 1 :])
        narrow = None
        if not module.is_of_tpu:
            narrow = "bf16" if widened_sum else hlo_values.narrow_dtype(module, source)
        yield Collective(
            kind=kind,
            dtype=array.dtype,
            shape=shape,
            groups=groups,
            count=count,
            computation=instruction.computation,
            instruction=instruction.name,
            op_name=instruction.op_name,
            values_dtype=narrow or array.dtype,
            scattered=kind == "all-reduce" and _is_scattered(module, instruction, place, groups),
            beside=beside,
        )


def _is_scattered(
    module: hlo_text.Module, instruction: hlo_text.Instruction, place: int, groups: Groups
) -> bool:
    """Returns whether each device of a group uses one g-th of an all-reduce, all different."""
    if module.is_of_tpu:  # its own fusion, or else the whole sum is sent
        return instruction.computation.startswith("all-reduce-scatter")
    slices = hlo_values.slices_of(module, instruction, place)
    if not slices or len({len(group) for group in groups}) > 1:
        return False
    for part, offsets in slices:
        if part.size * len(groups[0]) != instruction.arrays[place].size:
            return False
        if any(len(np.unique(offsets[list(group)], axis=0)) < len(group) for group in groups):
            return False
    return True


# --- what runs beside computation -----------------------------------------------------------

_BEGIN, _END = "AsyncCollectiveStart", "AsyncCollectiveDone"
_UNDER_WAY = "async_collective_fusion_config"
_COMPUTING = ("fusion", "convolution", "dot", "while", "conditional", "reduce", "sort", "scatter")


def _continues(module: hlo_text.Module, instruction: hlo_text.Instruction) -> bool:
    """Returns whether a TPU's instruction goes on with a collective that another one has begun."""
    under_way = _UNDER_WAY in instruction.attributes
    return under_way and not _calls(module, instruction.computation, _BEGIN)


def _calls(module: hlo_text.Module, computation: str, target: str) -> bool:
    found = module.computations[computation].values()
    return any(x.opcode == "custom-call" and f'"{target}"' in x.attributes for x in found)


def _runs_beside(module: hlo_text.Module, instruction: hlo_text.Instruction) -> bool:
    """Returns whether computation is scheduled between the begin and the end of a collective."""
    begin = instruction
    channel = _channel(instruction)
    fused = _calls(module, instruction.computation, _BEGIN)
    while not begin.opcode.endswith("-start"):
        caller = module.caller(begin.computation)
        if caller is None or caller.opcode not in ("fusion", "async-start"):
            return False
        begin = caller
        if fused:
            break

    def ends(other: hlo_text.Instruction) -> bool:
        if not fused:
            return other.opcode.endswith("-done") and begin.name in other.operands
        callees = other.called("calls") if other.opcode == "fusion" else []
        return any(
            _calls(module, name, _END)
            and any(_channel(x) == channel for x in module.computations[name].values())
            for name in callees
        )

    schedule = list(module.computations[begin.computation].values())
    after = schedule[schedule.index(begin) + 1 :]
    between = list(itertools.takewhile(lambda x: not ends(x), after))
    return len(between) < len(after) and any(_computes(module, x) for x in between)


def _channel(instruction: hlo_text.Instruction) -> str:
    """Returns the number that all parts of a collective have; "" if there is none."""
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else ""


def role(module: hlo_text.Module, fusion: hlo_text.Instruction) -> str:
    """Returns what a fusion of a TPU is to a collective under way.

    Returns:
        "begin", "part" or "end"; "" for a fusion that has nothing to do with any.
    """
    names = fusion.called("calls")
    for target, role in ((_BEGIN, "begin"), (_END, "end")):
        if any(_calls(module, name, target) for name in names):
            return role
    found = (x for name in names for x in module.computations[name].values())
    return "part" if any(_UNDER_WAY in x.attributes for x in found) else ""


def _computes(module: hlo_text.Module, instruction: hlo_text.Instruction) -> bool:
    """Returns whether an instruction is more than the begin or the end of other collectives."""
    if instruction.opcode not in _COMPUTING:
        return False
    return role(module, instruction) not in ("begin", "end")


# --- groups ---------------------------------------------------------------------------------

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
_STRIDED = re.compile(r"replica_groups=" + _IOTA)
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((" + _IOTA + r")\))? \{([^}]*)\}"
)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(sizes: str, reshape: str, transpose: str) -> Int[np.ndarray, "..."]:
    """Reads devices in XLA's compact form ``[sizes]<=[reshape]T(transpose)``, in that shape."""
    shape = _numbers(sizes)
    ids = np.arange(math.prod(shape)).reshape(_numbers(reshape) if reshape else shape)
    return (ids.transpose(_numbers(transpose)) if transpose else ids).reshape(shape)


def _groups(instruction: hlo_text.Instruction, num_partitions: int) -> Groups:
    """Reads the groups of devices of a collective in any of the forms in which XLA prints them."""
    text = instruction.attributes
    if found := _LISTED.search(text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found.group(1))]
        return tuple(map(tuple, groups or [list(range(num_partitions))]))  # no group: all devices
    if found := _STRIDED.search(text):
        return tuple(map(tuple, _iota(*found.groups()).tolist()))
    if found := _MESH.search(text):
        sized, listed, sizes, reshape, transpose, names = found.groups()
        axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sized)}
        ids = _iota(sizes, reshape, transpose) if listed else np.arange(math.prod(axes.values()))
        return _along(axes, ids.reshape(-1), names)
    raise ValueError(f"the groups of {instruction.name} cannot be read: {text[:200]}")


def _along(axes: dict[str, int], ids: Int[np.ndarray, " devices"], names: str) -> Groups:
    """Returns the groups of devices along some axes of a mesh.

    Args:
        axes: sizes by name, in the order of the mesh.
        ids: the devices of the mesh.
        names: "'a','b'" are whole axes; the part "'a':(before)size" is the middle dimension of
            axis a, cut into [before, size, rest].
    """
    named = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", names)
    parts = [(name, int(before or 1), int(size or axes[name])) for name, before, size in named]
    shape: list[int] = []
    places: dict[tuple[str, int], int] = {}
    for axis, total in axes.items():
        ends = {end for name, *part in parts if name == axis for end in (part[0], math.prod(part))}
        for start, stop in itertools.pairwise(sorted({1, total} | ends)):
            places[axis, start] = len(shape)
            shape.append(stop // start)
    order = [places[name, before] for name, before, size in parts if size > 1]
    rest = [d for d in range(len(shape)) if d not in order]
    size = math.prod(shape[d] for d in order)
    devices = ids.reshape(shape).transpose(rest + order).reshape(-1, size)
    return tuple(map(tuple, devices.tolist()))
