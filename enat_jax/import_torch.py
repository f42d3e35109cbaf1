"""Import weights: the reference's released PyTorch files, and MaskGIT's JAX tokenizer.

    python -m enat_jax.import_torch --enat nnet_ema.pth --vqgan vqgan_jax_strongaug.ckpt --out DIR
    python -m enat_jax.import_torch --vqgan vqgan_jax_strongaug.ckpt --image-size 256 --out DIR

The first writes a model directory, which `Generator.load` and all programs take; the second a
tokenizer directory, for training an ENAT of one's own. --vqgan may be MaskGIT's msgpack file, and
every file safetensors. PyTorch is not needed, and nothing that a file says is run. Sizes are read
off the shapes; what shapes do not tell is known for the paper's models and asked for otherwise.
"""

import argparse
import hashlib
import math
import pathlib
import secrets
import shutil

import jax
import numpy as np

import enat_jax
from enat_jax.checkpoints import model_files, weight_files
from enat_jax.data import imagenet
from enat_jax.inference import generator, sampling
from enat_jax.inference import tokenizer as tokenizers
from enat_jax.models import conversion, reference_sizes
from enat_jax.runtime import cli, files

# The reference's settings for its released models, by tokens of an image (its README).
SETTINGS = {
    256: sampling.Settings(),
    1024: sampling.Settings(guidance_scale=3.5, token_temperature=4.0, mask_temperature=1.5),
}
_SAID = 5  # errors of a list that are printed


def import_tokenizer(path, *, image_size=None, num_tokens=None, num_groups=None, part=None):
    """The tokenizer in a file of the reference's or MaskGIT's weights.

    Args:
        path: of the file; part: see ``weight_files.read``.
        image_size: (height, width) in pixels; None: the square that has ``num_tokens`` tokens.
        num_groups: of its norms; None: 32, as in all released ones.

    Returns:
        ``tokenizer.Tokenizer``, computing in float32.

    Raises:
        OSError, ValueError: the file cannot be read, is no such tokenizer, or does not suit images
            of that size.
    """
    if image_size is None and num_tokens is None:
        raise ValueError("a tokenizer suits images of many sizes: say which by --image-size")
    tensors = reference_sizes.without_prefixes(weight_files.read(path, part))
    maskgit = reference_sizes.is_maskgit(tensors)
    try:
        model = reference_sizes.vqgan_of(tensors, num_groups)
        convert = conversion.maskgit_params if maskgit else conversion.vqgan_params
        params = _finite(convert(tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {_first_lines(error)}") from error
    image_size = image_size or _square(num_tokens, model.downsampling)
    if any(side % model.downsampling for side in image_size):
        raise ValueError(
            f"images of {image_size[0]}x{image_size[1]} pixels cannot be cut into this tokenizer's "
            f"tokens of {model.downsampling}x{model.downsampling}: choose another --image-size"
        )
    origin = "MaskGIT's JAX tokenizer" if maskgit else "the reference's VQGAN"
    provenance = _provenance(path, part, origin, model)
    return tokenizers.Tokenizer(model, params, image_size, provenance)


def _square(num_tokens, downsampling):
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens are no square grid: say how large images are by --image-size"
        )
    return side * downsampling, side * downsampling


def import_enat(path, *, num_heads=None, encoder_layers=None, part=None):
    """The transformer in a file of the reference's weights.

    Args:
        path: of the file; part: see ``weight_files.read``.
        num_heads, encoder_layers: None: those of the paper's model of this width and depth.

    Returns:
        ``(enat.ENAT, params, provenance)``.

    Raises:
        OSError, ValueError: the file cannot be read or is no ENAT.
    """
    tensors = reference_sizes.without_prefixes(weight_files.read(path, part))
    try:
        model = reference_sizes.enat_of(tensors, num_heads, encoder_layers)
        params = _finite(conversion.enat_params(tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {_first_lines(error)}") from error
    return model, params, _provenance(path, part, "the reference's ENAT", model)


def _finite(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            where = "/".join(str(entry.key) for entry in path)
            raise ValueError(f"{where} has values that are no finite numbers: damaged weights")
    return params


def _provenance(path, part, origin, model):
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "imported": origin,
        "file": path.name,
        "part": part,
        "sha256": digest,
        "model": model_files.settings_of(model),
        "enat_jax": enat_jax.__version__,
    }
    return files.as_json(provenance)  # as it will be read again


def class_names_for(num_classes, path):
    """Names of the classes: lines of the file, else ImageNet's where there are 1000.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another number of names, or is needed and not given.
    """
    if path is None:
        if num_classes != len(imagenet.NAMES):
            raise ValueError(
                f"the model has {num_classes} classes, not ImageNet's {len(imagenet.NAMES)}: name "
                "a file with a class name in each line by --class-names"
            )
        return imagenet.NAMES
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: it needs a class name in each line"
        ) from error
    if len(names) != num_classes or not all(name.strip() for name in names):
        raise ValueError(
            f"{path} has {len(names)} lines, {sum(not name.strip() for name in names)} of them "
            f"empty; the model has {num_classes} classes: one name in each line"
        )
    return names


def main(argv):
    options = _parser().parse_args(argv)
    _check_free(options.out)
    if options.enat is not None:
        found, load = _whole_model(options), generator.Generator.load
    else:
        found, load = _only_tokenizer(options), tokenizers.Tokenizer.load
    if options.out.exists() and any(options.out.iterdir()):
        if _described(load(options.out)) != _described(found):
            raise ValueError(f"{options.out} holds another import: name another directory by --out")
        print(f"[import] {options.out} holds the same already")
        return
    _write(options.out, found.save)
    print(f"[import] written to {options.out}")


def _whole_model(options):
    if (options.vqgan is None) == (options.tokenizer is None):
        raise ValueError(
            "an ENAT needs a tokenizer: name its weights by --vqgan, or by --tokenizer the "
            "directory of one that is imported or trained already"
        )
    if options.vqgan is None:
        _without_use(options, ("num_groups", "vqgan_part", "image_size"), "--vqgan")
    model, params, provenance = import_enat(
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
        codec = tokenizers.Tokenizer.load(options.tokenizer)
    else:
        codec = _tokenizer(options, model.num_tokens)
    settings = SETTINGS.get(model.num_tokens, sampling.Settings())
    provenance = {"transformer": provenance, "tokenizer": codec.provenance}
    return generator.Generator(model, params, codec, names, settings, provenance)


def _only_tokenizer(options):
    if options.vqgan is None:
        raise ValueError("nothing to import: name a file by --enat, --vqgan or both")
    unused = ("tokenizer", "num_heads", "encoder_layers", "class_names", "enat_part")
    _without_use(options, unused, "--enat")
    return _tokenizer(options, None)


def _tokenizer(options, num_tokens):
    codec = import_tokenizer(
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


def _without_use(options, names, without):
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no use without {without}")


def _check_free(out):
    """Before weights are read: raises ValueError if ``out`` cannot be an earlier import."""
    if not out.exists():
        return
    ours = ("model.json", "tokenizer.json")
    if not out.is_dir() or (any(out.iterdir()) and not any((out / x).is_file() for x in ours)):
        raise ValueError(f"{out} is there and no import: name another directory by --out")


def _described(found):
    """All that makes two imports the same."""
    if isinstance(found, tokenizers.Tokenizer):
        return found.provenance, found.image_size, found.fingerprint
    own = found.provenance, found.class_names, found.settings, found.fingerprint
    return (*own, *_described(found.tokenizer))


def _write(out, save):
    """Calls ``save`` on a directory that becomes ``out`` when it is whole."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        temporary.replace(out)  # where nothing is, or an empty directory
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_lines(error):
    """The first lines of a list of errors, and how many more there are."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = len(lines) - 1 - _SAID
    return " ".join([*lines[: 1 + _SAID], *([f"and {more} more"] if more > 0 else [])])


def _image_size(text):
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side[:9]) < 10**5 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither pixels of a side nor HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.import_torch",
        description="Imports the reference's weights, and MaskGIT's tokenizer.",
    )
    add = parser.add_argument
    add("--enat", type=pathlib.Path, metavar="FILE", help="the reference's transformer")
    add("--vqgan", type=pathlib.Path, metavar="FILE", help="its tokenizer, or MaskGIT's")
    add("--tokenizer", type=pathlib.Path, metavar="DIR", help="instead of --vqgan: one of ours")
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="model or tokenizer")
    add("--image-size", type=_image_size, help="pixels of a side, or HEIGHTxWIDTH")
    add("--class-names", type=pathlib.Path, metavar="FILE", help="a name a line; 1000: ImageNet's")
    add("--num-heads", type=cli.at_least_one, help="if the size is none of the paper's")
    add("--encoder-layers", type=cli.at_least_one, help="likewise; the others decode")
    add("--num-groups", type=cli.at_least_one, help="of the tokenizer's norms, if not 32")
    add("--enat-part", metavar="KEYS", help="if the file has several sets, such as ema/params")
    add("--vqgan-part", metavar="KEYS", help="likewise")
    return parser


if __name__ == "__main__":
    cli.run(main)
