"""The tables of the ablations: from made runs, of tiny models, whose numbers are known."""

import json
import pathlib
import runpy
import shutil

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import analyze
from enat_jax.evaluation import (
    ablation,
    ablation_claims,
    ablation_runs,
    ablation_tables,
    reuse_gap,
)
from enat_jax.inference import generator, masked_scores
from enat_jax.schedules import costs

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"num_tokens": 16, "codebook_size": 8, "num_classes": 3, "width": 8, "num_heads": 1}
ENAT = SIZES | {"encoder_layers": 2, "decoder_layers": 1}
NETWORKS = {
    "nat": ("nat", SIZES | {"num_layers": 2}),
    "disentangled_7_1": ("enat", ENAT | {"reuse": False}),
    "enat": ("enat", ENAT | {"reuse": True}),
}
DISTANCES = {"nat": [80, 81, 82], "disentangled_7_1": [70, 71.5, 71.9], "enat": [72, 72.3, 73]}
LOSSES = {"nat": 4.8, "disentangled_7_1": 4.7, "enat": 4.71}
SAMPLER = {"num_steps": 8, "guidance_scale": 2.0, "token_temperature": 1.0, "num_segments": 2}


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_run(directory, name, seed):
    kind, model = NETWORKS[name]
    config = {
        "seed": seed,
        "model": model,
        "mask": {"reveals": 1},
        "train": {"num_steps": 4, "batch_size": 2},
    }
    description = {
        "kind": kind,
        "model": model,
        "sampler": SAMPLER,
        "fingerprint": {"transformer": f"{name} {seed}", "tokenizer": "codes"},
        "provenance": {"config": config, "step": 4, "versions": {"jax": "0.10.2"}},
    }
    write(directory / "run" / "model" / "model.json", description)
    rows = [{"step": s, "time": 1.8e9, "seconds_per_step": 0.5} for s in (2, 4)]
    shares = [f"held_out/loss_{x:.4g}_visible" for x in masked_scores.VISIBLE_SHARES]
    for step, loss in ((2, 5.0), (4, LOSSES[name] + seed / 1000)):
        rows.append({"step": step, "time": 1.8e9} | dict.fromkeys(shares, loss))
    (directory / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def card(name, seed, steps):
    number = {"standard_error": 0.51}
    return {
        "metrics": {
            "frechet_distance": {"value": DISTANCES[name][seed] + 8 - steps} | number,
            "precision": {"value": 0.6} | number,
            "recall": {"value": 0.3 + seed / 100} | number,
        },
        "features": {"label": "Fréchet distance in features of a network"},
        "images": {"num": 5000, "seed": 0},
        "reference": {"description": {"num_images": 1018, "source": {"split": "test"}}},
        "sampler": ablation_runs._settings(
            ablation_runs.sampling.Settings(**SAMPLER), NOWHERE, steps
        ).described()
        | {"guidance_scale": 3.0},
        "hardware": {"device": "cpu", "cpu": "A CPU", "num_cpus": 2},
        "date": f"2027-01-0{steps % 4 + 1}",
        "model": {"fingerprint": {"transformer": f"{name} {seed}"}},
    }


NOWHERE = pathlib.Path("nowhere")


def pair(mean, error=0.001):
    return {"mean": mean, "standard_error": error}


def of_images(name, seed, **values):
    return {"transformer": f"{name} {seed}", "num_images": 1018} | values


def write_measured(directory, name, seed):
    write(directory / "machine.json", {"machine": {"device": "A chip", "cpus": 3}})
    base = LOSSES[name] + seed / 1000
    shares = [base + 0.2, base + 0.1, base - 0.1, base - 0.2]
    loss = {
        "visible_shares": list(masked_scores.VISIBLE_SHARES),
        "loss": pair(shares, [0.01] * 4),
        "all": pair(base, 0.01),
        "hardware": {"device": "cpu", "cpu": "A CPU", "num_cpus": 2},
        "date": "2027-01-09",
    }
    write(directory / "loss.json", of_images(name, seed, **loss))
    for steps in ablation.STEPS:
        write(directory / f"steps_{steps}" / "card.json", card(name, seed, steps))


@pytest.fixture
def runs(tmp_path):
    """Three models of three seeds; of enat reuse, similarity and speed of seed 0, too."""
    for name in NETWORKS:
        for seed in range(3):
            write_run(tmp_path / name / f"seed_{seed}", name, seed)
            write_measured(tmp_path / name / f"seed_{seed}", name, seed)
        for steps in ablation.STEPS:
            settings = {"sampler": card(name, 0, steps)["sampler"]}
            write(tmp_path / name / f"steps_{steps}" / "settings.json", settings)
            rows = [{"values": [[80.0], [81.0]]}]
            report = {"trials": 16, "measure": {"num": 500}, "rows": rows}
            write(tmp_path / name / f"steps_{steps}" / "report.json", report)
    first = tmp_path / "enat" / "seed_0"
    kinds = {
        kind: {"increase": pair([0.0, 0.02], [0, 0.002]), "all": {"increase": pair(0.01)}}
        for kind in reuse_gap.KINDS
    }
    drawn = {kind: {"increase": pair([1.26, 0.0, 0.0], [0.31, 0, 0])} for kind in reuse_gap.KINDS}
    kinds |= {"steps": [2, 3], "visible": [0.25, 0.625]}
    more = {"losses": kinds, "distances": drawn | {"seeds": [0, 1]}, "num_drawn": 500}
    write(first / "reuse" / "reuse.json", of_images("enat", 0, **more))
    tokens = {"newly revealed": [2, 4]}
    more = {"num_tokens": 16, "tokens": tokens, "change_share": pair([0.6, 0.8], [0.01, 0.01])}
    write(first / "similarity" / "similarity.json", of_images("enat", 0, **more))
    for i in (1, 2):
        timed = {
            "rows": [{"images": 10, "seconds": [0.02 * i, 0.05]}],
            "model": {"kind": "enat", "width": 8, "attention": "cudnn"},
        }
        write(first / f"speed_{i}.json", timed)
    return tmp_path


def test_what_is_there_becomes_numbers_and_what_is_not_a_line(runs):
    result, missing = ablation_runs.gather(runs)
    enat = result["models"]["enat"]
    assert enat["layers"] == [2, 1] and enat["multiply_adds"]["8"] < enat["multiply_adds"]["12"]
    dims = costs.Dims(8, 2, 1, num_tokens=16, codebook_size=8)
    assert enat["multiply_adds"]["8"] == costs.exact_sampling_cost(dims, 8)
    assert enat["settings"]["4"] == {"guidance_scale": 3.0}
    first = enat["seeds"]["0"]
    assert first["cards"]["12"]["frechet_distance"] == [68, 0.51]
    assert first["loss"][1] == [4.71, 0.01] and first["machine"] == "A chip, 3 CPUs"
    assert (first["images"], first["seconds"], first["date"]) == (8, 2.0, "2027-01-15")
    assert first["speed"] == [4.5, 2, 5, 4]
    there = [line for line in missing if line.startswith(str(runs / "enat"))]
    assert there[:2] == [f"{runs / 'enat' / f'seed_{i}'}: no reuse/reuse.json" for i in (1, 2)]
    assert there[2] == f"{runs / 'enat_without_f'}: no finished training in seed_0, seed_1, seed_2"
    assert f"{runs / 'nat' / 'seed_0'}: no speed.json" in missing


def test_blank_cells_are_those_of_missing_files(runs):
    (runs / "nat" / "seed_1" / "steps_8" / "card.json").unlink()
    (runs / "nat" / "seed_2" / "run" / "model" / "model.json").unlink()
    (runs / "nat" / "seed_0" / "run" / "metrics.jsonl").unlink()
    for seed in range(3):
        (runs / "enat" / f"seed_{seed}" / "loss.json").unlink()
    result, missing = ablation_runs.gather(runs)
    assert f"{runs / 'nat' / 'seed_1'}: no steps_8/card.json" in missing
    assert f"{runs / 'nat' / 'seed_0'}: no run/metrics.jsonl, speed.json" in missing
    text = ablation_tables.markdown(result)
    assert "| nat | 2 | 84.5 ± 0.5 | 80.0 ± 0.6 * (1) | 76.5 ± 0.5 |" in text
    assert "| enat | 3 | | | | | |" in text
    assert "| nat | 2 | 5.0005 ± 0.0005 |" in text


def test_claims_are_decided_by_their_interval(runs):
    """By hand: 7 + 1 less nat is -10, -9.5, -10.1; enat less 7 + 1 is 2, 0.8, 1.1."""
    result = ablation_runs.gather(runs)[0]
    of = ablation_claims.measured("frechet_distance", "8")
    found = ablation_claims.difference(result, ["disentangled_7_1"], "nat", of)
    assert found.num == 3 and found.mean == pytest.approx(-29.6 / 3)
    assert found.error == pytest.approx(np.std([-10, -9.5, -10.1], ddof=1) / 3**0.5)
    rows = [x for x in ablation_tables.markdown(result).splitlines() if " less " in x]
    apart, _, _, reuse, *_ = rows
    assert "| 3 | -9.87 ± 0.19 | **holds here** | -0.1 ± 0 | **holds here** |" in apart
    assert (
        "times less cost (" in reuse
        and "| +1.3 ± 0.4 | **holds here** | +0.020 ± 0.015 * | undecided |" in reuse
    )
    assert ablation_claims.verdict(ablation_claims.Summary(3, 1.3, 0.36)) == "undecided"
    assert ablation_claims.verdict(ablation_claims.Summary(3, 1.3, 0.3)) == "**fails here**"
    assert ablation_claims.verdict(ablation_claims.Summary(2, -9.0, 0.01)) == "undecided"
    assert ablation_claims.verdict(ablation_claims.summary([])) == ""


def test_the_loss_in_sampling_has_what_reuse_adds():
    seed = {"loss": [None, [4.7, 0.03]]}
    assert ablation_claims.sampled_loss({}) is None
    assert ablation_claims.sampled_loss(seed) == [4.7, 0.03]
    seed["reused"] = reuse_gap.ONCE
    assert ablation_claims.sampled_loss(seed) is None
    seed["reuse"] = {reuse_gap.EVERY_STEP: {"loss": [0.5, 9.0]}}
    seed["reuse"][reuse_gap.ONCE] = {"loss": [0.2, 0.04]}
    assert ablation_claims.sampled_loss(seed) == pytest.approx([4.9, 0.05])


def test_what_reuse_costs_is_told_by_step(runs):
    text = ablation_tables.markdown(ablation_runs.gather(runs)[0])
    assert (
        "trainings | step 3, 25% visible | step 4, 62% visible | mean of steps | distance |" in text
    )
    numbers = "+0 ± 0 * | +0.0200 ± 0.0020 * | +0.0100 ± 0.0010 * | +1.3 ± 0.4 * |"
    for kind in reuse_gap.KINDS:
        assert (f"| enat | {kind} | 1 | {numbers}" in text) == (kind != reuse_gap.RECOMPUTED)
    other = json.loads((runs / "enat" / "seed_0" / "reuse" / "reuse.json").read_text())
    other["losses"]["steps"] = [1, 2]
    other["transformer"] = "enat 1"
    write(runs / "enat" / "seed_1" / "reuse" / "reuse.json", other)
    with pytest.raises(ValueError, match=r"reuse.json has reuse_steps \[1, 2\], and another"):
        ablation_runs.gather(runs)


def test_losses_at_equal_compute_are_between_two_evaluations(runs):
    result = ablation_runs.gather(runs)[0]
    work = {name: x["training_multiply_adds"] for name, x in result["models"].items()}
    cheapest = min(work, key=work.get)
    text = ablation_tables.markdown(result).partition("### Held-out loss at equal training")[2]
    assert work[cheapest] < max(work.values()) and set(work) == set(NETWORKS)
    for name, last in LOSSES.items():
        step = 4 * work[cheapest] / work[name]
        loss = 5 + (step - 2) / 2 * (last + 0.001 - 5)
        row = next(x for x in text.splitlines() if x.startswith(f"| {name} |")).split(" | ")
        assert row[1] == "3" and float(row[3].split(" ± ")[0]) == pytest.approx(loss, abs=6e-5)
    (runs / "nat" / "seed_0" / "run" / "metrics.jsonl").unlink()
    (runs / "nat" / "seed_1" / "run" / "metrics.jsonl").unlink()
    whole = ablation_tables.markdown(ablation_runs.gather(runs)[0])
    text = whole.partition("### Held-out loss at equal training")[2].partition("###")[0]
    assert "| nat |" not in text and "| enat | 3 |" in text
    assert "| trainings, small, 4 steps, jax 0.10.2 | 7 |" in whole  # where they were recorded


def write_stopped(place, name, seed):
    """A training without a model, where one has come to its end that looks like it."""
    write_run(place, name, seed)
    shutil.rmtree(place / "run" / "model")
    with (place / "run" / "metrics.jsonl").open("a") as file:  # it went on after its evaluation
        file.write("\n" + json.dumps({"step": 5, "time": 1.8e9, "seconds_per_step": 0.5}))
    write(place / "run" / "config.json", {"train": {"batch_size": 3}})
    write(place / "machine.json", {"machine": {"device": "A chip", "cpus": 3, "jax": "0.11.2"}})


def test_losses_on_the_way_are_those_of_stopped_trainings_too(runs):
    for name in ("nat", "enat"):
        write_stopped(runs / f"{name}_long" / "seed_0", name, 0)
    result, _ = ablation_runs.gather(runs)
    text = ablation_tables.markdown(result).partition("### Held-out loss on the way")[2]
    rows = [line for line in text.split("###")[0].splitlines() if line[:3] in ("| s", "| l")]
    assert rows[1:] == [
        "| small | 2 | 4 | 5 ± 0 | | +0 ± 0 | +0 ± 0 |",
        "| small | 4 | 8 | 4.8010 ± 0.0006 | | -0.1 ± 0 | -0.09 ± 0 |",
        "| large, trained long | 2 | 6 | 5.0000 * | | | +0.0000 * |",
        "| large, trained long | 4 | 12 | 4.8000 * | | | -0.0900 * |",
    ]
    assert (
        "| trainings, large, trained long, stopped, jax 0.11.2 | 2 | A chip, 3 CPUs | 2027-01-15 |"
        in text
    )
    whole = runs / "whole.json"
    whole.write_bytes(ablation.json_bytes(result))
    shutil.rmtree(runs / "nat_long")
    shutil.rmtree(runs / "enat_long")
    assert ablation.join(ablation_runs.gather(runs)[0], whole) == result
    write_run(runs / "enat_long" / "seed_0", "enat", 0)
    joined = ablation.join(ablation_runs.gather(runs)[0], whole)
    assert list(joined["unfinished"]) == ["nat_long"]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (4.7156, 0.0121, "4.716 ± 0.013"),
        (4.7156, 0.031, "4.72 ± 0.04"),
        (-0.06, 0.3, "-0.1 ± 0.3"),
        (-0.01, 0.3, "0.0 ± 0.3"),
        (70.04, 0.95, "70 ± 1.0"),
        (88.4, 12.0, "88 ± 12"),
        (1.0, 0.0, "1 ± 0"),
    ],
)
def test_errors_are_rounded_up_and_values_to_their_digit(value, error, text):
    assert ablation_claims.rounded(value, error).replace("70.0 ±", "70 ±") == text


def test_the_program_makes_the_same_tables_of_its_numbers(runs, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    analyze.main(["ablation", "--runs", str(runs), "--out", str(out)])
    printed = capsys.readouterr()
    assert f"missing: {runs / 'nat' / 'seed_0'}: no speed.json" in printed.err
    analyze.main(["ablation", "--json", str(out / "ablation.json"), "--out", str(again)])
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="--draw needs the models of --runs"):
        analyze.main(["ablation", "--json", "a.json", "--draw", "3", "--out", str(again)])
    write(tmp_path / "damaged.json", {"format": ablation.FORMAT})
    with pytest.raises(ValueError, match=r"damaged.json is damaged: KeyError\('models'\)"):
        analyze.main(["ablation", "--json", str(tmp_path / "damaged.json"), "--out", str(again)])
    for name in ("ablation.json", "ablation.md", "ablation.png"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    text = (out / "ablation.md").read_text()
    assert text in printed.out
    page = f"# Page\n{ablation_tables.MARKERS[0]}{text}{ablation_tables.MARKERS[1]}\nMore.\n"
    assert ablation_tables.of_page(page) == text
    with pytest.raises(ValueError, match="needs these two lines once"):
        ablation_tables.of_page(page + page)
    with PIL.Image.open(out / "ablation.png") as image:
        assert image.width < 2 * image.height  # no axes for cuts that nobody has trained
        assert (np.asarray(image.convert("RGB")) == [0x00, 0x72, 0xB2]).all(axis=-1).any()


def test_runs_of_two_machines_are_joined(runs, tmp_path, capsys):
    """What was measured in one place, cut in two: the halves give it again, either way round."""
    out = tmp_path / "out"
    whole = ablation_runs.gather(runs)[0]
    assert whole["common"]["tokenizer"] == "codes" and whole["common"]["training_steps"] == 4
    kept = tmp_path / "elsewhere" / "kept"
    kept.mkdir(parents=True)
    (runs / "enat").rename(kept / "enat")
    (runs / "nat" / "seed_2").rename(kept / "nat_2")
    first = runs / "ablation.json"
    first.write_bytes(ablation.json_bytes(ablation_runs.gather(runs)[0]))
    (kept / "enat").rename(runs / "enat")
    (kept / "nat_2").rename(runs / "nat" / "seed_2")
    for x in ("disentangled_7_1", "nat/seed_0", "nat/seed_1", "nat/steps_4"):
        shutil.rmtree(runs / x)
    analyze.main(["ablation", "--runs", str(runs), "--json", str(first), "--out", str(out)])
    assert ablation.read(out / "ablation.json") == whole
    with pytest.raises(ValueError, match="give --runs, the directory of the runs, or --json"):
        analyze.main(["ablation", "--out", str(out)])
    other = json.loads(first.read_text())
    other["models"]["nat"]["settings"]["8"] = {"guidance_scale": 9.0}
    write(first, other)
    with pytest.raises(ValueError, match="ablation.json of the settings for 8 steps has 8"):
        ablation.join(ablation_runs.gather(runs)[0], first)
    other["common"]["tokenizer"] = "others"
    write(first, other)
    with pytest.raises(ValueError, match="ablation.json has tokenizer others, and another file c"):
        ablation.join(ablation_runs.gather(runs)[0], first)


def test_what_does_not_belong_together_is_refused(runs):
    def refused(path, message, **values):
        before = path.read_text()
        write(path, json.loads(before) | values)
        with pytest.raises(ValueError, match=message) as error:
            ablation_runs.gather(runs)
        assert str(path) in str(error.value)
        path.write_text(before)

    first = runs / "nat" / "seed_1"
    refused(first / "loss.json", "is of another model than .*run", transformer="x")
    refused(first / "steps_4" / "card.json", "images 50, and .* 5000", images={"num": 50})
    refused(runs / "nat" / "steps_8" / "report.json", "search_trials 8, and .* 16", trials=8)
    other = card("nat", 1, 4)["sampler"] | {"guidance_scale": 9}
    refused(first / "steps_4" / "card.json", "was not drawn with .*steps_4.settings", sampler=other)
    refused(first / "steps_4" / "card.json", "is damaged: KeyError", metrics={})
    refused(first / "run" / "model" / "model.json", "not the model of the other seeds", model={})
    timed = runs / "enat" / "seed_0" / "speed_2.json"
    refused(timed, "is of another model than", model={"width": 8, "encoder_layers": 3})
    (first / "run" / "metrics.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged .*: delete what is no JSON"):
        ablation_runs.gather(runs)
    with pytest.raises(ValueError, match="has no NAME/seed_S"):
        ablation_runs.gather(runs / "nat")


class Drawer:
    """Draws white squares, and remembers with what."""

    settings, class_names, calls = ablation_runs.sampling.Settings(**SAMPLER), tiny.CLASSES, []

    def with_settings(self, **changes):
        self.calls.append(changes["guidance_scale"])
        return self

    def sample(self, labels, seed):
        self.calls.append((labels.tolist(), seed))
        return np.full((len(labels), 32, 32, 3), 255, np.uint8)


def test_samples_of_all_models_have_a_row_each(runs, monkeypatch):
    monkeypatch.setattr(generator.Generator, "load", lambda directory: Drawer())
    drawn = ablation_runs.draw(runs, dict.fromkeys(["nat", "enat", "enat_large"]), 5, 8, 7)
    assert 2 * 64 < drawn.shape[0] < 3 * 64 and drawn.shape[1] > 5 * 64
    assert Drawer.calls == [3.0, ([0, 0, 1, 1, 2], 7)] * 2
    with pytest.raises(ValueError, match="no NAME/seed_0/run/model to draw from"):
        ablation_runs.draw(runs, {"enat_large": None}, 5, 8, 7)


def test_the_losses_of_a_model_are_written(tmp_path, monkeypatch):
    """Image i has a loss of i, and of 0.1 less with every further visible token."""
    model = tiny.make_generator()

    def scores(self, codes, labels, num_visible, seed):
        loss = np.repeat(np.asarray(labels)[:, None] - num_visible / 10, 16 - num_visible, axis=1)
        return loss, loss > 0

    monkeypatch.setattr(generator.Generator, "load", lambda directory: model)
    monkeypatch.setattr(generator.Generator, "masked_scores", scores)
    codes, labels = np.zeros((3, 16), int), np.arange(3)
    more = {"codebook_size": tiny.CODES, "class_names": tiny.CLASSES}
    made = tiny.token_set(codes, labels, **more, tokenizer=model.tokenizer.fingerprint)
    tiny.write_tokens(tmp_path / "tokens", made)
    arguments = ["--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "out")]
    analyze.main(["loss", "--model", str(tmp_path), *arguments, "--batch-size", "2"])
    found = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert found["loss"]["mean"] == pytest.approx([0.9, 0.6, 0.2, -0.2])
    assert found["all"]["mean"] == pytest.approx(0.375)
    assert found["all"]["standard_error"] == pytest.approx(1 / 3**0.5)
    assert found["transformer"] == model.fingerprint and found["num_images"] == 3
    text = (tmp_path / "out" / "loss.md").read_text()
    assert "| 0.9000 ± 0.5774 | 0.6000 ± 0.5774 | 0.2000" in text


NUMBERS = ROOT / "configs" / "ablation.json"


@pytest.mark.skipif(not NUMBERS.is_file(), reason="the ablations have not been measured yet")
def test_the_page_has_the_tables_of_its_numbers():
    page = (ROOT / "configs" / "ablation.md").read_text(encoding="utf-8")
    assert ablation_tables.of_page(page) == ablation_tables.markdown(ablation.read(NUMBERS))
    assert NUMBERS.stat().st_size < 60_000


def test_the_models_are_those_of_the_config():
    config = runpy.run_path(str(ROOT / "configs" / "cifar10_ablation.py"))
    assert set(ablation.MODELS) == {*config["MODELS"], f"enat_reveals_4{ablation.ONCE}"}
    assert [end.removeprefix("_") for end in ablation.SIZES] == ["", *config["SIZES"]]
    small, large, long = (config["get_config"](f"nat{end}") for end in ablation.SIZES)
    assert small.model.width * 2 == large.model.width == long.model.width
    images = [x.train.num_steps * x.train.batch_size for x in (small, large, long)]
    assert images == [128_000, 128_000, 20 * 128_000]


def test_an_exported_model_cost_what_its_training_did(runs):
    def made(once):
        for path in (runs / "enat").glob("seed_*/run/model/model.json"):
            description = json.loads(path.read_text())
            description["model"]["project_once"] = once
            description["provenance"]["config"]["mask"]["reveals"] = 4
            write(path, description)
        return ablation_runs.gather(runs)[0]["models"]["enat"]

    plain, once = made(False), made(True)
    assert once["training_multiply_adds"] == plain["training_multiply_adds"]
    assert once["multiply_adds"]["8"] < plain["multiply_adds"]["8"]
