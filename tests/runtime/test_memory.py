"""Memory that is free is read from the system or from the device; freed memory can be kept."""

import ctypes
import os
import subprocess
import sys
import types

import pytest

from enat_jax.runtime import memory


def test_available_memory_is_read(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n")
    assert memory.available_memory(meminfo) == 1000 * 1024
    assert memory.available_memory(tmp_path / "none") is None


def test_what_is_free(monkeypatch):
    def of(platform, stats, available=None):
        device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
        monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
        monkeypatch.setattr(memory, "available_memory", lambda: available)
        return memory.free_bytes()

    assert of("gpu", {"bytes_limit": 100, "bytes_in_use": 30}) == 70
    assert of("tpu", None) is None
    assert of("cpu", None, available=1000) == 800
    with pytest.raises(ValueError, match="choose the batch by a number"):
        of("cpu", None)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_of_the_fullest_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 100}, {"peak_bytes_in_use": 300}, {"bytes_in_use": 900}, None]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(x) for x in stats])
    assert memory.device_peak() == 300
    assert memory.peak_memory() == (300, "device memory in use")
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(None)])
    assert memory.device_peak() is None
    size, what = memory.peak_memory()
    assert what == "resident memory of the process" and size > 2**20


def test_memory_is_in_bytes_wherever_it_is_read(monkeypatch):
    before = memory.resident_peak()
    monkeypatch.setattr(memory.pathlib.Path, "exists", lambda path: False)
    assert before / 2 < memory.resident_peak() < 100 * before


ALLOCATING = """
import resource
from enat_jax.runtime import memory
if {keep}:
    assert memory.keep_freed()
for _ in range(20):
    b"x" * 2**25  # 32 MiB, of 8192 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this is not glibc")
def test_freed_memory_is_kept():
    def faults(keep):
        command = [sys.executable, "-c", ALLOCATING.format(keep=keep)]
        environment = {x: os.environ[x] for x in os.environ if not x.startswith("MALLOC_")}
        environment["JAX_PLATFORMS"] = "cpu"
        return int(subprocess.check_output(command, env=environment, text=True))

    assert faults(keep=False) - faults(keep=True) > 10 * 8192


def test_where_memory_is_not_kept(monkeypatch):
    asked = []
    library = types.SimpleNamespace(mallopt=lambda name, value: asked.append(name) or 1)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in [x for x in os.environ if x.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    config = types.SimpleNamespace(jax_platforms="cpu")
    monkeypatch.setattr(memory.jax, "config", config)
    assert memory.keep_freed() and len(asked) == 4
    for config.jax_platforms in ("cuda", "tpu,cpu"):
        assert not memory.keep_freed()
    config.jax_platforms = None  # whatever is found, here what plugins there are
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: [])
    assert memory.keep_freed()
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: ["a plugin"])
    assert not memory.keep_freed()
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not memory.keep_freed()
    config.jax_platforms = "cpu"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not memory.keep_freed()
    del library.mallopt
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    assert not memory.keep_freed() and len(asked) == 8
