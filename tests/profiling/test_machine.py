"""The machine says what it is."""

from enat_jax.profiling import machine


def test_the_driver_may_be_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 575.57.08\n")
    tool.chmod(0o755)
    assert machine.driver() == "575.57.08"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    assert machine.driver() is None
