"""Attention gives the same by any implementation, and "auto" takes what the device is best at."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.models import blocks


def inputs(q, c, dtype=jnp.float32, head=8):
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(2, n, 3, head)), dtype)  # noqa: E731
    return draw(q), draw(c), draw(c)


def mask_of(shape):
    return jnp.asarray(np.random.default_rng(1).random(shape) < 0.7).at[..., 0].set(True)


@pytest.fixture
def cudnn(monkeypatch):
    """Stands in for kernels of cuDNN, refuses what they refuse, and returns its calls."""
    calls, real = [], jax.nn.dot_product_attention

    def attend(query, key, value, *, implementation, **masks):
        if implementation == "cudnn":
            sizes = query.shape[1], key.shape[1]
            assert not any(size % 2 for size in sizes)
            calls.append(sizes)
        return real(query, key, value, implementation="xla", **masks)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return calls


@pytest.mark.parametrize(
    ("q", "c", "mask"),
    [(5, 7, None), (5, 8, None), (4, 6, None), (5, 7, (2, 1, 1, 7)), (3, 4, (1, 1, 3, 4))],
)
def test_cudnn_sees_even_windows_alone(cudnn, q, c, mask):
    arrays = inputs(q, c)
    mask = None if mask is None else mask_of(mask)

    def total(arrays, implementation):
        return jnp.sin(blocks.attention(*arrays, mask, implementation)).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(arrays, name)
        for name in ("cudnn", "xla")
    )
    assert cudnn == [(q + q % 2, c + c % 2)]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, expected
    )


def gpu(platform="gpu", version="cuda 12090", capability="8.0"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)


def test_auto_is_lowered_for_each_platform(cudnn, monkeypatch):
    arrays = inputs(3, 5, jnp.bfloat16)
    auto = jax.jit(lambda *arrays: blocks.attention(*arrays, None, "auto"))
    on_cpu = auto.lower(*arrays).as_text()
    assert not cudnn
    monkeypatch.setattr(jax, "devices", lambda: [gpu()])
    of_xla = jax.jit(lambda *arrays: blocks.attention(*arrays, None, "xla"))
    jax.clear_caches()
    np.testing.assert_array_equal(auto(*arrays), of_xla(*arrays))
    assert cudnn == [(4, 6)] and "platform_index" not in on_cpu


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "expected"),
    [
        (gpu(), (2, 5, 3, 64), jnp.bfloat16, True),
        (gpu(capability="9.0"), (2, 5, 3, 96), jnp.bfloat16, True),
        (gpu(), (2, 5, 6, 61), jnp.bfloat16, False),  # ENAT-S
        (gpu(), (2, 5, 3, 256), jnp.bfloat16, False),
        (gpu(), (2, 5, 3, 64), jnp.float32, False),
        (gpu(capability="7.5"), (2, 5, 3, 64), jnp.bfloat16, False),
        (gpu(version="rocm 6", capability="gfx90a"), (2, 5, 3, 64), jnp.bfloat16, False),
        (gpu(platform="tpu"), (2, 5, 3, 64), jnp.bfloat16, False),
    ],
)
def test_where_cudnn_is_taken(monkeypatch, device, shape, dtype, expected):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert blocks._has_cudnn(jax.ShapeDtypeStruct(shape, dtype)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("q", "c", "mask"),
    [
        (5, 7, None),
        (64, 257, None),
        (6, 64, (1, 1, 6, 64)),
        (5, 7, (2, 1, 1, 7)),
        (1, 9, (2, 1, 1, 9)),
    ],
)
def test_kernels_of_cudnn_give_what_products_give(q, c, mask):
    arrays = inputs(q, c, jnp.bfloat16, 64)
    mask = None if mask is None else mask_of(mask)
    assert blocks._has_cudnn(arrays[0])

    def total(arrays, implementation):
        found = blocks.attention(*arrays, mask, implementation).astype(jnp.float32)
        return jnp.sin(found).sum(), found

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    found, expected = run(arrays, "cudnn"), run(arrays, "xla")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(*map(np.float32, (x, y)), rtol=2e-2, atol=2e-2),
        found,
        expected,
    )
