"""Metadata of every kind and damage, which must change no pixel and stop nobody."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from enat_jax.data import decoding, metadata

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
AVIF = pytest.mark.skipif("AVIF" not in decoding.FORMATS, reason="this Pillow reads no AVIF")


def encode(kind="PNG", image=NOISE, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data, crc=0):
    return struct.pack(">I", len(data)) + name + data + (zlib.crc32(name + data) ^ crc).to_bytes(4)


def png(*chunks, before_pixels=True):
    whole = encode()
    place = 8 + 25 if before_pixels else len(whole) - 12
    return whole[:place] + b"".join(chunks) + whole[place:]


def segment(marker, data):
    return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2) + data


JPEG = encode("JPEG", quality=95)
BARE = JPEG[:2] + JPEG[4 + int.from_bytes(JPEG[4:6]) :]  # without JFIF


def jpeg(*segments):
    return BARE[:2] + b"".join(segments) + BARE[2:]


def riff(*chunks, flags=0):
    """A WebP file of the extended form, with other chunks behind its pixels."""
    header = struct.pack("<4sIB3x", b"VP8X", 10, flags) + b"\5\0\0" + b"\3\0\0"
    content = b"WEBP" + header + WEBP[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def riff_chunk(name, data):
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


WEBP = encode("WEBP", lossless=True)
GIF = encode("GIF")
GIF_BODY = 13 + (3 << (GIF[10] & 7) + 1)


def gif(*blocks):
    return GIF[:GIF_BODY] + b"".join(blocks) + GIF[GIF_BODY:]


def blocks(data):
    parts = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


TIFF = encode("TIFF")


def tiff(*entries, following=0):
    """A TIFF file with more entries in its directory, (tag, type, count, value)."""
    (start,) = struct.unpack_from("<I", TIFF, 4)
    (number,) = struct.unpack_from("<H", TIFF, start)
    own = [TIFF[start + 2 + 12 * i :][:12] for i in range(number)]
    own = sorted([*own, *(struct.pack("<HHII", *entry) for entry in entries)])
    directory = struct.pack("<H", len(own)) + b"".join(own)
    place = len(TIFF) + len(TIFF) % 2
    following = place if following == "itself" else following
    data = TIFF[:4] + struct.pack("<I", place) + TIFF[8:] + bytes(len(TIFF) % 2)
    return data + directory + struct.pack("<I", following)


MUCH = zlib.compress(bytes(3_000_000))
BAD_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff\x1a\x01"

HARMLESS = {
    "PNG": {
        "much text": png(chunk(b"zTXt", b"workflow\0\0" + MUCH)),
        "much text of the world": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MUCH)),
        "much text in all": png(*[chunk(b"zTXt", b"a%d\0\0" % i + MUCH) for i in range(30)]),
        "much text behind the pixels": png(chunk(b"zTXt", b"w\0\0" + MUCH), before_pixels=False),
        "text that is not compressed": png(chunk(b"zTXt", b"workflow\0\0nothing")),
        "text of an unknown method": png(chunk(b"zTXt", b"workflow\0\7" + MUCH)),
        "text with a wrong checksum": png(chunk(b"tEXt", b"a\0b", crc=1)),
        "a profile that is none": png(chunk(b"iCCP", b"name\0\0nothing")),
        "a profile of an unknown method": png(chunk(b"iCCP", b"name\0\7" + MUCH)),
        "a large profile": png(chunk(b"iCCP", b"name\0\0" + MUCH)),
        "damaged EXIF": png(chunk(b"eXIf", BAD_EXIF[6:])),
        "EXIF with a wrong checksum": png(chunk(b"eXIf", b"MM\0*", crc=1)),
        "short values": png(*[chunk(x, b"\1") for x in (b"gAMA", b"cHRM", b"pHYs", b"sRGB")]),
        "no values": png(*[chunk(x, b"") for x in (b"gAMA", b"cHRM", b"pHYs", b"sRGB")]),
        "an animation without frames": png(chunk(b"acTL", bytes(8))),
        "a short frame": png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", b"\1")),
        "something behind the end": encode() + b"and more",
    },
    "JPEG": {
        "a short JFIF segment": jpeg(segment(0xE0, b"JFIF\0")),
        "a JFIF segment without sense": jpeg(segment(0xE0, b"JFIF\0" + b"\xff" * 9)),
        "a damaged profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\5\1junk")),
        "a damaged Photoshop segment": jpeg(segment(0xED, b"Photoshop 3.0\0008BIM\3\xed\0\0")),
        "a damaged list of pictures": jpeg(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
        "damaged EXIF": jpeg(segment(0xE1, BAD_EXIF)),
        "EXIF of another kind": jpeg(segment(0xE1, b"Exif\0\xffMM*\0\0\0\0\x08")),
        "a resolution of 0/0": jpeg(
            segment(
                0xE1,
                b"Exif\0\0II*\0\x08\0\0\0\2\0"
                + struct.pack("<HHII", 0x011A, 5, 1, 100)
                + struct.pack("<HHII", 0x0128, 3, 1, 2)
                + bytes(80),
            )
        ),
        "XMP without an end": jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmp")),
        "large comments": jpeg(*[segment(0xFE, bytes(60_000))] * 20),
        "bytes that fill": jpeg(b"\xff\xff\xff" + segment(0xE2, b"ICC_PROFILE\0")),
        "an empty segment": jpeg(segment(0xE5, b"")),
    },
    "WEBP": {
        "a profile that is none": riff(riff_chunk(b"ICCP", b"junk"), flags=0x20),
        "damaged EXIF": riff(riff_chunk(b"EXIF", BAD_EXIF), flags=0x08),
        "truncated EXIF": riff(riff_chunk(b"EXIF", bytes(99)), flags=0x08)[:-60],
        "large XMP": riff(riff_chunk(b"XMP ", bytes(10**6)), flags=0x04),
        "metadata that are said and not there": riff(flags=0x2C),
        "an unknown chunk that is too long": riff(b"junk\xff\xff\xff\x7f"),
    },
    "GIF": {
        "large comments": gif(*[b"!\xfe" + blocks(bytes([7]) * 10**5)] * 30),
        "XMP": gif(b"!\xff\x0bXMP DataXMP" + b"\x01" + b"<x:xmp>"[:1] + b"\0"),
        "a short loop": gif(b"!\xff\x0bNETSCAPE2.0\1\1\0"),
        "text": gif(b"!\x01" + blocks(bytes(20))),
    },
    "TIFF": {
        "damaged EXIF": tiff((34665, 4, 1, 10**6)),
        "EXIF in a circle": tiff((34665, 4, 1, 8), (34853, 4, 1, 8)),
        "text behind the end": tiff((270, 2, 10**6, 10**6)),
        "a profile behind the end": tiff((34675, 7, 10**9, 10**8)),
        "a resolution behind the end": tiff((282, 5, 1, 10**7), (283, 5, 1, 10**7)),
        "a tag of an unknown type": tiff((700, 99, 4, 4)),
        "directories in a circle": tiff(following="itself"),
        "a directory behind the end": tiff(following=10**8),
    },
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in HARMLESS.items() for name in names]
)
def test_metadata_change_no_pixel(kind, name):
    """Warnings are errors here."""
    clean = {"PNG": encode(), "JPEG": BARE, "WEBP": WEBP, "GIF": GIF, "TIFF": TIFF}[kind]
    data = HARMLESS[kind][name]
    assert data != clean
    np.testing.assert_array_equal(decoding.decode(data), decoding.decode(clean))


@AVIF
@pytest.mark.parametrize("exif", [BAD_EXIF, b"Exif\0\0nothing", b"nothing"])
def test_metadata_of_avif_change_no_pixel(exif):
    clean, data = encode("AVIF"), encode("AVIF", xmp=b"<x:xmp", icc_profile=b"junk")
    np.testing.assert_array_equal(decoding.decode(data), decoding.decode(clean))
    good = encode("AVIF", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(40))
    place = good.index(b"II*\0")
    damaged = good[:place] + exif[-10:] + good[place + len(exif[-10:]) :]
    np.testing.assert_array_equal(decoding.decode(damaged), decoding.decode(clean))


def test_metadata_are_never_unpacked():
    """60 MB that are 60 kB in the file."""
    bomb = zlib.compress(bytes(60_000_000))
    data = png(chunk(b"iCCP", b"name\0\0" + bomb), chunk(b"zTXt", b"a\0\0" + bomb))
    tracemalloc.start()
    try:
        assert decoding.decode(data).size == NOISE.size
        assert tracemalloc.get_traced_memory()[1] < 20 * len(bomb)
    finally:
        tracemalloc.stop()
    assert bomb not in metadata.strip(data)[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_without_metadata_stays_what_it_is(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"progressive": True}}.get(kind, {})
    data = encode(kind, **options)
    np.testing.assert_array_equal(
        decoding.decode(data), Image.open(io.BytesIO(data)).convert("RGB")
    )


@pytest.mark.parametrize(
    "size", [Image.MAX_IMAGE_PIXELS // 9000 + 1, 2 * Image.MAX_IMAGE_PIXELS // 9000 + 2]
)
def test_a_picture_over_the_limit_is_refused_in_one_voice(size):
    """Pillow warns of one and refuses the other."""
    header = struct.pack(">IIBBBBB", size, 9000, 8, 2, 0, 0, 0)
    data = encode()[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=f"has {size} x 9000 pixels, more than"):
        decoding.decode(data)


# --- orientation ---------------------------------------------------------------------------------


def block(order, kind, value, magic=b"*"):
    """An EXIF block that says the orientation as a value of any whole type."""
    head = {"<": b"II" + magic + b"\0", ">": b"MM\0" + magic}[order]
    sign = {1: "B3x", 3: "H2x", 4: "I", 6: "b3x", 8: "h2x", 9: "i"}[kind]
    return (
        head
        + struct.pack(f"{order}IH", 8, 1)
        + struct.pack(f"{order}HHI", 0x0112, kind, 1)
        + struct.pack(order + sign, value)
        + bytes(4)
    )


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 3, 4, 6, 8, 9])
def test_the_orientation_is_read_whatever_its_type(order, kind):
    exif = block(order, kind, 6)
    for data in (exif, b"Exif\0\0" + exif, b"Exif\0\0Exif\0\0" + exif, b"Exif\0\xff" + exif):
        assert metadata.orientation(data) == 6


def test_an_odd_header_is_taken_by_its_first_two_bytes():
    for odd, exif in ((b"MM*\0", block(">", 3, 8)), (b"II\0*", block("<", 3, 8))):
        assert metadata.orientation(odd + exif[4:]) == 8


@pytest.mark.parametrize(
    "exif", [b"", b"nothing", b"Exif\0\0", b"XX*\0\0\0\0\x08", block("<", 3, 6)[:18], BAD_EXIF]
)
def test_an_orientation_that_cannot_be_read_is_upright(exif):
    assert metadata.orientation(exif) == 1


def test_every_format_is_turned_upright():
    turned = np.asarray(NOISE.transpose(Image.Transpose.ROTATE_270))
    exif = block(">", 4, 6)
    whole = {
        "PNG": png(chunk(b"eXIf", exif)),
        "PNG, behind the pixels": png(chunk(b"eXIf", exif), before_pixels=False),
        "WEBP": riff(riff_chunk(b"EXIF", exif), flags=0x08),
        "WEBP, truncated": riff(riff_chunk(b"EXIF", exif + bytes(99)), flags=0x08)[:-60],
        "TIFF": tiff((0x0112, 3, 1, 6)),
    }
    for name, data in whole.items():
        np.testing.assert_array_equal(decoding.decode(data), turned, err_msg=name)
    assert decoding.decode(jpeg(segment(0xE1, b"Exif\0\0" + exif))).size == (4, 6)


@AVIF
def test_avif_is_turned_as_its_pixels_say():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoding.decode(encode("AVIF", exif=exif)).size == (4, 6)


def test_a_tiff_that_says_two_things_of_its_pixels_is_damaged():
    with pytest.raises(ValueError, match=r"is damaged \(tag 284 has 2 values\)"):
        decoding.decode(tiff((284, 3, 2, 1)))
