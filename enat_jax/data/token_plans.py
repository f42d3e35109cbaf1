"""Plans of token sets, which plan.json holds: their digest, and what keeps two sets apart."""

import hashlib
import json
import pathlib
from typing import Any

from enat_jax.runtime import files

# What follows from the settings of a plan, and tells less about why two plans differ.
_CONSEQUENCES = (
    *("num_images", "class_names", "shard_items"),
    *("preprocessing.source.num_images", "preprocessing.source.listing"),
)


def digest(plan: dict[str, Any]) -> str:
    """Returns the SHA-256 of all values of a plan that decide the records."""
    # Against nothing, each value by its dotted name is a difference.
    values = files.differences(plan, {}, missing={})
    decisive = {name: value for name, value, _ in values if _is_decisive(name)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class OtherTokens(ValueError):
    """A directory holds other tokens; ``differences`` are those of the plans, wanted and found."""

    def __init__(self, message: str, differences: list[tuple[str, Any, Any]]) -> None:
        super().__init__(message)
        self.differences = differences


def refuse_others(directory: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Checks that two plans would give the same records.

    Args:
        directory: of the token set.
        found: what its plan.json says.
        wanted: what it should say.

    Raises:
        OtherTokens: what differs.
    """
    different = [x for x in files.differences(wanted, found) if _is_decisive(x[0])]
    different.sort(key=lambda difference: difference[0] in _CONSEQUENCES)
    if different:
        name, now, before = different[0]
        changed = " (pictures were renamed or changed)" if name.endswith(".listing") else ""
        raise OtherTokens(
            f"{directory} holds or has begun another token set: its {name} is "
            f"{_short(before)}, now it would be {_short(now)}{changed}"
            f"{f', and {len(different) - 1} more differ' if different[1:] else ''}; "
            "choose another directory",
            different,
        )


def _is_decisive(name: str) -> bool:
    """Says no of where images lie, what else lies beside them, and the digest of all others."""
    return not f"{name}.".startswith(("location.", "preprocessing.ignored_files.", "digest."))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
