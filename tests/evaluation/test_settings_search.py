"""The search for settings: what is tried, how it goes on, and what is reported."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import sample, search
from enat_jax.evaluation import settings_search
from enat_jax.inference import sampler_settings
from enat_jax.inference.sampler_settings import Settings
from enat_jax.runtime import files
from enat_jax.schedules import reveal

BASE = Settings(4, 2.0, token_temperature=3.0, mask_temperature=5.0)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a search needs to know of a model that it does not draw with."""

    settings: Settings = BASE
    model: types.SimpleNamespace = dataclasses.field(
        default_factory=lambda: types.SimpleNamespace(num_tokens=64)
    )


class Measure:
    """Best where the guidance of the last step is 1; noise by seed. Counts its calls."""

    names = ("distance", "other")
    identity = {}

    def __init__(self, fails_at=None):
        self.fails_at, self.seeds = fails_at, []

    def __call__(self, model, seed, final=False):
        self.seeds.append(seed)
        if len(self.seeds) == self.fails_at:
            raise KeyboardInterrupt
        guidance = model.settings.guidance_weights()[-1]
        noise = np.random.default_rng(seed).normal() * 1e-3
        return {"distance": (guidance - 1) ** 2 + noise + 10 * final, "other": float(seed)}


def begun(out, measure=None, said=None):
    say = (lambda text: None) if said is None else said.append
    return settings_search.Search(Model(), measure or Measure(), out, 3, 2, say)


def test_start_is_the_schedule_of_the_given_settings():
    for base in (BASE, tiny.SETTINGS, dataclasses.replace(BASE, guidance_schedule="constant")):
        parameters = settings_search.start(base, "confidence")
        found = settings_search.settings_of(base, parameters, 64)
        np.testing.assert_allclose(found.guidance_weights(), base.guidance_weights(), atol=1e-6)
        np.testing.assert_allclose(found.temperatures(), base.temperatures(), atol=1e-6)
        counts = reveal.mask_counts(64, base.num_steps)
        np.testing.assert_array_equal(found.counts, -np.diff(counts))
    found = settings_search.settings_of(BASE, settings_search.start(BASE, "halton"), 64)
    assert found.order == "halton" and found.mask_temperatures == (0.0,) * 4


@pytest.mark.parametrize("num_tokens, num_steps", [(1, 1), (16, 3), (64, 100), (1024, 8)])
def test_whatever_is_tried_suits_the_model(num_tokens, num_steps):
    base = dataclasses.replace(BASE, num_steps=num_steps)
    for power in (0.5, 0.75, 1.0, 1.25, 1.5):
        parameters = settings_search.start(base, "halton") | {"reveal_power": power}
        settings_search.settings_of(base, parameters, num_tokens).check_counts(num_tokens)


# --- the study ------------------------------------------------------------------------------------


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


def test_a_search_goes_on_after_interruptions(optuna, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path, Measure(fails_at=4)).run(10)
    killed = begun(tmp_path)
    assert len(killed._complete()) == 3
    killed.study.ask()  # of a process that was killed: it never tells
    measure, said = Measure(), []
    going_on = begun(tmp_path, measure, said)
    going_on.run(10)
    assert len(measure.seeds) == 7 and set(measure.seeds) == {3}
    assert said[0].startswith("trial 4 of 10: ") and said[-1].startswith("trial 10 of 10: ")
    measure.seeds.clear()
    begun(tmp_path, measure).run(10)
    assert not measure.seeds
    orders = {trial.params["order"] for trial in going_on._complete()[:2]}
    assert orders == {"confidence", "halton"}


def test_the_winner_is_chosen_and_reported_on_other_seeds(optuna, tmp_path):
    measure = Measure()
    found = begun(tmp_path, measure)
    found.run(12)
    name, winner = found.winner()
    assert name.startswith("trial ") and abs(winner.guidance[-1] - 1) < 0.4
    rows = found.report(winner)
    assert [row.name for row in rows] == [
        *("default", "default, Halton's order", "searched", "default, half the steps")
    ]
    assert [row.num_steps for row in rows] == [4, 4, 4, 2]
    assert {seed for row in rows for _, seed in row.values} == {1004.0, 1005.0}
    assert set(measure.seeds) == {3, 4, 5, 1004, 1005}
    assert min(value for row in rows for value, _ in row.values) > 9  # measured as final ones
    table = settings_search.markdown(rows, 500)
    change = np.array(rows[2].values)[:, 0] - np.array(rows[0].values)[:, 0]
    assert f"{change.mean():+.4f} ± " in table and "2 seeds of 500 images" in table
    measure.seeds.clear()  # all that was measured is kept
    again = begun(tmp_path, measure)
    assert again.winner() == (name, winner) and again.report(winner) == rows
    assert not measure.seeds


def test_searches_take_turns_in_one_study(optuna, tmp_path):
    one, other = begun(tmp_path), begun(tmp_path)
    one.run(2)
    other.run(4)
    one.run(6)
    numbers = [trial.number for trial in begun(tmp_path)._complete()]
    assert numbers == list(range(6))


@pytest.mark.slow
def test_processes_share_one_study(optuna, tmp_path):
    code = (
        "import sys, pathlib, test_settings_search as t;"
        "m = t.Measure(); t.begun(pathlib.Path(sys.argv[1]), m).run(30); print(len(m.seeds))"
    )
    places = [str(pathlib.Path(__file__).parent), *sys.path]
    run = [sys.executable, "-c", f"import sys; sys.path[:] = {places!r}; {code}", str(tmp_path)]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    done = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert 30 <= sum(done) <= 31  # what both had begun when the last was told
    numbers = [trial.number for trial in begun(tmp_path)._complete()]
    assert len(numbers) == len(set(numbers)) == sum(done)


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model directory and a folder of pictures of its size."""
    place = tmp_path_factory.mktemp("search")
    tiny.make_generator().save(place / "model", ["safetensors"])
    (place / "pictures").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(place / "pictures" / f"{i:02d}.png")
    return place


def arguments(places, out, *more):
    given = ["--model", places / "model", "--reference", places / "pictures", "--out", out]
    given += ["--features", "random:0", "--num", 12, "--repeats", 2, "--trials", 1]
    return [str(x) for x in (*given, *more)]


def test_program_claims_its_directory_and_writes_what_others_take(
    optuna, places, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(settings_search, "make_measure", lambda *a, **k: Measure())
    search.main(arguments(places, tmp_path / "out", "--trials", 12))
    printed = capsys.readouterr()
    assert "[search] trial 12 of 12: distance" in printed.err
    assert (tmp_path / "out/report.md").read_text() in printed.out
    found = sampler_settings.changed(tiny.SETTINGS, tmp_path / "out/settings.json")
    assert found.num_steps == 3 and abs(found.guidance_weights()[-1] - 1) < 0.4
    search.main(arguments(places, tmp_path / "out", "--trials", 12))
    assert "trial" not in capsys.readouterr().err.replace("finalist trial", "")
    with files.lock_directory(tmp_path / "out"):
        search.main(arguments(places, tmp_path / "out", "--trials", 12))
    assert "another process writes the report" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds an evaluation with other settings"):
        search.main(arguments(places, tmp_path / "out", "--steps", 2))


@pytest.mark.slow
def test_program_measures_by_features_and_writes_settings_that_sample_takes(
    optuna, places, tmp_path, capsys
):
    out = tmp_path / "out"
    search.main(arguments(places, out, "--steps", 1))
    printed = capsys.readouterr()
    assert "[search] trial 1 of 1: frechet_distance" in printed.err
    assert (out / "report.md").read_text() in printed.out
    written = json.loads((out / "settings.json").read_text())
    settings = Settings(**written["sampler"])
    assert settings.num_steps == 1
    report = json.loads((out / "report.json").read_text())
    assert len(report["rows"]) == 3 and report["sampler"]["num_steps"] == 1
    options = ["--model", str(places / "model"), "--labels", "0", "--num", "1"]
    options += ["--settings", str(out / "settings.json"), "--out", str(tmp_path / "images")]
    sample.main(options)
    images = json.loads((tmp_path / "images/settings.json").read_text())
    assert images["sampler"] == written["sampler"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--features", "digits"], "--features digits compares with digits"),
        (["--features", "nothing"], "features are 'inception'"),
        (["--num", "5"], "--num 5 is too few images"),
        (["--reference", "nowhere"], "nowhere"),
        (["--steps", "0"], "num_steps=0 must be a whole number"),
    ],
)
def test_mistakes_are_refused_before_anything_is_drawn(optuna, places, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        search.main(arguments(places, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_without_optuna_one_line_says_what_to_install(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match="optuna"):
        search.main(arguments(places, tmp_path / "out"))
