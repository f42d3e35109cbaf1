"""What judges a tokenizer's reconstructions beside their pixels: two further networks.

A perceptual network is trained already and stays as it is. Its weights are an argument of the step
and in no checkpoint. A discriminator learns along, by an optimizer of its own, to tell pictures
from reconstructions; it and its optimizer are in ``TrainState.extra``. Tokenizer and discriminator
are updated at once, each from the other as it was before the step. Before its first step a
discriminator costs nothing: the step is compiled once without it and once with it.

The recipe is that of VQGAN+ (MaskBit, arXiv:2409.16211), whose numbers are the defaults.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from enat_jax.checkpoints import model_files
from enat_jax.evaluation import perceptual_weights
from enat_jax.models import discriminator, losses, perceptual
from enat_jax.runtime import agreement, numerics
from enat_jax.training import optim
from enat_jax.training.task import Metrics

Images = Float[Array, "b h w c"]
Term = tuple[float | Float[Array, ""], Callable[[Images], Float[Array, ""]]]  # weight, loss
_START, _RAMP = 0.1, 0.02  # shares of a run, where the config leaves them open


# --- the perceptual network -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """The perceptual term of a tokenizer's loss, the section ``perceptual`` of a config.

    Attributes:
        kind: of the network, such as "lpips_vgg", see ``models/perceptual.py``; None: no term.
        weights: the file that has its weights; where they are in several, joined by commas.
        weight: of the distance between pictures and reconstructions; 0: no term. Logits take 0.1
            (arXiv:2409.16211), LPIPS 1.0 beside a squared error of weight 4.
        least_side: pixels of a side that smaller pictures are enlarged to.
    """

    kind: str | None = None
    weights: str | None = None
    weight: float = 0.1
    least_side: int = 64

    def __post_init__(self) -> None:
        if self.kind not in (None, *perceptual.KINDS):
            raise ValueError(
                f"perceptual.kind={self.kind!r} is unknown: one of {', '.join(perceptual.KINDS)}"
            )
        if not self.weight >= 0:
            raise ValueError(f"perceptual.weight={self.weight!r} must not be negative")
        if self.least_side < 1:
            raise ValueError(f"perceptual.least_side={self.least_side!r} must be at least 1")
        if self.weights and self.kind is None:
            raise ValueError(
                f"perceptual.weights={self.weights} has no use without a network: give "
                f"--config.perceptual.kind, one of {', '.join(perceptual.KINDS)}"
            )

    def make(self, channels: int, dtype: str) -> "PerceptualLoss | None":
        """Returns the loss with its weights; None if there is no such term.

        Every process must call this: all of them must have read the same weights.

        Args:
            channels: of the pictures.
            dtype: of the network's convolutions.

        Raises:
            FileNotFoundError: there is no such file of weights.
            ValueError: none is named, or it does not suit the network, or the pictures do not.
        """
        if self.kind is None or not self.weight:
            return None
        if channels != 3:
            raise ValueError(
                f"perceptual.kind={self.kind!r} judges pictures of 3 channels and data.channels "
                f"is {channels}: leave the term out by --config.perceptual.kind=None"
            )
        if not self.weights:
            raise ValueError(
                f"perceptual.kind={self.kind!r} needs its weights: give "
                f"--config.perceptual.weights=FILE, {perceptual_weights.SOURCES[self.kind].files}; "
                "configs/README.md says where to get them"
            )
        params = perceptual_weights.load(self.kind, self.weights)
        fingerprint = model_files.fingerprint(params)
        found = agreement.gather(lambda: fingerprint)
        if len(set(found)) > 1:
            shown = ", ".join(f"process {i}: {x}" for i, x in enumerate(found))
            raise ValueError(
                f"perceptual.weights={self.weights} is not the same file on all hosts ({shown}): "
                "give each a copy of one file"
            )
        return PerceptualLoss(self, model_files.cast(params, dtype), fingerprint)


@dataclasses.dataclass(frozen=True, eq=False)
class PerceptualLoss:
    """The distance of reconstructions to their pictures in the features of a network.

    Attributes:
        settings: of the term.
        params: of the network, numpy arrays in the dtype of its convolutions.
        fingerprint: SHA-256 of the parameters in float32.
    """

    settings: Perceptual
    params: PyTree
    fingerprint: str

    @property
    def measures(self) -> tuple[str, ...]:
        """What evaluation calls the distance; nothing where it is no measure of its own."""
        return ("lpips",) if self.settings.kind in ("lpips_vgg", "lpips_alex") else ()

    def distances(self, params: PyTree, images: Images, others: Images) -> Float[Array, " b"]:
        """Returns the distance of each pair of pictures in [0, 1], float32; pure."""
        assert self.settings.kind is not None
        return perceptual.distance(
            self.settings.kind, params, images, others, least_side=self.settings.least_side
        )

    def term(self, params: PyTree, images: Images) -> Term:
        """Returns the weight of the mean distance, and it as a function of reconstructions."""
        return self.settings.weight, lambda made: self.distances(params, images, made).mean()


# --- the discriminator ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """A tokenizer's discriminator, the section ``discriminator`` of a config.

    Attributes:
        weight: of what it says in the tokenizer's loss; 0: no discriminator. VQGAN+ has 0.02.
        kind: of the network, see ``models/discriminator.py``.
        channels: of its first convolution; None: as many as the tokenizer has.
        stages: of the network, each of which halves the grid; None: as the size of pictures asks.
        loss: "hinge" or "non_saturating".
        start: step from which on the tokenizer learns from it; None: a tenth of the run.
        lead_steps: how much earlier it begins to learn itself; None: for its warm-up.
        ramp_steps: over which ``weight`` is reached; None: a fiftieth of the run.
        lecam: weight of LeCam's regulariser in its own loss.
        penalty: weight of its gradient penalty, R1; 0: none.
        penalty_every: steps between penalties, each of which counts so many times.
    """

    weight: float = 0.0
    kind: str = "vqgan_plus"
    channels: int | None = None
    stages: int | None = None
    loss: str = "hinge"
    start: int | None = None
    lead_steps: int | None = None
    ramp_steps: int | None = None
    lecam: float = 0.001
    penalty: float = 0.0
    penalty_every: int = 16

    def __post_init__(self) -> None:
        if self.kind not in discriminator.KINDS:
            raise ValueError(
                f"discriminator.kind={self.kind!r} is unknown: one of "
                f"{', '.join(discriminator.KINDS)}"
            )
        if self.loss not in losses.ADVERSARIAL:
            raise ValueError(
                f"discriminator.loss={self.loss!r} is unknown: one of "
                f"{', '.join(losses.ADVERSARIAL)}"
            )
        for name in ("weight", "start", "lead_steps", "ramp_steps", "lecam", "penalty"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"discriminator.{name}={value!r} must not be negative")
        for name in ("channels", "stages", "penalty_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"discriminator.{name}={value!r} must be at least 1")

    def first_step(self, num_steps: int, optimizer: optim.Optimizer) -> tuple[int, int]:
        """Returns the discriminator's first step, and the first that the tokenizer learns from it.

        Raises:
            ValueError: a run of ``num_steps`` ends before.
        """
        start = int(_START * num_steps) if self.start is None else self.start
        if start >= num_steps:
            raise ValueError(
                f"discriminator.start={start} must come before the end of the run of train."
                f"num_steps={num_steps}: give --config.discriminator.start="
                f"{int(_START * num_steps)}, or --config.discriminator.weight=0 for none"
            )
        if self.lead_steps is None:
            return max(0, start - optimizer.warmup_steps), start
        if self.lead_steps > start:
            raise ValueError(
                f"discriminator.lead_steps={self.lead_steps} are more than the "
                f"discriminator.start={start} steps before which they lie"
            )
        return start - self.lead_steps, start

    def make(
        self,
        optimizer: optim.Optimizer,
        num_steps: int,
        size: tuple[int, int],
        *,
        channels: int,
        dtype: str,
    ) -> "Adversary | None":
        """Returns what trains a discriminator; None if there is none.

        Args:
            optimizer: of the discriminator.
            num_steps: of the whole run.
            size: height and width of pictures.
            channels: of the tokenizer.
            dtype: of the convolutions.

        Raises:
            ValueError: the discriminator suits neither the run nor the pictures.
        """
        if not self.weight:
            return None
        first, start = self.first_step(num_steps, optimizer)
        ramp = int(_RAMP * num_steps) if self.ramp_steps is None else self.ramp_steps
        try:
            rule = optimizer.make(num_steps - first)
        except ValueError as error:
            raise ValueError(
                f"config.discriminator_optimizer, for the {num_steps - first} steps from step "
                f"{first} on: {error}"
            ) from error
        network = discriminator.make(
            *(self.kind, size), channels=self.channels or channels, stages=self.stages, dtype=dtype
        )
        return Adversary(self, network, rule, first, start, ramp)


@dataclasses.dataclass(frozen=True)
class Optimizer(optim.Optimizer):
    """The optimizer of the discriminator, the section ``discriminator_optimizer`` of a config.

    Its steps are counted from the discriminator's first one on. The defaults are VQGAN+'s, but for
    warm-up and schedule.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Adversary:
    """A discriminator and how it is trained. All methods are pure but ``static``.

    What they call ``kept`` is ``TrainState.extra``. Its own of that are "discriminator", a dict of
    "params" and "opt_state", and "lecam", the moving averages of its mean logits of pictures and
    of reconstructions.

    Attributes:
        settings: of the discriminator.
        network: whose logits are positive for what it takes for a picture.
        optimizer: of optax.
        first: step at which it begins to learn.
        start: step from which on the tokenizer learns from it.
        ramp: steps over which its weight rises.
    """

    settings: Discriminator
    network: Any
    optimizer: optax.GradientTransformation
    first: int
    start: int
    ramp: int

    def init(self, key: Key[Array, ""], images: Images) -> dict[str, Any]:
        """Returns what it keeps, before its first step."""
        params = self.network.init(key, images)["params"]
        learner = {"params": params, "opt_state": self.optimizer.init(params)}
        return {"discriminator": learner, "lecam": jnp.zeros(2)}

    def static(self, step: int) -> tuple[bool, bool]:
        """Returns whether it learns at a step, and whether its gradient penalty is due."""
        learns = step >= self.first
        every = self.settings.penalty_every
        return learns, bool(learns and self.settings.penalty and step % every == 0)

    def term(
        self, kept: Mapping[str, Any], step: Int[Array, ""], static: tuple[bool, bool]
    ) -> Term:
        """Returns the weight of its term, and the term as a function of reconstructions."""
        if not static[0]:
            return 0.0, lambda made: jnp.zeros(())
        after = jnp.asarray(step - self.start + 1, jnp.float32)
        share = jnp.clip(after / max(1, self.ramp), 0.0, 1.0)
        apply = functools.partial(self.network.apply, {"params": kept["discriminator"]["params"]})
        kind = self.settings.loss
        return self.settings.weight * share, lambda made: losses.generator_loss(kind, apply(made))

    def gradients(
        self, kept: Mapping[str, Any], images: Images, made: Images, static: tuple[bool, bool]
    ) -> tuple[PyTree, Metrics]:
        """Returns what ``update`` needs of a batch, and metrics: zeros if it does not learn.

        Args:
            kept: as before the step.
            images: of the batch.
            made: their reconstructions, which no gradient reaches.
            static: see the method.
        """
        find = functools.partial(self._gradients, penalised=static[1])
        if static[0]:
            return find(kept, images, jax.lax.stop_gradient(made))
        shapes = numerics.eval_shape(find, kept, images, made)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _gradients(
        self, kept: Mapping[str, Any], images: Images, made: Images, *, penalised: bool
    ) -> tuple[PyTree, Metrics]:
        settings = self.settings

        def loss(params: PyTree) -> tuple[Float[Array, ""], tuple[Metrics, Array]]:
            apply = functools.partial(self.network.apply, {"params": params})
            real, fake = apply(images), apply(made)
            metrics = {
                "discriminator_loss": losses.discriminator_loss(settings.loss, real, fake),
                "lecam": losses.lecam(real.mean(), fake.mean(), kept["lecam"]),
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
                "discriminator_accuracy_real": (real > 0).mean(dtype=jnp.float32),
                "discriminator_accuracy_fake": (fake < 0).mean(dtype=jnp.float32),
            }
            total = metrics["discriminator_loss"] + settings.lecam * metrics["lecam"]
            if settings.penalty:
                metrics["gradient_penalty"] = jnp.zeros(())
            if penalised:
                # A gradient of a gradient needs float32. The mean over steps is that of a penalty
                # at every step.
                exact = functools.partial(
                    self.network.clone(dtype=jnp.float32).apply, {"params": params}
                )
                penalty = settings.penalty_every * losses.gradient_penalty(exact, images)
                metrics["gradient_penalty"] = penalty
                total += settings.penalty * penalty
            return total, (metrics, jnp.stack([real.mean(), fake.mean()]))

        grads, (metrics, logits) = jax.grad(loss, has_aux=True)(kept["discriminator"]["params"])
        metrics["discriminator_grad_norm"] = optax.tree.norm(grads)
        return {"gradients": grads, "logits": logits}, metrics

    def update(
        self, kept: Mapping[str, Any], found: PyTree, step: Int[Array, ""]
    ) -> dict[str, Any]:
        """Returns its own of ``kept`` after a step; as it is before its first one.

        Args:
            kept: as before the step.
            found: means of what ``gradients`` returned.
            step: steps done so far.
        """
        own = {"discriminator": kept["discriminator"], "lecam": kept["lecam"]}

        def updated(own: dict[str, Any]) -> dict[str, Any]:
            params, opt_state = own["discriminator"]["params"], own["discriminator"]["opt_state"]
            updates, opt_state = self.optimizer.update(found["gradients"], opt_state, params)
            learner = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
            real, fake = found["logits"]
            means = losses.updated_lecam(real, fake, own["lecam"])
            return {"discriminator": learner, "lecam": means}

        return jax.lax.cond(step >= self.first, updated, lambda own: own, own)


# --- terms of the tokenizer's loss ------------------------------------------------------------


def image_gradients(
    terms: Mapping[str, Term], made: Images
) -> tuple[Sequence[Float[Array, ""]], Images, Metrics]:
    """Returns weighted losses of reconstructions, and the gradient of their sum.

    Args:
        terms: by name.
        made: the reconstructions.

    Returns:
        ``(losses, gradient, metrics)``: of each term, times its weight; with respect to ``made``;
        of each term "NAME_loss", which is not weighted. If there are several, also the norm of the
        gradient of each, weighted, "image_gradient/NAME", and "image_gradient_share/NAME", its
        share of the sum of all norms.
    """
    weighted, found, metrics = [], {}, {}
    for name, (weight, function) in terms.items():

        def loss(
            made: Images, weight: Any = weight, function: Any = function
        ) -> tuple[Float[Array, ""], Float[Array, ""]]:
            value = function(made)
            return weight * value, value

        (value, metrics[f"{name}_loss"]), found[name] = jax.value_and_grad(loss, has_aux=True)(made)
        weighted.append(value)
    if len(found) > 1:
        norms = {name: optax.tree.norm(x) for name, x in found.items()}
        whole = jnp.maximum(functools.reduce(jnp.add, norms.values()), np.finfo(np.float32).tiny)
        metrics |= {f"image_gradient/{name}": norm for name, norm in norms.items()}
        metrics |= {f"image_gradient_share/{name}": x / whole for name, x in norms.items()}
    return weighted, functools.reduce(jnp.add, found.values()), metrics
