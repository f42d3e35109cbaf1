"""Labels as people write them: numbers, names of classes, or ids of ImageNet's."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

from enat_jax.data import imagenet


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Reads labels from a comma-separated list of class names or numbers, or from "all".

    Args:
        text: the list. A name goes before a number, and the longest name before shorter ones, since
            names may have commas in them. Of a name such as "tabby, tabby cat" each part will do,
            in any case and form of Unicode, with blanks or underscores, and of ImageNet's classes
            their ids. In double quotes, as in CSV, it is a name and nothing else. "no class" means
            no class, as ``len(class_names)`` does.
        class_names: of the model.

    Returns:
        Labels, 0 <= label <= len(class_names).

    Raises:
        ValueError: a label is unknown, out of range, or one of several.
    """
    if text == "all":
        return list(range(len(class_names)))
    names = _Names(class_names)
    if (label := names.find(text, exactly=True)) is not None:
        return [label]
    parts, labels = _parts(text), []
    most = 1 + max(name.count(",") for name in class_names)
    while parts:
        for n in range(min(most, len(parts)), 1, -1):
            raw = ",".join(part for part, quoted in parts[:n] if not quoted).strip()
            together = not any(quoted for _, quoted in parts[:n])
            if together and (label := names.find(raw)) is not None:
                break
        else:
            n, label = 1, names.label(*parts[0])
        labels.append(label)
        parts = parts[n:]
    return labels


_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*(,|$)')


def _parts(text: str) -> list[tuple[str, bool]]:
    """Returns what stands between commas, and whether it stands in quotes."""
    parts = []
    comma = ","
    while comma:
        if found := _QUOTED.match(text):
            parts.append((found[1].replace('""', '"'), True))
            comma, text = found[2], text[found.end() :]
        else:
            part, comma, text = text.partition(",")
            parts.append((part, False))
    return parts


class _Names:
    """Finds the class that a text names."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = class_names
        # From the strictest to the most lenient way to compare.
        ways: list[dict[str, set[int]]] = [{}, {}, {}, {}]
        for label, name in enumerate(class_names):
            synonyms = {_normal(part) for part in name.split(",")}
            synonyms |= {re.sub(r" \([^()]*\)$", "", synonym) for synonym in synonyms}
            for way, keys in zip(
                ways, ([name], [_composed(name)], [_normal(name)], synonyms), strict=True
            ):
                for key in keys:
                    way.setdefault(key, set()).add(label)
        *self._whole, self._synonyms = ways

    def find(self, text: str, exactly: bool = False) -> int | None:
        """Returns the label of the class whose whole name a text is, or None."""
        keys = [text] if exactly else [text, _composed(text), _normal(text)]
        for key, way in zip(keys, self._whole, strict=False):
            if key in way:
                return self._only(text, way[key])
        return None

    def label(self, text: str, quoted: bool) -> int:
        """Returns the label that a part of the list means; raises as ``parse_labels``."""
        if not quoted:
            text = text.strip()
        wordnet = imagenet.readable_names([text.lower()])[0]
        for name in (text, wordnet):
            if (label := self.find(name)) is not None:
                return label
        count = len(self._names)
        if meant := self._synonyms.get(_normal(text)):
            return self._only(text, meant)
        if _normal(text) == "no class":
            return count
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and not quoted else None
        if number is None:
            near = difflib.get_close_matches(_normal(text), self._whole[-1] | self._synonyms, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"label {text!r} is neither a class name nor a number{hint or ':'} this model has "
                f"the classes 0 ({self._names[0]}) to {count - 1} ({self._names[-1]})"
            )
        if not 0 <= number <= count:
            raise ValueError(
                f"label {number} is out of range: this model has the classes 0 to "
                f"{count - 1}, and {count} for no class"
            )
        return number

    def _only(self, text: str, labels: set[int]) -> int:
        if len(labels) > 1:
            meant = " or ".join(f"{label} ({self._names[label]})" for label in sorted(labels))
            raise ValueError(f"label {text!r} may be {meant}: give its number")
        return next(iter(labels))


def _composed(name: str) -> str:
    """Returns a name in the form of Unicode that keyboards type; a Mac writes the other one."""
    return unicodedata.normalize("NFC", name)


def _normal(name: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return ", ".join(" ".join(part.split()) for part in folded.replace("_", " ").split(","))
