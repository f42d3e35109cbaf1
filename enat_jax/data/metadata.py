"""Picture files without their metadata, so that these never decide whether pixels can be read.

Pillow reads metadata of its own accord: it refuses a picture for much text or for a damaged EXIF
block, warns of others (warnings cannot be kept quiet in threads), and unpacks what is compressed.
Here colour profiles, texts, EXIF, XMP and comments are cut out before Pillow sees them, and nothing
is unpacked. What describes the pixels stays byte for byte as it is, damage included.
"""

import re
import struct
import zlib
from collections.abc import Callable

Stripped = tuple[bytes, bytes]  # a file without metadata, and its EXIF block, b"" if it has none

_SIGNATURES = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM")),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+")),
    ("AVIF", re.compile(rb"....ftyp(avif|avis|mif1|msf1)", re.DOTALL)),
)


def strip(data: bytes) -> tuple[str, bytes, bytes]:
    """Returns the format of a picture, the file without its metadata, and its EXIF block.

    Args:
        data: content of the file.

    Returns:
        The format by Pillow's name, "" if the beginning is that of none; the file; the EXIF block,
        b"" if there is none. Of AVIF there is never one: its orientation is that of its pixels.

    Raises:
        ValueError: the file ends too early; most of these are left to Pillow.
    """
    kind = next((name for name, signature in _SIGNATURES if signature.match(data)), "")
    return (kind, *_STRIPPERS.get(kind, _unchanged)(data))


def orientation(exif: bytes) -> int:
    """Returns 1 to 8 as EXIF counts them; 1, upright, if the block does not say or is damaged."""
    while exif.startswith(b"Exif\0"):
        exif = exif[6:]
    try:
        order, _, entries, width = _directory(exif)
        for place in entries:
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == _ORIENTATION and kind in _WHOLE_NUMBERS:
                # What is shorter than its field stands at the field's beginning.
                (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, place + width)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _unchanged(data: bytes) -> Stripped:
    return data, b""


# --- JPEG ------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> Stripped:
    """Cuts out comments and application segments, but for what says what the channels are."""
    kept, exif, start = [data[:2]], b"", 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # any number of these bytes may stand before a marker
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if not 0xC0 <= marker <= 0xFE or marker == 0xDA or end > len(data):
            break  # what follows is pixels, or damaged
        segment = data[start + 4 : end]
        if marker == 0xE1 and segment.startswith(b"Exif\0"):
            exif = exif or segment
        elif marker == 0xE0 and segment.startswith(b"JFIF\0") and len(segment) >= 14:
            kept.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")  # without a thumbnail
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            kept.append(b"\xff\xee\0\x0e" + segment[:12])
        elif not 0xE0 <= marker <= 0xEF and marker != 0xFE:
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]]), exif


# --- PNG -------------------------------------------------------------------------------------


def _png(data: bytes) -> Stripped:
    """Cuts out all ancillary chunks but that of transparency, and what follows the end."""
    kept, exif, start = [data[:8]], b"", 8
    while start + 12 <= len(data):
        name = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if end > len(data) or not name.isalpha():
            break  # damaged or truncated: for Pillow to say
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[start:end])
        elif name == b"eXIf" and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(
            data[end - 4 : end]
        ):
            exif = exif or data[start + 8 : end - 4]
        start = end
        if name == b"IEND":
            return b"".join(kept), exif
    return b"".join([*kept, data[start:]]), exif


# --- WebP ------------------------------------------------------------------------------------

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # profile, EXIF, XMP


def _webp(data: bytes) -> Stripped:
    kept, exif, start = [], b"", 12
    while start < len(data):
        name = data[start : start + 4]
        end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
        chunk = data[start : end + end % 2]
        if name == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA_FLAGS]) + chunk[9:]
        if name in _WEBP_PIXELS:
            kept.append(chunk)
        elif name == b"EXIF":
            exif = exif or chunk[8:]
        start = end + end % 2
    content = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content, exif


# --- GIF -------------------------------------------------------------------------------------


def _gif(data: bytes) -> Stripped:
    """Cuts out what stands before the first frame, but for the description of that frame."""
    colours = 3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0
    start = 13 + colours
    kept = [data[:start]]
    while data[start : start + 1] == b"!":
        end = start + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        if end >= len(data):
            break
        if data[start + 1] == 0xF9:
            kept.append(data[start : end + 1])
        start = end + 1
    return b"".join([*kept, data[start:]]), b""


# --- TIFF, and EXIF, which has the same form ------------------------------------------------------

_ORIENTATION = 0x0112
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # types of values
# Bytes of a value of each type.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= dict.fromkeys((16, 17, 18), 8)  # of BigTIFF
_TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266),  # width, height, bits, compression, colours, order of bits
    *(273, 277, 278, 279, 284),  # strips, samples, planes
    *(292, 293, 317, 320, *range(322, 326)),  # fax, predictor, palette, tiles
    *(332, 334, 336, 338, 339, 340, 341, 347),  # inks, alpha, kinds of numbers, tables of JPEG
    *(*range(512, 522), *range(529, 533)),  # JPEG of earlier times, YCbCr
}

_TIFF_NUMBERS = {256, 257, 259, 262, 266, 277, 278, 284, 317}  # of which there is one each


def _directory(data: bytes) -> tuple[str, int, range, int]:
    """Returns where the first directory of a TIFF file says what.

    Returns:
        The sign of the byte order for ``struct``; the place of the directory; the places of its
        entries; how far behind its beginning an entry has its value.

    Raises:
        struct.error: it is no TIFF file, or ends too early.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or data[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        raise struct.error("not a TIFF file")
    place, count, size, width = ("Q", "Q", 20, 12) if b"+" in data[2:4] else ("I", "H", 12, 8)
    (start,) = struct.unpack_from(order + place, data, 8 if size == 20 else 4)
    (number,) = struct.unpack_from(order + count, data, start)
    first = start + struct.calcsize(f"={count}")
    return order, start, range(first, first + number * size, size), width


def _tiff(data: bytes) -> Stripped:
    """Leaves in the first directory the tags that describe pixels, and no other directory.

    The EXIF block is the whole file, whose first directory has the orientation.

    Raises:
        ValueError: the directory, or a value that it names, lies behind the end, or there are
            several where there must be one.
    """
    kept = []
    try:
        order, start, entries, width = _directory(data)
        offset = f"{order}{'Q' if width == 12 else 'I'}"
        for place in entries:
            tag, kind = struct.unpack_from(f"{order}HH", data, place)
            (count,) = struct.unpack_from(offset, data, place + 4)
            (value,) = struct.unpack_from(offset, data, place + width)
            if tag in _TIFF_NUMBERS and count != 1:
                raise ValueError(f"tag {tag} has {count} values")
            if tag in _TIFF_PIXELS:
                size = count * _SIZES.get(kind, 0)
                if size > struct.calcsize(offset) and value + size > len(data):
                    raise ValueError("is truncated")
                kept.append(data[place : place + entries.step])
    except (struct.error, OverflowError) as error:
        raise ValueError("is truncated") from error
    count, end = ("Q", 8) if width == 12 else ("H", 4)
    directory = struct.pack(order + count, len(kept)) + b"".join(kept) + bytes(end)
    return data[:start] + directory + data[start + len(directory) :], data


# --- AVIF ------------------------------------------------------------------------------------


def _avif(data: bytes) -> Stripped:
    """Gives items of metadata a type that nobody reads; the places of the others stay the same."""
    changed = bytearray(data)
    for meta, end in _boxes(data, 0, len(data), b"meta"):
        for items, items_end in _boxes(data, meta + 4, end, b"iinf"):
            first = items + (6 if data[items : items + 1] == b"\0" else 8)
            for item, _ in _boxes(data, first, items_end, b"infe"):
                place = item + 4 + (4 if data[item : item + 1] == b"\2" else 6)
                if data[place : place + 4] in (b"Exif", b"mime"):
                    changed[place : place + 4] = b"none"
    return bytes(changed), b""


def _boxes(data: bytes, start: int, end: int, name: bytes) -> list[tuple[int, int]]:
    """Returns begin and end of the content of all boxes of a name between two places."""
    found = []
    while start + 8 <= end:
        size, head = int.from_bytes(data[start : start + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16]), 16
        stop = start + size if size else end
        if not start + head <= stop <= end:
            break
        if data[start + 4 : start + 8] == name:
            found.append((start + head, stop))
        start = stop
    return found


_STRIPPERS: dict[str, Callable[[bytes], Stripped]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "TIFF": _tiff,
    "AVIF": _avif,
}
