"""Programs are compiled for TPUs that are not there, and read."""

import importlib.util
import pathlib

import jax
import ml_collections
import pytest
import tiny
import tiny_config
import tpu_text

from enat_jax.inference import sampling
from enat_jax.profiling import (
    accelerators,
    batch_fit,
    hlo_text,
    scaling,
    setup,
    topology_report,
    tpu_programs,
)
from enat_jax.training import enat_task, vqgan_task

ROOT = pathlib.Path(__file__).parents[2]
TOY = accelerators.Hardware(
    "toy", flops=2e6, memory_bytes=1e9, bandwidth=1e5, memory_bandwidth=1e6, source="made up"
)
HALF = accelerators.Assumptions(of_flops=0.5, of_bandwidth=0.5)


def program(batch_size=8, temporaries=100, limit=1000, **changes):
    peak = 400 + 10 + temporaries
    values = dict(
        batch_size=batch_size,
        memory=tpu_programs.Memory(400, 300, 290, 2 * temporaries, peak, 10, limit),
        compile_seconds=60.0,
        processor_seconds=50.0,
        exact=500.0,
        multiply_adds=600,
        padding=0.25,
        hbm_bytes=5000,
        cycles={"products": 750, "copies": 150, "rest": 100},
        traffic={"all-gather": tpu_programs.Traffic(3, 300.0, 200.0)},
    )
    return tpu_programs.Program(**values | changes)


def test_memory_is_that_of_all_that_is_there_at_once():
    assert program().memory.total == 400 + 10 + 100 + 10
    assert program().memory.temporaries == 100
    assert program(temporaries=580).fits and not program(temporaries=581).fits


def test_predictions_follow_from_work_bytes_and_stated_peaks():
    found = program().seconds(TOY, HALF)
    assert found == tpu_programs.Seconds(
        products=2 * 800 / 1e6, memory=5000 / 5e5, beside=200 / 5e4, alone=100 / 5e4
    )
    assert found.least == 0.01 + 0.002
    assert found.most == pytest.approx(0.0016 + 0.01 + 0.004 + 0.002)
    for name in ("of_flops", "of_bandwidth"):
        with pytest.raises(ValueError, match=f"{name}=0 must lie in"):
            accelerators.Assumptions(**{"of_flops": 1, "of_bandwidth": 1, name: 0})


def test_traffic_is_added_up_by_kind():
    found = tpu_programs.traffic(tpu_text.module())
    gathered, waited = 5 * 3 / 4 * 256 * 384 * 2, 5 * 3 / 4 * 512 * 256 * 4
    assert found["all-gather"] == tpu_programs.Traffic(10, gathered + waited, gathered)
    assert found["reduce-scatter"] == tpu_programs.Traffic(5, 5 * 3 / 4 * 128 * 256 * 4, 0)
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}


def test_cycles_are_added_up_by_what_runs():
    noted = 'kind=kOutput, backend_config={"window_config":{"estimated_cycles":"700"}}, '
    text = tpu_text.PROGRAM.replace("MIDDLE", tpu_text.BUSY).replace("kind=kOutput, ", noted)
    text = text.replace("copy(%next)", 'copy(%next), backend_config={"estimated_cycles":"20"}')
    found = tpu_programs.cycles(hlo_text.parse(text))
    assert found == {"products": 5 * 700, "copies": 5 * 20, "rest": 0}


# --- the largest batch ----------------------------------------------------------------------


def search(need, *, first, ways=8, limit=1000, refused=True):
    """All tries for programs of which each needs ``need(batch)``."""

    def attempt(batch):
        if refused and need(batch) > limit:
            return tpu_programs.TooLarge(batch, need(batch), limit, 1.0, 1.0)
        memory = tpu_programs.Memory(100, 0, 0, 0, need(batch), 0, limit)
        return program(batch, memory=memory)

    seen = []
    found = batch_fit.fit_compiled(attempt, first=first, ways=ways, report=seen.append)
    assert list(found) == seen
    return tpu_programs.Row("v5e:2x4", "fsdp=8", "remat=none", found)


@pytest.mark.parametrize("first", [8, 512, 2048, 4096, 100_000])
@pytest.mark.parametrize("refused", [True, False])
def test_few_compilations_find_the_largest_batch(first, refused):
    row = search(lambda batch: 100 + batch * 9 // 40, first=first, refused=refused)
    assert 4000 * 15 / 16 < row.best.batch_size <= 4000 and row.best.fits
    assert len(row.tries) <= 4 and len({x.batch_size for x in row.tries}) == len(row.tries)


def test_memory_that_does_not_grow_evenly():
    # The compiler computes again what it has no room for, until that does not help.
    row = search(lambda b: min(100 + b // 2, 990) if b < 2900 else b // 2, first=256)
    assert row.best.fits and row.best.batch_size > 1600
    assert len(row.tries) <= batch_fit.MOST_COMPILED


def test_a_batch_of_one_for_each_device_that_does_not_fit():
    row = search(lambda batch: 2000 + batch, first=64)
    assert not row.best.fits and row.best.batch_size == 8 and len(row.tries) <= 6
    assert search(lambda batch: 10 * batch, first=1, ways=1).best.batch_size >= 96


# --- topologies -----------------------------------------------------------------------------


def test_names_that_are_none():
    for name in ("v9:2x2", "v5e", "v5e:two", "2x2", "v5e:2x"):
        with pytest.raises(ValueError, match=f"no topology '{name}': give one of v5e:1x1, 2x2"):
            accelerators.topology(name)


def test_a_machine_without_the_compiler(monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs their compiler, libtpu: pip install -e '.\[tpu\]'"
    ):
        accelerators.topology("v5e:2x2")


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    for text, expected in [
        ("temporaries (20.76G) exceeds available HBM (15.75G).", (20.76 * 2**30, 15.75 * 2**30)),
        ("Used 1.5T of 31.25G hbm. Exceeded", (1.5 * 2**40, 31.25 * 2**30)),
    ]:
        error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
        assert accelerators.too_large(error) == tuple(map(int, expected))
    assert accelerators.too_large(jax.errors.JaxRuntimeError("INTERNAL: x")) is None


def test_a_tokenizers_training_is_set_up_with_all_its_terms_and_no_files():
    config = setup.load_config(str(ROOT / "configs/vqgan_imagenet256.py"), task="vqgan")
    task = setup.make_vqgan_task(config, 64)
    assert task.batch_spec()["images"].shape == (64, 256, 256, 3)
    assert task.perceptual.settings.kind == "resnet50_logits" and task.adversary is not None
    leaves = jax.tree.leaves(task.frozen)
    assert len(leaves) > 100 and {type(x) for x in leaves} == {jax.ShapeDtypeStruct}
    config.data.size = None
    with pytest.raises(ValueError, match="config.data.size must be set: there are no images"):
        setup.make_vqgan_task(config, 64)


# --- reports --------------------------------------------------------------------------------


def test_the_report_names_what_does_not_fit():
    topology = accelerators.Topology("v5e:2x4", [], TOY, 1000)
    refused = tpu_programs.TooLarge(16, 4000, 1000, 2.0, 1.5)
    rows = [
        tpu_programs.Row("v5e:2x4", "fsdp=8", "remat=full", (program(8), refused)),
        tpu_programs.Row("v5e:2x4", "data=8", "remat=none", (refused,)),
    ]
    text = topology_report.topologies_markdown([(topology, row) for row in rows], HALF)
    lines = text.splitlines()
    assert "| fsdp=8 | remat=full | 8 |" in lines[2] and lines[2].endswith("| 16 needs 4e-06 |")
    assert "| data=8 | remat=none | 16 |" in lines[3] and "needs 4e-06 of 1e-06" in lines[3]
    assert "3x, 3e-07 GB, 67% beside" in text and "25.0%" in text
    assert "| 1e-06: 75%, 15% |" in text
    assert "450 to 670" in text  # images a second, of two digits
    none = topology_report.topologies_markdown([(topology, rows[1])], HALF)
    assert "Predictions" not in none
    assert rows[0].json()["tries"][1] == {
        **{"batch_size": 16, "needed": 4000, "limit": 1000, "fits": False},
        **{"compile_seconds": 2.0, "processor_seconds": 1.5},
    }


# --- the compiler of TPUs -------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler of TPUs, is missing"
)


@pytest.fixture(scope="module")
def topology():
    return accelerators.topology("v5e:2x2")


@needs_libtpu
@pytest.mark.slow
def test_a_small_step_compiles_for_tpus(topology):
    with pytest.raises(ValueError, match="no topology 'v5e:2x3' .*: give one of v5e:1x1"):
        accelerators.topology("v5e:2x3")
    assert len(topology.devices) == 4 and topology.memory_bytes == 15.75 * 2**30
    config = ml_collections.ConfigDict(tiny_config.config())
    config.model.update({"width": 32, "encoder_layers": 3})
    task = setup.make_task(config, 16)
    mesh = tpu_programs.mesh_of(topology, scaling.parse_layouts("fsdp=4")[0])
    found = tpu_programs.training(task, topology, mesh, enat_task.RULES, 16)
    assert found.fits and found.memory.peak + found.memory.code <= found.memory.limit
    assert found.memory.aliased > 0.9 * found.memory.outputs > 0
    assert found.exact <= found.multiply_adds and 0.5 < found.padding < 1
    assert set(found.traffic) >= {"all-gather", "reduce-scatter"}
    assert found.hbm_bytes > 0 and found.memory.code > 0
    with pytest.raises(ValueError, match="8 devices for v5e:2x2, which has 4"):
        tpu_programs.mesh_of(topology, scaling.parse_layouts("data=8")[0])


@needs_libtpu
@pytest.mark.slow
def test_a_small_sampler_and_a_tokenizer_compile_for_one_tpu():
    one = accelerators.topology("v5e:1x1")
    mesh = tpu_programs.mesh_of(one, scaling.parse_layouts("data=1")[0])
    config = setup.load_config(str(ROOT / "configs/digits_vqgan.py"), task="vqgan")
    task = setup.make_vqgan_task(config, 8)
    found = tpu_programs.tokenizer_training(task, one, mesh, vqgan_task.RULES, 8)
    assert found.fits and found.traffic == {} and found.exact is None
    config = ml_collections.ConfigDict(tiny_config.config())
    model, codec = setup.make_model(config), tiny.CODEC.clone(codebook_size=8)
    settings = sampling.Settings(**config.sampler.to_dict())
    found = tpu_programs.sampler(model, codec, settings, one, mesh, 8)
    assert found.fits and found.traffic == {} and found.memory.outputs > 0
    assert 0 < found.exact <= found.multiply_adds
