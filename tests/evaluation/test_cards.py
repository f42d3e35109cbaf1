"""Cards: what people read, and what two of them say of each other."""

import copy
import json

import pytest

from enat_jax.evaluation import cards


def metric(title, value, error, better="lower"):
    low, high = (
        (None, None) if error is None else (value - cards.Z * error, value + cards.Z * error)
    )
    return {
        "title": title,
        "value": value,
        "standard_error": error,
        "low": low,
        "high": high,
        "replicates": 20,
        "better": better,
        "about": "",
    }


CARD = {
    "format": cards.FORMAT,
    "kind": "model",
    "headline": "fid",
    "metrics": {
        "fid": metric("FID", 2.79, 0.02),
        "precision": metric("Precision", 0.8, 0.01, "higher"),
        "sfid": metric("sFID", 4.5, None),
    },
    "caveats": ["The reference has 10,000 images: FIDs are published with 50,000."],
    "features": {"kind": "inception", "resize": "adm", "fingerprint": "ab12"},
    "reference": {
        "path": "here/reference.npz",
        "about": "the statistics reference.npz of 10,000 images",
        "sha256": "77",
        "description": {"source": None, "crop": "centre", "versions": {"jax": "0.10.2"}},
    },
    "images": {"num": 50_000, "per_class": [50, 50], "size": [256, 256, 3], "seed": 0},
    "model": {"path": "runs/a", "fingerprint": {"transformer": "aa"}, "dtype": "float32"},
    "sampler": {"num_steps": 8, "guidance_scale": 2.5},
    "intervals": {"about": "95% intervals from a bootstrap.", "replicates": 20},
    "versions": {"jax": "0.10.2"},
    "hardware": {"device": "cpu"},
    "seconds": {"images": 12.34},
    "date": "2026-01-02",
}


def changed(**dotted):
    """The card with other values; metrics by (value, standard error)."""
    card = copy.deepcopy(CARD)
    for name, value in dotted.items():
        section, _, key = name.partition("__")
        if section == "metrics":
            entry = card["metrics"][key]
            entry["value"], entry["standard_error"] = value
        else:
            card[section][key] = value
    return card


def test_the_first_number_stands_right_above_what_must_be_read_with_it():
    lines = [line for line in cards.markdown(CARD).splitlines() if line]
    assert lines[:4] == [
        "# Evaluation of the model runs/a",
        "**FID: 2.79 ± 0.039**, of 50,000 images of 256x256 pixels, against the statistics "
        "reference.npz of 10,000 images.",
        "## Read before comparing",
        "- The reference has 10,000 images: FIDs are published with 50,000.",
    ]
    text = "\n".join(lines)
    assert "| FID | 2.79 | 2.751 to 2.829 | lower |" in text
    assert "| sFID | 4.5 | not known | lower |" in text
    assert "| num_steps | 8 |" in text and "| jax | 0.10.2 |" in text


def test_a_card_without_caveats_says_that_none_were_found():
    text = cards.markdown(CARD | {"caveats": []})
    assert "Nothing was found that stands in the way" in text


def test_a_card_is_written_and_read_again(tmp_path):
    cards.write(tmp_path / "out", CARD)
    assert cards.read(tmp_path / "out") == cards.read(tmp_path / "out" / "card.json") == CARD
    assert (tmp_path / "out" / "card.md").read_text() == cards.markdown(CARD)


def test_two_cards_of_other_settings_are_compared_by_their_intervals():
    other = changed(
        metrics__fid=(2.70, 0.02), metrics__precision=(0.81, 0.01), sampler__num_steps=16
    )
    text = cards.compare(CARD, other, ("a", "b"))
    assert "| sampler.num_steps | 8 | 16 |" in text
    # 0.09 against 1.96 * sqrt(0.02^2 + 0.02^2) = 0.055, and 0.01 against 0.028.
    assert "| FID | 2.79 ± 0.039 | 2.7 ± 0.039 | -0.09 | more than chance, B is better |" in text
    assert "| Precision | 0.8 ± 0.02 | 0.81 ± 0.02 | +0.01 | within chance |" in text
    assert "| sFID | 4.5 | 4.5 | +0 | equal |" in text
    assert text.count("FIDs are published with 50,000") == 1
    assert cards.compare(CARD, other | {"caveats": []}).count("Read before comparing: ") == 2
    assert "cannot be compared" not in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"features__resize": "pytorch-fid"}, '| features.resize | "adm" | "pytorch-fid" |'),
        ({"images__num": 10_000}, "| images.num | 50000 | 10000 |"),
        ({"reference__sha256": "78"}, '| reference.sha256 | "77" | "78" |'),
        ({"images__size": [512, 512, 3]}, "| images.size | [256, 256, 3] | [512, 512, 3] |"),
    ],
)
def test_what_makes_numbers_incomparable_comes_first_and_no_verdict_is_given(change, line):
    other = changed(**change, sampler__num_steps=16, metrics__fid=(1.0, 0.01))
    text = cards.compare(CARD, other)
    first = text.index("The numbers cannot be compared")
    assert first < text.index(line) < text.index("What is compared") < text.index("num_steps")
    assert "| FID | 2.79 ± 0.039 | 1 ± 0.02 | -1.79 | cannot be compared |" in text


def test_where_files_lie_and_who_computed_is_no_difference_that_matters():
    other = changed(reference__path="there/reference.npz", versions__jax="0.12.0")
    other["reference"]["description"] = CARD["reference"]["description"] | {
        "versions": {"jax": "0.12.0"}
    }
    text = cards.compare(CARD, other)
    assert "cannot be compared" not in text and "there/reference" not in text
    assert "## Circumstances\n\n| | A | B |\n|---|---|---|\n| versions.jax" in text


def test_the_same_pictures_make_the_same_reference_whatever_the_bytes_of_its_file():
    """Sums differ in their last bits between machines."""
    pair = [changed(reference__sha256=sha256) for sha256 in ("77", "78")]
    for card in pair:
        card["reference"]["description"] = {"source": {"listing": "f00"}}
    assert "settings of both are the same" in cards.compare(*pair)


def test_numbers_that_one_card_lacks_are_named():
    other = copy.deepcopy(CARD)
    del other["metrics"]["sfid"]
    assert "| sFID | 4.5 | - | - | only in A |" in cards.compare(CARD, other)
    assert "| sFID | - | 4.5 | - | only in B |" in cards.compare(other, CARD)


def test_what_is_no_card_is_refused(tmp_path):
    path = tmp_path / "card.json"
    with pytest.raises(FileNotFoundError, match=r"there is no .*card\.json: name the card\.json"):
        cards.read(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"card\.json is damaged"):
        cards.read(path)
    path.write_text(json.dumps({"format": "enat_jax evaluation card 2"}))
    with pytest.raises(ValueError, match="is of format 'enat_jax evaluation card 2', not"):
        cards.read(path)
    path.write_text(json.dumps({k: v for k, v in CARD.items() if k != "caveats"}))
    with pytest.raises(ValueError, match="is damaged, it has no caveats"):
        cards.read(path)
    for change in (
        {"headline": "nothing"},
        {"metrics": {"fid": {"title": "FID", "value": "small"}}},
        {"reference": {"about": "pictures"}},
        {"images": None},
        {"caveats": 3},
        {"seconds": {"features": "long"}},
    ):
        path.write_text(json.dumps(CARD | change))
        with pytest.raises(ValueError, match=r"card\.json is damaged \(.*name the card") as caught:
            cards.read(path)
        assert "\n" not in str(caught.value)
