"""One outcome on all processes where it could differ; every process must call these functions."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """Returns on every process what ``function`` returns on the first; the others do not call it.

    Args:
        function: returns plain JSON values.

    Raises:
        OSError: on the other processes, if ``function`` raises anything on the first one.
    """
    if jax.process_count() == 1:
        return function()
    sent, failure = _tried(function) if jax.process_index() == 0 else (_as_bytes(None), None)
    # An array must have the same shape everywhere: its length goes first.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(sent.size)))
    sent = multihost_utils.broadcast_one_to_all(np.resize(sent, length))
    if failure is not None:
        raise failure
    outcome = _of_bytes(sent)
    if "error" in outcome:
        raise OSError(f"the first process failed with {outcome['error']}")
    return outcome["value"]


def gather(function: Callable[[], Any]) -> list[Any]:
    """Returns on every process what ``function`` returns on each of them, in their order.

    Args:
        function: returns plain JSON values.

    Raises:
        OSError: on the other processes, if ``function`` raises anything on one.
    """
    if jax.process_count() == 1:
        return [function()]
    sent, failure = _tried(function)
    lengths = multihost_utils.process_allgather(np.int32(sent.size))
    rows = multihost_utils.process_allgather(np.resize(sent, lengths.max()))
    if failure is not None:
        raise failure
    found = [_of_bytes(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    for process, outcome in enumerate(found):
        if "error" in outcome:
            raise OSError(f"process {process} failed with {outcome['error']}")
    return [outcome["value"] for outcome in found]


def _tried(function: Callable[[], Any]) -> tuple[UInt8[np.ndarray, " n"], Exception | None]:
    """Returns what a function returns or raises, to be sent, and what it raises."""
    try:
        return _as_bytes({"value": function()}), None
    except Exception as error:  # whatever it is, the others must not wait for ever
        return _as_bytes({"error": f"{type(error).__name__}: {error}"}), error


def _as_bytes(value: Any) -> UInt8[np.ndarray, " n"]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _of_bytes(sent: Any) -> Any:
    return json.loads(np.asarray(sent, np.uint8).tobytes())


def raise_on_all(failure: Exception | None, minor: type[Exception]) -> None:
    """Raises an error of the same kind on every process if any process has a failure.

    Args:
        failure: of this process, or None.
        minor: failures of this type count only if there are no others.

    Raises:
        minor: all failures are minor.
        Exception: this process's own failure, which is not minor; OSError on the others.
    """
    rank = 0 if failure is None else 1 if isinstance(failure, minor) else 2
    ranks = multihost_utils.process_allgather(np.int32(rank))
    worst, process = ranks.max(), int(ranks.argmax())
    if failure is not None and rank == worst:
        raise failure
    if worst:
        kind = minor if worst == 1 else OSError
        raise kind(f"process {process} failed, and says why")
