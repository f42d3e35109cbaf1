"""The sampling notebook: stored without outputs, and run by a real kernel from a clean checkout."""

import ast
import json
import pathlib
import shutil
import subprocess

import nbclient
import nbformat
import pytest
import several

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = pathlib.Path("launch") / "sampling_colab.ipynb"


def cells(kind):
    found = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_it_is_a_valid_notebook_without_outputs():
    nbformat.validate(nbformat.read(ROOT / NOTEBOOK, as_version=4))
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_its_code_is_plain_python():
    for cell in cells("code"):
        ast.parse("".join(cell["source"]))  # no shell commands, which other tools could not read


@pytest.fixture
def checkout(tmp_path):
    """The files that git knows of, and new ones; nothing that was built or trained here."""
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(names, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's own libraries
def test_a_kernel_runs_it_from_a_clean_checkout(checkout, monkeypatch):
    for name, value in several.environment(PYTHONPATH=str(checkout)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(checkout / NOTEBOOK, as_version=4)
    for number, steps, few in (
        (2, "num_steps=150", "num_steps=60"),
        (2, "restart_until=90", "restart_until=40"),
        (2, "num_steps=500", "num_steps=120"),
        (16, "STEPS = 4000", "STEPS = 120"),
    ):  # which would take minutes; 120 steps are 20 more than the warm-up
        cell = notebook.cells[number]
        assert steps in cell.source
        cell.source = cell.source.replace(steps, few)
    folder = {"metadata": {"path": str(checkout / "launch")}}
    done = nbclient.NotebookClient(notebook, timeout=900, resources=folder).execute()
    found = [output for cell in done.cells for output in cell.get("outputs", [])]
    shown = [
        kind
        for output in found
        for kind in ("png", "gif")
        if f"image/{kind}" in output.get("data", {})
    ]
    assert shown == ["png", "png", "png", "gif", "png", "png", "png", "png"]
    for number in (2, 16):
        text = "".join(output.get("text", "") for output in done.cells[number].outputs)
        assert "[train] done: 120 steps" in text
    assert (checkout / "launch" / "reveal.gif").is_file()
    assert (checkout / "runs" / "notebook" / "enat" / "model" / "model.json").is_file()
