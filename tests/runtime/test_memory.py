"""Memory that is free is read from the system or from the device."""

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
