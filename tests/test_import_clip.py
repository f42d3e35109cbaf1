"""CLIP's weights come through the command line in every naming and give the reference's states."""

import hashlib
import json
import zipfile

import jax
import numpy as np
import pytest
import torch_writer as writer
from hostile import import_weights as run
from hostile import refused_import as refused
from models.test_clip import as_openai, golden, small_vision, tensors, vision_tensors

from enat_jax import import_torch
from enat_jax.checkpoints import weight_files
from enat_jax.data import text_tokens
from enat_jax.inference import clip_model, clip_towers, clip_weights

CLIP = text_tokens.Clip
# The golden tower has 160 tokens of its own, the last two of which start and end a text.
START, END = 158, 159
SETTINGS = ["--activation", "quick_gelu", "--pad", CLIP.end]
HEADS = ["--num-heads", 4, "--vision-heads", 2]
TOLERANCE = 2e-5


def as_clip(ids):
    """Tokens of the golden tower as those of CLIP; its zeros may be padding."""
    return np.where(ids == START, CLIP.start, np.where(ids == END, CLIP.end, ids))


def whole_model():
    """The golden text tower, with CLIP's number of tokens, and a random vision tower."""
    found = tensors()
    name = "text_model.embeddings.token_embedding.weight"
    table = np.zeros((CLIP.size, found[name].shape[1]), np.float32)
    table[: len(found[name])] = found[name]
    table[[CLIP.start, CLIP.end]] = found[name][[START, END]]
    return found | {name: table} | vision_tensors(small_vision(projection=24))


def vision_as_openai(given):
    packed = {}
    for name, array in given.items():
        name = name.removeprefix("vision_model.")
        if name == "visual_projection.weight":
            packed["visual.proj"] = array.T
        elif name.startswith("encoder.layers."):
            number, part = name.removeprefix("encoder.layers.").split(".", 1)
            packed[f"text_model.encoder.layers.{number}.{part}"] = array
        else:
            names = {
                "embeddings.patch_embedding.weight": "conv1.weight",
                "embeddings.class_embedding": "class_embedding",
                "embeddings.position_embedding.weight": "positional_embedding",
            }
            name = name.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post")
            packed[f"visual.{names.get(name, name)}"] = array
    blocks = {k: v for k, v in packed.items() if k.startswith("text_model.")}
    renamed = {
        f"visual.{k}": v
        for k, v in as_openai(blocks).items()
        if k not in ("logit_scale", "attn_mask")
    }
    return {k: v for k, v in packed.items() if k not in blocks} | renamed


def split(given):
    seeing = {k: v for k, v in given.items() if k.startswith(("vision_model.", "visual_"))}
    return {k: v for k, v in given.items() if k not in seeing}, seeing


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same CLIP by the names of Hugging Face, and by OpenAI's in a file of torch.save."""
    root = tmp_path_factory.mktemp("clip")
    found = whole_model()
    halves = {name: array.astype(np.float16) for name, array in found.items()}
    halves["text_model.embeddings.position_ids"] = np.arange(77)[None]
    weight_files.write_safetensors(root / "model.safetensors", halves)
    text, seeing = split(found)
    weight_files.write_safetensors(root / "text.safetensors", text)
    weight_files.write_safetensors(root / "seeing.safetensors", seeing)
    packed = as_openai(text) | vision_as_openai(seeing)
    packed = {f"module.{name}": np.asarray(array) for name, array in packed.items()}
    checkpoint = {"epoch": 1, "name": "ViT", "state_dict": packed}
    (root / "open_clip.pt").write_bytes(writer.zip_bytes(checkpoint))
    return root


@pytest.fixture(scope="module")
def imported(files):
    """By the names of Hugging Face, the settings from ``config.json``."""
    source = files / "whole"
    source.mkdir()
    (source / "model.safetensors").hardlink_to(files / "model.safetensors")
    of_text = {"hidden_act": "quick_gelu", "pad_token_id": CLIP.end, "num_attention_heads": 4}
    of_vision = {"hidden_act": "gelu", "num_attention_heads": 2}
    config = {"pad_token_id": 1, "text_config": of_text, "vision_config": of_vision}
    (source / "config.json").write_text(json.dumps(config))
    out = files / "imported"
    import_torch.main(["--clip", str(source / "model.safetensors"), "--out", str(out)])
    return out


def test_states_and_vectors_are_the_reference_s(imported):
    found = clip_towers.Clip.load(imported, devices=jax.devices()[:1])
    assert found.text.pad == CLIP.end and found.text.model.activation == "quick_gelu"
    assert found.vision.model == small_vision(projection=24, activation="gelu")
    case, ids = "quick_gelu:pad_eos", as_clip(golden()["ids:pad_eos"])
    states = found.text.states(ids)
    expected = golden()[f"{case}:last_hidden_state"]
    np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-3)  # handed out as halves
    vectors = found.text.vectors(ids)
    assert vectors.dtype == np.float32
    # The golden weights are exact in float16.
    np.testing.assert_allclose(vectors, golden()[f"{case}:text_embeds"], rtol=0, atol=TOLERANCE)


def test_a_text_encoder_reads_the_same_directory(imported, files):
    found = clip_model.ClipText.load(imported, devices=jax.devices()[:1])
    provenance = found.provenance
    expected = hashlib.sha256((files / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["sha256"] == expected and provenance["file"] == "model.safetensors"
    assert provenance["imported"] == "CLIP, by the names of Hugging Face"
    empty = golden()["ids:pad_eos"][:1]  # the text of no tokens
    null = golden()["quick_gelu:pad_eos:last_hidden_state"][0]
    assert (empty[0, :3] == [START, END, END]).all()
    np.testing.assert_allclose(found.null_states, null, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.load(imported / "null_text.npy"), found.null_states)


def test_openai_s_names_give_the_same_weights(files, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    path = files / "open_clip.pt"
    code, said, _ = run(capsys, "--clip", path, *SETTINGS[:2], "--pad", 0, *HEADS, "--out", out)
    assert code is None and "vectors of 24, 3 layers of 4 heads, quick_gelu" in said
    assert "vision tower: vectors of 24 of 8 pixels of a side in patches of 4" in said
    assert [x.name for x in out.parent.iterdir()] == ["out"]
    found = clip_towers.Clip.load(out, devices=jax.devices()[:1])
    read, _ = clip_weights.read(
        files / "model.safetensors", activation="quick_gelu", pad=0, num_heads=4, vision_heads=2
    )
    assert found.text.fingerprint == read.text.fingerprint  # exact in float16
    assert found.text.provenance["imported"] == "CLIP, by the names of OpenAI"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        jax.device_get(found.vision.params),
        read.vision.params,
    )
    ids = as_clip(golden()["ids:pad_zero"])
    expected = golden()["quick_gelu:pad_zero:text_embeds"]
    np.testing.assert_allclose(found.text.vectors(ids), expected, rtol=0, atol=TOLERANCE)


def test_the_same_command_again(imported, files, capsys):
    before = {path: path.stat().st_mtime_ns for path in imported.rglob("*")}
    arguments = ["--clip", files / "whole" / "model.safetensors", "--out", imported]
    code, said, _ = run(capsys, *arguments)
    assert code is None and "holds the same already" in said
    refused(capsys, "holds another import", *arguments, "--pad", 0)
    assert {path: path.stat().st_mtime_ns for path in imported.rglob("*")} == before


def test_a_text_tower_alone(files, tmp_path, capsys):
    arguments = ["--clip", files / "text.safetensors", *SETTINGS, *HEADS[:2]]
    code, said, _ = run(capsys, *arguments, "--out", tmp_path / "last")
    assert code is None and "no vision tower" in said
    assert clip_towers.Clip.load(tmp_path / "last").vision is None
    assert not list((tmp_path / "last").glob("vision*"))
    out = tmp_path / "input"
    assert run(capsys, *arguments, "--hidden-layer", -2, "--out", out)[0] is None
    found = clip_model.ClipText.load(out, devices=jax.devices()[:1])
    ids = as_clip(golden()["ids:pad_eos"])
    expected = golden()["quick_gelu:pad_eos:hidden_states"][-2]
    np.testing.assert_allclose(found.states(ids), expected, rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="no vectors of them, because it was imported with"):
        found.vectors(ids)


def known(monkeypatch, path, *about):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_weights.KNOWN, digest, clip_weights.Published("some/clip", *about))


def test_a_config_that_lies_of_known_weights_is_corrected(files, tmp_path, capsys, monkeypatch):
    path = tmp_path / "text.safetensors"
    path.hardlink_to(files / "text.safetensors")
    known(monkeypatch, path, "quick_gelu", 0)
    config = {"hidden_act": "gelu", "pad_token_id": 1, "eos_token_id": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, said, _ = run(capsys, "--clip", path, "--out", tmp_path / "out")
    assert code is None
    assert "says hidden_act 'gelu', which is wrong: these are the weights of some/clip" in said
    found = clip_model.ClipText.load(tmp_path / "out")
    assert (found.model.activation, found.pad) == ("quick_gelu", 0)
    refused(
        capsys,
        "whose activation is quick_gelu and not gelu: leave --activation out",
        *("--clip", path, "--activation", "gelu", "--out", tmp_path / "other"),
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        (None, [], "give --activation quick_gelu (OpenAI, DFN, MetaCLIP) or --activation gelu"),
        ({}, [], "give --activation quick_gelu"),
        ({"hidden_act": "relu"}, [], "says hidden_act 'relu', which CLIP does not have"),
        ({"hidden_act": "gelu"}, [], "nothing says it: give --pad 49407"),
        ({"hidden_act": "gelu", "pad_token_id": 1}, [], "config.json says 1: give --pad 49407"),
        ({"hidden_act": "gelu", "pad_token_id": "x"}, [], "says 'x': give --pad"),
        ({"hidden_act": "gelu"}, ["--pad", 49408], "--pad 49408 is no token of CLIP"),
        ({"hidden_act": "gelu"}, ["--pad", -1], "--pad -1 is no token of CLIP"),
        ([], SETTINGS, "config.json holds no settings: remove it"),
        ("{", SETTINGS, "it is not JSON"),
    ],
)
def test_what_the_weights_do_not_say_is_asked_for(
    files, tmp_path, capsys, monkeypatch, config, flags, words
):
    path = tmp_path / "text.safetensors"
    path.hardlink_to(files / "text.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    out = tmp_path / "out"
    refused(capsys, words, "--clip", path, *HEADS[:2], *flags, "--out", out)
    assert not out.exists()


def test_mistakes_are_one_line(files, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    path = tmp_path / "broken.safetensors"

    def written(**changes):
        found = {k: v for k, v in split(whole_model())[0].items() if k not in changes}
        weight_files.write_safetensors(
            path, found | {k: v for k, v in changes.items() if v is not None}
        )
        return ["--clip", path, *SETTINGS, *HEADS[:2], *out]

    layer = "text_model.encoder.layers.1.mlp.fc2.bias"
    refused(capsys, "layers [1] of 3 are missing", *written(**{layer: None}))
    bad = np.full(32, np.nan, np.float32)
    refused(capsys, "values that are no finite numbers: damaged", *written(**{layer: bad}))
    refused(capsys, "names that no CLIP has, such as 'fc.bias'", *written(**{"fc.bias": bad}))
    name = "text_model.embeddings.token_embedding.weight"
    refused(
        capsys,
        "this tower has 160 tokens, and CLIP has 49,408",
        *written(**{name: tensors()[name]}),
    )
    whole = written()
    path.write_bytes(path.read_bytes()[:-9])
    refused(capsys, "broken.safetensors", *whole)
    seeing = ["--clip", files / "seeing.safetensors", *SETTINGS, *HEADS, *out]
    refused(capsys, "not a CLIP with this tower: 'text_model.", *seeing)
    text = files / "text.safetensors"
    refused(capsys, "say how many heads", "--clip", text, *SETTINGS, *out)
    refused(capsys, "--vqgan has no use with --clip", "--clip", text, "--vqgan", text, *out)
    refused(capsys, "--pad has no use without --clip", "--vqgan", text, "--pad", 0, *out)
    refused(capsys, "No such file", "--clip", tmp_path / "none", *SETTINGS, *out)
    assert not (tmp_path / "out").exists()


def test_openai_s_programs_are_not_run(tmp_path, capsys):
    path = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/model.py"):
            archive.writestr(f"ViT-L-14/{name}", b"")
    refused(
        capsys,
        "use the safetensors of openai/clip-vit-large-patch14",
        *("--clip", path, *SETTINGS, "--out", tmp_path / "out"),
    )
