"""What a training step communicates, counted in the compiled program: that, and nothing else."""

import collections
import functools
import math
import re

import jax
import mesh_axes
import pytest
from small_tasks import make_task

from enat_jax.profiling import collectives
from enat_jax.runtime import sharding
from enat_jax.training import enat_task, train_step

ENCODER, DECODER = 3, 1  # layers of ``make_task``
PLACE = r"((?:encoder|decoder|project|head|modulation|embed)\b[/\w]*)/sharding_constraint$"
ARGUMENT = r"\b(modulation|embed)\b[^/]*\]$"  # state.params['embed']['word']


@functools.cache
def communicated(data, fsdp, tensor, text=None):
    """Collectives of a bfloat16 step that reuses features, as accelerators would do them."""
    task = make_task(dtype="bfloat16", encoder_layers=ENCODER, text=text)
    mesh = sharding.make_mesh(sharding.Sharding(data, fsdp, tensor))
    steps = train_step.CompiledSteps(task, mesh, enat_task.RULES, seed=0)
    windows = max((bucket.windows for bucket in task.buckets), key=lambda w: w.num_cached)
    found = collectives.find(steps.lower(windows).compile().as_text())
    found = [x.on_accelerator() for x in found]
    axes = [mesh_axes.of(x.groups, dict(mesh.shape)) for x in found]
    return task, list(zip(found, axes, strict=True))


def numbers(found, *kinds):
    """Elements of all arrays of these kinds, but for scalars, with repetitions."""
    return sum(x.count * math.prod(x.shape) for x, _ in found if x.kind in kinds and x.shape)


def gradient_numbers(task):
    """Of the gradients that are summed: every parameter's once, and the embedding's twice."""
    params = jax.eval_shape(task.init, jax.random.key(0)).params
    unpredicted = 1  # the head's bias has a row for [MASK] that is cut off before
    embedding = jax.tree.leaves(params["embed"])  # by the encoder and by the decoder
    return sum(x.size for x in jax.tree.leaves(params) + embedding) - unpredicted


def test_data_parallel_steps_sum_gradients_once_and_send_nothing_else():
    task, found = communicated(8, 1, 1)
    assert {x.kind for x, _ in found} == {"all-reduce"}
    assert {axes for _, axes in found} == {("data",)}
    assert numbers(found, "all-reduce") == gradient_numbers(task)
    large = [x for x, _ in found if len(x.shape) > 1]
    assert {x.dtype for x in large} == {"f32"}


def test_fsdp_gathers_each_layer_in_each_pass_and_scatters_gradients():
    task, found = communicated(1, 8, 1)
    assert {x.kind for x, _ in found} == {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = collections.Counter()
    for x, _ in found:
        if x.kind == "all-gather":
            place = (re.search(PLACE, x.op_name) or re.search(ARGUMENT, x.op_name))[1]
            gathered[place] += x.count
            # The tables are looked up in float32.
            assert x.dtype == ("f32" if place in ("embed", "modulation") else "bf16"), x
    # Three passes: of the moving average, forward, backward. The first has no context yet; the
    # average's modulation is of the encoder alone; the head's table is not gathered once more.
    three, two = 3 * ENCODER, 2 * DECODER
    assert {k: v for k, v in gathered.items() if k.startswith("encoder")} == {
        **{f"encoder/{name}": three for name in ("query", "key_value_self", "out")},
        **{f"encoder/{name}": three for name in ("mlp/up", "mlp/down")},
        "encoder/key_value_context": 2 * ENCODER,
    }
    assert {k: v for k, v in gathered.items() if k.startswith("decoder")} == {
        f"decoder/{name}": two
        for name in ("query", "key_value_self", "key_value_context", "out", "mlp/up", "mlp/down")
    }
    assert {k: v for k, v in gathered.items() if k.startswith(("project", "head"))} == {
        **{"project/mlp/up": 2, "project/mlp/down": 2, "head/dense": 2}
    }
    # No array of several layers is ever whole on a device.
    one_layer = max(
        math.prod(x.shape[1:])
        for x in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)).params["modulation"])
    )
    assert max(math.prod(x.shape) for x, _ in found if x.kind == "all-gather") == one_layer
    assert numbers(found, "all-reduce", "reduce-scatter") == gradient_numbers(task)
    kernels = [x for x, _ in found if x.kind == "reduce-scatter"]
    assert {x.dtype for x in kernels} == {"f32"}
    assert numbers(found, "reduce-scatter") > 0.8 * gradient_numbers(task)


@pytest.mark.slow
def test_tensor_parallel_blocks_sum_activations_and_gather_no_parameter():
    task, found = communicated(2, 1, 4)
    assert {x.kind for x, _ in found} == {"all-gather", "all-reduce"}
    (modulation,) = {x.shape for x, _ in found if x.kind == "all-gather"} - {(ENCODER, 4, 256)}
    assert modulation == (ENCODER + DECODER, 4, 256)  # [layers, b, 8 d], of one part of the batch
    over_tensor = [x for x, axes in found if axes == ("tensor",) and x.kind == "all-reduce"]
    activations = sum(x.count for x in over_tensor if len(x.shape) == 3)
    forward = 2 * (2 * ENCODER + DECODER) + 1  # two a block, the average's too, one in f
    backward = 4 * (ENCODER + DECODER) + 1
    assert activations == forward + backward
    assert {axes for x, axes in found if x.kind == "all-reduce" and len(x.shape) > 1} == {
        *[("tensor",), ("data",)]
    }


@pytest.mark.slow
def test_mixed_meshes_move_no_more_kinds_of_things():
    """Two by two by two: the sums of all, and one kernel's gradient that changes its layout."""
    _, found = communicated(2, 2, 2)
    assert not [x for x, _ in found if x.kind == "all-to-all"]
    moved = [x for x, _ in found if x.kind == "collective-permute"]
    assert all("head/dense" in x.op_name and x.count == 1 for x in moved) and len(moved) <= 1
    over = {axes for x, axes in found if x.kind == "all-gather"}
    assert over == {("fsdp",), ("tensor",)}


@pytest.mark.slow
def test_the_encoder_of_texts_is_gathered_and_its_activations_stay():
    """Left to itself, XLA would rather sum activations over the parts of a kernel."""
    _, found = communicated(1, 8, 1, text="clip")
    tower = [x for x, _ in found if "TextTower" in x.op_name]
    assert {x.kind for x in tower} == {"all-gather"}
    layers = 2
    assert sum(x.count for x in tower) == 2 + 6 * layers  # two tables, and six kernels a layer
    largest = max(math.prod(x.shape) for x, _ in found if x.kind != "all-gather")
    assert largest == 128 * 32  # a kernel's gradient: no activation of the encoder
