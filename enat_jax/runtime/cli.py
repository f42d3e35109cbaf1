"""How programs end: a user's mistake is one line on stderr and exit code 2, a bug is a traceback.

    0    done
    1    a bug, with its traceback
    2    the user's mistake
    3    training diverged
    75   stopped on request, after saving: start the same command again to go on
    76   another process was lost or hung: start the same command again to go on
    130  interrupted at once

Scripts in ``launch/`` start a program again after 75 and 76, and after nothing else.

At the bottom of a program stands one of

    if __name__ == "__main__":
        cli.run(main)         # main(arguments), which parses them itself, for instance by argparse
        cli.run_absl(main)    # main(argv) after absl flags have been parsed, as for absl's app.run

With the environment variable ENAT_JAX_TRACEBACK=1 mistakes show their traceback, too.
"""

import argparse
import ast
import json
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from enat_jax.runtime import exits, os_errors, paths

MAX_COUNT = 10**9  # of what is counted on a command line


class Stop(Exception):
    """Ends a program early, for a reason that is neither a mistake nor a bug.

    Args:
        message: one line for stderr.
        code: exit code, such as ``exits.STOPPED``.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors are one line, as all others are, without the usage."""

    def error(self, message: str) -> NoReturn:
        line = exits.one_line(message, None)
        self.exit(exits.MISTAKE, f"error: {line}; see {self.prog} --help\n")


def run(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> NoReturn:
    """Calls ``main`` and exits with what it returns, or with an error code.

    Args:
        main: takes the list of command-line arguments, without the program's name; returns an
            exit code or None.
        argv: the arguments; None: those of the process.

    Raises:
        SystemExit: always, but for what is no user's mistake: that is raised as it is.
    """
    code: Any
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a notebook puts in its place has none
            stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    show_all = exits.shows_tracebacks()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what it raises
    try:
        from enat_jax.runtime import compilation_cache, numerics  # late, since they import JAX

        numerics.pin()
        compilation_cache.use()
        code = main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        if show_all:
            raise
        print("interrupted", file=sys.stderr)
        code = exits.INTERRUPTED
    except SystemExit as end:  # absl's app.run ends so
        code = end.code
    except Stop as stop:
        print(f"stopped: {exits.one_line(stop, None)}", file=sys.stderr)
        code = stop.code
    except Exception as error:
        code = _fail(error, show_all)
    exits.leave(code)


def run_absl(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> NoReturn:
    """Does what ``run`` does for a ``main`` that reads absl flags, and reports wrong flags alike.

    Args:
        main: as for ``absl.app.run``: takes the program's name and the arguments that are no
            flags; returns an exit code or None.
        argv: as for ``run``.
    """
    run(lambda arguments: app.run(main, [sys.argv[0], *arguments], flags_parser=_parse_flags), argv)


def _parse_flags(argv: list[str]) -> list[str]:
    for argument in argv:
        if argument.startswith(("--config.", "--noconfig.")):
            raise ValueError(
                f"{argument} has no config to change yet: give --config FILE before it"
            )
        if argument.split("=")[0] in ("--config", "-config"):
            break  # whose file says which other flags there are
    helps = [x for x in argv if x.lstrip("-") in ("help", "helpshort", "helpfull") and x[0] == "-"]
    try:
        # Help goes last, so that it knows the settings of a config.
        return flags.FLAGS([*(x for x in argv if x not in helps), *helps])
    except SystemExit:  # of absl's help, with 1
        raise SystemExit(0) from None
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unrecognized(error)) from error


def _unrecognized(error: flags.UnrecognizedFlagError) -> str:
    """Returns the words for a flag that is unknown, with settings of the config of its name."""
    wanted = error.flagname.rpartition(".")[2].replace("-", "_")
    near = [f"--{name}" for name in flags.FLAGS if name.startswith("config.")]
    near = [name for name in near if name.rpartition(".")[2] == wanted]
    if near:
        return f"unknown flag --{error.flagname}: did you mean {' or '.join(near)}?"
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
        return f"{error}. Settings of a config are flags after --config FILE".replace(" ?.", "?")
    return str(error)


def path(text: str) -> pathlib.Path:
    """Reads a path of this machine, see ``paths.local``; a type of argparse, as those below."""
    try:
        return paths.local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def place(text: str) -> pathlib.Path:
    """Reads a path, or an address in a bucket, see ``paths.place``."""
    try:
        return paths.place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model(text: str) -> str | pathlib.Path:
    """Reads the path of a directory, or its address, such as hf://OWNER/NAME, which stays a text.

    What reads it fetches it from there: see ``hub.download`` and ``buckets.fetched``.
    """
    return text if paths.address(text) else path(text)


def at_least_one(text: str) -> int:
    """Reads a whole number from 1 to ``MAX_COUNT``."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_COUNT:,}")
    return int(text)


def _fail(error: Exception, show_all: bool) -> int:
    """Returns the exit code for an error that ends the program; raises it where that is safe."""
    if exits.one_of_several() and (lost := exits.peer_lost(error)):
        if show_all:
            traceback.print_exception(error)
        exits.end_without(lost)
    message = _message(error)
    if message is not None and not show_all:
        print(f"error: {exits.one_line(message, None)}", file=sys.stderr)
        return exits.MISTAKE
    if not exits.one_of_several():
        raise
    # Raised, it would make this process wait for all the others, which wait for this one.
    traceback.print_exception(error)
    return exits.BUG if message is None else exits.MISTAKE


def _message(error: Exception) -> str | None:
    """Returns the words for a user's mistake, or None if ``error`` looks like a bug."""
    if isinstance(error, OSError | MemoryError) and (text := os_errors.words(error)):
        return text
    if isinstance(error, (OSError, ValueError, flags.Error)):
        return str(error) or type(error).__name__
    # ConfigDict wraps the KeyError of an unknown key in an AttributeError.
    if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        return f"unknown config key {' '.join(str(error.args[0].args[0]).split())}"
    if isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        return error.args[0]  # a sentence is for the user, a bare key is a bug
    return exits.no_package(error) or _no_platform(error)


def _no_platform(error: Exception) -> str | None:
    """Returns one line if JAX did not find the devices that it should take, or else None."""
    expected = isinstance(error, (RuntimeError, AssertionError))
    if not (expected and exits.raised_in(error, "jax._src.xla_bridge")):
        return None
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return str(error) or "JAX finds no device"
    cause = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "there is no such device"
    return (
        f"JAX_PLATFORMS={platforms} does not work here: {exits.one_line(cause)}; unset it, and JAX "
        "takes what there is"
    )


def interval(text: str) -> tuple[float, ...]:
    """Reads numbers such as "0.2,0.8"; how many and how large they are is checked later."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH, such as 0.2,0.8") from None


def name_value(text: str) -> tuple[str, Any]:
    """Reads "NAME=VALUE", the value as JSON or Python has it: true, True, [0.8, 1], (0.8, 1)."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    for read in (json.loads, ast.literal_eval):
        try:
            return name, read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # as Python's parser raises
            continue
    return name, value


def models(own: str | pathlib.Path, others: Sequence[str]) -> dict[str, str | pathlib.Path]:
    """Returns the directories of models by name: "ours", and those of ``--compare NAME=DIR``.

    Raises:
        ValueError: an entry is not NAME=DIR, or a name is there twice.
    """
    found = {"ours": own}
    for entry in others:
        name, separator, place = entry.partition("=")
        if not (name and separator and place) or name in found:
            raise ValueError(f"--compare {entry!r}: need NAME=DIR, each name once and none 'ours'")
        found[name] = model(place)
    return found
