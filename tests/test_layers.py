"""The layers of the package, held by reading its imports."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "enat_jax"

# Bottom to top. A file imports lower layers, and its own where that makes no circle.
LAYERS = {
    "maths": [
        *["reveal", "shape_buckets", "losses", "fid", "quality", "costs", "paper_costs"],
        *["moments", "manifold", "inception_score", "bootstrap"],
        *["hlo_text", "hlo_values", "collectives", "checksums"],
    ],
    "networks": ["models"],
    "services": [
        *["data", "sharding", "optim", "checkpoint", "metric_writer", "model_files"],
        *["monitoring", "distributed", "exits", "agreement", "manifest", "preservation"],
        *["weight_files", "torch_files", "pickle_reader", "hub", "npz_files", "evaluation_files"],
    ],
    "algorithm": [
        *["train_state", "train_step", "tokenizer", "tokenization", "token_inspection", "tasks"],
        *["sampling", "timing", "profiling", "loader_timing", "scaling"],
        *["conversion", "features", "image_statistics", "similarity", "evaluation", "measures"],
        *["inception_weights", "reference_sizes"],
    ],
    "product": [
        "generator",
        "model_card",
        "reveal_pictures",
        "compiled_sampler",
        "image_sets",
        "cards",
    ],
    "programs": [
        *["cli", "train", "train_config", "sample", "tokenize_images", "evaluate"],
        *["evaluate_arguments", "evaluation_passes", "evaluate_digits", "export", "import_torch"],
        *["analyze", "plots"],
        *["benchmark", "benchmark_arguments", "scaling_report", "prepare"],
        *["timing_report", "profile_rows", "profile_report"],
    ],
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
ORDER = list(LAYERS)

# Where each library may be imported; a library that is not named here may be imported anywhere.
HOMES = {"flax.linen": ["models"], "torch": [], "tensorflow": []}
OF_MATHS = {"jax", "numpy", "scipy", "enat_jax"}

MACHINE_PATH = re.compile(r"(?<![\w.$}~/-])/(home|root|tmp|work|Users)/")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def home(module):
    """The entry of the table that a module belongs to: enat_jax.data.images -> data."""
    return module.split(".")[1]


def layer(module):
    assert home(module) in LAYER, f"say in LAYERS where {module} belongs"
    return LAYER[home(module)]


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


def test_the_root_imports_nothing():
    assert not list(imports(SOURCES["enat_jax"]))


@pytest.mark.parametrize("module", CODE)
def test_a_module_imports_no_higher_layer(module):
    for other in internal(module):
        if other != "enat_jax":
            here, there = layer(module), layer(other)
            assert ORDER.index(there) <= ORDER.index(here), f"{module} imports {other}"
            assert (here, there) != ("services", "networks"), f"{module} knows {other}"


def test_no_imports_go_in_a_circle():
    left = {module: set(internal(module)) - {module} for module in SOURCES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle within {sorted(left)}"


@pytest.mark.parametrize("module", [module for module in CODE if home(module) != "models"])
def test_linen_is_not_reached_through_flax(module):
    names = [node for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Attribute)]
    assert not [node.lineno for node in names if node.attr == "linen"]


@pytest.mark.parametrize("module", CODE)
def test_libraries_stay_at_home(module):
    for name in imports(SOURCES[module]):
        for library, homes in HOMES.items():
            assert not within(name, library) or home(module) in homes, f"{module}: {name}"
        if layer(module) == "maths":
            root = name.split(".")[0]
            assert root in OF_MATHS | sys.stdlib_module_names, f"{module} is maths, but has {name}"


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
