"""Advice on a tokenizer's training: what is said of sick metrics, and nothing of healthy ones."""

import inspect
import math
import re
import types
from unittest import mock

import pytest

from enat_jax import train
from enat_jax.models import vqgan
from enat_jax.training import adversarial, tokenizer_health, vqgan_task
from enat_jax.training import config as train_config

STEPS = 2000  # of the run, so 100 of a span
HEALTHY = {
    "loss": 0.1,
    "skipped": 0.0,
    "grad_norm": 0.5,
    "discriminator_grad_norm": 0.3,
    "discriminator_loss": 0.8,
    "discriminator_accuracy_real": 0.7,
    "discriminator_accuracy_fake": 0.6,
    "logits_real": 0.4,
    "logits_fake": -0.3,
    "lecam": 0.2,
    "image_gradient_share/adversarial": 0.2,
    "perceptual_loss": 0.5,
    "codebook_usage": 0.99,
    "codebook_perplexity": 60.0,
    "codes_restarted": 0.0,
    "commitment_loss": 0.01,
}


def health(step=0, loss="hinge", restart_every=100, judged=True, **model):
    """Of a run whose discriminator begins at step 500 and has its weight from 800 on."""
    adversary = types.SimpleNamespace(
        first=500, start=600, ramp=200, settings=adversarial.Discriminator(loss=loss)
    )
    task = types.SimpleNamespace(
        model=vqgan.VQGAN(codebook_size=100, **model),
        loss=vqgan_task.Loss(restart_every=restart_every),
        adversary=adversary if judged else None,
    )
    return tokenizer_health.Health(task, STEPS, step)


def said(changes, found=None, log_every=50, start=0, until=STEPS):
    """All that is said while metrics are those of ``changes(step)``, by the step before."""
    found = found or health()
    lines = range(start, until, log_every)
    return {
        step: sentences
        for step in lines
        if (sentences := found.advice(step + log_every, HEALTHY | changes(step)))
    }


def only(changes, **settings):
    """The one sentence that is said, and the step before its log line."""
    ((step, (sentence,)),) = said(changes, **settings).items()
    return step, sentence


def since(step, **changes):
    """Healthy metrics up to a step and others from there on."""
    return lambda now: changes if now >= step else {}


@pytest.mark.parametrize("log_every", [1, 50, 300, 2000])
def test_a_healthy_run_is_left_alone(log_every):
    assert said(lambda step: {}, log_every=log_every) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"discriminator_loss": 0.99, "discriminator_accuracy_real": 0.0},
            "the discriminator has lost what it had learnt, a loss of 0.80: for 100 steps "
            "its loss has been 0.99, and that of guessing is 1.00: lower config.discriminator_opti",
        ),
        ({"discriminator_loss": 0.1}, "the discriminator wins: its loss is 0.10: raise config."),
        (
            {"discriminator_accuracy_real": 0.99, "discriminator_accuracy_fake": 0.97},
            "wins: it judges 97.0% of all cells rightly: raise config.discriminator.lecam to 0.01",
        ),
        ({"lecam": 20.0}, "wins: LeCam's term is 20: raise"),
        ({"logits_real": 1.5, "logits_fake": -1.5}, "wins: its mean logits are 3.0 apart and part"),
        (
            {"logits_real": 3.0, "logits_fake": 2.5},
            "the logits of pictures and of reconstructions drift together, to 3.0 and 2.5: set",
        ),
        (
            {"discriminator_accuracy_real": 0.0, "discriminator_accuracy_fake": 1.0},
            "the discriminator says the same of all pictures and reconstructions: lower",
        ),
        (
            {"image_gradient_share/adversarial": 0.7},
            "makes 70.0% of the gradient with respect to reconstructions, where 5% to 40% are "
            "usual: lower config.discriminator.weight",
        ),
        ({"image_gradient_share/adversarial": 1e-3}, "0.1% .* has no effect: raise config.discri"),
        ({"perceptual_loss": 0.6}, "risen from 0.5 to 0.6 under the discriminator: lower config"),
        (
            {"codebook_perplexity": 7.0, "codebook_usage": 0.2},
            "collapsed: its perplexity is 7.0 of 100 codes, and a batch uses 20% of them: lower "
            "config.optimizer.learning_rate, or set config.model.normalize=True$",
        ),
        ({"codes_restarted": 0.2}, "every restart still moves 20 of 100 codes, and hardly fewer"),
        ({"commitment_loss": 0.02}, "grows, from 0.01 to 0.02 in 100 steps: raise config.loss.com"),
        ({"grad_norm": 6.0}, r"^grad_norm has jumped from 0.5 to 6: lower config.optimizer.le"),
        (
            {"discriminator_grad_norm": 6.0},
            "lower config.discriminator_optimizer.learning_rate, or set config.discriminator_opti",
        ),
        ({"skipped": 2.0}, "2 of the last steps were not finite and changed nothing: set config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_said_once_with_a_remedy(changes, words):
    step, sentence = only(since(1500, **changes), log_every=100)
    assert step == 1500
    assert re.search(words, sentence), sentence
    settings = re.findall(r"config\.(\w+)\.(\w+)", sentence)
    assert settings
    for section, name in settings:
        described = train_config.SECTIONS["vqgan"][section]
        assert name in inspect.signature(described).parameters, (section, name)


def test_a_discriminator_that_never_learnt_is_told_to_learn_faster():
    """And what follows from it, that it has no effect, is no advice of its own."""
    changes = {"discriminator_loss": 1.01, "image_gradient_share/adversarial": 0.0}
    step, sentence = only(since(0, **changes))
    assert step == 600
    assert "has learnt nothing: for 100 steps its loss has been 1.01" in sentence
    assert sentence.endswith("is 1.00: raise config.discriminator_optimizer.learning_rate")


def test_it_is_said_again_when_it_comes_back():
    found = said(lambda step: {"skipped": float(step in (200, 250, 400))})
    assert list(found) == [200, 400]


def test_nothing_is_said_of_a_discriminator_before_it_has_learnt_a_while():
    """Before, its metrics are zeros; afterwards it knows nothing, and weighs nothing."""

    def changes(step):
        if step < 500:
            return dict.fromkeys((name for name in HEALTHY if "discr" in name), 0.0)
        if step < 600:
            return {"discriminator_loss": 1.0, "discriminator_accuracy_real": 0.0}
        return {"image_gradient_share/adversarial": 0.0} if step < 800 else {}

    assert said(changes) == {}


def test_a_run_that_goes_on_is_judged_from_its_first_log_line():
    found = said(lambda step: {"discriminator_loss": 0.1}, found=health(step=1000), start=1000)
    assert list(found) == [1000]


def test_an_early_codebook_is_given_time():
    assert said(lambda step: {"codebook_perplexity": 3.0} if step < 200 else {}) == {}
    # Restarts that move fewer codes each time.
    assert said(lambda step: {"codes_restarted": 0.9 / (1 + step / 50) ** 2}) == {}


def test_the_remedies_suit_the_quantizer():
    changes = since(1500, codebook_perplexity=7.0)
    _, sentence = only(changes, found=health(restart_every=0))
    assert sentence.endswith(
        "lower config.optimizer.learning_rate, or restart dead codes by "
        "config.loss.restart_every=100, or set config.model.normalize=True"
    )
    levels = {"quantizer": "fsq", "levels": (10, 10), "embed_dim": 2}
    _, sentence = only(changes, found=health(restart_every=0, **levels))
    assert sentence.endswith("of them: lower config.optimizer.learning_rate")


def test_the_loss_of_guessing_is_that_of_the_kind():
    changes = since(1500, discriminator_loss=1.38)
    _, sentence = only(changes, found=health(loss="non_saturating"))
    assert "has been 1.38, and that of guessing is 1.39" in sentence


def test_without_a_discriminator_or_with_what_is_not_finite_nothing_is_judged():
    found = health(judged=False)
    plain = {name: HEALTHY[name] for name in ("loss", "codebook_perplexity", "perceptual_loss")}
    assert [s for step in range(0, STEPS, 50) for s in found.advice(step + 50, plain)] == []
    assert said(lambda step: dict.fromkeys(HEALTHY, math.nan)) == {}


def test_the_loop_prints_advice_beside_a_log_line(capsys):
    run = mock.MagicMock()
    run.monitor.summary.return_value = HEALTHY | {"skipped": 3.0}
    run.optimizer.learning_rate_at.return_value = 0.1
    for run.health, words in ((health(), "advice for another run: 3 of the last"), (None, None)):
        train._log_metrics(run, types.SimpleNamespace(skipped=3), 50)
        found = capsys.readouterr().out
        assert words in found if words else not found
    assert run.writer.scalars.call_count == 2


def test_other_tasks_get_none():
    assert tokenizer_health.of(object(), STEPS, 0) is None
