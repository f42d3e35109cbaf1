"""The official tar files of ImageNet-2012 in miniature: their names and forms, tiny pictures."""

import io
import pathlib
import tarfile

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from enat_jax.data import imagenet, imagenet_records

# Of the pictures that TFDS encodes anew: two CMYK files and the PNG file.
CMYK = ("n01739381_1309.JPEG", "n13037406_4650.JPEG")
PNG = "n02105855_2933.JPEG"

TRAIN = {
    "n02105855": ["n02105855_17.JPEG", PNG],
    "n01440764": [f"n01440764_{i}.JPEG" for i in range(30)],
    "n13037406": ["n13037406_4650.JPEG", "n13037406_4651.JPEG"],
    "n01739381": [*(f"n01739381_{i}.JPEG" for i in range(20)), "n01739381_1309.JPEG"],
    "n15075141": [f"n15075141_{i}.JPEG" for i in range(1, 8)],
}
VALIDATION = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 50_000, 1, 2, 77)]
TEST = [f"ILSVRC2012_test_{i:08d}.JPEG" for i in (2, 1, 9)]


def picture(name):
    """An encoded picture of large flat fields, of a size and with colours that ``name`` decides."""
    rng = np.random.default_rng(list(name.encode()))
    height, width = rng.integers(2, 7, 2)
    mode = "CMYK" if name in CMYK else "RGB"
    fields = rng.integers(0, 256, (height, width, len(mode)), np.uint8).repeat(16, 0).repeat(16, 1)
    image = PIL.Image.frombytes(mode, (16 * width, 16 * height), fields.tobytes())
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if name == PNG else "JPEG")
    return encoded.getvalue()


def tar(members):
    """An uncompressed tar file with these (name, content) pairs, as bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def pictures_tar(names):
    return tar([(name, picture(name)) for name in names])


def write_tars(directory):
    """Writes the three files; the training file is a tar file of tar files."""
    directory.mkdir()
    classes = [(f"{wordnet_id}.tar", pictures_tar(names)) for wordnet_id, names in TRAIN.items()]
    (directory / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (directory / "ILSVRC2012_img_val.tar").write_bytes(pictures_tar(VALIDATION))
    (directory / "ILSVRC2012_img_test.tar").write_bytes(pictures_tar(TEST))
    return directory


def build_with_tfds(data_dir, num_shards):
    """Has TFDS write the same pictures, by a builder that knows nothing of tar files.

    Returns the directory of the data set.
    """

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=imagenet.IDS),
                    "file_name": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            ids = imagenet_records.validation_ids()
            train = [(name, label) for label, names in TRAIN.items() for name in names]
            return {
                "train": self._generate_examples(train),
                "validation": self._generate_examples(
                    [(name, ids[int(name[15:23]) - 1]) for name in VALIDATION]
                ),
                "test": self._generate_examples([(name, -1) for name in TEST]),
            }

        def _generate_examples(self, pairs):
            for name, label in pairs:
                yield name, {"file_name": name, "image": picture(name), "label": label}

    builder = Imagenet2012(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_dir)
