"""Rewrites boxes of small mp4 files whose index comes last, so that no place in them moves."""

import struct
from pathlib import Path

_HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")


def find_box(data: bytes, path: str, start: int = 0, end: int | None = None) -> tuple[int, int]:
    """Start and end of a box, by a path such as "moov/trak/edts" (the first of each name)."""
    name, _, rest = path.partition("/")
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if kind == name.encode():
            return find_box(data, rest, start + 8, start + size) if rest else (start, start + size)
        start += size
    raise AssertionError(f"no box {path}")


def replace_box(data: bytes, path: str, box: bytes) -> bytes:
    """The file with one box replaced (by b"" too), the sizes of those around it corrected."""
    start, end = find_box(data, path)
    assert find_box(data, "moov")[1] == len(data), "the index must come last"
    result = bytearray(data[:start] + box + data[end:])
    names = path.split("/")
    for depth in range(1, len(names)):
        holder, old_end = find_box(data, "/".join(names[:depth]))
        struct.pack_into(">I", result, holder, old_end - holder + len(box) - (end - start))
    return bytes(result)


def with_edits(data: bytes, edits: list[tuple[float, float | None]]) -> bytes:
    """The file with an edit list of its first track: seconds shown, and from which second of it (None: nothing)."""
    headers = ("moov/mvhd", "moov/trak/mdia/mdhd")
    movie, media = (struct.unpack_from(">I", data, find_box(data, header)[0] + 20)[0] for header in headers)
    entries = b"".join(
        struct.pack(">IiI", round(length * movie), -1 if begin is None else round(begin * media), 1 << 16)
        for length, begin in edits
    )
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    return replace_box(data, "moov/trak/edts", struct.pack(">I4s", 8 + len(elst), b"edts") + elst)


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The file with a display matrix of its first track: (x, y) is shown at (a x + c y, b x + d y)."""
    result, one = bytearray(data), 1 << 16
    start = find_box(data, "moov/trak/tkhd")[0] + 8 + 40
    struct.pack_into(">9i", result, start, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return bytes(result)


def without_sync_table(data: bytes) -> bytes:
    """The file without the list of its key frames, which then count as all."""
    return replace_box(data, "moov/trak/mdia/minf/stbl/stss", b"")


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
