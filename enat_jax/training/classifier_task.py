"""Training a small classifier, the last layer but one of which gives features for evaluation.

Images are compared by such features where there are no weights of Inception; see ``features``.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from enat_jax.data import image_data
from enat_jax.data import images as image_sources
from enat_jax.models import classifier, losses
from enat_jax.runtime import sharding
from enat_jax.training import optim, train_state

EVALUATED = 10_000  # held-out images, at most
EVALUATION = ("accuracy", "loss")

RULES = ()  # every device has the whole network: it is small


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross-entropy; ``label_smoothing`` in [0, 1) is the share spread over all classes."""

    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Task:
    """What ``train`` asks of a task; made by ``make``."""

    model: classifier.Classifier
    source: image_sources.Source  # to train on, augmented
    held_out: image_sources.Source
    optimizer: optax.GradientTransformation
    loss: Loss
    seed: int
    batch_size: int
    workers: int = 0  # see `image_data.Data`

    def init(self, key: jax.Array) -> train_state.TrainState:
        """The state before step 0; pure. There is no moving average: ``ema_params`` is empty."""
        params = self.model.init(key, jnp.zeros((1, *self.source.image_shape)))["params"]
        return train_state.TrainState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            ema_params={},
            opt_state=self.optimizer.init(params),
            extra={},
        )

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole batch."""
        return image_data.batch_spec(self.source, self.batch_size)

    def batches(self, start: int, share: tuple[int, int] = (0, 1)) -> Iterator[image_data.Batch]:
        """Part i of n, ``share``, of every batch from number ``start`` on."""
        return image_data.batches(
            self.source, self.batch_size, self.seed, start, share, self.workers
        )

    def data_identity(self) -> dict[str, object]:
        """What must not change when a run is resumed, as JSON values."""
        return self.source.identity()

    def shapes(self, index: int) -> tuple[tuple, dict[str, np.ndarray]]:
        """Nothing changes its shape from batch to batch."""
        del index
        return (), {}

    def work(self, index: int) -> dict[str, float]:
        """Not counted for this task."""
        del index
        return {}

    def prepare(
        self, state: train_state.TrainState, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
        """Nothing is to be done before a step."""
        del batch, key
        return state, {}

    def gradients(
        self,
        state: train_state.TrainState,
        batch: Mapping[str, jax.Array],
        traced: Mapping[str, jax.Array],
        key: jax.Array,
        *,
        static: tuple,
    ) -> tuple[dict, dict[str, jax.Array], dict]:
        """Gradients of one batch, float32 scalars, and nothing else."""
        del traced, key, static

        def mean_loss(params: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss, correct = self._scores(params, batch["images"], batch["labels"])
            return loss.mean(), {"loss": loss.mean(), "accuracy": correct.mean()}

        return *jax.grad(mean_loss, has_aux=True)(state.params), {}

    def update(
        self, state: train_state.TrainState, grads: dict, extra: Mapping[str, jax.Array]
    ) -> train_state.TrainState:
        """The optimizer's update; the step is not counted here."""
        del extra
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the numbers that ``evaluate`` gives."""
        return tuple(f"held_out/{name}" for name in EVALUATION)

    def evaluate(
        self, state: train_state.TrainState, mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[str, float]]:
        """Share of held-out images whose class is found, and their mean loss in nats."""
        n = len(self.held_out)
        # Evenly over the images, which are sorted by class.
        chosen = np.linspace(0, n - 1, min(n, EVALUATED)).astype(np.int64)
        all_losses, all_correct = [], []
        for start in range(0, len(chosen), self.batch_size):
            rows = self.held_out.gather(chosen[start : start + self.batch_size])
            count = len(rows["labels"])
            # Filled up to a whole batch, so that one compiled shape serves them all.
            placed = (
                sharding.place(np.resize(x, (self.batch_size, *x.shape[1:])), mesh)
                for x in (rows["images"], rows["labels"])
            )
            loss, correct = sharding.to_host(self._jitted_scores(state.params, *placed))
            all_losses.append(loss[:count])
            all_correct.append(correct[:count])
        values = (np.concatenate(x).mean() for x in (all_correct, all_losses))
        yield from zip(self.evaluated, map(float, values), strict=True)

    def images(
        self, state: train_state.TrainState, mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[str, np.ndarray]]:
        """There is nothing to look at."""
        del state, mesh
        yield from ()

    def _scores(
        self, params: dict, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Loss and whether the class is found (0 or 1), float32 [b], of uint8 images."""
        _, logits = self.model.apply({"params": params}, classifier.to_float(images))
        loss = losses.smoothed_cross_entropy(logits, labels, self.loss.label_smoothing)
        return loss, (logits.argmax(-1) == labels).astype(jnp.float32)

    @functools.cached_property
    def _jitted_scores(self):
        return jax.jit(self._scores)


def make(config: ml_collections.ConfigDict, batch_size: int | None = None) -> Task:
    """The task of a config; ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.

    Raises ValueError, TypeError for settings that do not fit together.
    """
    data = image_data.Data.of(config.data.to_dict())
    source, held_out = data.open(data.train_split), data.open(data.held_out_split)
    if held_out.class_names != source.class_names:
        raise ValueError(
            f"{data.source}: the split {data.held_out_split} has other classes than "
            f"{data.train_split}"
        )
    model = classifier.Classifier(
        num_classes=len(source.class_names),
        image_channels=source.image_shape[-1],
        **config.model.to_dict(),
    )
    return Task(
        model=model,
        source=source,
        held_out=held_out,
        optimizer=optim.Optimizer(**config.optimizer.to_dict()).make(config.train.num_steps),
        loss=Loss(**config.loss.to_dict()),
        seed=config.seed,
        batch_size=batch_size or config.train.batch_size,
        workers=data.workers,
    )
