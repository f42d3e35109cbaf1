"""A wrong shape at the door of a network is refused in one sentence that names the argument."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from enat_jax.models import classifier, enat, inception, nat, shapes, vqgan

SIZES = dict(num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2)
ENAT = enat.ENAT(**SIZES, encoder_layers=2, decoder_layers=1)
NAT = nat.NAT(**SIZES, num_layers=2)
CODEC = vqgan.VQGAN(
    channels=8, channel_multipliers=(1, 2), num_res_blocks=1, embed_dim=4, codebook_size=16,
    num_groups=4, image_channels=1,
)  # fmt: skip
INCEPTION = inception.Inception()
CLASSIFIER = classifier.Classifier(num_classes=2, image_channels=1, widths=(1,))

PASS = (jnp.zeros((1, 16), jnp.int32), jnp.zeros(1, jnp.int32))
INPUTS = {
    ENAT: PASS,
    NAT: PASS,
    CODEC: (jnp.zeros((1, 8, 8, 1)),),
    INCEPTION: (jnp.zeros((1, 299, 299, 3)),),
    CLASSIFIER: (jnp.zeros((1, 8, 8, 1)),),
}


@functools.cache
def variables(model):
    return jax.eval_shape(model.init, jax.random.key(0), *INPUTS[model])


def shape_of(model, method, *args, **kwargs):
    """The shape of a method's result; floats and integers are given by their shapes."""
    counts = {name: ints(*x) for name, x in kwargs.items()}
    return jax.eval_shape(
        functools.partial(model.apply, method=method), variables(model), *args, **counts
    ).shape


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


WINDOW = ints(2, 4), ints(2, 4)
OF_ENAT, OF_NAT, CACHE = floats(3, 2, 8, 16), floats(2, 2, 6, 16), floats(2, 5, 16)
MASKED = ints(2, 7)

RIGHT = [
    (ENAT, "condition", (ints(2),), {}, (3, 2, 8, 16)),
    (ENAT, "encode", (*WINDOW, OF_ENAT), {}, (2, 4, 16)),
    (ENAT, "encode", (*WINDOW, floats(2, 2, 8, 16), CACHE), {"num_new": ()}, (2, 9, 16)),
    (ENAT, "encode", (floats(2, 4, 16), None, OF_ENAT, CACHE), {"num_cached": (2,)}, (2, 9, 16)),
    (ENAT, "decode", (MASKED, OF_ENAT, CACHE), {"num_masked": (2,)}, (2, 7, 20)),
    (NAT, "condition", (ints(2),), {}, (2, 2, 6, 16)),
    (NAT, "encode", (*WINDOW, None), {}, (2, 4, 16)),
    (NAT, "decode", (MASKED, OF_NAT, CACHE), {"num_visible": ()}, (2, 7, 20)),
    (CODEC, "encode", (floats(2, 8, 6, 1),), {}, (2, 4, 3, 4)),
    (CODEC, "decode", (floats(2, 4, 3, 4),), {}, (2, 8, 6, 1)),
]

MODULATION = "modulation must have the shape [layers=2 or 3, b=2, vectors=8, d=16], not "
DECODED = "modulation must have the shape [layers=3, b=2, vectors=8, d=16], not "
OF_NAT_S = "modulation must have the shape [layers=2, b=2, vectors=6, d=16], not "
EMBEDDED = "tokens (of a float dtype, so embedded) must have the shape [b, n, d=16], not "

WRONG = [
    (ENAT, "condition", (ints(2, 1),), {}, "labels must have the shape [b], not [2, 1]"),
    (ENAT, "encode", (ints(4), ints(4), OF_ENAT), {}, "tokens must have the shape [b, n], not [4]"),
    (ENAT, "encode", (floats(2, 4), None, OF_ENAT), {}, EMBEDDED + "[2, 4]"),
    (ENAT, "encode", (floats(2, 4, 8), None, OF_ENAT), {}, EMBEDDED + "[2, 4, 8]"),
    (ENAT, "encode", (ints(2, 4), ints(2, 5), OF_ENAT), {},
     "positions must have the shape [b=2, n=4], not [2, 5]"),
    (ENAT, "encode", (ints(2, 4), None, OF_ENAT), {},
     "positions must have the shape [b=2, n=4], not NoneType"),
    (ENAT, "encode", (*WINDOW, floats(1, 2, 8, 16)), {}, MODULATION + "[1, 2, 8, 16]"),
    (ENAT, "encode", (*WINDOW, floats(3, 1, 8, 16)), {}, MODULATION + "[3, 1, 8, 16]"),
    (ENAT, "encode", (*WINDOW, floats(3, 2, 6, 16)), {}, MODULATION + "[3, 2, 6, 16]"),
    (ENAT, "encode", (*WINDOW, OF_ENAT, floats(1, 5, 16)), {},
     "cache must have the shape [b=2, p, d=16], not [1, 5, 16]"),
    (ENAT, "encode", (*WINDOW, OF_ENAT, CACHE), {"num_new": (3,)},
     "num_new must have the shape [b=2], not [3]"),
    (ENAT, "encode", (*WINDOW, OF_ENAT, CACHE), {"num_cached": (2, 1)},
     "num_cached must have the shape [b=2], not [2, 1]"),
    (ENAT, "decode", (ints(7), OF_ENAT, CACHE), {},
     "positions must have the shape [b, m], not [7]"),
    (ENAT, "decode", (MASKED, floats(2, 2, 8, 16), CACHE), {}, DECODED + "[2, 2, 8, 16]"),
    (ENAT, "decode", (MASKED, OF_ENAT, floats(2, 5, 8)), {},
     "cache must have the shape [b=2, p, d=16], not [2, 5, 8]"),
    (ENAT, "decode", (MASKED, OF_ENAT, None), {},
     "cache must have the shape [b=2, p, d=16], not NoneType"),
    (ENAT, "decode", (MASKED, OF_ENAT, CACHE), {"num_masked": (1,)},
     "num_masked must have the shape [b=2], not [1]"),
    (ENAT, "features", (MASKED, OF_ENAT, CACHE), {"num_visible": (1,)},
     "num_visible must have the shape [b=2], not [1]"),
    (NAT, "condition", (ints(),), {}, "labels must have the shape [b], not []"),
    (NAT, "encode", (ints(2, 4), ints(1, 4), None), {},
     "positions must have the shape [b=2, n=4], not [1, 4]"),
    (NAT, "decode", (MASKED, OF_ENAT, CACHE), {}, OF_NAT_S + "[3, 2, 8, 16]"),
    (NAT, "decode", (MASKED, OF_NAT, floats(2, 16)), {},
     "cache must have the shape [b=2, p, d=16], not [2, 16]"),
    (NAT, "features", (ints(2, 7, 1), OF_NAT, CACHE), {},
     "positions must have the shape [b, m], not [2, 7, 1]"),
    (CODEC, "encode", (floats(8, 8, 1),), {},
     "images must have the shape [b, H, W, c], not [8, 8, 1]"),
    (CODEC, "quantize", (floats(2, 4, 4, 3),), {},
     "z must have the shape [b, h, w, d=4], not [2, 4, 4, 3]"),
    (CODEC, "decode", (floats(2, 16, 4),), {},
     "codes must have the shape [b, h, w, d=4], not [2, 16, 4]"),
    (CODEC, "decode_codes", (ints(2, 16),), {}, "ids must have the shape [b, h, w], not [2, 16]"),
    (INCEPTION, None, (floats(2, 3, 299, 299),), {},
     "images must have the shape [b, h=299, w=299, c=3], not [2, 3, 299, 299]"),
    (CLASSIFIER, None, (floats(2, 8, 8, 3),), {},
     "images must have the shape [b, h, w, c=1], not [2, 8, 8, 3]"),
    (CLASSIFIER, lambda model, x: model.features(x), (floats(8, 8, 1),), {},
     "images must have the shape [b, h, w, c], not [8, 8, 1]"),
]  # fmt: skip


@pytest.mark.parametrize("model, method, args, counts, expected", RIGHT)
def test_right_shapes_pass(model, method, args, counts, expected):
    assert shape_of(model, method, *args, **counts) == expected


@pytest.mark.parametrize("model, method, args, counts, message", WRONG)
def test_a_wrong_shape_is_refused_in_a_sentence(model, method, args, counts, message):
    with pytest.raises(ValueError) as error:
        shape_of(model, method, *args, **counts)
    assert str(error.value) == message


def test_images_of_two_channels_are_no_images_for_inception():
    message = "images must have the shape [b, h, w, c=1 or 3], not [1, 4, 4, 2]"
    with pytest.raises(ValueError, match=re.escape(message)):
        inception.preprocess(jnp.zeros((1, 4, 4, 2)), "adm")


def test_what_has_no_shape_is_refused_by_its_type():
    with pytest.raises(ValueError, match=r"^labels must have the shape \[b\], not list$"):
        shapes.check("labels", [1, 2], b=None)


def test_sizes_may_be_symbolic():
    """As in a program that is exported for every batch size: equal symbols pass, others do not."""
    b, n = export.symbolic_shape("b, n")
    window = ints(b, n), ints(b, n)
    run = functools.partial(ENAT.apply, method="encode")
    encode = export.export(jax.jit(run))
    program = encode(variables(ENAT), *window, floats(3, b, 8, 16), floats(b, 5, 16))
    assert str(program.out_avals[0].shape) == "(b, n + 5, 16)"
    with pytest.raises(ValueError, match=re.escape("vectors=8, d=16], not [3, 2*b, 8, 16]")):
        encode(variables(ENAT), *window, floats(3, 2 * b, 8, 16))


def test_a_mapped_axis_is_no_axis_of_the_array():
    run = functools.partial(CLASSIFIER.apply)
    mapped = jax.vmap(run, in_axes=(None, 0))
    features, logits = jax.eval_shape(mapped, variables(CLASSIFIER), floats(5, 2, 8, 8, 1))
    assert features.shape == (5, 2, 1) and logits.shape == (5, 2, 2)
