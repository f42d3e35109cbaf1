"""The optimizer: AdamW with linear warm-up.

The defaults are the reference's: betas 0.99 and 0.99, eps 1e-8, weight decay 0.03
on *all* parameters (biases, norms and embeddings too), warm-up then a constant rate, no clipping.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of AdamW and of its learning rate.

    Attributes:
        learning_rate: peak rate, reached after the warm-up; > 0.
        warmup_steps: steps over which the rate rises linearly from 0; 0 for none.
        schedule: 'constant' after the warm-up, or 'cosine' down to ``final_share``.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment; > 0.
        weight_decay: decoupled decay, times the learning rate, of every parameter; >= 0.
        decay_steps: 'cosine' only: the step at which the rate reaches its end, warm-up included;
            None means the length of the run.
        clip_norm: largest global gradient norm; None for no clipping.
        final_share: 'cosine' only: share of the peak rate that is left in the end, in [0, 1).
    """

    learning_rate: float
    warmup_steps: int
    schedule: str = "constant"
    b1: float = 0.99
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.03
    decay_steps: int | None = None
    clip_norm: float | None = None
    final_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be positive and finite")
        if self.warmup_steps < 0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps!r} must not be negative; 0 means no warm-up"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown; choose one of {SCHEDULES}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1={self.b1!r} and b2={self.b2!r} must lie in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps!r} must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be finite and not negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm={self.clip_norm!r} must be positive; None means no clipping"
            )
        if not 0 <= self.final_share < 1:
            raise ValueError(f"final_share={self.final_share!r} must lie in [0, 1)")
        if self.final_share and self.schedule != "cosine":
            raise ValueError(
                f"final_share={self.final_share!r} has no effect with schedule={self.schedule!r}; "
                "leave it 0"
            )
        if self.decay_steps is not None:
            if self.schedule != "cosine":
                raise ValueError(
                    f"decay_steps={self.decay_steps!r} has no effect with "
                    f"schedule={self.schedule!r}; leave it None"
                )
            _check_decay(self.decay_steps, self.warmup_steps)

    def make(self, num_steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a run of ``num_steps`` steps, for use with
        ``optax.apply_updates``.

        Raises:
            ValueError: if ``num_steps`` is not positive, or leaves a cosine no step after the
                warm-up.
        """
        if num_steps <= 0:
            raise ValueError(f"{num_steps=} must be positive")
        adamw = optax.adamw(
            self._schedule(num_steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        if self.clip_norm is None:
            return adamw
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)

    def learning_rate_at(
        self, step: jax.typing.ArrayLike, num_steps: int | None = None
    ) -> jax.Array:
        """Returns the float32 rate of the update that takes ``step`` to ``step + 1``.

        Args:
            step: updates done so far, integer scalar or array; may be traced.
            num_steps: length of the run; needed only for a cosine without ``decay_steps``.

        Raises:
            ValueError: if the rate depends on a ``num_steps`` that was not given.
        """
        return jnp.asarray(self._schedule(num_steps)(jnp.asarray(step)), jnp.float32)

    def _schedule(self, num_steps: int | None) -> optax.Schedule:
        if self.schedule == "constant":
            after = optax.constant_schedule(self.learning_rate)
        else:
            decay_steps = num_steps if self.decay_steps is None else self.decay_steps
            if decay_steps is None:
                raise ValueError(
                    "a cosine without decay_steps needs the length of the run: give num_steps"
                )
            _check_decay(decay_steps, self.warmup_steps)
            after = optax.cosine_decay_schedule(
                self.learning_rate, decay_steps - self.warmup_steps, self.final_share
            )
        if self.warmup_steps == 0:
            return after
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])


def _check_decay(decay_steps: int, warmup_steps: int) -> None:
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"{decay_steps=} must exceed {warmup_steps=}: the cosine counts from step 0 and starts "
            "after the warm-up"
        )
