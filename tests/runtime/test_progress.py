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


def test_compilation_is_not_in_the_time_left_which_changes_slowly(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    stream = io.StringIO()
    # Two shapes compile for 40 s each; a step takes a second, later two.
    seconds = {1: 40.0, 12: 41.0} | {step: 2.0 for step in range(43, 62)}
    with progress.Progress(100, 8, stream=stream, interval=10) as bar:
        for step in range(1, 62):
            if step == 12:
                bar.leave_out()
            now[0] += seconds.get(step, 1.0)
            bar.update(step)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/100, 00:40 elapsed, ? left"  # nothing is known yet
    assert lines[1] == "step 11/100, 8 images/s, 00:50 elapsed, 01:29 left"
    assert lines[2] == "step 12/100, 8 images/s, 01:31 elapsed, 01:28 left"
    assert lines[5] == "step 42/100, 8 images/s, 02:01 elapsed, 00:58 left"
    left = [60 * int(x[:2]) + int(x[3:5]) for x in (line.split(", ")[3] for line in lines[5:])]
    assert len(left) == 5 and max(abs(a - b) for a, b in zip(left, left[1:], strict=False)) < 8


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
