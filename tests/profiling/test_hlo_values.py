"""What is known of values in a program without running it."""

import numpy as np
import pytest

from enat_jax.profiling import hlo_text, hlo_values

# A loop carries the offset in, as XLA does with what no iteration changes.
LOOP = """\
HloModule jit_step, num_partitions=4

%offset (table: u32[4], id: u32[]) -> s32[] {
  %table = u32[4]{0} parameter(0)
  %id = u32[] parameter(1)
  %place = u32[1]{0} dynamic-slice(%table, %id), dynamic_slice_sizes={1}
  %low = u32[1]{0} constant({0})
  %high = u32[1]{0} constant({3})
  %clamped = u32[1]{0} clamp(%low, %place, %high)
  %signed = s32[1]{0} convert(%clamped)
  %width = s32[1]{0} constant({2})
  %scaled = s32[1]{0} multiply(%signed, %width)
  ROOT %start = s32[] bitcast(%scaled)
}

%part (whole: f32[8,3], start: s32[], zero: s32[]) -> f32[2,3] {
  %whole = f32[8,3]{1,0} parameter(0)
  %start = s32[] parameter(1)
  %zero = s32[] parameter(2)
  ROOT %slice = f32[2,3]{1,0} dynamic-slice(%whole, %start, %zero), dynamic_slice_sizes={2,3}
}

%body (s: (s32[], s32[], f32[8,3])) -> (s32[], s32[], f32[8,3]) {
  %s = (s32[], s32[], f32[8,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %carried = s32[] get-tuple-element(%s), index=1
  %kept = s32[] copy(%carried)
  %x = f32[8,3]{1,0} get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %zero.1 = s32[] constant(0)
  %total = (f32[8,3]{1,0}, f32[8,3]{1,0}) all-reduce(%x, %x), replica_groups={{0,1,2,3}}
  %first = f32[8,3]{1,0} get-tuple-element(%total), index=0
  %second = f32[8,3]{1,0} get-tuple-element(%total), index=1
  %own = f32[2,3]{1,0} fusion(%first, %carried, %zero.1), kind=kLoop, calls=%part
  %moving = f32[2,3]{1,0} dynamic-slice(%second, %i, %zero.1), dynamic_slice_sizes={2,3}
  ROOT %out = (s32[], s32[], f32[8,3]{1,0}) tuple(%next, %kept, %x)
}

%condition (s.1: (s32[], s32[], f32[8,3])) -> pred[] {
  %s.1 = (s32[], s32[], f32[8,3]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x.1: f32[8,3]) -> f32[8,3] {
  %x.1 = f32[8,3]{1,0} parameter(0)
  %order = u32[4]{0} constant({0, 2, 1, 3})
  %device = u32[] partition-id()
  %begin = s32[] fusion(%order, %device), kind=kLoop, calls=%offset
  %none = s32[] constant(0)
  %init = (s32[], s32[], f32[8,3]{1,0}) tuple(%none, %begin, %x.1)
  %loop = (s32[], s32[], f32[8,3]{1,0}) while(%init), condition=%condition, body=%body
  %after = s32[] get-tuple-element(%loop), index=1
  %lost = s32[] get-tuple-element(%loop), index=0
  ROOT %result = f32[8,3]{1,0} get-tuple-element(%loop), index=2
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo_text.parse(LOOP)


def test_offsets_are_followed_from_the_device_through_a_loop(module):
    main, body = module.computations["main"], module.computations["body"]
    expected = np.array([[0], [4], [2], [6]])
    np.testing.assert_array_equal(hlo_values.value(module, main["begin"]), expected)
    np.testing.assert_array_equal(hlo_values.value(module, body["carried"]), expected)
    np.testing.assert_array_equal(hlo_values.value(module, main["after"]), expected)


def test_what_depends_on_more_is_unknown(module):
    main, body = module.computations["main"], module.computations["body"]
    for unknown in (body["i"], body["next"], main["lost"], main["x.1"], main["result"]):
        assert hlo_values.value(module, unknown) is None


def test_the_parts_of_an_array_that_are_used(module):
    total = module.computations["body"]["total"]
    ((part, offsets),) = hlo_values.slices_of(module, total, 0)
    assert part == hlo_text.Array("f32", (2, 3))
    np.testing.assert_array_equal(offsets, [[0, 0], [4, 0], [2, 0], [6, 0]])
    assert hlo_values.slices_of(module, total, 1) is None  # its place changes in the loop


def test_an_array_that_is_used_whole_has_no_parts(module):
    main, body = module.computations["main"], module.computations["body"]
    assert hlo_values.slices_of(module, body["x"], 0) is None
    assert hlo_values.slices_of(module, main["result"], 0) == []  # a root; nobody uses it here


NARROW = """\
HloModule jit_step

%widen (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %narrow = bf16[4]{0} convert(%p)
  %wide = f32[4]{0} convert(%narrow)
  ROOT %moved = f32[4]{0} bitcast(%wide)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %rounded = f32[4]{0} fusion(%a), kind=kLoop, calls=%widen
  %copied = f32[4]{0} copy(%rounded)
  %half = f16[4]{0} convert(%a)
  ROOT %sum = f32[4]{0} add(%copied, %a)
}
"""


def test_values_that_were_narrow_are_known_by_their_conversion():
    module = hlo_text.parse(NARROW)
    main = module.computations["main"]
    names = ("a", "rounded", "copied", "half", "sum")
    found = [hlo_values.narrow_dtype(module, main[name]) for name in names]
    assert found == [None, "bf16", "bf16", "f16", None]
