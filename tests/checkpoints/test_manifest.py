import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.checkpoints import checksums, manifest

STATE = {"dense": {"kernel": jnp.ones((3, 4), jnp.bfloat16)}, "step": jnp.int32(7)}
META = {"seed": 0, "sizes": (1, 2)}


def write(directory, content):
    (directory / "meta").mkdir(exist_ok=True)
    (directory / "meta" / "metadata").write_text(content)


def test_what_was_made_is_read(tmp_path):
    made = manifest.make(STATE, META)
    sums = list(map(int, checksums.of_tree(STATE)))
    assert {key: made[key] for key in made.keys() - {"crc32"}} == {
        "config": {"seed": 0, "sizes": [1, 2]},
        "tree": {"dense/kernel": "bfloat16[3, 4]", "step": "int32[]"},
        "checksums": dict(zip(["dense/kernel", "step"], sums, strict=True)),
    }
    write(tmp_path, json.dumps(made))
    assert manifest.read(tmp_path) == (made, None)
    write(tmp_path, json.dumps(made, indent=2, sort_keys=True))
    assert manifest.read(tmp_path)[1] is None  # the values count, not how they are written


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "cannot be read"),
        ('{"config": ', "cannot be read"),
        ("[]", "no checksums"),
        ('{"config": {}, "tree": {}}', "of an earlier version"),
        ('{"config": {}, "crc32": 0}', "have changed"),
    ],
)
def test_what_was_not_made_is_damage(tmp_path, content, reason):
    assert manifest.read(tmp_path)[0] is None
    write(tmp_path, content)
    found, damage = manifest.read(tmp_path)
    assert found is None and reason in damage


def test_no_changed_byte_goes_unseen(tmp_path):
    made = manifest.make(STATE, META)
    data = json.dumps(made).encode()
    for i in range(len(data)):
        for bit in (0x01, 0x20, 0x80):
            (tmp_path / "meta").mkdir(exist_ok=True)
            changed = data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :]
            (tmp_path / "meta" / "metadata").write_bytes(changed)
            found, damage = manifest.read(tmp_path)
            assert damage or found == made


def test_differences_are_named():
    made = manifest.make(STATE, META)
    assert manifest.differences(made, META, STATE) == ""
    assert manifest.differences(made, {"seed": 1, "sizes": [1, 2]}, STATE) == (
        "seed is 0 in the checkpoint but 1 is expected"
    )
    abstract = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)}}
    assert manifest.differences(made, META, abstract) == (
        "dense/kernel is bfloat16[3, 4] in the checkpoint but bfloat16[3, 5] is expected; "
        "step is only in the checkpoint (int32[])"
    )


def test_many_differences_are_shortened():
    made = manifest.make({str(i): jnp.int32(i) for i in range(20)}, {})
    assert manifest.differences(made, {}, {}).endswith("; and 12 more")


def test_changed_arrays_are_named():
    made = manifest.make(STATE, META)
    assert manifest.changed(made, STATE) == ""
    other = {"dense": {"kernel": STATE["dense"]["kernel"].at[2, 3].set(1.01)}, "step": jnp.int32(7)}
    assert manifest.changed(made, other) == "dense/kernel"
    assert manifest.changed(made, {**other, "step": jnp.int32(8)}) == "dense/kernel; step"


def test_a_numpy_array_is_refused_by_name():
    with pytest.raises(ValueError, match="a/1 of the state is a ndarray, not a jax.Array"):
        manifest.make({"a": [jnp.ones(2), np.ones(2)]}, {})


def test_an_evaluation_is_read_back_and_numbers_that_are_not_finite_are_none(tmp_path):
    write(tmp_path, json.dumps(manifest.make(STATE, META)))
    assert manifest.evaluation(tmp_path) is None
    metrics = {"a": np.float32(0.5), "b": math.nan, "c": jnp.float32(math.inf), "d": 2}
    found = {"a": 0.5, "b": None, "c": None, "d": 2.0}
    assert manifest.write_evaluation(tmp_path, metrics) == found
    assert manifest.evaluation(tmp_path) == found
    manifest.write_evaluation(tmp_path, {})
    assert manifest.evaluation(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": {"fid": 3.5}, "crc32": 0}'])
def test_a_damaged_evaluation_is_none(tmp_path, content):
    write(tmp_path, json.dumps(manifest.make(STATE, META)))
    (tmp_path / manifest.EVALUATION).write_text(content)
    assert manifest.evaluation(tmp_path) is None


def test_earlier_versions_kept_the_evaluation_in_the_manifest(tmp_path):
    made = manifest.make(STATE, META)
    del made["crc32"]
    made["metrics"] = {"fid": 3.5}
    write(
        tmp_path,
        json.dumps(made | {"crc32": zlib.crc32(json.dumps(made, sort_keys=True).encode())}),
    )
    assert manifest.evaluation(tmp_path) == {"fid": 3.5}
    assert manifest.read(tmp_path)[1] is None
    write(tmp_path, "{}")
    assert manifest.evaluation(tmp_path) is None
