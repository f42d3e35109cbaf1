"""Plans are the same if they would give the same records."""

import copy
import pathlib

import pytest

from enat_jax.data import plans

PLAN = {
    "format": "3",
    "num_images": 10,
    "preprocessing": {"source": {"listing": "ab" * 50}, "ignored_files": {".txt": 1}},
    "location": {"source": "/here"},
}


def changed(**values):
    """PLAN with other values, named by their last names."""
    plan = copy.deepcopy(PLAN)
    for part in (plan, plan["preprocessing"], plan["preprocessing"]["source"], plan["location"]):
        part |= {name: value for name, value in values.items() if name in part}
    return plan


def test_places_and_other_files_do_not_matter():
    for other in (changed(ignored_files={".md": 2}), changed(location={"source": "/there"})):
        assert other != PLAN
        assert plans.digest(other) == plans.digest(PLAN)
        plans.refuse_others(pathlib.Path("out"), other, PLAN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_images": 9}, "its num_images is 9, now it would be 10; remove it"),
        ({"num_images": 9, "listing": "cd"}, "now it would be 10, and 1 more differ; remove it"),
        (
            {"listing": "cd"},
            r"source.listing is 'cd', .*\.\.\. \(pictures were renamed or changed\)",
        ),
    ],
)
def test_what_differs_is_named(change, words):
    other = changed(**change)
    assert plans.digest(other) != plans.digest(PLAN)
    with pytest.raises(ValueError, match=f"out holds or has begun another token set: .*{words}"):
        plans.refuse_others(pathlib.Path("out"), other, PLAN)
