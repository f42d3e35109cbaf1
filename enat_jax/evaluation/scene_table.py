"""Whether a model draws what a text says: right digits in right places, in one table.

The texts are those of ``data/scenes.py``, of two digits. Each row is of *seen* combinations, which
training has together with their reversals, or of *held-out* ones, of which it has the reversals
alone. Rows:

- *real*: scenes of digits that nothing was trained on. What the reader of the digits gets right of
  them is as much as can be measured of a model.
- *real, through the tokenizer*: the same, encoded and decoded. A model can hardly do better.
- *empty text*: drawn without a text, and judged by the texts of the other rows. It is chance.
- the model, and every model that it is compared with, such as one that does not know the order of
  words, or one that was trained with the texts of other pictures.

The reader is of ``metrics/scene_quality.py`` and knows the training digits alone, each as it is
and, if training moved digits, moved as in training. Copies are sought among the same pictures.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int, UInt8

from enat_jax.data import scenes
from enat_jax.data.digits import Digits
from enat_jax.evaluation import image_sets
from enat_jax.evaluation.digit_table import COPY_PERCENTILE
from enat_jax.evaluation.means import Mean, mean_and_error
from enat_jax.inference import generator
from enat_jax.metrics import digit_quality, scene_quality
from enat_jax.metrics.scene_quality import Share
from enat_jax.runtime.markdown import table as markdown_table

COMBINATIONS = {"seen": "test", "held out": "unseen"}  # the splits of scenes that have them
VISIBLE = (Fraction(0), Fraction(1, 16), Fraction(1, 4))  # of the tokens, for the use of texts
MOVED_COPIES = 3  # of each training digit that the reader knows beside the digit itself
MEASURES = ("layout", "set", "in_place", "binding")
EXPLANATIONS = (
    "Layout: two cells of four have a digit, side by side or one above the other as the text says.",
    "Set: the digits are the two of the text and no others, wherever they are.",
    "In place: each of the two is where the text says, and there are no others.",
    "Binding: the share in place of those with the right set; only this takes the order of words.",
    "Diversity: mean distance between digits that are read alike, over that of real digits held "
    "out.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What pictures are asked to show.

    Attributes:
        prompts: a text of each, all texts of a combination in turn.
        swapped: the same with the digits in each other's place.
        wanted: for each place that the text allows, the digits of the cells, see
            ``scene_quality.judge``.
        requests: the number of the combination that each is of.
    """

    prompts: list[str]
    swapped: list[str]
    wanted: Int[np.ndarray, "n places cells"]
    requests: Int[np.ndarray, " n"]


def ask(split: str, num: int) -> Asked:
    """Returns requests of all combinations of a split, the i-th as ``Scenes`` has its i-th scene.

    Raises:
        ValueError: there are fewer than combinations, some of which would be left out.
    """
    of_two = scenes.combinations(split)
    if num < len(of_two):
        raise ValueError(
            f"{num} images are too few for {len(of_two)} combinations of digits: "
            f"give --num {len(of_two)} or more"
        )
    turns, requests = np.divmod(np.arange(num), len(of_two))
    wanted = np.full((num, 2, scene_quality.SIDE**2), scene_quality.BLANK)
    for i, request in enumerate(requests):
        for place in (0, 1):
            wanted[i, place, of_two[request].cells(place)] = of_two[request][:2]
    pairs = [(of_two[i], turn % 2) for i, turn in zip(requests, turns, strict=True)]
    prompts = [scene.captions[turn] for scene, turn in pairs]
    swapped = [scene.reversal.captions[turn] for scene, turn in pairs]
    return Asked(prompts, swapped, wanted, requests)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: of what drew the pictures.
        combinations: of ``COMBINATIONS``.
        num_images: number of pictures.
        layout, set, in_place, binding: see ``EXPLANATIONS``.
        diversity, copies: of all digits in the pictures, ratio and share; None where there are too
            few.
    """

    name: str
    combinations: str
    num_images: int
    layout: Share
    set: Share
    in_place: Share
    binding: Share
    diversity: float | None
    copies: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """Measures pictures, and the digits in them.

    Attributes:
        reader: of the digits.
        held_out, held_out_labels: features and classes of digits that it does not know.
        copy_distance: see ``digit_quality.copy_distance``.
    """

    reader: scene_quality.Reader
    held_out: Float[np.ndarray, "m d"]
    held_out_labels: Int[np.ndarray, " m"]
    copy_distance: float

    def row(
        self, name: str, combinations: str, images: UInt8[np.ndarray, "n h w c"], asked: Asked
    ) -> Row:
        """Returns what is right about pictures."""
        shown, features = self.reader.read(images)
        verdicts = scene_quality.judge(shown, asked.wanted)
        inked = shown != scene_quality.BLANK
        return Row(
            name=name,
            combinations=combinations,
            num_images=len(images),
            layout=scene_quality.share(verdicts.layout, asked.requests),
            set=scene_quality.share(verdicts.set, asked.requests),
            in_place=scene_quality.share(verdicts.in_place, asked.requests),
            binding=scene_quality.share(verdicts.in_place, asked.requests, verdicts.set),
            diversity=self._diversity(features[inked], shown[inked]),
            copies=self.copies(features[inked]),
        )

    def _diversity(
        self, features: Float[np.ndarray, "k d"], digits: Int[np.ndarray, " k"]
    ) -> float | None:
        classes, counts = np.unique(digits, return_counts=True)
        if not np.array_equal(classes, np.unique(self.held_out_labels)) or counts.min() < 2:
            return None
        return digit_quality.relative_diversity(
            features, digits, self.held_out, self.held_out_labels
        )

    def copies(self, features: Float[np.ndarray, "k d"]) -> float | None:
        """Returns the share of digits that are closer to a training digit than real ones are."""
        if not len(features):
            return None
        distances = digit_quality.nearest_distances(features, self.reader.features)
        return float(np.mean(distances < self.copy_distance))


def make_judge(source: scenes.Scenes) -> Judge:
    """Returns who judges models that were trained on a source of the split "train"."""
    training = source.digits
    places = np.arange(len(training))
    known = [training.gather(places)["images"]]
    if any(getattr(training, name, 0) for name in image_sets.AUGMENTATION):
        for copy in range(MOVED_COPIES):
            known.append(training.gather(places, places + copy * len(places))["images"])
    reader = scene_quality.Reader.of(np.concatenate(known), np.tile(training.labels, len(known)))
    held_out: Digits = dataclasses.replace(training, split="test")
    pictures = held_out.gather(np.arange(len(held_out)))["images"]
    features = digit_quality.pixel_features(pictures, scene_quality.FEATURE_SIZE)
    copy_distance = digit_quality.copy_distance(reader.features, features, COPY_PERCENTILE)
    return Judge(reader, features, held_out.labels, copy_distance)


def text_use(
    model: generator.Generator, codes: Int[np.ndarray, "n l"], asked: Asked, seed: int
) -> dict[str, list[Mean]]:
    """Returns how much texts help to predict masked tokens, in nats, over the pictures.

    It is the loss with another text less that with the own one, by the parts of ``VISIBLE``. The
    other text is one of "another image", drawn at random, which is 0 of a model that ignores texts,
    or the own one with "digits swapped", which is 0 of a model that ignores the order of words.
    """
    order = np.random.default_rng(seed).permutation(len(codes))
    others = {"another image": [asked.prompts[i] for i in order], "digits swapped": asked.swapped}

    def losses(texts: Sequence[str], part: Fraction) -> Float[np.ndarray, " n"]:
        num_visible = round(codes.shape[1] * part)
        found, _ = model.masked_scores(codes, None, num_visible, seed, prompts=texts)
        return np.asarray(found, np.float64).mean(axis=1)

    own = [losses(asked.prompts, part) for part in VISIBLE]
    return {
        kind: [
            mean_and_error(losses(texts, part) - of_own)
            for part, of_own in zip(VISIBLE, own, strict=True)
        ]
        for kind, texts in others.items()
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        num: pictures of each row.
        seed: of everything random.
        guidance: scale of the model's own settings, with which all rows but ``by_guidance`` are
            drawn.
        rows: of the main table.
        differences: of the shares in place, of seen combinations less held-out ones, by name.
        text_use: by the model's name, see the function.
        by_guidance: rows of the model on held-out combinations, named by the scale of guidance.
        found_copies: share of training digits through the tokenizer that are found to be copies.
    """

    num: int
    seed: int
    guidance: float
    rows: list[Row]
    differences: dict[str, Share]
    text_use: dict[str, dict[str, list[Mean]]]
    by_guidance: list[Row]
    found_copies: float | None

    def markdown(self) -> str:
        """Returns all tables, each with what a reader must know to judge it."""
        tables = _main_table, _difference_table, _guidance_table, _use_table
        return "\n\n".join(table(self) for table in tables) + "\n"


def evaluate(
    models: Mapping[str, generator.Generator],
    source: scenes.Scenes,
    *,
    num: int = 500,
    guidance: Sequence[float] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Measures models by what they draw of texts, against real scenes and pictures of no text.

    Args:
        models: by name, all of which read the words of scenes and draw pictures of the source's
            size; the first draws without a text and with other guidance, and its tokenizer is the
            one of the real scenes.
        source: of the split "train", what the models were trained on.
        num: pictures of each row.
        guidance: scales of the guidance at which held-out combinations are drawn once more.
        seed: of everything random.
        say: called with what is done next.

    Raises:
        ValueError: ``num`` is too small.
    """
    asked = {name: ask(split, num) for name, split in COMBINATIONS.items()}
    say("reading digits")
    judge = make_judge(source)
    pictures = {
        name: dataclasses.replace(source, split=split, num=num).gather(np.arange(num))["images"]
        for name, split in COMBINATIONS.items()
    }
    first_name, first = next(iter(models.items()))
    codec = first.tokenizer
    rebuilt = {name: codec.decode(codec.encode(found)) for name, found in pictures.items()}
    say(f"drawing {num} images without a text")
    no_text = first.sample(prompts=[""] * num, seed=seed)
    drawn = {
        "real": pictures,
        "real, through the tokenizer": rebuilt,
        "empty text": dict.fromkeys(asked, no_text),
    }
    prompts = [prompt for found in asked.values() for prompt in found.prompts]
    use = {}
    for name, model in models.items():
        say(f"{name}: drawing {len(prompts)} images, and measuring the use of texts")
        images = np.split(model.sample(prompts=prompts, seed=seed), len(asked))
        drawn[name] = dict(zip(asked, images, strict=True))
        codes = model.tokenizer.encode(pictures["held out"])
        use[name] = text_use(model, codes, asked["held out"], seed)
    rows = [
        judge.row(name, combinations, images, asked[combinations])
        for name, of_name in drawn.items()
        for combinations, images in of_name.items()
    ]
    in_place = {(row.name, row.combinations): row.in_place for row in rows}
    by_guidance = []
    for scale in guidance:
        say(f"{first_name}: drawing {num} images with guidance {scale:g}")
        others = first.with_settings(guidance_scale=scale)
        found = others.sample(prompts=asked["held out"].prompts, seed=seed, first_index=num)
        by_guidance.append(judge.row(f"{scale:g}", "held out", found, asked["held out"]))
    training = dataclasses.replace(source, num=num).gather(np.arange(num))["images"]
    reading = judge.reader.read(codec.decode(codec.encode(training)))
    return Evaluation(
        num,
        seed,
        first.settings.guidance_scale,
        rows,
        {name: in_place[name, "seen"].minus(in_place[name, "held out"]) for name in drawn},
        use,
        by_guidance,
        judge.copies(reading.features[reading.digits != scene_quality.BLANK]),
    )


# --- tables ---------------------------------------------------------------------------------------


def _main_table(evaluation: Evaluation) -> str:
    titles = ["images", "combinations", "number", *map(_title, MEASURES), "diversity", "copies"]
    cells = []
    for row in evaluation.rows:
        quality = _text(row.diversity, ".2f"), _text(row.copies, ".1%")
        cells.append([row.name, row.combinations, row.num_images, *_shares(row), *quality])
    numbers = {name: len(scenes.combinations(split)) for name, split in COMBINATIONS.items()}
    return "\n".join(
        [
            markdown_table(titles, cells, align="ll" + "r" * 7),
            "",
            f"{evaluation.num} images a row; ± is one standard error over the combinations. Seen: "
            f"{numbers['seen']} combinations that training has together with their reversals. Held "
            f"out: {numbers['held out']} that it never has, but their reversals. Guidance: "
            f"{evaluation.guidance:g}.",
            "",
            *(f"- {line}" for line in EXPLANATIONS),
            f"- Copies: share of digits closer to a training digit than {100 - COPY_PERCENTILE:g}% "
            "of real digits held out are; of training digits passed through the tokenizer "
            f"{_text(evaluation.found_copies, '.1%')} are found so.",
        ]
    )


def _difference_table(evaluation: Evaluation) -> str:
    cells = [[name, _percent(share, "+")] for name, share in evaluation.differences.items()]
    return "\n".join(
        [
            markdown_table(["images", "seen - held out"], cells, align="lr"),
            "",
            "Difference of the shares in place, in points.",
        ]
    )


def _use_table(evaluation: Evaluation) -> str:
    titles = ["images", "other text", *(f"{part} visible" for part in VISIBLE)]
    cells = [
        [name, kind, *map(_nats, means)]
        for name, of_kinds in evaluation.text_use.items()
        for kind, means in of_kinds.items()
    ]
    return "\n".join(
        [
            markdown_table(titles, cells, align="llrrr"),
            "",
            "How much worse masked tokens of real scenes of held-out combinations are predicted "
            "with another text than with their own (nats, with a part of the tokens visible). With "
            "the text of another image, 0: the text is ignored. With the digits swapped, 0: the "
            "order of its words is ignored, or which digits they name.",
        ]
    )


def _guidance_table(evaluation: Evaluation) -> str:
    cells = [[row.name, *_shares(row)] for row in evaluation.by_guidance]
    return "\n".join(
        [
            markdown_table(["guidance", *map(_title, MEASURES)], cells, align="rrrrr"),
            "",
            f"The first model on held-out combinations, {evaluation.num} images a row.",
        ]
    )


def _title(measure: str) -> str:
    return measure.replace("_", " ")


def _shares(row: Row) -> list[str]:
    return [_percent(getattr(row, name)) for name in MEASURES]


def _percent(share: Share, sign: str = "") -> str:
    if share.mean is None:
        return "-"
    error = "" if share.standard_error is None else f" ± {100 * share.standard_error:.1f}"
    return f"{100 * share.mean:{sign}.1f}{error}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _nats(mean: Mean) -> str:
    error = mean["standard_error"]
    return f"{mean['mean']:.2f}" + ("" if error is None else f" ± {error:.2f}")
