"""CLIP's towers against Hugging Face's and OpenAI's implementations."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import GOLDEN

from enat_jax.models import clip, clip_names

TOLERANCE = 2e-5
CASES = ["quick_gelu:pad_eos", "quick_gelu:pad_zero", "gelu:pad_eos"]


@functools.cache
def golden():
    return np.load(GOLDEN / "clip_text.npz")


def tensors():
    """All tensors of the golden text tower, by the names of Hugging Face."""
    found = [name for name in golden().files if name.startswith("param:")]
    return {name.removeprefix("param:"): golden()[name].astype(np.float32) for name in found}


def run(state_dict, ids, activation, **settings):
    text, vision = clip_names.towers(state_dict)
    assert not vision
    heads = json.loads(str(golden()["config"]))["num_heads"]
    model = clip_names.text_tower_of(text, activation, num_heads=heads, **settings)
    params = clip_names.text_params(text, model)
    return jax.jit(model.apply)({"params": params}, ids)


@pytest.mark.parametrize("case", CASES)
def test_states_and_vectors_equal_the_reference(case):
    activation, padding = case.split(":")
    states, vectors = run(tensors(), golden()[f"ids:{padding}"], activation)
    expected = golden()[f"{case}:last_hidden_state"], golden()[f"{case}:text_embeds"]
    chex.assert_trees_all_close((states, vectors), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES[:2])
def test_the_input_of_the_last_layer_is_to_be_had(case):
    activation, padding = case.split(":")
    states, vectors = run(tensors(), golden()[f"ids:{padding}"], activation, hidden_layer=-2)
    assert vectors is None
    expected = golden()[f"{case}:hidden_states"][-2]
    np.testing.assert_allclose(states, expected, rtol=0, atol=TOLERANCE)


def test_padding_and_activation_are_told_apart():
    """Either mistake leaves plausible states; the goldens are far enough apart to show it."""
    eos, zero, gelu = (golden()[f"{case}:last_hidden_state"] for case in CASES)
    assert np.abs(eos - zero).max() > 1 and np.abs(eos - gelu).max() > 0.01
    ends = golden()["ids:pad_eos"].argmax(axis=1)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(eos[row, : end + 1], zero[row, : end + 1], atol=1e-6)


def as_openai(state_dict):
    """The same tensors by OpenAI's names, whose queries, keys and values are packed in one."""
    names = {ours: theirs for theirs, ours in clip_names._TEXT.items()}
    blocks = {ours: theirs for theirs, ours in clip_names._BLOCK.items()}
    found, packed = {}, {}
    for name, array in state_dict.items():
        if name == "text_projection.weight":
            found["text_projection"] = array.T
        elif name in names:
            found[names[name]] = array
        else:
            number, part = name.removeprefix("text_model.encoder.layers.").split(".", 1)
            part, end = part.rsplit(".", 1)
            block = f"transformer.resblocks.{number}."
            if part in blocks:
                found[f"{block}{blocks[part]}.{end}"] = array
            else:
                packed[f"{block}attn.in_proj_{end}", part[len("self_attn.")]] = array
    for name in {name for name, _ in packed}:
        found[name] = np.concatenate([packed[name, kind] for kind in "qkv"])
    return found | {"logit_scale": np.float32(1), "attn_mask": np.zeros((77, 77), np.float32)}


def test_openai_s_names_and_those_of_a_tower_alone_lead_to_the_same_parameters():
    expected = clip_names.towers(tensors())[0]
    alone = {name.removeprefix("text_model."): array for name, array in tensors().items()}
    for other in (as_openai(tensors()), alone | {"embeddings.position_ids": np.arange(77)}):
        chex.assert_trees_all_equal(clip_names.towers(other)[0], expected)


def small_vision(**changes):
    settings = dict(
        image_size=8, patch_size=4, width=16, num_layers=2, num_heads=2, hidden=32,
        activation="quick_gelu", projection=6,
    )  # fmt: skip
    return clip.VisionTower(**settings | changes)


def vision_tensors(model, seed=0):
    """Random tensors of a vision tower by the names of Hugging Face."""
    rng = np.random.default_rng(seed)
    d, h, prefix = model.width, model.hidden, "vision_model."
    shapes = {
        f"{prefix}embeddings.class_embedding": (d,),
        f"{prefix}embeddings.patch_embedding.weight": (d, 3, model.patch_size, model.patch_size),
        f"{prefix}embeddings.position_embedding.weight": (
            (model.image_size // model.patch_size) ** 2 + 1,
            d,
        ),
        "visual_projection.weight": (model.projection, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{prefix}{norm}.weight": (d,), f"{prefix}{norm}.bias": (d,)}
    for i in range(model.num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        sizes = {f"self_attn.{kind}_proj": (d, d) for kind in ("q", "k", "v", "out")}
        sizes |= {"mlp.fc1": (h, d), "mlp.fc2": (d, h)}
        for name, shape in sizes.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for j in (1, 2):
            shapes |= {f"{layer}layer_norm{j}.{end}": (d,) for end in ("weight", "bias")}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def plain_vision(t, model, image):
    """The vision tower of one picture written plainly, in float64."""
    t = {name.removeprefix("vision_model."): array.astype(np.float64) for name, array in t.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    p = model.patch_size
    kernel = t["embeddings.patch_embedding.weight"]
    patches = [
        np.einsum("hwc,ochw->o", image[y : y + p, x : x + p], kernel)
        for y in range(0, model.image_size, p)
        for x in range(0, model.image_size, p)
    ]
    x = np.stack([t["embeddings.class_embedding"], *patches])
    x = norm(x + t["embeddings.position_embedding.weight"], "pre_layrnorm")
    for i in range(model.num_layers):
        layer = f"encoder.layers.{i}."
        dense = lambda y, name, at=layer: y @ t[f"{at}{name}.weight"].T + t[f"{at}{name}.bias"]  # noqa: E731
        y = norm(x, f"{layer}layer_norm1")
        q, k, v = (dense(y, f"self_attn.{kind}_proj") for kind in "qkv")
        size = model.width // model.num_heads
        heads = []
        for j in range(0, model.width, size):
            part = slice(j, j + size)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = x + dense(np.concatenate(heads, -1), "self_attn.out_proj")
        y = dense(norm(x, f"{layer}layer_norm2"), "mlp.fc1")
        x = x + dense(y / (1 + np.exp(-1.702 * y)), "mlp.fc2")
    return norm(x[0], "post_layernorm") @ t["visual_projection.weight"].T


def test_the_vision_tower_is_the_method_written_plainly():
    model = small_vision()
    given = vision_tensors(model)
    text, vision = clip_names.towers(given | {"logit_scale": np.float32(4)})
    assert not text
    assert clip_names.vision_tower_of(vision, "quick_gelu", num_heads=2) == model
    params = clip_names.vision_params(vision, model)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3))
    found = jax.jit(model.apply)({"params": params}, jnp.asarray(images, jnp.float32))
    expected = [plain_vision(given, model, image) for image in images]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def broken(change):
    found = tensors()
    change(found)
    return found


@pytest.mark.parametrize(
    ("state_dict", "settings", "message"),
    [
        ({"conv1.bias": np.zeros(3)}, {}, "names that no CLIP has, such as 'conv1.bias'"),
        ({}, {}, "not a CLIP with this tower"),
        (
            broken(lambda t: t.pop("text_model.encoder.layers.1.mlp.fc2.bias")),
            {},
            r"layers \[1\] of 3 are missing",
        ),
        (
            broken(lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k]),
            {},
            "layers .* are not all there",
        ),
        (tensors(), {"num_heads": None}, "say how many heads"),
        (tensors(), {"num_heads": 5}, "not divisible by num_heads=5"),
        (tensors(), {"activation": "relu"}, "activation='relu' is unknown"),
        (tensors(), {"hidden_layer": -3}, "must be -1 or -2"),
        ({"transformer.resblocks.0.attn.in_proj_weight": np.zeros((4, 2))}, {}, "three times"),
    ],
)
def test_what_is_no_clip_is_refused(state_dict, settings, message):
    with pytest.raises(ValueError, match=message):
        text, _ = clip_names.towers(state_dict)
        model = clip_names.text_tower_of(text, **{"activation": "gelu", "num_heads": 4} | settings)
        clip_names.text_params(text, model)


@pytest.mark.parametrize(
    ("width", "layers", "activation", "projection", "millions"),
    [
        (512, 12, "quick_gelu", 512, 63.2),
        (768, 12, "quick_gelu", 768, 123.1),
        (1024, 24, "gelu", 1024, 353.0),
    ],
)
def test_sizes_are_those_of_the_published_models(width, layers, activation, projection, millions):
    model = clip.TextTower(
        49408, 77, width, layers, width // 64, 4 * width, activation, projection=projection
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions + projection * width / 1e6, abs=0.6)
