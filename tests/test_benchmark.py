"""The programs of the benchmark: what they print and write, and what they say to mistakes."""

import functools
import json
import re

import jax
import pytest
import tiny_config

from enat_jax import benchmark
from enat_jax.profiling import (
    accelerators,
    batch_fit,
    loader_timing,
    profile_rows,
    timing,
    tpu_programs,
)
from enat_jax.runtime import cli, matrix_rate

SMALL = (32, 48, 32)
TIMED = tiny_config.measurement(label={"visible": (0, 1), "cached": (0, 1), "reuse": True})
CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({config})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("{config}", repr(tiny_config.config())))
    return path


@pytest.fixture
def quick(monkeypatch):
    """One small matrix product: the program measures the same things, faster."""
    monkeypatch.setattr(timing, "MATMUL_SHAPE", SMALL)
    for name in ("time_sampler", "time_training"):
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


def test_the_largest_batch_may_be_asked_for(config_file, capsys, quick):
    arguments = ["--config", config_file, "--batch", "fit", "--first", 9, "--most", 2]
    arguments += ["--repeats", 1, "--segments", 1, "--steps", 1, "--json", "-"]
    code, stdout, stderr = ends(capsys, "sampler", *arguments)
    assert code is None
    found = json.loads(stdout)
    assert found["batch_size"] == 2 and found["rows"][0]["images"] == 2
    assert found["fit"]["batch"] == 2 and found["fit"]["own_peak"]
    assert [x["batch"] for x in found["fit"]["tries"]] == [2]
    assert "batch 2: fits\n" in stderr and "sampler: batch 2, 1 steps" in stderr


def test_training_is_fitted_and_traced(config_file, tmp_path, capsys, monkeypatch, quick):
    asked = {}

    def fit_training(task, **how):
        asked.update(how)
        found = timing.TrainingMeasurement(7, 0.2, (TIMED,), (0.6,))
        return batch_fit.Fit(4, found, ())

    monkeypatch.setattr(batch_fit, "fit_training", fit_training)
    traced = []
    monkeypatch.setattr(batch_fit, "trace_training", lambda *x: traced.append(x))
    arguments = ["--batch", "fit", "--time", 2, "--repeats", 3, "--trace", tmp_path / "trace"]
    code, stdout, _ = ends(capsys, "train", "--config", config_file, *arguments, "--json", "-")
    assert code is None and json.loads(stdout)["batch_size"] == 4
    assert {k: asked[k] for k in ("first", "most", "max_timed", "repeats")} == {
        "first": 8,
        "most": 2048,
        "max_timed": 2,
        "repeats": 3,
    }
    ((task, directory),) = traced
    assert task.batch_size == 4 and directory == str(tmp_path / "trace")


def test_the_machine_program(capsys, monkeypatch, quick):
    monkeypatch.setattr(matrix_rate, "RATE_SHAPE_CPU", SMALL)
    code, stdout, stderr = ends(capsys, "machine", "--json", "-")
    found = json.loads(stdout)
    assert code is None and found["dtype"] == "bfloat16" and found["matrix_rate"] > 0
    assert found["machine"]["backend"] == jax.default_backend()
    assert found["machine"]["memory_bytes"] > 2**20
    assert "GMA/s of bfloat16" in stderr
    code, _, stderr = ends(capsys, "machine", "stray")
    assert code == 2 and stderr == "error: arguments that mean nothing: stray\n"


def test_the_profile_program(config_file, tmp_path, capsys, monkeypatch, quick):
    codec = tmp_path / "codec.py"
    codec.write_text(CONFIG.replace("{config}", repr({"task": "vqgan", "model": {}})))
    out = tmp_path / "out"
    calls = []

    def profile(rows, place, **how):
        calls.append((rows, how))
        out.mkdir()
        (out / "profile.md").write_text("# Profile\n")
        return {"left": 2}

    monkeypatch.setattr(profile_rows, "profile", profile)
    arguments = ["profile", "--config", config_file, "--out", out, "--minutes", "0.5"]
    code, stdout, stderr = ends(
        capsys, *arguments, "--tokenizer-config", codec, "--config.model.width=32"
    )
    assert (code, stdout) == (None, "# Profile\n")
    assert stderr == "2 rows are left: call this again to go on\n"
    ((rows, how),) = calls
    assert how["minutes"] == 0.5 and how["dtype"] == "bfloat16" and how["trace"] is None
    assert {row.config for row in rows} == {str(config_file)}
    assert all("--config.model.width=32" in row.arguments for row in rows)
    code, _, stderr = ends(capsys, *arguments, "--tokenizer-config", tmp_path / "no.py")
    assert code == 2 and stderr.startswith("error: there is no config file")
    code, _, stderr = ends(
        capsys, *arguments, "--tokenizer-config", codec, "--config.model.kind=gan"
    )
    assert code == 2 and stderr.startswith("error: model.kind='gan' is unknown")


@pytest.mark.slow
def test_the_scaling_program(config_file, capsys, quick):
    arguments = ["scaling", "--config", config_file, "--layouts", "fsdp=2", "--json", "-"]
    arguments += ["--config.mask.reuse_probability=0"]
    # The codebook is not there, and not needed.
    with_words = config_file.read_text().replace("'max_", "'words_from_codebook': True, 'max_")
    config_file.write_text(with_words)
    code, stdout, stderr = ends(capsys, *arguments)
    assert code is None
    found = json.loads(stdout)
    (layout,) = found["layouts"]
    assert layout["name"] == "fsdp=2" and layout["batch_size"] == 2  # the config's
    assert [x["label"]["reuse"] for x in layout["shapes"]] == [False]
    assert found["assumptions"] == {"of_flops": 0.45, "of_bandwidth": 0.8}
    assert "Predictions, not measurements" in stderr and "H100 SXM (prediction)" in stderr


def test_layouts_that_mean_nothing(config_file, capsys):
    arguments = ["scaling", "--config", config_file]
    code, _, stderr = ends(capsys, *arguments, "--layouts", "model=2")
    assert code == 2 and "layout 'model=2': expected such as data=4,fsdp=2" in stderr
    code, _, stderr = ends(capsys, *arguments, "--layouts", "data=2", "--devices", "2")
    assert code == 2 and "not allowed with" in stderr
    code, _, stderr = ends(capsys, *arguments, "--devices", "2", "--of-flops", "2")
    assert code == 2 and stderr == "error: of_flops=2.0 must lie in (0, 1]\n"


def test_topologies_and_what_only_they_have(config_file, tmp_path, capsys):
    arguments = ["scaling", "--config", config_file]
    tpu = [*arguments, "--topology", "v5e:2x4"]
    codec = tmp_path / "codec.py"
    codec.write_text(CONFIG.replace("{config}", repr({"task": "vqgan", "data": {"size": 32}})))
    for mistaken, message in [
        ((*arguments, "--batch", "fit"), "--batch fit needs --topology, such as v5e:2x4"),
        ((*arguments, "--remat", "full"), "--remat needs --topology"),
        ((*arguments, "--sampler"), "--sampler needs --topology"),
        ((*arguments, "--topology", "v5e:2by4"), "no topology 'v5e:2by4': give one of v5e:1x1"),
        ((*tpu, "--remat", "all"), "'all' must be of none, dots, full, with commas"),
        ((*tpu, "--tokenizer-config", codec), "give --sampler too"),
        (("scaling", "--config", codec, "--topology", "v5e:2x4", "--sampler"), "a transformer's"),
        (("scaling", "--config", codec), "task='vqgan', but task='enat' is needed"),
    ]:
        code, stdout, stderr = ends(capsys, *mistaken)
        assert code == 2 and stdout == "" and message in stderr.splitlines()[-1]


def test_topologies_are_reported(config_file, capsys, monkeypatch):
    """What the compiler of TPUs gives is in tests/profiling/test_tpu_programs.py."""
    hardware = accelerators.TPUS["v5e"]
    made = lambda name: accelerators.Topology(name, jax.devices()[:2], hardware, 1000)  # noqa: E731

    def training(task, topology, mesh, rules, batch, bucket):
        assert bucket is None or bucket in task.buckets
        assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
        full = task.model.remat == "full"
        return tpu_programs.TooLarge(batch, (10 if full else 20) * batch, 1000, 1.0, 1.0)

    monkeypatch.setattr(accelerators, "topology", made)
    monkeypatch.setattr(tpu_programs, "training", training)
    options = ["--topology", "v5e:1x1,v5e:2x2", "--layouts", "fsdp=2", "--json", "-"]
    options += ["--remat", "none,full", "--batch", "200"]
    code, stdout, stderr = ends(capsys, "scaling", "--config", config_file, *options)
    assert code is None
    rows = json.loads(stdout)["rows"]
    none, full = "remat=none, largest shape", "remat=full, largest shape"
    assert [(x["topology"], x["setting"], x["tries"][0]["needed"]) for x in rows] == [
        *[("v5e:1x1", none, 4000), ("v5e:1x1", full, 2000)],
        *[("v5e:2x2", none, 4000), ("v5e:2x2", full, 2000)],
    ]
    code, stdout, _ = ends(capsys, "scaling", "--config", config_file, *options, "--shapes", "1")
    settings = {x["setting"].rpartition(", ")[0] for x in json.loads(stdout)["rows"]}
    assert code is None and len(settings) == 4
    assert any("no reuse" in x for x in settings) and any("cached" in x for x in settings)
    assert f"v5e:2x2, fsdp=2, {full}: batch 200 needs 2e-06 GB: does not fit (1 s)" in stderr
    assert "| topology | layout | program | batch |" in stderr
    options = ["--topology", "v5e:2x2", "--layouts", "data=2", "--sampler", "--batch", "3"]
    code, _, stderr = ends(capsys, "scaling", "--config", config_file, *options)
    assert code == 2 and "a batch of 3 images cannot be divided among 2 devices" in stderr


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
        patched.setattr(loader_timing, "MIN_SECONDS", 0.02)
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
