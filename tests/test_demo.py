"""The page in a browser: draw, move a slider, paint, fill, download; and its program's mistakes.

The browser is Chromium without a window, which Playwright drives. Where Gradio, Playwright or the
browser is not installed these tests are skipped.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import urllib.parse
import zipfile

import PIL.Image
import pytest
import several
import tiny

from enat_jax import demo
from enat_jax.runtime import cli

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
WAIT_MS = 120_000


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "9" * 5000])
def test_a_port_is_checked(capsys, port):
    with pytest.raises(SystemExit) as end:
        cli.run(demo.main, ["--model", "nowhere", f"--port={port}"])
    assert end.value.code == 2 and "is not a port" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "enat_jax.inference.page_layout", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run(demo.main, ["--model", "nowhere"])
    assert end.value.code == 2
    assert "pip install 'enat_jax[demo]'" in capsys.readouterr().err


@contextlib.contextmanager
def served(model, tmp_path):
    """The program in a process of its own; yields its address, and ends it as Ctrl-C does."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "enat_jax.demo", "--model", model],
        env=several.environment(JAX_PLATFORMS="cpu", TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if line.startswith("[demo] open "))
        yield line.split()[2]
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and errors == "interrupted\n"
        assert not list(temporary.rglob("*.png"))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


def shot(page, name):
    """Keeps a screenshot where ENAT_JAX_SCREENSHOTS names a folder, for people to look at."""
    if folder := os.environ.get("ENAT_JAX_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=pathlib.Path(folder) / f"{name}.png")


def thumbnails(page):
    return page.locator("#pictures .thumbnail-item img")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Playwright
def test_draw_paint_fill_download(browser, tmp_path):
    pytest.importorskip("gradio")
    model = os.environ.get("ENAT_JAX_DEMO_MODEL") or str(tmp_path / "model")
    if not os.environ.get("ENAT_JAX_DEMO_MODEL"):
        tiny.make_generator().save(model)
    with served(model, tmp_path) as address:
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        # Draw, with a setting that a person has moved.
        page.locator("#num_steps input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        steps = int(page.locator("#num_steps input[type=number]").input_value())
        page.click("#draw")
        thumbnails(page).nth(2).wait_for()
        page.locator("#animation img").wait_for()
        page.locator("#strip img").wait_for()
        shot(page, "drawn")
        with page.expect_download() as started:
            page.click("#download")
        with (
            zipfile.ZipFile(started.value.path()) as archive,
            archive.open(archive.namelist()[1]) as file,
        ):
            inside = json.loads(PIL.Image.open(file).text["parameters"])
        assert (inside["index"], inside["seed"], inside["sampler"]["num_steps"]) == (1, 0, steps)

        # Paint over the second one, and fill it.
        thumbnails(page).nth(1).click()
        page.click("#paint")
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        page.wait_for_timeout(4000)  # the editor draws its picture when it likes
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 170, y - 160)  # within the first of 4x4 tokens
        page.mouse.down()
        page.mouse.move(x - 155, y - 160)
        page.mouse.up()
        page.wait_for_timeout(1000)
        shot(page, "painted")
        page.click("#fill")
        page.locator("#animation img").wait_for(state="detached")
        page.wait_for_function("document.querySelectorAll('#pictures .thumbnail-item').length == 6")
        shot(page, "filled")
        thumbnails(page).nth(0).click()
        with page.expect_download() as started:
            page.locator("#pictures [title=Download], #pictures [aria-label=Download]").click()
        with PIL.Image.open(started.value.path()) as picture:
            inside = json.loads(picture.text["parameters"])
        assert inside["image"].startswith("00001_") and inside["class_name"] == "no class"

        # Mistakes are one sentence each.
        for name, content, words in (
            ("bad.png", b"no picture", "bad.png: is not a JPEG"),
            ("notes.txt", b"text", "notes.txt"),
        ):
            (tmp_path / name).write_bytes(content)
            page.set_input_files("input[type=file]", tmp_path / name)
            page.locator(".toast-body", has_text=words).wait_for()
        page.locator("#seed input").fill("1e300")
        page.click("#fill")
        page.locator(".toast-body", has_text="The seed must be a whole number").wait_for()
        shot(page, "mistakes")
        assert "Traceback" not in page.content()
        elsewhere = {urllib.parse.urlsplit(url).hostname for url in asked} - {None}
        assert elsewhere == {"127.0.0.1"}
