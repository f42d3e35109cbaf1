"""The program text of XLA is read for what one device runs, and how often."""

import pytest
import tpu_text

from enat_jax.profiling import hlo_products, hlo_text

# Shortened from what XLA prints; the loop runs three times, the branch once.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[4]{0}}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%product (a: bf16[4,8], b: bf16[8,2]) -> f32[4,2] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%small (p: (f32[2])) -> f32[2] {
  ROOT %r = f32[2]{0} all-reduce(%q), to_apply=%add
  %q = f32[2]{0} constant({1, 2})
}

%large (p.1: (f32[2])) -> f32[2] {
  %wide = f32[2]{0} all-gather(%q.1), dimensions={0}
  ROOT %r.1 = f32[2]{0} all-reduce(%wide), to_apply=%add
  %q.1 = f32[1]{0} constant({1})
}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %c = bf16[4,8]{1,0} get-tuple-element(%s), index=1, metadata={op_name="jit(step)/while/body"}
  %d = bf16[8,2]{1,0} constant({...})
  %fused = f32[4,2]{1,0} fusion(%c, %d), kind=kLoop, calls=%product
  %total = f32[4,2]{1,0} all-reduce(%fused), to_apply=%add, metadata={op_name="jit(step)/psum"}
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%c, %c)
}

%condition (s.1: (s32[], bf16[4,8])) -> pred[] {
  %s.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %flag = f32[] all-reduce(%zero), to_apply=%add
  %zero = f32[] constant(0)
  ROOT %less = pred[] compare(%zero, %flag), direction=LT
}

ENTRY %main (p.2: s32[]) -> f32[2] {
  %p.2 = s32[] parameter(0), metadata={op_name="a (strange) name"}
  %start = (s32[], bf16[4,8]{1,0}) tuple(%p.2, %p.2)
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body, KNOWN
  ROOT %either = f32[2]{0} conditional(%p.2, %start, %start), branch_computations={%small, %large}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'


def reductions(module):
    found = hlo_text.visits(module, lambda x: x.opcode.startswith("all-"), lambda x: 1)
    return {(x.computation, x.name): count for x, count in found}


def test_arrays_know_their_bytes():
    assert hlo_text.Array("bf16", (4, 8)).num_bytes == 64
    assert hlo_text.Array("f32", ()).num_bytes == 4
    assert hlo_text.Array("pred", (3,)).num_bytes == 3
    assert hlo_text.Array("s4", (3,)).num_bytes == 2
    assert hlo_text.Array("f8e4m3fn", (3,)).num_bytes == 3


def test_instructions_are_read():
    module = hlo_text.parse(TEXT.replace("KNOWN", KNOWN))
    assert (module.entry, module.num_partitions) == ("main", 8)
    dot = module.computations["product"]["dot.1"]
    assert (dot.opcode, dot.operands, dot.is_root) == ("dot", ("a", "b"), True)
    assert module.operand(dot, 1).arrays == (hlo_text.Array("bf16", (8, 2)),)
    start = module.computations["main"]["start"]
    assert start.arrays == (hlo_text.Array("s32", ()), hlo_text.Array("bf16", (4, 8)))
    assert module.computations["main"]["p.2"].op_name == "a (strange) name"
    assert dot.op_name == ""
    fused = module.computations["body"]["fused"]
    assert module.root(fused) is dot and module.caller("product") is fused
    assert module.parameter(fused, 1).name == "b"
    assert [x.name for x in module.users(fused)] == ["total"]
    assert module.caller("add") is None  # several call it


def test_loops_count_their_runs_and_of_branches_the_heaviest_is_taken():
    assert reductions(hlo_text.parse(TEXT.replace("KNOWN", KNOWN))) == {
        ("body", "total"): 3,
        ("condition", "flag"): 4,
        ("large", "wide"): 1,
        ("large", "r.1"): 1,
    }


def test_a_loop_of_unknown_length_is_no_guess():
    module = hlo_text.parse(TEXT.replace("KNOWN", 'metadata={op_name="jit(step)/while"}'))
    with pytest.raises(ValueError, match=r"how often the loop loop runs \(jit\(step\)/while\)"):
        reductions(module)
    # What is not in it can be counted.
    assert hlo_text.visits(module, lambda x: x.opcode == "conditional", lambda x: 1)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no compiled program"):
        hlo_text.parse("module @jit_step")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_text.parse("HloModule empty\n")
    with pytest.raises(ValueError, match="cannot be read: what is this"):
        hlo_text.parse("HloModule odd\nENTRY %main () -> f32[] {\n  what is this\n}\n")
    with pytest.raises(ValueError, match="parenthesis is not closed"):
        hlo_text.parse("HloModule odd\nENTRY %main () -> f32[] {\n  %a = f32[] add(%b, %c\n}\n")


def test_products_are_counted_through_loops_and_fusions():
    module = hlo_text.parse(TEXT.replace("KNOWN", KNOWN))
    assert hlo_products.multiply_adds(module) == 3 * 4 * 8 * 2


def test_a_counter_says_how_often_a_loop_of_a_tpu_runs():
    module = hlo_text.parse(tpu_text.PROGRAM.replace("MIDDLE", tpu_text.IDLE))
    assert module.is_of_tpu and not hlo_text.parse(TEXT.replace(":T(8,128)(2,1)", "")).is_of_tpu
    (found,) = hlo_text.visits(module, lambda x: x.name == "waited", lambda x: 1)
    assert found[1] == 5
    assert found[0].layouts == ("1,0:T(8,128)S(1)",)
    by_two = tpu_text.PROGRAM.replace("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} constant(2)")
    module = hlo_text.parse(by_two.replace("MIDDLE", tpu_text.IDLE))
    assert hlo_text.visits(module, lambda x: x.name == "waited", lambda x: 1)[0][1] == 3
    for old, new in [
        ("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} constant(0)"),
        ("direction=LT", "direction=NE"),
        ("copy(%none)", "get-tuple-element(%v), index=0"),
    ]:
        odd = hlo_text.parse(tpu_text.PROGRAM.replace("MIDDLE", tpu_text.IDLE).replace(old, new))
        with pytest.raises(ValueError, match="how often the loop layers runs"):
            hlo_text.visits(odd, lambda x: x.name == "waited", lambda x: 1)
