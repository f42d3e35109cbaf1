"""Rows are planned, measured one by one, kept, and told in Markdown; nothing is measured twice."""

import json
import signal

import ml_collections
import pytest

from enat_jax.profiling import profile_rows, reports

CONFIG = ml_collections.ConfigDict(
    {
        "model": {"attention": "xla", "remat": "none"},
        "sampler": {"num_steps": 8, "num_segments": 8},
    }
)
MACHINE = {
    "machine": {
        "backend": "gpu",
        "device": "Toy 1",
        "cpus": 4,
        "jax": "0.0",
        "driver": None,
        "memory_bytes": 2**31,
        "platform_version": "toy",
    },
    "matrix_rate": 5e11,
    "dtype": "bfloat16",
}


def rows(*names):
    configs = {f"configs/{name}.py": CONFIG for name in names or ("a",)}
    return profile_rows.list_rows(
        configs,
        "codec.py",
        dtype="bfloat16",
        most=64,
        repeats=5,
        shapes=2,
        overrides=["--config.x=1"],
    )


def timed(seconds, **changes):
    middle = sorted(seconds)[len(seconds) // 2]
    rates = [8 / middle, 8 / max(seconds), 8 / min(seconds)]
    values = {"images": 8, "exact": 4e9, "padding": 0.0, "fraction": 0.5, "compile_seconds": 3.0}
    values |= {"peak_bytes": 2**30, "peak_of": "device memory in use"}
    return values | {"seconds": seconds, "images_per_second": rates} | changes


def measured(arguments, seconds=(1.0, 2.0, 4.0), own_peak=True):
    """What the program called with ``arguments`` would have written."""
    batch = arguments[arguments.index("--batch") + 1]
    result = {"benchmark": arguments[0], "batch_size": 8, "model": {"dtype": "bfloat16"}}
    if arguments[0] == "train":
        parts = [timed(seconds, probability=0.6), timed((6.0,), probability=0.2)]
        result |= {"timed": parts, "fraction": 0.25, "padding": 0.125, "shapes": 40}
        result["timed_share"] = 0.8
    else:
        result["rows"] = [timed(seconds)]
    if batch == "fit":
        last = {"batch": 16, "fits": False, "reason": "needs 3 GiB of 2 GiB that are free"}
        tries = [{"batch": 8, "fits": True, "reason": ""}, last]
        result["fit"] = {"batch": 8, "own_peak": own_peak, "tries": tries}
    return result


class Machine:
    """Answers calls of ``benchmark`` and remembers them; a call takes a minute."""

    def __init__(self, machine=MACHINE):
        self.calls, self.minutes, self.machine = [], 0, machine

    def __call__(self, arguments, seconds):
        self.calls.append((arguments, seconds))
        if arguments[0] == "machine":
            return self.machine
        self.minutes += 1
        return self.answer(arguments)

    def answer(self, arguments):
        if "--config.model.attention=cudnn" in arguments:
            return {"failed": "RuntimeError: cuDNN is | not detected.", "stderr": ["a", "b"]}
        fast = "--config.model.remat=dots" in arguments
        return measured(arguments, (0.5,) if fast else (1.0, 2.0, 4.0))

    def profile(self, out, planned=None, minutes=None, **values):
        return profile_rows.profile(
            rows() if planned is None else planned,
            out,
            dtype="bfloat16",
            minutes=minutes,
            row_minutes=2,
            call=self,
            clock=lambda: 60 * self.minutes,
            **values,
        )


def test_all_baselines_come_first_then_one_setting_each():
    planned = rows("a", "b")
    assert [(x.config[8], x.task, x.setting) for x in planned[:6]] == [
        ("a", "train", "baseline"),
        ("a", "sampler", "baseline"),
        ("b", "train", "baseline"),
        ("b", "sampler", "baseline"),
        ("a", "train", "attention=cudnn"),
        ("a", "sampler", "attention=cudnn"),
    ]
    of_a = [(x.task, x.setting) for x in planned[6:] if x.config == "configs/a.py"]
    assert of_a == [
        ("train", "remat=dots"),
        ("sampler", "segments=1"),
        ("train", "remat=full"),
        ("sampler", "segments=2"),
        ("sampler", "segments=4"),
    ]
    assert " ".join(planned[5].arguments) == (
        "sampler --config configs/a.py --dtype bfloat16 --most 64 --repeats 5 --decode "
        "--tokenizer-config codec.py --config.x=1 --config.model.attention=cudnn --segments 8"
    )
    assert len({x.arguments for x in planned}) == len(planned)


def test_the_baseline_is_what_the_config_says():
    config = ml_collections.ConfigDict(
        {
            "model": {"attention": "cudnn", "remat": "full"},
            "sampler": {"num_steps": 4, "num_segments": 2},
        }
    )
    planned = profile_rows.list_rows(
        {"c.py": config}, "codec.py", dtype="float32", most=1, repeats=1, shapes=1
    )
    names = lambda task: [x.setting for x in planned if x.task == task]  # noqa: E731
    assert names("train") == ["baseline", "attention=xla", "remat=none", "remat=dots"]
    assert names("sampler") == ["baseline", "attention=xla", "segments=1", "segments=4"]
    assert planned[1].arguments[-2:] == ("--segments", "2")


def test_figures_of_training_are_expectations():
    found = profile_rows.figures(measured(["train", "--batch", "8"]))
    # 0.6 and 0.2: three quarters of the steps, and one.
    assert found["images_per_second"] == pytest.approx(
        [8 / (0.75 * 2 + 1.5), 8 / (0.75 * 4 + 1.5), 8 / (0.75 * 1 + 1.5)]
    )
    assert found["exact_rate"] == pytest.approx(4e9 / 3)
    assert (found["fraction"], found["padding"], found["compile_seconds"]) == (0.25, 0.125, 3.0)
    assert found["shapes"] == 40 and found["timed_share"] == 0.8


def test_every_row_is_measured_and_failures_are_rows(tmp_path):
    machine = Machine()
    saved = machine.profile(tmp_path)
    assert saved["left"] == 0 and len(saved["rows"]) == 9
    assert json.loads((tmp_path / "profile.json").read_text()) == saved
    failed = [x for x in saved["rows"] if "failed" in x]
    assert [x["setting"] for x in failed] == ["attention=cudnn"] * 2
    assert failed[0]["stderr"] == ["a", "b"]
    # Others begin with the batch of their baseline.
    assert all(call[-2:] == ["--batch", "fit"] for call, _ in machine.calls[1:3])
    assert all(call[-4:] == ["--batch", "fit", "--first", "8"] for call, _ in machine.calls[3:])
    assert {seconds for _, seconds in machine.calls} == {120}


def test_time_runs_out_and_a_later_call_goes_on(tmp_path):
    first = Machine()
    saved = first.profile(tmp_path, minutes=3)
    assert [len(saved["rows"]), saved["left"]] == [3, 6]
    assert "3; 6 left for another call" in (tmp_path / "profile.md").read_text()
    second = Machine()
    saved = second.profile(tmp_path)
    assert [len(saved["rows"]), saved["left"], second.minutes] == [9, 0, 6]
    assert second.calls[1][0][-2:] == ["--first", "8"]  # of the baseline that was there already
    third = Machine()
    assert third.profile(tmp_path)["rows"] == saved["rows"] and third.minutes == 0


def test_an_interruption_keeps_what_was_measured(tmp_path):
    class Interrupted(Machine):
        def answer(self, arguments):
            if self.minutes == 3:
                raise KeyboardInterrupt
            return super().answer(arguments)

    with pytest.raises(KeyboardInterrupt):
        Interrupted().profile(tmp_path)
    kept = json.loads((tmp_path / "profile.json").read_text())
    assert [x["setting"] for x in kept["rows"]] == ["baseline", "baseline"]
    assert "baseline" in (tmp_path / "profile.md").read_text()


def test_rows_of_two_machines_do_not_mix(tmp_path):
    Machine().profile(tmp_path, minutes=1)
    other = MACHINE | {"machine": MACHINE["machine"] | {"device": "Toy 2"}}
    with pytest.raises(ValueError, match="Toy 1.*Toy 2.*choose another --out"):
        Machine(other).profile(tmp_path)
    with pytest.raises(ValueError, match="the machine cannot be measured: no device"):
        Machine({"failed": "no device", "stderr": []}).profile(tmp_path)


def test_a_peak_that_is_not_its_own_is_measured_again(tmp_path):
    class RanOut(Machine):
        def answer(self, arguments):
            again = timed((1.0,), peak_bytes=123)
            found = measured(arguments, own_peak=False)
            return found if "fit" in arguments else found | {"rows": [again]}

    machine = RanOut()
    (row,) = machine.profile(tmp_path, [rows()[1]])["rows"]
    assert machine.calls[-1][0][-2:] == ["--batch", "8"]
    assert row["peak_bytes"] == 123 and row["fit"]["tries"][1]["batch"] == 16


def test_the_fastest_training_step_is_traced(tmp_path):
    machine = Machine()
    saved = machine.profile(tmp_path, trace=tmp_path / "trace")
    last = machine.calls[-1][0]
    assert "--config.model.remat=dots" in last
    assert last[-4:] == ["--batch", "8", "--trace", str(tmp_path / "trace" / "a")]
    assert saved["traces"]["configs/a.py"]["setting"] == "remat=dots"
    assert "Trace of a, remat=dots, batch 8: " in (tmp_path / "profile.md").read_text()


def test_the_markdown(tmp_path):
    saved = Machine().profile(tmp_path)
    text = (tmp_path / "profile.md").read_text()
    assert text == reports.profile_markdown(saved)
    lines = text.splitlines()
    assert lines[0] == "# Profile of Toy 1"
    assert "| matrix rate | 500 GMA/s in bfloat16 (1 TFLOP/s) |" in lines
    assert "| memory for arrays | 2 GiB |" in lines and "| driver | unknown |" in lines
    assert lines.index("## a: sampling, decoded to images") < lines.index("## a: training")
    start = lines.index("## a: training")
    # 8 images in three quarters of 0.5 s and a quarter of 6 s.
    assert lines[start + 2] == "Best: **remat=dots**, 4.267 images/s at batch 8, bfloat16."
    assert lines[start + 6] == (
        "| remat=dots | 8 | 4.267 (4.267-4.267) | 2.133 | 25.0% | +12.5% | 1 | 3.0 "
        "| 16 needs 3 GiB of 2 GiB that are free |"
    )
    names = [line.split("|")[1].strip() for line in lines[start + 6 : start + 10]]
    assert names == ["remat=dots", "baseline", "remat=full", "attention=cudnn"]
    assert "failed: RuntimeError: cuDNN is \\| not detected." in lines[start + 9]
    assert len({line.replace("\\|", "").count("|") for line in lines[start + 4 : start + 10]}) == 1
    assert "peak: device memory in use" in text


def test_a_report_of_failures_alone():
    row = {"config": "a.py", "task": "train", "setting": "baseline", "failed": "no"}
    saved = MACHINE | {"rows": [row], "traces": {}, "date": "now", "left": 0}
    assert "No row worked." in reports.profile_markdown(saved)
    assert reports.best([row]) == []


def test_why_a_program_ended():
    traceback = """\
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: first

The above exception was the direct cause of the following exception:

jax.errors.JaxRuntimeError: INTERNAL: last
more of it
--------------------
For simplicity, JAX has removed its internal frames from the traceback.
"""
    assert profile_rows.reason(traceback, 1) == "jax.errors.JaxRuntimeError: INTERNAL: last"
    assert profile_rows.reason("batch 8: fits\nerror: unknown config key 'x'\n", 2) == (
        "unknown config key 'x'"
    )
    assert profile_rows.reason("", -signal.SIGKILL) == ("ended by SIGKILL, as when memory runs out")
    assert profile_rows.reason("", -signal.SIGSEGV) == "ended by SIGSEGV"
    assert profile_rows.reason("some warning\n", 3) == "exit code 3"


def test_rows_are_processes(tmp_path):
    found = profile_rows.run(["train", "--config", str(tmp_path / "no.py"), "--batch", "1"], 100)
    assert found["failed"] == f"there is no config file {tmp_path / 'no.py'}"
    found = profile_rows.run(["machine"], 0.01)
    assert found == {"failed": "took longer than 0.000167 minutes", "stderr": []}


def test_sigterm_is_an_interruption():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), profile_rows.ended_as_by_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
