"""Where decoding may begin: looks into a coded picture, since key marks of containers are wrong often enough.

Marks are set on pictures from which a decoder only recovers little by little (intra refresh), on every packet of a
file, or by tools that guess. For the codecs known here the picture itself tells; others are taken at their marks.
"""

import re
from collections.abc import Callable, Iterator

NOT_CLEAN = -1
"""No place to begin at. Other values are the number of pictures until all is there: 0 for a clean start."""


def start_test(codec: str, extradata: bytes | None) -> Callable[[bytes], int] | None:
    """A function of a packet's bytes that says how many pictures after it a decoder shows all rightly, or `NOT_CLEAN`.

    Args:
        codec: FFmpeg's name of the decoder; None is returned for those whose marks must do.
        extradata: the stream's, which says how H.264 and HEVC packets are cut into units.
    """
    if codec in ("h264", "hevc"):
        size = _length_size(codec, extradata or b"")
        units = _units_by_length if size else _units_by_code
        test = _h264_start if codec == "h264" else _hevc_start
        return lambda data: test(units(data, size))
    return {
        "mpeg4": _mpeg4_start,
        "mpeg1video": _mpeg2_start,
        "mpeg2video": _mpeg2_start,
        "vp8": lambda data: 0 if data and not data[0] & 1 else NOT_CLEAN,
        "vp9": _vp9_start,
        "av1": _av1_start,
        "libdav1d": _av1_start,
    }.get(codec)


def mpeg4_pictures(data: bytes) -> list[int]:
    """Types of the pictures in an MPEG-4 Part 2 packet (0 I, 1 P, 2 B, 3 sprite); several where they are packed."""
    return [match.group(1)[0] >> 6 for match in re.finditer(b"\x00\x00\x01\xb6(.)", data, re.DOTALL)]


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each unit; 0 where start codes separate them."""
    place = 4 if codec == "h264" else 21
    if len(extradata) <= place or extradata[:3] == b"\0\0\1" or extradata[:4] == b"\0\0\0\1":
        return 0
    return (extradata[place] & 3) + 1


def _units_by_length(data: bytes, size: int) -> Iterator[bytes]:
    place = 0
    while place + size < len(data):
        length = int.from_bytes(data[place : place + size], "big")
        yield data[place + size : place + size + length]
        place += size + length


def _units_by_code(data: bytes, _: int) -> Iterator[bytes]:
    place = data.find(b"\0\0\1")
    while place >= 0:
        following = data.find(b"\0\0\1", place + 3)
        yield data[place + 3 : following if following >= 0 else len(data)]
        place = following


def _golomb(data: bytes, count: int) -> list[int]:
    """The first `count` exponential Golomb numbers of some bytes; fewer where these end."""
    bits, place = "".join(f"{byte:08b}" for byte in data), 0
    numbers: list[int] = []
    while len(numbers) < count:
        one = bits.find("1", place)
        end = 2 * one - place + 1
        if one < 0 or end > len(bits):
            break
        numbers.append(int(bits[one:end], 2) - 1)
        place = end
    return numbers


def _h264_start(units: Iterator[bytes]) -> int:
    recovery = NOT_CLEAN
    for unit in units:
        kind = unit[0] & 31 if unit else 0
        if kind == 5:
            return 0
        if kind == 6:
            recovery = max(recovery, _recovery_point(unit[1:].replace(b"\0\0\3", b"\0\0")))
        if kind in (1, 2):
            # Without a recovery point, later pictures may look back beyond this one, even if it is intra-coded.
            intra = [number % 5 for number in _golomb(unit[1:16], 2)[1:]] == [2]
            return recovery if intra or recovery > 0 else NOT_CLEAN
    return NOT_CLEAN


def _recovery_point(messages: bytes) -> int:
    """Pictures until recovery that an H.264 SEI unit tells, or `NOT_CLEAN`."""
    place = 0
    while place + 2 < len(messages):
        numbers = []
        for _ in range(2):  # kind and length, each as bytes of 255 and a last smaller one
            number = 0
            while place < len(messages) and messages[place] == 255:
                number, place = number + 255, place + 1
            numbers.append(number + (messages[place] if place < len(messages) else 0))
            place += 1
        if numbers[0] == 6:
            return (_golomb(messages[place : place + 8], 1) or [NOT_CLEAN])[0]
        place += numbers[1]
    return NOT_CLEAN


def _hevc_start(units: Iterator[bytes]) -> int:
    for unit in units:
        kind = unit[0] >> 1 & 63 if unit else 32
        if kind < 32:  # the first unit of the picture itself
            return 0 if 16 <= kind <= 21 else NOT_CLEAN
    return NOT_CLEAN


def _mpeg4_start(data: bytes) -> int:
    return 0 if mpeg4_pictures(data)[:1] == [0] else NOT_CLEAN


def _mpeg2_start(data: bytes) -> int:
    place = data.find(b"\0\0\1\0")
    return 0 if 0 <= place < len(data) - 5 and data[place + 5] >> 3 & 7 == 1 else NOT_CLEAN


def _vp9_start(data: bytes) -> int:
    if not data:
        return NOT_CLEAN
    profile_3 = data[0] & 0x30 == 0x30
    repeated, later = (data[0] >> 2 & 1, data[0] >> 1 & 1) if profile_3 else (data[0] >> 3 & 1, data[0] >> 2 & 1)
    return NOT_CLEAN if repeated or later else 0


def _av1_start(data: bytes) -> int:
    place, still = 0, False
    while place < len(data):
        header = data[place]
        place += 1 + (header >> 2 & 1)
        size, shift = len(data) - place, 0
        if header & 2:
            size = 0
            while place < len(data):
                byte = data[place]
                size |= (byte & 127) << shift
                place, shift = place + 1, shift + 7
                if byte < 128:
                    break
        kind = header >> 3 & 15
        if kind == 1 and place < len(data):
            still = bool(data[place] & 0x08)  # a single picture, whose header leaves its type out
        if kind in (3, 6) and place < len(data):  # key pictures begin with "not shown before, type 0, shown now"
            return 0 if still or data[place] & 0xF0 == 0x10 else NOT_CLEAN
        place += size
    return NOT_CLEAN
