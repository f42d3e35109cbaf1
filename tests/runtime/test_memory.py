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
