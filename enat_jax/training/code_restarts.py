"""Restarts of dead codes, those of a tokenizer's codebook that nothing is nearest to.

A codebook left to itself loses codes for good, because a code that nothing is nearest to gets no
gradient. So the share of positions each code wins is tracked, and codes that win next to none are
moved onto encoder outputs of the current batch, by preference badly represented ones; the same
rule gives every code its first place at step 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from enat_jax.training.task import TrainState

# The codebook, the running share of positions that each code wins, and which codes were moved.
Restarted = tuple[Float[Array, "v e"], Float[Array, " v"], Bool[Array, " v"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarts:
    """Which codes are dead and when they move; settings of the section ``loss`` of a config."""

    usage_decay: float = 0.99  # of the running share of positions that each code wins
    dead_below: float = 0.1  # a code is dead below this share of an even use of the codebook
    restart_every: int = 100  # steps between restarts of dead codes; 0 for none, not even at first
    restart_until: int | None = None  # no restarts from this step on, so that the codes settle

    def due(self, step: Int[Array, ""], codes_until: int | None) -> Bool[Array, ""]:
        """Says whether dead codes are moved before a step.

        Args:
            step: steps done.
            codes_until: step from which on no code changes; None: there is none.
        """
        due = step % self.restart_every == 0
        for last in (self.restart_until, codes_until):
            due &= last is None or step < last
        return due

    def restarted(
        self,
        codebook: Float[Array, "v e"],
        usage: Float[Array, " v"],
        z: Float[Array, "b h w e"],
        codes: Float[Array, "b h w e"],
        key: Key[Array, ""],
    ) -> Restarted:
        """Returns codebook and usage with dead codes on features of the batch, and which they were.

        Args:
            codebook: the vectors of all codes.
            usage: the running share of positions that each code wins.
            z: features of the batch, as they are compared with codes.
            codes: the nearest code of each.
            key: decides which features are taken.
        """
        v = len(codebook)
        distances = jnp.square(z - codes).sum(-1).ravel()
        # The v largest of log weight + Gumbel noise are a draw without replacement.
        scores = jnp.log(distances + 1e-12) + jax.random.gumbel(key, distances.shape, mode="low")
        chosen = z.reshape(-1, z.shape[-1])[jax.lax.top_k(scores, v)[1]]
        dead = (usage < self.dead_below / v) & jnp.isfinite(chosen).all(-1)
        # A moved code is given the time to win positions before it is judged again.
        return (
            jnp.where(dead[:, None], chosen, codebook),
            jnp.where(dead, 1 / v, usage),
            dead,
        )


def moved_everywhere(state: TrainState, dead: Bool[Array, " v"]) -> TrainState:
    """Returns the state whose average has the codes that were moved, without their moments.

    A mean of a code from before and after would be no code, and Adam's moments are of the old one.
    """

    def renewed(path: Any, old: Array, new: Array | float) -> Array:
        is_code = getattr(path[-1], "key", None) == "codebook"
        return jnp.where(dead[:, None], new, old) if is_code else old

    renew = jax.tree_util.tree_map_with_path
    return state.replace(
        ema_params=renew(renewed, state.ema_params, state.params),
        opt_state=renew(lambda path, old: renewed(path, old, 0.0), state.opt_state),
    )
