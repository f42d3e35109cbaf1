"""Draw images with a trained model, of classes, of texts, or of both.

    python -m enat_jax.sample --model MODEL_DIR --labels all --num 10 --out runs/pictures
    python -m enat_jax.sample --model MODEL_DIR --labels 207,"tabby cat" --steps 16 --out runs/cats
    python -m enat_jax.sample --model MODEL_DIR --labels 3,7 --reveal gif,strip --out runs/reveal
    python -m enat_jax.sample --model MODEL_DIR --prompt "a cat" "two dogs" --out runs/prompts
    python -m enat_jax.sample --model MODEL_DIR --prompts prompts.jsonl --num 1 --out runs/many

A label is a class's number or name, in any case, or an id such as n01440764 of ImageNet's classes.
Names with commas are found, too; in double quotes, '"cat, wild",dog', nothing is guessed.

A model of texts draws prompts: of the command line, where "" is the empty one, of a .txt file with
one on each line or of standard input as `--prompts -`, blank lines skipped, or of a .jsonl file
whose lines have "text", "prompt" or "caption". What of a prompt has no room is printed. Guidance
leads away from the empty text, or from --negative-prompt. A model that was trained on states of
CLIP needs its text encoder, in its own directory or by --text-encoder; or prompts come as
--embeddings: an .npz file with `embeddings`, float16 [n, p, e], `lengths`, int32 [n], and, if you
like, `prompts`, n texts, and `null` [p0, e], the states of the empty text, which are compared with
the model's. A model of classes and texts takes both, as many labels as prompts or one of either for
all; prompts without labels are of no class, and labels without prompts of the empty text.

DIR receives `NNNNN_<class name>.png` or `NNNNN_<first words>.png`, `grid.png` with a row per label
or prompt, or several in a row where there are few images of many, and `settings.json`. Images are
numbered through, label by label or prompt by prompt; an image depends on seed, number, label and
prompt alone, whatever JAX is set to. A precision of products or flags of XLA that change numbers
are settings like others. What an image was made with, its whole prompt included, stands in its text
chunk "parameters", too, as JSON. With --npz all images stand in `samples.npz`,
too, as ADM's evaluation program and `evaluate --images` read them. Interrupt it whenever you like:
the same command again draws what is missing and makes the same files; a directory with images of
other settings is left alone.
"""

import argparse
import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from enat_jax.data import imagenet, prompt_files
from enat_jax.evaluation import npz_prompts
from enat_jax.inference import generator, guidance, image_directory, reveal_pictures, sampling
from enat_jax.runtime import cli


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


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    model = generator.Generator.load(
        options.model, options.dtype, text_encoder_directory=options.text_encoder
    )
    settings = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(sampling.Settings)
    }
    model = model.with_settings(**{k: v for k, v in settings.items() if v is not None})
    if options.guidance_interval and model.settings.guidance_schedule != "interval":
        raise ValueError("--guidance-interval needs --guidance-schedule interval")
    labels, texts = _shown(options, model)
    image_directory.draw(
        model,
        labels,
        options.num,
        options.out,
        texts=texts,
        seed=options.seed,
        batch_size=options.batch_size,
        npz=options.npz,
    )
    print(f"[sample] images and grid.png in {options.out}")
    if options.npz:
        print(f"[sample] {options.out / image_directory.NPZ}")
    if options.reveal:
        numbers = reveal_pictures.spread(len(labels), options.num)
        rows = numbers // options.num
        prompts = {} if texts is None else texts.of(model.reading_texts(), rows)
        reveal = reveal_pictures.draw(
            model,
            np.asarray(labels)[rows],
            options.seed,
            numbers,
            prompts=prompts.get("prompts"),
            negative_prompts=prompts.get("negative_prompts"),
            names=None if texts is None else [texts.prompts[row] for row in rows],
        )
        for kind in options.reveal:
            file_name, write = reveal_pictures.KINDS[kind]
            write(options.out / file_name, reveal)
            print(f"[sample] {options.out / file_name}")


def _shown(
    options: argparse.Namespace, model: generator.Generator
) -> tuple[list[int], image_directory.Texts | None]:
    """Returns what the rows of the grid are of: labels, and as many texts where there are any."""
    texts = _texts(options, model)
    no_class = model.model.num_classes
    if options.labels is not None and not no_class:
        raise ValueError("this model has no classes: give prompts and no --labels")
    if texts is None and not no_class:
        raise ValueError(
            "this model draws what it reads: give --prompt TEXT, see --help for others"
        )
    if texts is None:
        options.labels = "all" if options.labels is None else options.labels
        return parse_labels(options.labels, model.class_names), None
    labels = [no_class]
    if options.labels is not None:
        labels = parse_labels(options.labels, model.class_names)
    if len(texts.prompts) == 1:
        texts = texts.repeated(len(labels))
    n = len(texts.prompts)
    if len(labels) not in (1, n):
        raise ValueError(
            f"{len(labels)} labels and {n} prompts: give as many, or one of either for all"
        )
    return labels * (n // len(labels)), texts


def _texts(options: argparse.Namespace, model: generator.Generator) -> image_directory.Texts | None:
    given = (options.prompt, options.prompts, options.embeddings)
    if all(source is None for source in given):
        if options.negative_prompt is not None:
            raise ValueError('--negative-prompt needs a prompt beside it, which may be --prompt ""')
        return None
    encoder = model.reading_texts()
    states = None
    if options.prompt is not None:
        prompts = options.prompt
    elif options.prompts is not None:
        prompts = prompt_files.read(options.prompts)
    else:
        states, prompts = npz_prompts.read(options.embeddings, encoder)
    return image_directory.Texts(prompts, states, options.negative_prompt)


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in reveal_pictures.KINDS]:
        known = " nor ".join(reveal_pictures.KINDS)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither {known}")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, metavar="DIR", help="or hf://OWNER/NAME")
    add(
        "--labels",
        help="class names or numbers, such as 0,1,2 (default: all, or with prompts none)",
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="texts, in quotes each"
    )
    texts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text on each line, or .jsonl with text or prompt; - is stdin",
    )
    texts.add_argument(
        "--embeddings",
        type=cli.path,
        metavar="FILE.npz",
        help="states of a text encoder in place of texts, see above",
    )
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--text-encoder", type=cli.path, metavar="DIR", help="if the model needs one and has none")
    add("--num", type=int, default=10, help="images per label or prompt (default 10)")
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, required=True, metavar="DIR", help="for the images")
    add("--batch-size", type=int, default=generator.BATCH_SIZE, help="images at a time")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")
    add("--npz", action="store_true", help="also write samples.npz, as ADM's evaluation reads it")
    add(
        "--reveal",
        type=_kinds,
        default=[],
        metavar=",".join(reveal_pictures.KINDS),
        help="also show step by step how images come about, in "
        f"{', '.join(name for name, _ in reveal_pictures.KINDS.values())} or both: of "
        f"{reveal_pictures.MAX_IMAGES} images at most, the first of each label, then the second",
    )
    # From here on the names are those of the fields of `sampling.Settings`.
    add(
        "--steps",
        type=int,
        dest="num_steps",
        metavar="STEPS",
        help="sampling steps; this and what follows: default, the model's",
    )
    add("--guidance-scale", type=float)
    add("--guidance-schedule", metavar="NAME", help=", ".join(guidance.SCHEDULES))
    add(
        "--guidance-interval",
        type=cli.interval,
        metavar="LOW,HIGH",
        help="share of the steps that the schedule interval guides, such as 0.2,0.8",
    )
    add("--token-temperature", type=float)
    add("--mask-temperature", type=float)
    add(
        "--segments",
        type=int,
        dest="num_segments",
        metavar="SEGMENTS",
        help="compiled parts of the sampler; only speed depends on it",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
