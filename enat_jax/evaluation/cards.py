"""The card of an evaluation: its numbers with all that a reader must know, as JSON and Markdown.

A card holds every setting, fingerprint, version and device, and in ``caveats`` the sentences
without which its numbers would mislead; in the Markdown they stand beside the first number.
``compare`` says of two cards what differs, what matters most first, and which numbers differ by
more than chance.
"""

import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from enat_jax.runtime import exits, files, numerics, paths
from enat_jax.runtime.markdown import table as markdown_table

FORMAT = "enat_jax evaluation card 1"
ADVICE = "name the card.json that python -m enat_jax.evaluate wrote"
Card = dict[str, Any]  # JSON values; `SECTIONS` and `FORMAT` say what is in it
SECTIONS = (
    "kind",  # "model", "tokenizer" or "images"
    "headline",  # name of the metric to judge by first
    "metrics",  # by name: title, value, standard_error, low, high, replicates, better, about
    "caveats",  # sentences
    "features",  # the description of the feature network
    "reference",  # path, SHA-256 of the file, and the description of the statistics
    "images",  # number, number of each class, size, seed
    "model",  # path, fingerprints, data type, provenance
    "sampler",  # its settings
    "intervals",  # how they were made
    "versions",
    "hardware",
    "seconds",
    "date",
)
CLIP = "clip"  # a section of cards with scores by it: weights, scale, prefix
LPIPS = "lpips"  # a section of cards with such distances: the network, its weights
NEAR_CODES = "near_codes"  # a section of cards of exchanged tokens: the share, among how many codes
# What differs first makes numbers incomparable; the rest is what a comparison is about, or may
# explain small differences. Sections within a group, and groups, by importance.
INCOMPARABLE = (
    *("kind", "features", "reference"),
    *("images.size", "images.num", "images.per_class", "images.prompts"),
)
COMPARED = ("sampler", "model", "images", "near_codes", "clip", "lpips", "intervals")
CIRCUMSTANCES = ("versions", "hardware")
# Where a file lies, what it is called, and who computed it.
NO_DIFFERENCE = (
    *("features.origin", "reference.path", "reference.about", "reference.description.features"),
    *("reference.description.versions", "model.path", "intervals.about"),
    *("images.prompts.path", "clip.path", "clip.provenance", "lpips.files"),
)
# Long, or said already: for programs, and for `compare`.
IN_JSON_ALONE = (
    *("model.provenance.config", "model.provenance.data", "model.provenance.versions"),
    *("reference.description.features", "reference.description.versions", "reference.about"),
    *("features.origin.provenance", "reference.description.class_counts"),
    *("clip.provenance.model", "clip.provenance.part"),
)
Z = 1.96  # of a 95% interval of a normal distribution


def write(directory: pathlib.Path, card: Card) -> None:
    """Writes ``card.md`` and then ``card.json``; a directory that has the latter is finished."""
    directory.mkdir(parents=True, exist_ok=True)
    files.write_atomically(directory / "card.md", markdown(card).encode())
    # In its own order, which is that of the tables.
    files.write_json(directory / "card.json", card, sort_keys=False)


def read(path: str | os.PathLike, advice: str = ADVICE) -> Card:
    """Reads a card from its JSON file or the directory that holds it.

    Args:
        path: of the file or directory.
        advice: what to do if it is no card.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged, or of another format.
    """
    path = paths.local(path)
    if path.is_dir():
        path = path / "card.json"
    card = files.read_description(path, FORMAT, advice)
    if missing := [name for name in SECTIONS if name not in card]:
        raise ValueError(f"{path} is damaged, it has no {', '.join(missing)}: {advice}")
    try:
        markdown(card)
        compare(card, card)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # it was edited by hand
        message = exits.one_line(error, named=True)
        raise ValueError(f"{path} is damaged ({message}): {advice}") from error
    return card


def hardware() -> dict[str, Any]:
    """Returns the section ``hardware`` of this host, but for the number of hosts.

    What is set to change the numbers of a machine stands there, too, see ``numerics.choices``.
    """
    devices = jax.local_devices()
    return {
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        **numerics.recorded(),
    }


def today() -> str:
    """Returns the date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def cpu_name() -> str:
    """Returns what the processor of this host is called."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Markdown ------------------------------------------------------------------------------------


def summary(card: Card) -> str:
    """Returns the numbers in Markdown; the first stands right above what to read with it."""
    first = card["metrics"][card["headline"]]
    images = card["images"]
    what = "reconstructions" if card["kind"] == "tokenizer" else "images"
    parts = [
        f"# Evaluation of the {card['kind']} {card['model']['path']}",
        f"**{first['title']}: {_value(first)}**, of {images['num']:,} {what} of "
        f"{images['size'][0]}x{images['size'][1]} pixels, against "
        f"{card['reference']['about']}.",
        "## Read before comparing",
        _caveats(card),
        "## Numbers",
        _numbers(card["metrics"]),
        card["intervals"]["about"],
    ]
    return "\n\n".join(parts) + "\n"


def markdown(card: Card) -> str:
    """Returns the card in Markdown: its summary, and what it was made with."""
    parts = [summary(card).rstrip("\n")]
    sections = ("sampler", "images", NEAR_CODES, CLIP, LPIPS, "features", "reference", "model")
    for section in sections:
        if card.get(section):
            title = section.replace("_", " ").capitalize()
            parts += [
                f"## {section.upper() if section in (CLIP, LPIPS) else title}",
                _table(card[section], section),
            ]
    circumstances = {"date": card["date"], **card["hardware"], **card["versions"]}
    seconds = {f"seconds: {k}": round(v, 1) for k, v in card["seconds"].items()}
    parts += ["## Circumstances", _table({**circumstances, **seconds}, "circumstances")]
    return "\n\n".join(parts) + "\n"


def _caveats(card: Card) -> str:
    if card["caveats"]:
        return "\n".join(f"- {sentence}" for sentence in card["caveats"])
    return (
        "Nothing was found that stands in the way of comparing these numbers with others of the "
        "same features, reference and number of images."
    )


def _numbers(metrics: Mapping[str, Any]) -> str:
    rows = [
        (m["title"], f"{m['value']:.4g}", _interval(m), m["better"], m["about"])
        for m in metrics.values()
    ]
    return markdown_table(["", "value", "95% interval", "better", ""], rows, align="lrrll")


def _value(metric: Mapping[str, Any]) -> str:
    if metric["standard_error"] is None:
        return f"{metric['value']:.4g}"
    return f"{metric['value']:.4g} ± {Z * metric['standard_error']:.2g}"


def _interval(metric: Mapping[str, Any]) -> str:
    if metric["standard_error"] is None:
        return "not known"
    return f"{metric['low']:.4g} to {metric['high']:.4g}"


def _table(values: Mapping[str, Any], section: str) -> str:
    rows = []
    for name, value in _leaves(values):
        if value is not None and not f"{section}.{name}".startswith(IN_JSON_ALONE):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, _shortened(text)))
    return markdown_table(["", ""], rows)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}… (all of it in card.json)"


def _leaves(values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and values of a tree of dicts."""
    for key, value in values.items():
        inner = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            yield from _leaves(value, inner)
        else:
            yield inner, value


# --- two cards -----------------------------------------------------------------------------------


def compare(first: Card, second: Card, names: tuple[str, str] = ("A", "B")) -> str:
    """Returns what two cards say of each other, in Markdown.

    The difference of two numbers is called more than chance if it exceeds 1.96 times the root of
    the sum of the squares of their standard errors; both are taken for independent.
    """
    found = {section: _differing(first, second, section) for section in INCOMPARABLE}
    incomparable = [row for rows in found.values() for row in rows]
    groups = {
        "The numbers cannot be compared, because these differ": incomparable,
        "What is compared": _all_differing(first, second, COMPARED, INCOMPARABLE),
        "Circumstances": _all_differing(first, second, CIRCUMSTANCES, ()),
    }
    parts = [f"# {names[0]} and {names[1]}"]
    for title, rows in groups.items():
        if rows:
            parts += [f"## {title}", markdown_table(["", "A", "B"], rows)]
    if not any(groups.values()):
        parts.append("The settings of both are the same.")
    parts += ["## Numbers", _verdicts(first, second, comparable=not incomparable)]
    if first["caveats"] == second["caveats"]:
        return "\n\n".join([*parts, "## Read before comparing", _caveats(first)]) + "\n"
    for label, card in (("A", first), ("B", second)):
        parts += [f"## Read before comparing: {label}", _caveats(card)]
    return "\n\n".join(parts) + "\n"


def _all_differing(
    first: Card, second: Card, sections: Sequence[str], without: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    rows = [row for section in sections for row in _differing(first, second, section)]
    return [row for row in rows if not row[0].startswith(without)]


def _differing(first: Card, second: Card, section: str) -> list[tuple[str, str, str]]:
    """Returns rows of a table, one for each value below a dotted name that differs."""
    before, now = (_at(card, section) for card in (first, second))
    same_pictures = section == "reference" and _same_pictures(before, now)
    rows = []
    for name, *pair in files.differences(before, now, section):
        if not any(f"{name}.".startswith(f"{ignored}.") for ignored in NO_DIFFERENCE) and not (
            same_pictures and name == "reference.sha256"
        ):
            texts = [json.dumps(v, ensure_ascii=False) if v is not None else "-" for v in pair]
            rows.append((name, _shortened(texts[0]), _shortened(texts[1])))
    return rows


def _at(values: Any, name: str) -> Any:
    """Returns the value at a dotted name, None where there is none."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _same_pictures(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Says whether statistics are of one source; their last bits depend on the machine."""
    sources = [reference["description"]["source"] for reference in (first, second)]
    return sources[0] is not None and sources[0] == sources[1]


def _verdicts(first: Card, second: Card, comparable: bool) -> str:
    rows = []
    for name in [*first["metrics"], *(n for n in second["metrics"] if n not in first["metrics"])]:
        a, b = first["metrics"].get(name), second["metrics"].get(name)
        if a is None or b is None:
            where = "A" if b is None else "B"
            cells = [_value(m) if m else "-" for m in (a, b)]
            rows.append(((a or b)["title"], *cells, "-", f"only in {where}"))
            continue
        verdict = _verdict(a, b) if comparable else "cannot be compared"
        if a.get("weights") != b.get("weights"):
            verdict = "cannot be compared: by other weights"
        difference = f"{b['value'] - a['value']:+.3g}"
        rows.append((a["title"], _value(a), _value(b), difference, verdict))
    return markdown_table(["", "A", "B", "B - A", ""], rows, align="lrrrl")


def _verdict(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    difference = b["value"] - a["value"]
    if not difference:
        return "equal"
    if a["standard_error"] is None or b["standard_error"] is None:
        return "chance unknown: a card has no intervals"
    if abs(difference) <= Z * math.hypot(a["standard_error"], b["standard_error"]):
        return "within chance"
    if a["better"] not in ("lower", "higher"):
        return "more than chance"
    better = "B" if (difference < 0) == (a["better"] == "lower") else "A"
    return f"more than chance, {better} is better"
