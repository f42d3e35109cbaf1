"""Sharding policies: meshes, rules, and what a device of a real model's mesh holds."""

import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from enat_jax.models import vqgan
from enat_jax.profiling import setup
from enat_jax.runtime import sharding
from enat_jax.training import config as train_config
from enat_jax.training import enat_task, vqgan_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MESHES = [x for x in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(x) == 8]


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_one_axis_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(sharding.Sharding(tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    mesh = sharding.make_mesh(sharding.Sharding(data=1, fsdp=-1), jax.devices()[:2])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert sharding.batch_ways(mesh) == 2


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 3}, r"8 devices cannot be arranged as sharding data=-1, fsdp=3"),
        ({"data": 4}, r"data=4, fsdp=1, tensor=1 uses 4 of 8 devices; use -1"),
        ({"data": 0}, r"sharding.data=0 must be a positive number or -1"),
        ({"tensor": 2.0}, r"sharding.tensor=2.0 must be a positive number"),
        ({"fsdp": -1}, r"at most one of .* may be -1"),
        ({"rules": (("kernel", ("model",)),)}, r"\('model',\) must be None or of"),
    ],
)
def test_senseless_meshes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.Sharding(**sizes))


def test_the_first_rule_that_is_found_in_a_path_decides():
    mesh = sharding.make_mesh(sharding.Sharding(1, 4, 2))
    rules = (("up/kernel", ("fsdp", "tensor")), ("kernel", (None, "fsdp")))
    state = {"mlp": {"up": {"kernel": array(8, 6), "bias": array(6)}}, "kernel": array(3, 4)}
    found = sharding.of_state(state, mesh, rules)
    assert found["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert found["mlp"]["up"]["bias"].spec == PartitionSpec(None)
    assert found["kernel"].spec == PartitionSpec(None, "fsdp")
    with pytest.raises(ValueError, match=r"\(None, 'fsdp'\) does not fit kernel, of shape \(4,\)"):
        sharding.of_state({"kernel": array(4)}, mesh, rules)


def test_fsdp_moves_to_a_dimension_that_it_divides_and_tensor_is_dropped():
    """As for ENAT-S, whose width of 366 neither four devices nor eight can divide."""
    mesh = sharding.make_mesh(sharding.Sharding(1, 4, 2))
    rules = (("", (None, "fsdp", "tensor")),)
    spec = lambda *shape: sharding.of_state(array(*shape), mesh, rules).spec  # noqa: E731
    assert spec(15, 366, 1464) == PartitionSpec(None, None, "tensor")
    assert spec(16, 366, 183) == PartitionSpec("fsdp", None, None)
    assert spec(15, 366, 181) == PartitionSpec(None, None, None)


def test_a_process_alone_loads_whole_batches():
    mesh = sharding.make_mesh(sharding.Sharding(2, 2, 2))
    assert sharding.process_share(mesh) == (0, 1)


def test_rows_that_do_not_divide_are_filled_up():
    mesh = sharding.make_mesh(sharding.Sharding())
    placed = sharding.place(np.arange(10).reshape(5, 2), mesh)
    assert placed.shape == (8, 2) and len(placed.sharding.device_set) == 8
    np.testing.assert_array_equal(sharding.to_host(placed)[:5], np.arange(10).reshape(5, 2))


@functools.cache
def abstract_params(name):
    """Shapes of the parameters of a config's model, and the rules of its task."""
    config = train_config.complete(train_config.load(str(CONFIGS / f"{name}.py")))
    if config.task == "vqgan":
        init = vqgan.VQGAN(**config.model.to_dict()).init
        inputs, rules = (array(1, 16, 16, 3),), vqgan_task.RULES
    else:
        model = setup.make_model(config)
        init = model.init
        ids = jax.ShapeDtypeStruct((1, model.num_tokens), np.int32)
        inputs, rules = (ids, jax.ShapeDtypeStruct((1,), np.int32)), enat_task.RULES
    return jax.eval_shape(init, jax.random.key(0), *inputs)["params"], rules


def placed(name, sizes):
    """The abstract parameters of a config's model, placed on a mesh."""
    abstract, rules = abstract_params(name)
    mesh = sharding.make_mesh(sharding.Sharding(*sizes))
    shardings = sharding.of_state(abstract, mesh, rules)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


@pytest.mark.parametrize("name", ["s", "b", "l"])
def test_every_mesh_holds_every_size_of_the_paper(name):
    whole = sharding.shard_bytes(placed(f"enat_{name}_imagenet256", (8, 1, 1)))
    for sizes in MESHES:
        share = sharding.shard_bytes(placed(f"enat_{name}_imagenet256", sizes)) / whole
        ways = sizes[1] * sizes[2]
        if name == "s" and ways > 2:
            assert share < 0.75, sizes  # 366 = 2 x 183: not all of it can be divided further
        else:
            assert 1 / ways <= share < 1 / ways + 0.01, sizes


def test_the_tokenizer_is_divided_too():
    whole = sharding.shard_bytes(placed("vqgan_imagenet256", (8, 1, 1)))
    for sizes in MESHES:
        share = sharding.shard_bytes(placed("vqgan_imagenet256", sizes)) / whole
        # The first and last convolutions have three channels on one side.
        assert share < (1 / sizes[1] + 0.01 if sizes[1] > 1 else 1.001), sizes


def test_fsdp_divides_the_largest_device_s_bytes_of_enat_l_in_proportion():
    whole = sharding.shard_bytes(placed("enat_l_imagenet256", (8, 1, 1)))
    shares = {
        n: sharding.shard_bytes(placed("enat_l_imagenet256", (8 // n, n, 1))) / whole
        for n in (2, 4, 8)
    }
    # What is left whole are vectors: 0.1% of the parameters.
    assert shares == pytest.approx({2: 1 / 2, 4: 1 / 4, 8: 1 / 8}, abs=0.001)
