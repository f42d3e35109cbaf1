"""What must hold before the first test: devices, flags, and which tests this machine can run."""

import atexit
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

# Read when jax is first imported, hence here. Eight CPU devices, so that every test may shard;
# machine code that is quickly made rather than fast, because tests compile far longer than they
# compute.
_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # unknown to later versions, which would stop
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The processes of a run share what they have compiled: workers of pytest-xdist and programs that
# tests start inherit these. It ends with the run, unless the caller names a directory to keep.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="enat_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone

# Grain reads absl flags in its worker processes, and nobody parses a command line here.
flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
    has_gpu = jax.default_backend() == "gpu"
    has_torch = importlib.util.find_spec("torch") is not None
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="JAX sees no GPU"))
        if "torch" in item.keywords and not has_torch:
            item.add_marker(pytest.mark.skip(reason="PyTorch is not installed"))


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Programs stay in memory as long as jax remembers them: no module needs another one's."""
    yield
    jax.clear_caches()
    gc.collect()
    if _TRIM is not None:  # what is free goes back to the system
        _TRIM(0)


@pytest.fixture(scope="session")
def other_settings():
    """Within it, JAX is set to what would give other numbers, other types, or errors."""
    others = {
        "jax_default_prng_impl": "rbg",
        "jax_enable_x64": True,
        "jax_high_dynamic_range_gumbel": True,
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
        "jax_random_seed_offset": 5,
        "jax_softmax_custom_jvp": True,
        "jax_threefry_partitionable": False,
    }

    @contextlib.contextmanager
    def settings():
        before = {name: getattr(jax.config, name) for name in others}
        try:
            for name, value in others.items():
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)

    return settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with the tokenizer and the tokens that ``small_runs`` trains on."""
    import small_runs  # here, because most tests need none of what it imports

    root = tmp_path_factory.mktemp("data")
    small_runs.write_data(root)
    return root
