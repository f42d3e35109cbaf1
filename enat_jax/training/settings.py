"""Settings: what a class takes, as values of a config and as flags of the command line.

Names, types and defaults are those of the class; nothing else lists them.
"""

import ast
import contextlib
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

Settings = dict[str, inspect.Parameter]

_SCALARS: dict[Any, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}


def of(made: Callable[..., Any]) -> Settings:
    """Returns the arguments of a class by name; their annotations are types."""
    found = inspect.signature(made, eval_str=True).parameters
    return {k: v for k, v in found.items() if k not in ("parent", "name")}  # those of Linen


def setting(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Returns a setting that no class has."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def defaults(settings: Settings) -> dict[str, Any]:
    """Returns the values of settings that are not given: None where there is no default."""
    return {k: None if v.default is v.empty else v.default for k, v in settings.items()}


def complete(where: str, given: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Returns the values of all settings of a section, those that are given checked.

    Raises:
        ValueError: a setting is unknown or has a value of another type; names it.
    """
    refuse_unknown(where, given, settings)
    values = {name: _checked(f"{where}.{name}", v, settings[name]) for name, v in given.items()}
    return defaults(settings) | values


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for the first name that is not known, with those that are near it."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise ValueError(f"{where}: {name!r} is unknown; did you mean {', '.join(near)}?")


def flag(name: str, setting: inspect.Parameter, put: Callable[[Any], None]) -> flags.Flag:
    """Returns a flag for a setting, whose value is handed to ``put`` as soon as it is parsed."""
    text = words(setting)
    if setting.default is not setting.empty:
        text += f"; by default {setting.default}"
    return flags.Flag(
        *(_Parser(setting, put), flags.ArgumentSerializer(), name, None, text),
        boolean=setting.annotation is bool,
        allow_override=True,  # by the settings of another file, if --config is given twice
        allow_overwrite=_kinds(setting)[0] in _SCALARS,
    )


class _Parser(flags.ArgumentParser):
    def __init__(self, setting: inspect.Parameter, put: Callable[[Any], None]):
        self._setting, self._put = setting, put

    def parse(self, argument: str) -> Any:
        value = self._value(argument)
        self._put(value)
        return value

    def _value(self, argument: str) -> Any:
        kinds = _kinds(self._setting)
        if argument == "None" and types.NoneType in kinds:
            return None
        try:
            if kinds[0] in _SCALARS:
                return _SCALARS[kinds[0]].parse(argument)
            value = ast.literal_eval(argument)
            value = value if isinstance(value, (list, tuple)) else (value,)
            return _as(self._setting.annotation, value)
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(f"must be {words(self._setting)}") from None


def _kinds(setting: inspect.Parameter) -> tuple[Any, ...]:
    """Returns the types that a setting may have; without a default, it may be left unset."""
    kind = setting.annotation
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    unset = (types.NoneType,) if setting.default is setting.empty else ()
    return (*(typing.get_args(kind) if union else (kind,)), *unset)


def words(setting: inspect.Parameter) -> str:
    """Returns the type of a setting for people, such as "int or None"."""
    text = inspect.formatannotation(setting.annotation)
    return text.replace("collections.abc.", "").replace(" | ", " or ")


def _checked(name: str, value: Any, setting: inspect.Parameter) -> Any:
    if value is None and types.NoneType in _kinds(setting):
        return None
    try:
        return _as(setting.annotation, value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be {words(setting)}") from None


def _as(kind: Any, value: Any) -> Any:
    """Returns a value as a type says: lists become tuples, whole numbers floats.

    Raises:
        TypeError, ValueError: it is of another type or length.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for one in inner:
            with contextlib.suppress(TypeError, ValueError):
                return _as(one, value)
        raise TypeError
    if origin in (tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if origin is Sequence or inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        return tuple(_as(k, v) for k, v in zip(inner, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value
