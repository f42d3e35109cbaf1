"""How well the hidden centres of held-out pictures are filled in, against two controls.

The middle half of each side of a picture is hidden, and with it the tokens that have seen it, as
``Generator.edit`` has it. Rows:

- *reconstructed*: the pictures through the tokenizer, with nothing hidden.
- *marginals*: each hidden token by the frequencies of its class at its position in the training
  tokens.
- *ignoring what is kept*: the model without any visible token; its filled pictures are what is kept
  around the middle of pictures that it draws of the class.
- *filled*: the model.

The loss is the cross-entropy in nats of hidden tokens, which are those of the whole picture, in one
pass without guidance. The pictures are filled by the sampler and then judged: by whether a
classifier of 3 neighbours among real training digits names their class, or by their Fréchet
distance to the pictures as they were.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from enat_jax.data import tokens
from enat_jax.evaluation import digit_table, feature_network
from enat_jax.inference import editing, generator, masked_scores
from enat_jax.metrics import bootstrap, digit_quality, fid
from enat_jax.runtime import sharding
from enat_jax.runtime.markdown import table as markdown_table


class Judge(Protocol):
    """What filled pictures are measured by.

    Attributes:
        title: of the table's column.
        percent: whether values are shares.
    """

    title: str
    percent: bool

    def __call__(
        self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
    ) -> tuple[float, float]:
        """Returns a value and its standard error."""
        ...


class ClassAccuracy:
    """The share of digits that are named as they should be, among training digits and labels."""

    title, percent = "class accuracy", True

    def __init__(self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]) -> None:
        self._known = digit_table.features(images), labels

    def __call__(
        self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
    ) -> tuple[float, float]:
        seen = digit_table.features(images)
        share = digit_quality.class_accuracy(seen, labels, *self._known, digit_table.NUM_NEIGHBOURS)
        return share, float(np.sqrt(share * (1 - share) / len(labels)))


class Distance:
    """The Fréchet distance to the pictures as they were, in the features of a network."""

    title, percent = "Fréchet distance", False

    def __init__(
        self, network: feature_network.Features, originals: UInt8[np.ndarray, "n h w c"]
    ) -> None:
        self._network = network
        self._reference = fid.gaussian_statistics(network(originals)["pool"])

    def __call__(
        self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
    ) -> tuple[float, float]:
        pool = self._network(images)["pool"]
        distance = fid.frechet_distance(*fid.gaussian_statistics(pool), *self._reference)
        return distance, bootstrap.of_frechet_distance_linear(pool, *self._reference)


@dataclasses.dataclass(frozen=True)
class Filled:
    """One row: loss of hidden tokens in nats and the judge's value, with their standard errors."""

    name: str
    loss: float | None
    loss_error: float | None
    value: float
    value_error: float


def centres(shape: tuple[int, int, int]) -> Bool[np.ndarray, "n h w"]:
    """Returns masks that hide the middle half of each side; ``shape``: n, height and width."""
    masks = np.zeros(shape, bool)
    _, height, width = shape
    masks[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    return masks


def evaluate(
    model: generator.Generator,
    judge: Judge,
    held_out: tuple[UInt8[np.ndarray, "m h w c"], Int[np.ndarray, " m"]],
    training_tokens: tokens.TokenSet,
    *,
    grow: int = 1,
    seed: int = 0,
) -> list[Filled]:
    """Measures all rows.

    Args:
        model: fills the pictures, of which it is told the class.
        judge: measures the pictures of each row.
        held_out: images and labels on which nothing was trained.
        training_tokens: what the model was trained on.
        grow: tokens that the mask grows by.
        seed: of everything random.
    """
    images, labels = held_out
    masks = centres(images.shape[:3])
    masked = editing.token_masks(masks, model.tokenizer.grid, grow)
    whole = model.tokenizer.encode(images)
    kept = model.tokenizer.encode(editing.neutralised(images, masks))
    batch = training_tokens.gather(np.arange(len(training_tokens)))
    marginal = _marginal_losses(batch, whole, labels, training_tokens.codebook_size)
    drawn = digit_quality.independent_tokens(
        batch["tokens"],
        batch["labels"],
        labels,
        training_tokens.codebook_size,
        np.random.default_rng(seed),
    )
    pasted = model.sample_tokens(labels, seed)
    filled = {
        "reconstructed": (whole, None),
        "marginals": (np.where(masked, drawn, kept), marginal[masked].reshape(len(labels), -1)),
        "ignoring what is kept": (
            np.where(masked, pasted, kept),
            _losses(model, whole, kept, masked, labels, visible=False),
        ),
        "filled": (
            model.fill_tokens(kept, masked, labels, seed),
            _losses(model, whole, kept, masked, labels, visible=True),
        ),
    }
    rows = []
    for name, (found, losses) in filled.items():
        value, error = judge(model.tokenizer.decode(found), labels)
        loss: tuple[float | None, float | None] = (None, None)
        if losses is not None:
            loss = digit_table.mean_and_error(losses.mean(axis=1))
        rows.append(Filled(name, *loss, value, error))
    return rows


def _marginal_losses(
    batch: dict[str, np.ndarray],
    found: Int[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    codebook_size: int,
) -> Float[np.ndarray, "n l"]:
    """Returns the losses by frequencies of class and position, with one count spread over codes."""
    losses = np.empty(found.shape)
    for label in np.unique(labels):
        pool, rows = batch["tokens"][batch["labels"] == label], labels == label
        for place in range(found.shape[1]):
            counts = np.bincount(pool[:, place], minlength=codebook_size) + 1 / codebook_size
            losses[rows, place] = -np.log(counts[found[rows, place]] / (len(pool) + 1))
    return losses


def _losses(
    model: generator.Generator,
    whole: Int[np.ndarray, "n l"],
    kept: Int[np.ndarray, "n l"],
    masked: Bool[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    visible: bool,
) -> Float[np.ndarray, "n m"]:
    """Returns the losses of the hidden tokens, of which all images have as many."""
    num_masked = int(masked[0].sum())
    order = np.argsort(masked, axis=1, stable=True).astype(np.int32)
    mesh, params = model.placed
    ids = np.where(masked, whole, kept).astype(np.int32)
    rows = [sharding.place(x, mesh) for x in (ids, labels.astype(np.int32), order)]
    num_visible = ids.shape[1] - num_masked if visible else 0
    losses, _ = masked_scores.scores(model.model, params, *rows, num_visible)
    return np.asarray(losses, np.float64)[: len(labels), -num_masked:]


def markdown(rows: Sequence[Filled], judge: Judge, pictures: str) -> str:
    """Returns the table; ``pictures``: what the pictures are, its first title."""
    cells = []
    for row in rows:
        value = f"{row.value:.2f} ± {row.value_error:.2f}"
        if judge.percent:
            value = f"{row.value:.1%} ± {row.value_error:.1%}"
        loss = "" if row.loss is None else f"{row.loss:.3f} ± {row.loss_error:.3f}"
        cells.append((row.name, loss, value))
    titles = f"{pictures}, centre hidden", "loss of hidden tokens (nats)", judge.title
    return markdown_table(titles, cells, align="lrr")
