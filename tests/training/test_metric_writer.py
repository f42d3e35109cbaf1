import io
import json
import math
import struct
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto import event_pb2

from enat_jax.training import metric_writer


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """The events of all event files, oldest first: TFRecord framing, checksums not checked."""
    events = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
        assert at == len(content)
    return events


def read_scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in read_events(workdir)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_scalars_go_to_both_files(tmp_path):
    before = time.time() - 0.001
    with metric_writer.MetricWriter(tmp_path / "run") as writer:
        writer.scalars(10, {"loss": jnp.float32(0.5), "accuracy": np.float32(0.25)})
        writer.scalars(20, {"loss": 0.125})
    lines = read_lines(tmp_path / "run")
    assert without_time(lines) == [
        {"step": 10, "loss": 0.5, "accuracy": 0.25},
        {"step": 20, "loss": 0.125},
    ]
    assert before <= lines[0]["time"] <= lines[1]["time"] <= time.time() + 0.001
    assert read_scalars(tmp_path / "run") == [
        (10, "loss", 0.5),
        (10, "accuracy", 0.25),
        (20, "loss", 0.125),
    ]


def test_lines_are_on_disk_at_once(tmp_path):
    with metric_writer.MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0})
        assert len(read_lines(tmp_path)) == 1


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with metric_writer.MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert without_time(read_lines(tmp_path)) == [{"step": 1, "loss": None, "norm": None}]
    assert np.isnan(read_scalars(tmp_path)[0][2])


def test_images_can_be_decoded_again(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with metric_writer.MetricWriter(tmp_path) as writer:
        writer.images(5, {"samples": picture, "grey": picture[..., :1]})
    images = [(e.step, v) for e in read_events(tmp_path) for v in e.summary.value]
    assert [(step, value.tag) for step, value in images] == [(5, "samples"), (5, "grey")]
    decoded = [
        np.asarray(PIL.Image.open(io.BytesIO(v.image.encoded_image_string))) for _, v in images
    ]
    np.testing.assert_array_equal(decoded[0], picture)
    np.testing.assert_array_equal(decoded[1].reshape(6, 9, -1)[..., 0], picture[..., 0])


def test_resuming_leaves_no_duplicates(tmp_path):
    with metric_writer.MetricWriter(tmp_path) as writer:
        for step in (0, 10, 20, 30):
            writer.scalars(step, {"loss": float(step)})
    with metric_writer.MetricWriter(tmp_path, resume_step=20) as writer:
        # At step 20 the loss is there already, the evaluation is not.
        writer.scalars(20, {"loss": 20.0})
        writer.scalars(20, {"loss": 20.0, "eval": 1.0})
        writer.scalars(30, {"loss": 31.0})
    assert without_time(read_lines(tmp_path)) == [
        {"step": 0, "loss": 0.0},
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 20, "eval": 1.0},
        {"step": 30, "loss": 31.0},
    ]
    starts = [e for e in read_events(tmp_path) if e.session_log.status == e.session_log.START]
    starts = [e.step for e in starts if e.HasField("session_log")]
    assert starts == [0, 21]  # TensorBoard hides what older files hold from these steps on


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    with metric_writer.MetricWriter(tmp_path) as writer:
        writer.scalars(10, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 11, "lo')
    with metric_writer.MetricWriter(tmp_path, resume_step=11) as writer:
        writer.scalars(11, {"loss": 2.0})
    assert without_time(read_lines(tmp_path)) == [
        {"step": 10, "loss": 1.0},
        {"step": 11, "loss": 2.0},
    ]


def test_starting_anew_drops_earlier_lines(tmp_path):
    for _ in range(2):
        with metric_writer.MetricWriter(tmp_path) as writer:
            writer.scalars(0, {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 1
    assert not list(tmp_path.glob(".*"))


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer.jax, "process_index", lambda: 1)
    with metric_writer.MetricWriter(tmp_path / "run") as writer:
        writer.scalars(0, {"loss": 1.0})
        writer.images(0, {"grid": np.zeros((2, 2, 1), np.uint8)})
    assert not (tmp_path / "run").exists()


def test_reserved_names_and_odd_pictures_are_refused(tmp_path):
    with metric_writer.MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="step"):
            writer.scalars(0, {"step": 1.0})
        with pytest.raises(ValueError, match="float32"):
            writer.images(0, {"grid": np.zeros((2, 2, 1), np.float32)})


class Wandb(types.ModuleType):
    """Stands in for the package wandb and for its run; writes down what is asked of it."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.fails = fails
        self.calls = []

    def record(self, name, *args):
        if name in self.fails:
            raise ConnectionError(f"{name} cannot be reached")
        self.calls.append((name, *args))

    def init(self, **settings):
        self.record("init", settings)
        return self

    def define_metric(self, name, step_metric=None):
        self.record("define_metric", name, step_metric)

    def log(self, values):
        self.record("log", values)

    def Image(self, picture):
        return picture.shape, picture.sum()

    def finish(self, exit_code):
        self.record("finish", exit_code)

    def named(self, name):
        return [call[1] for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_weights_and_biases_gets_the_same(tmp_path, wandb):
    settings = {"project": "enat", "name": "first", "mode": "offline"}
    with metric_writer.MetricWriter(tmp_path, wandb=settings) as writer:
        writer.scalars(10, {"loss": jnp.float32(0.5), "norm": float("inf")})
        writer.images(10, {"grid": np.ones((2, 3, 3), np.uint8), "grey": np.ones((4, 5, 1), "u1")})
    (started,) = wandb.named("init")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert started == settings | {"id": run_id, "resume": "allow", "dir": str(tmp_path)}
    assert wandb.calls[1:] == [
        ("define_metric", "step", None),
        ("define_metric", "*", "step"),
        ("log", {"step": 10, "loss": 0.5, "norm": math.inf}),
        ("log", {"step": 10, "grid": ((2, 3, 3), 18), "grey": ((4, 5), 20)}),
        ("finish", 0),
    ]
    assert without_time(read_lines(tmp_path)) == [{"step": 10, "loss": 0.5, "norm": None}]


def test_a_resumed_run_is_the_same_run_there(tmp_path, wandb):
    for resume_step in (None, 20, 30, None):
        with metric_writer.MetricWriter(tmp_path, resume_step, wandb={"project": "enat"}):
            pass
    first, second, third, anew = (settings["id"] for settings in wandb.named("init"))
    assert first == second == third != anew
    assert (tmp_path / "wandb_run_id").read_text() == f"{anew}\n"


def test_a_run_that_ends_in_an_error_is_marked(tmp_path, wandb):
    with pytest.raises(OSError), metric_writer.MetricWriter(tmp_path, wandb={}):
        raise OSError
    assert wandb.named("finish") == [1]


def test_a_failing_service_does_not_end_the_run(tmp_path, wandb, caplog):
    with metric_writer.MetricWriter(tmp_path, wandb={}) as writer:
        wandb.fails = ("log", "finish")
        for step in (10, 20):
            writer.scalars(step, {"loss": 1.0})
        writer.images(20, {"grid": np.zeros((2, 2, 3), np.uint8)})
        wandb.fails = ("finish",)
        writer.scalars(30, {"loss": 1.0})
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]
    assert wandb.named("log") == [{"step": 30, "loss": 1.0}]  # it may come back
    (warning,) = caplog.messages
    assert "log cannot be reached" in warning


def test_a_service_that_is_down_stops_a_new_run_but_no_old_one(tmp_path, wandb, caplog):
    with metric_writer.MetricWriter(tmp_path, wandb={}) as writer:
        writer.scalars(10, {"loss": 1.0})
    run_id = (tmp_path / "wandb_run_id").read_text()
    wandb.fails = ("init",)
    with pytest.raises(ValueError, match="does not start: init cannot be reached"):
        metric_writer.MetricWriter(tmp_path, wandb={})
    assert len(read_lines(tmp_path)) == 1  # nothing was begun anew
    with metric_writer.MetricWriter(tmp_path, 10, wandb={}) as writer:
        writer.scalars(20, {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 2
    assert (tmp_path / "wandb_run_id").read_text() == run_id
    assert len(caplog.messages) == 1


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        metric_writer.MetricWriter(tmp_path, wandb={"project": "enat"})


def test_other_processes_log_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # they do not even need the package
    monkeypatch.setattr(metric_writer.jax, "process_index", lambda: 1)
    with metric_writer.MetricWriter(tmp_path / "run", wandb={"project": "enat"}) as writer:
        writer.scalars(0, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
