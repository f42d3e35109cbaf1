"""Pickles read as data: whatever a pickle names is neither imported nor called nor built.

A pickle is a program for a machine with a stack. Python's own unpickler lets it call any function
of any module; this machine knows dictionaries, lists, tuples, numbers and strings, and notes what
else a pickle asks for: a ``Call`` says which function it wanted, and with what. Memory and time are
bounded by the pickle's length, since no instruction makes more than one small object.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_OPERATIONS = 2_000_000  # some forty make a tensor; bounds memory to some hundred MB


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Global:
    """Something that a pickle calls by name, such as "collections.OrderedDict"."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Call:
    """A call that a pickle asked for and did not get."""

    function: str
    arguments: tuple


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Persistent:
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
        ValueError: it is damaged, has too many instructions, or needs ones that data do not need.
    """
    machine = _Machine()
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        machine.spend(1)
        if name == "STOP":
            return Pickle(machine.pop(), position + 1, machine.persistent)
        if name in _LITERALS:
            machine.push(argument)
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](machine, argument)
        elif name not in _WITHOUT_EFFECT:
            raise ValueError(f"damaged or unusual: the pickle's instruction {name}")
    raise ValueError("the pickle is cut off")


class _Machine:
    def __init__(self):
        self.stack: list = []
        self.below: list[list] = []  # stacks that marks have set aside
        self.memo: dict[int, Any] = {}
        self.persistent: list[Persistent] = []
        self.left = MAX_OPERATIONS

    def spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise ValueError(f"the pickle has more than {MAX_OPERATIONS:,} instructions")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle is damaged: it takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle is damaged: it takes from an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list:
        if not self.below:
            raise ValueError("the pickle is damaged: it returns to a mark that is not there")
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_any(self, _) -> None:
        self.stack.pop() if self.stack else self.pop_mark()

    def duplicate(self, _) -> None:
        self.push(self.top())

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"the pickle is damaged: it refers to number {index}, not there yet")
        self.push(self.memo[index])

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Call):
            raise ValueError("the pickle is damaged: it appends to what is no list")

    def set_items(self, items: list) -> None:
        target = self.top()
        if isinstance(target, dict):
            target.update(_with_names(items))
        elif not isinstance(target, Call):
            raise ValueError("the pickle is damaged: it sets items of what is no dictionary")

    def stack_global(self, _) -> None:
        attribute, module = self.pop(), self.pop()
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise ValueError("the pickle is damaged: a name that is no string")
        self.push(Global(f"{module}.{attribute}"))

    def call(self, arguments: Any, function: Any) -> None:
        if isinstance(function, Persistent):  # a class, kept with its source code
            named = function.id if isinstance(function.id, tuple) else ()
            function = next((x for x in named if isinstance(x, Global)), None)
        name = function.name if isinstance(function, Global) else "something unnamed"
        arguments = arguments if isinstance(arguments, tuple) else ()
        if name == "collections.OrderedDict":
            self.push(self.ordered_dict(arguments))
        else:
            self.push(Call(name, arguments))

    def ordered_dict(self, arguments: tuple) -> dict:
        # Python 2 wrote the pairs as an argument; paid for, since they may be used many times.
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        self.spend(len(pairs))
        pairs = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
        return {key: value for key, value in pairs if isinstance(key, str)}

    def refer(self, id: Any) -> None:
        self.persistent.append(Persistent(id))
        self.push(self.persistent[-1])


def _with_names(items: list) -> dict:
    """Keys and values in turn; keys that are no strings have no use here, nor need be hashable."""
    if len(items) % 2:
        raise ValueError("the pickle is damaged: a key without a value")
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if isinstance(key, str)}


_WITHOUT_EFFECT = {"PROTO", "FRAME"}

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}

_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": _Machine.mark,
    "POP": _Machine.pop_any,
    "POP_MARK": lambda m, _: m.pop_mark() and None,
    "DUP": _Machine.duplicate,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "DICT": lambda m, _: m.push(_with_names(m.pop_mark())),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, name: m.push(Global(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(m.pop(), m.pop()),
    "NEWOBJ": lambda m, _: m.call(m.pop(), m.pop()),
    "NEWOBJ_EX": lambda m, _: (m.pop(), m.call(m.pop(), m.pop())) and None,
    "INST": lambda m, name: m.call(tuple(m.pop_mark()), Global(name.replace(" ", ".", 1))),
    "OBJ": lambda m, _: m.push(Call("an object", tuple(m.pop_mark()))),
    "BUILD": lambda m, _: m.pop() and None,  # the state of an object that was never made
    "PERSID": _Machine.refer,
    "BINPERSID": lambda m, _: m.refer(m.pop()),
}
