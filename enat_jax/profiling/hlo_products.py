"""The matrix products and convolutions of a compiled program: work, and padding to a chip's tiles.

TPUs compute products as convolutions, batched ones with dilation: only those multiply-adds count in
which a window meets an element of the array, none that meet padding or the holes between. But the
padding at the edges of pictures counts as pixels, as it does in ``costs``. A product of a single
row may become a sum over elementwise products, which counts, too; matrix units have no part in it.

Their matrix units take tiles of 128 by 128, through which rows pass by eights. A product of M rows,
N columns and K summed numbers therefore costs as much as one whose K is a multiple of 128, and one
of M and N of 128, the other of 8, whichever way round is less: heads of 96 channels cost as much
as heads of 128. That is arithmetic on the products of the program; the compiler states no such
share. (The units of v6e are 256 by 256, of which a tile of 128 may fill a part.)
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from enat_jax.profiling import hlo_text
from enat_jax.profiling.hlo_text import Instruction, Module

LANES, SUBLANES = 128, 8
_PRODUCTS = ("dot", "convolution")


@dataclasses.dataclass(frozen=True)
class Product:
    """What is multiplied: ``times`` products of [rows, inner] and [inner, columns].

    Attributes:
        times: of a batched product its batch, of a convolution the places of its window.
        rows, inner, columns: sizes.
        met: share of the multiply-adds that meet an element.
    """

    times: int
    rows: int
    inner: int
    columns: int
    met: float = 1.0

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds that meet an element."""
        return round(self.met * self.times * self.rows * self.inner * self.columns)

    @property
    def growth(self) -> float:
        """How many times the work tiles make of it."""
        sizes = self.rows * self.inner * self.columns
        if not sizes:
            return 1.0
        one = _up(self.rows, SUBLANES) * _up(self.columns, LANES)
        other = _up(self.rows, LANES) * _up(self.columns, SUBLANES)
        return _up(self.inner, LANES) * min(one, other) / sizes


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def multiply_adds(module: Module) -> int:
    """Counts the multiply-adds of all products and convolutions of one device in one call.

    Products in a dtype of integers count too. A product that XLA has turned into a library call
    is not seen; on the CPU backend there are none.
    """
    of_units = sum(product.multiply_adds * count for _, product, count in _products(module))
    size = functools.partial(_summed, module)
    summed = hlo_text.visits(module, lambda x: size(x) > 0, size)
    return of_units + sum(size(instruction) * count for instruction, count in summed)


def padding(module: Module) -> float:
    """Returns the share of the multiply-adds that tiles add, of all that are computed with them."""
    needed, padded = (sum(x) for x in zip(*padding_by_place(module).values(), strict=True))
    return 1 - needed / padded if padded else 0.0


def padding_by_place(module: Module) -> dict[str, tuple[int, float]]:
    """Returns, for each place in the traced function, its multiply-adds and those with tiles.

    The places are the last two parts of the name of the operation, such as "mlp/up".
    """
    found: dict[str, tuple[int, float]] = {"": (0, 0.0)}
    for instruction, product, count in _products(module):
        place = "/".join(instruction.op_name.split("/")[:-1][-2:])
        work = product.multiply_adds * count
        needed, padded = found.get(place, (0, 0.0))
        found[place] = needed + work, padded + work * product.growth
    return found


def has_product(module: Module, instruction: Instruction) -> bool:
    """Returns whether an instruction is a product, or a fusion with one."""
    if instruction.opcode in _PRODUCTS:
        return True
    names = instruction.called("calls") if instruction.opcode == "fusion" else []
    return any(has_product(module, x) for name in names for x in module.computations[name].values())


def padded_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Returns the sizes that an array has in memory, by its layout; see ``hlo_text``."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None or not order:
        return shape
    padded = list(shape)
    places = [int(x) for x in order.split(",")]
    for place, multiple in zip(places, reversed(tile.group(1).split(",")), strict=False):
        padded[place] = _up(padded[place], int(multiple))
    return tuple(padded)


# --- reading products -----------------------------------------------------------------------


def _products(module: Module) -> Iterator[tuple[Instruction, Product, int]]:
    read = functools.cache(lambda name, computation: _read(module, name, computation))
    weight = lambda x: read(x.name, x.computation).multiply_adds  # noqa: E731
    for instruction, count in hlo_text.visits(module, lambda x: x.opcode in _PRODUCTS, weight):
        yield instruction, read(instruction.name, instruction.computation), count


def _summed(module: Module, instruction: Instruction) -> int:
    """Returns the multiply-adds of a sum over products that XLA made of a product; else 0."""
    if instruction.opcode != "reduce" or not instruction.op_name.endswith("dot_general"):
        return 0
    source = module.operand(instruction, 0)
    while source.opcode in ("convert", "copy", "bitcast"):
        source = module.operand(source, 0)
    return source.arrays[0].size if source.opcode == "multiply" else 0


def _read(module: Module, name: str, computation: str) -> Product:
    instruction = module.computations[computation][name]
    left, right = (module.operand(instruction, i).arrays[0].shape for i in (0, 1))
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right)
    batch = _dimensions(instruction, "lhs_batch_dims")
    inner = _dimensions(instruction, "lhs_contracting_dims")
    times, summed = (math.prod(left[i] for i in places) for places in (batch, inner))
    rows = math.prod(left) // max(times * summed, 1)
    columns = math.prod(right) // max(times * summed, 1)
    return Product(times, rows, summed, columns)


def _dimensions(instruction: Instruction, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(x) for x in found.group(1).split(",") if x] if found else []


def _convolution(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> Product:
    """Reads a convolution, of which a dimension of the window may be any part of a product."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        raise ValueError(f"the dimensions of the convolution {instruction.name} cannot be read")
    of_left, of_right, of_out = (
        dict(zip(labels, shape, strict=True))
        for labels, shape in zip(
            found.groups(), (left, right, instruction.arrays[0].shape), strict=True
        )
    )
    times, rows, inner, columns, met = 1, of_out["b"], of_right["i"], of_out["f"], 1.0
    for number, window in enumerate(_windows(instruction)):
        size, places, outputs = (x[str(number)] for x in (of_left, of_right, of_out))
        pairs = _met(size, outputs, window)
        if size == 1 and pairs == outputs:
            columns *= outputs
        elif outputs == 1 and pairs == places:
            inner *= places
        elif places > 1 and pairs == outputs:
            times *= outputs
        else:
            rows, times, met = rows * outputs, times * places, met * pairs / (outputs * places)
    return Product(times, rows, inner, columns, met)


def _met(size: int, outputs: int, window: dict[str, int]) -> int:
    """Counts the pairs of an output and a place in its window that meet an element or an edge."""
    undilated = window["lhs_dilate"] == window["rhs_dilate"] == 1
    if undilated and window["padding"] < window["size"]:  # of a picture
        return outputs * window["size"]
    dilated = (size - 1) * window["lhs_dilate"]
    places = (
        out * window["stride"] + place * window["rhs_dilate"] - window["low"]
        for out in range(outputs)
        for place in range(window["size"])
    )
    return sum(0 <= x <= dilated and x % window["lhs_dilate"] == 0 for x in places)


def _windows(instruction: Instruction) -> Iterator[dict[str, int]]:
    """Yields the settings of each dimension of a convolution's window."""
    found = re.search(r"\bwindow=\{([^}]*)\}", instruction.attributes)
    settings = dict(x.split("=") for x in found.group(1).split()) if found else {}
    listed = {name: value.split("x") for name, value in settings.items()}
    for i in range(len(listed.get("size", ()))):
        low, high = map(int, listed["pad"][i].split("_")) if "pad" in listed else (0, 0)
        names = ("stride", "lhs_dilate", "rhs_dilate")
        rest = {name: int(listed[name][i]) if name in listed else 1 for name in names}
        yield {"size": int(listed["size"][i]), "low": low, "padding": low + high, **rest}
