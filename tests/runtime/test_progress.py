"""Progress: a bar on a terminal, a few plain lines in a log file, nothing of other processes."""

import io
import time

import tqdm

from enat_jax.runtime import progress


def test_a_log_file_gets_few_plain_lines():
    stream = io.StringIO()
    with progress.Progress(1000, 32, stream=stream, interval=3600) as bar:
        for step in range(1, 501):
            bar.update(step, loss=1.0 / step if step % 100 == 0 else None)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("step 500/1000, loss 0.002, ")
    assert "images/s" in line and "left" in line
    assert "\r" not in line


def test_plain_lines_count_from_the_step_of_the_resume(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(1000, 8, initial_step=900, stream=stream, interval=10)
    for step in range(901, 921):
        now[0] += 1.0
        bar.update(step)
    bar.close()
    assert stream.getvalue().splitlines() == [
        "step 910/1000, 8 images/s, 00:10 elapsed, 01:30 left",
        "step 920/1000, 8 images/s, 00:20 elapsed, 01:20 left",
    ]


def test_other_processes_show_nothing(monkeypatch):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with progress.Progress(10, 1, stream=stream, interval=0) as bar:
        bar.update(1)
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with progress.Progress(20, 4, initial_step=10, stream=stream) as bar:
        for step in range(11, 21):
            time.sleep(0.02)
            bar.update(step, loss=0.75)
    shown = stream.getvalue()
    assert "10/20" in shown  # the bar starts where the run goes on
    assert "20/20" in shown.split("\r")[-1]
    assert "loss 0.75" in shown and "images/s" in shown
