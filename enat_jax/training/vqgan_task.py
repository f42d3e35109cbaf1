"""Training the tokenizer: reconstruction, codebook and commitment losses (arXiv 1711.00937).

Codes that nothing is nearest to are restarted, see ``code_restarts``.
A perceptual network and a discriminator may judge reconstructions as well, see ``adversarial``. The
gradient of each term with respect to reconstructions is computed apart, and their sum goes through
the tokenizer once.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from enat_jax.inference import tokenizer
from enat_jax.models import quantizers, vqgan
from enat_jax.runtime import numerics, png
from enat_jax.training import adversarial, code_noise, code_restarts, image_task
from enat_jax.training import task as tasks
from enat_jax.training.task import Metrics, TrainState

EVALUATED = 2048  # held-out images, at most
EVALUATION = ("squared_error", "absolute_error", "psnr", "codebook_usage", "codebook_perplexity")

# What is divided over the mesh, see ``sharding.Sharding``: of a residual block's two convolutions
# the first is divided by its outputs, the second by its inputs, over "tensor". Discriminator and
# perceptual network are small and stay whole: the rules are of the encoder's and decoder's names.
RULES = (
    (r"coder/.*conv1/kernel$", (None, None, "fsdp", "tensor")),
    (r"coder/.*norm2/(scale|bias)$", ("tensor",)),
    (r"coder/.*conv2/kernel$", (None, None, "tensor", "fsdp")),
    (
        r"coder/.*(conv_in|conv_out|shortcut|(up|down)sample_\d+)/kernel$",
        (None, None, "fsdp", None),
    ),
    (r"codebook$", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Loss(code_noise.CodeNoise, code_restarts.Restarts):
    """Weights of the losses, noise on codes and the remedy against dead ones.

    Raises ValueError for an unknown kind of reconstruction loss.
    """

    reconstruction: str = "l2"  # or "l1"
    reconstruction_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25  # arXiv:1711.00937, section 3.2
    entropy_weight: float = 0.02  # of "lfq", arXiv:2409.16211; see quantizers.entropy_loss
    entropy_temperature: float = 0.01
    decoder_from: int | None = None  # from this step on codes stay, and are not swapped
    ema_decay: float = 0.0  # of the average that is evaluated and exported; 0: the parameters are

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction={self.reconstruction!r} is unknown: 'l1' or 'l2'")
        if self.decoder_from is not None and self.decoder_from < 0:
            raise ValueError(f"decoder_from={self.decoder_from!r} must not be negative")
        if not self.entropy_temperature > 0:
            raise ValueError(f"entropy_temperature={self.entropy_temperature!r} must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Task(image_task.ImageTask):
    """What ``train`` asks of a task; made by ``make``.

    Attributes:
        perceptual, adversary: further judges of reconstructions; None: none.
        accumulate: micro-batches of a step.
    """

    model: vqgan.VQGAN
    loss: Loss
    perceptual: adversarial.PerceptualLoss | None = None
    adversary: adversarial.Adversary | None = None
    accumulate: int = 1

    MEASURES = EVALUATION

    @property
    def frozen(self) -> PyTree:
        """The weights of the perceptual network; {} without one."""
        return {} if self.perceptual is None else {"perceptual": self.perceptual.params}

    def data_identity(self) -> dict[str, object]:
        """As that of all tasks, and the SHA-256 of the perceptual network's weights."""
        judge = self.perceptual
        weights = {} if judge is None else {"perceptual_weights": judge.fingerprint}
        return super().data_identity() | weights

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The state before step 0; pure, so it may be jitted or shaped by ``eval_shape``."""
        image = jnp.zeros((1, *self.source.image_shape))
        params = self.model.init(key, image)["params"]
        # A copy of its own: the state is donated, and no buffer may be donated twice.
        ema_params = jax.tree.map(jnp.copy, params) if self.loss.ema_decay else None
        extra = {"usage": jnp.zeros((self.model.codebook_size,), jnp.float32)}
        if self.adversary is not None:
            extra |= self.adversary.init(jax.random.fold_in(key, 1), image)
        return tasks.initial_state(params, self.optimizer, ema_params=ema_params, extra=extra)

    def shapes(self, index: int) -> tuple[Hashable, dict[str, np.int32]]:
        """Whether the discriminator takes part in micro-batch ``index``, and its penalty."""
        if self.adversary is None:
            return (), {}
        return self.adversary.static(index // self.accumulate), {}

    def prepare(
        self, state: TrainState, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        """Moves dead codes before a step where that is due."""
        images = tokenizer.to_float(batch["images"])
        state, restarted = self._restart_dead_codes(state, images, key)
        return state, {"codes_restarted": restarted}

    def gradients(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        traced: Mapping[str, Array],
        key: Key[Array, ""],
        *,
        static: Any,
        frozen: PyTree,
    ) -> tuple[PyTree, Metrics, PyTree]:
        """Gradients of one batch, float32 scalars, and what ``update`` needs.

        That is the share of positions of each code and, with a discriminator, what
        ``Adversary.update`` needs.
        """
        del traced
        images, noise = tokenizer.to_float(batch["images"]), self._code_noise(state.step)
        forward = lambda params: self._forward(params, images, key, noise)  # noqa: E731
        (made, of_codes), back, (metrics, counts) = jax.vjp(forward, state.params, has_aux=True)
        extra = {"share": counts / counts.sum()}
        terms = {"reconstruction": self._reconstruction_term(images)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.term(frozen["perceptual"], images)
        if self.adversary is not None:
            terms["adversarial"] = self.adversary.term(state.extra, state.step, static)
            extra["adversary"], found = self.adversary.gradients(state.extra, images, made, static)
            metrics |= found
        (first, *others), gradient, found = adversarial.image_gradients(terms, made)
        (grads,) = back((gradient, tuple(jnp.ones(()) for _ in of_codes)))
        loss = functools.reduce(jnp.add, (first, *of_codes, *others))
        return grads, metrics | found | {"loss": loss}, extra

    def update(self, state: TrainState, grads: PyTree, extra: PyTree) -> TrainState:
        """Applies the optimizer's update; the step is not counted here."""
        decay = self.loss.usage_decay
        usage = decay * state.extra["usage"] + (1 - decay) * extra["share"]
        updated = tasks.apply_gradients(state, self.optimizer, grads)
        if self.model.projection:  # its table has no gradient, but weight decay would shrink it
            frozen = {"codebook": state.params["codebook"]}
            updated = updated.replace(params=updated.params | frozen)
        if (last := self.loss.decoder_from) is not None:
            fixed = {k: v for k, v in state.params.items() if k != "decoder"}
            new = {name: updated.params[name] for name in fixed}
            fixed = jax.tree.map(lambda x, old: jnp.where(state.step < last, x, old), new, fixed)
            updated = updated.replace(params=updated.params | fixed)
        kept = state.extra | {"usage": usage}
        if self.adversary is not None:
            kept |= self.adversary.update(state.extra, extra["adversary"], state.step)
        if self.loss.ema_decay:
            # Steps that were not finite made no update.
            warming = tasks.warming_decay(self.loss.ema_decay, state.step - state.skipped)
            updated = tasks.average(updated, warming)
        return updated.replace(extra=kept)

    def _apply(self, params: PyTree) -> Callable[..., Any]:
        return functools.partial(self.model.apply, {"params": params})

    def _code_noise(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        share = self.loss.share_at(step)
        if self.loss.decoder_from is None or not self.loss.code_noise:
            return share
        return jnp.where(step < self.loss.decoder_from, share, 0.0)

    def _reconstruction_term(self, images: Float[Array, "b h w c"]) -> adversarial.Term:
        l1 = self.loss.reconstruction == "l1"

        def loss(made: Float[Array, "b h w c"]) -> Float[Array, ""]:
            error = made - images
            return jnp.abs(error).mean() if l1 else jnp.square(error).mean()

        return self.loss.reconstruction_weight, loss

    def _forward(
        self,
        params: PyTree,
        images: Float[Array, "b h w c"],
        key: Key[Array, ""],
        code_noise: float | Float[Array, ""],
    ) -> tuple[
        tuple[Float[Array, "b h w c"], tuple[Float[Array, ""], ...]],
        tuple[Metrics, Float[Array, " v"]],
    ]:
        """Reconstructions and the weighted losses of codes, and what has no gradient.

        That is (metrics, how many positions each code wins).
        """
        apply = self._apply(params)
        z = apply(images, method="encode")
        features = apply(z, method="features")
        ids, codes = apply(z, method="quantize")
        # The decoder sees the codes, the encoder gets the decoder's gradient.
        decoded = quantizers.passed(features, codes, self.model.gradient)
        if self.loss.code_noise:
            table = apply(method="code_table")
            decoded = self.loss.swapped(decoded, codes, ids, table, code_noise, key)
        made = apply(decoded, method="decode")
        temperature = self.loss.entropy_temperature
        metrics = quantizers.losses(self.model.quantizer, features, codes, temperature)
        weights = (getattr(self.loss, name.replace("_loss", "_weight")) for name in metrics)
        losses = tuple(w * x for w, x in zip(weights, metrics.values(), strict=True))
        counts = vqgan.count_codes(ids, self.model.codebook_size)
        usage, perplexity = vqgan.code_statistics(counts)
        metrics |= {"codebook_usage": usage, "codebook_perplexity": perplexity}
        metrics["code_norm_ratio"] = optax.tree.norm(codes) / optax.tree.norm(features)
        return (made, losses), (metrics, counts)

    def _restart_dead_codes(
        self, state: TrainState, images: Float[Array, "b h w c"], key: Key[Array, ""]
    ) -> tuple[TrainState, Float[Array, ""]]:
        """The state and the number of codes moved, before this step's update."""
        usage = state.extra["usage"]
        if not self.loss.restart_every:
            return state, jnp.zeros(())
        due = self.loss.due(state.step, self.loss.decoder_from)

        def restart(codebook: Float[Array, "v e"]) -> code_restarts.Restarted:
            apply = self._apply(state.params)
            z = apply(images, method="encode")
            _, codes = apply(z, method="quantize")
            z = apply(z, method="features")
            return self.loss.restarted(codebook, usage, z, codes, key)

        none = jnp.zeros(usage.shape, bool)
        codebook, usage, dead = jax.lax.cond(
            due, restart, lambda c: (c, usage, none), state.params["codebook"]
        )
        params, extra = {**state.params, "codebook": codebook}, state.extra | {"usage": usage}
        state = state.replace(params=params, extra=extra)
        if self.loss.ema_decay:
            state = code_restarts.moved_everywhere(state, dead)
        return state, dead.sum().astype(jnp.float32)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the numbers that ``evaluate`` gives."""
        measures = () if self.perceptual is None else self.perceptual.measures
        return super().evaluated + tuple(f"held_out/{name}" for name in measures)

    def evaluate(
        self, state: TrainState, mesh: jax.sharding.Mesh, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Held-out reconstruction errors (of pixels in [0, 1]) and the use of the codebook.

        With LPIPS as the perceptual network its mean distance, too.
        """
        squared, absolute, pixels = 0.0, 0.0, 0
        distances = []
        counts = np.zeros(self.model.codebook_size)
        for rows in self.held_out_batches(EVALUATED, few):
            originals = rows["images"]
            reconstruction, ids = self._reconstructed(state, originals, mesh)
            if len(self.evaluated) > len(EVALUATION):
                distances.append(self._distances(originals, reconstruction, mesh))
            error = reconstruction - originals / 255.0
            squared += np.square(error).sum()
            absolute += np.abs(error).sum()
            pixels += error.size
            counts += np.bincount(ids.ravel(), minlength=self.model.codebook_size)
        usage, perplexity = vqgan.code_statistics(counts)
        psnr = -10 * np.log10(squared / pixels)
        values = [squared / pixels, absolute / pixels, psnr, usage, perplexity]
        if distances:
            values.append(np.concatenate(distances).mean())
        yield from zip(self.evaluated, map(float, values), strict=True)

    def images(
        self, state: TrainState, mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[str, np.ndarray]]:
        """A uint8 picture [h, w, c]: rows of held-out originals above their reconstructions."""
        columns, rows = min(8, self.batch_size), 4
        # Fewer images than places are repeated.
        chosen = np.linspace(0, len(self.held_out) - 1, rows * columns).astype(np.int64)
        pictures = []
        for indices in np.split(chosen, rows):
            originals = self.held_out.gather(indices)["images"]
            reconstruction, _ = self._reconstructed(state, originals, mesh)
            pictures += [originals, np.asarray(tokenizer.to_uint8(jnp.asarray(reconstruction)))]
        yield "reconstructions", png.grid(np.concatenate(pictures), columns, pad=0)

    def _reconstructed(
        self, state: TrainState, originals: UInt8[np.ndarray, "b h w c"], mesh: jax.sharding.Mesh
    ) -> tuple[np.ndarray, ...]:
        """Reconstructions and tokens, numpy, of at most a batch of uint8 images."""
        reconstruct = functools.partial(self._reconstruct, state.evaluated)
        return self.run(reconstruct, (originals,), mesh)

    def _distances(
        self,
        originals: UInt8[np.ndarray, "b h w c"],
        reconstruction: Float[np.ndarray, "b h w c"],
        mesh: jax.sharding.Mesh,
    ) -> Float[np.ndarray, " b"]:
        """The perceptual distance of each of at most a batch of images to its reconstruction."""
        measure = functools.partial(self._measure, self.frozen["perceptual"])
        return self.run(measure, (originals, reconstruction), mesh)[0]

    @functools.cached_property
    def _measure(self) -> Callable[..., tuple[Array]]:
        judge = self.perceptual
        assert judge is not None

        def measure(
            params: PyTree, images: UInt8[Array, "b h w c"], made: Float[Array, "b h w c"]
        ) -> tuple[Float[Array, " b"]]:
            return (judge.distances(params, tokenizer.to_float(images), jnp.clip(made, 0, 1)),)

        return numerics.jit(measure)

    @functools.cached_property
    def _reconstruct(self) -> Callable[..., tuple[Array, Array]]:
        def reconstruct(params: PyTree, images: UInt8[Array, "b h w c"]) -> tuple[Array, Array]:
            apply = self._apply(params)
            ids, codes = apply(
                apply(tokenizer.to_float(images), method="encode"), method="quantize"
            )
            return apply(codes, method="decode"), ids

        return numerics.jit(reconstruct)


def make(config: ml_collections.ConfigDict, batch_size: int | None = None) -> Task:
    """The task of a config; ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.

    Raises ValueError, TypeError for settings that do not fit together.
    """
    return assemble(config, image_task.settings(config, batch_size))


def assemble(
    config: ml_collections.ConfigDict,
    shared: dict[str, Any],
    judge: Callable[..., adversarial.PerceptualLoss | None] = adversarial.Perceptual.make,
) -> Task:
    """The task of a config with its images.

    Args:
        config: of the task "vqgan".
        shared: fields of ``image_task.ImageTask``, such as the images.
        judge: makes the perceptual loss; see ``adversarial.Perceptual.make``, which reads weights.

    Raises ValueError, TypeError for settings that do not fit together.
    """
    batch_size = shared["batch_size"]
    model = vqgan.VQGAN(**config.model.to_dict())
    height, width, channels = shared["source"].image_shape
    side = model.downsampling
    if channels != model.image_channels or height % side or width % side:
        raise ValueError(
            f"images of {height, width, channels} do not suit a tokenizer of "
            f"{model.image_channels=} and {side} pixels a token: give data.channels and "
            f"model.image_channels the same value, and data.size a multiple of {side}"
        )
    loss = Loss(**config.loss)
    positions = batch_size * (height // side) * (width // side)
    if loss.restart_every and not model.has_codebook:
        kind = "projection" if model.projection else model.quantizer
        raise ValueError(
            f"restart_every={loss.restart_every}, but with {kind!r} no code can be moved by itself:"
            " give --config.loss.restart_every=0"
        )
    if loss.restart_every and positions < model.codebook_size:
        raise ValueError(
            f"{batch_size=} has {positions} positions to restart {model.codebook_size=} codes from:"
            " choose a larger batch or a smaller codebook, or restart_every = 0"
        )
    num_steps = config.train.num_steps
    _refuse_late_restarts(loss, num_steps)
    rule = adversarial.Optimizer(**config.get("discriminator_optimizer", {}))
    return Task(
        model=model,
        loss=loss,
        perceptual=judge(
            adversarial.Perceptual(**config.get("perceptual", {})), channels, model.dtype
        ),
        adversary=adversarial.Discriminator(**config.get("discriminator", {})).make(
            rule, num_steps, (height, width), channels=model.channels, dtype=model.dtype
        ),
        accumulate=config.train.batch_size // batch_size,
        **shared,
    )


def _refuse_late_restarts(loss: Loss, num_steps: int) -> None:
    """Raises ValueError if codes move until so late that the average cannot follow."""
    ends = [end for end in (loss.restart_until, loss.decoder_from) if end is not None]
    if loss.ema_decay and loss.restart_every and min(ends, default=num_steps) > 0.95 * num_steps:
        raise ValueError(
            f"loss.restart_until={loss.restart_until} lets codes move in the last twentieth of "
            f"train.num_steps={num_steps}, where the average of ema_decay={loss.ema_decay} can no "
            f"longer follow: give --config.loss.restart_until={int(0.4 * num_steps)}, or "
            "--config.loss.ema_decay=0 for no average"
        )
