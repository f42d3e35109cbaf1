"""Settings of the sampler that are searched for, and what they are worth on fresh seeds.

The search is Optuna's, over few numbers that make the values of every step, see ``settings_of``.
It measures all trials on one seed, so that they share their noise. The best of them and the given
settings, the finalists, are then measured on other seeds, since the best of many is also the
luckiest, and the winner of these is reported on seeds that nothing was chosen by.

Study and measurements are one file in the directory of the search. Whatever process comes goes on
with it, several at a time, too.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from enat_jax.data import images
from enat_jax.evaluation import digit_table, during_training, image_sets, means
from enat_jax.inference import generator, sampler_settings, sampling, tokenization
from enat_jax.metrics import digit_quality, fid
from enat_jax.runtime.markdown import table as markdown_table

STUDY = "study.log"
FINALISTS = 3  # of the trials, beside the given settings
STARTING = 8  # trials at random, before any is learned from
REVEAL_POWERS = dict(low=0.5, high=1.5, step=0.25)  # few, as each compiles anew
FINAL_SEEDS, REPORT_SEEDS = 1, 1001  # the first of each, after that of the trials
Say = Callable[[str], None]


class Measure(Protocol):
    """What is searched for, and reported.

    Attributes:
        names: of the numbers that it gives, the one to be minimised first.
        identity: JSON values of what it depends on.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(
        self, model: generator.Generator, seed: int, final: bool = False
    ) -> dict[str, float]:
        """Draws images and measures them; ``final``: for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class Distance:
    """The distance of ``evaluate``, and precision and recall where there is enough for them."""

    quality: during_training.SampleQuality
    batch_size: int
    identity: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.removeprefix("samples/") for name in self.quality.names)

    def __call__(
        self, model: generator.Generator, seed: int, final: bool = False
    ) -> dict[str, float]:
        quality = self.quality
        drawn = image_sets.of_generator(model, quality.num, seed, self.batch_size, quality.network)
        found = quality.measure(drawn.load, len(model.class_names))
        return {name.removeprefix("samples/"): value for name, value in found}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Fréchet distance and class accuracy as ``evaluate_digits`` has them.

    Minimised is the distance plus the share of images that the classifier does not name as it
    should. Trials are compared with the training digits, the report with held-out ones.
    """

    num: int
    batch_size: int
    training: tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]
    held_out: Float[np.ndarray, "m d"]
    identity: dict[str, Any]
    names = ("distance_and_errors", "frechet_distance", "class_accuracy")

    @classmethod
    def of(cls, model: generator.Generator, num: int, batch_size: int) -> "Digits":
        """Opens the digits as the tokenizer takes them."""
        digit_quality.balanced_labels(num, len(model.class_names))
        settings = tokenization.source_settings(model.tokenizer, "digits")
        sources = [images.open_source("digits", split, **settings) for split in ("train", "test")]
        found = []
        for source in sources:
            batch = source.gather(np.arange(len(source)))
            found.append((digit_table.features(batch["images"]), batch["labels"]))
        return cls(num, batch_size, found[0], found[1][0], {"digits": num})

    def __call__(
        self, model: generator.Generator, seed: int, final: bool = False
    ) -> dict[str, float]:
        labels = digit_quality.balanced_labels(self.num, len(model.class_names))
        drawn = model.sample(labels, seed=seed, batch_size=self.batch_size)
        own = digit_table.features(drawn)
        accuracy = digit_quality.class_accuracy(
            own, labels, *self.training, digit_table.NUM_NEIGHBOURS
        )
        compared = self.held_out if final else self.training[0]
        distance = fid.frechet_distance(
            *fid.gaussian_statistics(own), *fid.gaussian_statistics(compared)
        )
        return dict(zip(self.names, (distance + 1 - accuracy, distance, accuracy), strict=True))


def make_measure(
    model: generator.Generator,
    reference: str,
    features: str,
    num: int,
    batch_size: int,
    *,
    inception: str | None = None,
    split: str = "train",
) -> Measure:
    """Makes what command lines name.

    Args:
        model: of classes.
        reference: of ``evaluate``, or "digits".
        features: of ``evaluate``, or "digits".
        num: images of a measurement.
        batch_size: images that are drawn at a time.
        inception: weights of Inception.
        split: of pictures.

    Raises:
        ValueError: these do not go together, or are too few.
    """
    if features == "digits":
        if reference != "digits":
            raise ValueError("--features digits compares with digits: give --reference digits")
        return Digits.of(model, num, batch_size)
    if num < (least := max(10, len(model.class_names))):
        raise ValueError(f"--num {num} is too few images for a distance: give {least} or more")
    asked = dict(reference=reference, features=features, num=num, inception=inception, split=split)
    quality = during_training.make(ml_collections.ConfigDict(asked), model.tokenizer, "--")
    assert quality is not None
    identity = asked | {"inception": None, "features": quality.network.description}
    return Distance(quality, batch_size, identity)


# --- what is tried --------------------------------------------------------------------------------


def settings_of(
    base: sampling.Settings, parameters: Mapping[str, Any], num_tokens: int
) -> sampling.Settings:
    """Returns settings with values of every step, made from few numbers.

    With s of t steps done, ``floor(l cos(pi / 2 (s / t) ** reveal_power))`` tokens are masked;
    guidance is ``guidance_scale (s / t) ** guidance_power``, and the temperatures of the step are
    their ``scale (1 - (s + 1) / t) ** power``. All powers at 1 are the schedules of the paper.

    Args:
        base: gives the number of steps and of segments.
        parameters: as ``suggested`` returns them.
        num_tokens: l.
    """
    t = base.num_steps
    share = np.arange(t + 1) / t
    left = np.floor(num_tokens * np.cos(np.pi / 2 * share ** parameters["reveal_power"]))
    left[0], left[-1] = num_tokens, 0
    remaining = 1 - share[1:]

    def of_steps(name: str, shares: Float[np.ndarray, " t"]) -> tuple[float, ...]:
        values = parameters[f"{name}_scale"] * shares ** parameters[f"{name}_power"]
        return tuple(np.round(values, 6).tolist())

    noise = "mask_scale" in parameters
    return dataclasses.replace(
        base,
        order=parameters["order"],
        counts=tuple((-np.diff(left)).astype(int).tolist()),
        guidance=of_steps("guidance", share[:-1]),
        token_temperatures=of_steps("token", remaining),
        mask_temperatures=of_steps("mask", remaining) if noise else (0.0,) * t,
    )


def start(base: sampling.Settings, order: str) -> dict[str, Any]:
    """Returns the parameters that come nearest to given settings, with another order."""
    power = {"linear": 1.0, "cosine": 1.5}.get(base.guidance_schedule, 0.0)
    found = {
        "order": order,
        "reveal_power": 1.0,
        "guidance_scale": base.guidance_scale,
        "guidance_power": power,
        "token_scale": base.token_temperature,
        "token_power": 1.0,
    }
    if order == "confidence":
        found |= {"mask_scale": base.mask_temperature, "mask_power": 1.0}
    return found


def suggested(trial: Any, base: sampling.Settings) -> dict[str, Any]:
    """Returns what Optuna's ``trial`` suggests: scales from half to twice those of ``base``."""

    def scale(name: str, value: float) -> float:
        name = f"{name}_scale"
        if value == 0:
            return trial.suggest_float(name, 0.0, 1.0)
        return trial.suggest_float(name, value / 2, value * 2, log=True)

    def power(name: str) -> float:
        return trial.suggest_float(f"{name}_power", 0.5, 2.0, log=True)

    found = {
        "order": trial.suggest_categorical("order", ("confidence", "halton")),
        "reveal_power": trial.suggest_float("reveal_power", **REVEAL_POWERS),
        "guidance_scale": scale("guidance", base.guidance_scale),
        "guidance_power": trial.suggest_float("guidance_power", 0.0, 2.0),
        "token_scale": scale("token", base.token_temperature),
        "token_power": power("token"),
    }
    if found["order"] == "confidence":
        found |= {
            "mask_scale": scale("mask", base.mask_temperature),
            "mask_power": power("mask"),
        }
    return found


# --- the search -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Search:
    """A search in a directory, which may be under way in other processes, too.

    Attributes:
        model: with the settings that are to be bettered.
        measure: of what is drawn.
        out: the directory.
        seed: of the trials; the finalists and the report have seeds after it.
        repeats: seeds of each finalist, and of each row of the report; at least 2.
        say: called with what was found.
    """

    model: generator.Generator
    measure: Measure
    out: pathlib.Path
    seed: int
    repeats: int
    say: Say

    @functools.cached_property
    def study(self) -> Any:
        """Optuna's study in ``out``, created or found."""
        import optuna
        from optuna.storages import journal

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Absolute, as its lock is a link to it.
        backend = journal.JournalFileBackend(str((self.out / STUDY).absolute()))
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="sampler",
            load_if_exists=True,
        )

    def run(self, num_trials: int) -> None:
        """Tries settings until ``num_trials`` of them are measured, by whomever."""
        import optuna

        base = self.model.settings
        for order in ("confidence", "halton"):
            self.study.enqueue_trial(start(base, order), skip_if_exists=True)
        while len(done := self._complete()) < num_trials:
            trial = self.study.ask()
            # What a trial suggests depends on its number and on those before it alone.
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTING, seed=(self.seed + 7919 * trial.number) % 2**32
            )
            try:
                found = suggested(trial, base)
                settings = settings_of(base, found, self.model.model.num_tokens)
                values = self.measure(self._with(settings), self.seed)
            except BaseException:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            value = values[self.measure.names[0]]
            trial.set_user_attr("measured", values)
            self.study.tell(trial, value)
            best = min([value, *(x.value for x in done)])
            self.say(
                f"trial {len(done) + 1} of {num_trials}: {self._words(values)} ({found['order']}); "
                f"best {best:.4g}"
            )

    def _complete(self) -> list[Any]:
        return [x for x in self.study.get_trials(deepcopy=False) if x.state.name == "COMPLETE"]

    def _with(self, settings: sampling.Settings) -> generator.Generator:
        return dataclasses.replace(self.model, settings=settings)

    def _words(self, values: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {values[name]:.4g}" for name in self.measure.names)

    def winner(self) -> tuple[str, sampling.Settings]:
        """Returns the best of the finalists by its name, measured on seeds of their own."""
        base = self.model.settings
        finalists = {"default": base}
        for trial in sorted(self._complete(), key=lambda x: x.value)[:FINALISTS]:
            settings = settings_of(base, trial.params, self.model.model.num_tokens)
            finalists[f"trial {trial.number}"] = settings
        means_ = {
            name: self.values(settings, FINAL_SEEDS, False)[:, 0].mean()
            for name, settings in finalists.items()
        }
        for name, value in means_.items():
            self.say(f"finalist {name}: {self.measure.names[0]} {value:.4g}")
        best = min(means_, key=lambda name: means_[name])
        return best, finalists[best]

    def values(
        self, settings: sampling.Settings, first: int, final: bool
    ) -> Float[np.ndarray, "repeats names"]:
        """Returns what settings measure on seeds from ``first`` on, which the study keeps."""
        rows = []
        for seed in range(self.seed + first, self.seed + first + self.repeats):
            key = f"{seed} {final} {sorted(settings.described().items())}"
            known = self.study.user_attrs.get(key)
            if known is None:
                known = self.measure(self._with(settings), seed, final)
                self.study.set_user_attr(key, known)
                self.say(f"{'report' if final else 'finalist'}, seed {seed}: {self._words(known)}")
            rows.append([known[name] for name in self.measure.names])
        return np.array(rows)

    def report(self, found: sampling.Settings) -> list["Row"]:
        """Returns the rows of the report, on seeds that nothing was chosen by."""
        base = self.model.settings
        settings = {
            "default": base,
            "default, Halton's order": dataclasses.replace(base, order="halton"),
            "searched": found,
        }
        if base.num_steps > 1 and all(
            getattr(base, name) is None for name in sampler_settings.OF_STEPS
        ):
            settings["default, half the steps"] = dataclasses.replace(
                base, num_steps=base.num_steps // 2
            )
        rows: list[Row] = []
        for name, one in settings.items():
            values = self.values(one, REPORT_SEEDS, True)
            rows.append(Row(name, one.num_steps, one.order, self.measure.names, values.tolist()))
            figures = dict(zip(self.measure.names, values.mean(axis=0), strict=True))
            self.say(f"{name}: {self._words(figures)}")
        return rows


# --- the report -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What some settings are worth: ``values`` of each seed by ``names``."""

    name: str
    num_steps: int
    order: str
    names: tuple[str, ...]
    values: list[list[float]]


def markdown(rows: Sequence[Row], images: int) -> str:
    """Returns the table of the report; the first row is what the others are compared with.

    Args:
        rows: of the report.
        images: of each seed.
    """
    first, *_ = rows
    lowered = first.names[0]
    base = np.array(first.values)[:, 0]
    cells = []
    for row in rows:
        values = np.array(row.values)
        found, change = means.mean_and_error(values), values[:, 0] - base
        difference = "" if row is first else means.text(means.mean_and_error(change), sign="+")
        figures = [means.text(found, i) for i in range(len(row.names))]
        cells.append([row.name, row.num_steps, row.order, *figures, difference])
    titles = ["settings", "steps", "order", *first.names, f"{lowered} less that of the default"]
    return "\n".join(
        [
            markdown_table(titles, cells, align="lrl" + "r" * (len(first.names) + 1)),
            "",
            f"Means over {len(first.values)} seeds of {images:,} images each, with their standard "
            f"errors; {lowered} was minimised, on other seeds. The last column is paired: all rows "
            "have the same seeds.",
        ]
    )
