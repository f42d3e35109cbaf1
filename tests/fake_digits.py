"""Made-up digits of two classes, and stand-ins for a tokenizer and a model of them."""

import numpy as np
import tiny

GRID = 8
CODES = 16


class Tokenizer:
    """One token for each 4x4 block: its brightness in 16 levels."""

    fingerprint = "levels of brightness"

    def encode(self, pictures):
        blocks = np.asarray(pictures).reshape(-1, GRID, 4, GRID, 4).mean(axis=(2, 4))
        return (blocks // 16).astype(np.int32).reshape(-1, GRID * GRID)

    def decode(self, token_ids):
        levels = (np.asarray(token_ids) * 16 + 8).astype(np.uint8).reshape(-1, GRID, GRID)
        return levels.repeat(4, axis=1).repeat(4, axis=2)[..., None]


class Model:
    """Draws images as it is told, and predicts tokens better the more it sees."""

    fingerprint = "as it is told"
    tokenizer = Tokenizer()
    class_names = ("0", "1")

    def __init__(self, draw):
        self.draw = draw

    def sample(self, labels, seed=0):
        return self.draw(np.asarray(labels), np.random.default_rng(seed + 100))

    def masked_scores(self, token_ids, labels, num_visible, seed):
        assert token_ids.shape == (len(labels), GRID * GRID)
        rng = np.random.default_rng([seed, num_visible])
        scores = rng.uniform(size=(len(labels), GRID * GRID - num_visible))
        return 2 - scores - num_visible / 64, scores < 0.4 + num_visible / 256


def real(labels, rng):
    """Class 0 is a bar from left to right, class 1 from top to bottom; the bar's place varies.

    All its pixels move together, which independent tokens cannot imitate.
    """
    pictures = np.zeros((len(labels), 32, 32, 1), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        at = 4 * int(rng.integers(1, 6))
        bar = (slice(at, at + 4), slice(None)) if label == 0 else (slice(None), slice(at, at + 4))
        picture[bar] = rng.integers(150, 250)
    noise = rng.integers(0, 20, pictures.shape)
    return (pictures // 2 + noise).astype(np.uint8)


def encoded(digits):
    return tiny.token_set(
        Tokenizer().encode(digits[0]),
        digits[1],
        codebook_size=CODES,
        class_names=("0", "1"),
        tokenizer=Tokenizer.fingerprint,
    )


def make():
    """Training digits, held-out digits, each with labels, and the training tokens."""
    rng = np.random.default_rng(0)
    training_labels, held_out_labels = np.arange(300) % 2, np.arange(100) % 2
    training = real(training_labels, rng), training_labels
    held_out = real(held_out_labels, rng), held_out_labels
    token_set = encoded(training)
    return training, held_out, token_set
