"""Decoding: every kind of picture, every kind of damage. Crops: literal pixels."""

import io
import math
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from enat_jax.data import decoding

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def filled(mode, colour, size=(8, 8)):
    return Image.new(mode, size, colour)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, kind, pixels, *others):
    """A PNG file written by hand: ``pixels`` are raw rows without their filter bytes."""
    row = len(pixels) // height
    raw = b"".join(b"\0" + pixels[i * row : (i + 1) * row] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *others, chunk(b"IDAT", zlib.compress(raw))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def palette(**options):
    image = filled("P", 1)
    image.putpalette([9, 9, 9, *RED])
    return encode(image, **options)


def animation(kind, **options):
    frames = [filled("RGB", RED), filled("RGB", WHITE)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


KINDS = {
    "grey": (encode(filled("L", 100)), (100, 100, 100)),
    "grey, alpha 0": (encode(filled("LA", (100, 0))), WHITE),
    "grey, opaque": (encode(filled("LA", (100, 255))), (100, 100, 100)),
    "palette": (palette(), RED),
    "palette, transparent": (palette(transparency=1), WHITE),
    "palette, half transparent": (palette(transparency=bytes([255, 128])), (255, 127, 127)),
    "1 bit": (encode(filled("1", 1)), WHITE),
    "16 bits grey": (png(1, 1, 16, 0, b"\x80\x80"), (128, 128, 128)),
    "16 bits grey, black": (png(1, 1, 16, 0, b"\0\xff"), (0, 0, 0)),
    "16 bits grey, transparent": (png(1, 1, 16, 0, b"\0\1", chunk(b"tRNS", b"\0\1")), WHITE),
    "16 bits RGB": (png(1, 1, 16, 2, b"\xff\xff\0\0\x80\x80"), (255, 0, 128)),
    "16 bits RGBA": (png(1, 1, 16, 6, b"\xff\xff\0\0\0\0\0\0"), WHITE),
    "RGB, one colour transparent": (
        png(1, 1, 8, 2, b"\1\2\3", chunk(b"tRNS", b"\0\1\0\2\0\3")),
        WHITE,
    ),
    "RGBA": (encode(filled("RGBA", (*RED, 128))), (255, 127, 127)),
    "JPEG": (encode(filled("RGB", RED), "JPEG", quality=95), (254, 0, 0)),
    "JPEG, grey": (encode(filled("L", 100), "JPEG", quality=95), (100, 100, 100)),
    "JPEG, progressive": (encode(filled("RGB", RED), "JPEG", progressive=True), (254, 0, 0)),
    "JPEG, CMYK of Adobe": (encode(filled("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), RED),
    "WebP": (encode(filled("RGB", RED), "WEBP", lossless=True), RED),
    "WebP, transparent": (encode(filled("RGBA", (*RED, 0)), "WEBP", lossless=True), WHITE),
    "WebP, animation": (animation("WEBP", lossless=True), RED),
    "GIF": (encode(filled("RGB", RED), "GIF"), RED),
    "GIF, animation": (animation("GIF"), RED),
    "BMP": (encode(filled("RGB", RED), "BMP"), RED),
    "TIFF": (encode(filled("RGB", RED), "TIFF"), RED),
    "TIFF, packed": (encode(filled("RGB", RED), "TIFF", compression="tiff_lzw"), RED),
    "TIFF, JPEG within": (encode(filled("RGB", RED), "TIFF", compression="jpeg"), (254, 0, 0)),
    "TIFF, large": (encode(filled("RGB", RED), "TIFF", big_tiff=True), RED),
    "TIFF, fax": (encode(filled("1", 1), "TIFF", compression="group4"), WHITE),
    "TIFF, CMYK": (encode(filled("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "TIFF, 16 bits": (
        encode(Image.fromarray(np.full((1, 1), 0x8000, np.uint16)), "TIFF"),
        (128,) * 3,
    ),
    "TIFF, transparent": (encode(filled("RGBA", (*RED, 0)), "TIFF"), WHITE),
    "TIFF, several": (animation("TIFF"), RED),
    "TIFF, palette": (palette(kind="TIFF"), RED),
}
if "AVIF" in decoding.FORMATS:
    KINDS |= {
        "AVIF": (encode(filled("RGB", RED), "AVIF", quality=100), RED),
        "AVIF, transparent": (encode(filled("RGBA", (*RED, 0)), "AVIF", quality=100), WHITE),
        "AVIF, animation": (animation("AVIF", quality=100), RED),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read(kind):
    data, colour = KINDS[kind]
    image = decoding.decode(data)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0, 0], colour, atol=2)
    grey = decoding.decode(data, channels=1)
    assert grey.mode == "L"
    np.testing.assert_allclose(
        np.asarray(grey)[0, 0], np.dot(colour, (0.299, 0.587, 0.114)), atol=2
    )


def test_grey_stays_exactly_what_it_was():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for channels in (1, 3):
        image = np.asarray(decoding.decode(encode(Image.fromarray(values)), channels))
        np.testing.assert_array_equal(image.reshape(16, 16, -1)[..., 0], values)


def test_a_colour_profile_changes_nothing():
    data = encode(filled("RGB", (10, 200, 30)), icc_profile=b"no profile that anybody could apply")
    assert decoding.decode(data).getpixel((0, 0)) == (10, 200, 30)


def exif_of(orientation, order):
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    other = struct.pack(f"{order}HHIHH", 0x0100, 3, 1, 7, 0)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IH", 8, 2) + other + entry + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
        (9, [[1, 2, 3], [4, 5, 6]]),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_pictures_are_turned_upright(orientation, upright, order):
    values = np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40
    exif = exif_of(orientation, order)
    data = encode(Image.fromarray(values), exif=exif)
    np.testing.assert_array_equal(np.asarray(decoding.decode(data, 1)) // 40, upright)
    rgb = Image.fromarray(np.repeat(values[..., None], 3, 2))
    webp = encode(rgb, "WEBP", lossless=True, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(np.asarray(decoding.decode(webp, 1)) // 40, upright)
    large = Image.fromarray(np.kron(values, np.ones((8, 8), np.uint8)))
    jpeg = encode(large, "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    turned = np.asarray(decoding.decode(jpeg, 1))[4::8, 4::8]
    np.testing.assert_array_equal(np.rint(turned / 40), upright)


BAD_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff\x1a\x01"


@pytest.mark.parametrize("exif", [BAD_EXIF, BAD_EXIF[:11], b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\xff"])
def test_damaged_exif_data_do_no_harm_and_make_no_noise(exif):
    """Warnings are errors here, and Pillow warns of such data when it opens a JPEG file."""
    jpeg = encode(filled("RGB", RED, (8, 4)), "JPEG", quality=95)
    head = b"\xff\xd8\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif
    without_jfif = jpeg[2 + 2 + int.from_bytes(jpeg[4:6]) :]
    assert decoding.decode(head + without_jfif).size == (8, 4)
    assert decoding.decode(encode(filled("RGB", RED, (8, 4)), exif=exif)).size == (8, 4)


def test_a_jpeg_of_several_pictures_is_its_first():
    others = [filled("RGB", WHITE)]
    several = encode(filled("RGB", RED), "MPO", save_all=True, append_images=others, quality=95)
    np.testing.assert_allclose(decoding.decode(several).getpixel((0, 0)), RED, atol=2)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
JPEG, PNG = encode(NOISE, "JPEG"), encode(NOISE)


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


UNREADABLE = {
    "nothing": (b"", "empty"),
    "text": (b"I am a JPEG file, honestly", "not a JPEG, PNG"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "a JPEG without its last bytes": (JPEG[:-40], "truncated"),
    "the start of a JPEG": (JPEG[:3], "not a JPEG|truncated"),
    "a JPEG's header": (JPEG[:100], "not a JPEG|truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated|damaged"),
    "a PNG without its end": (PNG[:-12], "truncated|damaged"),
    "a wrong checksum of a PNG's header": (flipped(PNG, 30), "damaged"),
    "a wrong checksum of a PNG's pixels": (flipped(PNG, len(PNG) - 13), "damaged"),
    "changed pixels in a PNG": (flipped(PNG, len(PNG) // 2), "damaged"),
    "half a GIF": (encode(NOISE, "GIF")[:2000], "truncated|damaged"),
    "half a WebP": (encode(NOISE, "WEBP")[:1000], "not a|damaged|truncated"),
    "half a BMP": (encode(NOISE, "BMP")[:4000], "truncated"),
    "half a TIFF": (encode(NOISE, "TIFF")[:4000], "truncated"),
    "the start of a TIFF": (encode(NOISE, "TIFF")[:6], "truncated"),
    "half a TIFF, packed": (
        encode(NOISE, "TIFF", compression="tiff_lzw")[:4000],
        "truncated|damaged",
    ),
    "a TIFF of fractions": (encode(filled("F", 0.5), "TIFF"), "kind F"),
    "a JPEG 2000": (encode(NOISE, "JPEG2000"), "not a JPEG, PNG, WebP"),
    "an EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG"),
    "a bomb": (bomb(60_000, 60_000), "pixels"),
    "no pixels": (bomb(0, 0), "not a|damaged|truncated"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_picture_says_why(kind):
    data, words = UNREADABLE[kind]
    with pytest.raises(ValueError, match=words):
        decoding.decode(data)


def test_no_damage_is_anything_but_a_value_error():
    rng = np.random.default_rng(0)
    whole = [encode(NOISE, kind) for kind in decoding.FORMATS]
    outcomes = set()
    for data in whole * 60:
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, min(len(data), rng.choice([64, 600, len(data)])), 4)
        damaged[places] = rng.integers(0, 256, 4)
        try:
            decoding.center_crop(decoding.decode(damaged.tobytes()), 16)
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_the_limit_of_pixels_is_our_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="60000 x 60000 pixels, more than 89,478,485"):
        decoding.decode(bomb(60_000, 60_000))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 64)
    assert decoding.decode(PNG).size == (64, 64)
    with pytest.raises(ValueError, match="65 x 64"):
        decoding.decode(encode(filled("L", 0, (65, 64))))


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_what_would_become_too_large_is_refused(size):
    image = Image.new("L", size)
    with pytest.raises(ValueError, match="elongated"):
        decoding.center_crop(image, 256)
    with pytest.raises(ValueError, match="elongated"):
        decoding.random_resized_crop(image, 256, (0.8, 1.0), (0.75, 1.33), np.random.default_rng())
    assert decoding.center_crop(image, 32).shape == (32, 32, 1)


@pytest.mark.parametrize(
    ("rows", "size", "cut"),
    [
        ([[7]], 1, [[7]]),
        ([[7]], 3, [[7] * 3] * 3),
        ([[1, 2, 3, 4]], 1, [[2]]),  # of an odd excess, the smaller part is cut off first
        ([[1, 2, 3, 4, 5]], 1, [[3]]),
        ([[1], [2], [3], [4]], 1, [[2]]),
        ([[10, 20, 50, 70], [30, 40, 60, 80]], 2, [[20, 50], [40, 60]]),
        ([[0, 100], [100, 200]], 1, [[100]]),  # one halving: the mean of four
        ([[0, 8, 100, 108], [4, 12, 104, 112]], 1, [[6]]),
        (np.arange(16).reshape(4, 4) * 10, 2, [[25, 45], [105, 125]]),
        (np.arange(16).reshape(4, 4) * 10, 1, [[75]]),  # two halvings
    ],
)
def test_the_centre_is_cut_out(rows, size, cut):
    image = Image.fromarray(np.array(rows, np.uint8))
    np.testing.assert_array_equal(decoding.center_crop(image, size)[..., 0], cut)


def centre_by_pillow(image, size):
    """The same by another road: the sizes are laid out first, and Pillow cuts."""
    width, height = image.size
    halvings = max(0, int(math.log2(min(width, height) / size)))
    for k in range(1, halvings + 1):
        image = image.resize((width >> k, height >> k), Image.Resampling.BOX)
    width, height = image.size
    factor = size / (width if width < height else height)
    target = [int(np.rint(side * factor)) for side in (width, height)]
    image = image.resize(target, resample=Image.Resampling.BICUBIC)
    left, upper = [math.floor((side - size) / 2) for side in target]
    return np.asarray(image.crop((left, upper, left + size, upper + size)))


@pytest.mark.parametrize("size", [1, 7, 32, 33])
def test_the_centre_is_the_published_one(size):
    rng = np.random.default_rng(size)
    sides = [1, 2, 5, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 200]
    for width in sides:
        for height in sides:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            cut = decoding.center_crop(image, size)
            assert cut.shape == (size, size, 3) and cut.dtype == np.uint8
            np.testing.assert_array_equal(cut, centre_by_pillow(image, size))


def test_random_boxes_have_the_area_and_the_shape_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [decoding._random_box(1000, 1000, (0.2, 0.45), (0.5, 2.0), rng) for _ in range(2000)]
    )
    assert boxes.min() >= 0 and boxes.max() <= 1000  # all of them fit, so none is drawn again
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 1e6, np.log2(width / height)
    np.testing.assert_allclose(np.quantile(area, [0, 0.5, 1]), [0.2, 0.325, 0.45], atol=0.01)
    quarters = np.quantile(ratio, [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(quarters, [-1, -0.5, 0.5, 1], atol=0.07)
    np.testing.assert_allclose(np.mean(boxes[:, 0] / (1000 - width)), 0.5, atol=0.03)
    np.testing.assert_allclose(np.mean(boxes[:, 1] / (1000 - height)), 0.5, atol=0.03)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 10), (44, 0, 55, 10)),  # the widest allowed, 11 x 10
        ((10, 100), (0, 44, 10, 55)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_box_fits_it_is_the_centre(size, box):
    rng = np.random.default_rng(0)
    assert decoding._random_box(*size, (0.95, 1.0), (0.9, 1.1), rng) == box


def test_a_crop_of_everything_is_a_resize():
    whole = decoding.random_resized_crop(NOISE, 24, (1, 1), (1, 1), np.random.default_rng(0))
    np.testing.assert_array_equal(whole, NOISE.resize((24, 24), Image.Resampling.BICUBIC))


def test_the_seed_alone_decides_the_augmentation():
    framing = decoding.Framing(16)
    crops = [framing.pixels(PNG, seed) for seed in range(8)]
    assert len({crop.tobytes() for crop in crops}) == 8
    np.testing.assert_array_equal(framing.pixels(PNG, np.int64(3)), crops[3])
    plain = decoding.center_crop(decoding.decode(PNG), 16)
    np.testing.assert_array_equal(framing.pixels(PNG), plain)


@pytest.mark.parametrize("sides", [(40, 31), (31, 40), (17, 90), (24, 24), (9, 8)])
def test_the_square_crop_is_u_vit_s(sides):
    """Its own arithmetic on an array, height first."""
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (*sides, 3), np.uint8))
    height, width = sides
    crop = min(sides)
    square = np.asarray(image)[
        (height - crop) // 2 : (height + crop) // 2, (width - crop) // 2 : (width + crop) // 2
    ]
    expected = Image.fromarray(square).resize((24, 24), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG")
    framing = decoding.Framing(24, crop="square-lanczos")
    np.testing.assert_array_equal(framing.pixels(data.getvalue()), expected)
    assert framing.identity()["plain_crop"] == "centre square, then Lanczos (U-ViT)"
    plain = decoding.Framing(24)
    assert plain.identity().keys() == framing.identity().keys() and "crop" not in plain.identity()


def test_half_of_the_pictures_are_mirrored():
    whole = {"crop_area": [1, 1], "crop_ratio": (1, 1)}
    framing = decoding.Framing(64, **whole)
    original = np.asarray(NOISE)
    mirrored = 0
    for seed in range(200):
        cut = framing.pixels(PNG, seed)
        mirrored += (cut == original[:, ::-1]).all()
        assert (cut == original).all() or (cut == original[:, ::-1]).all()
    assert 80 < mirrored < 120
    never = decoding.Framing(64, flip=False, **whole)
    assert all((never.pixels(PNG, seed) == original).all() for seed in range(20))


@pytest.mark.parametrize(
    "setting",
    [
        *[{"size": 0}, {"size": 2.5}, {"size": True}, {"channels": 4}, {"flip": "no"}],
        {"crop": "middle"},
        *[{"crop_area": v} for v in (0.5, (0, 1), (0.9, 0.8), (0.5, 1.1), ("a", "b"))],
        *[{"crop_ratio": v} for v in ((1, 2, 3), (0, 1), (2, 1), (1, math.inf), (1, math.nan))],
    ],
)
def test_a_setting_out_of_range_is_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        decoding.Framing(**{"size": 8, **setting})


def example(index, seed):
    return decoding.Example(
        np.full((2, 2, 1), index + (seed or 0), np.uint8), index % 3, str(index)
    )


def test_a_batch_keeps_its_order():
    batch = decoding.gather(example, (2, 2, 1), range(50), range(100, 150))
    assert batch["images"].dtype == np.uint8 and batch["labels"].dtype == np.int32
    assert batch["images"][:, 0, 0, 0].tolist() == list(range(100, 200, 2))
    assert batch["labels"].tolist() == [i % 3 for i in range(50)]
    assert decoding.gather(example, (2, 2, 1), [])["images"].shape == (0, 2, 2, 1)


def test_a_batch_is_read_in_threads(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    meeting = threading.Barrier(2, timeout=10)  # nobody passes it alone

    def load(index, seed):
        meeting.wait()
        return example(index, seed)

    assert decoding.gather(load, (2, 2, 1), [4, 5])["labels"].tolist() == [1, 2]


def test_a_batch_names_the_picture_that_cannot_be_read():
    def load(index, seed):
        if index >= 3:
            raise decoding.UnreadableImage(f"{index}.jpg", "is empty")
        return example(index, seed)

    with pytest.raises(decoding.UnreadableImage, match="3.jpg: is empty; remove") as caught:
        decoding.gather(load, (2, 2, 1), range(20))
    assert caught.value.key == "3.jpg"
    with pytest.raises(ValueError, match="2 indices, but 1 seeds"):
        decoding.gather(example, (2, 2, 1), [1, 2], [3])


def test_an_unreadable_picture_can_be_reported_by_a_worker():
    error = pickle.loads(pickle.dumps(decoding.UnreadableImage("a.jpg", "is empty")))
    assert (str(error), error.key, error.reason) == ("a.jpg: is empty", "a.jpg", "is empty")
