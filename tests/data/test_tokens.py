"""Token sets: made shard by shard, whole or not there, and the same whoever makes them."""

import copy
import dataclasses
import errno
import json
import os
import pathlib
from unittest import mock

import numpy as np
import pytest

from enat_jax.data import token_plans, tokens

SPEC = tokens.TokenSetSpec(
    num_images=10,
    copies=1,
    flips=True,
    batch_size=2,
    grid=(2, 2),
    codebook_size=300,
    class_names=("a", "b"),
    tokenizer="1234",
    preprocessing={"source": {"name": "noise", "size": 8}},
    location={"source": "noise"},
    shard_items=4,
)


def rows_of(spec, shard):
    items = np.array(spec.items(shard))
    rows = np.zeros(len(items) * spec.views, spec.dtype)
    rows["image"] = np.repeat(items // spec.copies, spec.views)
    rows["flip"] = np.tile(np.arange(spec.views), len(items))
    rows["label"] = rows["image"] % 2
    rows["tokens"] = (rows["image"] * 2 + rows["flip"])[:, None] + np.arange(4)
    return rows


def write(directory, spec, shard):
    keys = [f"{i}.png" for i in sorted({item // spec.copies for item in spec.items(shard)})]
    tokens.write_shard(directory, spec, shard, rows_of(spec, shard), keys, [])


def make(directory, spec=SPEC, backwards=False):
    for shard in sorted(tokens.begin(directory, spec), reverse=backwards):
        write(directory, spec, shard)
    assert tokens.finish(directory, spec)
    return directory


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_plan_cuts_items_into_shards_of_whole_batches():
    assert (SPEC.num_items, SPEC.num_shards, SPEC.views) == (10, 3, 2)
    assert [list(SPEC.items(s)) for s in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    odd = dataclasses.replace(SPEC, shard_items=5)
    assert odd.items_per_shard == 6  # whole batches of 2
    imagenet = dataclasses.replace(SPEC, num_images=1_281_167, batch_size=16, shard_items=None)
    assert imagenet.num_shards <= tokens.MAX_SHARDS
    assert sum(len(imagenet.items(s)) for s in range(imagenet.num_shards)) == 1_281_167
    few = dataclasses.replace(SPEC, copies=3, shard_items=None)
    assert (few.num_items, few.num_shards) == (30, 1)


def test_what_was_made_is_opened_again(tmp_path):
    found = tokens.TokenSet.open(make(tmp_path / "set"))
    assert len(found) == 20
    assert (found.grid, found.codebook_size, found.class_names) == ((2, 2), 300, ("a", "b"))
    assert (found.tokenizer, found.preprocessing) == ("1234", SPEC.preprocessing)
    batch = found.gather(np.array([19, 4]))
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"], [[19, 20, 21, 22], [4, 5, 6, 7]])
    assert batch["labels"].tolist() == [1, 0]
    np.testing.assert_array_equal(
        found.in_memory().gather(np.arange(20))["tokens"], found.gather(np.arange(20))["tokens"]
    )


def test_metadata_say_what_is_in_it(tmp_path):
    metadata = tokens.read_metadata(make(tmp_path / "set"))
    assert metadata["num_images"] == 10 and metadata["num_records"] == 20
    assert metadata["shards"] == [8, 8, 4] and metadata["class_counts"] == [10, 10]
    assert metadata["token_dtype"] == "uint16" and metadata["skipped"] == []
    assert metadata["versions"]["jax"] and metadata["location"] == {"source": "noise"}
    shard = json.loads((tmp_path / "set" / "00001-of-00003.json").read_text())
    assert shard["first_image"] == 4
    assert shard["keys"] == ["4.png", "5.png", "6.png", "7.png"]


def test_records_lead_back_to_their_images(tmp_path):
    spec = dataclasses.replace(SPEC, copies=3, batch_size=1)  # images across shards of 4 items
    directory = make(tmp_path / "set", spec)
    keys = tokens.image_keys(directory)
    assert keys == [f"{i}.png" for i in range(10)]
    last = tokens.TokenSet.open(directory).rows[np.array([59])]
    assert keys[last["image"][0]] == "9.png"


def test_the_bytes_depend_neither_on_the_order_nor_on_interruptions(tmp_path, monkeypatch):
    whole = content(make(tmp_path / "whole"))
    assert content(make(tmp_path / "backwards", backwards=True)) == whole
    directory, replace = tmp_path / "interrupted", os.replace
    for _ in range(len(whole) - 1):
        written = []

        def one_more(source, target, written=written):
            """Lets one file appear; at the next the process is gone, and nobody tidies up."""
            written.append(target)
            if len(written) > 1:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("pathlib.Path.replace", one_more)
            patched.setattr("pathlib.Path.unlink", lambda *arguments, **settings: None)
            make(directory)
    assert any(path.name.endswith(".unfinished") for path in directory.iterdir())
    assert content(make(directory)) == whole


def test_unfinished_shards_are_named_and_finished_ones_kept(tmp_path):
    directory = tmp_path / "set"
    assert tokens.begin(directory, SPEC) == [0, 1, 2]
    write(directory, SPEC, 1)
    before = (directory / "00001-of-00003.npy").stat().st_mtime_ns
    assert tokens.begin(directory, SPEC) == [0, 2]
    assert not tokens.finish(directory, SPEC)
    with pytest.raises(ValueError, match="not finished: start the command"):
        tokens.TokenSet.open(directory)
    make(directory)
    assert (directory / "00001-of-00003.npy").stat().st_mtime_ns == before


def test_records_without_their_description_are_not_finished(tmp_path):
    directory = make(tmp_path / "set")
    (directory / "00002-of-00003.json").unlink()
    (directory / "metadata.json").unlink()
    assert tokens.begin(directory, SPEC) == [2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "9999"}, "its tokenizer is '1234', now it would be '9999'"),
        ({"preprocessing": {"source": {"name": "noise", "size": 16}}}, "preprocessing.source.size"),
        ({"flips": False}, "its flips is True"),
        ({"num_images": 11}, "its num_images is 10, now it would be 11"),
        ({"copies": 2}, "its copies is 1"),
    ],
)
def test_another_plan_is_refused(tmp_path, change, words):
    directory = make(tmp_path / "set")
    before = content(directory)
    with pytest.raises(ValueError, match=words):
        tokens.begin(directory, dataclasses.replace(SPEC, **change))
    assert content(directory) == before


def test_images_may_move(tmp_path):
    directory = make(tmp_path / "set")
    before = content(directory)
    moved = dataclasses.replace(SPEC, location={"source": "elsewhere", "size": 3})
    assert tokens.begin(directory, moved) == [] and tokens.finish(directory, moved)
    assert content(directory) == before


def test_what_is_no_token_set_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ValueError, match="is no token set: choose another"):
        tokens.begin(tmp_path, SPEC)
    with pytest.raises(ValueError, match="is no token set: choose another"):
        tokens.begin(tmp_path / "photo.jpg", SPEC)
    with pytest.raises(FileNotFoundError, match="no token set"):
        tokens.TokenSet.open(tmp_path)
    (tmp_path / "plan.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="no token set of ours"):
        tokens.begin(tmp_path, SPEC)
    (tmp_path / "metadata.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="does not say"):
        tokens.TokenSet.open(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tokens.TokenSet.open(tmp_path)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_a_damaged_set_is_refused(tmp_path):
    file = make(tmp_path / "set") / "00001-of-00003.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"is damaged .*00001-of-00003\.npy"):
        tokens.TokenSet.open(tmp_path / "set")


def test_a_missing_file_is_made_anew_as_the_messages_say(tmp_path):
    directory = make(tmp_path / "set")
    whole = content(directory)
    (directory / "00001-of-00003.npy").unlink()
    with pytest.raises(ValueError, match="start the command that made it .* again, it says what"):
        tokens.TokenSet.open(directory)
    assert tokens.begin(directory, SPEC) == []
    with pytest.raises(ValueError, match=r"remove 00001-of-00003\.json and start .* again"):
        tokens.finish(directory, SPEC)
    (directory / "00001-of-00003.json").unlink()
    assert tokens.begin(directory, SPEC) == [1]
    write(directory, SPEC, 1)
    assert tokens.finish(directory, SPEC) and content(directory) == whole
    assert len(tokens.TokenSet.open(directory)) == 20


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_the_system_says_is_no_damage(tmp_path, monkeypatch, number):
    directory = make(tmp_path / "set")

    def refused(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            tokens.TokenSet.open(directory)
        assert caught.value.filename.endswith("00000-of-00003.npy")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", mock.Mock(side_effect=OSError(number, "Reason")))
        with pytest.raises(OSError, match=r"Reason: .*00000-of-00003\.npy"):
            tokens.finish(directory, SPEC)
    (directory / "00001-of-00003.npy").unlink()
    (directory / "00001-of-00003.npy").mkdir()
    with pytest.raises(IsADirectoryError):
        tokens.TokenSet.open(directory)


def test_skipped_images_are_listed_once(tmp_path):
    spec = dataclasses.replace(SPEC, copies=3, flips=False, batch_size=1)
    directory = tmp_path / "set"
    tokens.begin(directory, spec)
    bad = {"image": 1, "key": "1.png", "reason": "is truncated"}
    for shard in range(spec.num_shards):  # items 3 to 5 are copies of image 1, in two shards
        rows = rows_of(spec, shard)
        rows = rows[rows["image"] != 1]
        skipped = [bad] if shard < 2 else []
        tokens.write_shard(directory, spec, shard, rows, ["..."], skipped)
    assert tokens.finish(directory, spec)
    metadata = tokens.read_metadata(directory)
    assert metadata["skipped"] == [bad] and metadata["num_records"] == 27
    assert metadata["shards"][:2] == [3, 2]
    assert 1 not in tokens.TokenSet.open(directory).rows[np.arange(27)]["image"]


def test_a_set_of_nothing_is_refused(tmp_path):
    spec = dataclasses.replace(SPEC, num_images=1)
    tokens.begin(tmp_path, spec)
    bad = {"image": 0, "key": "0.png", "reason": "is empty"}
    tokens.write_shard(tmp_path, spec, 0, rows_of(spec, 0)[:0], ["0.png"], [bad])
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        tokens.finish(tmp_path, spec)


def test_a_feature_file_of_the_reference_is_a_token_set(tmp_path):
    values = np.array([[1, 5, 6, 7, 8], [0, 9, 0, 2, 3]], np.int64)
    np.save(tmp_path / "train.npy", values)
    found = tokens.TokenSet.open_reference(tmp_path / "train.npy", 10, ("a", "b"))
    assert (found.grid, found.tokenizer, len(found)) == ((2, 2), None, 2)
    batch = found.gather(np.array([1, 0]))
    np.testing.assert_array_equal(batch["tokens"], values[::-1, 1:])
    assert batch["labels"].tolist() == [0, 1]
    np.save(tmp_path / "train.npy", values[:, :4])
    with pytest.raises(ValueError, match="no square grid"):
        tokens.TokenSet.open_reference(tmp_path / "train.npy", 10, ("a", "b"))


# --- plans are the same if they would give the same records ---

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
        assert token_plans.digest(other) == token_plans.digest(PLAN)
        token_plans.refuse_others(pathlib.Path("out"), other, PLAN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_images": 9}, "its num_images is 9, now it would be 10; choose"),
        ({"num_images": 9, "listing": "cd"}, "now it would be 10, and 1 more differ; choose"),
        (
            {"listing": "cd"},
            r"source.listing is 'cd', .*\.\.\. \(pictures were renamed or changed\)",
        ),
    ],
)
def test_what_differs_is_named(change, words):
    other = changed(**change)
    assert token_plans.digest(other) != token_plans.digest(PLAN)
    with pytest.raises(ValueError, match=f"out holds or has begun another token set: .*{words}"):
        token_plans.refuse_others(pathlib.Path("out"), other, PLAN)


def test_images_have_the_keys_of_their_source(tmp_path):
    spec = dataclasses.replace(SPEC, copies=2)  # so that a shard ends within an image's copies
    make(tmp_path / "set", spec)
    assert tokens.image_keys(tmp_path / "set") == [f"{i}.png" for i in range(10)]
    path = sorted((tmp_path / "set").glob("*-of-*.json"))[1]
    whole = json.loads(path.read_text())
    for change, words in (
        ({"plan": "another"}, "it is of another token set"),
        ({"keys": 7}, "is damaged"),
        ({"keys": []}, "names 8 of 10 images"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=words):
            tokens.image_keys(tmp_path / "set")
    path.write_text("{")
    with pytest.raises(ValueError, match="it is not JSON .*: remove .* and start"):
        tokens.image_keys(tmp_path / "set")
