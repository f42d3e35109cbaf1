"""Records, their order and files, held against TFDS's own code that writes data sets."""

import io
import os

import fake_imagenet
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from enat_jax.data import imagenet, imagenet_records


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return fake_imagenet.write_tars(tmp_path_factory.mktemp("imagenet") / "tars")


def plan(tars, directory, split="train", num_shards=None):
    tar = tars / imagenet.TAR_FILES[split]
    pictures = imagenet.scan(tar, split, imagenet_records.validation_ids())
    return imagenet_records.plan_shards(split, tar, pictures, directory, num_shards)


def parsed(path):
    """The records of a file as dicts."""
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    for record in records:
        values = tf_example_pb2.Example.FromString(record).features.feature
        yield {
            "file_name": values["file_name"].bytes_list.value[0].decode(),
            "label": values["label"].int64_list.value[0],
            "image": values["image"].bytes_list.value[0],
        }


def pixels(encoded):
    image = PIL.Image.open(io.BytesIO(encoded))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image, np.float64)


def test_validation_ids_are_those_of_the_50000_pictures():
    ids = imagenet_records.validation_ids()
    assert len(ids) == 50_000
    assert set(ids) == set(imagenet.IDS)


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_200, 16_383, 16_384, 110_000, 2_097_152])
@pytest.mark.parametrize("label", [-1, 0, 127, 128, 999])
def test_sizes_are_known_without_making_the_record(tmp_path, size, label):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    values = {"image": bytes(size), "label": label, "file_name": "n01440764_12.JPEG"}
    record = serializer.serialize_example(features.encode_example(values))

    tar = tmp_path / "not-read.tar"
    tar.touch()
    pictures = imagenet.pictures(
        [np.array([b"n01440764_12.JPEG"]), np.array([label]), np.array([0]), np.array([size])]
    )
    (shard,) = imagenet_records.plan_shards("train", tar, pictures, tmp_path, None)
    assert shard.num_bytes == len(record)


def test_the_number_of_files_is_tfds_s_for_the_size_of_the_real_data_set(tmp_path):
    # 50,000 pictures of 134 kB: 6.7 GB, which TFDS keeps in 64 files.
    n = 50_000
    tar = tmp_path / "not-read.tar"
    tar.touch()
    names = np.array([f"ILSVRC2012_val_{i:08d}.JPEG".encode() for i in range(1, n + 1)])
    values = np.zeros(n, np.int64)
    pictures = imagenet.pictures([names, values, values, values + 134_000])
    shards = imagenet_records.plan_shards("validation", tar, pictures, tmp_path, None)
    assert len(shards) == 64
    assert {len(shard.pictures) for shard in shards} == {781, 782}
    assert shards[63].path.name == "imagenet2012-validation.array_record-00063-of-00064"


def test_written_records_are_the_planned_ones(tars, tmp_path):
    shards = plan(tars, tmp_path, num_shards=3)
    found = []
    for shard in shards:
        imagenet_records.write(shard)
        records = list(parsed(shard.path))
        names = [name.decode() for name in shard.pictures.names]
        assert [record["file_name"] for record in records] == names
        found += records
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"imagenet2012-train.array_record-0000{i}-of-00003" for i in range(3)
    ]
    for record in found:
        wordnet_id = record["file_name"].split("_")[0]
        assert record["label"] == imagenet.IDS.index(wordnet_id)
        if record["file_name"] not in (*fake_imagenet.CMYK, fake_imagenet.PNG):
            assert record["image"] == fake_imagenet.picture(record["file_name"])
    assert len(found) == sum(len(names) for names in fake_imagenet.TRAIN.values())


@pytest.mark.parametrize("name", [*fake_imagenet.CMYK, fake_imagenet.PNG])
def test_pictures_that_are_no_rgb_jpeg_become_one_that_looks_the_same(tars, tmp_path, name):
    (shard,) = plan(tars, tmp_path)
    imagenet_records.write(shard)
    (record,) = [record for record in parsed(shard.path) if record["file_name"] == name]
    source = PIL.Image.open(io.BytesIO(fake_imagenet.picture(name))).convert("RGB")
    difference = np.abs(pixels(record["image"]) - np.asarray(source, np.float64))
    assert difference.mean() < 4  # of 255; about 100 if colours were inverted


def test_writing_again_gives_the_same_bytes(tars, tmp_path):
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (shard,) = plan(tars, tmp_path / name, "validation")
        imagenet_records.write(shard)
        contents.append(shard.path.read_bytes())
    assert contents[0] == contents[1]


def test_more_files_than_pictures_are_refused(tars, tmp_path):
    with pytest.raises(ValueError, match="3 test pictures are too few for 4 files"):
        plan(tars, tmp_path, "test", num_shards=4)


def test_a_listed_picture_that_cannot_be_decoded_is_named(tmp_path):
    members = [(fake_imagenet.PNG, b"no picture")]
    content = fake_imagenet.tar([("n02105855.tar", fake_imagenet.tar(members))])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(content)
    with pytest.raises(ValueError, match="n02105855_2933.JPEG in .* cannot be decoded"):
        plan(tmp_path, tmp_path)


def test_a_tar_file_cut_short_since_is_noticed_and_nothing_is_left(tars, tmp_path):
    (shard,) = plan(tars, tmp_path, "test")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.tar.read_bytes()[:3000])
    shard = imagenet_records.Shard(shard.path, cut, shard.pictures, shard.num_bytes)
    with pytest.raises(ValueError, match="JPEG is cut short"):
        imagenet_records.write(shard)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.tar"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_and_nothing_is_left(tars, tmp_path):
    (shard,) = plan(tars, tmp_path, "test")
    temporary = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.unfinished")
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written: .*No space left on device"):
        imagenet_records.write(shard)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_an_error(tars, tmp_path):
    (shard,) = plan(tars, tmp_path / "nowhere", "test")
    with pytest.raises(OSError, match="cannot be written: .*No such file or directory"):
        imagenet_records.write(shard)
