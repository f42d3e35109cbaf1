"""Play with a trained model on a page in the browser, which this machine alone sees.

    python -m enat_jax.demo --model MODEL_DIR

Draw classes or prompts, move the settings, watch step by step how pictures come about, paint over a
drawn or an uploaded picture, and fill it. Pictures download as PNG files which hold what they were
made with, as `python -m enat_jax.sample` and `edit` write them. Needs the extra `demo`.

The page is served by Gradio at 127.0.0.1, and nothing of it comes from, or goes to, any other
machine. Who wants to show it to others names another --host, such as 0.0.0.0; there is no password.
A new number of steps or pictures is compiled once, which takes seconds. Ctrl-C ends it, and then
all its files are removed.
"""

import argparse
import pathlib
import tempfile
import threading

from enat_jax.inference import generator, page
from enat_jax.runtime import cli


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    try:
        from enat_jax.inference import page_layout  # late, since Gradio is an extra
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError(
            "the page needs the package gradio: pip install 'enat_jax[demo]', or -e '.[demo]' in "
            "a copy of the repository"
        ) from error
    model = generator.Generator.load(
        options.model, options.dtype, text_encoder_directory=options.text_encoder
    ).with_settings(num_segments=options.segments)
    with tempfile.TemporaryDirectory(prefix="enat_jax_demo_") as folder:
        # Gradio's own copies, too.
        made = page.Page(model, pathlib.Path(folder), options.batch_size)
        blocks, address = page_layout.serve(made, options.host, options.port)
        print(f"[demo] {model!r}\n[demo] open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:10]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 1 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, metavar="DIR", help="or hf://OWNER/NAME")
    add("--text-encoder", type=cli.path, metavar="DIR", help="if the model needs one and has none")
    add("--host", default="127.0.0.1", help="to listen at (default 127.0.0.1, this machine alone)")
    add("--port", type=_port, help="default: the first free one from 7860")
    add(
        "--batch-size",
        type=cli.at_least_one,
        default=page.BATCH_SIZE,
        help=f"images at a time at most (default {page.BATCH_SIZE})",
    )
    add(
        "--segments",
        type=cli.at_least_one,
        default=1,
        help="compiled parts of the sampler; more compile longer and draw faster (default 1)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")
    return parser


if __name__ == "__main__":
    cli.run(main)
