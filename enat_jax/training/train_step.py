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
"""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from enat_jax.runtime import sharding


class CompiledSteps:
    """The initial state and the steps of a run, compiled when first needed.

    Args:
        task: see ``tasks``; ``task.batch_size`` is that of a micro-batch.
        mesh: of ``sharding.make_mesh``.
        rules: of the state's sharding, see ``sharding.Sharding``.
        seed: of initialisation and of all randomness in steps.
        accumulate: micro-batches of a step.

    Attributes:
        abstract_state: tree of ``jax.ShapeDtypeStruct`` with shardings.
        compiling: called for a context around each compilation; may be replaced.
        compiled: {name and static shape: seconds it took to compile}.
    """

    def __init__(self, task, mesh, rules, *, seed, accumulate=1):
        ways = sharding.batch_ways(mesh)
        if task.batch_size % ways:
            raise ValueError(
                f"a micro-batch of {task.batch_size} images cannot be divided among {ways} devices:"
                " change train.batch_size, train.accumulate or the sharding"
            )
        self._task, self._mesh, self._seed, self._accumulate = task, mesh, seed, accumulate
        abstract = jax.eval_shape(self._init)
        placed = sharding.of_state(abstract, mesh, rules)
        self.abstract_state = _abstract(abstract, placed)
        self._state_sharding = placed
        self.compiling = contextlib.nullcontext
        self.compiled = {}
        self._executables = {}

    def init(self):
        """The state before step 0, created in shards."""
        with jax.set_mesh(self._mesh):
            return jax.jit(self._init, out_shardings=self._state_sharding)()

    def __call__(self, state, batches, step):
        """Step number ``step``, counted from 0.

        Args:
            state: donated.
            batches: list of ``accumulate`` dicts of global arrays.
            step: equal to ``state.step``.

        Returns:
            ``(state, metrics)``, metrics a dict of float32 scalars still being computed.
        """
        first = step * self._accumulate
        if self._accumulate == 1:
            static, traced = self._task.shapes(first)
            return self._get("step", static)(state, batches[0], self._traced(traced, first))
        # Compiled for the first batch, whatever its own shape: what it needs is in the images.
        state, prepared = self._get("prepare")(state, batches[0], np.uint32(first))
        total = self._get("zeros")()
        for index, batch in enumerate(batches, start=first):
            static, traced = self._task.shapes(index)
            gradients = self._get("gradients", static)
            total = gradients(state, total, batch, self._traced(traced, index))
        state, metrics = self._get("update")(state, total)
        return state, metrics | prepared

    def lower(self, static):
        """``jax.stages.Lowered`` of the whole step in one static shape; without accumulation."""
        return self._lower("step", static)

    # --- compilation ------------------------------------------------------------------------

    def _get(self, name, static=None):
        found = self._executables.get((name, static))
        if found is None:
            with self.compiling():
                start = time.perf_counter()
                found = self._executables[name, static] = self._lower(name, static).compile()
                self.compiled[name, static] = time.perf_counter() - start
        return found

    def _lower(self, name, static=None):
        """Each of the functions below with its shardings and what it may overwrite."""
        state, rep = self.abstract_state, sharding.replicated(self._mesh)
        of_state = self._state_sharding
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of_batch(self._mesh))
            for k, x in self._task.batch_spec().items()
        }
        index = jax.ShapeDtypeStruct((), np.uint32, sharding=rep)
        traced = {} if static is None else self._task.shapes(0)[1]
        traced = {k: jax.ShapeDtypeStruct((), np.int32, sharding=rep) for k in traced}
        traced |= {"index": index}
        with jax.set_mesh(self._mesh):
            match name:
                case "step":
                    function = functools.partial(self._step, static)
                    jitted = jax.jit(function, out_shardings=(of_state, rep), donate_argnums=0)
                    return jitted.lower(state, batch, traced)
                case "prepare":
                    jitted = jax.jit(self._prepare, out_shardings=(of_state, rep), donate_argnums=0)
                    return jitted.lower(state, batch, index)
                case "zeros":
                    total, placed = self._total(batch, traced)
                    zeros = functools.partial(jax.tree.map, _zeros, total)
                    return jax.jit(zeros, out_shardings=placed).lower()
                case "gradients":
                    total, placed = self._total(batch, traced)
                    function = functools.partial(self._add_gradients, static)
                    jitted = jax.jit(function, out_shardings=placed, donate_argnums=1)
                    return jitted.lower(state, _abstract(total, placed), batch, traced)
                case "update":
                    total, placed = self._total(batch, traced)
                    jitted = jax.jit(self._update, out_shardings=(of_state, rep), donate_argnums=0)
                    return jitted.lower(state, _abstract(total, placed))

    def _total(self, batch, traced):
        """Shapes and shardings of what is summed over micro-batches."""
        static, counts = self._task.shapes(0)
        traced = traced | {k: jax.ShapeDtypeStruct((), np.int32) for k in counts}
        function = functools.partial(self._gradients, static)
        total = jax.eval_shape(function, self.abstract_state, batch, traced)
        rep = sharding.replicated(self._mesh)
        grads, *rest = total
        placed = (self._state_sharding.params, *jax.tree.map(lambda _: rep, rest))
        return total, placed

    # --- what is compiled, all pure ---------------------------------------------------------

    def _init(self):
        return self._task.init(jax.random.key(self._seed))

    def _key(self, index):
        return jax.random.fold_in(jax.random.key(self._seed), index)

    def _prepare(self, state, batch, index):
        return self._task.prepare(state, batch, jax.random.fold_in(self._key(index), 1))

    def _gradients(self, static, state, batch, traced):
        """``(gradients, metrics, extra)`` of one micro-batch."""
        traced = dict(traced)
        key = self._key(traced.pop("index"))
        grads, metrics, extra = self._task.gradients(state, batch, traced, key, static=static)
        # As the parameters are: each device needs the sum of its own share alone.
        grads = jax.lax.with_sharding_constraint(grads, self._state_sharding.params)
        return grads, metrics, extra

    def _add_gradients(self, static, state, total, batch, traced):
        found = self._gradients(static, state, batch, traced)
        return jax.tree.map(lambda t, x: t + x / self._accumulate, total, found)

    def _update(self, state, total):
        """The update from mean gradients; none, but for the counts, if they are not finite."""
        grads, metrics, extra = total
        norm = optax.tree.norm(grads)
        updated = self._task.update(state, grads, extra)
        # The update itself can overflow although its gradients do not.
        finite = jnp.isfinite(jnp.stack([norm, metrics["loss"], optax.tree.norm(updated.params)]))
        finite = finite.all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        state = state.replace(step=state.step + 1, skipped=state.skipped + ~finite)
        metrics = metrics | {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(state.params),
            "skipped": 1.0 - finite,
        }
        return state, metrics

    def _step(self, static, state, batch, traced):
        state, prepared = self._prepare(state, batch, traced["index"])
        state, metrics = self._update(state, self._gradients(static, state, batch, traced))
        return state, metrics | prepared

    def _traced(self, counts, index):
        return {**counts, "index": np.uint32(index)}


def _zeros(x):
    return jnp.zeros(x.shape, x.dtype)


def _abstract(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
