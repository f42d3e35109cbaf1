"""Compiled programs are kept, in a folder of bounded size, and a folder that fails costs a line."""

import collections
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
import several
import tiny
from jax.experimental.compilation_cache import compilation_cache as of_jax

from enat_jax.runtime import compilation_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)
COUNTED = """
import collections, runpy, sys
import jax
from enat_jax.runtime import exits

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
leave = exits.leave

def counted(code):
    asked, found = events["compile_requests_use_cache"], events["cache_hits"]
    print("COUNTED", asked, asked - found, flush=True)
    leave(code)

exits.leave = counted
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The cache folder of a user who has told JAX nothing."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(compilation_cache, "_ours", compilation_cache._Ours())
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    of_jax.reset_cache()
    yield tmp_path / "caches" / "enat_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


@pytest.fixture(scope="module")
def events():
    found = collections.Counter()

    def listener(name, **_):
        found[name.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listener)
    yield found
    jax.monitoring.unregister_event_listener(listener)


def compile_anew():
    """Compiles one small program, as a process does that has just started."""
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # in tests they are errors
        return np.asarray(jax.jit(program)(np.arange(3.0)))


def program(x):
    return x * 7 + 3


def test_a_second_start_compiles_nothing(user, events):
    assert compilation_cache.use() == user
    events.clear()
    first = compile_anew()
    assert events["cache_misses"] and user.stat().st_mode & 0o077 == 0
    events.clear()
    assert (compile_anew() == first).all()
    assert events["cache_hits"] == events["compile_requests_use_cache"] > 0


def test_what_the_user_tells_jax_wins(user, tmp_path, monkeypatch):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation_cache.use() is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compilation_cache.use() is compilation_cache.use(tmp_path / "another") is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    assert compilation_cache.use() == user
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 5
    assert compilation_cache.use(tmp_path / "shared") == tmp_path / "shared"  # of several processes
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


@pytest.mark.parametrize(
    ("caches", "expected"),
    [
        (None, "/me/.cache/enat_jax/compiled"),
        ("/fast", "/fast/enat_jax/compiled"),
        ("relative", "/me/.cache/enat_jax/compiled"),
    ],
)
def test_the_folder_is_where_the_system_has_caches(monkeypatch, caches, expected):
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if caches is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
    assert compilation_cache.folder() == pathlib.Path(expected)


def test_a_folder_that_cannot_be_made_costs_one_line(user, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation_cache.use() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line and "JAX_ENABLE_COMPILATION_CACHE=false" in line
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert compilation_cache.use() is None
    assert "the user's cache folder" in capsys.readouterr().err
    compile_anew()


def test_a_damaged_entry_is_replaced(user, events, capsys):
    compilation_cache.use()
    compile_anew()
    (entry,) = user.glob("jit_program-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:100])  # as a process leaves it that was killed meanwhile
    compile_anew()
    assert len(capsys.readouterr().err.splitlines()) == 1 and entry.stat().st_size > 100
    events.clear()
    compile_anew()
    assert events["cache_hits"] == events["compile_requests_use_cache"] > 0


@pytest.mark.slow
def test_a_folder_that_fails_later_costs_one_line(user, capsys):
    compilation_cache.use()
    user.rmdir()
    user.touch()
    for _ in range(2):
        compile_anew()
    assert "cannot be kept" in capsys.readouterr().err
    compile_anew()
    assert not capsys.readouterr().err


def test_other_warnings_are_shown(user, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *about: shown.append(about))
    compilation_cache.use()
    about = UserWarning("something else"), UserWarning, "file.py", 3
    warnings.showwarning(*about)
    assert shown == [about]


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    for i, name in enumerate("dacb"):
        path = tmp_path / f"jit_{name}-0-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + i, 1000))
    (tmp_path / "of_xla").mkdir()
    (tmp_path / "other").write_bytes(bytes(20))
    kept = lambda: sorted(x.name[4] for x in tmp_path.glob("*-cache"))  # noqa: E731
    compilation_cache.bound(tmp_path, 10**6)
    assert kept() == ["a", "b", "c", "d"]
    compilation_cache.bound(tmp_path, 300)
    assert kept() == ["b", "c"] and (tmp_path / "other").exists()


@pytest.mark.slow
def test_commands_start_at_once_and_a_third_one_compiles_nothing(tmp_path):
    tiny.make_generator().save(tmp_path / "model")
    environment = several.environment(XDG_CACHE_HOME=str(tmp_path / "caches"))
    del environment["JAX_COMPILATION_CACHE_DIR"]

    def start(name, **more):
        command = [sys.executable, "-c", COUNTED, "enat_jax.sample", "--labels", "0,1", "--num"]
        command += ["1", "--model", tmp_path / "model", "--out", tmp_path / name]
        return subprocess.Popen(
            command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def counted(process):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return [int(x) for x in out.decode().rpartition("COUNTED")[2].split()]

    together = [start("a"), start("b")]
    for process in together:
        assert counted(process)[0] > 0
    asked, compiled = counted(start("c", PYTHONHASHSEED="5"))
    assert asked > 0 and compiled == 0
