"""The machine that is measured: what it is, and how fast it multiplies matrices."""

import os
import subprocess
from typing import Any

import jax

from enat_jax.evaluation import cards
from enat_jax.runtime import matrix_rate, memory


def device() -> dict[str, Any]:
    """Returns what the first device is, as JSON values."""
    first = jax.local_devices()[0]
    return {
        "backend": first.platform,
        "device": first.device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
    }


def driver() -> str | None:
    """Returns the version of NVIDIA's driver; None where its tool is not there or fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe(dtype: str) -> dict[str, Any]:
    """Returns what ``benchmark profile`` says about the machine above its tables.

    Raises:
        ValueError: the memory of a CPU is not known.
    """
    first = jax.local_devices()[0]
    free = memory.free_bytes()
    return {
        "machine": device()
        | {
            "cpu": cards.cpu_name(),
            "driver": driver(),
            "memory_bytes": free,
            "platform_version": " ".join(first.client.platform_version.split()),
        },
        "matrix_rate": matrix_rate.matrix_rate(dtype, [first]),
        "dtype": dtype,
    }
