"""How programs end: mistakes, interrupts and bugs."""

import argparse
import os
import pathlib
import subprocess
import sys
import textwrap

import ml_collections
import pytest

from enat_jax.runtime import cli, exits


def ends(capsys, main, argv=()):
    """Exit code and stderr of ``main`` under ``cli.run``."""
    with pytest.raises(SystemExit) as end:
        cli.run(main, argv)
    return end.value.code, capsys.readouterr().err


def fails_with(error):
    def main(argv):
        raise error

    return main


def test_the_exit_code_is_what_main_returns(capsys):
    assert ends(capsys, lambda argv: None) == (None, "")
    assert ends(capsys, lambda argv: len(argv), ["a", "b", "c"]) == (3, "")


def test_arguments_are_those_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "one", "two"])
    with pytest.raises(SystemExit):
        cli.run(print)
    assert capsys.readouterr().out == "['one', 'two']\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("label=1000 is not below 1000"), "label=1000 is not below 1000"),
        (KeyError("there is no model small"), "there is no model small"),
        (FileNotFoundError("no model in here"), "no model in here"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory: x"),
        (PermissionError(13, "Permission denied", "y"), "Permission denied: y"),
        (NotADirectoryError(20, "Not a directory", "z"), "Not a directory: z"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_a_mistake_is_one_line(capsys, error, line):
    assert ends(capsys, fails_with(error)) == (2, f"error: {line}\n")


def test_an_unknown_key_of_a_config_is_a_mistake(capsys):
    config = ml_collections.ConfigDict({"width": 1})
    code, line = ends(capsys, lambda argv: config.widht)
    assert code == 2 and line.count("\n") == 1
    assert "unknown config key 'widht' Did you mean \"width\"" in line


@pytest.mark.parametrize("bug", [KeyError("word"), AttributeError("no x"), TypeError("2 given")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        cli.run(fails_with(bug), [])


def test_an_interrupt_is_no_error(capsys):
    assert ends(capsys, fails_with(KeyboardInterrupt())) == (130, "interrupted\n")


def test_a_program_may_stop_early(capsys):
    stop = cli.Stop("after step 7,\nsaved", exits.STOPPED)
    assert ends(capsys, fails_with(stop)) == (75, "stopped: after step 7, saved\n")
    stop = cli.Stop("100 steps in a row were not finite", exits.DIVERGED)
    assert ends(capsys, fails_with(stop)) == (3, "stopped: 100 steps in a row were not finite\n")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_the_traceback_can_be_had(monkeypatch, error):
    monkeypatch.setenv("ENAT_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run(fails_with(error), [])


@pytest.fixture
def program(tmp_path):
    """A program with absl flags, as a function of its arguments."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
        from absl import flags

        from enat_jax.runtime import cli, exits

        WIDTH = flags.DEFINE_integer("width", 8, "width")
        LABEL = flags.DEFINE_integer("label", 0, "class")


        def main(argv):
            if LABEL.value > 9:
                raise ValueError(f"label={LABEL.value} is not below 10")
            if LABEL.value < 0:
                raise cli.Stop("saved", exits.STOPPED)
            print(WIDTH.value, argv[1:])


        cli.run_absl(main)
        """)
    )

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(cli.__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--width=9", "more"], (0, "9 ['more']\n", "")),
        (["--label=10"], (2, "", "error: label=10 is not below 10\n")),
        (["--label=-1"], (75, "", "stopped: saved\n")),
        (["--lable=1"], (2, "", "error: Unknown command line flag 'lable'.")),
        (
            ["--config.width=9", "--config=small.py"],
            (2, "", "error: --config.width=9 has no config"),
        ),
    ],
)
def test_programs_with_absl_flags_end_in_the_same_way(program, arguments, expected):
    code, output, error = program(*arguments)
    assert (code, output) == expected[:2]
    assert error.startswith(expected[2]) and error.count("\n") <= 1


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "one", "1000000001", "9" * 5000])
def test_what_is_counted_is_at_least_one(text):
    assert cli.at_least_one("1") == 1 and cli.at_least_one("1000000000") == 10**9
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to"):
        cli.at_least_one(text)


def test_intervals_and_named_values():
    assert cli.interval("0.2,0.8") == (0.2, 0.8)
    with pytest.raises(argparse.ArgumentTypeError, match="'a,b' is not LOW,HIGH"):
        cli.interval("a,b")
    assert cli.name_value("a=1") == ("a", 1) and cli.name_value("a=b=c") == ("a", "b=c")
    with pytest.raises(argparse.ArgumentTypeError, match="'a' is not NAME=VALUE"):
        cli.name_value("a")
