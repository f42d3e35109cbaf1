"""Whether two plans of token sets, as JSON values, would give the same records."""

import hashlib
import json
import pathlib
from typing import Any

# Where images lie, what else lies beside them, and what `digest` says of all the others.
_LEFT_OUT = ("location.", "preprocessing.ignored_files.", "digest")


def digest(plan: dict[str, Any]) -> str:
    """SHA-256 of all that decides the records."""
    return hashlib.sha256(json.dumps(_compared(plan), sort_keys=True).encode()).hexdigest()


def refuse_others(directory: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, if the plan ``found`` in ``directory`` is another
    one."""
    found, wanted = _compared(found), _compared(wanted)
    different = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if different:
        name = different[0]
        changed = " (pictures were renamed or changed)" if name.endswith(".listing") else ""
        raise ValueError(
            f"{directory} holds or has begun another token set: its {name} is "
            f"{_short(found.get(name))}, now it would be {_short(wanted.get(name))}{changed}"
            f"{f', and {len(different) - 1} more differ' if different[1:] else ''}; "
            "remove it or choose another directory"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _compared(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in _flat(plan).items() if not name.startswith(_LEFT_OUT)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
