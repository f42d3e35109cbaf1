"""Plots: whole PNG files of the right content; how they look, people must judge."""

import builtins

import numpy as np
import PIL.Image
import pytest

from enat_jax.evaluation import plots, similarity

NUMBERS = {"mean": [None, 0.5], "standard_error": [None, 0.1]}
RESULT = {
    "kind": "ENAT",
    "num_images": 3,
    "num_steps": 3,
    "num_tokens": 4,
    "tokens": {"already visible": [0, 1], "newly revealed": [1, 1], "masked": [3, 2]},
    **{key: dict.fromkeys(similarity.GROUPS, NUMBERS) for key in ("adjacent", "elsewhere")},
    "change_share": {"mean": [0.2, 0.4], "standard_error": [0.0, 0.1]},
    "reused": None,
    "overlap": None,
    "same_code": None,
}
REUSED = {
    "reused": dict.fromkeys(similarity.GROUPS, NUMBERS),
    "overlap": {"mean": [1.0, 0.95], "standard_error": [0.0, 0.01]},
    "same_code": {"mean": [1.0, 0.9], "standard_error": [None, None]},
}


def opened(path):
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_curves_are_drawn_and_reuse_has_a_panel_of_its_own(tmp_path):
    plots.similarities(tmp_path / "new" / "plain.png", RESULT)
    plots.similarities(tmp_path / "reuse.png", RESULT | REUSED)
    plain, reuse = opened(tmp_path / "new" / "plain.png"), opened(tmp_path / "reuse.png")
    assert reuse.shape[1] == 1.5 * plain.shape[1]
    orange = (plain == [0xD5, 0x5E, 0x00]).all(axis=-1)
    assert orange.any()
    plots.similarities(tmp_path / "again.png", RESULT)
    again = (tmp_path / "again.png").read_bytes()
    assert again == (tmp_path / "new" / "plain.png").read_bytes(), "the same plot, the same file"


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_frame_what_is_new_and_cover_what_is_masked(tmp_path, channels):
    """Two passes of four tokens; one picture, all white."""
    group = np.array([[[2, 1, 2, 2], [1, 0, 2, 2]]])
    adjacent = np.array([[[0.9, 0.2, 1.0, 1.0], [0.3, 1.0, 0.8, 0.8]]])
    picture = np.full((1, 4, 4, channels), 255, np.uint8)
    plots.maps(tmp_path / "maps.png", adjacent, group, picture, (2, 2))
    found = opened(tmp_path / "maps.png")
    red, *others = np.moveaxis(found.astype(int), -1, 0)
    assert ((red > 200) & (np.max(others, axis=0) < 100)).any()
    assert (found == plots.GREY).all(axis=-1).mean() > 0.02


def test_frames_go_around_neighbours_together():
    """Two cells side by side have six sides outside and none between."""
    axes = plots.require().Figure().subplots()
    plots._frame(axes, np.array([[True, True], [False, False]]))
    lines = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
    assert len(lines) == 6
    assert ((0.5, -0.5), (0.5, 0.5)) not in lines and ((0.5, 0.5), (0.5, -0.5)) not in lines


def test_costs_are_bars_with_and_without_the_decoder(tmp_path):
    row = {"model": "a", "num_steps": 8, "paper": 4e10, "last_digit": 1e8, "recount": 3.9e10}
    row |= {"exact": 3.5e10}
    plots.costs(
        tmp_path / "costs.png", [row | {"image_decoder": False}, row | {"image_decoder": True}]
    )
    found = opened(tmp_path / "costs.png")
    for colour in ([0x7F] * 3, [0x00, 0x72, 0xB2], [0x00, 0x9E, 0x73]):
        assert (found == colour).all(axis=-1).any()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'enat_jax\[analyze\]'"):
        plots.require()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        plots.similarities(tmp_path / "taken" / "plot.png", RESULT)
    assert (tmp_path / "taken").read_text() == "mine"
