"""The table of scenes tells apart what models draw right and wrong."""

import fake_scenes
import numpy as np
import pytest

from enat_jax.data import scenes
from enat_jax.evaluation import scene_pictures, scene_table
from enat_jax.metrics.scene_quality import BLANK, Share


def test_what_is_asked_is_what_the_source_shows():
    """In every cell, for both phrasings of each combination."""
    for split in scene_table.COMBINATIONS.values():
        asked = scene_table.ask(split, 230)
        source = scenes.Scenes(split=split, num=230)
        for i, (prompt, request) in enumerate(zip(asked.prompts, asked.requests, strict=True)):
            scene = source.scene(i)
            assert scene == scenes.combinations(split)[request]
            for place in (0, 1):
                shown = [asked.wanted[i, place, cell] for cell in scene.cells(place)]
                assert shown == [scene.first, scene.second]
                assert (asked.wanted[i, place] == BLANK).sum() == 2
            assert prompt in scene.captions
            turned = scene.reversal.captions[scene.captions.index(prompt)]
            assert asked.swapped[i] == turned
        assert len(set(asked.prompts)) == 2 * len(set(asked.requests))
    with pytest.raises(ValueError, match="99 images are too few for 100 combinations"):
        scene_table.ask("test", 99)


MODELS = {
    "ours": fake_scenes.Model(),
    "swapped": fake_scenes.Model(lambda scene: scene.reversal),
    "what it has seen": fake_scenes.Model(fake_scenes.of_seen),
    "copier": fake_scenes.Model(split="train"),
}


@pytest.fixture(scope="module")
def evaluation():
    return scene_table.evaluate(MODELS, fake_scenes.SOURCE, num=120, guidance=[0.5], seed=3)


def test_each_row_says_what_it_should(evaluation):
    rows = {(row.name, row.combinations): row for row in evaluation.rows}
    names = ["real", "real, through the tokenizer", "empty text", *MODELS]
    assert list(rows) == [(name, x) for name in names for x in ("seen", "held out")]
    none, all_ = Share(0.0, 0.0), Share(1.0, 0.0)
    for combinations in scene_table.COMBINATIONS:
        found = {name: rows[name, combinations] for name in names}
        real = found["real"]
        assert real.layout == real.binding == all_ and 0.85 < real.in_place.mean < 1
        assert 0.9 < real.diversity < 1.1 and real.copies < 0.04
        for name in ("real, through the tokenizer", "ours"):
            assert found[name].layout == all_ and found[name].in_place.mean > 0.8
            assert found[name].copies < 0.1
        blank = found["empty text"]
        assert blank.layout == blank.set == blank.in_place == none
        assert (blank.binding, blank.diversity, blank.copies) == (Share(None, None), None, None)
        swapped = found["swapped"]
        assert swapped.layout == all_ and swapped.set.mean > 0.8
        assert swapped.in_place == swapped.binding == none
        assert found["copier"].copies == 1 and found["copier"].in_place == all_
    assert rows["what it has seen", "held out"].in_place == none
    assert evaluation.differences["what it has seen"].mean > 0.8
    ours = evaluation.differences["ours"]
    assert abs(ours.mean) < 4 * ours.standard_error < 0.3


def test_use_of_texts_is_what_another_one_costs(evaluation):
    assert list(evaluation.text_use) == list(MODELS)
    use = evaluation.text_use["ours"]
    assert list(use) == ["another image", "digits swapped"]
    assert all(len(means) == 3 for means in use.values())
    for mean in use["another image"]:
        assert 0.9 < mean["mean"] <= 1 and mean["standard_error"] < 0.04
    assert use["digits swapped"] == [{"mean": 1.0, "standard_error": 0.0}] * 3


def test_a_model_that_ignores_order_has_no_use_for_it():
    asked = scene_table.ask("unseen", 40)
    bag = fake_scenes.Model(reads=lambda scene: {scene.first, scene.second, scene.axis})
    use = scene_table.text_use(bag, np.zeros((40, 256), int), asked, seed=0)
    assert use["another image"][0]["mean"] > 0.9
    assert [mean["mean"] for mean in use["digits swapped"]] == [0, 0, 0]


def test_other_guidance_draws_the_same_texts(evaluation):
    rows = {(row.name, row.combinations): row for row in evaluation.rows}
    assert [row.name for row in evaluation.by_guidance] == ["0.5"]
    assert evaluation.by_guidance[0].in_place == rows["ours", "held out"].in_place


def test_the_tables_in_words(evaluation):
    text = evaluation.markdown()
    assert "| empty text | held out | 120 | 0.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | - | - | - |" in text
    assert "| images | other text | 0 visible | 1/16 visible | 1/4 visible |" in text
    assert "| ours | digits swapped | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text
    assert "| images | seen - held out |" in text and "| empty text | +0.0 ± 0.0 |" in text
    assert "120 images a row; ± is one standard error" in text and "Guidance: 2.5." in text
    for line in scene_table.EXPLANATIONS:
        assert f"\n- {line}\n" in text


def test_pictures_have_a_row_for_each_text(tmp_path):
    found = scene_pictures.write(MODELS["ours"], tmp_path, seed=0)
    assert found == scene_pictures.PICTURES
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(found)
    unguided = MODELS["ours"].with_settings(guidance_scale=0.0)
    assert "negative.png" not in scene_pictures.write(unguided, tmp_path / "more", seed=0)


def test_a_labelled_grid():
    images = np.zeros((3, 2, 16, 16, 1), np.uint8)
    images[1, 0] = 100
    grid = scene_pictures.labelled(images, ["one", "a text that takes more than one line", ""])
    margin, side, gap = scene_pictures.MARGIN, scene_pictures.SIDE, scene_pictures.GAP
    assert grid.shape == (3 * (side + gap) + gap, margin + 2 * (side + gap) + gap, 3)
    assert (
        grid[2 * gap + side : 2 * (gap + side), margin + gap : margin + gap + side] == 100
    ).all()
    inked = [(row < 255).any() for row in np.split(grid[gap:, :margin], 3)]
    assert inked == [True, True, False]
