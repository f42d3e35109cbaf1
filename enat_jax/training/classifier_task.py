"""Training a small classifier, the last layer but one of which gives features for evaluation.

Images are compared by such features where there are no weights of Inception; see ``features``.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from enat_jax.models import classifier, losses
from enat_jax.runtime import numerics
from enat_jax.training import image_task
from enat_jax.training import task as tasks
from enat_jax.training.task import Metrics, TrainState

EVALUATED = 10_000  # held-out images, at most
EVALUATION = ("accuracy", "loss")

RULES = ()  # every device has the whole network: it is small


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross-entropy; ``label_smoothing`` in [0, 1) is the share spread over all classes."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Task(image_task.ImageTask):
    """What ``train`` asks of a task; made by ``make``."""

    model: classifier.Classifier
    loss: Loss

    MEASURES = EVALUATION

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The state before step 0; pure. There is no moving average: ``ema_params`` is empty."""
        params = self.model.init(key, jnp.zeros((1, *self.source.image_shape)))["params"]
        return tasks.initial_state(params, self.optimizer)

    def gradients(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        traced: Mapping[str, Array],
        key: Key[Array, ""],
        *,
        static: Hashable,
        frozen: PyTree,
    ) -> tuple[PyTree, Metrics, PyTree]:
        """Gradients of one batch, float32 scalars, and nothing else."""
        del traced, key, static, frozen

        def mean_loss(params: PyTree) -> tuple[Float[Array, ""], Metrics]:
            loss, correct = self._scores(params, batch["images"], batch["labels"])
            return loss.mean(), {"loss": loss.mean(), "accuracy": correct.mean()}

        return *jax.grad(mean_loss, has_aux=True)(state.params), {}

    def update(self, state: TrainState, grads: PyTree, extra: PyTree) -> TrainState:
        """Applies the optimizer's update; the step is not counted here."""
        del extra
        return tasks.apply_gradients(state, self.optimizer, grads)

    def evaluate(
        self, state: TrainState, mesh: jax.sharding.Mesh, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Share of held-out images whose class is found, and their mean loss in nats."""
        scores = functools.partial(self._jitted_scores, state.params)
        found = [
            self.run(scores, (rows["images"], rows["labels"]), mesh)
            for rows in self.held_out_batches(EVALUATED, few)
        ]
        all_losses, all_correct = zip(*found, strict=True)
        values = (np.concatenate(x).mean() for x in (all_correct, all_losses))
        yield from zip(self.evaluated, map(float, values), strict=True)

    def _scores(
        self, params: PyTree, images: UInt8[Array, "b h w c"], labels: Int[Array, " b"]
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Loss, and whether the class is found (0 or 1)."""
        apply: Callable[..., Any] = functools.partial(self.model.apply, {"params": params})
        _, logits = apply(classifier.to_float(images))
        loss = losses.smoothed_cross_entropy(logits, labels, self.loss.label_smoothing)
        return loss, (logits.argmax(-1) == labels).astype(jnp.float32)

    @functools.cached_property
    def _jitted_scores(self) -> Callable[..., tuple[Array, Array]]:
        return numerics.jit(self._scores)


def make(config: ml_collections.ConfigDict, batch_size: int | None = None) -> Task:
    """The task of a config; ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.

    Raises ValueError, TypeError for settings that do not fit together.
    """
    shared = image_task.settings(config, batch_size)
    source = shared["source"]
    if shared["held_out"].class_names != source.class_names:
        data = config.data
        raise ValueError(
            f"{data.source}: the split {data.held_out_split} has other classes than "
            f"{data.train_split}"
        )
    model = classifier.Classifier(
        num_classes=len(source.class_names),
        image_channels=source.image_shape[-1],
        **config.model.to_dict(),
    )
    return Task(model=model, loss=Loss(**config.loss), **shared)
