"""The matrix products and convolutions of a compiled program: work, and padding to a chip's tiles.

The matrix units of TPUs take whole tiles. The layouts of a program say what is padded: the last
dimension of every array to 128 (lanes), the one before to 8 (sublanes), as far as the tile that is
printed says so. Where a dimension of a product is the last of any of its three arrays, the product
is computed as if it were a multiple of 128 there: heads of 96 channels cost as much as heads of
128. This is arithmetic on the shapes and layouts of the program; the compiler states no such share.

TPUs compute products as convolutions, batched ones with dilation: only those multiply-adds count in
which a window meets an element of the array, none that meet padding or the holes between.
"""

import functools
import math
import re
from collections.abc import Iterator

from enat_jax.profiling import hlo_text
from enat_jax.profiling.hlo_text import Instruction, Module

# For each of the left and right operand and the output the places of the dimensions that have a
# role: "batch", "inner", "rows", "columns" or the number of a window's dimension.
Roles = tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]


def multiply_adds(module: Module) -> int:
    """Counts the multiply-adds of all products and convolutions of one device in one call.

    Products in a dtype of integers count too. A product that XLA has turned into a library call
    is not seen; on the CPU backend there are none.
    """
    return sum(_needed(module, product) * count for product, count in _products(module))


def padding(module: Module) -> float:
    """Returns the share of the multiply-adds that tiles add, of all that are computed with them.

    0 for a program without products, or without tiles in its layouts.
    """
    needed, padded = 0, 0.0
    for product, count in _products(module):
        work = _needed(module, product) * count
        needed, padded = needed + work, padded + work * _growth(module, product)
    return 1 - needed / padded if padded else 0.0


def padding_by_place(module: Module) -> dict[str, tuple[int, float]]:
    """Returns, for each place in the traced function, its multiply-adds and those with tiles.

    The places are the last two parts of the name of the operation, such as "mlp/up".
    """
    found: dict[str, tuple[int, float]] = {}
    for product, count in _products(module):
        place = "/".join(product.op_name.split("/")[:-1][-2:])
        work = _needed(module, product) * count
        needed, padded = found.get(place, (0, 0.0))
        found[place] = needed + work, padded + work * _growth(module, product)
    return found


def _products(module: Module) -> hlo_text.Visits:
    wanted = lambda x: x.opcode in ("dot", "convolution")  # noqa: E731
    return hlo_text.visits(module, wanted, functools.partial(_needed, module))


def _needed(module: Module, product: Instruction) -> int:
    left, right = (module.operand(product, i).arrays[0] for i in (0, 1))
    if product.opcode == "dot":
        inner = [left.shape[i] for i in _dimensions(product, "lhs_contracting_dims")]
        return product.arrays[0].size * math.prod(inner)
    of_left, of_right, of_out = _convolution_roles(product)
    out = product.arrays[0]
    batch, columns = (out.shape[of_out[role][0]] for role in ("batch", "columns"))
    met = 1
    for number, window in enumerate(_windows(product)):
        size = left.shape[of_left[str(number)][0]]
        met *= _met(size, out.shape[of_out[str(number)][0]], window)
    return batch * columns * right.shape[of_right["inner"][0]] * met


def _met(size: int, outputs: int, window: dict[str, int]) -> int:
    """Counts the pairs of an output and a place in its window that meet an element."""
    dilated = (size - 1) * window["lhs_dilate"]
    places = (
        out * window["stride"] + place * window["rhs_dilate"] - window["low"]
        for out in range(outputs)
        for place in range(window["size"])
    )
    return sum(0 <= x <= dilated and x % window["lhs_dilate"] == 0 for x in places)


def _windows(product: Instruction) -> Iterator[dict[str, int]]:
    """Yields the settings of each dimension of a convolution's window."""
    found = re.search(r"\bwindow=\{([^}]*)\}", product.attributes)
    settings = dict(x.split("=") for x in found.group(1).split()) if found else {}
    listed = {name: value.split("x") for name, value in settings.items()}
    for i in range(len(listed.get("size", ()))):
        low = listed["pad"][i].split("_")[0] if "pad" in listed else "0"
        rest = {n: int(listed[n][i]) if n in listed else 1 for n in ("stride", "lhs_dilate")}
        rhs_dilate = int(listed["rhs_dilate"][i]) if "rhs_dilate" in listed else 1
        yield {"size": int(listed["size"][i]), "low": int(low), "rhs_dilate": rhs_dilate, **rest}


def _dimensions(product: Instruction, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", product.attributes)
    return [int(x) for x in found.group(1).split(",") if x] if found else []


# --- tiles ----------------------------------------------------------------------------------


def _growth(module: Module, product: Instruction) -> float:
    """Returns how many times the work of a product tiles make of it."""
    sources = (module.operand(product, 0), module.operand(product, 1), product)
    grown: dict[str, float] = {}
    for source, roles in zip(sources, _roles(module, product), strict=True):
        shape = source.arrays[0].shape
        padded = padded_shape(shape, source.layouts[0] if source.layouts else "")
        for role, places in roles.items():
            ratio = math.prod(padded[i] / shape[i] for i in places if shape[i])
            grown[role] = max(grown.get(role, 1.0), ratio)
    return math.prod(grown.values())


def padded_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Returns the sizes that an array has in memory, by its layout; see ``Instruction``."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None or not order:
        return shape
    padded = list(shape)
    places = [int(x) for x in order.split(",")]
    for place, multiple in zip(places, reversed(tile.group(1).split(",")), strict=False):
        padded[place] = -(-padded[place] // int(multiple)) * int(multiple)
    return tuple(padded)


def _roles(module: Module, product: Instruction) -> Roles:
    if product.opcode == "convolution":
        return _convolution_roles(product)
    left, right = (len(module.operand(product, i).arrays[0].shape) for i in (0, 1))
    batch = [_dimensions(product, f"{side}_batch_dims") for side in ("lhs", "rhs")]
    inner = [_dimensions(product, f"{side}_contracting_dims") for side in ("lhs", "rhs")]
    rows = [i for i in range(left) if i not in batch[0] + inner[0]]
    columns = [i for i in range(right) if i not in batch[1] + inner[1]]
    ends = (len(batch[0]), len(batch[0]) + len(rows), len(batch[0]) + len(rows) + len(columns))
    return (
        {"batch": tuple(batch[0]), "inner": tuple(inner[0]), "rows": tuple(rows)},
        {"batch": tuple(batch[1]), "inner": tuple(inner[1]), "columns": tuple(columns)},
        {
            "batch": tuple(range(ends[0])),
            "rows": tuple(range(ends[0], ends[1])),
            "columns": tuple(range(ends[1], ends[2])),
        },
    )


def _convolution_roles(product: Instruction) -> Roles:
    """Reads ``dim_labels=0bf_0io->0bf``: left operand, window and output."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    if found is None:
        raise ValueError(f"the dimensions of the convolution {product.name} cannot be read")
    of_left, of_right, of_out = found.groups()
    return (
        _places(of_left, {"b": "batch", "f": "inner"}),
        _places(of_right, {"i": "inner", "o": "columns"}),
        _places(of_out, {"b": "batch", "f": "columns"}),
    )


def _places(labels: str, names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    return {names.get(label, label): (place,) for place, label in enumerate(labels)}
