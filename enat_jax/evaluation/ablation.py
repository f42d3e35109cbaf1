"""The file of numbers of the ablations on CIFAR-10: the names in it, and how files are joined.

``ablation_runs`` makes the result of the directories of runs, ``ablation_tables`` the tables of it.
"""

import json
import pathlib
import re
from collections.abc import Collection
from typing import Any

from enat_jax.checkpoints import model_files
from enat_jax.models import nat
from enat_jax.runtime import files

FORMAT = "enat_jax ablation 1"
ADVICE = "make it again with python -m enat_jax.analyze ablation --runs DIR"
STEPS = 4, 8, 12
SEEDS = 3  # of the small size; of the larger one there is one
SIZES = {"": "small", "_large": "large", "_long": "large, trained long"}  # by end of the name
CUT = "nat_without_"  # models that are measured by their loss alone, unless they have cards
QUADRANTS = tuple(f"{CUT}{x}" for x in nat.QUADRANTS)
ONCE = "_project_once"  # of a model that samples so, with the weights of the model without
MODELS = (
    *("nat", *QUADRANTS, "disentangled_4_4", "disentangled_7_1"),
    *("enat", "enat_without_f", f"enat{ONCE}", "enat_reveals_4", f"enat_reveals_4{ONCE}"),
)
COMPARED = ("nat", "disentangled_4_4", "disentangled_7_1", "enat")  # in every size
# In the order of the tables.
KNOWN = (*MODELS, *(f"{name}{end}" for end in list(SIZES)[1:] for name in COMPARED))
MEASURES = ("frechet_distance", "precision", "recall")
Result = dict[str, Any]  # JSON values


def read(path: pathlib.Path) -> Result:
    """Reads a file that ``json_bytes`` gave the content of; raises as ``read_description``."""
    return files.read_description(path, FORMAT, ADVICE)


def join(result: Result, path: pathlib.Path) -> Result:
    """Returns a result and what a file has besides, of other machines or other nights.

    Of a model that both have, the trainings of other seeds and the settings of other steps are
    taken from the file.

    Args:
        result: of ``ablation_runs.gather``.
        path: of the file, see ``read``.

    Raises:
        ValueError: their numbers do not compare, or the file is damaged.
        OSError: the file cannot be read.
    """
    other = read(path)
    common, models = dict(result["common"]), dict(result["models"])
    with model_files.parsing(path):
        for name, value in other["common"].items():
            agree(common, name, value, str(path))
        for name, theirs in other["models"].items():
            models[name] = _joined(models[name], theirs, path) if name in models else theirs
        unfinished = dict(result["unfinished"])
        for name, seeds in other["unfinished"].items():
            over = models[name]["seeds"] if name in models else {}
            left = {seed: x for seed, x in seeds.items() if seed not in over}
            if left:
                unfinished[name] = left | unfinished.get(name, {})
    order = {name: models[name] for name in ordered(models)}
    return result | {"common": common, "models": order, "unfinished": unfinished}


def _joined(ours: Result, theirs: Result, path: pathlib.Path) -> Result:
    """Returns a model of two results."""
    for key in ours.keys() - {"seeds", "settings", "multiply_adds_as_drawn"}:
        agree({key: ours[key]}, key, theirs[key], str(path))
    for t, settings in theirs["settings"].items():
        agree(dict(ours["settings"]), t, settings, f"{path} of the settings for {t} steps")
    drawn = dict(ours["multiply_adds_as_drawn"])
    drawn |= {t: theirs["multiply_adds_as_drawn"][t] for t in theirs["settings"]}
    seeds = theirs["seeds"] | ours["seeds"]
    return ours | {
        "multiply_adds_as_drawn": drawn,
        "settings": theirs["settings"] | ours["settings"],
        "seeds": {seed: seeds[seed] for seed in sorted(seeds, key=int)},
    }


def end_of(name: str) -> str:
    """Returns the end of a model's name that says its size, a key of ``SIZES``."""
    return next((end for end in SIZES if end and name.endswith(end)), "")


def ordered(names: Collection[str]) -> list[str]:
    """Returns the names of models as the tables have them, unknown ones last."""
    return [*(x for x in KNOWN if x in names), *sorted(set(names) - set(KNOWN))]


def json_bytes(result: Result) -> bytes:
    """Returns a result as JSON with all of a seed on one line, and the settings of a model."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"(?<=[\[{])\n {5,}|\n {4,}(?=[\]}])", "", text)
    text = re.sub(r"\n {5,}", " ", text)
    return f"{text}\n".encode()


def agree(common: Result, name: str, value: Any, path: str) -> None:
    """Records what all files must share; raises ValueError if one does not."""
    if common.setdefault(name, value) != value:
        raise ValueError(
            f"{path} has {name} {value}, and another file {common[name]}: numbers compare only "
            "where these agree, so make one of them again"
        )


def rounded(values: Any) -> Any:
    """Returns JSON values with floats of six digits."""
    if isinstance(values, dict):
        return {key: rounded(x) for key, x in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(x) for x in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values
