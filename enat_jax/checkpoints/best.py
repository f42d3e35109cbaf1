"""Which checkpoint of a run is the best one, so that Orbax keeps it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from orbax.checkpoint import checkpoint_managers


@dataclasses.dataclass(frozen=True)
class Best:
    """What makes a checkpoint the best one.

    Attributes:
        metric: name among the metrics of an evaluation.
        mode: whether the lowest ("min") or the highest ("max") value is best; of equal ones the
            earliest.
    """

    metric: str
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r} of the best {self.metric} must be 'min' or 'max'")


class KeepBest(checkpoint_managers.PreservationPolicy):
    """Keeps the best checkpoint.

    Orbax's ``BestN`` goes by a file of metrics that Orbax writes with the state. Here a state is
    saved before it is evaluated. Orbax removes checkpoints when it saves the next one, so that the
    newest is never removed before it has been evaluated.
    """

    def __init__(self, best: Best) -> None:
        self._best = best
        self._scores: dict[int, float] = {}

    def note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of a step; without a value of the metric, it is never the best."""
        score = metrics.get(self._best.metric)
        if score is None:
            self._scores.pop(step, None)  # of an earlier run through this step
        else:
            self._scores[step] = score

    def best_of(self, steps: Iterable[int]) -> int | None:
        """Returns the best of ``steps``, or None if none has the metric."""
        best = min if self._best.mode == "min" else max
        scored = sorted(step for step in steps if step in self._scores)
        return best(scored, key=self._scores.__getitem__, default=None)

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        """Says which of Orbax's ``checkpoints`` this policy keeps."""
        best = self.best_of(checkpoint.step for checkpoint in checkpoints)
        return [checkpoint.step == best for checkpoint in checkpoints]
