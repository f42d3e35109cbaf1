"""Training the transformer: masked tokens from visible ones, with features of the EMA model reused.

The paper, Section 4.2. The counts of a step are drawn on the host; the windows that
hold them are padded to a bucket's static sizes, the counts themselves stay traced.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from enat_jax.data import loader, records, token_data
from enat_jax.data.captioned import Captioned
from enat_jax.data.tokens import TokenSet
from enat_jax.evaluation import accumulate, during_training
from enat_jax.inference import masked_scores, sampling
from enat_jax.inference.text_encoder import TextEncoder
from enat_jax.inference.tokenizer import Tokenizer
from enat_jax.models import transformers
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.schedules import costs, reveal, shape_buckets
from enat_jax.training import enat_evaluation, masked_tokens, optim, texts
from enat_jax.training import task as tasks
from enat_jax.training.task import Metrics, TrainState

# What is divided over the mesh, see ``sharding.Sharding``. The layers of a stack are axis 0. In and
# out of a block alternate over "tensor": only the second product of a pair is summed over it.
RULES = (
    (r"(coder|blocks)/(query|key|value|(mlp/)?up)/kernel$", (None, "fsdp", "tensor")),
    (r"(coder|blocks)/key_value(_\w+)?/kernel$", (None, "fsdp", None, "tensor")),
    (r"(coder|blocks)/(out|(mlp/)?down)/kernel$", (None, "tensor", "fsdp")),
    (r"(coder|blocks)/(query|key|value|(mlp/)?up)/bias$", (None, "tensor")),
    (r"(coder|blocks)/key_value(_\w+)?/bias$", (None, None, "tensor")),
    (r"modulation/kernel$", (None, "fsdp", "tensor")),
    (r"modulation/bias$", (None, "tensor")),
    (r"project/mlp/up/kernel$", ("fsdp", "tensor")),
    (r"project/mlp/up/bias$", ("tensor",)),
    (r"project/mlp/down/kernel$", ("tensor", "fsdp")),
    (r"(head|project|embed_text)/dense/kernel$", ("fsdp", None)),
    (r"frozen/project/kernel$", ("fsdp", None)),  # of CLIP, whose blocks are named as ours
    (r"(word|token|position|label_table)$", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is particular to training the transformer; the defaults are the paper's.

    Attributes:
        label_smoothing: of the target distribution.
        label_drop: probability that a label becomes "no class". The reference drops twice, 0.15
            and 0.1, which is 0.235 in all.
        text_drop: probability that a text becomes the empty text, whatever becomes of the label;
            0.1 is U-ViT's for MS-COCO, the paper says nothing of it.
        ema_decay: of the parameters' moving average, which starts at the initial parameters, is
            evaluated, and is the model that a run leaves.
        ema_warmup: whether the decay of update n, counted from 0, is at most (1 + n) / (10 + n), so
            that a run too short for ``ema_decay`` forgets its initial parameters nevertheless. The
            rule is that of TensorFlow's ``ExponentialMovingAverage`` for its ``num_updates``. The
            reference has none.
        max_shapes: compiled window shapes; more pad less and compile longer.
        window_multiple: windows are rounded up to multiples of it; TPUs, whose tiles have 8 rows,
            copy less with 8. The loss stays the same but for rounding, and dropout, whose random
            numbers depend on the size of windows.
        words_from_codebook: whether the table of word embeddings starts as a random projection of
            the tokenizer's codebook, so that codes that look alike begin alike. The reference
            starts from noise, which a short run spends most of its steps on sorting.
    """

    label_smoothing: float = 0.1
    label_drop: float = 0.235
    text_drop: float = 0.1
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    max_shapes: int = 40
    window_multiple: int = 1
    words_from_codebook: bool = False

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "label_drop", "text_drop", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must lie in [0, 1)")
        for name in ("max_shapes", "window_multiple"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")

    def decay_at(self, updates: Int[Array, ""]) -> float | Float[Array, ""]:
        """Returns the moving average's decay of the update after so many; may be traced."""
        if not self.ema_warmup:
            return self.ema_decay
        return tasks.warming_decay(self.ema_decay, updates)

    def initial_share(self, updates: int) -> float:
        """Returns the share of the initial parameters in the average after so many updates."""
        if not self.ema_warmup:
            return self.ema_decay**updates
        warming = ((1 + n) / (10 + n) for n in range(min(updates, 100)))  # less than 1e-11 then
        return math.prod(min(self.ema_decay, decay) for decay in warming)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What ``train`` asks of a task; made by ``make``."""

    model: Transformer
    tokens: TokenSet
    held_out: TokenSet | None
    tokenizer: Tokenizer
    optimizer: optax.GradientTransformation
    loss: Loss
    splits: reveal.SplitDistribution
    buckets: tuple[shape_buckets.Bucket, ...]
    sampler: sampling.Settings
    seed: int
    batch_size: int
    quality: during_training.SampleQuality | None = None
    text: TextEncoder | None = None

    @property
    def frozen(self) -> PyTree:
        """The weights of the text encoder; {} without one."""
        return {} if self.text is None else self.text.frozen

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The state before step 0; pure."""
        ids, label = jnp.zeros((1, self.model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
        params = self.model.init(key, ids, label)["params"]
        if self.loss.words_from_codebook:
            params = _with_words(params, self.tokenizer.code_table, self.model, key)
        # A copy of its own: the state is donated, and no buffer may be donated twice.
        ema_params = jax.tree.map(jnp.copy, params)
        return tasks.initial_state(params, self.optimizer, ema_params=ema_params)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole batch."""
        b = self.batch_size
        sizes: dict[str, tuple[int, ...]] = {"tokens": (b, self.model.num_tokens), "labels": (b,)}
        if self.text is not None:
            stored = self.text.width is not None and self.text.clip is None
            width = (self.text.width,) if stored else ()
            sizes |= {"text": (b, self.text.context, *width), "lengths": (b,)}
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) < 3 else jnp.float16)
            for name, shape in sizes.items()
        }

    def batches(self, start: int, share: tuple[int, int] = (0, 1)) -> Iterator[loader.Batch]:
        """Part i of n of every batch from number ``start`` on, as ``batch_spec`` says.

        ``share``: (i, n), see ``sharding.process_share``.
        """
        return loader.train_batches(
            self.tokens, self.batch_size, seed=self.seed, start_step=start, share=share
        )

    def data_identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed, as JSON values."""
        return {
            "tokenizer": self.tokens.tokenizer,
            "num_records": len(self.tokens),
            "preprocessing": self.tokens.preprocessing,
        } | self._text_identity()

    def _text_identity(self) -> dict[str, Any]:
        if self.text is None or not isinstance(self.tokens, Captioned):
            return {}
        return {"captions": self.tokens.captions.made_of, "text": self.text.description()}

    def shapes(self, index: int) -> tuple[reveal.Windows, dict[str, Any]]:
        """Windows (static) and counts (traced) of batch ``index``; the same on every host."""
        split = self._split(index)
        windows = shape_buckets.find(self.buckets, split).windows
        counts = {"num_cached": split.num_cached, "num_visible": split.num_visible}
        traced: dict[str, Any] = {k: np.int32(v) for k, v in counts.items()}
        if split.earlier:
            traced["earlier"] = np.array(split.earlier, np.int32)
        return windows, traced

    def work(self, index: int) -> dict[str, float]:
        """Share of masked tokens of batch ``index``, and its multiply-adds, exact and padded."""
        split, dims = self._split(index), costs.dims_of(self.model)
        windows = shape_buckets.find(self.buckets, split).windows
        return {
            "masked_share": 1 - split.num_visible / self.model.num_tokens,
            "exact_work": self.batch_size * float(costs.exact_training_cost(dims, *split[1:])),
            "padded_work": self.batch_size
            * float(costs.training_cost(dims, *windows, self.splits.reveals)),
        }

    def _split(self, index: int) -> reveal.Split:
        return self.splits.draw(self.model.num_tokens, self.seed, index)

    def gradients(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        traced: Mapping[str, Array],
        key: Key[Array, ""],
        *,
        static: reveal.Windows,
        frozen: PyTree,
    ) -> tuple[PyTree, Metrics, PyTree]:
        """Gradients of one batch; ``key`` is of this batch alone.

        Returns:
            ``(gradients, metrics, {})``, metrics a dict of float32 scalars.
        """
        drop_key, order_key, dropout_key = jax.random.split(key, 3)
        dropped = jax.random.uniform(drop_key, batch["labels"].shape) < self.loss.label_drop
        labels = jnp.where(dropped, self.model.num_classes, batch["labels"])
        order = masked_scores.random_order(order_key, batch["tokens"].shape)
        window: dict[str, Any] = {
            "ids": jnp.take_along_axis(batch["tokens"], order, axis=1),
            "positions": order,
            "labels": labels,
        }
        if self.text is not None:
            text_key = jax.random.fold_in(drop_key, 1)
            given = batch["text"], batch["lengths"]
            window["prompt"] = texts.prompt(
                self.text, frozen, *given, text_key, self.loss.text_drop
            )
        grads, metrics = jax.grad(
            lambda params: masked_tokens.step_loss(
                self.model,
                params,
                state.ema_params,
                window,
                (traced["num_cached"], traced["num_visible"]),
                static,
                smoothing=self.loss.label_smoothing,
                dropout_key=dropout_key if self.model.dropout else None,
                earlier=traced.get("earlier", ()),
            ),
            has_aux=True,
        )(state.params)
        return grads, metrics, {}

    def update(self, state: TrainState, grads: PyTree, extra: PyTree) -> TrainState:
        """The optimizer's update and that of the moving average; the step is not counted here."""
        del extra
        state = tasks.apply_gradients(state, self.optimizer, grads)
        # Steps that were not finite made no update.
        return tasks.average(state, self.loss.decay_at(state.step - state.skipped))

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the numbers that ``evaluate`` gives."""
        held_out = enat_evaluation.names(self.text is not None) if self.held_out else ()
        return (*held_out, *(self.quality.names if self.quality else ()))

    def evaluate(
        self, state: TrainState, mesh: jax.sharding.Mesh, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Held-out loss and accuracy by share of visible tokens, and the quality of samples.

        Of masked tokens, by the EMA model; with texts, also how much these help. ``few``: one chunk
        of samples.
        """
        if self.held_out is not None:
            scores = enat_evaluation.held_out_scores(self, state, mesh)
            yield from zip(self.evaluated, scores, strict=False)
        if self.quality:
            # Of one size, so that the last samples need no compilation of their own.
            size = min(accumulate.CHUNK, self.quality.num)
            draw = functools.partial(enat_evaluation.samples, self, state, mesh, size)
            yield from self.quality.measure(draw, max(self.model.num_classes, 1), few)

    @functools.cached_property
    def held_out_prompt(self) -> Prompt | None:
        """The prompts of the held-out images that are evaluated; None without texts."""
        if self.text is None or not isinstance(self.held_out, Captioned):
            return None
        rows = self.held_out.gather(records.evenly(len(self.held_out), enat_evaluation.EVALUATED))
        return self.text.of_tokens(rows["text"], rows["lengths"])

    def images(
        self, state: TrainState, mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[str, UInt8[np.ndarray, "h w c"]]]:
        """Samples of the EMA model at fixed seeds, see ``enat_evaluation.pictures``: uint8."""
        return enat_evaluation.pictures(self, state, mesh)


def _with_words(
    params: PyTree, codebook: Float[Array, "v e"], model: Transformer, key: Key[Array, ""]
) -> PyTree:
    """Parameters whose word embeddings are a random projection of ``codebook``."""
    codes = jnp.asarray(codebook, jnp.float32)
    codes = (codes - codes.mean(0)) / (codes.std(0) + 1e-6)
    projection = jax.random.normal(jax.random.fold_in(key, 1), (codes.shape[1], model.width))
    words = model.word_std * codes @ projection / math.sqrt(codes.shape[1])
    table = params["embed"]["word"].at[: model.codebook_size].set(words)
    return {**params, "embed": {**params["embed"], "word": table}}


def make(config: ml_collections.ConfigDict, batch_size: int | None = None) -> Task:
    """The task of a config; ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.

    Raises:
        FileNotFoundError: the tokens or the tokenizer are not there.
        ValueError: settings, tokens and tokenizer do not fit together.
    """
    data = token_data.Data(**config.data.to_dict())
    codec = Tokenizer.load(data.tokenizer)
    settings = config.model.to_dict()
    kind = settings.pop("kind")
    token_set = token_data.open_tokens(data.tokens, settings, codec)
    held_out = (
        token_data.open_tokens(data.held_out_tokens, settings, codec)
        if data.held_out_tokens
        else None
    )
    if data.in_memory:
        token_set = token_set.in_memory()
    token_set, held_out, text = texts.join(data, settings, token_set, held_out)
    model = transformers.MODELS[kind](
        **token_data.sizes(token_set) | {k: v for k, v in settings.items() if v is not None}
    )
    if config.mask.reuse_probability and not model.reuse:
        raise ValueError(
            f"mask.reuse_probability={config.mask.reuse_probability} needs a model that reuses "
            "features; set it to 0"
        )
    for found, directory in ((token_set, data.tokens), (held_out, data.held_out_tokens)):
        if found is not None:
            token_data.check(found, directory, model, codec, data.tokenizer)
    # The names of a feature file of the reference, which has none, are made up.
    if (
        held_out is not None
        and model.num_classes
        and None not in (token_set.tokenizer, held_out.tokenizer)
        and held_out.class_names != token_set.class_names
    ):
        advice = "name tokens of the same class folders"
        if sorted(held_out.class_names) == sorted(token_set.class_names):
            advice = "they are numbered otherwise; make one again with --set class_order=text"
        raise ValueError(f"{data.held_out_tokens} has other classes than {data.tokens}: {advice}")
    return assemble(
        config,
        model,
        batch_size or config.train.batch_size,
        tokens=token_set,
        held_out=held_out,
        tokenizer=codec,
        quality=during_training.make(config.evaluation, codec),
        text=text,
    )


def assemble(
    config: ml_collections.ConfigDict, model: Transformer, batch_size: int, **data: Any
) -> Task:
    """Makes the task of a complete config for its model.

    Args:
        config: the complete config.
        model: of the config.
        batch_size: of a micro-batch.
        data: the other fields of ``Task``.

    Raises:
        ValueError: a setting is wrong.
    """
    loss = Loss(**config.loss.to_dict())
    splits = reveal.SplitDistribution(**config.mask.to_dict())
    dims = costs.dims_of(model)
    cost = functools.partial(costs.training_cost, dims, reveals=splits.reveals)
    sampler = sampling.Settings(**config.sampler.to_dict())
    sampler.check_counts(model.num_tokens)
    return Task(
        model=model,
        optimizer=optim.Optimizer(**config.optimizer.to_dict()).make(config.train.num_steps),
        loss=loss,
        splits=splits,
        buckets=shape_buckets.choose(
            model.num_tokens, splits, loss.max_shapes, cost, loss.window_multiple
        ),
        sampler=sampler,
        seed=config.seed,
        batch_size=batch_size,
        **data,
    )
