"""Memory of the process and of its devices: what was used at most, and what is free."""

import pathlib
import resource
import sys

import jax

CPU_SHARE = 0.8  # of the memory available: what jax does not count needs some, and so do others


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
