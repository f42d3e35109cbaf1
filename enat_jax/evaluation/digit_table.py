"""How good generated digits are, in one table, and whether a model uses context.

The images are compared as 8x8 averages of their pixels, the resolution at which the digits were
published, by the measures of ``digit_quality``. Rows:

- *real, held out*: digits that nothing was trained on, the yardstick. Its accuracy is measured and
  is the classifier's ceiling; its diversity (1), Fréchet distance (0) and share of copies (the
  percentile that defines a copy) hold by definition, and the table says so.
- *real, training*: a balanced random draw of training digits, as many as of generated ones, each
  compared with all training digits but itself. What a perfect generator would score: its Fréchet
  distance is the noise floor of so small sets, below which nothing can be told apart.
- *held out, reconstructed*: held-out digits through the tokenizer, what the tokenizer costs. Paired
  with the very digits it is compared with, so its Fréchet distance may lie below the noise floor.
- *control*: each token drawn independently, given class and position, from the training tokens and
  decoded by the same tokenizer. No model at all.
- the model, and every model that it is compared with: as many of each class, drawn in one call.

The classifier has 3 neighbours, a choice made on real digits alone: it names 98.1% of the held-out
ones, 5 neighbours 96.4%; among the training digits, each left out in turn, the two do not differ
(98.1% and 98.2%).

Copies are sought among training digits as they are, by pixels. A copy that passed through the
tokenizer might escape, so a line tells which share of reconstructed *training* digits is found.

Masked-token accuracy and loss are those of held-out digits' tokens with a part of them visible, in
random orders. A model that learned averages alone gains nothing from seeing more.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int, UInt8

from enat_jax.data import tokens
from enat_jax.inference import generator
from enat_jax.metrics import digit_quality, fid
from enat_jax.runtime.markdown import table as markdown_table

FEATURE_SIZE = 8  # pixels a side of the published digits
NUM_NEIGHBOURS = 3
COPY_PERCENTILE = 1.0
COLUMNS = dict(class_accuracy=".1%", diversity=".2f", frechet_distance=".3f", copies=".1%")
VISIBLE = (Fraction(1, 16), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real digits as features and labels: what everything is compared with."""

    training: Float[np.ndarray, "n d"]
    training_labels: Int[np.ndarray, " n"]
    held_out: Float[np.ndarray, "m d"]
    held_out_labels: Int[np.ndarray, " m"]


@dataclasses.dataclass(frozen=True)
class Quality:
    """One row of the table. Shares and ratios in units of 1."""

    name: str
    num_images: int
    class_accuracy: float
    diversity: float
    frechet_distance: float
    copies: float
    by_definition: tuple[str, ...] = ()  # fields that were not measured


@dataclasses.dataclass(frozen=True)
class Context:
    """Accuracy and loss (nats) of masked tokens, mean and standard error over the images."""

    visible: str
    num_visible: int
    accuracy: float
    accuracy_error: float
    loss: float
    loss_error: float


def digit_row(
    name: str,
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    reference: Reference,
    own: Int[np.ndarray, " n"] | None = None,
) -> Quality:
    """Measures images.

    Args:
        name: of the row.
        features: of the images.
        labels: the classes that they ought to show.
        reference: what they are compared with.
        own: for training digits, the index of each among the training digits.
    """
    training, held_out = reference.training, reference.held_out
    return Quality(
        name=name,
        num_images=len(features),
        class_accuracy=digit_quality.class_accuracy(
            features, labels, training, reference.training_labels, NUM_NEIGHBOURS, own
        ),
        diversity=digit_quality.relative_diversity(
            features, labels, held_out, reference.held_out_labels
        ),
        frechet_distance=fid.frechet_distance(
            *fid.gaussian_statistics(features), *fid.gaussian_statistics(held_out)
        ),
        copies=digit_quality.copy_share(features, training, held_out, COPY_PERCENTILE, own),
    )


def measure_held_out(reference: Reference) -> Quality:
    """Returns the row of held-out digits, all but the accuracy marked as true by definition."""
    row = digit_row("real, held out", reference.held_out, reference.held_out_labels, reference)
    return dataclasses.replace(row, by_definition=tuple(COLUMNS)[1:])


def masked_scores(
    model: generator.Generator,
    held_out_tokens: Int[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    num_draws: int,
    seed: int,
) -> tuple[Float[np.ndarray, "parts n"], Float[np.ndarray, "parts n"]]:
    """Returns accuracy and loss of masked tokens by the parts of ``VISIBLE`` and images, float64.

    Args:
        model: predicts masked tokens.
        held_out_tokens: of the images.
        labels: of the images.
        num_draws: random orders that are averaged, positive.
        seed: of the first order.
    """
    if num_draws < 1:
        raise ValueError(f"{num_draws=} must be positive")
    accuracy = np.zeros((len(VISIBLE), len(labels)))
    loss = np.zeros_like(accuracy)
    for i, num_visible in enumerate(_num_visible(held_out_tokens.shape[1])):
        for draw in range(num_draws):
            losses, hits = model.masked_scores(held_out_tokens, labels, num_visible, seed + draw)
            accuracy[i] += np.asarray(hits, np.float64).mean(axis=1) / num_draws
            loss[i] += np.asarray(losses, np.float64).mean(axis=1) / num_draws
    return accuracy, loss


def context(
    accuracy: Float[np.ndarray, "parts n"], loss: Float[np.ndarray, "parts n"], num_tokens: int
) -> list[Context]:
    """Averages what ``masked_scores`` gave over the images; the errors are over images, too."""
    rows = []
    for part, count, *scores in zip(VISIBLE, _num_visible(num_tokens), accuracy, loss, strict=True):
        figures = [figure for values in scores for figure in mean_and_error(values)]
        rows.append(Context(str(part), count, *figures))
    return rows


def verdict(accuracy: Float[np.ndarray, "parts n"], loss: Float[np.ndarray, "parts n"]) -> str:
    """Says in words whether prediction improves with context, at each step and on the whole.

    It improves if accuracy rises and loss falls, each by more than two standard errors of the
    difference within the same image.
    """
    steps = list(zip(range(len(VISIBLE)), range(1, len(VISIBLE)), strict=False))
    flat = [
        f"{VISIBLE[a]} to {VISIBLE[b]}" for a, b in steps if not _improves(accuracy, loss, a, b)
    ]
    change = (
        f"from {VISIBLE[0]} to {VISIBLE[-1]} visible accuracy goes from {accuracy[0].mean():.3f} "
        f"to {accuracy[-1].mean():.3f} and loss from {loss[0].mean():.3f} to {loss[-1].mean():.3f}"
    )
    if not flat:
        return f"Prediction improves with context at every step: {change}."
    if _improves(accuracy, loss, 0, -1):
        where = ", ".join(flat)
        return f"Prediction improves with context on the whole, but not at {where}: {change}."
    return f"Prediction does NOT improve with context: {change}. The model may know only averages."


def _num_visible(num_tokens: int) -> list[int]:
    return [max(1, round(num_tokens * part)) for part in VISIBLE]


def mean_and_error(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Returns the mean, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size))


def _improves(
    accuracy: Float[np.ndarray, "parts n"], loss: Float[np.ndarray, "parts n"], less: int, more: int
) -> bool:
    gains = [accuracy[more] - accuracy[less], loss[less] - loss[more]]
    return all(mean > 2 * error for mean, error in map(mean_and_error, gains))


def quality_table(rows: Sequence[Quality], found_copies: float) -> str:
    """Returns the main table in Markdown, with what a reader must know to judge it."""
    titles = "images", "number", "class accuracy", "diversity", "Fréchet distance", "copies"
    cells = []
    for row in rows:
        figures = [
            format(getattr(row, field), form) + " *" * (field in row.by_definition)
            for field, form in COLUMNS.items()
        ]
        cells.append([row.name, row.num_images, *figures])
    error = np.sqrt(0.95 * 0.05 / rows[-1].num_images)
    return "\n".join(
        [
            markdown_table(titles, cells, align="lrrrrr"),
            "",
            "\\* by definition. Class accuracy: share that the "
            f"{NUM_NEIGHBOURS} nearest training digits give the requested class; the standard "
            f"error of 95% of {rows[-1].num_images} images is {error:.1%}. Diversity: mean "
            "distance within a class over that of held-out digits. Fréchet distance: to held-out "
            f"digits, in {FEATURE_SIZE}x{FEATURE_SIZE} pixels of range 0 to 1; 'real, training' is "
            "its noise floor. Copies: closer to a training digit than "
            f"{100 - COPY_PERCENTILE:g}% of held-out digits are; of training digits passed through "
            f"the tokenizer {found_copies:.1%} are found so.",
        ]
    )


def context_table(evaluation: "Evaluation") -> str:
    """Returns the tables of masked-token prediction in Markdown, each with its verdict."""
    parts = []
    for name, rows in evaluation.context.items():
        cells = [
            (
                row.visible,
                row.num_visible,
                f"{row.accuracy:.3f} ± {row.accuracy_error:.3f}",
                f"{row.loss:.3f} ± {row.loss_error:.3f}",
            )
            for row in rows
        ]
        parts += [
            f"Masked tokens of held-out digits, {name} (mean and standard error over images):",
            markdown_table(("visible", "tokens", "accuracy", "loss (nats)"), cells, align="lrrr"),
            evaluation.verdicts[name],
        ]
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        num: images of each model.
        seed: of everything random.
        quality: rows of the main table.
        found_copies: share of reconstructed training digits that are found to be copies.
        context: of masked tokens, by the model's name.
        verdicts: on ``context``, by the model's name.
    """

    num: int
    seed: int
    quality: list[Quality]
    found_copies: float
    context: dict[str, list[Context]]
    verdicts: dict[str, str]

    def markdown(self) -> str:
        """Returns all tables."""
        return f"{quality_table(self.quality, self.found_copies)}\n\n{context_table(self)}\n"


def evaluate(
    models: Mapping[str, generator.Generator],
    training: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    training_tokens: tokens.TokenSet,
    held_out_tokens: Int[np.ndarray, "n l"] | None = None,
    *,
    num: int = 500,
    num_draws: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Measures models against real digits and the control.

    Args:
        models: by name; the tokenizer of the first is the one of the reconstructions, the control
            and the token sets.
        training: images uint8 ``[n, h, w, c]`` and labels ``[n]``, as they are, not augmented.
        held_out: images and labels on which nothing was trained.
        training_tokens: what the models were trained on.
        held_out_tokens: of ``held_out``; None to encode them here. Models other than
            the first always encode them with their own tokenizer.
        num: generated images of each row; as many of each class.
        num_draws: random orders of the tokens over which the second table averages.
        seed: of everything random.
        say: called with what is done next.
    """
    first = next(iter(models.values()))
    codec = first.tokenizer
    labels = digit_quality.balanced_labels(num, len(first.class_names))
    rng = np.random.default_rng(seed)
    reference = Reference(features(training[0]), training[1], features(held_out[0]), held_out[1])
    subset = digit_quality.balanced_subset(training[1], num, rng)

    real = reference.training[subset], training[1][subset]
    rows = [measure_held_out(reference), digit_row("real, training", *real, reference, subset)]
    if held_out_tokens is None:
        held_out_tokens = codec.encode(held_out[0])
    rebuilt = features(codec.decode(held_out_tokens))
    rows.append(digit_row("held out, reconstructed", rebuilt, held_out[1], reference))
    batch = training_tokens.gather(np.arange(len(training_tokens)))
    drawn = digit_quality.independent_tokens(
        batch["tokens"], batch["labels"], labels, training_tokens.codebook_size, rng
    )
    rows.append(digit_row("control", features(codec.decode(drawn)), labels, reference))

    contexts, verdicts = {}, {}
    for name, model in models.items():
        say(f"{name}: drawing {num} images")
        rows.append(digit_row(name, features(model.sample(labels, seed=seed)), labels, reference))
        say(f"{name}: masked tokens of {len(held_out[1])} held-out digits")
        own_tokens = held_out_tokens if model is first else model.tokenizer.encode(held_out[0])
        scores = masked_scores(model, own_tokens, held_out[1], num_draws, seed)
        contexts[name] = context(*scores, own_tokens.shape[1])
        verdicts[name] = verdict(*scores)

    copies = features(codec.decode(codec.encode(training[0][subset])))
    found = digit_quality.copy_share(
        copies, reference.training, reference.held_out, COPY_PERCENTILE
    )
    return Evaluation(num, seed, rows, found, contexts, verdicts)


def features(pictures: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """Returns pictures as they are compared: averages of pixels, of the published resolution."""
    return digit_quality.pixel_features(np.asarray(pictures), FEATURE_SIZE)
