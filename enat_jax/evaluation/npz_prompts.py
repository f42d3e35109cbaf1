"""Prompts as states that another program has computed, from an .npz file."""

import pathlib

import numpy as np
from jaxtyping import Float, Float16

from enat_jax.evaluation import npz_files
from enat_jax.evaluation.npz_states import LENGTHS, NULL, STATES, TEXTS
from enat_jax.inference.text_encoder import TextEncoder
from enat_jax.models.blocks import Prompt

ADVICE = (
    "prompts are embeddings, floats [n, p, e], lengths, whole numbers [n], and perhaps prompts, n "
    "texts, and null, floats [p0, e], of the empty text"
)
TOLERANCE = 0.02  # relative, of the states of the empty text; bfloat16 changes them less


def read(path: pathlib.Path, encoder: TextEncoder) -> tuple[Prompt, list[str]]:
    """Reads prompts.

    Args:
        path: of an .npz file with ``embeddings``, floats ``[n, p, e]``, and ``lengths``, whole
            numbers ``[n]``. It may have ``prompts``, the n texts, and ``null``, floats ``[p0, e]``,
            the states of the empty text, which must be those that the model was trained with.
        encoder: of the model.

    Returns:
        The prompts, of at most ``encoder.context`` tokens, and their texts, "" where the file has
        none.

    Raises:
        ValueError: the file is damaged, or its states are none of this model.
        OSError: it cannot be read.
    """
    if encoder.null_states is None:
        raise ValueError(f"{path}: this model reads words and no states: give prompts")
    with npz_files.open_npz(path, ADVICE) as archive:
        if missing := [name for name in (STATES, LENGTHS) if name not in archive]:
            raise ValueError(f"{path} has no {missing[0]}, but {sorted(archive)}: {ADVICE}")
        found = {x: archive.read(x) for x in (STATES, LENGTHS, NULL, TEXTS) if x in archive}
    states, lengths = found[STATES], found[LENGTHS]
    if not states.size:
        raise ValueError(f"{path} holds no prompt: {STATES} is {list(states.shape)}")
    if states.ndim == 3 and lengths.dtype.kind in "iu" and lengths.max() <= encoder.context:
        states = states[:, : encoder.context]  # the rest is padding
    try:
        prompt = encoder.checked(Prompt(states, lengths))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if NULL in found:
        _check_null(path, found[NULL], encoder.null_states)
    texts = found.get(TEXTS, np.full(len(states), ""))
    if texts.dtype.kind != "U" or texts.shape != (len(states),):
        raise ValueError(f"{path}: {TEXTS} is {texts.dtype} {list(texts.shape)}: {ADVICE}")
    return prompt, texts.tolist()


def _check_null(
    path: pathlib.Path, null: Float[np.ndarray, "p0 e"], expected: Float16[np.ndarray, "p e"]
) -> None:
    if null.ndim != 2 or null.dtype.kind != "f" or null.shape[1] != expected.shape[1]:
        raise ValueError(f"{path}: {NULL} is {null.dtype} {list(null.shape)}: {ADVICE}")
    rows = min(len(null), len(expected))
    wanted = expected[:rows].astype(np.float64)
    share = float(np.linalg.norm(null[:rows] - wanted) / (np.linalg.norm(wanted) + 1e-9))
    if not rows or not share <= TOLERANCE:
        raise ValueError(
            f"{path}: {NULL} differs by {share:.0%} from the states of the empty text that the "
            "model was trained with: take the same encoder, layer and padding"
        )
