"""The matrix rate is that of all devices at once."""

import math

import jax
import pytest

from enat_jax.runtime import matrix_rate

SMALL = (32, 48, 32)


@pytest.mark.parametrize("count", [1, 8])
def test_the_matrix_rate_is_that_of_all_devices_at_once(monkeypatch, count):
    products = []

    def timer(work, least):
        products.append((work(), least))
        return lambda: 0.5

    monkeypatch.setattr(matrix_rate, "timer", timer)
    monkeypatch.setattr(matrix_rate, "RATE_SHAPE_CPU", (3, 5, 7))
    rate = matrix_rate.matrix_rate("float32", jax.local_devices()[:count], seconds=0.25)
    assert rate == count * 3 * 5 * 7 / 0.5
    ((product, least),) = products
    assert least == 0.25
    assert product.shape == (3 * count, 7) and len(product.sharding.device_set) == count
    assert {shard.data.shape for shard in product.addressable_shards} == {(3, 7)}


def test_the_matrix_rate_of_this_machine(monkeypatch):
    monkeypatch.setattr(matrix_rate, "RATE_SHAPE_CPU", SMALL)
    assert 0 < matrix_rate.matrix_rate("bfloat16", seconds=0.01) < math.inf
