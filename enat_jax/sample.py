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

from enat_jax.evaluation import drawing_arguments
from enat_jax.inference import image_directory, reveal_pictures
from enat_jax.runtime import cli


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    model = drawing_arguments.load(options)
    labels, texts = drawing_arguments.shown(options, model)
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
        reveal = reveal_pictures.draw_some(model, labels, options.num, options.seed, texts)
        for kind in options.reveal:
            file_name, write = reveal_pictures.KINDS[kind]
            write(options.out / file_name, reveal)
            print(f"[sample] {options.out / file_name}")


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
    drawing_arguments.add_texts(parser)
    add("--num", type=int, default=10, help="images per label or prompt (default 10)")
    drawing_arguments.add_output(parser)
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
    drawing_arguments.add_sampler(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
