"""With one process; with two: `test_checkpoint.py`, `test_run_pictures.py`."""

import pytest

from enat_jax.runtime import agreement


class Minor(Exception):
    pass


def test_the_first_process_returns_what_the_function_does():
    assert agreement.broadcast_from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    with pytest.raises(ZeroDivisionError):
        agreement.broadcast_from_first(lambda: 1 / 0)


def test_what_every_process_returns_is_gathered():
    assert agreement.gather(lambda: {"a": [1, None]}) == [{"a": [1, None]}]
    with pytest.raises(ZeroDivisionError):
        agreement.gather(lambda: 1 / 0)


def test_no_failure_raises_nothing():
    assert agreement.raise_on_all(None, minor=Minor) is None


@pytest.mark.parametrize("failure", [Minor("small"), PermissionError("large")])
def test_a_failure_is_raised_as_it_is(failure):
    with pytest.raises(type(failure)) as raised:
        agreement.raise_on_all(failure, minor=Minor)
    assert raised.value is failure
