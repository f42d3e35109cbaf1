"""Pickles, read as data: whatever one names is neither imported nor called nor built, but noted.

A pickle is a program that may call any function of any module. Those of numpy's arrays are
understood (the formats in ``ndarray.__reduce__`` of numpy): trees of them are how some JAX programs
keep their weights.
"""

import dataclasses
import io
import math
import pathlib
import pickle
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from enat_jax.runtime import exits

# Bytes of instructions and short values; two hundred describe a tensor, and each takes up to 80 in
# memory. Of longer values each byte takes one.
MAX_PICKLE = 2**24
_SHORT = 4096
_MAX_DEPTH = 16  # of dictionaries in dictionaries
_MAX_NAME = 256  # characters of a key
_MAX_PLACES = 100_000  # of values in dictionaries: one dictionary may stand in many
_MAX_DIMENSIONS = 8
_COPIES = 4  # of the file's size that its arrays may take together

_FUNCTIONS = re.compile(
    r"numpy\.(core|_core)\.(multiarray\._reconstruct|multiarray\.scalar|numeric\._frombuffer)"
)
_BYTES = ("_codecs.encode", "__builtin__.bytes")  # what made bytes before protocol 3
_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _Inert:
    """What stands for something that a pickle asks for. Whatever is done to it has no effect."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return _called(self, arguments)

    def append(self, *items: Any) -> None:
        """Does nothing."""

    extend = __setitem__ = append


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Global(_Inert):
    """Something that a pickle calls by name, such as "collections.OrderedDict"."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Call(_Inert):
    """A call that a pickle asked for and did not get, and the state of what it would have made."""

    function: str
    arguments: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Persistent(_Inert):
    """A reference to something outside of the pickle."""

    id: Any


class Pickle(NamedTuple):
    """What a pickle holds.

    Attributes:
        value: of dict with str keys (others are left out), list, tuple, str, bytes, int, float,
            bool, None, Global, Call and Persistent. It may contain itself.
        end: number of bytes read.
        persistent: all references to things outside, in the order of the pickle.
    """

    value: Any
    end: int
    persistent: list[Persistent]


def load(data: bytes) -> Pickle:
    """Reads the pickle at the start of ``data``; what follows it is ignored.

    Raises:
        ValueError: it is damaged, or has instructions that data do not need.
    """
    file = _Sparing(data)
    reader = _Unpickler(file, encoding="latin1")
    try:
        return Pickle(reader.load(), file.tell(), reader.persistent)
    except Exception as error:  # whatever a damaged pickle makes of itself
        cause = exits.one_line(error, named=True)
        raise ValueError(f"its pickle is damaged, or too large ({cause})") from error


class _Sparing(io.BytesIO):
    """A pickle of any length with a bounded number of instructions, which cost most memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_PICKLE

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, found: bytes) -> bytes:
        self._left -= min(len(found), _SHORT)
        if self._left < 0:
            raise ValueError(f"it has more than {MAX_PICKLE:,} bytes of instructions")
        return found


class _Names(dict):
    """A dictionary of a pickle. Only strings are keys: to hash another one may take for ever."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            super().__setitem__(key, value)


# Not `pickle.Unpickler`, which is the same in C: a number in its memo takes memory for all numbers
# below it, and its dictionaries hash any key. Any: type checkers do not know the stack of this one.
_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    def __init__(self, file: io.BytesIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.persistent: list[Persistent] = []

    def find_class(self, module: str, name: str) -> Global:
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Persistent:
        self.persistent.append(Persistent(pid))
        return self.persistent[-1]

    def get_extension(self, code: int) -> None:
        raise ValueError("it needs a registered extension")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):  # of all else, what was never made has no state
            self.stack[-1].state = state

    def load_frame(self) -> None:
        self.read(8)  # the length of a frame, which would be read at once

    def load_empty_dictionary(self) -> None:
        self.append(_Names())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_names(zip(items[::2], items[1::2], strict=True)))

    def load_frozenset(self) -> None:
        self.append(self.pop_mark())

    dispatch = _InPython.dispatch | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.FRAME[0]: load_frame,
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.DICT[0]: load_dict,
        # Sets are lists: they, too, would hash what is in them.
        pickle.EMPTY_SET[0]: _InPython.dispatch[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: _InPython.dispatch[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: load_frozenset,
        # Without the memory for as many bytes as the pickle says that it has.
        pickle.BYTEARRAY8[0]: _InPython.dispatch[pickle.BINBYTES8[0]],
    }


def _called(function: Any, arguments: Any) -> Any:
    """Returns what a pickle gets in place of the result of a call."""
    if isinstance(function, Persistent):  # a class, kept with its source code
        named = function.id if isinstance(function.id, tuple) else ()
        function = next((x for x in named if isinstance(x, Global)), None)
    name = function.name if isinstance(function, Global) else "something unnamed"
    arguments = arguments if isinstance(arguments, tuple) else ()
    if name != "collections.OrderedDict":
        return Call(name, arguments)
    # Python 2 wrote the pairs as an argument. They are taken out of it: many dictionaries that are
    # made of one list would need more memory than the pickle is long.
    pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
    made = _names(pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2)
    pairs.clear()
    return made


def _names(pairs: Iterable[Sequence[Any]]) -> _Names:
    made = _Names()
    for key, value in pairs:
        made[key] = value
    return made


# --- numpy's arrays -----------------------------------------------------------------------------


def read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """Reads a pickle of nested dictionaries, lists and tuples of numpy's arrays.

    Returns:
        Nested dictionaries of arrays, numbers, texts and None. The entries of a list or tuple have
        the names "0", "1" and so on.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or has something else.
    """
    data = path.read_bytes()
    tree = _Arrays(_COPIES * len(data)).of(load(data).value)
    if not isinstance(tree, dict):
        raise ValueError(_OTHER)
    return tree


_OTHER = (
    "a pickle, but not of torch.save, nor of dictionaries of numpy's arrays: pickles can run "
    "programs, so refused"
)


class _Arrays:
    """Puts arrays in the place of their calls.

    Args:
        most: bytes that all arrays may take together; one may stand in many places.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self._places = _MAX_PLACES

    def of(self, value: Any, path: str = "", depth: int = 0) -> Any:
        self._places -= 1
        if self._places < 0 or depth > _MAX_DEPTH:
            raise ValueError(f"it has too many entries, or too deep ones, such as {path[:80]!r}")
        if isinstance(value, Call):
            return self._array(value, path)
        if isinstance(value, list | tuple):
            value = {str(i): x for i, x in enumerate(value)}
        if not isinstance(value, dict):
            return value
        if long := next((k for k in value if len(k) > _MAX_NAME), None):
            raise ValueError(f"it has a name of {len(long)} characters: damaged")
        below = f"{path}/" if path else ""
        return {k: self.of(x, below + k, depth + 1) for k, x in value.items()}

    def _array(self, call: Call, path: str) -> np.ndarray:
        if not _FUNCTIONS.fullmatch(call.function):
            raise ValueError(f"{_OTHER} (it names {call.function[:80]!r})")
        try:
            array = _array(call)
        except (TypeError, ValueError) as error:
            raise ValueError(f"array {path[:80]!r}: {exits.one_line(error)}") from error
        self._left -= array.nbytes
        if self._left < 0:
            raise ValueError("its arrays are larger than the file: one stands in many places")
        return array


def _array(call: Call) -> np.ndarray:
    """Returns the array of a call of one of numpy's functions, a view of the pickle's bytes."""
    shape: Any
    if call.function.endswith(".scalar"):
        (kind, content), shape, order = call.arguments, (), "C"
    elif call.function.endswith("._frombuffer"):
        content, kind, shape, order = call.arguments
    else:
        _, shape, kind, fortran, content = call.state
        order = "F" if fortran else "C"
    dtype = _dtype(kind)
    if isinstance(content, Call) and content.function in _BYTES:
        content = content.arguments[0] if content.arguments else b""
    if isinstance(content, str):
        content = content.encode("latin1")
    whole = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
    if not whole or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(
            f"its shape is no tuple of at most {_MAX_DIMENSIONS} sizes of 0 or more: damaged"
        )
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * dtype.itemsize:
        found = f"{len(content)} bytes" if isinstance(content, bytes) else "no bytes"
        raise ValueError(f"it has {found}, not those of {list(shape)} {dtype}: damaged")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _dtype(kind: Any) -> np.dtype:
    if not isinstance(kind, Call) or kind.function != "numpy.dtype" or not kind.arguments:
        raise ValueError("it has no type: damaged")
    code = kind.arguments[0]
    if isinstance(code, Global) and code.name == "ml_dtypes.bfloat16":
        return np.dtype(jnp.bfloat16)
    if code not in _TYPES:
        raise ValueError(
            f"its type {str(code)[:40]!r} is not read: save it as numbers, such as float32"
        )
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "="
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")
