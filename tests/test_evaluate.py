"""The evaluation program: cards of models and tokenizers, stops, hosts, and mistakes."""

import errno
import functools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import tiny

from enat_jax import evaluate
from enat_jax.data import images
from enat_jax.evaluation import cards, features, image_sets, passes, statistics
from enat_jax.inference import generator, tokenizer
from enat_jax.metrics import fid
from enat_jax.runtime import cli, files

ROOT = pathlib.Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10_train.zip"
FEATURES = ["--features", "random:0"]


# Every evaluation would compile its network and its model anew.
LOAD = functools.cache(generator.Generator.load)
OPEN_FEATURES = functools.cache(features.open_features)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator.Generator, "load", LOAD)
        patch.setattr(features, "open_features", OPEN_FEATURES)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory; images of 8x8 grey pixels in 3 classes."""
    directory = tmp_path_factory.mktemp("model")
    tiny.make_generator().save(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def write_pictures(directory, n=64, size=8):  # as many as are drawn at once: one compilation
    rng = np.random.default_rng(0)
    for i in range(n):
        path = directory / tiny.CLASSES[i % 2] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(path)
    return directory


def run(*arguments):
    evaluate.main([str(x) for x in arguments])


def of_model(model, pictures, out, *more):
    run("--model", model, "--reference", pictures, *FEATURES, "--num", 9, "--out", out, *more)


@pytest.fixture(scope="module")
def card(model, pictures, tmp_path_factory):
    """Directory of a finished evaluation."""
    out = tmp_path_factory.mktemp("card") / "out"
    of_model(model, pictures, out, "--replicates", 3, "--steps", 2)
    return out


def test_a_card_says_all_that_decided_its_numbers(card, model):
    found = cards.read(card)
    made = tiny.make_generator()
    assert found["sampler"]["num_steps"] == 2 and found["sampler"]["guidance_scale"] == 1.0
    assert found["model"]["path"] == str(model) and found["model"]["dtype"] == "float32"
    assert found["model"]["fingerprint"] == {
        "transformer": made.fingerprint,
        "tokenizer": made.tokenizer.fingerprint,
    }
    assert found["images"] == {
        "num": 9, "per_class": [3, 3], "classes": 3, "size": [8, 8, 1], "seed": 0
    }  # fmt: skip
    assert found["features"]["kind"] == "random" and found["features"]["origin"] == {"seed": 0}
    assert found["reference"]["description"]["num_images"] == 64
    assert found["hardware"]["num_devices"] == 8 and found["versions"]["enat_jax"]
    assert set(found["seconds"]) == {"images", "features", "metrics"}
    assert found["headline"] == "frechet_distance"
    assert list(found["metrics"]) == [
        "frechet_distance", "precision", "recall", "density", "coverage"
    ]  # fmt: skip


def test_its_numbers_are_those_of_the_images_themselves(card, model):
    """Drawn at once, through the features at once, by NumPy's covariance."""
    network = features.open_features("random:0")
    images = (
        tiny.make_generator()
        .with_settings(num_steps=2)
        .sample(np.arange(9) % 3, seed=0, batch_size=64)
    )
    pool = network(images)["pool"].astype(np.float64)
    reference = statistics.Statistics.load(card / "reference.npz")
    expected = fid.frechet_distance(pool.mean(0), np.cov(pool.T), *reference.gaussian("pool"))
    found = cards.read(card)["metrics"]["frechet_distance"]
    assert found["value"] == pytest.approx(expected, rel=1e-8)
    assert found["low"] < found["value"] < found["high"] and found["replicates"] == 3


def test_what_must_be_known_is_in_the_card_itself(card):
    found = cards.read(card)
    said = " ".join(found["caveats"])
    assert "Only 9 images were measured" in said and "no FID" in said
    assert "The reference has 2 classes, the measured images 3" in said
    text = (card / "card.md").read_text()
    assert text.index("Read before comparing") < text.index("Only 9 images") < text.index("Numbers")
    assert "FID" not in text.replace("The distance is no FID: ", "")


def test_a_finished_evaluation_is_shown_and_not_made_again(card, model, pictures, capsys):
    before = {path: path.stat().st_mtime_ns for path in card.rglob("*")}
    of_model(model, pictures, card, "--replicates", 3, "--steps", 2)
    assert "# Evaluation of the model" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in card.rglob("*")} == before


def test_statistics_of_a_source_are_made_once_and_give_the_same_numbers(
    card, model, pictures, tmp_path, capsys
):
    file = tmp_path / "reference.npz"
    make = ["--make-reference", file, "--reference", pictures, *FEATURES, "--size", 8]
    make += ["--set", "channels=1"]
    run(*make)
    assert [x.name for x in tmp_path.iterdir()] == ["reference.npz"]
    found = statistics.Statistics.load(file).description
    assert (found["num_images"], found["class_counts"]) == (64, [32, 32])
    assert found["resolution"] == [8, 8] and found["crop"].startswith("centre")
    run(*make)
    assert "already holds these statistics" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds other statistics: features.label is"):
        run(*make, "--features", "random:1")
    with pytest.raises(ValueError, match="holds other statistics: kept is 64, now it would be 4"):
        run(*make, "--keep", 4)
    of_model(model, file, tmp_path / "out", "--replicates", 3, "--steps", 2)
    again, before = cards.read(tmp_path / "out"), cards.read(card)
    assert again["metrics"] == before["metrics"]
    assert len(again["reference"]["sha256"]) == 64
    capsys.readouterr()
    run("--compare", card, tmp_path / "out")
    assert "The settings of both are the same." in capsys.readouterr().out


def test_tokenizers_are_measured_by_their_reconstructions(model, tmp_path, pictures, capsys):
    out = tmp_path / "out"
    run(
        "--tokenizer",
        model / "tokenizer",
        "--source",
        pictures,
        *FEATURES,
        "--out",
        out,
        "--replicates",
        3,
    )
    found = cards.read(out)
    assert list(found["metrics"])[:2] == ["rfrechet_distance", "psnr"]
    made = tokenizer.Tokenizer.load(model / "tokenizer")
    originals = np.stack(
        [np.asarray(PIL.Image.open(p))[..., None] for p in sorted(pictures.rglob("*.png"))]
    )
    error = (made.decode(made.encode(originals)).astype(float) - originals) / 255
    expected = -10 * np.log10(np.square(error).mean())
    assert found["metrics"]["psnr"]["value"] == pytest.approx(expected, rel=1e-6)
    assert "of 64 reconstructions of 8x8 pixels" in capsys.readouterr().out
    assert found["images"]["split"] == "train" and "split train" in found["reference"]["about"]
    assert "may have been trained on" in " ".join(found["caveats"])


def test_hosts_share_an_evaluation(card, model, pictures, tmp_path, capsys):
    for host in (1, 0):
        of_model(
            model, pictures, tmp_path, "--replicates", 3, "--steps", 2,
            "--num-hosts", 2, "--host-index", host,
        )  # fmt: skip
        assert ("complete when the others' are" in capsys.readouterr().out) == (host == 1)
    found, expected = cards.read(tmp_path)["metrics"], cards.read(card)["metrics"]
    assert found == expected  # 9 images are one chunk


def test_ctrl_c_saves_and_says_how_to_go_on(card, model, pictures, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    common = ["--model", model, "--reference", card / "reference.npz", *FEATURES, "--num", 9]
    common += ["--steps", 2, "--replicates", 0, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(generator.Generator, "sample", interrupted)
        with pytest.raises(SystemExit) as ended:
            cli.run(evaluate.main, [str(x) for x in common])
    assert ended.value.code == 75
    assert capsys.readouterr().err == (
        "stopped: saved after 0 of 9 images (images); start the same command again to go on\n"
    )
    run(*common)
    found = cards.read(tmp_path / "out")["metrics"]["frechet_distance"]
    assert found["value"] == cards.read(card)["metrics"]["frechet_distance"]["value"]
    assert found["low"] is None


def test_a_second_ctrl_c_does_not_claim_to_have_saved(card, model, tmp_path, capsys, monkeypatch):
    def interrupted_while_saving(*arguments, **options):
        try:
            raise KeyboardInterrupt
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "run", interrupted_while_saving)
    with pytest.raises(SystemExit) as ended:
        cli.run(
            lambda _: of_model(model, card / "reference.npz", tmp_path / "out", "--steps", 2), []
        )
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_images_beside_adms_statistics_serve_for_precision_and_recall(tmp_path):
    path = adm_like(tmp_path)
    pictures = np.arange(300 * 4 * 4 * 3).reshape(300, 4, 4, 3).astype(np.uint8)
    with np.load(path) as arrays:
        np.savez(path, arr_0=pictures, **arrays)
    reference = image_sets.Reference(str(path), "", "", statistics.Statistics.load(path))

    def network(batch):
        return {"pool": np.tile(batch[:, 0, 0].astype(np.float32), 683)[:, :2048]}

    hosts = passes.Hosts(0, 1, 60.0)
    found = passes.statistics_of_reference(reference, network, tmp_path, hosts)
    np.testing.assert_array_equal(found.pool, network(pictures)["pool"])
    assert found.description["resolution"] == [4, 4]


# --- mistakes ------------------------------------------------------------------------------------


def adm_like(tmp):
    """Statistics of 2048 and 2023 features, of another network than ours."""
    path = tmp / "adm.npz"
    sizes = {"mu": 2048, "mu_s": 2023}
    arrays = {name: np.zeros(n) for name, n in sizes.items()}
    arrays |= {name.replace("mu", "sigma"): np.eye(n) for name, n in sizes.items()}
    np.savez(path, **arrays)
    return path


def folder(tmp, name="empty"):
    (tmp / name).mkdir()
    return tmp / name


def single(tmp):
    return write_pictures(folder(tmp, "single"), n=1)


def not_a_card(tmp):
    (tmp / "card.json").write_text('{"format": "recipe"}')
    return tmp


def occupied(tmp):
    (folder(tmp, "theirs") / "thesis.tex").write_text("years of work")
    return tmp / "theirs"


MODEL_MISTAKES = {  # changes to the arguments of a whole evaluation, and words of the message
    "no such model": (lambda tmp: {"--model": tmp / "nothing"}, "nothing"),
    "no such reference": (lambda tmp: {"--reference": tmp / "nothing.npz"}, "nothing.npz"),
    "no such source": (lambda tmp: {"--reference": tmp / "nothing"}, "does not exist"),
    "a folder without pictures": (lambda tmp: {"--reference": folder(tmp)}, "empty"),
    "statistics of other features": (
        lambda tmp: {"--reference": adm_like(tmp)},
        "is of other features: kind inception, those in use have random",
    ),
    "another resolution": (
        lambda tmp: {"--set": "size=16"},
        "are 16x16 pixels of 1 channel, those to measure 8x8",
    ),
    "an unknown setting": (
        lambda tmp: {"--set": "colour=1"},
        "--set colour=... is no setting of",
    ),
    "no weights of Inception": (lambda tmp: {"--features": "inception"}, "--inception FILE"),
    "unknown features": (lambda tmp: {"--features": "vgg"}, "there are no features 'vgg'"),
    "one image": (lambda tmp: {"--num": 1}, "--num 1 is too few"),
    "fewer images than classes": (lambda tmp: {"--num": 2}, "a model of 3 classes needs at least"),
    "a directory of other things": (lambda tmp: {"--out": occupied(tmp)}, "something else already"),
    "a file in the way": (lambda tmp: {"--out": adm_like(tmp) / "out"}, "adm.npz"),
    "a wrong schedule": (lambda tmp: {"--guidance-schedule": "square"}, "square"),
    "no steps": (lambda tmp: {"--steps": 0}, "num_steps=0"),
    "one replicate": (lambda tmp: {"--replicates": 1}, "--replicates 1 must be 0 or at least 2"),
    "never saving": (lambda tmp: {"--save-every": "nan"}, "--save-every nan must be at least 0"),
    "what has no effect": (lambda tmp: {"--source": tmp}, "--source has no effect with --model"),
    "a single picture": (lambda tmp: {"--reference": single(tmp)}, "there is 1 picture in"),
    "a host too many": (lambda tmp: {"--host-index": 1}, "--host-index 1 is not in [0, 1)"),
    "nothing to write to": (lambda tmp: {"--out": None}, "--model needs --out"),
    "nothing to compare with": (lambda tmp: {"--reference": None}, "--model needs --reference"),
}
OTHER_MISTAKES = {
    "no card": (lambda tmp: ["--compare", tmp, tmp], "name the card.json"),
    "something else than a card": (
        lambda tmp: ["--compare", not_a_card(tmp), tmp],
        "is of format 'recipe'",
    ),
    "a number of pictures": (
        lambda tmp: ["--images", tmp, "--reference", tmp, "--out", tmp / "out", "--num", 300],
        "--num has no effect with --images",
    ),
    "no source": (lambda tmp: ["--tokenizer", tmp, "--out", tmp], "--tokenizer needs --source"),
    "statistics of another name": (
        lambda tmp: ["--make-reference", tmp / "stats", "--reference", "digits"],
        "ends in .npz",
    ),
    "no size": (
        lambda tmp: ["--make-reference", tmp / "s.npz", "--reference", folder(tmp), *FEATURES],
        "size",
    ),
}


def refused(arguments, tmp_path, capsys):
    """The line of the error on standard error; nothing on disk may have changed."""
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate.main, [str(x) for x in arguments])
    assert ended.value.code == 2
    *_, line = lines = capsys.readouterr().err.splitlines()
    assert [x for x in lines if x.startswith("error: ")] == [line]
    assert {p: p.read_bytes() for p in before} == before
    return line


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_is_one_line(model, pictures, tmp_path, capsys, mistake):
    changes, words = MODEL_MISTAKES[mistake]
    values = {
        "--model": model, "--reference": pictures, "--features": "random:0", "--num": 9,
        "--out": tmp_path / "out",
    }  # fmt: skip
    values |= changes(tmp_path)
    arguments = [x for pair in values.items() if pair[1] is not None for x in pair]
    assert words in refused(arguments, tmp_path, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", OTHER_MISTAKES)
def test_a_mistake_of_another_use_is_one_line(tmp_path, capsys, mistake):
    arguments, words = OTHER_MISTAKES[mistake]
    assert words in refused(arguments(tmp_path), tmp_path, capsys)


def test_model_and_reference_swapped(model, pictures, tmp_path, capsys):
    arguments = ["--model", pictures, "--reference", model, *FEATURES, "--out", tmp_path / "out"]
    assert "were --model and --reference swapped?" in refused(arguments, tmp_path, capsys)


def test_other_settings_are_refused_with_what_differs(card, model, pictures, tmp_path, capsys):
    arguments = ["--model", model, "--reference", pictures, *FEATURES, "--num", 9]
    arguments += ["--out", card, "--replicates", 3, "--steps", 3]
    line = refused(arguments, card, capsys)
    assert "images.model.sampler.num_steps is 2, now it would be 3: name another --out" in line


def test_a_full_disk_is_one_line_and_can_be_continued(card, model, tmp_path, capsys, monkeypatch):
    written = files.write_atomically

    def full(path, content):
        if path.name == "state.npz":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, content)

    arguments = ["--model", model, "--reference", card / "reference.npz", *FEATURES, "--num", 9]
    arguments += ["--out", tmp_path / "out", "--replicates", 0, "--steps", 2]
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        with pytest.raises(SystemExit):
            cli.run(evaluate.main, [str(x) for x in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: No space left on device: ")
    assert "state.npz: make room there" in lines[-1]
    run(*arguments)
    assert cards.read(tmp_path / "out")["metrics"]["frechet_distance"]["value"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not at hand")
def test_ten_thousand_real_images_against_forty_thousand_others(tmp_path):
    """The whole path, file to number, against NumPy and SciPy on the same features."""
    with zipfile.ZipFile(CIFAR) as whole:
        names = sorted(name for name in whole.namelist() if name.endswith(".jpg"))
        parts = {"few.zip": names[::5], "many.zip": sorted(set(names) - set(names[::5]))}
        for name, members in parts.items():
            with zipfile.ZipFile(tmp_path / name, "w") as part:
                for member in members:
                    part.writestr(member, whole.read(member))
    assert [len(x) for x in parts.values()] == [10_000, 40_000]
    size = ["--size", 32, "--split", "all"]
    run("--images", tmp_path / "few.zip", "--reference", tmp_path / "many.zip", *size, *FEATURES,
        "--out", tmp_path / "out", "--keep", 100, "--replicates", 0)  # fmt: skip
    found = cards.read(tmp_path / "out")["metrics"]["frechet_distance"]["value"]
    network, gaussians = features.open_features("random:0"), []
    for name in parts:
        source = images.open_source(str(tmp_path / name), "all", size=32)
        indices = np.array_split(np.arange(len(source)), 10)
        pool = [network(source.gather(rows)["images"])["pool"] for rows in indices]
        pool = np.concatenate(pool).astype(np.float64)
        gaussians.append((pool.mean(0), np.cov(pool, rowvar=False)))
    (m1, c1), (m2, c2) = gaussians
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(model, pictures, tmp_path):
    """Eight kills -9 of processes that save after every chunk of 256 images."""
    module = [sys.executable, "-m", "enat_jax.evaluate", "--model", str(model), *FEATURES]
    module += ["--reference", str(pictures), "--num", "4000", "--save-every", "0"]
    module += ["--replicates", "0", "--keep", "30"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*module, "--out", str(tmp_path / "whole")], check=True, **quiet)
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    state = out / "images" / "00000-of-00001" / "state.npz"

    def written():
        return state.stat().st_mtime_ns if state.exists() else 0

    while not (out / "card.json").exists():
        process = subprocess.Popen([*module, "--out", str(out)], **quiet)
        last, left = written(), rng.randrange(1, 3)
        while process.poll() is None and kills < 8:
            if (now := written()) != last:
                last, left = now, left - 1
            if not left:
                time.sleep(rng.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 4
    for name in ("images.npz", "reference.npz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cards.read(out)["metrics"] == cards.read(tmp_path / "whole")["metrics"]


@pytest.mark.slow
def test_hidden_centres_of_pictures_are_filled_and_measured(model, tmp_path, capsys):
    made = tiny.make_generator()
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "pictures" / tiny.CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    codes = rng.integers(0, tiny.CODES, (12, tiny.NUM_TOKENS))
    about = {"codebook_size": tiny.CODES, "class_names": tiny.CLASSES}
    for name, fingerprint in {"own": made.tokenizer.fingerprint, "other": "0" * 64}.items():
        token_set = tiny.token_set(codes, np.arange(12) % 3, tokenizer=fingerprint, **about)
        tiny.write_tokens(tmp_path / name, token_set)
    given = ["--model", model, "--reference", tmp_path / "pictures", *FEATURES]

    run(*given, "--fill-centres", tmp_path / "own", "--steps", 2, "--out", tmp_path / "out")
    rows = files.read_json(tmp_path / "out" / "filled.json", "")
    assert [row["name"] for row in rows] == [
        "reconstructed", "marginals", "ignoring what is kept", "filled"
    ]  # fmt: skip
    network = features.open_features("random:0")
    source = images.open_source(str(tmp_path / "pictures"), "train", channels=1, size=8)
    pictures = source.gather(np.arange(12))["images"]
    seen = made.tokenizer.decode(made.tokenizer.encode(pictures))
    pools = [network(x)["pool"] for x in (seen, pictures)]
    distance = fid.frechet_distance(*(x for pool in pools for x in fid.gaussian_statistics(pool)))
    assert rows[0]["value"] == pytest.approx(distance, rel=1e-6) and rows[0]["value_error"] > 0
    # Of four by four tokens the middle and its neighbours are all, so that nothing is kept.
    assert rows[2]["loss"] == rows[3]["loss"] > 0
    table = (tmp_path / "out" / "filled.md").read_text()
    assert table.strip() in capsys.readouterr().out and "12 held-out pictures, centre" in table

    for more, said in (
        (["--fill-centres", tmp_path / "other"], "come from another tokenizer than the model's"),
        (
            ["--fill-centres", tmp_path / "own", "--num", 9],
            "--num has no effect with --fill-centres",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            run(*given, *more, "--out", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
