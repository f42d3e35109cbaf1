"""Pictures of how images come about: what is greyed, what outlined, and what is in the files."""

import errno

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax.inference import reveal_pictures

LABELS = [2, 0, 3]  # 3: no class


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def found(model):
    return reveal_pictures.draw(model, LABELS, seed=4, index=[7, 8, 9])


def made_up(colours=1):
    """Two steps of an image of 2x2 tokens and 2x2 pixels: left column, then right column."""
    guesses = np.array([[[10, 20], [30, 40]], [[11, 21], [31, 41]]], np.uint8)
    visible = np.array([[[0, 0], [0, 0]], [[1, 0], [1, 0]], [[1, 1], [1, 1]]], bool)
    return reveal_pictures.Reveal(
        np.arange(3), guesses[:, None, ..., None].repeat(colours, -1), visible[:, None], ["cat"]
    )


def test_the_last_guess_is_the_image(model, found):
    expected = model.sample(LABELS, seed=4, first_index=7)
    assert np.array_equal(found.guesses[-1], expected)
    assert np.array_equal(found.frames()[-1], expected)
    assert found.names == ["tench, Tinca tinca", "cat", "no class"]


def test_frames_for_a_notebook(model):
    frames = reveal_pictures.frames(model, LABELS)
    assert frames.shape == (4, 3, 8, 8, 1) and frames.dtype == np.uint8
    assert (frames[0] == 128).all()
    assert np.array_equal(frames[-1], model.sample(LABELS))


def test_steps_reveal_tokens_by_the_schedule(found):
    assert found.visible.sum(axis=(2, 3)).tolist() == [[0] * 3, [3] * 3, [8] * 3, [16] * 3]


def test_what_is_masked_is_grey_with_a_hint_of_the_guess():
    frames = made_up().frames()[..., 0]
    assert frames.tolist() == [
        [[[128, 128], [128, 128]]],
        [[[10, 112], [30, 115]]],  # 128 + 0.15 * (20 - 128), and of 40
        [[[11, 21], [31, 41]]],
    ]


def test_a_selection_of_steps_has_the_first_and_the_last(model, found):
    few = reveal_pictures.draw(model, LABELS, seed=4, index=[7, 8, 9], most_frames=2)
    assert few.steps.tolist() == [0, 2, 3]
    assert np.array_equal(few.guesses, found.guesses[[1, 2]])
    assert np.array_equal(few.visible, found.visible[[0, 2, 3]])


@pytest.mark.parametrize(
    ("num_labels", "num", "numbers"),
    [
        (1, 3, [0, 1, 2]),
        (3, 2, [0, 2, 4, 1, 3, 5]),
        (20, 100, list(range(0, 1600, 100))),
    ],
)
def test_images_to_show_are_spread_over_the_labels(num_labels, num, numbers):
    assert reveal_pictures.spread(num_labels, num).tolist() == numbers


def test_the_strip_has_two_rows_and_an_outline_around_new_tokens():
    strip = reveal_pictures.strip(made_up())
    assert strip.shape == (40 + 2 * 128 + 12, 96 + 3 * 132, 3) and strip.dtype == np.uint8
    column = strip[:, 96 + 132 : 96 + 2 * 132]  # after the first step
    assert column[40 + 20, 20].tolist() == [10, 10, 10]  # revealed
    assert column[40, 0].tolist() == [255, 128, 0]  # and new
    assert column[40 + 60, 32].tolist() == [10, 10, 10]  # no line within the new tokens
    assert column[40 + 20, 100].tolist() == [112, 112, 112]  # masked
    assert column[40 + 128 + 4 + 20, 100].tolist() == [20, 20, 20]  # its guess
    last = strip[:, 96 + 2 * 132 :]
    assert last[40, 0].tolist() == [11, 11, 11]  # new no more


def test_a_strip_is_not_longer_or_higher_than_one_can_see():
    many = reveal_pictures.Reveal(
        np.arange(41),
        np.zeros((40, 20, 2, 2, 3), np.uint8),
        np.zeros((41, 20, 2, 2), bool),
        ["a name that is much too long for its place"] * 20,
    )
    assert reveal_pictures.strip(many).shape == (40 + 8 * 268, 96 + 9 * 132, 3)


def rgb_frames(path):
    with PIL.Image.open(path) as image:
        assert image.info["loop"] == 0
        for i in range(image.n_frames):
            image.seek(i)
            yield np.asarray(image.convert("RGB")), image.info["duration"]


def test_the_gif_is_exact_and_rests_at_its_end(tmp_path):
    reveal_pictures.write_gif(tmp_path / "deep" / "reveal.gif", made_up())
    frames, durations = zip(*rgb_frames(tmp_path / "deep" / "reveal.gif"), strict=True)
    assert durations == (600, 600, 600, 2500)
    assert {frame.shape for frame in frames} == {(136 + 20, 136, 3)}
    # A border of four pixels.
    assert frames[0][4 + 20, 4 + 20].tolist() == [128, 128, 128]
    assert frames[1][4 + 20, 4 + 20].tolist() == [10, 10, 10]
    assert frames[1][4 + 20, 4 + 100].tolist() == [112, 112, 112]
    assert frames[1][4, 4].tolist() == frames[2][4, 4 + 100].tolist() == [255, 128, 0]
    assert frames[3][4, 4 + 100].tolist() == [21, 21, 21]  # the image itself, without outlines
    first = (tmp_path / "deep" / "reveal.gif").read_bytes()
    reveal_pictures.write_gif(tmp_path / "again.gif", made_up())
    assert (tmp_path / "again.gif").read_bytes() == first


def test_grey_stays_grey_in_a_gif_of_many_colours(tmp_path):
    rng = np.random.default_rng(0)
    guesses = rng.integers(0, 256, (1, 1, 128, 128, 3), dtype=np.uint8)
    visible = np.array([[[0, 0]], [[0, 1]]], bool)[:, None]
    colourful = reveal_pictures.Reveal(np.arange(2), guesses, visible, ["cat"])
    reveal_pictures.write_gif(tmp_path / "reveal.gif", colourful)
    frames = [frame.astype(int) for frame, _ in rgb_frames(tmp_path / "reveal.gif")]
    assert (frames[0][4:132, 4:132] == 128).all()
    assert frames[1][4, 4 + 100].tolist() == [255, 128, 0]
    image = frames[2][4:132, 4:132]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100
    assert np.abs(image - guesses[0, 0]).mean() < 25


def test_mistakes(model, tmp_path):
    with pytest.raises(ValueError, match="name at least one"):
        reveal_pictures.draw(model, [])
    with pytest.raises(ValueError, match="label 4 is out of range"):
        reveal_pictures.draw(model, [4])
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as failed:
        reveal_pictures.write_gif(tmp_path / "file" / "reveal.gif", made_up())
    assert failed.value.errno in (errno.EEXIST, errno.ENOTDIR)


def test_the_strip_as_a_file(tmp_path):
    reveal_pictures.write_strip(tmp_path / "reveal.png", made_up(3))
    with PIL.Image.open(tmp_path / "reveal.png") as image:
        assert np.array_equal(np.asarray(image), reveal_pictures.strip(made_up(3)))
