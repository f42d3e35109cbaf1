"""TFDS sets made here, without TensorFlow, and read back."""

import errno
import io
import json
import pathlib
import pickle
import resource
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from enat_jax.data import decoding, images, scan, tfds_records


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Shades(tfds.core.GeneratorBasedBuilder):
    """Twelve pictures to train on, three to validate on and two without labels."""

    VERSION = tfds.core.Version("1.2.0")
    names = ["dark", "light"]
    number = {"train": 12, "validation": 3, "unlabelled": 2}

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=self.names),
            "file_name": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.number}

    def _generate_examples(self, split):
        for i in range(self.number[split]):
            label = -1 if split == "unlabelled" else int(i >= 6)
            data = b"broken" if split == "validation" and i == 2 else png(i * 20)
            record = {"image": io.BytesIO(data), "label": label, "number": i}
            yield i, record | {"file_name": f"{split}_{i}.png"}


class ImageNetLike(Shades):
    VERSION = tfds.core.Version("1.0.0")
    names = ["n01440764", "n01443537"]
    number = {"train": 2}


def prepare(builder, data_dir):
    config = tfds.download.DownloadConfig(num_shards=2)
    made = builder(data_dir=data_dir, file_format="array_record")
    made.download_and_prepare(download_config=config)
    return pathlib.Path(made.data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    prepare(Shades, path)
    return path


def shades(data_dir, split="train", source="tfds:shades", **settings):
    return images.open_source(source, split, data_dir=str(data_dir), **{"size": 8} | settings)


def test_records_are_read(data_dir):
    source = shades(data_dir)
    assert (len(source), source.class_names) == (12, ("dark", "light"))
    assert (source.image_shape, source.mirrored, source.ignored) == ((8, 8, 3), True, {})
    assert not shades(data_dir, flip=False).mirrored
    assert [source.key(i) for i in (0, 11)] == ["train[0]", "train[11]"]
    examples = [source.load(i) for i in range(12)]
    assert sorted(e.key for e in examples) == sorted(f"train_{i}.png" for i in range(12))
    for example in examples:
        i = int(example.key.removeprefix("train_").removesuffix(".png"))
        assert (example.image == (i * 20, 0, 0)).all() and example.label == int(i >= 6)
    batch = source.gather([3, 1], [7, 8])
    np.testing.assert_array_equal(
        batch["images"], [source.load(3, 7).image, source.load(1, 8).image]
    )
    assert batch["labels"].tolist() == [examples[3].label, examples[1].label]


def test_splits_are_those_of_tfds(data_dir):
    everything = [shades(data_dir).load(i).key for i in range(12)]
    part = shades(data_dir, "train[25%:]")
    assert [part.load(i).key for i in range(len(part))] == everything[3:]
    assert part.key(0) == "train[25%:][0]"
    assert len(shades(data_dir, "train+validation")) == 15
    assert len(shades(data_dir, "validation")) == 3


def test_a_source_can_be_sent_to_a_worker(data_dir):
    source = shades(data_dir, channels=1)
    source.load(0)
    sent = pickle.dumps(source)
    assert len(sent) < 1000  # no open files, no data
    again = pickle.loads(sent)
    assert again.identity() == source.identity()
    np.testing.assert_array_equal(
        again.gather(range(12))["images"], source.gather(range(12))["images"]
    )


def test_what_decides_the_images(data_dir):
    identity = shades(data_dir).identity()
    size = identity.pop("bytes")
    assert size > 12 * len(png(0))
    assert identity == {
        **{"source": "tfds:shades/1.2.0", "split": "train", "num_examples": 12},
        **{"image_key": "image", "label_key": "label"},
        **{"size": 8, "channels": 3, "crop_area": [0.8, 1.0], "crop_ratio": [0.75, 1.3333]},
        **{"flip": True, "plain_crop": decoding.PLAIN_CROP},
    }


def test_pictures_that_cannot_be_had_are_named(data_dir):
    source = shades(data_dir, "validation")
    with pytest.raises(images.UnreadableImage, match="^validation_2.png: is not a JPEG") as caught:
        [source.load(i) for i in range(3)]
    assert caught.value.key == "validation_2.png"
    with pytest.raises(images.UnreadableImage, match=r"unlabelled_\d.png: has no class.* -1"):
        shades(data_dir, "unlabelled").load(0)
    with pytest.raises(IndexError, match="3"):
        source.load(3)


def test_records_that_cannot_be_read_can_be_left_out(data_dir):
    source, lines = shades(data_dir, "validation"), []
    names = ["validation_0.png", "validation_1.png"]
    for again in (source, pickle.loads(pickle.dumps(source))):
        found = scan.readable(again, lines.append)
        assert "1 of 3 pictures cannot be read: validation[" in lines[-1]
        assert "]: validation_2.png is not a JPEG" in lines[-1]
        assert sorted(found.load(i).key for i in range(len(found))) == names
    (bad,) = {source.key(i) for i in range(3)} - {found.key(0), found.key(1)}
    found = source.without({bad, found.key(0)})
    again = pickle.loads(pickle.dumps(found))
    assert again.load(0).key == found.load(0).key and again.identity() == found.identity()
    others = [shades(data_dir), source, found, source.without({bad})]
    assert len({json.dumps(x.identity()) for x in others}) == 4
    with pytest.raises(images.UnreadableImage) as caught:
        source.gather(range(3))
    assert caught.value.place == bad


def test_versions_and_configurations(data_dir, tmp_path):
    made = data_dir / "shades" / "1.2.0"
    for place in ("shades/1.2.0", "shades/1.10.0", "shades/incomplete.2.0.0_1"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(made)
    assert tfds_records._find("tfds:shades", tmp_path) == tmp_path / "shades/1.10.0"
    assert tfds_records._find("tfds:shades:1.2.0", tmp_path) == tmp_path / "shades/1.2.0"
    with pytest.raises(ValueError, match=r"there are the versions \['1.2.0', '1.10.0'\]"):
        tfds_records._find("tfds:shades:3.0.0", tmp_path)
    for config in ("small", "large"):
        (tmp_path / "sized" / config).mkdir(parents=True)
        (tmp_path / "sized" / config / "1.0.0").symlink_to(made)
        found = tfds_records._find(f"tfds:sized/{config}:1.0.0", tmp_path)
        assert found == tmp_path / "sized" / config / "1.0.0"
        if config == "small":
            assert tfds_records._find("tfds:sized", tmp_path) == found
    with pytest.raises(ValueError, match="several configurations.*'tfds:sized/large'"):
        tfds_records._find("tfds:sized", tmp_path)


def test_the_default_place_is_that_of_tfds(data_dir, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))
    assert tfds_records._find("tfds:shades", None) == data_dir / "shades/1.2.0"


def test_imagenet_gets_readable_names(tmp_path):
    prepare(ImageNetLike, tmp_path)
    source = shades(tmp_path, source="tfds:image_net_like")
    assert source.class_names == ("tench, Tinca tinca", "goldfish, Carassius auratus")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, r"no split 'test': it has \['train', 'unlabelled', 'validation'\]"),
        ({"split": "train[:x]"}, "no split"),
        ({"split": "train[:0]"}, "no pictures"),
        ({"label_key": "class"}, "no ClassLabel feature 'class': .*'number': 'Scalar'"),
        ({"label_key": "number"}, "no ClassLabel feature 'number'"),
        ({"image_key": "label"}, "no Image feature 'label'"),
        (
            {"source": "tfds:tints"},
            "no prepared data set for source='tfds:tints'.*'tints', file_for",
        ),
        ({"source": "tfds:tints"}, "enat_jax.prepare"),
        ({"source": "tfds:"}, "is not tfds:NAME"),
        ({"source": "tfds:../shades"}, "is not tfds:NAME"),
    ],
)
def test_what_is_not_there_is_refused(data_dir, arguments, words):
    with pytest.raises(ValueError, match=words):
        shades(data_dir, **arguments)


@pytest.fixture
def copy(data_dir, tmp_path):
    """A copy of the set that may be spoiled."""
    made = tmp_path / "shades" / "1.2.0"
    made.mkdir(parents=True)
    for file in (data_dir / "shades" / "1.2.0").iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


def test_another_format_is_refused(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    text = json.dumps(info | {"fileFormat": "tfrecord"})
    (copy / "dataset_info.json").write_text(text.replace(".{FILEFORMAT}", ".tfrecord"))
    for shard in copy.glob("*.array_record*"):
        shard.rename(copy / shard.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as tfrecord.*file_format='array_record'"):
        shades(copy.parents[1])


def test_a_missing_shard_is_noticed_at_once(copy):
    shard = sorted(copy.glob("*train*"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"not complete, .*{shard.name} is missing"):
        shades(copy.parents[1])


def test_more_shards_than_may_be_open_are_refused_at_once(data_dir, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1, 1))
    with pytest.raises(OSError, match="Too many open files .* are needed, 1 allowed"):
        shades(data_dir)


def test_what_the_system_says_is_no_damage(data_dir, monkeypatch):
    fails = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "info"))
    monkeypatch.setattr(tfds, "builder_from_directory", fails)
    with pytest.raises(PermissionError, match="Permission denied: 'info'"):
        shades(data_dir)


def test_a_damaged_shard_is_named(copy):
    for shard in copy.glob("*train*"):
        shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(
        decoding.UnreadableImage, match=r"train\[5\]: its record in .*cannot be read"
    ):
        shades(copy.parents[1]).load(5)


def test_tensorflow_stays_away(data_dir):
    code = f"""
import sys
from enat_jax.data import images
assert "tensorflow_datasets" not in sys.modules  # slow to import, and mostly not needed
source = images.open_source("tfds:shades", "train", data_dir={str(data_dir)!r}, size=8)
source.gather(range(12))
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
