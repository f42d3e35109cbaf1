"""A program for TPUs, shortened from what their compiler prints: a loop of five layers.

Each layer gathers a kernel in parts, within the product between its begin and its end, gathers a
bias at once and waits for it, and scatters a gradient. The loop's counter is all that says how
often it runs.
"""

from enat_jax.profiling import hlo_text

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%begin (p: bf16[64,384]) -> (bf16[64,384], bf16[256,384], u32[]) {
  %p = bf16[64,384]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[256,384]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %started = (bf16[64,384]{1,0}, bf16[256,384]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (q: bf16[64,384], r: bf16[256,384], a: bf16[100,96], b: bf16[96,256]) -> (bf16[100,256], bf16[64,384], bf16[256,384]) {
  %q = bf16[64,384]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[256,384]{1,0:T(8,128)(2,1)} parameter(1)
  %a = bf16[100,96]{1,0:T(8,128)(2,1)} parameter(2)
  %b = bf16[96,256]{1,0:T(8,128)(2,1)} parameter(3)
  %gather.2 = bf16[256,384]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %product = bf16[100,256]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(step)/layer/mlp/up/dot_general"}
  ROOT %both = (bf16[100,256]{1,0}, bf16[64,384]{1,0}, bf16[256,384]{1,0}) tuple(%product, %q, %gather.2)
}

%end (s: bf16[64,384], t: bf16[256,384]) -> bf16[256,384] {
  %s = bf16[64,384]{1,0:T(8,128)(2,1)} parameter(0)
  %t = bf16[256,384]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.3 = bf16[256,384]{1,0:T(8,128)(2,1)} all-gather(%s), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %ended = bf16[256,384]{1,0:T(8,128)(2,1)} custom-call(%s, %t, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (u: f32[128,256]) -> f32[32,256] {
  %u = f32[128,256]{1,0:T(8,128)} parameter(0)
  %reduced = f32[128,256]{1,0:T(8,128)} all-reduce(%u), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  %device = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = f32[32,256]{1,0:T(8,128)} dynamic-slice(%reduced, %device, %zero), dynamic_slice_sizes={32,256}
}

%body (state: (s32[], f32[128,256], bf16[64,384], bf16[100,96], bf16[96,256])) -> (s32[], f32[128,256], bf16[64,384], bf16[100,96], bf16[96,256]) {
  %state = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)}, bf16[64,384]{1,0:T(8,128)(2,1)}, bf16[100,96]{1,0:T(8,128)(2,1)}, bf16[96,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %total = f32[128,256]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %kernel = bf16[64,384]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %left = bf16[100,96]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=3
  %right = bf16[96,256]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=4
  %one = s32[]{:T(128)} constant(1)
  %async-collective-start = (bf16[64,384]{1,0:T(8,128)(2,1)}, bf16[256,384]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%kernel), kind=kCustom, calls=%begin
  %own = bf16[64,384]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %all = bf16[256,384]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %work = (bf16[100,256]{1,0:T(8,128)(2,1)S(1)}, bf16[64,384]{1,0:T(8,128)(2,1)}, bf16[256,384]{1,0:T(8,128)(2,1)}) fusion(%own, %all, %left, %right), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion
  %own.1 = bf16[64,384]{1,0:T(8,128)(2,1)} get-tuple-element(%work), index=1
  %all.1 = bf16[256,384]{1,0:T(8,128)(2,1)} get-tuple-element(%work), index=2
  %async-collective-done = bf16[256,384]{1,0:T(8,128)(2,1)} fusion(%own.1, %all.1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  %waited = f32[8,256]{1,0:T(8,128)S(1)} all-gather(%total), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}
  %next = s32[]{:T(128)} add(%i, %one)
  %copied = s32[]{:T(128)} copy(%next)
  %scattered = f32[32,256]{1,0:T(8,128)} fusion(%total), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %after = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)}, bf16[64,384]{1,0:T(8,128)(2,1)}, bf16[100,96]{1,0:T(8,128)(2,1)}, bf16[96,256]{1,0:T(8,128)(2,1)}) tuple(%copied, %total, %kernel, %left, %right)
}

%condition (state.1: (s32[], f32[128,256], bf16[64,384], bf16[100,96], bf16[96,256])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)}, bf16[64,384]{1,0}, bf16[100,96]{1,0}, bf16[96,256]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

ENTRY %main (v: f32[128,256], w: bf16[64,384], l: bf16[100,96], r.1: bf16[96,256]) -> f32[128,256] {
  %v = f32[128,256]{1,0:T(8,128)} parameter(0)
  %w = bf16[64,384]{1,0:T(8,128)(2,1)} parameter(1)
  %l = bf16[100,96]{1,0:T(8,128)(2,1)} parameter(2)
  %r.1 = bf16[96,256]{1,0:T(8,128)(2,1)} parameter(3)
  %none = s32[]{:T(128)} constant(0)
  %begun = s32[]{:T(128)} copy(%none)
  %before = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)}, bf16[64,384]{1,0}, bf16[100,96]{1,0}, bf16[96,256]{1,0}) tuple(%begun, %v, %w, %l, %r.1)
  %layers = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)}, bf16[64,384]{1,0}, bf16[100,96]{1,0}, bf16[96,256]{1,0}) while(%before), condition=%condition, body=%body
  %permute = (f32[128,256]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=3, source_target_pairs={{0,1},{1,0}}
  MIDDLE
  %permuted = f32[128,256]{1,0:T(8,128)} collective-permute-done(%permute)
  ROOT %result = f32[128,256]{1,0:T(8,128)} get-tuple-element(%layers), index=1
}
"""  # noqa: E501
IDLE = "%nothing = f32[128,256]{1,0:T(8,128)} bitcast(%v)"
BUSY = "%summed = f32[]{:T(128)} reduce(%v, %none), dimensions={0,1}, to_apply=%add"


def module():
    return hlo_text.parse(PROGRAM.replace("MIDDLE", BUSY))
