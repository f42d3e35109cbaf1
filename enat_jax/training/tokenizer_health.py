"""What the log lines of a tokenizer's training say about its health, as advice in words.

The ranges are rules of thumb, from logs in public reports and from the recipes that the defaults
follow. Each is said once while it lasts, with what to change; no run is stopped by one.
"""

import math
from collections.abc import Iterator, Mapping

from enat_jax.training import vqgan_task

# What says something only after the first tenth of a run, when the codebook has settled, ...
_SETTLED = (
    *("codebook_usage", "codebook_perplexity", "codes_restarted"),
    *("commitment_loss", "grad_norm"),
)
# ... when the discriminator has learnt for a while, ...
_OF_DISCRIMINATOR = (
    *("discriminator_loss", "discriminator_accuracy_real", "discriminator_accuracy_fake"),
    *("logits_real", "logits_fake", "lecam", "discriminator_grad_norm"),
)
# ... and when its term has had its whole weight for a while.
_OF_TERM = ("image_gradient_share/adversarial", "perceptual_loss")
# The loss of a discriminator that knows nothing.
_GUESSING = {"hinge": 1.0, "non_saturating": 2 * math.log(2)}


class Health:
    """Collects the summaries of a run's log lines and says what is wrong with them.

    Metrics are averaged over a span of 5 percent of the run or 5,000 steps, whichever is less, but
    at least from one log line to the next and from one restart of codes to the next. Those that are
    said to grow are compared with the span before.

    Args:
        task: of the run.
        num_steps: of the whole run.
        step: steps done before the first summary.
    """

    def __init__(self, task: vqgan_task.Task, num_steps: int, step: int = 0):
        self._task = task
        restarts = task.loss.restart_every
        self._shortest = self._span = max(1, restarts, min(5000, num_steps // 20))
        self._judged_from = dict.fromkeys(_SETTLED, num_steps / 10)
        adversary = task.adversary
        self._guessing, self._learns_from, weighs_from = math.nan, math.inf, math.inf
        if adversary is not None:
            self._guessing = _GUESSING[adversary.settings.loss]
            self._learns_from, weighs_from = adversary.first, adversary.start + adversary.ramp
        for names, first in ((_OF_DISCRIMINATOR, self._learns_from), (_OF_TERM, weighs_from)):
            self._judged_from |= dict.fromkeys(names, first + self._span)
        self._windows: list[tuple[int, int, dict[str, float]]] = []  # steps before and after
        self._end = step
        self._lowest_loss = math.inf  # of the discriminator
        self._lowest_perceptual = math.inf
        self._wrong: set[str] = set()

    def advice(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Returns a sentence for everything that is wrong now and was not at the line before.

        Args:
            step: steps done.
            metrics: means over the steps since the line before, as ``Monitor.summary`` gives them.
                What is missing or NaN is not judged.
        """
        start, self._end = self._end, step
        if start >= self._learns_from:
            loss = metrics.get("discriminator_loss", math.nan)
            self._lowest_loss = min(self._lowest_loss, loss)
        known = {name: x for name, x in metrics.items() if start >= self._judged_from.get(name, 0)}
        self._windows.append((start, step, known))
        self._span = max(self._shortest, step - start)
        self._windows = [window for window in self._windows if window[0] >= step - 2 * self._span]
        found = dict(self._found())
        new = [sentence for key, sentence in found.items() if key not in self._wrong]
        self._wrong = set(found)
        return new

    def _mean(self, name: str, *, before: bool = False) -> float:
        """Returns the mean over the last span, or over the one before it; NaN where unknown."""
        total, steps = 0.0, 0
        for start, end, metrics in self._windows:
            if (start < self._end - self._span) == before and name in metrics:
                total += metrics[name] * (end - start)
                steps += end - start
        return total / steps if steps else math.nan

    def _found(self) -> Iterator[tuple[str, str]]:
        """Yields what is wrong: a key, which stays the same while it lasts, and the sentence."""
        yield from self._of_discriminator()
        yield from self._of_logits()
        yield from self._of_terms()
        yield from self._of_codebook()
        yield from self._of_gradients()

    def _of_discriminator(self) -> Iterator[tuple[str, str]]:
        """Judges whether it learns, and whether the tokenizer still has a chance against it."""
        loss, guessing, lowest = self._mean("discriminator_loss"), self._guessing, self._lowest_loss
        accuracies = [self._mean(f"discriminator_accuracy_{of}") for of in ("real", "fake")]
        if self._guesses():
            words = "has learnt nothing"
            remedy = "raise config.discriminator_optimizer.learning_rate"
            if lowest < 0.9 * guessing:
                words = f"has lost what it had learnt, a loss of {lowest:.2f}"
                remedy = (
                    "lower config.discriminator_optimizer.learning_rate or "
                    "config.discriminator.weight, or give config.discriminator.ramp_steps more"
                )
            yield (
                "guessing",
                f"the discriminator {words}: for {self._span:,} steps its loss has been "
                f"{loss:.2f}, and that of guessing is {guessing:.2f}: {remedy}",
            )
            return
        signs = []
        if loss < 0.3 * guessing:
            signs.append(f"its loss is {loss:.2f}")
        if all(accuracy > 0.95 for accuracy in accuracies):
            signs.append(f"it judges {min(accuracies):.1%} of all cells rightly")
        apart = self._mean("logits_real") - self._mean("logits_fake")
        before = self._mean("logits_real", before=True) - self._mean("logits_fake", before=True)
        if apart > 2 and apart > 1.1 * before:
            signs.append(f"its mean logits are {apart:.1f} apart and part further")
        if self._mean("lecam") > 10:
            signs.append(f"LeCam's term is {self._mean('lecam'):.0f}")
        if signs:
            yield (
                "winning",
                f"the discriminator wins: {', '.join(signs)}: raise config.discriminator.lecam to "
                "0.01 or more, halve config.discriminator_optimizer.learning_rate, lower "
                "config.discriminator.weight, or train on more pictures",
            )
        if min(accuracies) < 0.02 and max(accuracies) > 0.98:
            yield (
                "the same of all",
                "the discriminator says the same of all pictures and reconstructions: lower "
                "config.discriminator_optimizer.learning_rate",
            )

    def _guesses(self) -> bool:
        """Says whether the discriminator does no better than one that knows nothing."""
        return self._mean("discriminator_loss") > 0.98 * self._guessing

    def _of_logits(self) -> Iterator[tuple[str, str]]:
        """Judges whether both mean logits move away from zero together."""
        real, fake = self._mean("logits_real"), self._mean("logits_fake")
        before = self._mean("logits_real", before=True) + self._mean("logits_fake", before=True)
        if real * fake > 0 and abs(real + fake) > 4 and abs(real + fake) > 1.1 * abs(before):
            yield (
                "drifting",
                f"the logits of pictures and of reconstructions drift together, to {real:.1f} and "
                f"{fake:.1f}: set config.discriminator.lecam to 0.001 or more, or lower "
                "config.discriminator_optimizer.learning_rate",
            )

    def _of_terms(self) -> Iterator[tuple[str, str]]:
        """Judges the weight of the discriminator's term."""
        share = self._mean("image_gradient_share/adversarial")
        words = (
            f"the discriminator makes {share:.1%} of the gradient with respect to reconstructions, "
            "where 5% to 40% are usual"
        )
        if share > 0.6:
            yield "too much", f"{words}: lower config.discriminator.weight"
        if share < 0.01 and not self._guesses():
            yield "no effect", f"{words}, and has no effect: raise config.discriminator.weight"
        perceptual, lowest = self._mean("perceptual_loss"), self._lowest_perceptual
        self._lowest_perceptual = min(lowest, perceptual)
        if perceptual > 1.1 * lowest:
            yield (
                "perceptual",
                f"the perceptual loss has risen from {lowest:.3g} to {perceptual:.3g} under the "
                "discriminator: lower config.discriminator.weight",
            )

    def _of_codebook(self) -> Iterator[tuple[str, str]]:
        """Judges whether its codes are used, settled, and near to what they stand for."""
        model, loss = self._task.model, self._task.loss
        v = model.codebook_size
        perplexity = self._mean("codebook_perplexity")
        if perplexity < 0.1 * v:
            remedies = ["lower config.optimizer.learning_rate"]
            if model.has_codebook and not loss.restart_every:
                remedies.append("restart dead codes by config.loss.restart_every=100")
            if model.quantizer == "vq" and not model.normalize:
                remedies.append("set config.model.normalize=True")
            usage = self._mean("codebook_usage")
            yield (
                "collapse",
                f"the codebook has collapsed: its perplexity is {perplexity:.1f} of {v} codes, and "
                f"a batch uses {usage:.0%} of them: {', or '.join(remedies)}",
            )
        restarted = self._mean("codes_restarted") * loss.restart_every
        before = self._mean("codes_restarted", before=True) * loss.restart_every
        if restarted > 0.1 * v and restarted > 0.7 * before:
            yield (
                "restarts",
                f"every restart still moves {restarted:.0f} of {v} codes, and hardly fewer than "
                "before: raise config.loss.commitment_weight or config.train.batch_size, or lower "
                "config.model.codebook_size",
            )
        commitment = self._mean("commitment_loss")
        earlier = self._mean("commitment_loss", before=True)
        if commitment > 1.5 * earlier:
            yield (
                "commitment",
                f"the commitment loss grows, from {earlier:.3g} to {commitment:.3g} in "
                f"{self._span:,} steps: raise config.loss.commitment_weight, or set "
                "config.optimizer.clip_norm=1",
            )

    def _of_gradients(self) -> Iterator[tuple[str, str]]:
        """Judges jumps of the last log line."""
        _, _, metrics = self._windows[-1]
        for name, section in (
            ("grad_norm", "config.optimizer"),
            ("discriminator_grad_norm", "config.discriminator_optimizer"),
        ):
            now, before = metrics.get(name, math.nan), self._mean(name, before=True)
            if now > 1 and now > 10 * before:
                yield (
                    name,
                    f"{name} has jumped from {before:.3g} to {now:.3g}: lower "
                    f"{section}.learning_rate, or set {section}.clip_norm=1 if it clips at no less",
                )
        if (skipped := metrics.get("skipped", 0)) > 0:
            yield (
                "skipped",
                f"{skipped:.0f} of the last steps were not finite and changed nothing: set "
                "config.optimizer.clip_norm=1, or lower config.optimizer.learning_rate",
            )


def of(task: object, num_steps: int, step: int) -> Health | None:
    """Returns what gives advice on a run; None if it does not train a tokenizer.

    Args:
        task, num_steps, step: see ``Health``.
    """
    return Health(task, num_steps, step) if isinstance(task, vqgan_task.Task) else None
