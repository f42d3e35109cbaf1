"""Settings of the sampler: what they may be, and how they are written to files and read again."""

import dataclasses
import math
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from enat_jax.inference import guidance
from enat_jax.runtime import files

MAX_STEPS = 4096  # four times the tokens of the largest model; the rest would reveal nothing
MAX_VALUE = 1e6  # of temperatures and the guidance scale; float32 overflows far beyond it
ORDERS = ("confidence", "halton", "random")
# Values of single steps, and the settings that have no effect beside them.
OF_STEPS: dict[str, tuple[str, ...]] = {
    "counts": (),
    "guidance": ("guidance_scale", "guidance_schedule", "guidance_interval"),
    "token_temperatures": ("token_temperature",),
    "mask_temperatures": ("mask_temperature",),
}
LATER = ("order", *OF_STEPS)  # settings that files of earlier versions do not have


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the sampler; the defaults are the reference's for ENAT-L on ImageNet-256.

    Attributes:
        num_steps: t, from 1 to 4096. More steps than tokens are allowed; some steps
            then reveal nothing (so do the first steps when t is little below l).
        guidance_scale: of classifier-free guidance, which adds weight * (conditional -
            unconditional) to the conditional logits. 0: no unconditional branch.
        guidance_schedule: weight of step s = 0 ... t - 1: "linear": ``scale * s / t``, the
            reference's, which never reaches the scale; "constant": the scale; "cosine":
            ``scale * (1 - cos(pi * s / t)) / 2``, slower than linear first and faster later;
            "interval": the scale while ``low <= s / t < high`` and nothing outside, where the
            unconditional branch is not decoded (Kynkäänniemi et al. 2024, arXiv 2404.07724, who
            cut noise levels; here it is a share of the steps).
        guidance_interval: (low, high), 0 <= low < high <= 1; only "interval" has a use for it.
        token_temperature: the reference's ``samp_temp``; falls linearly to 0. 0: argmax.
        mask_temperature: the reference's ``mask_temp``, scale of the Gumbel noise on the
            confidences; falls linearly to 0. 0: no noise.
        num_segments: compiled bodies; 1 compiles fastest and pads most, ``num_steps`` pads
            nothing. None: what takes least time for the images that are drawn, see
            ``sampler_schedule.make``, and no more than 16.
        order: in which the tokens of an image are revealed: "confidence", the paper's, the most
            confident first; "halton", the order of ``reveal.halton_order``, the same for all
            images and without noise, so that ``mask_temperature`` has no effect; "random".
        counts: tokens revealed in each step, in place of the cosine schedule; they add up to l.
            In editing they apply in proportion to the tokens that are masked.
        guidance: weight of guidance at each step; the scale and its schedule then have no effect.
        token_temperatures: of each step, in place of ``token_temperature`` and its fall; 0 is
            1e-3, as in the reference's last step, unless all are 0: argmax.
        mask_temperatures: of each step, in place of ``mask_temperature`` and its fall.
    """

    num_steps: int = 8
    guidance_scale: float = 2.5
    token_temperature: float = 6.0
    mask_temperature: float = 1.5
    num_segments: int | None = None
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    order: str = "confidence"
    counts: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    token_temperatures: tuple[float, ...] | None = None
    mask_temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_segments"):
            value = getattr(self, name)
            if value is None and name == "num_segments":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_steps > MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be at most {MAX_STEPS}")
        for name in ("guidance_scale", "token_temperature", "mask_temperature"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= MAX_VALUE:
                raise ValueError(f"{name}={value!r} must be a number from 0 to {MAX_VALUE:,.0f}")
        if self.guidance_schedule not in guidance.SCHEDULES:
            known = ", ".join(guidance.SCHEDULES)
            raise ValueError(f"guidance_schedule={self.guidance_schedule!r} is none of {known}")
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is none of {', '.join(ORDERS)}")
        for name in OF_STEPS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _of_steps(name, value, self.num_steps))
        guided = self.guidance_weights() > 0
        by_interval = self.guidance_schedule == "interval" and self.guidance is None
        if by_interval and self.guidance_scale > 0 and not guided.any():
            raise ValueError(
                f"guidance_interval={self.guidance_interval} has none of the {self.num_steps} "
                "steps in it: widen it, or turn guidance off by guidance_scale=0"
            )

    def guidance_weights(self) -> Float[np.ndarray, " t"]:
        """Weight of guidance at each step, float64."""
        if self.guidance is not None:
            return np.array(self.guidance)
        return guidance.weights(
            self.guidance_schedule, self.guidance_scale, self.guidance_interval, self.num_steps
        )

    def temperatures(self) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """Temperatures of tokens and of confidences at each step, float64."""
        remaining = 1 - np.arange(1, self.num_steps + 1) / self.num_steps
        falling = self.token_temperature * remaining, self.mask_temperature * remaining
        given = self.token_temperatures, self.mask_temperatures
        token, mask = (x if y is None else np.array(y) for x, y in zip(falling, given, strict=True))
        return token, mask

    @property
    def greedy(self) -> bool:
        """Whether tokens are the most probable ones."""
        of_steps = self.token_temperatures
        return self.token_temperature == 0 if of_steps is None else not any(of_steps)

    @property
    def noisy_order(self) -> bool:
        """Whether there is noise in the order."""
        if self.order != "confidence":
            return self.order == "random"
        of_steps = self.mask_temperatures
        return self.mask_temperature > 0 if of_steps is None else any(of_steps)

    def check_counts(self, num_tokens: int) -> None:
        """Raises ValueError unless ``counts`` reveal the ``num_tokens`` tokens of a model."""
        if self.counts is not None and sum(self.counts) != num_tokens:
            raise ValueError(
                f"counts reveal {sum(self.counts)} tokens in all, and an image of this model has "
                f"{num_tokens}: they must add up to {num_tokens}"
            )

    def described(self) -> dict[str, Any]:
        """Returns the values for a file.

        What earlier versions did not have is left out where it has its default, so that such files
        stay as they were.
        """
        values = dataclasses.asdict(self)
        for name in LATER:
            if values[name] == getattr(Settings, name):
                del values[name]
        return values


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads settings, by their names, from a file of JSON.

    Args:
        path: of a file that has the settings alone, or of one that has them as ``sampler``, as
            ``settings.json`` of drawn images and of a search, ``model.json`` and ``card.json`` do.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no settings, or unknown ones.
    """
    values = files.read_json(path, "give a file of settings of the sampler")
    if isinstance(values, dict) and isinstance(values.get("sampler"), dict):
        values = values["sampler"]
    known = [field.name for field in dataclasses.fields(Settings)]
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f'{path} holds no settings of the sampler: give JSON such as {{"num_steps": 8}}'
        )
    for name in values:
        if name not in known:
            raise ValueError(
                f"{path}: {name!r} is no setting of the sampler; there are {', '.join(known)}"
            )
    return values


def changed(
    settings: Settings,
    path: pathlib.Path | None,
    given: Mapping[str, Any] = types.MappingProxyType({}),
) -> Settings:
    """Returns settings with those of a file, and others of the command line, in place of theirs.

    A file that names ``num_steps`` is taken for whole: order and values of single steps that it
    does not name are the defaults, and not those of ``settings``.

    Args:
        settings: that are changed.
        path: of the file, as for ``read``; None: no file.
        given: settings by their names.

    Raises:
        OSError: the file cannot be read.
        ValueError: a setting is unknown, out of range, or has no effect beside others.
    """
    values = dataclasses.asdict(settings)
    if path is not None:
        found = read(path)
        if "num_steps" in found:
            values |= {name: getattr(Settings, name) for name in LATER}
        values |= found
        try:
            Settings(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    for of_steps, names in OF_STEPS.items():
        if values[of_steps] is not None and (useless := [x for x in names if x in given]):
            raise ValueError(
                f"{useless[0]}={given[useless[0]]} has no effect, as the settings have "
                f"{of_steps} of each step: leave it out, or give a file of settings without them"
            )
    return Settings(**values | dict(given))


def _of_steps(name: str, values: Any, num_steps: int) -> tuple[Any, ...]:
    """Returns the values of single steps, checked; raises ValueError if they are wrong."""
    kind, what = (int, "whole numbers") if name == "counts" else (float, "numbers")
    kinds = (int, np.integer) if name == "counts" else (int, float, np.integer, np.floating)
    listed = isinstance(values, (list, tuple, np.ndarray))
    if not listed or not all(
        isinstance(x, kinds) and not isinstance(x, bool) and 0 <= x <= MAX_VALUE for x in values
    ):
        raise ValueError(
            f"{name}={values!r} must be a list of {what} from 0 to {MAX_VALUE:,.0f}, one for each "
            "step"
        )
    if len(values) != num_steps:
        raise ValueError(
            f"{name} has {len(values)} values, and num_steps is {num_steps}: give one for each step"
        )
    if name == "counts" and not any(values):
        raise ValueError("counts are all 0: they must add up to the tokens of an image")
    return tuple(kind(x) for x in values)


def _interval(value: Any) -> tuple[float, float]:
    """A checked guidance interval, hashable whether it was written as a tuple or read as a list."""
    try:
        low, high = (float(x) for x in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval={value!r} must be two numbers, low and high, with "
            "0 <= low < high <= 1"
        )
    return low, high
