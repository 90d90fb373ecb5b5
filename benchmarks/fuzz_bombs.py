"""Small video files that claim to be enormous, made from whole ones. A case is (container, what it is, its bytes)."""

import struct
from collections.abc import Callable, Iterator


def bombs(video_bytes: Callable[[str], bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Small files that claim to be enormous."""
    side = 30_000
    yield "y4m", "bomb: 30,000 x 30,000", f"YUV4MPEG2 W{side} H{side} F25:1 C420jpeg\nFRAME\n".encode() + bytes(4096)
    gif = bytearray(video_bytes("gif"))
    struct.pack_into("<HH", gif, 6, side, side)
    yield "gif", "bomb: 30,000 x 30,000", bytes(gif)
    avi = bytearray(video_bytes("avi"))
    at = avi.index(b"strf") + 8
    struct.pack_into("<ii", avi, at + 4, side, side)
    avi[at + 16 : at + 20] = b"\0\0\0\0"  # raw pictures
    yield "avi", "bomb: 30,000 x 30,000", bytes(avi)
    mp4 = bytearray(video_bytes("faststart.mp4"))
    for kind, skip in ((b"tkhd", 80), (b"avc1", 28)):
        at = mp4.index(kind) + skip
        mp4[at : at + 4] = struct.pack(">I", side << 16) if kind == b"tkhd" else struct.pack(">HH", side, side)
    yield "mp4", "bomb: 30,000 x 30,000", bytes(mp4)
    yield from many_streams(10_000, video_bytes)
    for kind, skip in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        mp4 = bytearray(video_bytes("faststart.mp4"))
        struct.pack_into(">I", mp4, mp4.index(kind) + skip, 0xFFFFFFF0)
        yield "mp4", f"bomb: endless duration ({kind.decode()})", bytes(mp4)
    for field, name in ((4, "run of 2^32 frames"), (8, "a frame lasts years")):
        mp4 = bytearray(video_bytes("faststart.mp4"))
        struct.pack_into(">I", mp4, mp4.index(b"stts") + 8 + field, 0xFFFFFFFF)
        yield "mp4", f"bomb: {name}", bytes(mp4)
    for count in (10_000_000, 80_000_000, 0xFFFFFFFF):  # frames of one byte each, of which the file has none
        mp4 = bytearray(video_bytes("faststart.mp4"))
        at = mp4.index(b"stsz") + 8
        struct.pack_into(">II", mp4, at, 1, count)
        struct.pack_into(">I", mp4, mp4.index(b"stsc") + 16, count)
        struct.pack_into(">I", mp4, mp4.index(b"stts") + 12, count)
        yield "mp4", f"bomb: {count} frames in the index", bytes(mp4)
    for count in (10_000_000, 80_000_000, 0xFFFFFFFF):  # a fragment of so many frames, all of the default size
        mp4 = bytearray(video_bytes("fragmented.mp4"))
        at = mp4.index(b"trun") + 4
        struct.pack_into(">II", mp4, at, 0, count)
        yield "mp4", f"bomb: fragment of {count} frames", bytes(mp4)
    mkv = bytearray(video_bytes("mkv"))
    at = mkv.index(b"\x44\x89")  # Duration, a double
    struct.pack_into(">d", mkv, at + 3, 1e300)
    yield "mkv", "bomb: endless duration", bytes(mkv)


def many_streams(count: int, video_bytes: Callable[[str], bytes]) -> Iterator[tuple[str, str, bytes]]:
    mp4 = video_bytes("faststart.mp4")
    at = mp4.index(b"moov") - 4
    size = int.from_bytes(mp4[at : at + 4], "big")
    track = mp4.index(b"trak") - 4
    track = mp4[track : track + int.from_bytes(mp4[track : track + 4], "big")]
    moov = mp4[at + 8 : at + size] + track * count
    yield (
        "mp4",
        f"bomb: {count} streams",
        mp4[:at] + struct.pack(">I", 8 + len(moov)) + b"moov" + moov + mp4[at + size :],
    )
    avi = video_bytes("avi")
    at = avi.index(b"LIST", 20)  # the list of the one stream's headers
    length = 8 + int.from_bytes(avi[at + 4 : at + 8], "little")
    header_size = int.from_bytes(avi[16:20], "little") + length * count
    data = (
        avi[:16]
        + struct.pack("<I", header_size)
        + avi[20:at]
        + avi[at : at + length] * (count + 1)
        + avi[at + length :]
    )
    yield "avi", f"bomb: {count} streams", data
    mkv = video_bytes("mkv")
    at = mkv.index(b"\x16\x54\xae\x6b")  # Tracks, its size, then TrackEntry
    first = mkv[at + 4]
    width = 8 - first.bit_length() + 1
    size = int.from_bytes(mkv[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
    body = mkv[at + 4 + width : at + 4 + width + size]
    entries = body[body.index(b"\xae") :] * (count + 1)
    tracks = b"\x16\x54\xae\x6b" + struct.pack(">Q", (1 << 56) | len(entries)) + entries
    # The segment's own length is made unknown, since it grew.
    segment = mkv.index(b"\x18\x53\x80\x67")
    yield (
        "mkv",
        f"bomb: {count} streams",
        mkv[: segment + 4] + b"\x01" + b"\xff" * 7 + mkv[segment + 12 : at] + tracks + mkv[at + 4 + width + size :],
    )
