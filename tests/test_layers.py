"""The layers of the package, held by reading its imports."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "enat_jax"

# Each room and the rooms that it may import, from the ground up. A file at the top of the package
# is a command: it may import every room, and nobody imports it.
GROUND = {"models", "schedules", "metrics", "runtime"}
ROOMS = {
    **{room: set() for room in sorted(GROUND)},
    "data": {"runtime"},
    "checkpoints": {"runtime"},
    "inference": {"models", "schedules", "runtime", "data", "checkpoints"},
    "evaluation": {*GROUND, "data", "checkpoints", "inference"},
    "training": {*GROUND, "data", "checkpoints", "inference", "evaluation"},
    "profiling": {*GROUND, "data", "checkpoints", "inference", "evaluation", "training"},
}

# Where each library may be imported; a library that is not named here may be imported anywhere.
HOMES = {"flax.linen": ["models"], "torch": [], "tensorflow": []}
OF_MATHS = {
    "schedules": {"numpy", "scipy", "jaxtyping", "enat_jax"},
    "metrics": {"numpy", "scipy", "sklearn", "jaxtyping", "enat_jax"},
}

# What a program that only draws images should not have to wait for.
HEAVY = ("grain", "optax", "orbax", "tensorboardX", "tensorflow_datasets", "huggingface_hub", "PIL")

MACHINE_PATH = re.compile(r"(?<![\w.$}~/-])/(home|root|tmp|work|Users)/")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """The folder of a module, None of a command: enat_jax.data.images -> data."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[1] in ROOMS else None


def imports(tree, everywhere=True):
    """Dotted names that a tree imports; ``from a import b`` gives a.b. Or at module level only."""
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, library):
    return f"{name}.".startswith(f"{library}.")


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
CODE = sorted(set(SOURCES) - {"enat_jax"})
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def internal(module):
    """Modules of the package that ``module`` imports."""
    for name in imports(SOURCES[module]):
        if within(name, "enat_jax"):
            # `from enat_jax.data import images` names a module, `... import load` its content.
            found = name if name in SOURCES else name.rpartition(".")[0]
            assert found in SOURCES, f"{module} imports {name}, which is not there"
            yield found


def loaded_by(statement):
    """Modules that a fresh process loads for ``statement`` and has not had before."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_root_imports_nothing():
    assert not list(imports(SOURCES["enat_jax"], everywhere=False))
    assert loaded_by("import enat_jax") == {"enat_jax"}


@pytest.mark.parametrize(
    "statement", ["import enat_jax.generator", "from enat_jax import Generator"]
)
def test_the_generator_is_light(statement):
    # What `import jax` loads is no business of ours: it depends on the version.
    found = loaded_by(f"import jax, jax.numpy; before = set(sys.modules); {statement}")
    ours = {name for name in found if within(name, "enat_jax")}
    assert {room(name) for name in ours - {"enat_jax"}} <= {None, "inference", *ROOMS["inference"]}
    for library in HEAVY:
        assert not [name for name in found if within(name, library)], library
    assert len(ours) <= 50, sorted(ours)
    assert len(found) <= 480, len(found)  # 383 with jax 0.10, 438 with jax 0.12; 47 are ours


def test_the_root_offers_the_generator():
    import enat_jax
    from enat_jax.inference import generator

    assert enat_jax.Generator is generator.Generator
    assert "Generator" in dir(enat_jax)
    with pytest.raises(AttributeError, match="'enat_jax' has no attribute 'generators'"):
        _ = enat_jax.generators


def test_every_folder_is_a_room():
    assert {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))} == set(ROOMS)


@pytest.mark.parametrize("module", CODE)
def test_a_room_imports_only_rooms_below_it(module):
    here = room(module)
    for other in internal(module):
        if other != "enat_jax":
            there = room(other)
            assert there, f"{module} imports the command {other}"
            allowed = here is None or there == here or there in ROOMS[here]
            assert allowed, f"{module} imports {other}"


def test_no_imports_go_in_a_circle():
    # The root imports when it is asked for something, and not while others import it.
    left = {module: set(internal(module)) - {module, "enat_jax"} for module in CODE}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle within {sorted(left)}"


@pytest.mark.parametrize("module", [module for module in CODE if room(module) != "models"])
def test_linen_is_not_reached_through_flax(module):
    names = [node for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Attribute)]
    assert not [node.lineno for node in names if node.attr == "linen"]


@pytest.mark.parametrize("module", CODE)
def test_libraries_stay_at_home(module):
    for name in imports(SOURCES[module]):
        for library, homes in HOMES.items():
            assert not within(name, library) or room(module) in homes, f"{module}: {name}"
        if room(module) in OF_MATHS:
            root = name.split(".")[0]
            known = OF_MATHS[room(module)] | sys.stdlib_module_names
            assert root in known, f"{module} is arithmetic, but has {name}"


def test_torch_is_imported_only_when_it_is_needed():
    for module in CODE:
        at_start = imports(SOURCES[module], everywhere=False)
        assert not [name for name in at_start if within(name, "torch")], module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_import_nothing_of_the_package(path):
    assert not [name for name in imports(ast.parse(path.read_text())) if within(name, "enat_jax")]


def written_by_us():
    """Source, scripts, settings and documents; not what is installed, generated or binary."""
    for folder in ("", "enat_jax", "configs", "launch", "tests", ".github", ".ci"):
        for path in (ROOT / folder).glob("**/*" if folder else "*"):
            ours = path.suffix in {".py", ".sh", ".md", ".toml", ".yml", ".yaml", ".ipynb", ""}
            if ours and path.is_file():
                yield path


def test_no_file_names_a_path_of_some_machine():
    for path in written_by_us():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not MACHINE_PATH.search(line), f"{path.relative_to(ROOT)}:{number}: {line}"


def test_a_machine_path_would_be_found():
    for root in ("home", "tmp", "Users"):
        assert MACHINE_PATH.search(f"open('/{root}/me/model')")
    assert not MACHINE_PATH.search("see ../work/ and https://example.org/home/ and $DIR/tmp/x")
