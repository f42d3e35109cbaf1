"""Training the tokenizer: reconstruction, codebook and commitment losses (arXiv 1711.00937).

A codebook left to itself loses codes for good, because a code that nothing is nearest to gets no
gradient. So the share of positions each code wins is tracked, and codes that win next to none are
moved onto encoder outputs of the current batch, by preference badly represented ones; the same
rule gives every code its first place at step 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from enat_jax.inference import tokenizer
from enat_jax.models import vqgan
from enat_jax.runtime import numerics, png
from enat_jax.training import image_task
from enat_jax.training import task as tasks
from enat_jax.training.task import Metrics, TrainState

EVALUATED = 2048  # held-out images, at most
EVALUATION = ("squared_error", "absolute_error", "psnr", "codebook_usage", "codebook_perplexity")

# What is divided over the mesh, see ``sharding.Sharding``: of a residual block's two convolutions
# the first is divided by its outputs, the second by its inputs, over "tensor".
RULES = (
    (r"conv1/kernel$", (None, None, "fsdp", "tensor")),
    (r"norm2/(scale|bias)$", ("tensor",)),
    (r"conv2/kernel$", (None, None, "tensor", "fsdp")),
    (r"(conv_in|conv_out|shortcut|(up|down)sample_\d+)/kernel$", (None, None, "fsdp", None)),
    (r"codebook$", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights of the losses and the remedy against dead codes.

    Raises ValueError for an unknown kind of reconstruction loss.
    """

    reconstruction: str = "l2"  # or "l1"
    reconstruction_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25  # arXiv:1711.00937, section 3.2
    usage_decay: float = 0.99  # of the running share of positions that each code wins
    dead_below: float = 0.1  # a code is dead below this share of an even use of the codebook
    restart_every: int = 100  # steps between restarts of dead codes; 0 for none, not even at first
    restart_until: int | None = None  # no restarts from this step on, so that the codes settle
    code_noise: float = 0.0  # share of positions whose code is swapped before decoding, in training
    decoder_from: int | None = None  # from this step on codes stay, and are not swapped

    def __post_init__(self) -> None:
        if self.reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction={self.reconstruction!r} is unknown: 'l1' or 'l2'")
        if self.decoder_from is not None and self.decoder_from < 0:
            raise ValueError(f"decoder_from={self.decoder_from!r} must not be negative")
        if not 0 <= self.code_noise < 1:
            raise ValueError(f"code_noise={self.code_noise!r} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Task(image_task.ImageTask):
    """What ``train`` asks of a task; made by ``make``."""

    model: vqgan.VQGAN
    loss: Loss

    MEASURES = EVALUATION

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The state before step 0; pure, so it may be jitted or shaped by ``eval_shape``.

        ``ema_params`` is empty: a mean of codes from before and after a restart would be no code.
        """
        image = jnp.zeros((1, *self.source.image_shape))
        params = self.model.init(key, image)["params"]
        usage = jnp.zeros((self.model.codebook_size,), jnp.float32)
        return tasks.initial_state(params, self.optimizer, extra={"usage": usage})

    def prepare(
        self, state: TrainState, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        """Moves dead codes before a step where that is due."""
        images = tokenizer.to_float(batch["images"])
        params, usage, restarted = self._restart_dead_codes(state, images, key)
        state = state.replace(params=params, extra={"usage": usage})
        return state, {"codes_restarted": restarted}

    def gradients(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        traced: Mapping[str, Array],
        key: Key[Array, ""],
        *,
        static: Hashable,
        frozen: PyTree,
    ) -> tuple[PyTree, Metrics, PyTree]:
        """Gradients of one batch, float32 scalars, and the share of positions of each code."""
        del traced, static, frozen
        images, loss = tokenizer.to_float(batch["images"]), jax.grad(self._loss, has_aux=True)
        grads, (metrics, counts) = loss(state.params, images, key, self._code_noise(state.step))
        return grads, metrics, {"share": counts / counts.sum()}

    def update(self, state: TrainState, grads: PyTree, extra: PyTree) -> TrainState:
        """Applies the optimizer's update; the step is not counted here."""
        decay = self.loss.usage_decay
        usage = decay * state.extra["usage"] + (1 - decay) * extra["share"]
        updated = tasks.apply_gradients(state, self.optimizer, grads)
        if (last := self.loss.decoder_from) is not None:
            fixed = {k: v for k, v in state.params.items() if k != "decoder"}
            new = {name: updated.params[name] for name in fixed}
            kept = jax.tree.map(lambda x, old: jnp.where(state.step < last, x, old), new, fixed)
            params = updated.params | kept
            updated = updated.replace(params=params)
        return updated.replace(extra={"usage": usage})

    def _apply(self, params: PyTree) -> Callable[..., Any]:
        return functools.partial(self.model.apply, {"params": params})

    def _code_noise(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        if self.loss.decoder_from is None or not self.loss.code_noise:
            return self.loss.code_noise
        return jnp.where(step < self.loss.decoder_from, self.loss.code_noise, 0.0)

    def _loss(
        self,
        params: PyTree,
        images: Float[Array, "b h w c"],
        key: Key[Array, ""],
        code_noise: float | Float[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, " v"]]]:
        """The loss, and (metrics, how many positions each code wins)."""
        apply = self._apply(params)
        z = apply(images, method="encode")
        ids, codes = apply(z, method="quantize")
        # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient.
        decoded = z + jax.lax.stop_gradient(codes - z)
        if self.loss.code_noise:
            decoded = _swap_some(decoded, jax.lax.stop_gradient(codes), code_noise, key)
        reconstruction = apply(decoded, method="decode")
        error = reconstruction - images
        metrics = {
            "reconstruction_loss": jnp.abs(error).mean()
            if self.loss.reconstruction == "l1"
            else jnp.square(error).mean(),
            "codebook_loss": jnp.square(codes - jax.lax.stop_gradient(z)).mean(),
            "commitment_loss": jnp.square(z - jax.lax.stop_gradient(codes)).mean(),
        }
        loss = (
            self.loss.reconstruction_weight * metrics["reconstruction_loss"]
            + self.loss.codebook_weight * metrics["codebook_loss"]
            + self.loss.commitment_weight * metrics["commitment_loss"]
        )
        counts = vqgan.count_codes(ids, self.model.codebook_size)
        usage, perplexity = vqgan.code_statistics(counts)
        metrics |= {"loss": loss, "codebook_usage": usage, "codebook_perplexity": perplexity}
        return loss, (metrics, counts)

    def _restart_dead_codes(
        self, state: TrainState, images: Float[Array, "b h w c"], key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, " v"], Float[Array, ""]]:
        """Parameters, usage and the number of codes moved, before this step's update."""
        usage = state.extra["usage"]
        if not self.loss.restart_every:
            return state.params, usage, jnp.zeros(())
        v = self.model.codebook_size
        due = state.step % self.loss.restart_every == 0
        for last in (self.loss.restart_until, self.loss.decoder_from):
            due &= last is None or state.step < last

        def restart(
            codebook: Float[Array, "v e"],
        ) -> tuple[Float[Array, "v e"], Float[Array, " v"], Float[Array, ""]]:
            apply = self._apply(state.params)
            z = apply(images, method="encode")
            _, codes = apply(z, method="quantize")
            distances = jnp.square(z - codes).sum(-1).ravel()
            # The v largest of log weight + Gumbel noise are a draw without replacement.
            scores = jnp.log(distances + 1e-12) + jax.random.gumbel(
                key, distances.shape, mode="low"
            )
            chosen = z.reshape(-1, z.shape[-1])[jax.lax.top_k(scores, v)[1]]
            dead = (usage < self.loss.dead_below / v) & jnp.isfinite(chosen).all(-1)
            # A moved code is given the time to win positions before it is judged again.
            return (
                jnp.where(dead[:, None], chosen, codebook),
                jnp.where(dead, 1 / v, usage),
                dead.sum().astype(jnp.float32),
            )

        codebook, usage, restarted = jax.lax.cond(
            due, restart, lambda c: (c, usage, jnp.zeros(())), state.params["codebook"]
        )
        return {**state.params, "codebook": codebook}, usage, restarted

    def evaluate(
        self, state: TrainState, mesh: jax.sharding.Mesh, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Held-out reconstruction errors (of pixels in [0, 1]) and the use of the codebook."""
        squared, absolute, pixels = 0.0, 0.0, 0
        counts = np.zeros(self.model.codebook_size)
        for rows in self.held_out_batches(EVALUATED, few):
            originals = rows["images"]
            reconstruction, ids = self._reconstructed(state.params, originals, mesh)
            error = reconstruction - originals / 255.0
            squared += np.square(error).sum()
            absolute += np.abs(error).sum()
            pixels += error.size
            counts += np.bincount(ids.ravel(), minlength=self.model.codebook_size)
        usage, perplexity = vqgan.code_statistics(counts)
        psnr = -10 * np.log10(squared / pixels)
        values = (squared / pixels, absolute / pixels, psnr, usage, perplexity)
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
            reconstruction, _ = self._reconstructed(state.params, originals, mesh)
            pictures += [originals, np.asarray(tokenizer.to_uint8(jnp.asarray(reconstruction)))]
        yield "reconstructions", png.grid(np.concatenate(pictures), columns, pad=0)

    def _reconstructed(
        self, params: PyTree, originals: UInt8[np.ndarray, "b h w c"], mesh: jax.sharding.Mesh
    ) -> tuple[np.ndarray, ...]:
        """Reconstructions and tokens, numpy, of at most a batch of uint8 images."""
        reconstruct = functools.partial(self._reconstruct, params)
        return self.run(reconstruct, (originals,), mesh)

    @functools.cached_property
    def _reconstruct(self) -> Callable[..., tuple[Array, Array]]:
        def reconstruct(params: PyTree, images: UInt8[Array, "b h w c"]) -> tuple[Array, Array]:
            apply = self._apply(params)
            ids, codes = apply(
                apply(tokenizer.to_float(images), method="encode"), method="quantize"
            )
            return apply(codes, method="decode"), ids

        return numerics.jit(reconstruct)


def _swap_some(
    decoded: Float[Array, "b h w e"],
    codes: Float[Array, "b h w e"],
    share: float | Float[Array, ""],
    key: Key[Array, ""],
) -> Float[Array, "b h w e"]:
    """Returns ``decoded`` with codes from random positions of the batch at a share of places.

    A decoder that cannot trust every code makes neighbours agree: codes become local and can be
    predicted from one another, and a wrong token in a sample does less harm.
    """
    swap_key, order_key = jax.random.split(key)
    swap = jax.random.bernoulli(swap_key, share, decoded.shape[:-1])
    flat = codes.reshape(-1, codes.shape[-1])
    others = jax.random.permutation(order_key, flat).reshape(codes.shape)
    return jnp.where(swap[..., None], others, decoded)


def make(config: ml_collections.ConfigDict, batch_size: int | None = None) -> Task:
    """The task of a config; ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.

    Raises ValueError, TypeError for settings that do not fit together.
    """
    shared = image_task.settings(config, batch_size)
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
    if loss.restart_every and positions < model.codebook_size:
        raise ValueError(
            f"{batch_size=} has {positions} positions to restart {model.codebook_size=} codes from:"
            " choose a larger batch or a smaller codebook, or restart_every = 0"
        )
    return Task(model=model, loss=loss, **shared)
