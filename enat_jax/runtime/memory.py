"""Memory of the process and of its devices: what was used at most, what is free, what is kept."""

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import resource
import sys
from typing import Any

import jax

CPU_SHARE = 0.8  # of the memory available: what jax does not count needs some, and so do others
MAX_KEPT = 2**30  # bytes at the end of the heap that are free, and not given back
# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 2**26


def keep_freed() -> bool:
    """Lets this process keep memory that it frees, up to ``MAX_KEPT``, where it computes on CPUs.

    For training. Every step allocates its buffers and frees them at the end. glibc asks the system
    for each large one anew, and the system fills it with zeros a page at a time, which took a third
    of the time of a step of configs/digits.py. Sampling has fewer buffers, and its threads get in
    each other's way where they share one heap: drawing with ENAT-B was 16% slower.

    To be called before JAX starts its threads. Whoever sets one of glibc's variables
    (``MALLOC_ARENA_MAX`` and others) chooses for himself.

    Returns:
        Whether it does; not without glibc, nor where JAX has an accelerator to compute on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if mallopt is None or chosen or _may_have_accelerator():
        return False
    settings = {
        _TRIM_THRESHOLD: MAX_KEPT,
        _TOP_PAD: _TOP_PAD_BYTES,
        _MMAP_MAX: 0,  # not even large buffers are asked for apart from the heap
        _ARENA_MAX: 1,  # those of threads keep nothing
    }
    return all([mallopt(name, value) for name, value in settings.items()])


def _may_have_accelerator() -> bool:
    """Whether JAX may find a GPU or TPU; its backends cannot be asked before all hosts have met."""
    options: Any = jax.config  # whose options are added at run time
    platforms = options.jax_platforms
    if platforms:
        return platforms != "cpu"
    if importlib.util.find_spec("libtpu") is not None:
        return True
    if importlib.metadata.entry_points(group="jax_plugins"):
        return True
    found = importlib.util.find_spec("jax_plugins")
    return found is not None and any(pkgutil.iter_modules(found.submodule_search_locations))


def device_peak() -> int | None:
    """Returns the most bytes that a device of this process ever had in use; None: not known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    return max(peaks) if peaks else None


def peak_memory() -> tuple[int, str]:
    """Returns the most bytes in use, and of what: of a device where it is known, or the process."""
    peak = device_peak()
    if peak is not None:
        return peak, "device memory in use"
    return resident_peak(), "resident memory of the process"


def resident_peak() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    # First, as what getrusage says begins with that of the process that started it.
    status = _kernel_bytes(pathlib.Path("/proc/self/status"), "VmHWM:")
    if status is not None:
        return status
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return peak * (1 if sys.platform == "darwin" else 1024)


def available_memory(meminfo: pathlib.Path = pathlib.Path("/proc/meminfo")) -> int | None:
    """Returns the bytes that new programs may take without swapping; None: not known.

    Limits of a container are not seen.
    """
    return _kernel_bytes(meminfo, "MemAvailable:")


def _kernel_bytes(path: pathlib.Path, name: str) -> int | None:
    """Returns the bytes of a line such as "VmHWM: 1234 kB"; None: there is no file or line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(name)), None)


def free_bytes() -> int | None:
    """Returns the bytes that new arrays may take on the first device; None: not known.

    Raises:
        ValueError: a CPU whose memory is unknown: a batch too large would kill the process.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu":
        return None
    available = available_memory()
    if available is None:
        raise ValueError(
            "this system does not say how much memory is available, and a batch that does not fit "
            "would kill the process: choose the batch by a number"
        )
    return int(CPU_SHARE * available)
