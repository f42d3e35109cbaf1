"""The training step of any task: compiled once for each static shape, sharded, donated.

One step is ``accumulate`` micro-batches, each with its own token counts as each rank of the
reference has, and one update from the mean of their gradients. A step whose loss or gradients are
not finite changes nothing but the count of such steps.

What a step communicates (``tests/test_communication.py`` counts it in the compiled program; sizes
and predictions for real machines: ``python -m enat_jax.benchmark scaling``):

- over "data" and "fsdp", in float32, the sum of the gradients, once for each micro-batch; each
  device of "fsdp" needs only that of its share (a reduce-scatter on accelerators);
- over "fsdp", in the dtype of the computation, each layer's parameters in every pass that uses
  them, layer by layer: forward, backward, and the forward pass of the moving average;
- over "tensor", activations [b, n, d]: forward the output of attention and of the MLP of each
  block; backward the gradients with respect to the inputs of the MLP, of the queries, of keys and
  values, and of the context's (XLA may join some of them); and the modulation vectors, once a pass.

Nothing else of the size of a parameter or an activation moves.

Weights that a task uses and does not train are an argument of the step, divided like parameters.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from enat_jax.models import shapes
from enat_jax.runtime import numerics, sharding
from enat_jax.training import task as tasks
from enat_jax.training.task import Metrics, Task, TrainState

Batch = Mapping[str, jax.Array]
Traced = Mapping[str, Any]  # integer scalars by name
RANDOMNESS = "index", "seed"  # of a batch and of the run: all that its random numbers depend on
Total = tuple[PyTree, Metrics, PyTree]  # of gradients, metrics and extra, see ``Task.gradients``


class CompiledSteps:
    """The initial state and the steps of a run, compiled when first needed.

    Args:
        task: whose ``batch_size`` is that of a micro-batch.
        mesh: of ``sharding.make_mesh``.
        rules: of the state's sharding, see ``sharding.Sharding``.
        seed: of initialisation and of all randomness in steps.
        accumulate: micro-batches of a step.

    Attributes:
        abstract_state: tree of ``jax.ShapeDtypeStruct`` with shardings.
        compiling: makes a context for each step that compiles something; may be replaced.
        compiled: static shapes that have been compiled, and the seconds that it took.

    Raises:
        ValueError: the devices cannot share a batch.
    """

    def __init__(
        self,
        task: Task,
        mesh: jax.sharding.Mesh,
        rules: Sequence[sharding.Rule],
        *,
        seed: int,
        accumulate: int = 1,
    ):
        ways = sharding.batch_ways(mesh)
        if task.batch_size % ways:
            raise ValueError(
                f"a micro-batch of {task.batch_size} images cannot be divided among {ways} devices:"
                " change train.batch_size, train.accumulate or the sharding"
            )
        self._task, self._mesh, self._seed, self._accumulate = task, mesh, seed, accumulate
        abstract = numerics.eval_shape(self._init, np.uint32(seed))
        placed = sharding.of_state(abstract, mesh, rules)
        self.abstract_state = _abstract(abstract, placed)
        self._placed_params = placed.params
        frozen = {"frozen": task.frozen}  # whose paths no rule takes for those of the state
        abstract_frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
        divided = sharding.of_state(abstract_frozen, mesh, rules)
        self._abstract_frozen = _abstract(abstract_frozen, divided)["frozen"]
        self.compiling: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.compiled: dict[Hashable, float] = {}
        rep = sharding.replicated(mesh)
        after = (placed, rep)  # the state and metrics
        self._jit_init = numerics.jit(self._init, out_shardings=placed)
        self._jit_step = numerics.jit(
            self._step, static_argnums=0, donate_argnums=1, out_shardings=after
        )
        if accumulate > 1:
            total = self._abstract_total()
            placed_total = (placed.params, *jax.tree.map(lambda _: rep, total[1:]))
            zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)  # noqa: E731
            self._jit_zeros = numerics.jit(zeros, out_shardings=placed_total)
            self._jit_prepare = numerics.jit(self._prepare, donate_argnums=0, out_shardings=after)
            self._jit_add = numerics.jit(
                self._add_gradients, static_argnums=0, donate_argnums=2, out_shardings=placed_total
            )
            self._jit_update = numerics.jit(self._update, donate_argnums=0, out_shardings=after)

    def init(self) -> TrainState:
        """Returns the state before step 0, created in shards."""
        with jax.set_mesh(self._mesh):
            return self._jit_init(np.uint32(self._seed))

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], step: int
    ) -> tuple[TrainState, Metrics]:
        """Does step number ``step``, counted from 0.

        Args:
            state: donated.
            batches: ``accumulate`` dicts of global arrays.
            step: equal to ``state.step``.

        Returns:
            The new state and float32 scalars, both still being computed.
        """
        first = step * self._accumulate
        found = [self._shapes(index) for index in range(first, first + self._accumulate)]
        with jax.set_mesh(self._mesh), self._noting_compilations(static for static, _ in found):
            if self._accumulate == 1:
                ((static, traced),) = found
                return self._jit_step(static, state, batches[0], traced, self._frozen)
            # Before the first batch, whatever its shape: what it needs is in the images.
            of_first = {name: found[0][1][name] for name in RANDOMNESS}
            state, prepared = self._jit_prepare(state, batches[0], of_first)
            total = self._jit_zeros()
            for (static, traced), batch in zip(found, batches, strict=True):
                total = self._jit_add(static, state, total, batch, traced, self._frozen)
            state, metrics = self._jit_update(state, total)
            return state, metrics | prepared

    def lower(self, static: Hashable) -> jax.stages.Lowered:
        """Returns the whole step in one static shape, lowered; without accumulation."""
        with jax.set_mesh(self._mesh):
            return self._jit_step.lower(
                *(static, self.abstract_state, self._abstract_batch(), self._shapes(0)[1]),
                self._abstract_frozen,
            )

    @functools.cached_property
    def _frozen(self) -> PyTree:
        """What no step changes, sent to the devices once."""

        def place(x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            whole = np.asarray(x)
            return jax.make_array_from_callback(x.shape, like.sharding, lambda at: whole[at])

        return jax.tree.map(place, self._task.frozen, self._abstract_frozen)

    # --- shapes -----------------------------------------------------------------------------

    def _shapes(self, index: int) -> tuple[Hashable, Traced]:
        """The static shape of a batch, and the integers that its step is given.

        The seed is among them, not a constant: what one run has compiled serves those of all seeds.
        """
        static, counts = tasks.shapes(self._task, index)
        return static, {**counts, "index": np.uint32(index), "seed": np.uint32(self._seed)}

    @contextlib.contextmanager
    def _noting_compilations(self, shapes: Iterable[Hashable]) -> Iterator[None]:
        """Times a step that compiles, because it sees one of the shapes for the first time."""
        new = [static for static in dict.fromkeys(shapes) if static not in self.compiled]
        if not new:
            yield
            return
        with self.compiling():
            start = time.perf_counter()
            yield
            seconds = (time.perf_counter() - start) / len(new)
        self.compiled |= dict.fromkeys(new, seconds)

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        of_batch = sharding.of_batch(self._mesh)
        spec = self._task.batch_spec()
        return {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_batch) for k, x in spec.items()
        }

    def _abstract_total(self) -> Total:
        """Shapes of what is summed over micro-batches."""
        static, traced = self._shapes(0)
        with jax.set_mesh(self._mesh):
            return numerics.eval_shape(
                lambda *arguments: self._gradients(static, *arguments),
                *(self.abstract_state, self._abstract_batch(), traced, self._abstract_frozen),
            )

    # --- what is compiled, all pure ---------------------------------------------------------

    def _init(self, seed: Array) -> TrainState:
        return self._task.init(numerics.key(seed))

    def _prepare(
        self, state: TrainState, batch: Batch, traced: Traced
    ) -> tuple[TrainState, Metrics]:
        if not isinstance(self._task, tasks.Prepared):
            return state, {}
        return self._task.prepare(state, batch, jax.random.fold_in(_key(traced), 1))

    def _gradients(
        self, static: Hashable, state: TrainState, batch: Batch, traced: Traced, frozen: PyTree
    ) -> Total:
        """Returns what is summed over micro-batches, for one of them."""
        for name, expected in self._task.batch_spec().items():
            sizes = {f"axis{i}": size for i, size in enumerate(expected.shape)}
            shapes.check(f'batch["{name}"]', batch[name], **sizes)
        counts = {name: x for name, x in traced.items() if name not in RANDOMNESS}
        grads, metrics, extra = self._task.gradients(
            state, batch, counts, _key(traced), static=static, frozen=frozen
        )
        # As the parameters are: each device needs the sum of its own share alone.
        grads = jax.lax.with_sharding_constraint(grads, self._placed_params)
        return grads, metrics, extra

    def _add_gradients(
        self,
        static: Hashable,
        state: TrainState,
        total: Total,
        batch: Batch,
        traced: Traced,
        frozen: PyTree,
    ) -> Total:
        found = self._gradients(static, state, batch, traced, frozen)
        return jax.tree.map(lambda t, x: t + x / self._accumulate, total, found)

    def _update(self, state: TrainState, total: Total) -> tuple[TrainState, Metrics]:
        """The update from mean gradients; none, but for the counts, if they are not finite."""
        grads, metrics, extra = total
        norm = optax.tree.norm(grads)
        updated = self._task.update(state, grads, extra)
        # The update itself can overflow although its gradients do not. A discriminator that is not
        # finite would spoil all steps after this one.
        others = jax.tree.leaves((extra, updated.extra.get("discriminator")))
        others = [x for x in others if jnp.isdtype(x.dtype, "real floating")]
        norms = [norm, metrics["loss"], optax.tree.norm(updated.params), optax.tree.norm(others)]
        finite = jnp.isfinite(jnp.stack(norms)).all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        state = state.replace(step=state.step + 1, skipped=state.skipped + ~finite)
        metrics = metrics | {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(state.params),
            "skipped": 1.0 - finite,
        }
        return state, metrics

    def _step(
        self, static: Hashable, state: TrainState, batch: Batch, traced: Traced, frozen: PyTree
    ) -> tuple[TrainState, Metrics]:
        state, prepared = self._prepare(state, batch, traced)
        state, metrics = self._update(state, self._gradients(static, state, batch, traced, frozen))
        return state, metrics | prepared


def _key(traced: Traced) -> Key[Array, ""]:
    return jax.random.fold_in(numerics.key(traced["seed"]), traced["index"])


def _abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
