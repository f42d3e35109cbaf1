"""A state dict either fits the model in every tensor or is refused with everything said at once."""

import chex
import jax
import numpy as np
import pytest

from enat_jax import conversion

TABLE = {
    r"head\.weight": ("head/kernel", conversion.DENSE),
    r"head\.bias": ("head/bias", conversion.COPY),
    r"blocks\.(\d+)\.fc\.weight": (
        # Two blocks make the encoder, the rest the decoder.
        lambda m: f"encoder/fc[{m[1]}]" if int(m[1]) < 2 else f"decoder/fc[{int(m[1]) - 2}]",
        conversion.DENSE,
    ),
    r"unused\..*": (None, conversion.COPY),
}
TARGET = {
    "head": {"kernel": (3, 5), "bias": (5,)},
    "encoder": {"fc": (2, 3, 4)},
    "decoder": {"fc": (1, 3, 4)},
}
TARGET = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, np.float32), TARGET, is_leaf=lambda s: isinstance(s, tuple)
)


@pytest.fixture
def state_dict():
    rng = np.random.default_rng(0)
    shapes = {"head.weight": (5, 3), "head.bias": (5,), "unused.x": (7,)}
    shapes |= {f"blocks.{i}.fc.weight": (4, 3) for i in range(3)}
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def test_layers_are_stacked_and_layouts_changed(state_dict):
    params = conversion.convert(state_dict, TABLE, TARGET)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, TARGET)
    np.testing.assert_array_equal(params["head"]["kernel"], state_dict["head.weight"].T)
    np.testing.assert_array_equal(params["encoder"]["fc"][1], state_dict["blocks.1.fc.weight"].T)
    np.testing.assert_array_equal(params["decoder"]["fc"][0], state_dict["blocks.2.fc.weight"].T)


def test_and_back_again(state_dict):
    params = conversion.convert(state_dict, TABLE, TARGET)
    del state_dict["unused.x"]
    chex.assert_trees_all_equal(conversion.revert(params, TABLE, state_dict), state_dict)
    with pytest.raises(ValueError, match="unused.x.*drops"):
        conversion.revert(params, TABLE, ["unused.x"])


def test_a_convolution_keeps_its_taps():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, height, width
    ours = conversion.CONV.forward(kernel)
    assert ours.shape == (4, 5, 3, 2)
    assert ours[1, 2, 0, 1] == kernel[1, 0, 1, 2]
    np.testing.assert_array_equal(conversion.CONV.inverse(ours), kernel)


def test_a_leftover_tensor_is_an_error(state_dict):
    state_dict["surprise"] = np.zeros(1)
    with pytest.raises(ValueError, match="surprise: unknown"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_leftover_parameter_is_an_error(state_dict):
    del state_dict["head.bias"]
    with pytest.raises(ValueError, match="head/bias: nothing"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_missing_layer_is_named(state_dict):
    del state_dict["blocks.1.fc.weight"]
    with pytest.raises(ValueError, match=r"encoder/fc: layers \[1\] of 2 are missing"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_layer_too_many_is_an_error(state_dict):
    state_dict["blocks.3.fc.weight"] = state_dict["blocks.2.fc.weight"]
    with pytest.raises(ValueError, match="layer 1 of decoder/fc, which has 1"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_wrong_shape_is_an_error(state_dict):
    state_dict["head.weight"] = np.zeros((5, 4))
    with pytest.raises(ValueError, match=r"head.weight: .*\(4, 5\).*\(3, 5\)") as error:
        conversion.convert(state_dict, TABLE, TARGET)
    assert "nothing in the state dict" not in str(error.value)


def test_two_tensors_for_one_place_are_an_error(state_dict):
    table = TABLE | {r"twin": ("head/bias", conversion.COPY)}
    state_dict["twin"] = state_dict["head.bias"]
    with pytest.raises(ValueError, match="twin: leads to head/bias, which is taken"):
        conversion.convert(state_dict, table, TARGET)


def test_a_tensor_that_two_patterns_match_is_an_error(state_dict):
    table = TABLE | {r"head\..*": ("head/bias", conversion.COPY)}
    with pytest.raises(ValueError, match="ambiguous"):
        conversion.convert(state_dict, table, TARGET)


def test_all_errors_are_said_at_once(state_dict):
    state_dict["surprise"] = np.zeros(1)
    state_dict["head.weight"] = np.zeros((5, 4))
    del state_dict["head.bias"]
    del state_dict["blocks.0.fc.weight"]
    with pytest.raises(ValueError) as error:
        conversion.convert(state_dict, TABLE, TARGET)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4
    for word in ("surprise", "head.weight", "head/bias", "encoder/fc"):
        assert any(word in line for line in lines)
