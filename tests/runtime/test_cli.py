"""How programs end: mistakes, interrupts and bugs."""

import argparse
import asyncio
import errno
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import ml_collections
import pytest
import several
from absl import app, flags

from enat_jax.runtime import cli, exits, os_errors
from enat_jax.training import config as train_config


def ends(capsys, main, argv=()):
    """Exit code and stderr of ``main`` under ``cli.run``."""
    with pytest.raises(SystemExit) as end:
        cli.run(main, argv)
    return end.value.code, capsys.readouterr().err


def python(*arguments, **variables):
    """Exit code, stdout and stderr of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=several.environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


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


PERMISSION, DESCRIPTORS = (os_errors.ADVICE[x] for x in (errno.EACCES, errno.EMFILE))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("label=1000 is not below 1000"), "label=1000 is not below 1000"),
        (KeyError("there is no model small"), "there is no model small"),
        (FileNotFoundError("no model in here"), "no model in here"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory: x"),
        (PermissionError(13, "Permission denied", "y"), f"Permission denied: y: {PERMISSION}"),
        (OSError(24, "Too many open files"), f"Too many open files: {DESCRIPTORS}"),
        (OSError(18, "Invalid link", "a", None, "b"), "Invalid link: a and b"),
        (MemoryError(), "not enough memory: free memory, then start again"),
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


def test_a_package_that_is_not_installed_is_a_mistake(capsys):
    error = ModuleNotFoundError("No module named 'PIL.Image'", name="no_such_package.Image")
    line = "error: the package no_such_package is not installed: pip install no_such_package\n"
    assert ends(capsys, fails_with(error)) == (2, line)


@pytest.mark.parametrize("name", ["enat_jax.modles", "ml_collections.no_such_module", None])
def test_a_module_that_is_missing_elsewhere_is_a_bug(name):
    with pytest.raises(ModuleNotFoundError):
        cli.run(fails_with(ModuleNotFoundError("No module", name=name)), [])


@pytest.mark.parametrize("platform", ["cdua", "tpu", "cuda"])
def test_a_platform_that_is_not_there_is_a_mistake(platform):
    if jax.default_backend() == {"cuda": "gpu"}.get(platform, platform):
        pytest.skip(f"{platform} is there")
    script = (
        "import jax; from enat_jax.runtime import cli; cli.run(lambda argv: jax.devices() and 0)"
    )
    code, output, error = python("-c", script, JAX_PLATFORMS=platform)
    assert (code, output) == (2, "")
    assert error.startswith(f"error: JAX_PLATFORMS={platform} does not work here: ")
    assert error.endswith("; unset it, and JAX takes what there is\n") and error.count("\n") == 1
    code, output, error = python("-c", script, JAX_PLATFORMS="")
    assert code == 0, error


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"HIDDEN": "PIL"}, "the package PIL is not installed: pip install pillow"),
        ({"HIDDEN": "jax"}, "the package jax is not installed: pip install jax"),
        (
            {"JAX_DEFAULT_PRNG_IMPL": "fast"},
            'an environment variable of JAX is wrong: Invalid value "fast" for JAX flag '
            "jax_default_prng_impl",
        ),
    ],
)
def test_what_fails_while_a_program_is_imported_is_one_line(tmp_path, variables, line):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os, sys

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == os.environ.get("HIDDEN"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Hide())
        """)
    )
    variables |= {"PYTHONPATH": f"{several.ROOT}{os.pathsep}{tmp_path}"}
    assert python("-m", "enat_jax.sample", **variables) == (2, "", f"error: {line}\n")


def test_a_bug_in_the_imports_of_a_program_keeps_its_traceback(capsys):
    exits.uncaught(ModuleNotFoundError("No module named 'enat_jax.x'", name="enat_jax.x"))
    exits.uncaught(ValueError("of ours"))
    error = capsys.readouterr().err
    assert "ModuleNotFoundError: No module named 'enat_jax.x'" in error
    assert "ValueError: of ours" in error


@pytest.mark.parametrize(("shown", "lines"), [("", 1), ("1", 2)])
def test_a_closed_event_loop_is_no_news(monkeypatch, capsys, shown, lines):
    monkeypatch.setenv("ENAT_JAX_TRACEBACK", shown)
    monkeypatch.setattr(sys, "unraisablehook", exits.unraisable)
    loop = asyncio.new_event_loop()
    loop.close()

    class Thread:
        def __init__(self, action):
            self.action = action

        def __del__(self):
            self.action()

    Thread(lambda: loop.call_soon_threadsafe(print))  # raises where nobody can catch it
    Thread(lambda: "text" + 1)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith(("Runtime", "Type"))]
    assert len(said) == lines and said[-1].startswith("TypeError: can only concatenate str")


def test_an_interrupt_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        exits.uncaught(KeyboardInterrupt())
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
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
        (["--label=-1", "--helpfull"], (0, None, "")),
        (["--lable=1"], (2, "", "error: Unknown command line flag 'lable'.")),
        (
            ["--config.width=9", "--config=small.py"],
            (2, "", "error: --config.width=9 has no config"),
        ),
    ],
)
def test_programs_with_absl_flags_end_in_the_same_way(program, arguments, expected):
    code, output, error = program(*arguments)
    assert code == expected[0] and expected[1] in (output, None)
    assert error.startswith(expected[2]) and error.count("\n") <= 1


def parse(monkeypatch, *arguments):
    """Parses arguments of a program with a config, as that of training."""
    values = flags.FlagValues()
    train_config.define(values)
    flags.DEFINE_integer("from_step", None, "step", flag_values=values)
    flags.DEFINE_flag(app.HelpFlag(), values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(app, "FLAGS", values)
    return cli._parse_flags(["program", *arguments])


CONFIG = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'}"


@pytest.mark.parametrize(
    "arguments", [["--help"], [CONFIG, "--help"], ["--help", CONFIG], ["-help", "--from_step=3"]]
)
def test_help_is_no_failure_and_knows_the_config(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        parse(monkeypatch, *arguments)
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "--config: File of the config" in output
    assert ("--config.train.num_steps" in output) == (CONFIG in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--num_steps=3"], "did you mean --config.train.num_steps or --config.sampler."),
        (["--learning-rate=1", CONFIG], "did you mean --config.optimizer.learning_rate[?]$"),
        ([CONFIG, "--config.width", "3"], "flag --config.width: did you mean --config.model.width"),
        ([CONFIG, "--config.train.num_stepz=3"], "Did you mean: config.train.num_steps [?]$"),
        ([CONFIG, "--form_step=3"], "'form_step'. Did you mean: from_step [?]$"),
        (["--width=3"], "'width'. Settings of a config are flags after --config FILE$"),
        (["--num_steps=3"], "Did you mean: from_step[?] Settings of a config are flags after"),
    ],
)
def test_flags_that_are_unknown_may_be_settings_of_the_config(monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(monkeypatch, *arguments)


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


def test_a_wrong_argument_is_one_line_too(capsys):
    parser = cli.Parser(prog="python -m enat_jax.some")
    parser.add_argument("--num", type=cli.at_least_one)
    programs = parser.add_subparsers()
    programs.add_parser("one").add_argument("--out", required=True)
    for arguments, said in (
        (["--num", "0"], "argument --num: '0' is not a whole number from 1 to 1,000,000,000; see"),
        (["one"], "the following arguments are required: --out; see python -m enat_jax.some one "),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}") and line.endswith(" --help")
