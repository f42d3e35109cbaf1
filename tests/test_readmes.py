"""READMEs: every command in them runs or is read by its program; links and paths lead somewhere."""

import argparse
import ast
import copy
import functools
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import jax
import numpy as np
import PIL.Image
import pytest
import several
from absl import flags

from enat_jax import train
from enat_jax.evaluation import ablation_tables
from enat_jax.training import config as train_config

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("", "configs", "launch", "tests", "enat_jax/*")
READMES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/README.md".strip("/")))
READMES.append(ROOT / "configs" / "ablation.md")
TEXTS = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in READMES}
# What stands there behind is made by a program, with NAME for a model, and test_ablation.py has it.
PAGE = READMES[-1].relative_to(ROOT)
TEXTS[PAGE] = TEXTS[PAGE].partition(ablation_tables.MARKERS[0])[0]
ROOMS = sorted(path.parent for path in ROOT.glob("enat_jax/*/__init__.py"))
PROGRAMS = sorted(
    path.stem for path in ROOT.glob("enat_jax/*.py") if "__main__" in path.read_text()
)

# What is appended to a command, the first whose words it has, so that it runs in seconds.
TRAIN = (
    "--config.train.num_steps=2 --config.train.batch_size=8 --config.train.matrix_rate=false "
    "--config.optimizer.warmup_steps=1 "
)
VQGAN = (
    TRAIN + "--config.model.channels=8 --config.model.num_groups=2 --config.loss.restart_until=1 "
)
SMALLEST = "--config.model.width=16 --config.model.num_heads=2 "
MODEL = SMALLEST + "--config.model.encoder_layers=1 --config.model.decoder_layers=1 "
LOSS = "--config.loss.max_shapes=2 --config.sampler.num_steps=3 --config.sampler.num_segments=1 "
ENAT = TRAIN + MODEL + LOSS
SMALL = {
    "enat_jax.train configs/digits_vqgan.py": VQGAN,
    "enat_jax.train configs/images_vqgan.py": VQGAN
    + "--config.data.size=16 --config.model.channel_multipliers=(1,1) "
    "--config.model.codebook_size=8",
    "enat_jax.train configs/digits.py": ENAT,
    "enat_jax.train configs/images.py": ENAT + "--config.model.dtype=float32",
    "enat_jax.tokenize_images --copies": "--copies 1",
    "enat_jax.tokenize_images": "",
    "enat_jax.sample": "--num 2",
    "enat_jax.edit": "--num 2",
    "enat_jax.evaluate_digits": "--num 20",
    "enat_jax.evaluate --compare": "",
    "enat_jax.evaluate": "--num 20",
    "enat_jax.export": "",
    "enat_jax.analyze similarity": "--num 2 --maps 1 --batch-size 2",
    "enat_jax.analyze quadrants": "--num 2",
    "enat_jax.analyze reuse": "--num 2 --steps 3",
    "enat_jax.analyze loss": "--num 2",
    "enat_jax.analyze costs": "",
    "enat_jax.benchmark loader": "--records 1000 --batch 100 --repeats 1",
    "enat_jax.benchmark sampler": MODEL + "--repeats 1 --config.sampler.num_steps=3",
    "enat_jax.benchmark train": MODEL + "--repeats 1 --time 1 --shapes 2",
}
# What the quickstart, with --compare, has made before anybody gives some of these commands.
BEFORE = (
    "python -m enat_jax.train --config configs/digits_nat.py --workdir runs/digits/nat "
    + f"{TRAIN}{SMALLEST}{LOSS} --config.model.num_layers=1"
)
# Commands of ours that only their parsers read here, by words that they have, and why.
READ = {
    "enat_jax. gs://": "needs a bucket; test_buckets.py has a stand-in for the store",
    "enat_jax.train --help": "a test of its own",
    "enat_jax.train config.evaluation": "tests/evaluation/test_during_training.py trains so",
    "enat_jax.train perceptual.weights": "needs LPIPS; test_adversarial.py has random weights",
    "enat_jax.tokenize_images coco/": "needs MS-COCO; test_coco.py has an imitation",
    "enat_jax.train configs/enat_b_coco256.py": "likewise",
    "enat_jax.sample runs/coco": "likewise",
    "enat_jax.sample runs/scenes": "needs a model of texts; test_sample_prompts.py has small ones",
    "enat_jax.export --text-encoder": "likewise",
    "enat_jax.sample models/enat_l": "needs the released weights; test_import_torch.py has others",
    "enat_jax.import_torch": "needs the released weights; test_import_torch.py has others",
    "enat_jax.evaluate inception": "needs Inception's weights; test_features.py has random ones",
    "enat_jax.evaluate --fill-centres": "needs CIFAR-10; test_evaluate.py has small pictures",
    "enat_jax.export --settings": "needs what a search wrote; test_export.py has it",
    "enat_jax.export --push": "needs a login; tests/checkpoints/test_hub.py has a local server",
    "enat_jax.demo": "serves until it is interrupted; test_demo.py has a browser",
    "enat_jax.search": "needs Optuna; tests/evaluation/test_settings_search.py has small ones",
    "enat_jax.sample --settings": "needs what a search wrote; likewise",
    "enat_jax.evaluate_scenes": "needs a model of texts; test_evaluate_scenes.py has small ones",
    "enat_jax.tokenize_captions": "needs MS-COCO; test_tokenize_captions.py has an imitation",
    "enat_jax.prepare": "needs ImageNet; test_prepare.py has an imitation",
    "enat_jax.analyze ablation": "needs hours of runs; test_ablation.py has made ones",
    "enat_jax.benchmark bfloat16": "wants a GPU; smaller ones of profiling/README.md are run",
    "enat_jax.benchmark scaling": "compiles for a minute; test_benchmark.py has a small model",
    "enat_jax.benchmark profile": "is a process for each row; tests/profiling has small ones",
    "launch/quickstart.sh": "trains for minutes; its commands are read by a test of their own",
    "launch/quickstart_text.sh": "likewise",
    "launch/ablation.sh": "likewise",
    "launch/local_hosts.sh": "test_launch.py runs it with a smaller program",
    "launch/slurm.sbatch": "needs SLURM; test_launch.py has a stand-in",
    "launch/tpu_pod.sh": "needs Google Cloud; test_launch.py has a stand-in",
    "launch/test.sh": "runs these tests",
}
# Commands of others.
FOREIGN = {
    r"pip install -e '?\.(\[\w+\])?'?": "installs this package; setup.py must have the extra",
    r"pip install tensorflow-cpu [\w\- ]+": "in another environment",
    r'python -c "import tensorflow_datasets as tfds; .*"': "in that environment",
}


def blocks(language):
    """(file, text) of all fenced blocks of a language."""
    for path, text in TEXTS.items():
        for found, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if found == language:
                yield path, body


def commands():
    """(file, words) of all command lines, and of programs of ours that the prose names in full."""
    for path, body in blocks("bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.replace(".venv/bin/", ""), comments=True):
                yield path, words
    for path, text in TEXTS.items():
        for line in re.findall(r"`(python\s+-m\s+enat_jax\.\w+\s+-[^`]+)`", text):
            yield path, shlex.split(line)


COMMANDS = list(commands())


def has(words, wanted):
    return all(any(part in word for word in words) for part in wanted.split())


def kind(words):
    """The one way in which a command is tested: "run", "read" or "foreign"."""
    read = [key for key in READ if has(words, key)]
    foreign = [key for key in FOREIGN if re.fullmatch(key, plain(words))]
    run = not read and words[0] == "python" and any(has(words, key) for key in SMALL)
    found = ["read"] * len(read) + ["foreign"] * len(foreign) + ["run"] * run
    assert len(found) == 1, f"{plain(words)}: tested in {found or 'no way'}"
    return found[0]


def plain(words):
    quoted = {"-e": "'{}'", "-c": '"{}"'}
    return " ".join(
        quoted.get(before, "{}").format(word)
        for before, word in zip([None, *words], words, strict=False)
    )


# --- the parsers of all programs ------------------------------------------------------------


class _Found(Exception):
    """Carries the parser that a program was about to use."""


@functools.cache
def parser_of(program):
    """The real parser of a program that has one of argparse."""

    def found(parser, *arguments, **others):
        raise _Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", found)
        with pytest.raises(_Found) as caught:
            importlib.import_module(f"enat_jax.{program}").main([])
    return caught.value.args[0]


def read(words):
    """Has the program of a command read its arguments, as when it starts."""
    if words[0] in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), words[1]
        arguments = words[words.index("--config") :] if "--config" in words else []
        return read_by_train(arguments) if arguments else None
    assert words[:2] == ["python", "-m"], plain(words)
    program, arguments = words[2].removeprefix("enat_jax."), words[3:]
    if program == "train":
        return read_by_train(arguments)
    if program == "benchmark":
        options, overrides = parser_of(program).parse_known_args(arguments)
        for path in np.atleast_1d(getattr(options, "config", [])):
            train_config.load(ROOT / path, overrides)
        return options
    return parser_of(program).parse_args(arguments)


def train_flags():
    values = flags.FlagValues()
    train_config.define(values)
    for name in ("workdir", "from_step", "distributed"):
        values[name] = copy.deepcopy(flags.FLAGS[name])
    return values


def read_by_train(arguments):
    values = train_flags()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert values(["", *(word for word in arguments if word != "--help")]) == [""]
    assert values["config"].value is not None
    return values


def all_flags():
    """All flags of all our programs and scripts."""
    found = set()
    for program in set(PROGRAMS) - {"train"}:
        parsers = [parser_of(program)]
        for parser in parsers:
            for action in parser._actions:
                found.update(action.option_strings)
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
    values = train_flags()
    for config in (ROOT / "configs").glob("*.py"):
        values(["", f"--config={config}"])
    found.update(f"--{name}" for name in values)
    for script in ROOT.glob("launch/*.s*"):
        found.update(re.findall(r"(?<![\w-])(--[a-z]+)(?=\)| ?\]\]| ?\|)", script.read_text()))
    return found


# --- what must hold -------------------------------------------------------------------------


def test_the_main_readme_is_short():
    assert len(TEXTS[pathlib.Path("README.md")].splitlines()) < 180


def test_every_folder_that_a_person_opens_has_one():
    folders = {path.parent for path in READMES}
    assert folders >= {ROOT, ROOT / "configs", ROOT / "launch", ROOT / "tests", *ROOMS}


def test_every_block_is_of_a_kind_that_is_tested():
    for path, text in TEXTS.items():
        kinds = re.findall(r"^```(\w*)$", text, re.MULTILINE)
        assert set(kinds[::2]) <= {"bash", "python", "bibtex"} and set(kinds[1::2]) <= {""}, path


def test_every_command_is_tested_in_one_way():
    kinds = [kind(words) for _, words in COMMANDS]
    assert kinds.count("run") >= 15 and kinds.count("read") >= 15
    for key in (*READ, *SMALL):
        assert any(has(words, key) for _, words in COMMANDS), f"no README has {key}"
    for key in FOREIGN:
        assert any(re.fullmatch(key, plain(words)) for _, words in COMMANDS), key


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS if kind(words) != "foreign"], ids=plain
)
def test_its_program_reads_it(words):
    read(words)


def test_extras_that_are_installed_exist():
    setup = (ROOT / "setup.py").read_text()
    named = {
        x for text in TEXTS.values() for x in re.findall(r"pip install -e '\.\[(\w+)\]'", text)
    }
    assert {"cuda", "tpu", "analyze", "hub", "wandb", "notebook"} <= named
    assert not [name for name in named if f'"{name}": ' not in setup]


def flags_in(text):
    """Flags as people write them; absl's may be negated, XLA's and pip's are not ours."""
    return set(re.findall(r"(?<![\w\-<])--[a-z][\w\-.]*\w", text))


def test_every_flag_that_is_named_for_people_exists():
    known = all_flags()
    foreign = ("--xla", "--query-gpu", "--id", "--noconfig")
    for path, text in TEXTS.items():
        for flag in flags_in(text):
            ours = flag in known or re.fullmatch(r"--config\.(sharding|data)\.NAME", flag)
            assert ours, f"{path} names {flag}"
    for path in ROOT.glob("enat_jax/**/*.py"):
        constants = (x.value for x in ast.walk(ast.parse(path.read_text())) if _is_text(x))
        for flag in flags_in("\n".join(constants)):
            whole = flag.startswith(("--config.", *foreign)) or flag in known
            assert whole, f"{path.relative_to(ROOT)} names {flag}"


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_link_leads_somewhere():
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            name, _, anchor = target.partition("#")
            found = (ROOT / path).parent / name if name else ROOT / path
            assert found.is_file(), f"{path}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{path}: {target}"


def test_every_path_and_module_exists():
    for path, text in TEXTS.items():
        for name in re.findall(r"(?<![\w./])(?:enat_jax|configs|launch|tests)/[\w./*\-]*", text):
            name = name.rstrip(".")
            assert list(ROOT.glob(name.rstrip("/"))), f"{path} names {name}"
        for name in re.findall(r"\benat_jax(?:\.[a-z_]+)+", text):
            *parents, last = name.split(".")
            there = (
                ROOT.joinpath(*parents, f"{last}.py").is_file()
                or ROOT.joinpath(*parents, last).is_dir()
            )
            assert there or hasattr(importlib.import_module(".".join(parents)), last), name


def test_places_to_change_are_where_the_readme_says():
    found = []
    for text in TEXTS.values():
        found += re.findall(r"`(enat_jax/[\w/]+\.py)`: `(\w+)`", text)
    assert len(found) >= 10
    for path, name in found:
        nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
        names = {x.name for x in nodes if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
        names |= {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        assert name in names, f"{path} has no {name}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_a_room_s_table_has_its_modules(room):
    text = (room / "README.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+\.py`", line)]
    named = {name for line in rows for name in re.findall(r"`(\w+\.py)`", line.split("|")[1])}
    assert named == {path.name for path in room.glob("*.py")} - {"__init__.py"}


def test_the_table_of_configs_is_whole():
    named = re.findall(r"`(\w+\.py)`", TEXTS[pathlib.Path("configs/README.md")])
    assert set(named) == {path.name for path in (ROOT / "configs").glob("*.py")}


ABLATION = [
    *["--images", __file__, "--steps", "8", "--seeds", "0 1"],
    *["--models", "enat  nat enat_project_once"],
]


@pytest.mark.parametrize(
    "script, extras, arguments, calls",
    [
        ("quickstart.sh", "quickstart", ["--compare"], 8),
        ("quickstart_text.sh", "quickstart", ["--compare"], 11),
        ("ablation.sh", "quickstart,search,analyze", ABLATION, 50),
    ],
    ids=["quickstart", "quickstart_text", "ablation"],
)
def test_a_script_starts_programs_that_read_its_arguments(
    script, extras, arguments, calls, tmp_path
):
    """Its Python only writes down how it was called, and makes what the script shows at the end."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\n[[ "$1" == -m ]] || exit 0\n'
        f'printf "%s\\t" "$@" >>"{tmp_path}/calls"\necho >>"{tmp_path}/calls"\n'
        'case "$*" in *evaluate_digits*|*evaluate_scenes*) mkdir -p "$RUN/comparison" && echo done '
        '>"$RUN/comparison/evaluation.md" ;; esac\n'
    )
    python.chmod(0o755)
    stamp = f"{ROOT}\n{(ROOT / 'setup.py').read_text()}"
    (tmp_path / "venv" / f"enat_jax-{extras}.stamp").write_text(stamp)
    run = tmp_path / "run"
    subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments, run],
        check=True,
        env=several.environment(ENAT_JAX_VENV=str(tmp_path / "venv"), RUN=str(run)),
        stdout=subprocess.DEVNULL,
    )
    found = [
        line.rstrip("\t").split("\t") for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert len(found) == calls
    for call in found:
        read(["python", *call])


# --- commands that run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which the READMEs' relative paths are what they say."""
    root = tmp_path_factory.mktemp("place")
    for name in ("configs", "launch"):
        (root / name).symlink_to(ROOT / name)
    (root / "runs" / "digits").mkdir(parents=True)
    (root / "runs" / "quickstart").symlink_to("digits")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for i in range(24):
            with archive.open(f"{('tabby cat', 'dog')[i % 2]}/{i}.png", "w") as file:
                pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(file, "PNG")
    return root


def start(words):
    """Runs a command of ours in this process, made small."""
    program = words[2].removeprefix("enat_jax.")
    added = next((more for key, more in SMALL.items() if has(words, key)), "")
    arguments = words[3:] + added.split()
    if program == "train":
        values = read_by_train(arguments)
        train.train(values["config"].value, values["workdir"].value)
    else:
        importlib.import_module(f"enat_jax.{program}").main(arguments)


def in_order():
    """Commands in an order in which each finds what it needs: training first."""
    first = ("configs/README.md", "README.md")
    run = [(str(path), words) for path, words in COMMANDS if kind(words) == "run"]
    run.sort(key=lambda item: first.index(item[0]) if item[0] in first else len(first))
    at = sum(path == first[0] for path, _ in run)
    return [words for _, words in [*run[:at], ("", BEFORE.split()), *run[at:]]]


@pytest.mark.slow
def test_every_command_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    cache = jax.config.jax_enable_compilation_cache  # which benchmark switches off
    try:
        for words in in_order():
            start(words)
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    for name in ("digits/evaluation/evaluation.md", "pictures/grid.png", "reveal/reveal.gif"):
        assert (place / "runs" / name).is_file()
    for _, body in blocks("python"):
        found = {}
        exec(compile(body, "README.md", "exec"), found)
        assert found["images"].shape == (3, 32, 32, 1) and found["images"].dtype == np.uint8


def test_help_lists_every_setting():
    words = next(words for _, words in COMMANDS if words[-1] == "--help")
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=several.environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    for name in read_by_train(words[3:]):
        assert f"--{name}" in done.stdout or f"--[no]{name}" in done.stdout, name
