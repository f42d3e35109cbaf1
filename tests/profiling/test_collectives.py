"""Collectives are counted in programs whose communication is known beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import mesh_axes
import pytest
import tpu_text
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from enat_jax.profiling import collectives

AXES = {"data": 4, "fsdp": 2}
ALONG_DATA = ((0, 2, 4, 6), (1, 3, 5, 7))
ALONG_FSDP = ((0, 1), (2, 3), (4, 5), (6, 7))


def place(*spec):
    mesh = jax.make_mesh((4, 2), tuple(AXES), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*spec))


def array(shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place(*spec))


def find(function, *arguments, **options):
    return collectives.find(jax.jit(function, **options).lower(*arguments).compile().as_text())


def test_a_contracted_dimension_costs_one_all_reduce():
    x, w = array((16, 32), None, "data"), array((32, 8), "data", None)
    (found,) = find(jnp.dot, x, w)
    assert (found.kind, found.dtype, found.shape) == ("all-reduce", "f32", (16, 8))
    assert (found.groups, found.group_size, found.count) == (ALONG_DATA, 4, 1)
    assert found.payload_bytes == 16 * 8 * 4
    assert found.moved_bytes == 2 * 3 / 4 * 512
    assert mesh_axes.of(found.groups, AXES) == ("data",)
    assert "dot_general" in found.op_name


def test_the_cpu_sums_bfloat16_in_float32_but_accelerators_do_not():
    x = array((16, 32), None, "data", dtype=jnp.bfloat16)
    w = array((32, 8), "data", None, dtype=jnp.bfloat16)
    (found,) = find(jnp.dot, x, w)
    assert (found.dtype, found.values_dtype, found.payload_bytes) == ("f32", "bf16", 512)
    there = found.on_accelerator()
    assert (there.kind, there.dtype, there.payload_bytes) == ("all-reduce", "bf16", 256)


def layers(x, kernels):
    """Five layers whose kernels are gathered one at a time, in ``x``'s dtype."""

    def layer(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel.astype(x.dtype), place("fsdp", None))
        kernel = jax.lax.with_sharding_constraint(kernel, place())
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, kernels)[0]


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_a_gather_in_a_loop_counts_every_time(dtype, width):
    x = array((16, 32), ("data", "fsdp"), dtype=dtype)
    (found,) = find(layers, x, array((5, 32, 32), None, "fsdp", None))
    assert (found.kind, found.shape[-2:], found.count) == ("all-gather", (32, 32), 5)
    assert found.groups == ALONG_FSDP
    there = found.on_accelerator()
    assert there.payload_bytes == 32 * 32 * width
    assert there.moved_bytes == 1 / 2 * there.payload_bytes


def own_part(axis, over):
    """Sums over one axis of the mesh; then each device takes the part of its place in another."""

    def local(x):
        total = jax.lax.psum(x, over)
        part = total.shape[0] // 4
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(axis) * part, part)

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(axis), check_vma=False
    )


def test_an_all_reduce_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    (found,) = find(own_part("data", over="data"), array((16, 8)))
    assert (found.kind, found.scattered) == ("all-reduce", True)
    there = found.on_accelerator()
    assert (there.kind, there.shape) == ("reduce-scatter", (16, 8))
    assert there.moved_bytes == found.moved_bytes / 2 == 3 / 4 * 512
    assert not there.scattered


def test_an_all_reduce_sliced_along_another_axis_is_none():
    # The four devices of a group have the same place along "fsdp": they keep the same part.
    (found,) = find(own_part("fsdp", over="data"), array((16, 8)))
    assert (found.kind, found.scattered) == ("all-reduce", False)


def test_gradients_in_a_loop_are_scattered_and_then_summed():
    def gradients(xs):
        product = lambda x: jax.lax.with_sharding_constraint(x.T @ x, place("fsdp", None))  # noqa: E731
        return jax.lax.scan(lambda _, x: (None, product(x)), None, xs)[1]

    found = find(gradients, array((5, 16, 32), None, ("data", "fsdp"), None))
    there = {x.on_accelerator().kind: x.on_accelerator() for x in found}
    assert len(found) == len(there) == 2 and {x.count for x in found} == {5}
    scattered, summed = there["reduce-scatter"], there["all-reduce"]
    assert (scattered.groups, summed.groups) == (ALONG_FSDP, ALONG_DATA)
    assert scattered.payload_bytes == 2 * summed.payload_bytes == 32 * 32 * 4


def test_every_kind_is_found():
    def local(x):
        return (
            jax.lax.psum(x, "data"),
            jax.lax.psum_scatter(x, "fsdp", tiled=True),
            jax.lax.all_to_all(x, "data", 1, 0, tiled=True),
            jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            jax.lax.all_gather(x, "data", axis=0, tiled=True),
        )

    function = jax.shard_map(
        local,
        mesh=place().mesh,
        in_specs=PartitionSpec("data", "fsdp"),
        out_specs=(PartitionSpec(("data", "fsdp")),) * 5,
        check_vma=False,
    )
    found = find(function, array((16, 16), "data", "fsdp"))  # [4, 8] on each device
    moved = {
        kind: sum(x.moved_bytes for x in found if x.kind == kind) for kind in collectives.KINDS
    }
    assert moved == {
        "all-reduce": 2 * 3 / 4 * 128,
        "reduce-scatter": 1 / 2 * 128,
        "all-to-all": 3 / 4 * 128,
        "collective-permute": 128,
        "all-gather": 3 / 4 * 512,
    }
    (permute,) = [x for x in found if x.kind == "collective-permute"]
    assert permute.groups[0] == (0, 2) and permute.group_size == 2


# --- text that other backends and versions print --------------------------------------------

PROGRAM = """\
HloModule jit_step, num_partitions=8

%add.1 (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

ENTRY %main (a: f32[4,6], b: bf16[8]) -> f32[4,6] {{
  %a = f32[4,6]{{1,0}} parameter(0)
  %b = bf16[8]{{0}} parameter(1)
  {line}
}}
"""


def read(line):
    return collectives.find(PROGRAM.format(line=line))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ALONG_FSDP),
        ("{}", (tuple(range(8)),)),
        ("[4,2]<=[8]", ALONG_FSDP),
        ("[2,4]<=[4,2]T(1,0)", ALONG_DATA),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ALONG_FSDP),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}", ALONG_FSDP),
        ("mesh['x'=8] {'x'}", (tuple(range(8)),)),
        ("mesh['x'=8] {'x':(4)2}", ALONG_FSDP),
        ("mesh['x'=8] {'x':(1)4}", ALONG_DATA),
        ("mesh['x'=2,'y'=4] {'x','y':(2)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    (found,) = read(f"ROOT %r = f32[4,6] all-reduce(%a), replica_groups={text}, to_apply=%add.1")
    assert found.groups == groups
    assert mesh_axes.of(found.groups, {"all": 8}) == ("all",)


def test_asynchronous_forms_count_once():
    start, done = (
        read(
            "%s = (f32[4,6], f32[16,6]) all-gather-start(%a), replica_groups=[2,4]<=[8], "
            "dimensions={0}\n  ROOT %d = f32[16,6] all-gather-done(%s)"
        ),
        read("ROOT %r = f32[16,6] all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}"),
    )
    assert [dataclasses.replace(x, instruction="r") for x in start] == done
    assert done[0].shape == (16, 6) and done[0].moved_bytes == 3 / 4 * 16 * 6 * 4


def test_collectives_of_a_tpu_count_once_and_say_what_they_run_beside():
    for middle, overlaps in [(tpu_text.IDLE, False), (tpu_text.BUSY, True)]:
        found = collectives.find(tpu_text.PROGRAM.replace("MIDDLE", middle))
        there = [x.on_accelerator() for x in found]
        assert [(x.kind, x.dtype, x.shape, x.count, x.beside) for x in there] == [
            ("all-gather", "bf16", (256, 384), 5, True),  # three parts, in as many fusions
            ("all-gather", "f32", (512, 256), 5, False),
            ("reduce-scatter", "f32", (128, 256), 5, False),
            ("collective-permute", "f32", (128, 256), 1, overlaps),
        ]


def test_combined_collectives_are_told_apart():
    first, second = read(
        "ROOT %r = (f32[4,6], /*index=1*/bf16[8]) all-reduce(%a, /*index=1*/%b), "
        'replica_groups=[1,8]<=[8], to_apply=%add.1, metadata={op_name="jit(step)/(x:y)"}'
    )
    assert (first.dtype, first.shape) == ("f32", (4, 6))
    assert (second.dtype, second.shape) == ("bf16", (8,))
    assert first.instruction == second.instruction == "r"
    assert first.op_name == "jit(step)/(x:y)"


def test_a_group_of_one_moves_nothing():
    (found,) = read("ROOT %r = f32[4,6] all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add.1")
    assert found.moved_bytes == 0


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="r is a ragged-all-to-all, whose bytes are not counted"):
        read("ROOT %r = f32[4,6] ragged-all-to-all(%a), replica_groups={}")
    with pytest.raises(ValueError, match="groups of r cannot be read: , replica_groups=odd"):
        read("ROOT %r = f32[4,6] all-reduce(%a), replica_groups=odd, to_apply=%add.1")


def test_axes_are_those_along_which_a_group_differs():
    assert mesh_axes.of((tuple(range(8)),), AXES) == ("data", "fsdp")
    assert mesh_axes.of(((0, 1), (2, 3)), {"data": 2, "one": 1, "fsdp": 2}) == ("fsdp",)
