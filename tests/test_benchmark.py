"""Speed is measured in exact work, and every number can be recomputed from the others."""

import dataclasses
import functools
import json
import math
import re
import statistics

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from enat_jax import benchmark, cli, costs, loader_timing, shape_buckets, timing
from enat_jax.models import nat

SMALL = (32, 48, 32)
TWO_STEPS = dataclasses.replace(tiny.SETTINGS, num_steps=2)
ONE_STEP = dataclasses.replace(tiny.SETTINGS, num_steps=1)
# ml_collections loads config files by a way that Python is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({config})
"""


def config():
    return {
        "task": "enat",
        "seed": 0,
        "model": {
            "kind": "enat",
            "num_tokens": 16,
            "codebook_size": 8,
            "num_classes": 3,
            "width": 16,
            "num_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
        },
        "mask": {"mask_ratio": "cosine", "min_visible": 0, "reuse_probability": 0.5},
        "training": {"max_shapes": 3},
        "sampler": {"num_steps": 3, "guidance_scale": 1.0},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"batch_size": 2, "num_steps": 10},
    }


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("{config}", repr(config())))
    return path


def measurement(**changes):
    values = dict(
        label={},
        images=4,
        exact=100.0,
        padded=150.0,
        compile_seconds=1.0,
        seconds=(4.0, 1.0, 2.0),
        matmul_rates=(100.0, 300.0, 200.0, 200.0),
        peak_bytes=2**20,
        peak_of="memory",
    )
    return timing.Measurement(**values | changes)


def test_rates_are_of_exact_work():
    found = measurement()
    assert found.images_per_second == (2.0, 1.0, 4.0)  # median, least, largest
    assert found.exact_rate == 50.0 and found.matmul_rate == 200.0
    assert found.fraction == 0.25
    assert found.padding == 0.5
    assert dataclasses.replace(found, padded=1e9).fraction == 0.25


def test_expectations_weigh_steps_by_their_probability():
    slow = measurement(seconds=(4.0,), exact=100.0)
    fast = measurement(seconds=(1.0,), exact=50.0)
    found = timing.TrainingMeasurement(7, 0.2, (fast, slow), (0.6, 0.2))
    assert found.share == pytest.approx(0.8)
    assert found.images_per_second == pytest.approx(4 / (0.75 * 1 + 0.25 * 4))
    assert found.fraction == pytest.approx((0.75 * 50 + 0.25 * 100) / 1.75 / 200)


def test_the_sampler_is_timed_for_every_number_of_segments():
    found = timing.measure_sampler(
        tiny.TRANSFORMER, TWO_STEPS, 2, [1, 2, 9], repeats=2, matmul_shape=SMALL
    )
    assert [x.label["segments"] for x in found] == [1, 2]  # 9 is 2, the number of steps
    one, exact = found
    dims = costs.dims_of(tiny.TRANSFORMER)
    assert one.exact == exact.exact == costs.exact_sampling_cost(dims, 2, batch_size=2)
    assert one.padding > 0 and exact.padding == 0
    for x in found:
        assert x.images == 2 and len(x.seconds) == 2 and len(x.matmul_rates) == 3
        assert min(x.seconds) > 0 and x.compile_seconds > 0 and x.peak_bytes > 2**20
        assert x.fraction == pytest.approx(
            x.exact / statistics.median(x.seconds) / statistics.median(x.matmul_rates)
        )
        json.dumps(x.json())


def test_the_image_decoder_can_be_part_of_it():
    (found,) = timing.measure_sampler(
        tiny.TRANSFORMER, ONE_STEP, 2, [1], codec=tiny.CODEC, repeats=1, matmul_shape=SMALL
    )
    dims = costs.dims_of(tiny.TRANSFORMER)
    decoder = 2 * costs.image_decoder_cost(tiny.CODEC, 4, 4)
    assert found.exact == costs.exact_sampling_cost(dims, 1, batch_size=2) + decoder
    with pytest.raises(ValueError, match="codebook_size=9 is not the transformer's, 8"):
        timing.measure_sampler(
            tiny.TRANSFORMER, ONE_STEP, 1, [1], codec=tiny.CODEC.clone(codebook_size=9)
        )


def test_the_baseline_can_be_timed_too():
    model = nat.NAT(
        num_tokens=16, codebook_size=8, num_classes=3, width=16, num_heads=2, num_layers=1
    )
    settings = dataclasses.replace(TWO_STEPS, guidance_scale=0.0)
    (found,) = timing.measure_sampler(model, settings, 1, [2], repeats=1, matmul_shape=SMALL)
    assert found.padding == 0
    assert found.exact == costs.exact_sampling_cost(costs.dims_of(model), 2, guided=False)


@pytest.mark.parametrize("reuse_probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mask", [{"mask_ratio": "beta"}, {"mask_ratio": "cosine"}])
def test_shares_of_the_shapes_add_up(mask, reuse_probability):
    values = ml_collections.ConfigDict(config())
    values.mask = mask | {"reuse_probability": reuse_probability}
    task = benchmark.make_task(values, 2, max_shapes=5)
    probability, exact = timing.shape_shares(task)
    assert probability.sum() == pytest.approx(1)
    cost = functools.partial(costs.training_cost, costs.dims_of(task.model))
    padded = np.array([float(cost(*bucket.windows)) for bucket in task.buckets])
    expected = shape_buckets.expected_work(16, task.splits, task.buckets, cost)
    assert (probability @ padded, probability @ exact) == pytest.approx(expected)
    assert np.all(exact <= padded * (1 + 1e-12))


def test_the_training_step_is_timed():
    task = benchmark.make_task(ml_collections.ConfigDict(config()), 2)
    found = timing.measure_training(task, max_timed=1, repeats=1, matmul_shape=SMALL)
    probability, exact = timing.shape_shares(task)
    assert found.shapes == 3 and found.padding > 0
    assert found.probabilities == (probability.max(),) and found.share == probability.max()
    (timed,) = found.timed
    assert timed.images == 2 and timed.exact == 2 * exact[probability.argmax()]
    assert found.images_per_second == pytest.approx(timed.images_per_second[0])
    assert found.fraction == pytest.approx(timed.fraction)


@pytest.mark.parametrize("count", [1, 8])
def test_the_matrix_rate_is_that_of_all_devices_at_once(monkeypatch, count):
    products = []

    def timer(work, least):
        products.append((work(), least))
        return lambda: 0.5

    monkeypatch.setattr(timing, "timer", timer)
    monkeypatch.setattr(timing, "RATE_SHAPE_CPU", (3, 5, 7))
    rate = timing.matrix_rate("float32", jax.local_devices()[:count], seconds=0.25)
    assert rate == count * 3 * 5 * 7 / 0.5
    ((product, least),) = products
    assert least == 0.25
    assert product.shape == (3 * count, 7) and len(product.sharding.device_set) == count
    assert {shard.data.shape for shard in product.addressable_shards} == {(3, 7)}


def test_the_matrix_rate_of_this_machine(monkeypatch):
    monkeypatch.setattr(timing, "RATE_SHAPE_CPU", SMALL)
    assert 0 < timing.matrix_rate("bfloat16", seconds=0.01) < math.inf


def test_columns_are_aligned():
    text = benchmark.table([("a", str), ("long", lambda x: str(x**2))], [1, 1000])
    assert text == "   a     long\n   1        1\n1000  1000000"


@pytest.fixture
def quick(monkeypatch):
    """One small matrix product: the program measures the same things, faster."""
    monkeypatch.setattr(timing, "MATMUL_SHAPE", SMALL)
    for name in ("measure_sampler", "measure_training"):
        small = functools.partial(getattr(timing, name), matmul_shape=SMALL)
        monkeypatch.setattr(timing, name, small)
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)


def ends(capsys, *arguments):
    """Exit code, stdout and stderr of the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(benchmark.main, [str(x) for x in arguments])
    return end.value.code, *capsys.readouterr()


def test_the_sampler_program(config_file, tmp_path, capsys, quick):
    arguments = ["--config", config_file, "--batch", 2, "--repeats", 1, "--segments", "1"]
    arguments += ["--config.model.mlp_ratio=2", "--dtype", "bfloat16"]
    config_file.write_text(config_file.read_text().replace("'width'", "'mlp_ratio': 4, 'width'"))
    code, stdout, stderr = ends(
        capsys, "sampler", *arguments, "--steps", 2, "--json", tmp_path / "found.json"
    )
    assert (code, stderr) == (None, "")
    lines = stdout.splitlines()
    assert "batch 2, 2 steps, guidance 1" in lines[0] and "bfloat16" in lines[0]
    assert "padded GMA" in lines[3] and "exact GMA/s" in lines[3] and len(lines[3]) == len(lines[4])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"]["mlp_ratio"] == 2 and found["model"]["dtype"] == "bfloat16"
    assert found["sampler"]["num_steps"] == 2
    assert found["rows"][0]["label"] == {"segments": 1}
    assert found["rows"][0]["exact"] < found["rows"][0]["padded"]


def test_the_training_program(config_file, capsys, quick):
    arguments = ["--config", config_file, "--batch", 2, "--repeats", 1, "--time", 1]
    code, stdout, stderr = ends(capsys, "train", *arguments, "--shapes", 2, "--json", "-")
    assert code is None
    found = json.loads(stdout)  # nothing else is there; what is for people is on stderr
    assert found["shapes"] == 2 and len(found["timed"]) == 1 and found["batch_size"] == 2
    assert "2 shapes; expected padded work +" in stderr
    assert f"Timed: the 1 most probable, {found['timed_share']:.1%} of all steps" in stderr


def test_the_scaling_program(config_file, capsys, quick):
    arguments = ["scaling", "--config", config_file, "--batch", 4, "--json", "-"]
    code, stdout, stderr = ends(capsys, *arguments, "--layouts", "data=2;fsdp=2")
    assert code is None
    found = json.loads(stdout)
    assert [x["name"] for x in found["layouts"]] == ["data=2", "fsdp=2"]
    assert found["assumptions"] == {"of_flops": 0.45, "of_bandwidth": 0.8}
    data, fsdp = found["layouts"]
    assert data["batch_size"] == 4 and fsdp["parameter_bytes"] < data["parameter_bytes"]
    assert [x["label"]["reuse"] for x in data["shapes"]] == [False, True]
    assert "Predictions, not measurements" in stderr and "H100 SXM (prediction)" in stderr


def test_layouts_that_mean_nothing(config_file, capsys):
    arguments = ["scaling", "--config", config_file]
    code, _, stderr = ends(capsys, *arguments, "--layouts", "model=2")
    assert code == 2 and "layout 'model=2': expected such as data=4,fsdp=2" in stderr
    code, _, stderr = ends(capsys, *arguments, "--layouts", "data=2", "--devices", "2")
    assert code == 2 and "not allowed with" in stderr
    code, _, stderr = ends(capsys, *arguments, "--devices", "2", "--of-flops", "2")
    assert code == 2 and stderr == "error: of_flops=2.0 must lie in (0, 1]\n"


def test_mistakes_are_one_line(config_file, tmp_path, capsys, quick):
    tokenizer_config = tmp_path / "codec.py"
    tokenizer_config.write_text(
        CONFIG.replace("{config}", repr({"task": "vqgan", "model": {"layers": 3}}))
    )
    here = ("--config", config_file, "--batch", "1")
    for arguments, message in [
        (("sampler", "--config", tmp_path / "no.py", "--batch", "1"), "there is no config file"),
        (("sampler", "--config", tokenizer_config, "--batch", "1"), "task='vqgan'"),
        (("sampler", *here, "--config.model.widht=3"), "widht"),
        (("sampler", *here, "--config.model.width=wide"), "wide"),
        (("sampler", *here, "--config.model.width=15"), "self.width=15 is not divisible"),
        (("sampler", *here, "--config.model.kind=gan"), "model.kind='gan' is unknown"),
        (("sampler", *here, "--bacth=3"), "bacth"),
        (("sampler", *here, "stray"), "stray"),
        (("sampler", *here, "--decode"), "--tokenizer-config FILE go together"),
        (
            ("sampler", *here, "--decode", "--tokenizer-config", tokenizer_config),
            "config.model: .*layers",
        ),
        (("sampler", *here, "--config.sampler.guidance_scale=-1"), "guidance_scale=-1"),
        (("train", *here, "--shapes", "1"), "max_shapes=1 must be at least 2"),
    ]:
        code, stdout, stderr = ends(capsys, *arguments)
        assert code == 2 and stdout == "", arguments
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
        assert re.search(message, stderr) if ".*" in message else message in stderr, stderr


@pytest.mark.parametrize(
    "arguments", [("--batch", "0"), ("--repeats", "0"), ("--segments", "1,x"), ("--dtype", "int8")]
)
def test_wrong_numbers(config_file, capsys, arguments):
    code, _, stderr = ends(capsys, "sampler", "--config", config_file, "--batch", "1", *arguments)
    assert code == 2 and f"argument {arguments[0]}: " in stderr


def test_the_loader_is_timed_on_sets_of_several_sizes(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader_timing, "LEAST_SECONDS", 0.02)
        patched.setattr(loader_timing, "PER_FILE", 100)
        benchmark.main(
            ["loader", "--records", "300,600", "--tokens", "16", "--batch", "64", "--repeats", "2"]
            + ["--compare", "--dir", str(tmp_path), "--json", str(tmp_path / "loader.json")]
        )
    assert [p.name for p in tmp_path.iterdir()] == ["loader.json"]
    found = json.loads((tmp_path / "loader.json").read_text())
    assert [row["num_records"] for row in found["rows"]] == [300, 600]
    assert [row["num_bytes"] for row in found["rows"]] == [300 * 41, 600 * 41]
    assert all(len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in found["rows"])
    assert len(found["formats"]) == 3
    printed = capsys.readouterr().out
    assert "examples/s" in printed and "random batches, ArrayRecord: " in printed


def test_all_formats_give_the_same_records(tmp_path):
    made = loader_timing.make_tokens(tmp_path / "set", 250, 16)
    indices = np.array([249, 0, 100, 100])
    maps = [made.rows[np.arange(i, min(i + 100, 250))] for i in (0, 100, 200)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader_timing, "PER_FILE", 100)
        found = loader_timing._from_maps(maps, indices)
    np.testing.assert_array_equal(found, made.rows[indices])
