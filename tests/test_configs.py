"""Every config builds its model, by shapes alone, and has the size that the paper gives."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
import tiny

from enat_jax.data import image_data, token_data
from enat_jax.inference import sampling
from enat_jax.models import classifier, nat, transformers, vqgan
from enat_jax.runtime import sharding
from enat_jax.schedules import reveal
from enat_jax.training import classifier_task, enat_task, masked_tokens, optim, vqgan_task
from enat_jax.training import config as train_config

DIRECTORY = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in DIRECTORY.glob("*.py") if path.stem != "common")
# Parameters in millions without the reference's dead `prev_embedder` (method Section 3).
MILLIONS = {
    "enat_s_imagenet256": 49.3,
    "enat_b_imagenet256": 214.9,
    "enat_l_imagenet256": 565.9,
}


def load(path, *argument):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def parameters(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    config = load(path)
    sections = train_config.SECTIONS[config.task] | {"task", "seed"}
    assert sections - train_config.OPTIONAL <= set(config) <= sections
    train_config.Loop(**config.train.to_dict())
    sharding.Sharding(**config.get("sharding", {}))
    optim.Optimizer(**config.optimizer.to_dict()).make(config.train.num_steps)
    settings = config.model.to_dict()
    if config.task == "classifier":
        classifier_task.Loss(**config.loss.to_dict())
        data = image_data.Data.of(config.data.to_dict())
        model = classifier.Classifier(num_classes=10, image_channels=1, **settings)
        size = data.settings["size"]
        assert parameters(model, jnp.zeros((1, size, size, 1))) > 0
        return
    if config.task == "vqgan":
        vqgan_task.Loss(**config.loss.to_dict())
        data = image_data.Data.of(config.data.to_dict() | {"source": "digits"})
        assert data.settings["size"] > 0
        model = vqgan.VQGAN(**settings)
        side = model.downsampling
        assert parameters(model, jnp.zeros((1, side, side, model.image_channels))) > 0
        return
    sampler = sampling.Settings(**config.sampler.to_dict())
    enat_task.Training(**config.training.to_dict())
    # Configs for one's own data leave to the command line where they are, and sizes to the data.
    token_data.Data(**config.data.to_dict() | {"tokens": "a", "tokenizer": "b"})
    sizes = {"num_tokens": 256, "codebook_size": 1024, "num_classes": 3}
    settings |= {name: size for name, size in sizes.items() if settings[name] is None}
    splits = reveal.SplitDistribution(**config.mask.to_dict())
    model = transformers.MODELS[settings.pop("kind")](**settings)
    assert model.reuse or not splits.reuse_probability
    sampling.make_schedule(sampler, model)
    ids = jnp.zeros((1, model.num_tokens), jnp.int32)
    count = parameters(model, ids, jnp.zeros((1,), jnp.int32))
    if path.stem in MILLIONS:
        assert count / 1e6 == pytest.approx(MILLIONS[path.stem], abs=0.06)


def test_all_configs_of_the_paper_are_there():
    assert {path.stem for path in CONFIGS} >= MILLIONS.keys() | {
        "cifar10",
        "cifar10_vqgan",
        "digits",
        "digits_vqgan",
        "disentangled_s_imagenet256",
        "enat_l_imagenet512",
        "images",
        "images_vqgan",
        "nat_quadrants_imagenet256",
        "nat_s_imagenet256",
        "vqgan_imagenet256",
    }


def test_the_512_config_differs_as_in_the_paper():
    config = load(next(p for p in CONFIGS if p.stem == "enat_l_imagenet512"))
    assert (config.train.batch_size, config.optimizer.learning_rate) == (512, 1e-4)
    assert (config.sampler.guidance_scale, config.sampler.token_temperature) == (3.5, 4.0)
    assert config.model.num_tokens == 1024 and config.model.width == 1024


@pytest.mark.parametrize(
    ("stem", "base"),
    [
        ("nat_quadrants_imagenet256", "nat_s_imagenet256"),
        ("digits_nat_quadrants", "digits_nat"),
    ],
)
def test_quadrant_configs_are_the_baseline_but_for_the_quadrant(stem, base):
    """Named after the colon of --config FILE:NAME; all cost the same and have the same weights."""
    path = next(p for p in CONFIGS if p.stem == stem)
    expected = load(path.with_stem(base)).to_dict()
    sizes = set()
    for disabled in ("none", *nat.QUADRANTS):
        config = load(path, disabled).to_dict()
        settings = config["model"]
        assert settings["disabled_attention"] == disabled
        assert config == {
            **expected,
            "model": {**expected["model"], "disabled_attention": disabled},
        }
        model = nat.NAT(**{k: v for k, v in settings.items() if k != "kind"})
        ids = jnp.zeros((1, model.num_tokens), jnp.int32)
        sizes.add(parameters(model, ids, jnp.zeros((1,), jnp.int32)))
    assert len(sizes) == 1


def test_a_step_runs_without_a_quadrant():
    """Of a model of 4 tokens."""
    path = DIRECTORY / "digits_nat_quadrants.py"
    settings = load(path, "visible_from_masked").model.to_dict()
    sizes = {"num_tokens": 4, "codebook_size": 3, "num_classes": 2, "width": 4, "num_heads": 1}
    model = transformers.MODELS[settings.pop("kind")](**settings | sizes | {"num_layers": 1})
    assert model.disabled_attention == "visible_from_masked"
    ids = jnp.array([[0, 1, 2, 0]])
    batch = {"ids": ids, "positions": jnp.array([[2, 0, 3, 1]]), "labels": jnp.array([1])}
    params = tiny.random_params(model.init, ids, batch["labels"], seed=0)

    @jax.jit
    def step(params):
        counts, windows = (0, 2), reveal.Windows(0, 2, 2, 2)
        loss, _ = masked_tokens.step_loss(
            model, params, params, batch, counts, windows, smoothing=0.0, exact=True
        )
        return loss

    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(jax.grad(step)(params)))
