"""Tokenization: the same bytes on any devices and hosts, after any interruption, nothing silent."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from enat_jax.data import decoding, tokens
from enat_jax.inference import tokenization


@dataclasses.dataclass
class Pictures:
    """Noise, some of which cannot be read."""

    n: int = 37
    broken: tuple[int, ...] = ()
    wrong_label: int | None = None
    image_shape = (8, 8, 1)
    class_names = tiny.CLASSES
    mirrored = True

    def __len__(self):
        return self.n

    def key(self, index):
        return f"{index}.png"

    def load(self, index, seed=None):
        if index in self.broken:
            raise decoding.UnreadableImage(self.key(index), "is truncated")
        image = np.random.default_rng([index, seed or 0]).integers(0, 256, (8, 8, 1), np.uint8)
        label = 3 if index == self.wrong_label else index % 3
        return decoding.Example(image, label, self.key(index))

    def identity(self):
        return {"source": "noise", "num_images": self.n}


@pytest.fixture(scope="module")
def model():
    return tiny.make_tokenizer()


def spec_for(model, source, **settings):
    defaults = {"copies": 1, "flips": True, "batch_size": 4, "shard_items": 8}
    return tokens.TokenSetSpec(
        num_images=len(source),
        grid=model.grid,
        codebook_size=model.model.codebook_size,
        class_names=source.class_names,
        tokenizer=model.fingerprint,
        preprocessing=source.identity(),
        location={},
        **defaults | settings,
    )


def make(directory, model, source, hosts=1, skip_errors=False, **settings):
    spec = spec_for(model, source, **settings)
    for host in range(hosts):
        tokenization.tokenize(
            model,
            source,
            spec,
            directory,
            skip_errors=skip_errors,
            host_index=host,
            num_hosts=hosts,
        )
        assert tokens.finish(directory, spec) == (host == hosts - 1)
    return directory


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokens") / "whole", model, Pictures())


def test_records_are_the_tokens_of_images_and_their_mirror_images(model, whole):
    found = tokens.TokenSet.open(whole).rows[np.arange(74)]
    source = Pictures()
    originals = np.stack([source.load(i).image for i in range(37)])
    np.testing.assert_array_equal(found["tokens"][::2], model.encode(originals))
    np.testing.assert_array_equal(found["tokens"][1::2], model.encode(originals[:, :, ::-1]))
    assert found["flip"].tolist() == [0, 1] * 37
    assert found["image"].tolist() == np.repeat(np.arange(37), 2).tolist()
    assert found["label"].tolist() == (np.repeat(np.arange(37), 2) % 3).tolist()
    assert len(np.unique(found["tokens"])) > tiny.CODES // 2


@pytest.mark.parametrize("num_devices", [1, 3])
def test_the_bytes_are_the_same_on_any_number_of_devices(
    model, whole, tmp_path, monkeypatch, num_devices
):
    devices = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert content(make(tmp_path / "few", model, Pictures())) == content(whole)


@pytest.mark.parametrize("hosts", [2, 5])
def test_the_bytes_are_the_same_from_any_number_of_hosts(model, whole, tmp_path, hosts):
    assert content(make(tmp_path / "many", model, Pictures(), hosts=hosts)) == content(whole)


def test_an_interrupted_run_goes_on_with_other_hosts(model, whole, tmp_path, monkeypatch):
    directory, finished = tmp_path / "set", []

    def interrupted(*arguments):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(arguments[2])
        write(*arguments)

    write = tokens.write_shard
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tokens, "write_shard", interrupted)
        make(directory, model, Pictures())
    redone = []

    def counted(*arguments):
        redone.append(arguments[2])
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "write_shard", counted)
        make(directory, model, Pictures(), hosts=2)
    assert sorted(finished + redone) == [0, 1, 2, 3, 4]  # nothing twice
    assert content(directory) == content(whole)


def test_copies_are_augmented_but_the_first(model, whole, tmp_path):
    directory = make(tmp_path / "set", model, Pictures(), copies=3, flips=False)
    found = tokens.TokenSet.open(directory).rows[np.arange(111)]
    plain = tokens.TokenSet.open(whole).rows[np.arange(0, 74, 2)]
    np.testing.assert_array_equal(found["tokens"][::3], plain["tokens"])
    assert (found["tokens"][1::3] != plain["tokens"]).any(axis=1).all()
    assert (found["tokens"][1::3] != found["tokens"][2::3]).any(axis=1).all()
    assert not found["flip"].any()
    again = make(tmp_path / "again", model, Pictures(), copies=3, flips=False)
    assert content(again) == content(directory)


def test_an_unreadable_image_stops_it_and_what_is_finished_stays(model, whole, tmp_path):
    directory = tmp_path / "set"
    with pytest.raises(decoding.UnreadableImage, match=r"^36\.png: is truncated"):
        make(directory, model, Pictures(broken=(36,)))
    assert not (directory / "metadata.json").exists()
    finished = content(directory)
    assert "00000-of-00005.json" in finished
    make(directory, model, Pictures())  # the picture has been mended
    assert content(directory) == content(whole)


def test_skipped_images_are_listed_and_no_label_moves(model, whole, tmp_path):
    source = Pictures(broken=(0, 11, 36))
    directory = make(tmp_path / "set", model, source, skip_errors=True)
    metadata = tokens.read_metadata(directory)
    assert metadata["skipped"] == [
        {"image": i, "key": f"{i}.png", "reason": "is truncated"} for i in (0, 11, 36)
    ]
    assert metadata["num_images"] == 37 and metadata["num_records"] == 68
    found = tokens.TokenSet.open(directory).rows[np.arange(68)]
    all_rows = tokens.TokenSet.open(whole).rows[np.arange(74)]
    kept = ~np.isin(all_rows["image"], (0, 11, 36))
    np.testing.assert_array_equal(found, all_rows[kept])


def test_a_run_that_stopped_goes_on_skipping(model, tmp_path):
    source = Pictures(broken=(30,))
    skipped = content(make(tmp_path / "skipped", model, source, skip_errors=True))
    with pytest.raises(decoding.UnreadableImage):
        make(tmp_path / "set", model, source)
    assert content(make(tmp_path / "set", model, source, skip_errors=True)) == skipped


def test_a_label_without_a_class_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"5\.png: label 3 is not one of the 3 classes"):
        make(tmp_path / "set", model, Pictures(wrong_label=5), skip_errors=True)


def test_times_say_what_was_waited_for(model, tmp_path):
    source = Pictures()
    spec = spec_for(model, source)
    times = tokenization.tokenize(model, source, spec, tmp_path / "set")
    assert times.num_images == 37
    assert 0 < times.pictures + times.tokenizer + times.writing <= times.total
    assert "images/s" in str(times) and "% on the tokenizer" in str(times)
