"""What training measures and shows of the transformer that it trains."""

from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Int, UInt8

from enat_jax.data import records
from enat_jax.data.captioned import Captioned
from enat_jax.data.tokens import TokenSet
from enat_jax.evaluation import accumulate, during_training
from enat_jax.inference import conditions, masked_scores, sampling
from enat_jax.inference.text_encoder import TextEncoder
from enat_jax.inference.tokenizer import Tokenizer
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics, png, sharding
from enat_jax.training.task import TrainState

EVALUATED = 1024  # held-out images, at most
TEXT_USE_SHARES = (0.0, 1 / 16, 1 / 4)  # of the tokens that are visible
ROWS, COLUMNS = 10, 10  # of a picture of samples


class Evaluated(Protocol):
    """What is evaluated of a task, see ``enat_task.Task``."""

    @property
    def model(self) -> Transformer: ...

    @property
    def tokens(self) -> TokenSet: ...

    @property
    def held_out(self) -> TokenSet | None: ...

    @property
    def held_out_prompt(self) -> Prompt | None: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def sampler(self) -> sampling.Settings: ...

    @property
    def seed(self) -> int: ...

    @property
    def quality(self) -> during_training.SampleQuality | None: ...

    @property
    def text(self) -> TextEncoder | None: ...


def names(has_text: bool) -> tuple[str, ...]:
    """Returns the names of what ``held_out_scores`` gives."""
    kinds = ("loss", "accuracy")
    found = [f"{kind}_{x:.4g}_visible" for x in masked_scores.VISIBLE_SHARES for kind in kinds]
    if has_text:
        found += [f"text_use_{x:.4g}_visible" for x in TEXT_USE_SHARES]
    return tuple(f"held_out/{name}" for name in found)


def held_out_scores(task: Evaluated, state: TrainState, mesh: jax.sharding.Mesh) -> Iterator[float]:
    """Yields mean loss and accuracy of masked tokens, and how much the texts help, by ``names``.

    How much a text helps is the loss with the text of another image, about half of them
    further on, less the loss with its own, in nats. It is 0 of a model that ignores texts, whose
    loss can be good all the same.
    """
    assert task.held_out is not None
    rows = task.held_out.gather(records.evenly(len(task.held_out), EVALUATED))
    n, l = rows["tokens"].shape  # noqa: E741
    order = np.asarray(masked_scores.random_order(numerics.key(task.seed), (n, l)))
    placed = [sharding.place(x, mesh) for x in (rows["tokens"], rows["labels"], order)]
    prompt = task.held_out_prompt

    def losses(share: float, roll: int = 0) -> tuple[float, float]:
        rolled = prompt and Prompt(*(np.roll(np.asarray(x), roll, 0) for x in prompt))
        wanted = conditions.Conditions(rows["labels"], rolled, encoder=task.text)
        text, num_visible = wanted.placed(mesh, n).get("prompt"), round(l * share)
        scores = masked_scores.scores(task.model, state.ema_params, *placed, num_visible, text)
        loss, accuracy = (float(x[:n].mean()) for x in sharding.to_host(scores))
        return loss, accuracy

    own = {}
    for share in masked_scores.VISIBLE_SHARES:
        own[share], accuracy = losses(share)
        yield from (own[share], accuracy)
    for share in TEXT_USE_SHARES if prompt is not None else ():
        with_own = own[share] if share in own else losses(share)[0]
        yield losses(share, n // 2 | 1)[0] - with_own


def samples(
    task: Evaluated, state: TrainState, mesh: jax.sharding.Mesh, size: int, start: int, stop: int
) -> accumulate.Batch:
    """Draws samples ``start`` to ``stop`` - 1, at most ``size``, of the EMA model.

    They are balanced over classes, or have the labels and texts of held-out images. Of a model
    without classes all are of class 0.
    """
    index = start + np.arange(size, dtype=np.int32)
    labels, prompt = index % max(task.model.num_classes, 1), None
    if task.text is not None:
        assert task.quality is not None
        labels, prompt = _of_images(task, index, task.quality.num)
    drawn = draw(task, state, mesh, labels, index, prompt)[: stop - start]
    known = labels if task.model.num_classes else np.zeros_like(labels)
    return accumulate.Batch(drawn, known[: stop - start])


def pictures(
    task: Evaluated, state: TrainState, mesh: jax.sharding.Mesh
) -> Iterator[tuple[str, UInt8[np.ndarray, "h w c"]]]:
    """Yields samples of the EMA model at fixed seeds, a row per class or per held-out text."""
    rows = min(task.model.num_classes or ROWS, ROWS)
    index = np.arange(rows * COLUMNS, dtype=np.int32)
    labels, prompt = index // COLUMNS, None
    if task.text is not None:
        labels, prompt = _of_images(task, index // COLUMNS, rows)
    drawn = draw(task, state, mesh, labels, index, prompt)
    yield "samples", png.grid(drawn, columns=COLUMNS, pad=0)


def _captioned(task: Evaluated) -> Captioned | None:
    found = task.tokens if task.held_out is None else task.held_out
    return found if isinstance(found, Captioned) else None


def _of_images(
    task: Evaluated, index: Int[np.ndarray, " b"], num: int
) -> tuple[Int[np.ndarray, " b"], Prompt]:
    """Returns labels and prompts of held-out images, of ``num`` evenly spread ones by number."""
    found = _captioned(task)
    assert found is not None and task.text is not None
    evenly = records.evenly(len(found), num)
    rows = found.gather(evenly[index % len(evenly)])
    return rows["labels"], task.text.of_tokens(rows["text"], rows["lengths"])


def draw(
    task: Evaluated,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    labels: Int[np.ndarray, " b"],
    index: Int[np.ndarray, " b"],
    prompt: Prompt | None = None,
) -> UInt8[np.ndarray, "b h w c"]:
    """Returns images of the EMA model, of these labels, texts and numbers."""
    sample = sampling.make(task.model, task.sampler, task.tokenizer.grid)
    placed = [sharding.place(x, mesh) for x in (labels, index)]
    wanted = conditions.Conditions(labels, prompt, encoder=task.text)
    texts = wanted.placed(mesh, len(labels))
    codes = sample(state.ema_params, *placed, numerics.key(task.seed), **texts)
    return task.tokenizer.decode(sharding.to_host(codes)[: len(labels)])
