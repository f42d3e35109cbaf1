"""ENAT in JAX: image synthesis that encodes only the tokens revealed since the last step.

Source of the method: Ni et al., "ENAT: Rethinking Spatial-temporal Interactions in Token-based
Image Synthesis", NeurIPS 2024, arXiv 2411.06959 ("the paper") and the authors' PyTorch release
("the reference").

Dimension letters, the same in docstrings, einsums and shape comments:

    b  batch                     d  model width
    l  tokens of an image        h  attention heads
    n  newly revealed tokens     k  head dimension
    m  masked tokens             v  codebook size (number of codes)
    p  cached tokens             t  sampling steps

A file here is a command, ``python -m enat_jax.NAME`` (and ``generator``, the public face of
``inference/``); a folder is a room. A room imports only rooms below it, and nobody imports a
command (``tests/test_layers.py`` holds this):

    commands       argument parsing, words for people
    profiling/     what ``benchmark`` measures
    training/      tasks, the compiled step, its settings
    evaluation/    sets of images to cards; the paper's analyses
    inference/     sampler, generator, tokenizer, pictures of them
    checkpoints/   states and weights on disk, formats, hub
    data/          pictures, token sets, batches
    models/        networks and their losses (the only home of flax.linen)
    schedules/     reveal order, shape buckets, costs
    metrics/       feature vectors to numbers
    runtime/       start, mesh, files, progress, exit

The last four are the ground and import nothing of the package.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:  # Type checkers and editors take this name for true.
    from enat_jax.inference.generator import Generator as Generator
else:

    def __getattr__(name):
        """Imports ``Generator``, and with it JAX, for the first who asks for it (PEP 562)."""
        if name != "Generator":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from enat_jax.inference.generator import Generator

        return Generator

    def __dir__():
        return sorted([*globals(), "Generator"])


def _explain_uncaught() -> None:
    """Lets ``python -m enat_jax.NAME`` say in one line which package is not installed."""
    import sys

    def uncaught(kind: object, error: BaseException, trace: object) -> None:
        from enat_jax.runtime import exits

        exits.uncaught(error)

    def unraisable(found: "sys.UnraisableHookArgs") -> None:
        from enat_jax.runtime import exits

        exits.unraisable(found)

    if sys.argv[:1] == ["-m"]:  # so it is while Python is looking for the program, and then only
        sys.excepthook, sys.unraisablehook = uncaught, unraisable


_explain_uncaught()
