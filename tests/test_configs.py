"""Every config builds its model, by shapes alone, and has the size that the paper gives."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import pytest
import tiny
from absl import flags

from enat_jax.data import image_data, token_data
from enat_jax.evaluation import during_training
from enat_jax.inference import sampler_schedule, sampling
from enat_jax.models import classifier, enat, nat, transformers, vqgan
from enat_jax.profiling import setup, timing
from enat_jax.runtime import sharding
from enat_jax.schedules import costs, reveal
from enat_jax.training import classifier_task, enat_task, masked_tokens, optim, vqgan_task
from enat_jax.training import config as train_config
from enat_jax.training.settings import words

ROOT = pathlib.Path(__file__).parents[1]
DIRECTORY = ROOT / "configs"
CONFIGS = sorted(DIRECTORY.glob("*.py"))
# Parameters in millions without the reference's dead `prev_embedder` (method Section 3).
MILLIONS = {
    "enat_s_imagenet256": 49.3,
    "enat_b_imagenet256": 214.9,
    "enat_l_imagenet256": 565.9,
    "enat_b_coco256": 120.3,
}


def load(path, *argument, overrides=()):
    return train_config.complete(train_config.load(":".join([str(path), *argument]), overrides))


def parameters(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    config = load(path)
    assert set(config) == {"task", "seed", *train_config.schema(config.task)}
    train_config.Loop(**config.train.to_dict())
    sharding.Sharding(**config.sharding)
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
    enat_task.Loss(**config.loss.to_dict())
    during_training.Settings(**config.evaluation)
    # Configs for one's own data leave to the command line where they are, and sizes to the data.
    token_data.Data(**config.data.to_dict() | {"tokens": "a", "tokenizer": "b"})
    sizes = {"num_tokens": 256, "codebook_size": 1024, "num_classes": 3}
    settings |= {name: size for name, size in sizes.items() if settings[name] is None}
    splits = reveal.SplitDistribution(**config.mask.to_dict())
    model = transformers.MODELS[settings.pop("kind")](**settings)
    assert model.reuse or not splits.reuse_probability
    sampler_schedule.make(sampler, model)
    ids = jnp.zeros((1, model.num_tokens), jnp.int32)
    count = parameters(model, ids, jnp.zeros((1,), jnp.int32))
    if path.stem in MILLIONS:
        assert count / 1e6 == pytest.approx(MILLIONS[path.stem], abs=0.06)


@pytest.mark.parametrize("name", ["cifar10_vqgan", "images_vqgan"])
def test_adversarial_training_is_asked_for_by_name(name):
    """Without the name nothing changes, so runs that began before go on."""
    path = DIRECTORY / f"{name}.py"
    plain, adversarial = load(path), load(path, "adversarial")
    assert plain.perceptual.kind is None and plain.loss.ema_decay == 0
    assert plain.discriminator.weight == 0 < adversarial.discriminator.weight
    assert adversarial.perceptual.kind and adversarial.loss.ema_decay == 0.999
    with pytest.raises(flags.Error, match="'lpips' is unknown here"):
        load(path, "lpips")


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


# Of U-ViT's release for MS-COCO, the reference and the paper, see the config.
COCO = {
    "model": {
        "kind": "enat",
        "num_tokens": 256,
        "codebook_size": 1024,
        "num_classes": 0,
        "width": 768,
        "num_heads": 8,
        "encoder_layers": 15,
        "decoder_layers": 1,
        "mlp_ratio": 4,
        "dropout": 0.1,
        "position_init": "normal",
        "text_width": 768,
        "text_tokens": 77,
        "text_vocabulary": None,
        "attend_padding": True,
        "text_positions": False,
        "text_encoding": "every_step",
        "shared_key_value": True,
        "reuse_projection": "mlp",
        "dtype": "bfloat16",
    },
    "data": {
        "tokens": "runs/coco/tokens",
        "captions": "runs/coco/tokens/captions",
        "held_out_tokens": "runs/coco/tokens_held_out",
        "held_out_captions": "runs/coco/tokens_held_out/captions",
        "tokenizer": "models/vqgan_imagenet256",
        "text_encoder": "models/clip_l14",
    },
    "mask": {"mask_ratio": "beta", "alpha": 12.0, "beta": 3.0, "min_visible": 1}
    | {"reuse_probability": 0.5},
    "loss": {"label_smoothing": 0.1, "text_drop": 0.1, "ema_decay": 0.9999, "ema_warmup": False},
    "optimizer": {
        "learning_rate": 4e-4,
        "warmup_steps": 5000,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.9,
        "eps": 1e-8,
        "weight_decay": 0.03,
        "clip_norm": None,
    },
    "sampler": {"num_steps": 8, "guidance_scale": 2.5, "guidance_schedule": "linear"}
    | {"token_temperature": 6.0, "mask_temperature": 1.5},
    "train": {"batch_size": 2048, "num_steps": 150_000, "accumulate": 1},
}


def test_the_config_of_coco_is_as_it_says():
    config = load(DIRECTORY / "enat_b_coco256.py").to_dict()
    for section, values in COCO.items():
        assert {name: config[section][name] for name in values} == values


def test_the_sizes_of_the_text_model_are_those_that_the_config_says():
    """The paper has 116M parameters, and 0.3 T multiply-adds with the image decoder's 93.6 G."""
    settings = load(DIRECTORY / "enat_b_coco256.py").model.to_dict()
    del settings["kind"]

    def millions(**changes):
        model = enat.ENAT(**settings | changes)
        ids = jnp.zeros((1, model.num_tokens), jnp.int32)
        return parameters(model, ids, jnp.zeros((1,), jnp.int32)) / 1e6

    assert millions(reuse_projection="linear") == pytest.approx(116.22, abs=0.005)
    assert millions(text_encoding="once") == millions() == pytest.approx(120.35, abs=0.005)
    cost = costs.paper_cost(costs.dims_of(enat.ENAT(**settings)), 8) / 1e12
    assert cost + 0.0936 == pytest.approx(0.324, abs=0.0005)


@pytest.mark.parametrize("encoding", ["every_step", "once"])
def test_few_shapes_hold_the_steps_of_the_text_model(encoding):
    config = load(
        DIRECTORY / "enat_b_coco256.py", overrides=[f"--config.model.text_encoding={encoding}"]
    )
    task = setup.make_task(config, 1)
    probability, exact = timing.shape_shares(task)
    padded = timing.padded_work(task)
    assert len(task.buckets) == 40
    share = probability @ padded / (probability @ exact) - 1
    assert share == pytest.approx({"every_step": 0.085, "once": 0.078}[encoding], abs=0.001)
    work = [task.work(index) for index in range(2000)]  # of the splits that a run draws
    drawn = sum(x["padded_work"] for x in work) / sum(x["exact_work"] for x in work) - 1
    assert drawn == pytest.approx(share, abs=0.01)


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


# --- every setting is reachable -------------------------------------------------------------

# Another valid value of each type, as text of the command line and as the config has it.
VALUES = {
    "bool": ("true", True),
    "int": ("7", 7),
    "float": ("0.25", 0.25),
    "str": ("other", "other"),
    "tuple[float, float]": ("(0.25, 1)", (0.25, 1.0)),
    "tuple[int, ...]": ("[4, 60]", (4, 60)),
    "tuple[float, ...]": ("[1, 0.5]", (1.0, 0.5)),
    "Sequence[int]": ("[2, 3]", (2, 3)),
    "Sequence[tuple[str, tuple[str or None, ...]]]": (
        "[('up/kernel$', (None, 'fsdp'))]",
        (("up/kernel$", (None, "fsdp")),),
    ),
}
WRONG = {"bool": "maybe", "int": "1.5", "float": "wide"}  # of the other types: "("


def fields(config):
    """(section, name, setting, name of its type, whether it may be None) of a config."""
    sections = train_config.schema(config.task, config.model.get("kind"))
    for section, found in sections.items():
        for name, setting in found.items():
            kind, *others = re.split(r" or (?!None, \.)", words(setting))
            unset = setting.default is setting.empty
            yield section, name, setting, kind, unset or "None" in others


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_can_be_set_on_the_command_line(path):
    expected, overrides = load(path).to_dict(), ["--config.seed=3"]
    expected["seed"] = 3
    for section, name, _, kind, _ in fields(load(path)):
        if name != "kind":  # the other one has other settings
            text, expected[section][name] = VALUES[kind]
            overrides.append(f"--config.{section}.{name}={text}")
    assert len(overrides) > 50
    assert load(path, overrides=overrides).to_dict() == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_setting_of_another_type_is_refused_in_one_line(path):
    values = flags.FlagValues()
    holder = train_config.define(values)
    values(["", f"--config={path}"])
    complete = load(path).to_dict()
    for section, name, setting, kind, nullable in fields(holder.value):
        flag, expected = f"config.{section}.{name}", words(setting)
        if kind != "str":
            text = WRONG.get(kind, "(")
            with pytest.raises(flags.IllegalFlagValueError) as refused:
                values(["", f"--{flag}={text}"])
            assert str(refused.value) == f"flag --{flag}={text}: must be {expected}"
        changed = {**complete, section: {**complete[section], name: {3}}}
        if name != "kind":
            with pytest.raises(ValueError) as refused:
                train_config.complete(ml_collections.ConfigDict(changed))
            assert str(refused.value) == f"{flag}={{3}} must be {expected}"
        if nullable:
            values(["", f"--{flag}=None"])
            assert holder.value[section][name] is None


def settings_named_for_people():
    """(setting, its value or "", file), of READMEs, scripts, configs and our texts and messages."""
    texts = {}
    for pattern in ("*.md", "configs/*", "launch/*", "enat_jax/**/*.md", "enat_jax/**/*.py"):
        for path in ROOT.glob(pattern):
            if path.suffix == ".py" and path.parent.name != "configs":
                nodes = ast.walk(ast.parse(path.read_text()))
                constants = (x.value for x in nodes if isinstance(x, ast.Constant))
                texts[path] = "\n".join(x for x in constants if isinstance(x, str))
            elif path.suffix in (".md", ".py", ".sh", ".ipynb"):
                texts[path] = path.read_text()
    pattern = r"""\bconfig\.[a-z]+\.[a-z]\w*\b(?!\()(?:=[^\s`'"\\),;]*)?"""
    for path, text in texts.items():
        for found in re.findall(pattern, text):
            yield *found.partition("=")[::2], path.name


def test_every_setting_that_is_named_for_people_can_be_set():
    everywhere = []
    for name in ("digits", "digits_vqgan", "digits_features", "digits_nat"):
        everywhere.append(flags.FlagValues())
        train_config.define(everywhere[-1])
        everywhere[-1](["", f"--config={DIRECTORY / name}.py"])
    found = set(settings_named_for_people())
    assert len(found) > 20
    for name, value, where in found:
        fitting = [values for values in everywhere if name in values]
        assert fitting, f"{where} names {name}"
        if re.search(r"[a-z0-9]", value) and not re.search(r"[${<]", value):  # no placeholder
            fitting[0](["", f"--{name}={value}"])
