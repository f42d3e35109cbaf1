"""Multiply-adds of products and convolutions are counted, and what tiles add to them."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
import tpu_text

from enat_jax.profiling import hlo_products, hlo_text
from enat_jax.schedules import costs


def compiled(function, *shapes):
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return hlo_text.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_of_a_compiled_function():
    def layers(x, kernels):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return jnp.einsum("bnd,bmd->bnm", x, x).sum()

    shapes = (2, 16, 32), (5, 32, 32)
    exact = 5 * (2 * 16 * 32 * 32) + 2 * 16 * 16 * 32
    assert hlo_products.multiply_adds(compiled(layers, *shapes)) == exact
    gradient = compiled(jax.grad(layers, argnums=1), *shapes)
    assert hlo_products.multiply_adds(gradient) > 2.5 * exact


def program(shapes, layouts, line):
    left, right, out = (f"f32[{s}]{{{x}}}" for s, x in zip(shapes, layouts, strict=True))
    return hlo_text.parse(
        f"HloModule one\n\nENTRY %main (a: f32[1]) -> {out} {{\n"
        f"  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %r = {out} {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("sizes", "window", "labels", "product"),
    [  # As the compiler of TPUs writes products of several dimensions.
        (("22,16,64", "1,64,48", "22,16,48"), "size=1", "0bf_0io->0bf", (1, 352, 64, 48)),
        # Keys and values at once.
        (
            ("9,16,64,1", "1,2,64,48", "9,16,48,2"),
            "size=1x2 pad=0_0x1_1 rhs_reversal=0x1",
            "0bf1_01io->0bf1",
            (1, 144, 64, 96),
        ),
        (("16,4,64", "4,64,48", "1,16,48"), "size=4", "b0f_0io->0bf", (1, 16, 256, 48)),
    ],
)
def test_dimensions_of_a_window_are_parts_of_a_product(sizes, window, labels, product):
    line = f"convolution(%a, %b), window={{{window}}}, dim_labels={labels}"
    ((_, found, _),) = hlo_products._products(program(sizes, ("", "", ""), line))
    assert (found.times, found.rows, found.inner, found.columns) == product


def test_windows_that_meet_more_padding_than_pictures_have_count_less():
    found = compiled(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2, 1), ((2, 2), (0, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        *((2, 6, 5, 3), (3, 3, 3, 4)),
    )
    rows, columns = 1 + 3 + 3 + 2, 5 * 3  # pairs of an output and a place of its window
    assert hlo_products.multiply_adds(found) == 2 * rows * columns * 3 * 4


def test_a_tokenizer_counts_as_its_costs_do():
    codes = jnp.zeros((2, 4, 4), jnp.int32)
    decode = functools.partial(tiny.CODEC.apply, method="decode_codes")
    variables = jax.eval_shape(tiny.CODEC.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    module = hlo_text.parse(jax.jit(decode).lower(variables, codes).compile().as_text())
    exact = 2 * costs.image_decoder_cost(tiny.CODEC, 4, 4)
    assert hlo_products.multiply_adds(module) == exact


def test_a_product_of_a_row_that_has_become_a_sum():
    text = (
        "HloModule one\n\n%add {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
        "  ROOT %s = f32[] add(%x, %y)\n}\n\nENTRY %main {\n  %a = bf16[16,128] parameter(0)\n"
        "  %m = bf16[16,128] multiply(%a, %a)\n  %f = f32[16,128] convert(%m)\n"
        "  %c = f32[] constant(0)\n  ROOT %r = f32[128] reduce(%f, %c), dimensions={0}, "
        'to_apply=%add, metadata={op_name="jit(f)/NAME"}\n}\n'
    )
    found = hlo_text.parse(text.replace("NAME", "dot_general"))
    assert hlo_products.multiply_adds(found) == 16 * 128 and hlo_products.padding(found) == 0
    assert hlo_products.multiply_adds(hlo_text.parse(text.replace("NAME", "reduce_sum"))) == 0


def test_batched_products_that_are_dilated_convolutions():
    # Of 16 pictures, in each of 4 heads: queries [101, 16] with keys [63, 16].
    module = program(
        ("16,4,101,16", "16,4,63,16", "16,4,101,63"),
        ("3,2,1,0:T(8,128)", "3,2,1,0:T(8,128)", "3,2,1,0:T(8,128)"),
        "convolution(%a, %b), window={size=16x4 stride=15x3 lhs_dilate=16x4}, "
        "dim_labels=01bf_01oi->01bf",
    )
    assert hlo_products.multiply_adds(module) == 16 * 4 * 101 * 63 * 16
    grown = 128 / 101 * 64 / 63 * 128 / 16  # 128 x 64 is less than 104 x 128
    assert hlo_products.padding(module) == pytest.approx(1 - 1 / grown)


@pytest.mark.parametrize(
    ("shape", "layout", "padded"),
    [
        ((100, 96), "1,0:T(8,128)(2,1)S(1)", (104, 128)),
        ((100, 96), "0,1:T(8,128)", (128, 96)),
        ((3, 2, 366), "2,0,1:T(4,128)", (4, 2, 384)),
        ((700,), "0:T(1024)", (1024,)),
        ((100, 96), "1,0", (100, 96)),
        ((), ":T(128)", ()),
    ],
)
def test_sizes_in_memory(shape, layout, padded):
    assert hlo_products.padded_shape(shape, layout) == padded


def test_heads_of_96_channels_cost_as_much_as_heads_of_128():
    module = tpu_text.module()
    assert hlo_products.multiply_adds(module) == 5 * 100 * 96 * 256
    grown = 104 / 100 * 128 / 96
    assert hlo_products.padding(module) == pytest.approx(1 - 1 / grown)
    found = hlo_products.padding_by_place(module)
    needed, padded = found["mlp/up"]
    assert padded / needed == pytest.approx(grown) and set(found) == {"", "mlp/up"}


def test_products_that_fill_tiles_and_programs_without_products():
    assert hlo_products.padding(compiled(jnp.dot, (8, 128), (128, 256))) == 0
    assert hlo_products.padding(compiled(jnp.sin, (3, 5))) == 0
    with pytest.raises(ValueError, match="dimensions of the convolution r cannot be read"):
        hlo_products.multiply_adds(program(("1", "1", "1"), ("", "", ""), "convolution(%a, %b)"))
