"""What a TPU's program reads and writes is counted in the size that arrays have in memory."""

import tpu_text

from enat_jax.profiling import hlo_memory, hlo_text


def program(lines, callees=""):
    return hlo_text.parse(
        f"HloModule one\n\n{callees}ENTRY %main (a: f32[100,96]) -> f32[] {{\n"
        "  %a = f32[100,96]{1,0:T(8,128)} parameter(0)\n"
        "  %i = s32[]{:T(128)S(6)} constant(3)\n" + lines + "}\n"
    )


WHOLE = 4 * 104 * 128


def test_padded_operands_and_results_count_and_the_vector_memory_does_not():
    line = "  ROOT %r = f32[100,96]{1,0:T(8,128)PLACE} negate(%a)\n"
    assert hlo_memory.hbm_bytes(program(line.replace("PLACE", ""))) == 2 * WHOLE
    assert hlo_memory.hbm_bytes(program(line.replace("PLACE", "S(1)"))) == WHOLE


def test_copies_count_where_they_begin():
    copy = (
        "  %c = (f32[100,96]{1,0:T(8,128)S(1)}, f32[100,96]{1,0:T(8,128)}, u32[]{:S(2)}) "
        "copy-start(%a)\n  ROOT %d = f32[100,96]{1,0:T(8,128)S(1)} copy-done(%c)\n"
    )
    assert hlo_memory.hbm_bytes(program(copy)) == WHOLE
    part = (
        "  %c = ((f32[100,96]{1,0:T(8,128)}), f32[8,96]{1,0:T(8,128)}, u32[]{:S(2)}) "
        "slice-start(%a)\n  ROOT %d = f32[8,96]{1,0:T(8,128)} slice-done(%c)\n"
    )
    assert hlo_memory.hbm_bytes(program(part)) == 2 * 4 * 8 * 128


SLICE = """\
%take (p: f32[100,96], j: s32[]) -> f32[8,96] {
  %p = f32[100,96]{1,0:T(8,128)} parameter(0)
  %j = s32[]{:T(128)S(6)} parameter(1)
  ROOT %s = f32[8,96]{1,0:T(8,128)} dynamic-slice(%p, %j, %j), dynamic_slice_sizes={8,96}
}

"""
UPDATE = """\
%put (p: f32[100,96], u: f32[8,96], j: s32[]) -> f32[100,96] {
  %p = f32[100,96]{1,0:T(8,128)} parameter(0)
  %u = f32[8,96]{1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)S(6)} parameter(2)
  ROOT %s = f32[100,96]{1,0:T(8,128)} dynamic-update-slice(%p, %u, %j, %j)
}

"""


def test_fusions_read_slices_and_write_parts():
    take = "  ROOT %t = f32[8,96]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%take\n"
    assert hlo_memory.hbm_bytes(program(take, SLICE)) == 4 * 8 * 96 + 4 * 8 * 128
    put = (
        "  %u = f32[8,96]{1,0:T(8,128)S(1)} broadcast(%i)\n"
        "  ROOT %t = f32[100,96]{1,0:T(8,128)} fusion(%a, %u, %i), kind=kLoop, calls=%put\n"
    )
    assert hlo_memory.hbm_bytes(program(put, UPDATE)) == 4 * 8 * 96


def test_a_loop_counts_every_time_and_buffers_under_way_do_not():
    kernel, gathered, total = 2 * 64 * 384, 2 * 256 * 384, 4 * 128 * 256
    product = 2 * (104 * 128 + 96 * 256)  # its result stays in the vector memory
    of_layer = (kernel + gathered) + product + total + (total + 4 * 32 * 256)
    assert hlo_memory.hbm_bytes(tpu_text.module()) == 5 * of_layer + 3 * total
