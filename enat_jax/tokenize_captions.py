"""From captions of pictures to the tokens of texts, beside a token set.

    python -m enat_jax.tokenize_captions --tokens DIR --captions captions_train2014.json --out DIR
    python -m enat_jax.tokenize_captions --tokens DIR --captions PICTURES_DIR --out DIR
    python -m enat_jax.tokenize_captions --tokens DIR --captions scenes --out DIR
    python -m enat_jax.tokenize_captions --tokens DIR --template "a photo of a {}" --out DIR
    python -m enat_jax.tokenize_captions --tokens DIR --captions X --embed ENCODER_DIR --out DIR
    python -m enat_jax.tokenize_captions --tokens DIR --captions X --embeddings FILE.npz --out DIR

Captions are a .json file of MS-COCO, a .jsonl file with "file_name" and "text", a .tsv file of
captions and file names, .txt files beside the pictures in a folder or zip, .tar files of
webdataset, a TFDS data set (tfds:NAME) or those of the source scenes. They are written whole or not
at all: start an interrupted command again. With --embed or --embeddings the states of a text
encoder are stored beside them, which training then reads in place of tokens; an interrupted command
goes on with what is missing.
"""

import argparse
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float16, Int

from enat_jax.data import (
    caption_sources,
    captions,
    clip_tokens,
    coco,
    text_states,
    text_tokens,
    tokens,
)
from enat_jax.data.caption_sources import shortened
from enat_jax.evaluation import npz_states
from enat_jax.inference import clip_model
from enat_jax.runtime import cli, progress

Encoder = clip_model.ClipText | npz_states.NpzStates

CHUNK = 2000  # texts that are turned into tokens at a time
SHOWN = 3  # of what there may be many of, in the report
STEP = 8  # windows of texts that are encoded are multiples of it, to compile few


def main(arguments: list[str]) -> None:
    flags = _parser().parse_args(arguments)
    metadata, keys = tokens.read_metadata(flags.tokens), tokens.image_keys(flags.tokens)
    if flags.held_out_tokens:
        held_out = tokens.image_keys(flags.held_out_tokens)
        coco.refuse_shared(keys, held_out, (flags.tokens, flags.held_out_tokens))
    encoder = _encoder(flags)
    kind = _kind(flags, encoder)
    if flags.text_tokens and flags.text_tokens < (least := text_tokens.added(kind)):
        raise ValueError(f"--text-tokens {flags.text_tokens} is too small: at least {least}")
    states = None if encoder is None else _identity(encoder, flags)
    found = _captions(flags, metadata, keys)
    used = np.setdiff1d(np.arange(len(keys)), [s["image"] for s in metadata["skipped"]])
    _complete(found, keys, used, flags.on_missing)
    if flags.shuffle:
        others = np.random.default_rng(0).permutation(len(found.texts))
        found.texts = [found.texts[i] for i in others]
    made_of = captions.identity(found.texts, kind, metadata["digest"], flags.mirror_words, states)
    if captions.begin(flags.out, made_of):
        ids = _encode(found.texts, kind)
        checksums = None
        if encoder is not None and states is not None:
            mirrored = bool(metadata["flips"]) and flags.mirror_words == "swap"
            every = [text for of_picture in found.texts for text in of_picture]
            checksums = _store(flags.out, made_of, encoder, every, ids, mirrored)
        captions.write(flags.out, made_of, found.texts, keys, ids, checksums)
    else:
        print(f"{flags.out} already holds these captions")
    print(_report(captions.Captions.open(flags.out), found, used, flags.text_tokens))


def _encoder(flags: argparse.Namespace) -> Encoder | None:
    if flags.padding and not (flags.embed or flags.embeddings):
        raise ValueError("--padding is for --embed and --embeddings")
    if flags.embed:
        return clip_model.ClipText.load(flags.embed)
    return npz_states.NpzStates(flags.embeddings) if flags.embeddings else None


def _identity(encoder: Encoder, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what decides the states, see ``captions.identity``."""
    longest = encoder.model.context if isinstance(encoder, clip_model.ClipText) else encoder.context
    if flags.text_tokens and flags.text_tokens > longest:
        raise ValueError(
            f"--text-tokens {flags.text_tokens} is more than the {longest} of the encoder"
        )
    made_of = {"context": flags.text_tokens or longest, "padding": flags.padding}
    if isinstance(encoder, clip_model.ClipText):
        return made_of | {"encoder": encoder.identity()}
    if flags.padding and len(encoder.null) < made_of["context"]:
        raise ValueError(
            f"--padding needs all {made_of['context']} states of the empty text, and null in "
            f"{flags.embeddings} has {len(encoder.null)}"
        )
    null = hashlib.sha256(encoder.null.tobytes()).hexdigest()
    identity = {"kind": "stored", "width": encoder.width, "null": null}
    return made_of | {"encoder": identity} | encoder.identity()


def _kind(flags: argparse.Namespace, encoder: Encoder | None) -> text_tokens.TextTokens:
    if encoder is not None:
        if flags.vocabulary or flags.tokens_as == "words":
            raise ValueError("words have no text encoder: leave out --embed and --embeddings")
        return text_tokens.Clip() if flags.embed else text_tokens.Stored()
    of_scenes = flags.captions == ["scenes"]
    words = of_scenes or flags.vocabulary if flags.tokens_as is None else flags.tokens_as == "words"
    if not words:
        if flags.vocabulary:
            raise ValueError("--vocabulary is for --tokens-as words")
        return text_tokens.Clip()
    if not flags.vocabulary and not of_scenes:
        raise ValueError("--tokens-as words needs a --vocabulary, a file with a word on each line")
    return text_tokens.read_vocabulary(flags.vocabulary or "scenes")


def _captions(
    flags: argparse.Namespace, metadata: dict[str, Any], keys: Sequence[str]
) -> caption_sources.Captions:
    """Returns the captions of each image of the token set."""
    if flags.template:
        labels = _labels(flags.tokens, len(keys))
        names = metadata["class_names"]
        return caption_sources.Captions(caption_sources.of_classes(flags.template, names, labels))
    sources = [
        caption_sources.read(
            source,
            field=flags.caption_key,
            split=flags.split,
            data_dir=flags.data_dir,
            tokenized=metadata,
        )
        for source in flags.captions
    ]
    found = caption_sources.join(itertools.chain(*sources), keys)
    if found.unknown and not any(found.texts):
        raise ValueError(
            f"none of the {len(found.unknown):,} names of captions is that of a picture: captions "
            f"are of {shortened(min(found.unknown))}, the pictures are {_few(sorted(keys))}"
        )
    return found


def _labels(directory: pathlib.Path, num_images: int) -> Int[np.ndarray, " n"]:
    """Returns the class of each image, -1 of those that could not be read."""
    token_set = tokens.TokenSet.open(directory)
    labels = np.full(num_images, -1)
    for part in np.array_split(np.arange(len(token_set)), 1 + len(token_set) // 2**16):
        rows = token_set.read(part)
        labels[rows["image"]] = rows["label"]
    return labels


def _complete(
    found: caption_sources.Captions,
    keys: Sequence[str],
    used: Int[np.ndarray, " n"],
    on_missing: str,
) -> None:
    """Does what ``--on-missing`` says about images of the set without a caption."""
    missing = [image for image in used.tolist() if not found.texts[image]]
    if not missing:
        return
    if on_missing == "stop" or len(missing) == len(used):
        raise ValueError(
            f"{len(missing):,} of {len(used):,} pictures have no caption, such as "
            f"{_few([keys[image] for image in missing])}: add theirs, or leave these pictures out "
            "of training (--on-missing skip) or give them the empty text (--on-missing empty)"
        )
    for image in missing if on_missing == "empty" else ():
        found.texts[image].append("")


def _encode(texts: Sequence[Sequence[str]], kind: text_tokens.TextTokens) -> list[list[int]]:
    """Returns the tokens of all captions; equal ones are encoded once."""
    every = [text for of_picture in texts for text in of_picture]
    different = list(dict.fromkeys(every))
    ids: dict[str, list[int]] = {}
    with progress.Progress(len(different), 1, unit="caption") as bar:
        for start in range(0, len(different), CHUNK):
            part = different[start : start + CHUNK]
            ids |= zip(part, kind.encode(part), strict=True)
            bar.update(len(ids))
    return [ids[text] for text in every]


def _store(
    directory: pathlib.Path,
    made_of: dict[str, Any],
    encoder: Encoder,
    every: Sequence[str],
    ids: Sequence[Sequence[int]],
    mirrored: bool,
) -> dict[str, str]:
    """Stores the states of all captions and returns the checksums of the files.

    Args:
        directory: of the captions.
        made_of: of the captions.
        encoder: whose states they are.
        every: all captions.
        ids: their tokens.
        mirrored: whether captions of mirrored pictures say left for right.
    """
    context, padding = made_of["states"]["context"], made_of["states"]["padding"]
    if isinstance(encoder, clip_model.ClipText):
        plain, other = _cut(encoder.kind, ids, context, mirrored)
        # Short texts first, so that those of a file are of about one length.
        different = sorted(dict.fromkeys([*plain, *other]), key=len)
        windows, lengths = text_tokens.framed_lists(encoder.kind, different, context)
        read, null = functools.partial(_states, encoder, windows), encoder.null_states
    else:
        plain = encoder.find(every).tolist()
        other = encoder.find([*map(text_tokens.mirrored_text, every)]).tolist() if mirrored else []
        different = sorted({*plain, *other})
        lengths = np.minimum(encoder.lengths[different], context)
        read, null = functools.partial(encoder.read, np.array(different)), encoder.null
    number = {text: i for i, text in enumerate(different)}
    of_captions = [[number[text] for text in said] for said in (plain, other or plain)]
    sizes = np.full_like(lengths, context) if padding else lengths
    texts = text_states.Texts(np.array(of_captions).T, sizes, lengths, null)

    def encode(parts: Sequence[slice]) -> Iterator[Float16[np.ndarray, "rows e"]]:
        with progress.Progress(len(sizes), 1, unit="text") as bar:
            for part, states in zip(parts, read(sizes, parts), strict=True):
                yield states
                bar.update(part.stop)

    return text_states.write(directory, made_of, texts, encode)


def _cut(
    kind: text_tokens.TextTokens, ids: Sequence[Sequence[int]], context: int, mirrored: bool
) -> list[list[tuple[int, ...]]]:
    """Returns captions that fit a window, and on request those of mirrored pictures, else none."""
    room = context - text_tokens.added(kind)
    plain = [tuple(caption[:room]) for caption in ids]
    table = text_tokens.mirrored(kind).tolist()
    return [plain, [tuple(table[i] for i in caption) for caption in plain] if mirrored else []]


def _states(
    clip: clip_model.ClipText,
    windows: Int[np.ndarray, "n p"],
    sizes: Int[np.ndarray, " n"],
    parts: Sequence[slice],
) -> Iterator[Float16[np.ndarray, "rows e"]]:
    """Yields the first ``sizes`` states of the texts of each part, one after the other."""
    for part in parts:
        context = min(-(-int(sizes[part].max()) // STEP) * STEP, windows.shape[1])
        states = clip.states(windows[part, :context])
        yield states[np.arange(context) < sizes[part, None]]


def _report(
    made: captions.Captions,
    found: caption_sources.Captions,
    used: Int[np.ndarray, " n"],
    context: int | None,
) -> str:
    per_picture = np.diff(made.first)[used]
    lengths = np.diff(made.offsets) + text_tokens.added(made.kind)
    if made.states is not None and isinstance(made.kind, text_tokens.Stored):
        lengths = made.states.lengths[made.states.texts[:, 0]]
    every = [text for of_picture in found.texts for text in of_picture]
    longest = int(lengths.argmax())
    lines = [
        f"{int(per_picture.sum()):,} captions of {len(used):,} pictures: {per_picture.min()} to "
        f"{per_picture.max()} a picture, {per_picture.mean():.2f} on average",
        f"tokens of a caption, start {'and end ' * (made.kind.end is not None)}included: "
        f"{lengths.mean():.1f} on average, {lengths.max()} at most: {shortened(every[longest])}",
    ]
    if missing := int((per_picture == 0).sum()):
        lines.append(f"{missing:,} pictures without a caption are left out of training")
    if found.empty:
        lines.append(f"{found.empty:,} captions were empty and are left out")
    if found.unknown:
        lines.append(
            f"{found.unknown.total():,} captions are of {len(found.unknown):,} pictures that the "
            f"tokens do not have, such as {_few(sorted(found.unknown))}"
        )
    if made.states is not None:
        size = made.states.rows[-1] * made.states.null.shape[1] * made.states.null.itemsize
        lines.append(
            f"states of {len(made.states.lengths):,} different texts, "
            f"{made.states.null.shape[1]} numbers for each token: {size / 2**20:,.1f} MiB"
        )
    context = context or (clip_tokens.CONTEXT if isinstance(made.kind, text_tokens.Clip) else None)
    cut = np.flatnonzero(lengths > context).tolist() if context else []
    if context and cut:
        lines.append(
            f"{len(cut):,} captions are longer than {context} tokens, which cuts off their ends, "
            "such as"
        )
        examples = list(dict.fromkeys(every[caption] for caption in cut))[:SHOWN]
        dropped = text_tokens.window(made.kind, examples, context).dropped
        lines += [
            f"  {shortened(words)} of {shortened(text)}"
            for text, words in zip(examples, dropped, strict=True)
        ]
    return "\n".join(lines)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(shortened(name) for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.tokenize_captions", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--tokens", type=cli.path, required=True, metavar="DIR", help="token set")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--captions",
        nargs="+",
        metavar="SOURCE",
        help="a .json of COCO, a .jsonl, .tsv, .zip or .tar file, a folder, tfds:NAME or scenes",
    )
    source.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='a text with {} for the name of the class, such as "a photo of a {}"; may be repeated',
    )
    add("--out", type=cli.path, required=True, metavar="DIR", help="directory to write")
    states = parser.add_mutually_exclusive_group()
    states.add_argument(
        "--embed",
        type=cli.path,
        metavar="DIR",
        help="store the states of this encoder (import_torch --clip) beside the captions",
    )
    states.add_argument(
        "--embeddings",
        type=cli.path,
        metavar="FILE.npz",
        help="store states that another program computed: embeddings, floats [n, p, e], lengths "
        "[n], prompts, n texts, and null [p0, e], of the empty text",
    )
    add(
        "--padding",
        action="store_true",
        help="store the states of padding, too, for a model with attend_padding",
    )
    add(
        "--tokens-as",
        choices=("clip", "words"),
        help="byte pairs of CLIP, or words of a vocabulary (default: words with --vocabulary and "
        "of scenes, else clip)",
    )
    add(
        "--vocabulary",
        metavar="FILE",
        help="a word on each line; or scenes, the words of the source scenes",
    )
    add(
        "--on-missing",
        choices=("stop", "skip", "empty"),
        default="stop",
        help="what to do about a picture without a caption: stop, leave it out of training, or "
        "give it the empty text (default: stop)",
    )
    add(
        "--mirror-words",
        choices=captions.MIRROR_WORDS,
        default="swap",
        help="what becomes of left and right in captions of mirrored pictures: they change places, "
        "stay, or the picture is taken as it was (default: swap)",
    )
    add(
        "--shuffle",
        action="store_true",
        help="give every picture the captions of another one: a control, whose model cannot read",
    )
    add(
        "--held-out-tokens",
        type=cli.path,
        metavar="DIR",
        help="token set of the evaluation, which must not share pictures of COCO",
    )
    add(
        "--text-tokens",
        type=cli.at_least_one,
        help="tokens of a text in the model, for the report of what is cut off, and of states that "
        "are stored (default: 77 of clip, all of a file)",
    )
    add("--caption-key", metavar="NAME", help="what holds the captions in .jsonl and TFDS")
    add("--split", help="of TFDS (default: that of the tokens)")
    add("--data-dir", metavar="DIR", help="of TFDS (default: that of the tokens)")
    return parser


if __name__ == "__main__":
    cli.run(main)
