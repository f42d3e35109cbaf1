"""A model directory, and images that depend on (seed, index, label) alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from enat_jax.checkpoints import model_files
from enat_jax.inference import sampler_schedule, sampling
from enat_jax.inference.generator import Generator
from enat_jax.models.blocks import Prompt

LABELS = np.array([0, 1, 2, 3, 1])  # 3: no class


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("generator") / "model"
    model.save(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def one_device(directory, **more):
    """Loaded for the device that `model` is on, too, so that it compiles nothing anew."""
    return Generator.load(directory, devices=jax.devices()[:1], **more)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_model_draws_the_same(model, saved):
    loaded = one_device(saved)
    assert loaded.model == model.model
    assert loaded.settings == model.settings
    assert loaded.class_names == tiny.CLASSES
    assert loaded.provenance == {"weights": "random 0"}
    assert loaded.fingerprint == model.fingerprint
    tokens = model.sample_tokens(LABELS, seed=4)
    assert tokens.shape == (5, tiny.NUM_TOKENS) and tokens.dtype == np.int32
    assert np.array_equal(loaded.sample_tokens(LABELS, seed=4), tokens)
    images = loaded.sample(LABELS, seed=4)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert np.array_equal(images, model.tokenizer.decode(tokens))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(model, batch_size):
    expected = model.sample_tokens(LABELS, seed=1)
    found = model.sample_tokens(LABELS, seed=1, batch_size=batch_size)
    assert np.array_equal(found, expected)


def test_an_image_does_not_depend_on_the_devices(model):
    all_devices = tuple(jax.devices())
    spread = dataclasses.replace(
        model,
        devices=all_devices,
        tokenizer=dataclasses.replace(model.tokenizer, devices=all_devices),
    )
    assert len(spread.devices) == 8
    assert np.array_equal(spread.sample(LABELS, seed=1), model.sample(LABELS, seed=1))


def test_a_smaller_last_batch_compiles_nothing(model):
    whole = model.sample(LABELS, seed=1)
    compiled = sampling.sample_tokens.jitted._cache_size()
    last = model.sample(LABELS[3:], seed=1, first_index=3, batch_size=5)
    assert np.array_equal(last, whole[3:])
    assert sampling.sample_tokens.jitted._cache_size() == compiled


def test_an_image_depends_on_seed_index_and_label(model):
    base = model.sample_tokens(LABELS, seed=1)
    assert np.array_equal(model.sample_tokens(LABELS[2:], seed=1, first_index=2), base[2:])
    assert not np.array_equal(model.sample_tokens(LABELS, seed=2), base)
    assert not np.array_equal(base[1], base[4])  # one label, two indices
    other = model.sample_tokens([0, 1, 0, 3, 1], seed=1)  # only the third label differs
    kept = [0, 1, 3, 4]
    assert np.array_equal(other[kept], base[kept])
    assert not np.array_equal(other[2], base[2])


def test_half_the_precision(saved, tmp_path):
    half = one_device(saved, dtype="bfloat16")
    leaves = jax.tree.leaves((half.params, half.tokenizer.params))
    assert {str(x.dtype) for x in leaves} == {"bfloat16"}
    assert half.model.dtype == half.tokenizer.model.dtype == "bfloat16"
    assert half.fingerprint == one_device(saved).fingerprint
    assert half.with_settings(num_steps=2).fingerprint == half.fingerprint
    assert half.sample(LABELS).dtype == np.uint8
    with pytest.raises(ValueError, match="rounded when they were loaded"):
        half.save(tmp_path)
    with pytest.raises(ValueError, match="dtype='float16' of a model: choose float32 or bfloat16"):
        one_device(saved, dtype="float16")


def test_no_labels_no_images(model):
    assert model.sample([]).shape == (0, 8, 8, 1)


def test_other_settings_are_a_model_of_its_own(model):
    colder = model.with_settings(token_temperature=0.0, mask_temperature=0.0)
    assert model.settings == tiny.SETTINGS
    assert colder.settings == dataclasses.replace(
        tiny.SETTINGS, token_temperature=0.0, mask_temperature=0.0
    )
    greedy = colder.sample_tokens([1, 1])
    assert np.array_equal(greedy[0], greedy[1])
    with pytest.raises(ValueError, match="guidance_scale=-1"):
        model.with_settings(guidance_scale=-1)


@pytest.mark.slow
def test_segments_depend_on_the_batch_or_what_is_planned(model, monkeypatch):
    """Never on how many images a call asks for, as these share a compiled shape."""
    monkeypatch.setattr(sampler_schedule, "BODY_COSTS", {jax.default_backend(): 3e5})
    model, seen = model.with_settings(num_segments=None), []
    draw = sampling.sample_tokens

    def drawing(of, static, *more, **named):
        seen.append(len(static.segments))
        return draw(of, static, *more, **named)

    monkeypatch.setattr(sampling, "sample_tokens", drawing)
    few, many = dataclasses.replace(model, planned=1), dataclasses.replace(model, planned=10**9)
    expected = few.sample_tokens(LABELS[:3], batch_size=3)
    found = many.sample_tokens(LABELS, batch_size=3)
    assert np.array_equal(found[:3], expected)
    assert np.array_equal(model.sample_tokens(LABELS, batch_size=3), found)
    model.sample_tokens(LABELS[:1], batch_size=3)
    first, *rest = seen
    assert first == 1 and rest[:2] == [3, 3] and len(set(rest[2:])) == 1


def test_segments_change_no_token(model):
    base = model.sample_tokens(LABELS)
    assert np.array_equal(model.with_settings(num_segments=3).sample_tokens(LABELS), base)


def test_scores_of_masked_tokens(model):
    tokens = model.sample_tokens(LABELS)
    loss, hits = model.masked_scores(tokens, LABELS, num_visible=4, seed=0)
    assert loss.shape == hits.shape == (5, 12)
    assert np.all(np.asarray(loss) > 0)
    with pytest.raises(ValueError, match="num_visible=16"):
        model.masked_scores(tokens, LABELS, num_visible=16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 4], "label 4 is out of range: this model has the classes 0 to 2"),
        ([-1], "label -1 is out of range"),
        ([0.0, 1.0], "whole numbers"),
        ([[0]], "whole numbers"),
        (["cat"], "whole numbers"),
        ([True], "whole numbers"),
        (1, "whole numbers"),
    ],
)
def test_wrong_labels(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model.sample(labels)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_has_32_bits(model, seed):
    with pytest.raises(ValueError, match=f"seed={seed} must lie in"):
        model.sample([0], seed=seed)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_images(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        model.sample([0], batch_size=batch_size)


@pytest.mark.parametrize("missing", ["orbax", "safetensors"])
def test_one_format_of_the_weights_will_do(model, copied, missing):
    if missing == "orbax":
        shutil.rmtree(copied / "transformer")
        shutil.rmtree(copied / "tokenizer" / "params")
    else:  # and no README.md, as in directories of earlier versions
        for name in ("transformer.safetensors", "tokenizer/params.safetensors", "README.md"):
            (copied / name).unlink()
    loaded = one_device(copied)
    assert loaded.fingerprint == model.fingerprint
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_others_can_read_the_weights(model, saved):
    from safetensors import numpy as safetensors

    found = safetensors.load_file(saved / "transformer.safetensors")
    expected = model.params["encoder"]["mlp"]["up"]["kernel"]
    assert np.array_equal(found["encoder/mlp/up/kernel"], expected)
    assert len(found) == len(jax.tree.leaves(model.params))


def test_a_readme_says_what_it_is(model, saved):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: enat_jax\n")
    assert "3 classes" in text and "images of 8x8 pixels" in text and "| num_steps | 3 |" in text
    assert f"transformer weights, SHA-256: `{model.fingerprint}`" in text
    assert "sampler.jaxexport" not in text


def test_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*model.json: name the `model`"):
        Generator.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "is not JSON"),
        ("[]", "format None"),
        ('{"format": "of somebody else"}', "format 'of somebody else'"),
        ('{"format": "enat_jax model 3"}', "of a newer version of enat_jax, update this one"),
        ('{"format": "enat_jax model 1"}', "not 'enat_jax model 2': name the `model`"),
        ('{"format": "enat_jax model 2"}', "is damaged: KeyError"),
        ('{"format": "enat_jax model 2", "kind": "enat", "model": 3}', "is damaged"),
    ],
)
def test_a_foreign_or_damaged_description(copied, text, message):
    (copied / "model.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Generator.load(copied)


def test_settings_of_another_version(copied):
    edit(copied / "model.json", sampler={"halton": True})
    with pytest.raises(ValueError, match="model.json is damaged: .*halton"):
        Generator.load(copied)


def test_other_weights_than_were_saved(copied):
    model_files.save_params(copied / "transformer", tiny.make_generator(seed=1).params)
    with pytest.raises(ValueError, match="not those that were saved"):
        Generator.load(copied)


def test_damaged_weights(copied):
    for path in (copied / "transformer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="transformer"):
        Generator.load(copied)


def test_no_weights(copied):
    shutil.rmtree(copied / "transformer")
    (copied / "transformer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no parameters at .*transformer: neither"):
        Generator.load(copied)


def test_truncated_safetensors(copied):
    shutil.rmtree(copied / "transformer")
    path = copied / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="transformer.safetensors.* copy or download it again"):
        Generator.load(copied)


def test_another_directory_than_the_model(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="this is a tokenizer, which draws nothing"):
        Generator.load(copied / "tokenizer")
    with pytest.raises(FileNotFoundError, match="model.json: name .*/model$"):
        Generator.load(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="not finished, see python -m enat_jax.export"):
        Generator.load(tmp_path / "run")


def test_the_tokenizer_of_another_model(copied):
    tiny.make_tokenizer(seed=1).save(copied / "tokenizer")
    with pytest.raises(ValueError, match="not the one that the model was trained with"):
        Generator.load(copied)


def test_parts_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"are \(16, 8, 2\), of the transformer \(16, 8, 3\)"):
        dataclasses.replace(model, class_names=("cat", "dog"))


def test_it_is_one_line():
    model = tiny.make_generator()
    count = sum(x.size for x in jax.tree.leaves(model.params))
    codec = repr(model.tokenizer)
    assert codec.startswith("Tokenizer(VQGAN, ")
    assert codec.endswith(" parameters, 4x4 tokens of 8 codes, 8x8 pixels)")
    assert repr(model) == f"Generator(ENAT, {count:,} parameters, 3 classes, 3 steps, {codec})"


PROMPTS = ["a red cat", "two blue cats", "", "a red cat"]


@pytest.fixture(scope="module")
def reader():
    """A model of texts alone."""
    return tiny.make_word_generator()


def test_an_image_depends_on_seed_index_and_prompt(reader, tmp_path):
    base = reader.sample_tokens(prompts=PROMPTS, seed=3)
    assert base.shape == (4, tiny.NUM_TOKENS)
    assert not np.array_equal(base[0], base[3])  # one prompt, two indices
    other = reader.sample_tokens(prompts=["a red cat", "two red cats", "", "a red cat"], seed=3)
    assert np.array_equal(other[[0, 2, 3]], base[[0, 2, 3]])
    assert not np.array_equal(other[1], base[1])
    again = reader.sample_tokens(prompts=PROMPTS[2:], seed=3, first_index=2, batch_size=4)
    assert np.array_equal(again, base[2:])
    reader.save(tmp_path, ["safetensors"])
    assert not (tmp_path / "null_text.npy").exists()
    loaded = one_device(tmp_path)
    assert loaded.description == reader.description and loaded.text.kind == reader.text.kind
    assert np.array_equal(loaded.sample_tokens(prompts=PROMPTS, seed=3), base)
    words = Prompt(*reader.text.prompt(PROMPTS))
    assert np.array_equal(reader.sample_tokens(prompts=words, seed=3), base)
    assert np.array_equal(
        reader.sample_tokens([0, 0], seed=3, first_index=2, batch_size=4)[0], base[2]
    )
    assert reader.sample(prompts=[]).shape == (0, 8, 8, 1)


def test_guidance_leads_away_from_the_negative_prompt(reader):
    base = reader.sample_tokens(prompts=PROMPTS, seed=3)
    empty = reader.sample_tokens(prompts=PROMPTS, negative_prompts=[""] * 4, seed=3)
    assert np.array_equal(empty, base)
    negative = ["", "a dog", "", ""]
    other = reader.sample_tokens(prompts=PROMPTS, negative_prompts=negative, seed=3)
    assert np.array_equal(other[[0, 2, 3]], base[[0, 2, 3]])
    assert not np.array_equal(other[1], base[1])
    without = reader.with_settings(guidance_scale=0.0)
    with pytest.raises(ValueError, match="a negative prompt is what guidance leads away from, and"):
        without.sample(prompts=PROMPTS, negative_prompts=negative)


def test_texts_decide_how_well_tokens_are_predicted(reader):
    tokens = reader.sample_tokens(prompts=PROMPTS, seed=3)
    loss, _ = reader.masked_scores(tokens, None, num_visible=4, prompts=PROMPTS)
    other, _ = reader.masked_scores(tokens, None, num_visible=4, prompts=[*PROMPTS[:3], "a dog"])
    assert np.array_equal(loss[:3], other[:3]) and not np.allclose(loss[3], other[3])


def test_what_has_no_room_is_a_warning(reader):
    long = ["a red cat a red cat"] * 2
    with pytest.warns(
        UserWarning, match="than the 5 tokens .* reads: 'red cat' is left out"
    ) as seen:
        assert reader.sample([], prompts=[]).shape[0] == 0
        reader._wanted(None, long)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither labels nor prompts: say what the images are to show"),
        ({"prompts": "a cat"}, "prompts must be a list of texts, one for each image"),
        ({"prompts": ["a cat", 7]}, "and 7 is none"),
        ({"prompts": ["a giraffe"]}, "'giraffe' of the text 'a giraffe' is not in the vocabulary"),
        ({"labels": [0], "prompts": ["a cat", "a dog"]}, "2 prompts of 1 images: give one for"),
        ({"labels": [1]}, "label 1 is out of range: this model has no classes"),
        (
            {"prompts": ["a cat"], "negative_prompts": []},
            "0 negative_prompts of 1 images: give one for each image",
        ),
        ({"prompts": Prompt(np.zeros((1, 6), int))}, "a prompt of 6 tokens: this model reads 5"),
    ],
)
def test_wrong_prompts(reader, arguments, message):
    with pytest.raises(ValueError, match=message):
        reader.sample(**arguments)


def test_a_model_of_classes_reads_nothing(model):
    for arguments in ({"prompts": ["a cat"]}, {"negative_prompts": ["a cat"]}):
        with pytest.raises(ValueError, match="this model reads no texts: give labels and no prom"):
            model.sample([0], **arguments)
    with pytest.raises(ValueError, match="neither labels nor prompts"):
        model.sample()


def test_texts_that_do_not_fit_the_model(reader, tmp_path):
    shorter = dataclasses.replace(reader.text, context=4)
    with pytest.raises(ValueError, match=r"are \(4, 8, None\), of the transformer \(5, 8, None\)"):
        dataclasses.replace(reader, text=shorter)
    with pytest.raises(ValueError, match="a model of text needs to know how texts are read"):
        dataclasses.replace(reader, text=None)
    with pytest.raises(ValueError, match="reads words and needs no text encoder"):
        reader.with_text_encoder(tmp_path)


def test_padding_that_is_attended_to_must_be_there(reader):
    attending = reader.model.clone(attend_padding=True)
    attending = dataclasses.replace(reader, model=attending)
    with pytest.raises(ValueError, match="attends to the padding of a text, too, and needs all 5"):
        attending.sample(prompts=Prompt(np.zeros((1, 4), int)))


@pytest.mark.slow
def test_classes_and_texts_together():
    both = tiny.make_word_generator(3, seed=17)
    labels = [0, 1, 3, 0]
    base = both.sample_tokens(labels, prompts=PROMPTS)
    other = both.sample_tokens([0, 2, 3, 0], prompts=PROMPTS)
    assert np.array_equal(other[[0, 2, 3]], base[[0, 2, 3]])
    assert not np.array_equal(other[1], base[1])
    alone = both.sample_tokens(labels)
    assert np.array_equal(alone, both.sample_tokens(labels, prompts=[""] * 4))
    assert np.array_equal(alone[2], base[2]) and not np.array_equal(alone[0], base[0])
    assert np.array_equal(
        both.sample_tokens(prompts=PROMPTS), both.sample_tokens([3] * 4, prompts=PROMPTS)
    )


@pytest.mark.slow
def test_states_of_a_text_encoder(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    reader = tiny.make_clip_generator()
    texts = ["a cat", "", "a dog", "a cat"]
    base = reader.sample_tokens(prompts=texts, seed=3)
    states = reader.text.prompt(texts)
    assert np.array_equal(reader.sample_tokens(prompts=states, seed=3), base)
    reader.save(tmp_path / "alone")
    reader.save(tmp_path / "whole", with_text_encoder=True)
    alone, whole = one_device(tmp_path / "alone"), one_device(tmp_path / "whole")
    assert np.array_equal(whole.sample_tokens(prompts=texts, seed=3), base)
    assert np.array_equal(alone.sample_tokens(prompts=states, seed=3), base)
    with pytest.raises(ValueError, match="not at hand"):
        alone.sample(prompts=texts)
    inside = tmp_path / "whole" / "text_encoder"
    given = one_device(tmp_path / "alone", text_encoder_directory=inside)
    assert np.array_equal(given.sample_tokens(prompts=texts, seed=3), base)
    assert "in `text_encoder/`" in (tmp_path / "whole" / "README.md").read_text()
    assert "--text-encoder ENCODER" in (tmp_path / "alone" / "README.md").read_text()
    assert np.array_equal(whole.trace(prompts=texts, seed=3).tokens[-1], base)
    half = one_device(tmp_path / "whole", dtype="bfloat16")
    assert half.sample(prompts=texts).dtype == np.uint8
