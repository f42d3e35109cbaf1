"""Every config builds its model, by shapes alone, and has the size that the paper gives."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from enat_jax import optim, reveal, sampling, sharding, train_config
from enat_jax.models import vqgan
from enat_jax.tasks import enat as enat_task
from enat_jax.tasks import token_data
from enat_jax.tasks import vqgan as vqgan_task

DIRECTORY = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in DIRECTORY.glob("*.py") if path.stem != "common")
# Parameters in millions without the reference's dead `prev_embedder` (method Section 3).
MILLIONS = {
    "enat_s_imagenet256": 49.3,
    "enat_b_imagenet256": 214.9,
    "enat_l_imagenet256": 565.9,
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def parameters(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    config = load(path)
    sections = train_config.SECTIONS[config.task] | {"task", "seed"}
    assert sections - {"sharding"} <= set(config) <= sections
    train_config.Loop(**config.train.to_dict())
    sharding.Sharding(**config.get("sharding", {}))
    optim.Optimizer(**config.optimizer.to_dict()).make(config.train.num_steps)
    settings = config.model.to_dict()
    if config.task == "vqgan":
        vqgan_task.Loss(**config.loss.to_dict())
        data = vqgan_task.Data.of(config.data.to_dict() | {"source": "digits"})
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
    model = enat_task.MODELS[settings.pop("kind")](**settings)
    assert model.reuse or not splits.reuse_probability
    sampling.plan(sampler, model)
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
        "nat_s_imagenet256",
        "vqgan_imagenet256",
    }


def test_the_512_config_differs_as_in_the_paper():
    config = load(next(p for p in CONFIGS if p.stem == "enat_l_imagenet512"))
    assert (config.train.batch_size, config.optimizer.learning_rate) == (512, 1e-4)
    assert (config.sampler.guidance_scale, config.sampler.token_temperature) == (3.5, 4.0)
    assert config.model.num_tokens == 1024 and config.model.width == 1024
