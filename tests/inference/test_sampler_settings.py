"""Settings of the sampler: orders, values of single steps, and files of them."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tiny

from enat_jax import export, sample
from enat_jax.inference import (
    compiled_sampler,
    generator,
    sampler_schedule,
    sampler_settings,
    sampling,
)
from enat_jax.inference.sampler_settings import Settings
from enat_jax.schedules import reveal
from enat_jax.training import config as train_config

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/digits.py")
LABELS = np.array([0, 1, 2, 0], np.int32)
# A greedy order without noise would be the same for many seeds.
HALTON = dataclasses.replace(tiny.SETTINGS, order="halton")
OF_STEPS = Settings(
    3,
    num_segments=1,
    counts=(2, 5, 9),
    guidance=(0.0, 2.0, 0.5),
    token_temperatures=(1.0, 0.0, 0.5),
    mask_temperatures=(3.0, 1.0, 0.0),
)


def halton_cells(side):
    """The first visits of a square grid by Halton's points, in plain fractions from the digits."""

    def inverse(i, base):
        value, weight = 0.0, 1.0 / base
        while i:
            value, i, weight = value + i % base * weight, i // base, weight / base
        return value

    seen = []
    i = 0
    while len(seen) < side * side:
        i += 1
        # No point lies on an edge to within rounding but from above.
        cell = tuple(int(inverse(i, base) * side + 1e-9) for base in (2, 3))
        if cell not in seen:
            seen.append(cell)
    return [row * side + column for row, column in seen]


def steps_of(visible):
    """The step that reveals each token, from what is visible after each step."""
    return np.asarray(visible).argmax(axis=0)


def test_halton_order_is_the_first_visits_of_the_sequence():
    for side in (1, 2, 4, 8, 16):
        order = reveal.halton_order(side, side)
        assert order.tolist() == halton_cells(side)
    # By hand: 1/2 and 1/3, 1/4 and 2/3, 3/4 and 1/9, 1/8 and 4/9 of 4 rows and 4 columns.
    assert reveal.halton_order(4, 4)[:4].tolist() == [2 * 4 + 1, 1 * 4 + 2, 3 * 4 + 0, 0 * 4 + 1]
    assert sorted(reveal.halton_order(3, 7)) == list(range(21))


def test_halton_reveals_in_its_order_whatever_the_noise():
    order = np.array(halton_cells(4))
    model = dataclasses.replace(tiny.make_generator(), settings=HALTON)
    found = model.trace(LABELS, seed=3)
    visible = found.visible
    for after, count in zip(visible, visible.sum(-1)[:, 0], strict=True):
        for image in after:
            assert set(np.flatnonzero(image)) == set(order[:count])
    cold = model.with_settings(mask_temperature=0.0).trace(LABELS, seed=3)
    np.testing.assert_array_equal(cold.tokens, found.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [HALTON, OF_STEPS])
def test_segments_change_no_token(settings):
    model = dataclasses.replace(tiny.make_generator(), settings=settings)
    cut = model.with_settings(num_segments=3).sample_tokens(LABELS)
    np.testing.assert_array_equal(cut, model.sample_tokens(LABELS))


def test_halton_visits_masked_tokens_alone():
    order = np.array(halton_cells(4))
    model = tiny.make_generator()
    numbers = np.array([6, 9, 10, 7])
    rng = np.random.default_rng(0)
    masked = rng.permuted(np.tile(np.arange(16), (4, 1)), axis=1) < numbers[:, None]
    given = sampling.Given(rng.integers(0, tiny.CODES, (4, 16)), masked)
    static, inputs = sampler_schedule.make(HALTON, model.model, numbers)
    rows = LABELS, np.arange(4, dtype=np.int32), jax.random.key(0)
    trace = sampling.trace_tokens(model.model, static, inputs, model.params, *rows, given=given)
    visible = np.asarray(trace.visible)
    for image in range(4):
        wanted = [p for p in order if masked[image, p]]
        step = steps_of(visible[:, image])[wanted]
        assert (np.diff(step) >= 0).all() and step[0] < step[-1]
    np.testing.assert_array_equal(np.asarray(trace.tokens)[-1][~masked], given.tokens[~masked])


def test_random_order_differs_by_image_and_is_no_order_of_confidence():
    model = dataclasses.replace(
        tiny.make_generator(), settings=dataclasses.replace(HALTON, order="random")
    )
    many = np.zeros(400, np.int32)
    step = steps_of(model.trace(many).visible)
    assert len({row.tobytes() for row in step}) > 100
    # Each place is as likely as another in the first step, which reveals 3 of 16 tokens.
    share = (step == 0).mean(axis=0)
    assert abs(share - (step == 0).mean()).max() < 5 * np.sqrt(0.19 * 0.81 / 400)


def test_values_of_single_steps_equal_those_that_settings_make():
    model = tiny.make_generator()
    settings = tiny.SETTINGS
    remaining = 1 - np.arange(1, 4) / 3
    listed = dataclasses.replace(
        settings,
        counts=[3, 5, 8],  # 16, 13, 8, 0 by the cosine
        guidance=settings.guidance_weights(),
        token_temperatures=(settings.token_temperature * remaining).tolist(),
        mask_temperatures=(settings.mask_temperature * remaining).tolist(),
        # Without effect beside the lists:
        guidance_scale=7.0,
        token_temperature=0.0,
        mask_temperature=0.0,
    )
    schedules = [sampler_schedule.make(s, model.model) for s in (settings, listed)]
    assert schedules[0][0] == schedules[1][0]
    for a, b in zip(*(jax.tree.leaves(inputs) for _, inputs in schedules), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    expected = model.sample_tokens(LABELS, seed=5)
    found = dataclasses.replace(model, settings=listed).sample_tokens(LABELS, seed=5)
    np.testing.assert_array_equal(found, expected)


def test_counts_are_what_each_step_reveals():
    model = dataclasses.replace(tiny.make_generator(), settings=OF_STEPS)
    visible = model.trace(LABELS).visible
    np.testing.assert_array_equal(visible.sum(-1), np.repeat([[2], [7], [16]], 4, axis=1))
    # In editing in proportion: of 8 tokens 8 - 8 * 14 // 16 = 1, then 3.5, and the rest.
    static, inputs = sampler_schedule.make(OF_STEPS, model.model, np.array([8, 10]))
    np.testing.assert_array_equal(inputs.num_left, [[7, 8], [4, 5], [0, 0]])
    assert len(
        {sampler_schedule.make(OF_STEPS, model.model, np.array([m]))[0] for m in range(1, 17)}
    ) == 4  # fmt: skip


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"order": "spiral"}, "order='spiral' is none of confidence, halton, random"),
        ({"counts": [8, 8]}, "counts has 2 values, and num_steps is 3"),
        ({"counts": [8, 8.0, 0]}, "counts=.* must be a list of whole numbers from 0"),
        ({"counts": [17, -1, 0]}, "counts=.* must be a list of whole numbers from 0"),
        ({"counts": [0, 0, 0]}, "counts are all 0"),
        ({"counts": "888"}, "counts='888' must be a list"),
        ({"guidance": [0, 1, float("nan")]}, "guidance=.* must be a list of numbers from 0"),
        ({"guidance": [True, 1, 1]}, "guidance=.* must be a list of numbers"),
        ({"token_temperatures": [1, 1, "1"]}, "token_temperatures=.* must be a list of numbers"),
        ({"mask_temperatures": [1, 1]}, "mask_temperatures has 2 values, and num_steps is 3"),
        ({"mask_temperatures": 1.0}, "mask_temperatures=1.0 must be a list"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.SETTINGS, **wrong)


def test_counts_must_suit_the_model_and_halton_the_grid():
    model = tiny.make_generator()
    wrong = dataclasses.replace(tiny.SETTINGS, counts=(5, 5, 5))
    with pytest.raises(ValueError, match="counts reveal 15 tokens in all, .* add up to 16"):
        dataclasses.replace(model, settings=wrong)
    with pytest.raises(ValueError, match="add up to 16"):
        sampler_schedule.make(wrong, model.model)
    other = model.model.clone(num_tokens=12)
    with pytest.raises(ValueError, match="needs the grid of the 12 tokens"):
        sampler_schedule.make(HALTON, other)
    static, _ = sampler_schedule.make(HALTON, other, grid=(3, 4))
    assert sorted(static.rank) == list(range(12))


# --- files ----------------------------------------------------------------------------------------


def test_files_of_default_settings_are_as_before():
    assert list(Settings().described()) == [
        *("num_steps", "guidance_scale", "token_temperature", "mask_temperature"),
        *("num_segments", "guidance_schedule", "guidance_interval"),
    ]
    assert Settings(**json.loads(json.dumps(OF_STEPS.described()))) == OF_STEPS
    assert Settings(**json.loads(json.dumps(HALTON.described()))) == HALTON


def test_files_of_settings(tmp_path):
    path = tmp_path / "settings.json"
    whole = {"sampler": tiny.SETTINGS.described(), "seed": 0}
    for content, expected in [
        ({"guidance_scale": 3}, dataclasses.replace(OF_STEPS, guidance_scale=3)),
        ({"order": "halton"}, dataclasses.replace(OF_STEPS, order="halton")),
        (whole, tiny.SETTINGS),
        (OF_STEPS.described(), OF_STEPS),
    ]:
        path.write_text(json.dumps(content))
        assert sampler_settings.changed(OF_STEPS, path) == expected
    found = sampler_settings.changed(tiny.SETTINGS, path, {"order": "halton"})
    assert found == dataclasses.replace(OF_STEPS, order="halton")
    for given, message in [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 has no effect, as the settings have guid"),
        ({"num_steps": 4}, "counts has 3 values, and num_steps is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler_settings.changed(OF_STEPS, None, given)
    for text, message in [
        ("{", "is damaged, it is not JSON"),
        ("[]", "holds no settings of the sampler"),
        ("{}", "holds no settings of the sampler"),
        ('{"steps": 3}', "'steps' is no setting of the sampler; there are num_steps,"),
        ('{"counts": [1]}', "settings.json: counts has 1 values"),
        ('{"guidance_scale": "2"}', "settings.json: "),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            sampler_settings.changed(tiny.SETTINGS, path)


def test_configs_take_files_of_settings_and_values_of_steps(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"sampler": OF_STEPS.described() | {"order": "random"}}))
    config = train_config.load(CONFIG, ["--config.sampler.order=halton"])
    assert train_config.complete(config).sampler.order == "halton"
    config = train_config.load(
        CONFIG, ["--config.sampler.num_steps=2", "--config.sampler.counts=24,40"]
    )
    assert Settings(**train_config.complete(config).sampler).counts == (24, 40)
    config.sampler = sampler_settings.read(path)
    found = Settings(**train_config.complete(config).sampler)
    assert found == dataclasses.replace(OF_STEPS, order="random")


def test_settings_of_steps_through_model_files_images_and_the_compiled_sampler(tmp_path):
    model = tiny.make_generator()
    model.save(tmp_path / "model", ["safetensors"])
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"sampler": OF_STEPS.described() | {"order": "halton"}}))
    options = ["--model", str(tmp_path / "model"), "--settings", str(path)]
    export.main([*options, "--out", str(tmp_path / "other"), "--format", "safetensors"])
    other = generator.Generator.load(tmp_path / "other")
    assert other.settings == dataclasses.replace(OF_STEPS, order="halton")
    assert "| counts | (2, 5, 9) |" in (tmp_path / "other/README.md").read_text()
    sample.main([*options, "--labels", "0,1,2", "--num", "1", "--out", str(tmp_path / "images")])
    written = json.loads((tmp_path / "images/settings.json").read_text())["sampler"]
    assert written["counts"] == [2, 5, 9] and written["order"] == "halton"
    with PIL.Image.open(next((tmp_path / "images").glob("00000_*.png"))) as image:
        assert json.loads(image.info["parameters"])["sampler"] == written
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, other.sample(LABELS[:3], seed=0)[0, ..., 0])
    program, description = compiled_sampler.make(other)
    assert description["settings"]["counts"] == (2, 5, 9)
    run = jax.jit(jax.export.deserialize(bytearray(program)).call)
    weights = {
        name: safetensors.numpy.load_file(tmp_path / "other" / file)
        for name, file in compiled_sampler.WEIGHTS.items()
    }
    schedule = {k: np.asarray(v, np.float32) for k, v in description["schedule"].items()}
    images = run(
        weights, LABELS[:3], np.arange(3, dtype=np.int32), np.array([0, 7], np.uint32), schedule
    )
    np.testing.assert_array_equal(images, other.sample(LABELS[:3], seed=7))
