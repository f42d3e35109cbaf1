"""Which checkpoint is the best one, for Orbax to keep it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Best:
    """What makes a checkpoint the best one.

    Attributes:
        metric: name among the metrics of an evaluation.
        mode: whether the lowest ("min") or the highest ("max") value is best; of equal ones the
            earliest.
    """

    metric: str
    mode: Literal["min", "max"]

    def __post_init__(self):
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r} of the best {self.metric} must be 'min' or 'max'")


class KeepBest:
    """A preservation policy of Orbax. Its own would keep every checkpoint without the metric."""

    def __init__(self, best: Best):
        self._best = best
        self._scores: dict[int, float] = {}

    def note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of a step; without a value of the metric, it is never the best."""
        score = metrics.get(self._best.metric)
        if score is None:
            self._scores.pop(step, None)  # of an earlier run through this step
        else:
            self._scores[step] = score

    def best_of(self, steps: Sequence[int]) -> int | None:
        """Returns the best of ``steps``, or None if none has the metric."""
        scored = sorted(step for step in steps if step in self._scores)
        if not scored:
            return None
        return (min if self._best.mode == "min" else max)(scored, key=self._scores.__getitem__)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Says which of Orbax's ``checkpoints`` this policy keeps."""
        del context
        best = self.best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
