"""Import weights: the reference's, tokenizers of MaskGIT and MaskBit, CLIP, perceptual networks.

    python -m enat_jax.import_torch --enat nnet_ema.pth --vqgan vqgan_jax_strongaug.ckpt --out DIR
    python -m enat_jax.import_torch --vqgan vqgan_jax_strongaug.ckpt --image-size 256 --out DIR
    python -m enat_jax.import_torch --clip model.safetensors --out DIR
    python -m enat_jax.import_torch --perceptual lpips_vgg --weights vgg16.ckpt --out FILE

The first writes a model directory, which `Generator.load` and all programs take; the second a
tokenizer directory, for training an ENAT of one's own; the third the directory of a text encoder,
for models of texts and for scores, of the names of Hugging Face, OpenAI or OpenCLIP; the fourth one
safetensors file of a perceptual network, for a tokenizer's loss and for LPIPS. --vqgan may be
MaskGIT's msgpack file or MaskBit's VQGAN+, and every file safetensors. PyTorch is not needed, and
nothing that a file says is run. Sizes are read off the shapes; what shapes do not tell is known for
the paper's models and some of CLIP's, stands in CLIP's config.json beside the file, and is asked
for otherwise.
"""

import argparse
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from enat_jax.checkpoints import orbax_paths
from enat_jax.data import imagenet
from enat_jax.evaluation import perceptual_weights
from enat_jax.inference import (
    clip_towers,
    clip_weights,
    generator,
    model_directory,
    reference_weights,
    sampling,
    tokenizer,
)
from enat_jax.models import clip, perceptual
from enat_jax.runtime import cli, files

Imported = generator.Generator | tokenizer.Tokenizer | clip_towers.Clip
OF_CLIP = (
    "activation",
    "pad",
    "hidden_layer",
    "vision_heads",
    "clip_part",
)  # flags of --clip alone
OF_OTHERS = ("encoder_layers", "num_groups", "enat_part", "vqgan_part")


def class_names_for(num_classes: int, path: pathlib.Path | None) -> tuple[str, ...]:
    """Returns the names of the classes: lines of the file, without one ImageNet's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another number of names or a name twice, or is needed and not given.
    """
    if path is None:
        if num_classes != len(imagenet.NAMES):
            raise ValueError(
                f"the model has {num_classes} classes, not ImageNet's {len(imagenet.NAMES)}: name "
                "a file with a class name in each line by --class-names"
            )
        return imagenet.NAMES
    names = tuple(files.read_text(path).splitlines())
    if len(names) != num_classes or not all(name.strip() for name in names):
        raise ValueError(
            f"{path} has {len(names)} lines, {sum(not name.strip() for name in names)} of them "
            f"empty; the model has {num_classes} classes: one name in each line"
        )
    lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        # Names that look alike could not be told apart on a command line.
        alike = " ".join(unicodedata.normalize("NFC", name).split())
        if (first := lines.setdefault(alike, number)) != number:
            raise ValueError(
                f"{path}: lines {first} and {number} both name the class {name!r}: give each class "
                "a name of its own"
            )
    return names


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.perceptual is not None:
        _perceptual(options)
        return
    _without_use(options, ("weights",), "--perceptual")
    _check_free(options.out)
    orbax_paths.of(options.out)  # refuses a name that Orbax cannot use
    found = _imported(options)
    if options.out.exists() and any(options.out.iterdir()):
        if _descriptions(type(found).load(options.out)) != _descriptions(found):
            raise ValueError(f"{options.out} holds another import: name another directory by --out")
        print(f"[import] {options.out} holds the same already")
        return
    with files.new_directory(options.out) as directory:
        found.save(directory)
        model_directory.check(found, directory)
    print(f"[import] written to {options.out}")


def _imported(options: argparse.Namespace) -> Imported:
    if options.clip is not None:
        return _clip(options)
    _without_use(options, OF_CLIP, "--clip")
    return _only_tokenizer(options) if options.enat is None else _whole_model(options)


def _clip(options: argparse.Namespace) -> clip_towers.Clip:
    for name in ("enat", "vqgan", "tokenizer", "image_size", "class_names", *OF_OTHERS):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{_flag(name)} has no use with --clip: import CLIP into a directory of its own"
            )
    found, said = clip_weights.read(
        options.clip,
        activation=options.activation,
        pad=options.pad,
        hidden_layer=options.hidden_layer or -1,
        num_heads=options.num_heads,
        vision_heads=options.vision_heads,
        part=options.clip_part,
    )
    for sentence in said:
        print(f"[import] {sentence}")
    text = found.text.model
    vectors = "no vectors" if text.projection is None else f"vectors of {text.projection}"
    print(
        f"[import] text tower: states of {text.width} of {text.context} tokens, {vectors}, "
        f"{text.num_layers} layers of {text.num_heads} heads, {text.activation}, texts are "
        f"followed by {found.text.pad}"
    )
    if found.vision is None:
        print("[import] no vision tower: a text encoder alone, which gives no scores")
    else:
        seeing = found.vision.model
        print(
            f"[import] vision tower: vectors of {seeing.projection} of {seeing.image_size} pixels "
            f"of a side in patches of {seeing.patch_size}, {seeing.num_layers} layers of "
            f"{seeing.num_heads} heads, {seeing.activation}"
        )
    return found


def _perceptual(options: argparse.Namespace) -> None:
    """Writes the weights of a perceptual network into one file."""
    for name, value in vars(options).items():
        if name not in ("perceptual", "weights", "out") and value is not None:
            raise ValueError(
                f"{_flag(name)} has no use with --perceptual: import other networks into "
                "directories of their own"
            )
    kind, out = options.perceptual, options.out
    if options.weights is None:
        raise ValueError(
            f"--perceptual {kind} needs --weights: {perceptual_weights.SOURCES[kind].files}"
        )
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must be a file whose name ends in .safetensors")
    if out.exists():
        perceptual_weights.refuse_others(kind, options.weights, out)
        print(f"[import] {out} holds the same already")
        return
    origin = perceptual_weights.prepare(kind, options.weights, out)
    for file in origin["files"]:
        print(f"[import] {kind} from {file['file']}, SHA-256 {file['sha256']}")
    if origin["published"] is False:
        print("[import] these are not the published weights: distances will be others")
    print(f"[import] written to {out}")


def _whole_model(options: argparse.Namespace) -> generator.Generator:
    if (options.vqgan is None) == (options.tokenizer is None):
        raise ValueError(
            "an ENAT needs a tokenizer: name its weights by --vqgan, or by --tokenizer the "
            "directory of one that is imported or trained already"
        )
    if options.vqgan is None:
        _without_use(options, ("num_groups", "vqgan_part", "image_size"), "--vqgan")
    model, params, provenance = reference_weights.read_enat(
        options.enat,
        num_heads=options.num_heads,
        encoder_layers=options.encoder_layers,
        part=options.enat_part,
    )
    print(
        f"[import] transformer: width {model.width}, {model.num_heads} heads, "
        f"{model.encoder_layers} encoder and {model.decoder_layers} decoder layers, "
        f"{model.num_tokens} tokens of {model.codebook_size} codes, {model.num_classes} classes"
    )
    names = class_names_for(model.num_classes, options.class_names)
    if options.vqgan is None:
        codec = tokenizer.Tokenizer.load(options.tokenizer)
    else:
        codec = _tokenizer(options, model.num_tokens)
    settings = reference_weights.SETTINGS.get(model.num_tokens, sampling.Settings())
    provenances = {"transformer": provenance, "tokenizer": codec.provenance}
    return generator.Generator(model, params, codec, names, settings, provenances)


def _only_tokenizer(options: argparse.Namespace) -> tokenizer.Tokenizer:
    if options.vqgan is None:
        raise ValueError(
            "nothing to import: name a file by --enat, --vqgan or both, or by --clip, or a network "
            "by --perceptual"
        )
    unused = ("tokenizer", "num_heads", "encoder_layers", "class_names", "enat_part")
    _without_use(options, unused, "--enat")
    return _tokenizer(options, None)


def _tokenizer(options: argparse.Namespace, num_tokens: int | None) -> tokenizer.Tokenizer:
    codec = reference_weights.read_tokenizer(
        options.vqgan,
        image_size=options.image_size,
        num_tokens=num_tokens,
        num_groups=options.num_groups,
        part=options.vqgan_part,
    )
    model, (height, width) = codec.model, codec.image_size
    print(
        f"[import] tokenizer: {model.channels} channels times {model.channel_multipliers}, "
        f"{model.num_res_blocks} blocks a level, {model.codebook_size} codes of "
        f"{model.embed_dim}, for images of {height}x{width}x{model.image_channels}"
    )
    return codec


def _without_use(options: argparse.Namespace, names: Sequence[str], without: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{_flag(name)} has no use without {without}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_free(out: pathlib.Path) -> None:
    """Raises ValueError if ``out`` cannot be an earlier import, before any weights are read."""
    if not out.exists():
        return
    ours = ("model.json", "tokenizer.json", "encoder.json")
    if not out.is_dir() or (any(out.iterdir()) and not any((out / x).is_file() for x in ours)):
        raise ValueError(f"{out} is there and no import: name another directory by --out")


def _descriptions(found: Imported) -> list[Any]:
    """Returns all that makes two imports the same."""
    if isinstance(found, generator.Generator):
        return [files.as_json(found.description), *_descriptions(found.tokenizer)]
    return [files.as_json(found.description)]


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side[:9]) < 10**5 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither pixels of a side nor HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.import_torch",
        description="Imports the reference's weights, tokenizers of others, CLIP, LPIPS.",
    )
    add = parser.add_argument
    add("--enat", type=cli.path, metavar="FILE", help="the reference's transformer")
    add(
        "--vqgan",
        type=cli.path,
        metavar="FILE",
        help="its tokenizer, MaskGIT's or MaskBit's VQGAN+",
    )
    add("--tokenizer", type=cli.path, metavar="DIR", help="instead of --vqgan: one of ours")
    add("--clip", type=cli.path, metavar="FILE", help="CLIP, whole or its text tower alone")
    add("--perceptual", choices=perceptual.KINDS, help="a network that compares pictures")
    add("--weights", metavar="FILE[,FILE]", help="of --perceptual")
    add(
        "--out",
        type=cli.path,
        required=True,
        metavar="DIR",
        help="model, tokenizer or encoder; of --perceptual a .safetensors file",
    )
    add("--image-size", type=_image_size, help="pixels of a side, or HEIGHTxWIDTH")
    add("--class-names", type=cli.path, metavar="FILE", help="a name a line; 1000: ImageNet's")
    add("--num-heads", type=cli.at_least_one, help="if the size is none of the paper's, or CLIP's")
    add("--encoder-layers", type=cli.at_least_one, help="likewise; the others decode")
    add("--num-groups", type=cli.at_least_one, help="of the tokenizer's norms, if not 32")
    add("--enat-part", metavar="KEYS", help="if the file has several sets, such as ema/params")
    add("--vqgan-part", metavar="KEYS", help="likewise")
    add("--activation", choices=tuple(clip.ACTIVATIONS), help="of CLIP, if nothing else says it")
    add("--pad", type=int, metavar="TOKEN", help="that follows a text of CLIP, likewise")
    add(
        "--hidden-layer",
        type=int,
        choices=(-1, -2),
        help="states of texts: the last ones (default), or the input of CLIP's last layer",
    )
    add(
        "--vision-heads",
        type=cli.at_least_one,
        help="of CLIP's vision tower, if not of 64 channels",
    )
    add("--clip-part", metavar="KEYS", help="as --enat-part")
    return parser


if __name__ == "__main__":
    cli.run(main)
