"""The commands for MS-COCO in configs/README.md, on a made-up one of 40 pictures."""

import json
import pathlib
import re
import shlex

import fake_coco
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import evaluate, sample, tokenize_captions, tokenize_images, train
from enat_jax.data import captioned, tokens
from enat_jax.generator import Generator
from enat_jax.inference import tokenizer
from enat_jax.training import config as train_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
TRAINING, HELD_OUT = range(100, 140), range(500, 510)
COLOURS = ((200, 40, 40), (40, 160, 40), (40, 40, 200), (200, 200, 40), (30, 30, 30), (240,) * 3)
# What the config's model is too large for.
SMALLER = """
    model.width=16 model.num_heads=2 model.encoder_layers=1 model.num_tokens=16
    model.codebook_size=8 model.text_width=6 model.text_tokens=8 model.dtype=float32
    loss.max_shapes=2 loss.ema_decay=0.9 sampler.num_steps=3 sampler.num_segments=1
    optimizer.warmup_steps=1 train.batch_size=8 train.num_steps=4 train.save_every=2
    train.log_every=2 train.matrix_rate=false
""".split()


def write_pictures(folder, numbers, year, part):
    """Pictures in the colour of their noun, not square, one of them grey."""
    folder.mkdir(parents=True)
    for n in numbers:
        colour = np.array(COLOURS[n % len(COLOURS)])
        pixels = np.clip(colour + np.random.default_rng(n).normal(0, 8, (9, 12, 3)), 0, 255)
        picture = PIL.Image.fromarray(pixels.astype(np.uint8)).convert("RGB" if n % 7 else "L")
        picture.save(folder / fake_coco.file_name(n, year, part))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """MS-COCO in the layouts of 2014 and 2017, a tokenizer and a text encoder, of no training."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    root = tmp_path_factory.mktemp("coco")
    for part, numbers in (("train", TRAINING), ("val", HELD_OUT)):
        for year in (2014, 2017):
            write_pictures(root / f"coco/{part}{year}", numbers, year, part)
            annotations = root / f"coco/annotations/captions_{part}{year}.json"
            fake_coco.write_captions(annotations, numbers, year, part)
    model = tiny.CODEC.clone(image_channels=3)
    params = tiny.random_params(model.init, jnp.zeros((1, 8, 8, 3)), seed=0)
    codec = tokenizer.Tokenizer(model, params, tiny.IMAGE_SIZE, {"weights": "random"})
    codec.save(root / "models/vqgan_imagenet256")
    for seed in (0, 1):
        tiny.make_clip(seed).save(root / f"models/clip_l14{seed or ''}")
    return root


def commands(program, year=2014):
    """The arguments of each command of a program in the section for MS-COCO."""
    text = (ROOT / "configs/README.md").read_text()
    section = text[text.index("\n## Text to image") :]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("2014", str(year)).replace("runs/coco", f"runs/{year}"))
        if words[2] == f"enat_jax.{program}":
            yield words[3:]


def config(*changes, year=2014):
    overrides = [f"--config.{change}" for change in (*SMALLER, *changes)]
    found = train_config.load(str(ROOT / "configs/enat_b_coco256.py"), overrides)
    found.data = {k: v.replace("runs/coco", f"runs/{year}") for k, v in found.data.items()}
    return train_config.complete(found)


@pytest.fixture(scope="module")
def made(coco):
    """What the commands before training have made, in both layouts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(coco)
        for year in (2014, 2017):
            for program in (tokenize_images, tokenize_captions):
                for arguments in commands(program.__name__.rpartition(".")[2], year):
                    program.main(arguments)
        yield coco


def test_both_layouts_are_the_same_data(made):
    rows = []
    for year in (2014, 2017):
        folder = made / f"runs/{year}/tokens"
        found = captioned.open_captions(folder / "captions", folder)
        assert (np.diff(found.first) >= 2).all() and len(found.first) == 41
        token_set = captioned.Captioned.of(tokens.TokenSet.open(folder), found, 8)
        assert len(token_set) == 80  # with mirror images
        rows.append(token_set.gather(np.arange(80)))
    for name, found in rows[0].items():
        np.testing.assert_array_equal(found, rows[1][name])
    # "A cat stands left of a bench", and in the mirrored picture right of it.
    first, mirrored = rows[0]["text"][:2]
    assert (1823 in first) and (1155 in mirrored) and (first != mirrored).sum() == 1


@pytest.fixture(scope="module")
def trained(made):
    train.train(config(), made / "runs/2014/enat")
    return made


def test_it_is_trained_and_draws(trained):
    workdir = trained / "runs/2014/enat"
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = {k: v for line in lines for k, v in line.items()}
    gauges = [last[f"held_out/text_use_{x}_visible"] for x in ("0", "0.0625", "0.25")]
    assert np.isfinite([last["loss"], *gauges]).all()
    assert list((workdir / "pictures").glob("*.png"))
    (arguments,) = commands("sample")
    sample.main(arguments)
    out = trained / "runs/2014/pictures"
    names = sorted(path.name for path in out.glob("0*.png"))
    assert len(names) == 8 and names[0].startswith("00000_a_cat_on_a_red")
    assert len(np.unique(PIL.Image.open(out / "grid.png"))) > 2


def test_its_card_is_written(trained):
    (arguments,) = commands("evaluate")
    features = arguments.index("--inception")
    arguments[features : features + 2] = ["--features", "random:0"]
    arguments[arguments.index("--size") + 1] = "8"
    evaluate.main([*arguments, "--num", "10", "--replicates", "0"])
    card = (trained / "runs/2014/evaluation/card.md").read_text()
    assert "10 images of 8x8 pixels, against 10 images of coco/val2014" in card


def leaves(directory):
    generator = Generator.load(directory)
    return jax.tree.map(np.asarray, generator.params)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(trained):
    workdir = trained / "runs/stopped"
    train.train(config("train.num_steps=2"), workdir)
    train.train(config(), workdir)
    jax.tree.map(
        np.testing.assert_array_equal,
        leaves(workdir / "model"),
        leaves(trained / "runs/2014/enat/model"),
    )


OTHERS = {
    "other captions": ("data.captions=runs/2014/tokens/others", "data.captions"),
    "another encoder": ("data.text_encoder=models/clip_l141", "data.text.encoder.weights"),
    "another window": ("model.text_tokens=7", "text_tokens"),
    "padding that is masked": ("model.attend_padding=false", "attend_padding"),
    "another way to encode": ("model.text_encoding=once", "text_encoding"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_does_not_go_on_with_other_texts(trained, name):
    change, words = OTHERS[name]
    if name == "other captions":
        arguments = next(iter(commands("tokenize_captions")))
        arguments[-1] = "runs/2014/tokens/others"
        tokenize_captions.main([*arguments, "--mirror-words", "keep"])
    with pytest.raises(ValueError) as refused:
        train.train(config(change), trained / "runs/2014/enat")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_training_on_what_is_evaluated_is_refused(made):
    arguments = next(iter(commands("tokenize_captions", 2017)))
    arguments[arguments.index("--held-out-tokens") + 1] = "runs/2014/tokens"
    with pytest.raises(ValueError, match="pictures of runs/2014/tokens are in .* as well"):
        tokenize_captions.main(arguments)
