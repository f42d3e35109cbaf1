"""The largest batch is found by asking memory first, and nothing is left behind by a try."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest
import tiny
import tiny_config

from enat_jax.profiling import batch_fit, setup, timing

KIB = 1024
SMALL = (8, 8, 8)


def attempt_rows(batch, check):
    """A program whose output is ``batch`` rows of 1 KiB."""
    compiled = jax.jit(lambda: jnp.ones((batch, 256))).lower().compile()
    check(compiled)
    compiled().block_until_ready()
    return f"{batch} rows", 10.0 * batch


def fit(attempt, kib, **changes):
    values = {"first": 1, "most": 1024, "free": lambda: kib * KIB} | changes
    return batch_fit.fit(attempt, **values)


def tried(found):
    return [(x.batch, x.fits) for x in found.tries]


def test_a_program_says_what_it_allocates():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones((3, 256))).compile()
    assert batch_fit.program_bytes(compiled) == 3 * KIB  # the output; the argument is there already
    assert batch_fit.program_bytes(types.SimpleNamespace(memory_analysis=lambda: None)) is None
    assert batch_fit.tree_bytes({"a": jnp.ones((3, 256)), "b": jnp.int8(1)}) == 3 * KIB + 1


def test_the_largest_batch_is_found_within_a_factor_of_two():
    found = fit(attempt_rows, 100)
    assert (found.batch, found.result) == (64, "64 rows")
    # From what one row needs it follows that 64 fit; 128 did not run.
    assert tried(found) == [(1, True), (64, True), (128, False)]
    assert found.tries[1].needed == 64 * KIB and found.tries[1].free == 100 * KIB
    assert found.tries[1].images_per_second == 640.0
    assert found.tries[2].reason == "needs 0.000122 GiB of 9.54e-05 GiB that are free"
    assert found.own_peak and found.json()["tries"][2]["ran_out"] is False


@pytest.mark.parametrize(
    "first, most, expected",
    [
        (256, 1024, [(256, False), (128, False), (64, True)]),
        (8, 50, [(8, True), (50, True)]),
        (64, 64, [(64, True)]),
        (48, 1024, [(48, True), (96, True), (192, False)]),
    ],
)
def test_the_search_begins_and_ends_where_it_is_told(first, most, expected):
    assert tried(fit(attempt_rows, 100, first=first, most=most)) == expected


def test_where_memory_is_unknown_batches_double_until_one_runs_out():
    def attempt(batch, check):
        check(jax.jit(lambda: jnp.ones(1)).lower().compile())
        if batch > 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return batch, 1.0

    found = fit(attempt, 0, free=lambda: None)
    assert found.batch == 4 and tried(found) == [(1, True), (2, True), (4, True), (8, False)]
    assert found.tries[-1].reason == "ran out of memory (RESOURCE_EXHAUSTED: Out of memory)"
    assert not found.own_peak


def test_memory_that_really_runs_out_is_recognised():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(2**50, jnp.int8).block_until_ready()
    assert batch_fit.out_of_memory(caught.value)
    assert batch_fit.out_of_memory(MemoryError())
    assert not batch_fit.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
    assert not batch_fit.out_of_memory(ValueError("RESOURCE_EXHAUSTED"))


def test_other_errors_end_the_search():
    def attempt(batch, check):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        fit(attempt, 100)


def test_nothing_fits():
    with pytest.raises(ValueError, match="not even a batch of 1 fits: needs .* that are free"):
        fit(attempt_rows, 0.5, first=4)
    with pytest.raises(ValueError, match="first=3 must lie between 1 and most=2"):
        fit(attempt_rows, 100, first=3, most=2)


def test_a_try_that_fails_leaves_no_array_behind():
    def attempt(batch, check):
        kept = jnp.full((batch, 7, 13), 1.0)
        cycle = [kept]
        cycle.append(cycle)
        if batch > 2:
            raise MemoryError
        return batch, float(kept[0, 0, 0])

    fit(attempt, 100)
    assert not [x for x in jax.live_arrays() if x.shape[1:] == (7, 13)]


def fit_sampler(free):
    return batch_fit.fit_sampler(
        tiny.TRANSFORMER,
        dataclasses.replace(tiny.SETTINGS, num_steps=1),
        [1],
        first=32,  # images that need more memory than the parameters
        most=64,
        report=lambda line: None,
        free=lambda: free,
        repeats=1,
        matmul_shape=SMALL,
    )


def test_a_model_larger_than_the_memory_is_never_made(monkeypatch):
    monkeypatch.setattr(timing, "time_sampler", None)  # not called
    with pytest.raises(ValueError, match="not even a batch of 1 fits: needs"):
        fit_sampler(1000)


@pytest.mark.slow
def test_the_sampler_is_fitted():
    found = fit_sampler(2**30)
    needed = {x.batch: x.needed for x in found.tries}
    assert found.batch == 64 and found.result[0].images == 64 and needed[64] > needed[32]
    found = fit_sampler((needed[32] + needed[64]) // 2)
    assert found.batch == 32 and tried(found) == [(32, True), (64, False)]


def training_task():
    return setup.make_task(ml_collections.ConfigDict(tiny_config.config()), 1)


def test_training_must_fit_in_the_largest_shape(monkeypatch):
    asked = []

    def measure(task, *, check, chosen=None, max_timed=None, repeats):
        asked.append((task.batch_size, chosen, max_timed, repeats))
        if chosen is not None and task.batch_size > 4:
            raise batch_fit.DoesNotFit("too large")
        one = types.SimpleNamespace(images_per_second=(3.0, 2.0, 4.0))
        return types.SimpleNamespace(timed=(one,), images_per_second=5.0)

    monkeypatch.setattr(timing, "time_training", measure)
    task = training_task()
    largest = max(range(3), key=lambda i: sum(task.buckets[i].windows))
    lines = []
    found = batch_fit.fit_training(
        task, max_timed=2, first=4, most=64, report=lines.append, repeats=3
    )
    assert found.batch == 4 and found.result.images_per_second == 5.0
    assert asked == [(4, [largest], None, 3), (8, [largest], None, 3), (4, None, 2, 3)]
    assert lines == ["batch 4: fits", "batch 8: too large"]
    assert [x.images_per_second for x in found.tries] == [3.0, None, 5.0]


@pytest.mark.slow
def test_training_is_fitted():
    how = {"first": 2, "most": 4, "report": lambda line: None, "matmul_shape": SMALL}
    found = batch_fit.fit_training(training_task(), max_timed=1, repeats=1, **how)
    assert found.batch == 4 and [x.batch for x in found.tries] == [2, 4, 4]
    needed = [x.needed for x in found.tries]
    assert 0 < needed[0] < needed[1] and needed[2] <= needed[1]  # the largest shape needs most
    between = (needed[0] + needed[1]) // 2
    found = batch_fit.fit_training(
        training_task(), max_timed=1, repeats=1, free=lambda: between, **how
    )
    assert found.batch == 2 and tried(found) == [(2, True), (4, False), (2, True)]


@pytest.mark.slow
def test_a_trace_is_written(tmp_path):
    task = dataclasses.replace(training_task(), batch_size=2)
    batch_fit.trace_training(task, tmp_path)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.read_bytes().count(b"train") >= 1
