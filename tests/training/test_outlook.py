"""What a run cannot get to in its steps is said before it starts, with what to set instead."""

import pathlib
import re

import pytest

from enat_jax.training import config as train_config
from enat_jax.training import optim, outlook

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
LOSSES = {task: sections["loss"] for task, sections in train_config.SECTIONS.items()}


def said(name, *overrides):
    path = next(path for path in CONFIGS if path.stem == name)
    config = train_config.complete(train_config.load(str(path), overrides))
    loop, optimizer = train_config.Loop(**config.train), optim.Optimizer(**config.optimizer)
    return list(outlook.sentences(loop, optimizer, LOSSES[config.task](**config.loss)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_have_steps_for_all_they_set(path):
    assert said(path.stem) == []


@pytest.mark.parametrize("steps", [20, 100, 400, 3000, 20_000, 1_000_000])
@pytest.mark.parametrize("name", ["images", "images_vqgan"])
def test_configs_of_own_pictures_have_so_for_any_number_of_steps(name, steps):
    assert said(name, f"--config.train.num_steps={steps}") == []


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (
            "enat_l_imagenet256",
            ["train.num_steps=400"],
            [
                "the warm-up takes 5,000 steps of 400, so the learning rate comes to 8% of",
                "still is 96% the initial parameters after 400 steps, as config.loss.ema_decay=0.9",
                "eval_every=25000 is more than the 400 steps, so only the end is evaluated",
                "save_every=5000 is more than the 400 steps, so a run that is killed starts from",
            ],
        ),
        ("enat_b_imagenet256", ["train.num_steps=25_000"], ["still is 8% the initial parameters"]),
        ("images", ["loss.ema_warmup=False", "train.num_steps=9"], ["still is 100% the initial"]),
        ("digits", ["optimizer.decay_steps=1000"], ["the learning rate is 0 after step 1,000 of"]),
        ("digits", ["optimizer.decay_steps=4000"], ["the learning rate is still 52% of its peak"]),
        (
            "digits",
            ["optimizer.warmup_steps=1500"],
            ["takes 1,500 steps of 2,000, so the learning"],
        ),
        (
            "vqgan_imagenet256",
            ["train.num_steps=300", "optimizer.warmup_steps=0", "train.eval_every=9"],
            ["no code can be found dead before step 120", "save_every=5000 is more than the 300"],
        ),
        ("digits_vqgan", ["loss.restart_until=400"], ["codes are restarted up to the last step"]),
        ("digits_vqgan", ["loss.restart_until=20"], ["no code can be found dead before step 20"]),
        ("digits_vqgan", ["loss.restart_until=2"], []),  # only the first one is wanted
        ("digits_vqgan", ["loss.restart_every=0", "loss.restart_until=900"], []),
        ("digits_features", ["train.eval_every=1001"], ["so only the end is evaluated"]),
    ],
)
def test_what_cannot_be_got_to_is_said_and_mended_by_what_is_advised(name, overrides, words):
    flags = [f"--config.{override}" for override in overrides]
    sentences = said(name, *flags)
    assert len(sentences) == len(words), sentences
    for sentence, expected in zip(sentences, words, strict=True):
        assert expected in sentence, sentence
    for which in (0, -1):  # of "one or the other"
        given = []
        for sentence in sentences:
            advice = re.findall(r"--config\.\w+\.\w+=\S+", sentence.split(": give ")[1])
            given += [advice[which]] if " or " in sentence else advice
        assert len(given) >= len(words)
        assert said(name, *flags, *given) == []
