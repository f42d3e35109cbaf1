"""Tokens are exchanged for near ones, of each image by its number."""

import numpy as np
import pytest
import tiny

from enat_jax.inference import near_tokens


@pytest.fixture(scope="module")
def codec():
    return tiny.make_tokenizer()


def test_a_share_of_tokens_becomes_near_ones(codec):
    table = np.asarray(codec.code_table)
    distances = np.square(table[:, None] - table).sum(-1)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :3]
    tokens = np.random.default_rng(0).integers(tiny.CODES, size=(40, 64), dtype=np.int32)
    swap = near_tokens.NearTokens.of(codec, "0.25:3")
    found = swap(tokens, 7)
    changed = found != tokens
    assert found.dtype == np.int32 and abs(changed.mean() - 0.25) < 0.03
    ranks = [
        list(nearest[a]).index(b) for a, b in zip(tokens[changed], found[changed], strict=True)
    ]
    assert set(ranks) == {0, 1, 2}
    # However images are cut into batches.
    np.testing.assert_array_equal(swap(tokens[5:9], 12), found[5:9])
    assert (near_tokens.NearTokens(codec, 1.0, tiny.CODES - 1)(tokens, 0) != tokens).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5", "SHARE:NEAREST"),
        ("half:3", "SHARE:NEAREST"),
        ("0:3", r"must lie in \(0, 1\]"),
        ("nan:3", r"must lie in \(0, 1\]"),
        ("0.5:8", "choose 1 to 7 of the 8"),
        ("0.5:0", "choose 1 to 7 of the 8"),
    ],
)
def test_what_cannot_be_exchanged(codec, text, message):
    with pytest.raises(ValueError, match=message):
        near_tokens.NearTokens.of(codec, text)
