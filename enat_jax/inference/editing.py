"""Editing: masks of pixels as masks of tokens, what the tokenizer sees, and the way back.

All of it is arithmetic on arrays of NumPy; ``generator.Generator.edit`` puts it around the sampler.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

SIDES = ("left", "right", "top", "bottom")
GREY = 128  # of a picture that is hidden as a whole
SMOOTHINGS = 60  # of hidden pixels, by means of 3x3


def checked_masks(
    masks: Bool[np.ndarray, "n h w"] | None, images: UInt8[np.ndarray, "n h w c"]
) -> Bool[np.ndarray, "n h w"]:
    """Returns the masks, or for None those that hide nothing.

    Raises:
        ValueError: they are not of bool, or of another shape than the images.
    """
    if masks is None:
        return np.zeros(images.shape[:3], bool)
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.shape != images.shape[:3]:
        raise ValueError(
            f"masks of {masks.dtype} {masks.shape} do not suit the images: need bool "
            f"{images.shape[:3]}, True where a pixel is to be changed"
        )
    return masks


def token_masks(
    masks: Bool[np.ndarray, "n h w"], grid: tuple[int, int], grow: int
) -> Bool[np.ndarray, "n l"]:
    """Returns which tokens are to be drawn, in raster order.

    Args:
        masks: True where a pixel is to be changed. A token is masked if any of its pixels is.
        grid: rows and columns of tokens.
        grow: tokens that a mask grows by on all sides: what lies beside a hidden pixel has been
            encoded together with it.

    Raises:
        ValueError: ``grow`` is no whole number of at least 0.
    """
    if isinstance(grow, bool) or not isinstance(grow, (int, np.integer)) or grow < 0:
        raise ValueError(f"{grow=} must be a whole number of tokens of at least 0")
    from scipy import ndimage  # late: who only draws images need not wait for it

    n, height, width = masks.shape
    rows, columns = grid
    cells = masks.reshape(n, rows, height // rows, columns, width // columns).any(axis=(2, 4))
    size = 2 * min(int(grow), max(grid)) + 1
    grown = ndimage.maximum_filter(cells.astype(np.uint8), (1, size, size), mode="constant")
    return grown.reshape(n, rows * columns).astype(bool)


def with_share_dropped(
    masked: Bool[np.ndarray, "n l"], keep: float, seed: int, index: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, "n l"]:
    """Returns masks that leave the share ``keep`` of the tokens that were not masked.

    Which ones is drawn at random for each image, a function of seed and ``index`` alone.

    Raises:
        ValueError: ``keep`` does not lie within 0 and 1.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"{keep=} must be a share of the tokens, a number from 0 to 1")
    masked = masked.copy()
    for row, number in zip(masked, index, strict=True):
        free = np.flatnonzero(~row)
        generator = np.random.Generator(np.random.Philox(key=[seed, int(number)]))
        row[generator.permutation(free)[round(keep * len(free)) :]] = True
    return masked


def neutralised(
    images: UInt8[np.ndarray, "n h w c"], masks: Bool[np.ndarray, "n h w"]
) -> UInt8[np.ndarray, "n h w c"]:
    """Returns images that continue their other pixels smoothly where the masks are True.

    What is hidden must not be seen, and what is kept should get the tokens that it has in the whole
    picture, as far as they can be known: each hidden pixel takes the value of the nearest kept one
    and is then smoothed. Of held-out digits with a hidden centre 66% of the kept tokens are those
    of the whole picture, and 54% if their mean colour is filled in, which costs 0.2 nats a hidden
    token. An image that is hidden as a whole becomes grey.
    """
    from scipy import ndimage

    images = images.copy()
    for image, mask in zip(images, masks, strict=True):
        if mask.all():
            image[:] = GREY
        elif mask.any():
            nearest = ndimage.distance_transform_edt(
                mask, return_distances=False, return_indices=True
            )
            smooth = image[tuple(nearest)].astype(np.float64)
            for _ in range(SMOOTHINGS):
                smooth[mask] = ndimage.uniform_filter(smooth, (3, 3, 1), mode="nearest")[mask]
            image[:] = np.rint(smooth).astype(np.uint8)
    return images


def blended(
    images: UInt8[np.ndarray, "n h w c"],
    filled: UInt8[np.ndarray, "n h w c"],
    masks: Bool[np.ndarray, "n h w"],
    seam: float,
) -> UInt8[np.ndarray, "n h w c"]:
    """Returns what was filled in where the masks are True, and elsewhere the original pixels.

    Args:
        images: the originals.
        filled: as the tokenizer gives them.
        masks: True where a pixel was to be changed.
        seam: pixels outside the mask over which the one fades into the other, 0 for none.
    """
    from scipy import ndimage

    out = images.copy()
    for image, new, mask in zip(out, filled, masks, strict=True):
        if mask.any():
            weight = np.clip(1 - ndimage.distance_transform_edt(~mask) / (seam + 1), 0, 1)[
                ..., None
            ]
            mixed: Float[np.ndarray, "h w c"] = weight * new + (1 - weight) * image
            image[:] = np.rint(mixed).astype(np.uint8)
    return out


def outpainted(
    image: UInt8[np.ndarray, "h w c"],
    mask: Bool[np.ndarray, "h w"],
    size: tuple[int, int],
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
) -> tuple[UInt8[np.ndarray, "h w c"], Bool[np.ndarray, "h w"]]:
    """Moves a picture so that there is room for new pixels on some sides.

    The picture keeps its scale. What has no room in the size of the model falls off: at the other
    end of a side that is extended, and at both ends in proportion where both are.

    Args:
        image: a picture that fills, together with the new pixels, at least ``size``.
        mask: True where a pixel is to be changed, besides the new ones.
        size: height and width in pixels of the result.
        left, right, top, bottom: pixels of new room on each side, at least 0.

    Returns:
        The picture, grey where it is new, and a mask that is True there, too.

    Raises:
        ValueError: the room is out of range, or the picture is too small.
    """
    cuts = []
    for name, whole, have, before, after in (
        ("wide", size[1], image.shape[1], left, right),
        ("high", size[0], image.shape[0], top, bottom),
    ):
        room = whole - before - after
        if min(before, after) < 0 or room < 1:
            raise ValueError(
                f"room of {before} and {after} new pixels leaves nothing of a picture that is to "
                f"be {whole} pixels {name}: take numbers of at least 0, together below {whole}"
            )
        spare = have - room
        if spare < 0 or (spare and not before + after):
            needed = f"exactly {room}" if not before + after else f"at least {room}"
            raise ValueError(f"is {have} pixels {name} and must be {needed}")
        start = spare * after // (before + after) if spare else 0
        cuts.append((slice(start, start + room), (before, after)))
    (columns, beside), (rows, above) = cuts
    moved = np.pad(image[rows, columns], (above, beside, (0, 0)), constant_values=GREY)
    return moved, np.pad(mask[rows, columns], (above, beside), constant_values=True)
