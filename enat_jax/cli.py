"""How programs end: a user's mistake is one line on stderr and exit code 2, a bug is a traceback.

At the bottom of a program stands one of

    if __name__ == "__main__":
        cli.run(main)         # main(arguments), which parses them itself, for instance by argparse
        cli.run_absl(main)    # main(argv) after absl flags have been parsed, as for absl's app.run

With the environment variable ENAT_JAX_TRACEBACK=1 mistakes show their traceback, too.
"""

import argparse
import os
import sys

from absl import app, flags

MISTAKE = 2
MOST = 10**9  # of what is counted on a command line
INTERRUPTED = 130  # as a shell reports a program that SIGINT ended


def run(main, argv=None):
    """Call ``main`` and exit with what it returns, or with an error code.

    Args:
        main: takes the list of command-line arguments, without the program's name; returns an
            exit code or None.
        argv: the arguments; None: those of the process.

    Raises:
        SystemExit: always, but for what is no user's mistake: that is raised as it is.
    """
    show_all = os.environ.get("ENAT_JAX_TRACEBACK", "0") not in ("", "0")
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        if show_all:
            raise
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        message = _message(error)
        if message is None or show_all:
            raise
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)  # one line, always
        code = MISTAKE
    sys.exit(code)


def run_absl(main, argv=None):
    """As ``run`` for a ``main`` that reads absl flags; a wrong flag is a mistake like any other.

    Args:
        main: as for ``absl.app.run``: takes the program's name and the arguments that are no
            flags; returns an exit code or None.
        argv: as for ``run``.
    """
    run(lambda arguments: app.run(main, [sys.argv[0], *arguments], flags_parser=_parse_flags), argv)


def _parse_flags(argv):
    # config_flags reports a missing file only when the config is read, and then in four lines.
    for i, argument in enumerate(argv):
        if argument.startswith(("--config=", "-config=")):
            path = argument.split("=", 1)[1]
        elif argument in ("--config", "-config") and i + 1 < len(argv):
            path = argv[i + 1]
        else:
            continue
        if not os.path.isfile(path) and not os.path.isfile(path.split(":")[0]):
            raise FileNotFoundError(f"there is no config file {path}")
    return flags.FLAGS(argv)


def at_least_one(text):
    """An argparse type: a whole number from 1 to ``MOST``."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST:,}")
    return int(text)


def _message(error):
    """What to tell the user about a mistake; None if ``error`` looks like a bug."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, (OSError, ValueError, flags.Error)):
        return str(error) or type(error).__name__
    # ConfigDict wraps the KeyError of an unknown key in an AttributeError.
    if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        return f"unknown config key {' '.join(str(error.args[0].args[0]).split())}"
    if isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        return error.args[0]  # a sentence is for the user, a bare key is a bug
    return None
