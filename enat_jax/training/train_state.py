"""Everything a training run carries from step to step, and nothing else."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """A pytree, donated to each step and saved whole in checkpoints.

    Attributes:
        step: int32 scalar, steps done so far; the position in the data and in all randomness.
        skipped: int32 scalar, those of them that changed nothing, their loss or gradients not
            having been finite.
        params: nested dict, float32.
        ema_params: as ``params``, their exponential moving average; {} for a task without one.
        opt_state: of optax.
        extra: what else a task keeps, such as the use of codes; {} if nothing.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    extra: Any
