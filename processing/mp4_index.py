"""Looks at the index of an mp4 file for lies about its size, before FFmpeg makes room for what it claims.

FFmpeg lays out the whole index in memory when it opens a file: 50 kB that claim 80 million frames take 5 GB.
"""

import os
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

_FIRST = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx")
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
"""Boxes that say how many frames follow, and where in them."""
_DEEPEST = 8


def refuse_endless_index(target: str | Path | bytes, name: str) -> None:
    """Pass over anything but mp4 files, whose boxes must not list more frames than the file has bytes.

    Raises:
        ValueError: they do.
    """
    if not isinstance(target, Path | bytes):  # an address
        return
    with BytesIO(target) if isinstance(target, bytes) else target.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(4)
        if file.read(4) not in _FIRST:
            return
        claimed = 0
        for count in _frame_counts(file, 0, length, 0):
            claimed += count
            if claimed > length:
                raise ValueError(
                    f"{name}: not a video, or its header is damaged (its index lists {claimed} frames, but the file "
                    f"has only {length} bytes)"
                )


def _frame_counts(file: BinaryIO, start: int, end: int, depth: int) -> Iterator[int]:
    """Numbers of frames that the boxes between two places of the file say they list; broken boxes end the search."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        elif size == 0:
            size = end - start
        if size < header:
            return
        stop = min(start + size, end)
        if kind in _COUNTS:
            file.seek(start + header + _COUNTS[kind])
            yield int.from_bytes(file.read(4), "big")
        elif kind in _CONTAINERS and depth < _DEEPEST:
            yield from _frame_counts(file, start + header, stop, depth + 1)
        start += size
