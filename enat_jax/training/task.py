"""What the training loop asks of a task, and the state that a run carries from step to step."""

import contextlib
import pathlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

Metrics = dict[str, Float[Array, ""]]


class TrainState(flax.struct.PyTreeNode):
    """A pytree, donated to each step and saved whole in checkpoints; a run keeps nothing else.

    Attributes:
        step: int32, steps done so far; the position in the data and in all randomness.
        skipped: int32, those of them that changed nothing, their loss or gradients not having been
            finite.
        params: nested dict, float32.
        ema_params: as ``params``, their exponential moving average; {} for a task without one.
        opt_state: of optax.
        extra: what else a task keeps, such as the use of codes; {} if nothing.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    extra: PyTree

    @property
    def evaluated(self) -> PyTree:
        """The parameters that are evaluated and exported: the averages, if the task has them."""
        return self.ema_params or self.params


def initial_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    ema_params: PyTree = None,
    extra: PyTree = None,
) -> TrainState:
    """Returns the state before step 0; without ``ema_params`` or ``extra`` these are {}."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        ema_params={} if ema_params is None else ema_params,
        opt_state=optimizer.init(params),
        extra={} if extra is None else extra,
    )


def apply_gradients(
    state: TrainState, optimizer: optax.GradientTransformation, grads: PyTree
) -> TrainState:
    """Returns the state with the optimizer's update of its parameters, and nothing else changed."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def average(state: TrainState, decay: float | Float[Array, ""]) -> TrainState:
    """Returns the state with its moving average moved towards its parameters."""
    ema_params = jax.tree.map(
        lambda e, p: decay * e + (1 - decay) * p, state.ema_params, state.params
    )
    return state.replace(ema_params=ema_params)


def warming_decay(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the decay of a moving average after so many updates, at most (1 + n) / (10 + n).

    The rule is that of TensorFlow's ``ExponentialMovingAverage`` for its ``num_updates``.
    """
    n = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


class Task(Protocol):
    """What every task has: a model, its data, its loss and its evaluation.

    ``train_step`` compiles ``init``, ``gradients`` and ``update``, which are pure; ``train`` calls
    the rest. A task whose steps come in several shapes is ``Shaped``, too, one that counts its work
    ``Counted``, one that changes the state before a step ``Prepared``, one that makes pictures
    ``Pictured``.
    """

    @property
    def model(self) -> Any:
        """The Linen module that is trained; its ``dtype`` is that of the computation."""

    @property
    def loss(self) -> Any:
        """The settings of the loss."""

    @property
    def batch_size(self) -> int:
        """Images of a batch, over all devices; of a micro-batch where gradients accumulate."""

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the numbers that ``evaluate`` gives, known before anything is trained."""

    @property
    def frozen(self) -> PyTree:
        """Weights of other networks, which no step changes; an argument of every step."""

    def init(self, key: Key[Array, ""]) -> TrainState:
        """Returns the state before step 0."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a whole batch."""

    def batches(
        self, start: int, share: tuple[int, int] = (0, 1)
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields part i of n of every batch from number ``start`` on, without end.

        ``share``: (i, n), see ``sharding.process_share``.
        """

    def data_identity(self) -> dict[str, Any]:
        """Returns what must not change of the data when a run is resumed, as JSON values."""

    def gradients(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        traced: Mapping[str, Array],
        key: Key[Array, ""],
        *,
        static: Any,
        frozen: PyTree,
    ) -> tuple[PyTree, Metrics, PyTree]:
        """Returns the gradients of one batch, its metrics and what else ``update`` needs.

        Args:
            state: before the step.
            batch: global arrays, as ``batch_spec`` says.
            traced, static: of ``Shaped.shapes``; empty for a task that has none.
            key: of this batch alone.
            frozen: as the property.

        Returns:
            ``(gradients, metrics, extra)``: as the parameters; with "loss" among them; a pytree
            of float arrays. All three are averaged over micro-batches.
        """

    def update(self, state: TrainState, grads: PyTree, extra: PyTree) -> TrainState:
        """Returns the state after the optimizer's update; does not count the step."""

    def evaluate(
        self, state: TrainState, mesh: jax.sharding.Mesh, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Yields the names of ``evaluated`` and their values.

        Args:
            state: to evaluate.
            mesh: of the run.
            few: compute on no more images than it takes to see that everything works. All that an
                evaluation reads is read nevertheless.
        """


@runtime_checkable
class Shaped(Protocol):
    """A task whose steps come in several compiled shapes."""

    def shapes(self, index: int) -> tuple[Hashable, dict[str, np.int32]]:
        """Returns the static shape of batch ``index`` and its traced counts; the same everywhere.

        A step is compiled for each static shape; the counts are int32 scalars.
        """


@runtime_checkable
class Counted(Protocol):
    """A task that counts its multiply-adds."""

    def work(self, index: int) -> dict[str, float]:
        """Returns "masked_share" of batch ``index``, and its "exact_work" and "padded_work".

        Works are multiply-adds of the whole batch.
        """


@runtime_checkable
class Prepared(Protocol):
    """A task that changes its state before each step."""

    def prepare(
        self, state: TrainState, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        """Returns the state to go on with, and metrics of the change; pure."""


@runtime_checkable
class Pictured(Protocol):
    """A task that evaluation makes pictures of."""

    def images(
        self, state: TrainState, mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[str, UInt8[np.ndarray, "h w c"]]]:
        """Yields pictures by name."""


@runtime_checkable
class OfPictures(Task, Protocol):
    """A task that reads pictures, some of which may not be readable."""

    def chosen(self, workdir: pathlib.Path, say: Callable[[str], None]) -> Self:
        """Returns the task of pictures that can be read; see ``run_pictures.RunPictures.choose``.

        Args:
            workdir: of the run.
            say: shows a line.
        """

    def recognise(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the identity of a checkpoint's data; see ``RunPictures.recognise``."""

    def reporting(self) -> contextlib.AbstractContextManager[None]:
        """Within, a picture that cannot be read is noted; see ``RunPictures.reporting``."""


def shapes(task: Task, index: int) -> tuple[Hashable, dict[str, np.int32]]:
    """Returns the static shape and the traced counts of batch ``index`` of any task."""
    return task.shapes(index) if isinstance(task, Shaped) else ((), {})


def work(task: Task, first: int, count: int) -> dict[str, float]:
    """Returns what ``Counted.work`` says of ``count`` batches from number ``first`` on together.

    The mean share of masked tokens, and sums of multiply-adds; {} of a task that does not count.
    """
    if not isinstance(task, Counted):
        return {}
    parts = [task.work(index) for index in range(first, first + count)]
    scale = {"masked_share": 1 / count}
    return {name: scale.get(name, 1) * sum(part[name] for part in parts) for name in parts[0]}
