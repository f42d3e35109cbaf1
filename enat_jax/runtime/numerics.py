"""Random keys, and settings of JAX that change numbers: some are fixed here, others are recorded.

JAX takes its settings from the environment and from any caller of ``jax.config.update``. Results
must not depend on that without a word:

- Keys are made by ``key``, of the seed alone.
- The settings in ``PINNED`` have one value here. Programs set them when they start, by ``pin``; and
  what is compiled by ``jit`` is traced and called with them, also in a process with other settings.
- Precision and optimisation are left to the user. ``choices`` returns what is not the default. It
  is recorded with what was made, and what was begun is only continued with the same choices.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

PRNG = "threefry2x32"  # the implementation of all random keys
# Settings of JAX that decide numbers and types, or whether there is an error instead.
PINNED: dict[str, Any] = {
    "jax_default_prng_impl": PRNG,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
}
# Settings of JAX that are left to the user and recorded, with their defaults. Those that a version
# of JAX does not have are not set either.
CHOSEN: dict[str, Any] = {
    "jax_accurate_erf_inv": False,
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_eager_constant_folding": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_optimization_level": "UNKNOWN",
    "jax_use_direct_linearize": True,
    "jax_use_hlo_logistic_lowering": None,
}
UNSET = "not set"
# Options of XLA_FLAGS that change the numbers, as far as their names tell.
_XLA = re.compile(
    r"--(xla_\w*(?:fast_math|fast_min_max|excess_precision|dependent_math|strict_dot|_ftz|alg_dot|"
    r"tf32|reassociation|backend_optimization_level|fusion_emitters|disable_hlo_passes|max_isa|"
    r"vector_width)\w*)"
    r"(?:[= ](?!-)(\S+))?"
)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within, and in this thread, ``PINNED`` holds."""
    with contextlib.ExitStack() as stack:
        for name, value in PINNED.items():
            stack.enter_context(getattr(jax, name.removeprefix("jax_"))(value))
        yield


@pinned()
def key(seed: int | UInt32[Array, ""]) -> Key[Array, ""]:
    """Returns the random key of a seed, as ``jax.random.key`` does where nothing else is set.

    Raises:
        ValueError: the seed is not in [0, 2**32); an array is of the right type.
    """
    if not isinstance(seed, jax.Array) and not 0 <= seed < 2**32:  # JAX would cut it to 32 bits
        raise ValueError(f"{seed=} must lie in [0, 2**32)")
    # `jax.random.key` would add JAX_RANDOM_SEED_OFFSET.
    return jax.random.wrap_key_data(jnp.array([0, seed], np.uint32), impl=PRNG)


def pin() -> None:
    """Lets ``PINNED`` hold for this process from now on, and allows it transfers to devices."""
    for name, value in {**PINNED, "jax_transfer_guard": "allow"}.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


class Jitted:
    """A function compiled by ``jax.jit`` that is always traced, lowered and called with ``PINNED``.

    Args:
        function: to be compiled.
        **options: of ``jax.jit``.

    Attributes:
        jitted: what ``jax.jit`` made.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        functools.update_wrapper(self, function)
        self.jitted = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with pinned():
            return self.jitted(*arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """Lowers the function for arguments, see ``jax.jit``."""
        with pinned():
            return self.jitted.lower(*arguments, **named)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Does what ``jax.jit`` does, with or without a function, whatever is set; see ``Jitted``."""
    return functools.partial(Jitted, **options) if function is None else Jitted(function, **options)


eval_shape = pinned()(jax.eval_shape)


def choices() -> dict[str, str]:
    """Returns what the user has chosen that changes numbers, by names of environment variables.

    Returns:
        Settings in ``CHOSEN`` that are not the defaults, options of XLA that change numbers, and
        NVIDIA's override of TF32; empty where nothing is set.
    """
    found = {}
    for name, default in CHOSEN.items():
        value = getattr(jax.config, name, default)
        if value != default and not (default is None and value == "default"):
            found[name.upper()] = str(value)
    flags = dict(_XLA.findall(os.environ.get("XLA_FLAGS", "")))  # the last one of a name counts
    if flags:
        text = [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items()]
        found["XLA_FLAGS"] = " ".join(sorted(text))
    if override := os.environ.get("NVIDIA_TF32_OVERRIDE"):
        found["NVIDIA_TF32_OVERRIDE"] = override
    return found


def recorded() -> dict[str, dict[str, str]]:
    """Returns ``choices`` as the entry ``numerics`` of a record, which has none without them."""
    found = choices()
    return {"numerics": found} if found else {}


def with_all(record: Any) -> Any:
    """Returns a record whose ``numerics`` say of every choice what it is.

    Two records that are compared then name both values. What is no record is returned as it is.
    """
    if not isinstance(record, Mapping):
        return record
    names = (*(name.upper() for name in CHOSEN), "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS")
    every = dict.fromkeys(names, UNSET)
    return {**record, "numerics": every | dict(record.get("numerics") or {})}
