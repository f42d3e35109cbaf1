"""Tables of what ``scaling`` found, with everything that the predictions rest on beside them."""

import textwrap

from enat_jax.profiling import collectives

GB = 1e9

ASSUMED = """\
Predictions, not measurements. The step was compiled for CPU devices; per device and step:
params, state: bytes on the device with the most; state: parameters, moving average and optimizer.
temp: XLA's temporary arrays in the CPU's schedule, the shape with the most. Rather too much for an
  accelerator: the CPU widens bfloat16 to float32 and does not fuse attention.
exact, padded: multiply-adds by this package's count, divided by the devices; compiled: those of all
  matrix products in the program, with what is recomputed or done on several devices.
  XLA's own count is no cross-check: it takes the body of each loop once.
collectives: instructions that run, and bytes that a device sends if all of them are rings. Counted
  in the dtype that the values have, where the CPU widens them; an all-reduce of which each device
  keeps its own part counts as a reduce-scatter, as accelerators do it.
seconds: products at {of_flops:.0%} of the stated peak for bfloat16, collectives at
  {of_bandwidth:.0%} of the stated bandwidth, without their latency; nothing for the rest.
Expectations are over the compiled shapes, {share:.1%} of all steps."""


def report(layouts, hardware, assumptions, table):
    """Text of all tables.

    Args:
        layouts: sequence of ``scaling.Layout``, at least one.
        hardware: sequence of ``scaling.Hardware``; assumptions: ``scaling.Assumptions``.
        table: ``table(columns, rows) -> str``, columns are (title, row -> text).
    """
    parts = [table(_program_columns(layouts), layouts)]
    parts += [
        f"{device.name} (prediction)\n" + table(_time_columns(device, assumptions), layouts)
        for device in hardware
    ]
    share = min(layout.share for layout in layouts)
    notes = [ASSUMED.format(share=share, **vars(assumptions))]
    sources = [f"{device.name}: {device.source}." for device in hardware]
    notes += [textwrap.fill(source, 98, subsequent_indent="  ") for source in sources]
    found = [
        f"{layout.name}: {line}"
        for layout in layouts
        for shape in layout.shapes
        for line in shape.rematerialized
    ]
    return "\n\n".join([*parts, "\n".join(notes), *(["\n".join(found)] if found else [])])


def _program_columns(layouts):
    used = {kind for layout in layouts for shape in layout.shapes for kind in shape.traffic}
    return [
        ("layout", lambda x: x.name),
        ("params GB", lambda x: f"{x.parameter_bytes / GB:.3g}"),
        ("state GB", lambda x: f"{x.state_bytes / GB:.3g}"),
        ("temp GB", lambda x: f"{max(s.temp_bytes for s in x.shapes) / GB:.3g}"),
        ("exact TMA", lambda x: f"{x.mean(lambda s: s.exact) / 1e12:.4g}"),
        ("padded TMA", lambda x: f"{x.mean(lambda s: s.padded) / 1e12:.4g}"),
        ("compiled TMA", lambda x: f"{x.mean(lambda s: s.compiled) / 1e12:.4g}"),
        *(
            (kind, lambda x, kind=kind: _traffic(x, kind))
            for kind in collectives.KINDS
            if kind in used
        ),
    ]


def _traffic(layout, kind):
    """Such as "31 x, 1.25 GB"; nothing where there is none."""
    here = [shape for shape in layout.shapes if kind in shape.traffic]
    if not here:
        return "-"
    number = lambda name: layout.mean(  # noqa: E731
        lambda s: getattr(s.traffic[kind], name) if kind in s.traffic else 0
    )
    return f"{number('launches'):.0f} x, {number('moved_bytes') / GB:.3g} GB"


def _time_columns(device, assumptions):
    seconds = lambda combine: (  # noqa: E731
        lambda x: x.mean(lambda s: combine(s.seconds(device, assumptions)))
    )
    milliseconds = lambda combine: lambda x: f"{1e3 * seconds(combine)(x):.3g}"  # noqa: E731
    rate = lambda combine: lambda x: f"{x.batch_size / seconds(combine)(x):.4g}"  # noqa: E731
    return [
        ("layout", lambda x: x.name),
        ("products ms", milliseconds(lambda parts: parts[0])),
        ("collectives ms", milliseconds(lambda parts: parts[1])),
        ("all overlap ms", milliseconds(max)),
        ("no overlap ms", milliseconds(sum)),
        ("images/s", lambda x: f"{rate(sum)(x)} to {rate(max)(x)}"),
        ("state fits", lambda x: _fits(x.state_bytes, device)),
        ("with temp", lambda x: _fits(x.memory_bytes, device)),
    ]


def _fits(num_bytes, device):
    share = num_bytes / device.memory_bytes
    return f"{'yes' if share <= 1 else 'no'}, {share:.0%}"
