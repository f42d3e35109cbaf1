"""The cost of a step in several layouts, from the program that XLA makes for each."""

import os
import pathlib
import sys

import ml_collections
import pytest
import tiny_config

from enat_jax.profiling import accelerators, batch_fit, collectives, reports, scaling, setup
from enat_jax.runtime import sharding
from enat_jax.schedules import costs
from enat_jax.training import enat_task, train_step

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = tiny_config.config()
CONFIG["model"] |= {"num_classes": 4, "encoder_layers": 3}
CONFIG["train"] |= {"batch_size": 16}
MODERATE = accelerators.Assumptions(of_flops=0.5, of_bandwidth=0.25)
TOY = accelerators.Hardware(
    "toy", flops=1e6, memory_bytes=2e5, bandwidth=1e5, memory_bandwidth=1e6, source="made up"
)


@pytest.fixture(scope="module")
def task():
    return setup.make_task(ml_collections.ConfigDict(CONFIG), 16)


@pytest.fixture(scope="module")
def layouts(task):
    sizes = scaling.parse_layouts("data=8;data=2,fsdp=4")
    return [scaling.compile_layout(task, enat_task.RULES, x, shapes_of_each=1) for x in sizes]


def shape(**changes):
    values = dict(
        label={},
        probability=0.5,
        exact=0.0,
        padded=0.0,
        compiled=1000,
        xla_flops=0.0,
        argument_bytes=10,
        temp_bytes=20,
        traffic={"all-reduce": scaling.Traffic(2, 300.0, 600.0)},
        rematerialized=(),
    )
    return scaling.Shape(**values | changes)


def test_layouts_are_read():
    assert scaling.parse_layouts("data=8; data=4,fsdp=2") == [
        {"data": 8, "fsdp": 1, "tensor": 1},
        {"data": 4, "fsdp": 2, "tensor": 1},
    ]
    for text, message in [
        ("data", "expected such as data=4,fsdp=2"),
        ("model=2", "expected such as"),
        ("data=0", "expected such as"),
        ("data=1,data=2", "names an axis twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaling.parse_layouts(text)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_usual_layouts_use_all_devices(count):
    found = scaling.layouts_of(count)
    assert len({tuple(x.values()) for x in found}) == len(found)
    assert {x["data"] * x["fsdp"] * x["tensor"] for x in found} == {count}


def test_more_devices_than_there_are():
    assert len(scaling.cpu_devices(8)) == 8
    with pytest.raises(
        ValueError, match="9 CPU devices are needed, there are 8: start with XLA_FL"
    ):
        scaling.cpu_devices(9)


def test_seconds_follow_from_work_bytes_and_stated_peaks():
    products, moves = shape().seconds(TOY, MODERATE)
    assert products == 2 * 1000 / (1e6 * 0.5)
    assert moves == 300 / (1e5 * 0.25)


def test_expectations_weigh_shapes_by_their_probability():
    shapes = (shape(probability=0.6), shape(probability=0.2, compiled=5000, temp_bytes=70))
    layout = scaling.Layout({"data": 4, "fsdp": 1, "tensor": 1}, 16, 1, 4, shapes)
    assert layout.name == "data=4" and layout.share == pytest.approx(0.8)
    assert layout.mean(lambda x: x.compiled) == pytest.approx(0.75 * 1000 + 0.25 * 5000)
    assert layout.memory_bytes == 80
    text = reports.scaling_text([layout], [TOY], MODERATE)
    assert "toy (prediction)" in text and "toy: made up." in text
    products, moves = 0.75 * 4e-3 + 0.25 * 20e-3, 12e-3
    assert f"{1e3 * products:.3g}" in text and f"{1e3 * moves:.3g}" in text
    assert f"{1e3 * (0.75 * 12e-3 + 0.25 * 20e-3):.3g}" in text  # the larger of each shape
    assert "2 x, 3e-07 GB" in text and "80.0% of all steps" in text


def test_a_launch_of_several_arrays_counts_once():
    one = collectives.Collective(
        "all-reduce", "f32", (2,), ((0, 1),), 3, "body", "sum", "op", values_dtype="bf16"
    )
    other = collectives.Collective(
        "all-reduce", "f32", (4,), ((0, 1),), 3, "body", "sum", "op", values_dtype="f32"
    )
    assert scaling.traffic([one, other]) == {
        "all-reduce": scaling.Traffic(3, 3 * (4 + 16), 3 * (8 + 16))
    }


@pytest.mark.slow  # four programs are compiled
def test_the_work_of_the_program_is_that_of_the_count(task, layouts):
    for layout in layouts:
        assert layout.share == pytest.approx(sum(p for _, p, _ in scaling.chosen_buckets(task, 1)))
        assert {x.label["reuse"] for x in layout.shapes} == {False, True}
        for found, (bucket, _, exact) in zip(
            layout.shapes, scaling.chosen_buckets(task, 1), strict=True
        ):
            padded = float(costs.training_cost(costs.dims_of(task.model), *bucket.windows))
            assert found.padded == 2 * padded and found.exact == 2 * exact  # of 16 images, 2
            assert found.compiled == pytest.approx(found.padded, rel=0.15)


@pytest.mark.slow
def test_fully_sharded_state_is_smaller_and_gathers_what_data_parallel_does_not(layouts):
    data, fsdp = layouts
    assert fsdp.parameter_bytes < 0.5 * data.parameter_bytes
    assert 4 * data.parameter_bytes <= data.state_bytes <= 4 * data.parameter_bytes + 100
    all_gradients = 2 * 7 / 8 * data.parameter_bytes
    for parallel, sharded in zip(data.shapes, fsdp.shapes, strict=True):
        assert set(parallel.traffic) == {"all-reduce"}
        # Without reuse there are no gradients of what attends to a cache in the encoder. Those of
        # the embedding's tables are summed twice, of visible tokens and of masked ones.
        least = 1 if parallel.label["reuse"] else 0.8
        assert least * all_gradients <= parallel.moved_bytes <= 1.05 * all_gradients
        assert {"all-gather", "reduce-scatter"} <= set(sharded.traffic)
        assert sharded.traffic["all-gather"].launches >= 3 * 4
        assert parallel.rematerialized == sharded.rematerialized == ()


@pytest.fixture(scope="module")
def of_coco():
    """A step of full size, with CLIP's text tower, of which nothing is ever allocated."""
    return setup.make_task(setup.load_config(str(ROOT / "configs/enat_b_coco256.py")), 2048)


def test_the_frozen_encoder_is_divided_like_parameters(of_coco):
    mesh = sharding.make_mesh(sharding.Sharding(2, 2, 2), scaling.cpu_devices(8))
    steps = train_step.CompiledSteps(of_coco, mesh, enat_task.RULES, seed=0)
    whole = batch_fit.tree_bytes(of_coco.frozen)
    assert whole == 2 * 123_060_480  # of CLIP ViT-L/14 in bfloat16
    # The table of its words, a third of it, is divided over "fsdp" alone.
    assert sharding.shard_bytes(steps._abstract_frozen) < 0.33 * whole
    assert sharding.shard_bytes(steps.abstract_state) < 0.3 * 4 * 4 * 120.4e6


@pytest.mark.slow
def test_a_real_step_of_coco_compiles_for_8_devices(of_coco):
    """The encoder's weights are gathered, layer by layer, and its activations stay where they are.

    Where the layout of its activations was left to XLA, the devices sent 36 GB of them in a step.
    """
    mesh = sharding.make_mesh(sharding.Sharding(1, 8, 1), scaling.cpu_devices(8))
    steps = train_step.CompiledSteps(of_coco, mesh, enat_task.RULES, seed=0)
    bucket, probability, exact = scaling.chosen_buckets(of_coco, 1)[1]
    assert bucket.reuse
    found = scaling._compile(of_coco, steps, 8, bucket, probability, exact)
    assert found.rematerialized == ()
    assert found.traffic["all-reduce"].moved_bytes < 0.1e9
    assert found.traffic["all-gather"].moved_bytes < 3 * 2 * 120.4e6 + 2 * 123.1e6
    # The encoder reads 256 texts of 6.65 G, which is no work of the step.
    assert found.compiled == pytest.approx(found.padded + 256 * 6.65e9, rel=0.03)


def test_batches_that_cannot_be_divided(task):
    sizes = scaling.parse_layouts("data=3")[0]
    with pytest.raises(ValueError, match="cannot be divided among 3 devices"):
        scaling.compile_layout(task, enat_task.RULES, sizes, shapes_of_each=1)


def test_warnings_of_libraries_are_kept_apart(capfd):
    with scaling._stderr_lines("Involuntary") as lines:
        os.write(2, b"W0 spmd.cc] Involuntary full rematerialization of x\nanother line\n")
        print("a third", file=sys.stderr)
    assert lines == ["W0 spmd.cc] Involuntary full rematerialization of x"]
    captured = capfd.readouterr().err
    assert "another line\n" in captured and "Involuntary" not in captured
