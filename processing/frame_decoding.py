"""Decodes the wanted frames of a scanned video file, and none that need not be decoded; parts of it side by side.

A part is a run of groups of pictures. In files whose index says where each group begins, every part is sought and
decoded by itself, always cut at the same places: the pictures do not depend on the number of threads. (Of a damaged
picture they may: FFmpeg fills in what it saw before.)
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .frame_pixels import TRANSPARENT, FrameDisplay, upright_pixels
from .read_ahead import in_order
from .video_decoding import VideoIndex, decoder_of, every_packet, open_stream, packets_of, reason_of

PART_WANTED = 16
PART_FRAMES = 200
"""A part ends with the group of pictures in which it reaches so many wanted frames, or so many frames in all."""
MAX_THREADS = 16
AHEAD_BYTES = 2**28
"""Decoded pictures that may wait for their consumer."""
DECODER_BYTES = 2**30
"""Memory that decoders may take together; one holds about `DECODER_PICTURES` pictures of 1.5 bytes a pixel."""
DECODER_PICTURES = 20


def decode_frames(
    target: str | Path | bytes,
    name: str,
    index: VideoIndex,
    wanted: np.ndarray,
    problems: list[str],
    *,
    skip: int = 0,
    own: np.ndarray | None = None,
    fit: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    fitted_pixels: int | None = None,
    threads: int = 1,
) -> Generator[tuple[np.ndarray, int], None, None]:
    """Decode the wanted frames in display order, ahead of the consumer.

    Args:
        wanted: int64, non-decreasing indices into `index.times`; repeated ones are yielded repeatedly.
        problems: receives a line for each kind of damage met.
        skip: leave out so many of the wanted frames at the beginning.
        own: bool, one for each wanted frame: yield these only, and decode only the parts that hold some.
        fit: applied to each picture, uint8 `(H, W, 3)` RGB, in the decoding thread.
        fitted_pixels: pixels of what `fit` returns; None where it keeps the size.
        threads: decode with at most so many threads; 0 decodes here, when a frame is asked for.

    Yields:
        `(fit(pixels), i)`: the frame upright, and its index. A frame that cannot be decoded is replaced by the next
        one that can, so fewer than all come only at a damaged end.
    """
    mine = np.ones(len(wanted), dtype=bool) if own is None else own.copy()
    mine[:skip] = False
    cuts = part_cuts(index, wanted)
    spans = []
    for start, stop in zip(cuts, [*cuts[1:], len(wanted)], strict=True):
        places = np.flatnonzero(mine[start:stop]) + start
        if len(places):
            spans.append((int(places[0]), int(places[-1]) + 1))
    pixels = max(index.frame_pixels, 1)
    threads = min(threads, MAX_THREADS, len(spans), max(1, DECODER_BYTES * 2 // (3 * DECODER_PICTURES * pixels)))
    outstanding = 2 * threads
    room = AHEAD_BYTES // (3 * (fitted_pixels or pixels) * max(outstanding, 1))
    counts: list[dict[str, int]] = []
    wanted_stamps = set() if index.pts is None else set(np.unique(index.pts[wanted]).tolist())
    with _Decoders(target, name, problems) as decoders:

        def part(span: tuple[int, int]) -> Callable[[], Generator[tuple[np.ndarray, int], None, None]]:
            def run() -> Generator[tuple[np.ndarray, int], None, None]:
                count = {"errors": 0, "corrupt": 0}
                counts.append(count)
                return _part_frames(decoders, index, wanted, span, mine, wanted_stamps, count, name, fit)

            return run

        with closing(in_order(map(part, spans), threads, outstanding, min(max(room, 1), 32))) as frames:
            yield from frames
        if decoders.transparent:
            problems.append(TRANSPARENT)
    for kind, text in (
        ("errors", "damaged parts that could not be decoded and were skipped"),
        ("corrupt", "damaged pictures among the frames that were read"),
    ):
        if total := sum(count[kind] for count in counts):
            problems.append(f"{text}: {total}")


def part_cuts(index: VideoIndex, wanted: np.ndarray) -> list[int]:
    """Places in `wanted` where a part begins: 0, and some of those where a group of pictures does."""
    if not index.seekable or index.pts is None or len(index.keys) < 2 or len(wanted) == 0:
        return [0]
    group = np.searchsorted(index.keys, index.pts[wanted], side="right")
    cuts = [0]
    for place in (np.flatnonzero(np.diff(group)) + 1).tolist():
        if place - cuts[-1] >= PART_WANTED or wanted[place] - wanted[cuts[-1]] >= PART_FRAMES:
            cuts.append(place)
    return cuts


class _Opened(NamedTuple):
    container: Any
    stream: Any
    look: FrameDisplay


class _Decoders:
    """Opened copies of one file, kept for the next part that wants one; all are closed on leaving."""

    def __init__(self, target: str | Path | bytes, name: str, problems: list[str]):
        self.target, self.name, self.problems = target, name, problems
        self._idle: list[_Opened] = []
        self._all: list[_Opened] = []
        self._stack = ExitStack()

    @property
    def transparent(self) -> bool:
        """Whether frames with transparent parts were shown."""
        return any(opened.look.transparent for opened in self._all)

    def __enter__(self) -> "_Decoders":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def take(self) -> "_Opened":
        try:
            return self._idle.pop()
        except IndexError:
            container, stream = self._stack.enter_context(open_stream(self.target, self.name))
            self._all.append(_Opened(container, stream, FrameDisplay.of(stream, decoder_of(stream))))
            return self._all[-1]

    def give_back(self, opened: "_Opened") -> None:
        self._idle.append(opened)


def _part_frames(
    decoders: _Decoders,
    index: VideoIndex,
    wanted: np.ndarray,
    span: tuple[int, int],
    mine: np.ndarray,
    wanted_stamps: set[int],
    count: dict[str, int],
    name: str,
    fit: Callable[[np.ndarray], np.ndarray],
) -> Generator[tuple[np.ndarray, int], None, None]:
    """Those of the wanted frames of one part that are `mine`, fitted."""
    position, end = span
    opened = decoders.take()
    try:
        with closing(_decoded(opened, decoders.problems, index, wanted, span, wanted_stamps, count)) as frames:
            for number, frame in frames:
                fitted = None
                while position < end and wanted[position] <= number:
                    if mine[position]:
                        if fitted is None:  # a frame that stays on screen is resized once
                            count["corrupt"] += frame.is_corrupt
                            fitted = fit(upright_pixels(frame, name, opened.look))
                        yield fitted, number
                    position += 1
                if position == end:
                    return
    finally:
        decoders.give_back(opened)


def _decoded(
    opened: _Opened,
    problems: list[str],
    index: VideoIndex,
    wanted: np.ndarray,
    span: tuple[int, int],
    wanted_stamps: set[int],
    count: dict[str, int],
) -> Generator[tuple[int, Any], None, None]:
    """Yield `(index, decoded frame)` in display order, leaving out what is not needed for the part's wanted frames."""
    import av.error

    container, stream, decoder = opened.container, opened.stream, opened.look.decoder

    def decode(packet: Any | None) -> list[Any]:
        try:
            return decoder.decode(packet)
        except (av.error.FFmpegError, EOFError):
            count["errors"] += packet is not None
            return []

    if index.pts is None:
        frames = (
            frame for packet in every_packet(packets_of(container, stream, problems)) for frame in decode(packet)
        )
        yield from enumerate(frames)
        return

    stamps = np.unique(index.pts[wanted[slice(*span)]])
    # H.264 frames that no other refers to are decoded only if wanted. Other decoders define this less sharply.
    selective = decoder.name == "h264"
    entry = _entry(index, int(stamps[0]))
    next_wanted, skipping, newest = 0, entry is not None, -math.inf
    decoder.flush_buffers()
    for packet in every_packet(_packets_from(container, stream, problems, index, int(stamps[0]))):
        if skipping and packet is not None:
            if not packet.is_keyframe or packet.pts is None or packet.pts < entry:
                continue
            decoder.flush_buffers()
            skipping = False
        if selective and packet is not None and packet.pts is not None:  # a second field goes with its first
            decoder.skip_frame = "DEFAULT" if packet.pts in wanted_stamps else "NONREF"
        for frame in decode(packet):
            if frame.pts is None or frame.pts < stamps[next_wanted]:
                continue
            yield int(np.searchsorted(index.pts, frame.pts, side="right")) - 1, frame
            next_wanted = int(np.searchsorted(stamps, frame.pts, side="right"))
            if next_wanted == len(stamps):
                return
        if packet is not None and packet.is_keyframe and packet.pts is not None:
            newest = max(newest, packet.pts)
        later = _entry(index, int(stamps[next_wanted]))
        if later is not None and later > newest:
            entry, skipping = later, True  # nothing up to there is needed


def _entry(index: VideoIndex, stamp: int) -> int | None:
    """Time stamp of the packet at which decoding begins for a frame; None: at the first."""
    place = int(np.searchsorted(index.keys, stamp, side="right")) - 1
    return int(index.entries[place]) if place >= 0 else None


def _packets_from(
    container: Any, stream: Any, problems: list[str], index: VideoIndex, first_wanted: int
) -> Iterator[Any]:
    """Packets of the stream from the key frame on that the frame `first_wanted` (a time stamp) depends on."""
    import av.error

    if not index.seekable or len(index.keys) == 0:
        yield from packets_of(container, stream, problems)
        return
    place = max(int(np.searchsorted(index.keys, first_wanted, side="right")) - 1, 0)
    begin = int(index.entries_dts[place])
    # Files are sought by decoding times, from which display times may differ, among packets marked as keys rightly or
    # not: what was found is looked at (times before the first mean the first).
    for time in (int(index.entries[place]), begin, -(2**62)):
        try:
            container.seek(time, stream=stream)
        except av.error.FFmpegError as error:
            problems.append(f"the file cannot be searched ({reason_of(error)})")
            return
        packets = packets_of(container, stream, problems)
        first = next(packets, None)
        if first is not None and first.dts is not None and first.dts <= begin:
            break
    if first is not None:
        yield first
        yield from packets
