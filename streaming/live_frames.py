"""Frames of a source as they come: decoded one after the other, the connection made again when it breaks off."""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..processing.frame_pixels import FrameDisplay, upright_pixels
from ..processing.picture_sources import PictureSource, split_array
from ..processing.video_decoding import (
    FALLBACK_RATE,
    LONGEST_GAP,
    FrameTimes,
    declared_rate,
    decoder_of,
    every_packet,
    is_untimed,
    open_stream,
    packets_of,
)
from ..processing.video_source_names import without_secrets
from .frame_clock import FrameClock
from .live_sources import LiveSource
from .stream_report import StreamReport

LONGEST_PAUSE = 30.0  # seconds between two attempts to connect


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for.

    Attributes:
        connect: seconds for the connection to be made; data: seconds without a new byte (of a growing file: its end).
        retries: attempts in a row to connect again, after pauses of 0.5, 1, 2, ... at most 30 seconds.
        first_pause: the first of these pauses.
    """

    connect: float = 15.0
    data: float = 15.0
    retries: int = 10
    first_pause: float = 0.5


class LiveFrames:
    """Iterates over the chosen frames of a source: `(picture, seconds)`, `picture()` being its pixels.

    Seconds count from the first frame. After a break, an address of known length (a recording) is read again from its
    beginning, and frames come from behind the last one on; anything else is live, and what was missed is a gap as long
    as the clock says.

    Args:
        source: from `find_source`.
        clock: chooses the frames.
        report: counters and timeline to keep.
        stop: set to end the iteration.
        realtime: give frames of a file no sooner than their times.
    """

    def __init__(
        self,
        source: LiveSource,
        clock: FrameClock,
        report: StreamReport,
        stop: threading.Event,
        patience: Patience,
        realtime: bool = False,
    ):
        self.source = source
        self.clock = clock
        self.report = report
        self.stop = stop
        self.patience = patience
        self.realtime = realtime
        self._began = self._last_came = 0.0  # of the wall clock
        self._first_raw: float | None = None  # time stamp of the source at `_offset` seconds
        self._offset = self._last_raw = 0.0
        self._step = 1 / clock.fps
        self._lasts: float | None = None  # seconds the last frame is shown, where it says so
        self._recording_until: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether frames come in their own time, wanted or not; known from the first frame on."""
        return self.realtime or (self.source.may_drop and self._recording_until is None)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        """Raises OSError or ValueError when the source cannot be opened at all."""
        if self.source.kind == "frames":
            yield from self._given_frames()
            return
        attempt = 0
        while not self.stop.is_set():
            seen, problems = self.report.frames_seen, []
            try:
                yield from self._connection(problems)
            except (OSError, ValueError) as error:
                if self.report.frames_seen == 0:
                    raise
                problems.append(without_secrets(str(error)))
            progress = self.report.frames_seen > seen
            if self.stop.is_set() or not self.source.may_drop or self._is_complete(progress, problems):
                break
            if self._recording_until is None:  # a picture is not shown on over a gap
                yield from self.clock.finish(self._lasts)
            if progress:
                attempt = 0
                self.report.breaks += 1
                silent = "Immediate exit requested" in "".join(problems)  # FFmpeg's words for our own timeout
                why = "; ".join(problems) or "the stream ended"
                self.report.mark("broke off", f"no data for {self.patience.data:g} s" if silent else why)
            attempt += 1
            if attempt > self.patience.retries:
                self.report.mark("given up", f"{self.patience.retries} attempts to connect again failed")
                break
            self.stop.wait(min(self.patience.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE))
        if not self.report.frames_seen and not self.stop.is_set():
            hint = ""
            if self.source.kind == "pipe":
                hint = " (an mp4 whose index stands at its end cannot be read from a pipe: name the file, or write"
                hint += " it with ffmpeg's -movflags +faststart)"
            raise ValueError(f"{self.source.name}: it ended before one frame could be read{hint}")
        yield from self.clock.finish(self._lasts)
        self.report.mark("ended")

    def _given_frames(self) -> Iterator[tuple[Any, float]]:
        self._began = time.monotonic()
        count = 0
        for item in self.source.target:
            for picture, seconds in frames_in(item):
                if self.stop.is_set():
                    return
                seconds = count / self.clock.fps if seconds is None else seconds
                count += 1
                yield from self._choose(picture, seconds)
        yield from self.clock.finish()
        self.report.mark("ended")

    def _is_complete(self, progress: bool, problems: list[str]) -> bool:
        """Whether a recording has been read to its end."""
        if self._recording_until is None or problems:
            return False
        return not progress or self._last_raw + 2 * self._step + 0.5 >= self._recording_until

    def _connection(self, problems: list[str]) -> Iterator[tuple[Any, float]]:
        """Frames until the source ends or breaks off."""
        import av.error

        source, patience = self.source, self.patience
        target = source.readable(self.stop, patience.data)
        settings = {"file_format": source.file_format, "options": source.options}
        timeout = patience.connect, patience.data
        with open_stream(target, source.name, timeout=timeout, **settings) as (container, stream):
            # What has a length, in seconds or at least in bytes, is a recording.
            duration = (container.duration or 0) / 1e6 or (math.inf if container.size > 0 else None)
            rate, untimed = declared_rate(container, stream), is_untimed(container)
            by_arrival = untimed and rate is None and duration is None and source.kind in ("address", "camera", "pipe")
            self._step = 1 / (rate or (FALLBACK_RATE if untimed else self.clock.fps))
            if untimed and self._first_raw is None:
                assumed = "that of their arrival" if by_arrival else f"{1 / self._step:g} frames a second"
                self.report.mark("no times in the stream", f"taken instead: {assumed}")
            times = FrameTimes(container, stream)
            decoder = decoder_of(stream)
            look = FrameDisplay.of(stream, decoder)
            first = True
            for packet in every_packet(packets_of(container, stream, problems)):
                if self.stop.is_set():
                    return
                try:
                    frames = decoder.decode(packet)
                except (av.error.FFmpegError, EOFError):
                    self.report.frames_damaged += packet is not None
                    continue
                for frame in frames:
                    self.report.frames_damaged += frame.is_corrupt
                    raw = times.seconds(frame)
                    if raw is None:
                        raw = time.monotonic() if by_arrival else self._last_raw + self._step
                    if first:
                        if duration and self._first_raw is None and source.kind == "address":
                            self._recording_until = raw + duration
                        self._connected(raw)
                        first = False
                    if self._recording_until is not None and self.report.frames_seen and raw <= self._last_raw:
                        continue  # of a recording that is read again from its beginning
                    yield from self._take(frame, raw, look)
                    self._lasts = None if untimed else frame.duration * float(stream.time_base or 0) or None

    def _connected(self, raw: float) -> None:
        """The first frame of a connection is there."""
        now = time.monotonic()
        if self._first_raw is None:
            self._began, self._first_raw = now, raw
            return
        self.report.reconnects += 1
        missed = 0.0
        if self._recording_until is None:
            missed = max(now - self._last_came, self._step)
            self._first_raw, self._offset = raw, self.report.seconds + missed
        self.report.gap_seconds += missed
        self.report.mark("connected again", f"{missed:.1f} s were missed" if missed else "nothing was missed")

    def _take(self, frame: Any, raw: float, look: FrameDisplay) -> Iterator[tuple[Any, float]]:
        seconds = self._offset + raw - self._first_raw
        latest = self.clock.latest
        if latest is not None and not latest - 1 <= seconds <= latest + LONGEST_GAP:
            yield from self.clock.finish()
            self.report.mark("time stamps jumped", f"by {seconds - latest:.1f} s")
            self._first_raw, self._offset = raw, latest + self._step
            seconds = self._offset
        elif latest is not None and seconds < latest:  # out of order by less than a second
            self.report.frames_damaged += 1
            return
        self._last_raw, self._last_came = raw, time.monotonic()
        if self.realtime and self.source.kind == "file":
            self.stop.wait(max(0.0, self._began + seconds - self._last_came))
        name = self.source.name
        yield from self._choose(lambda: upright_pixels(frame, name, look), seconds)

    def _choose(self, picture: Any, seconds: float) -> Iterator[tuple[Any, float]]:
        self.report.frames_seen += 1
        self.report.seconds = max(self.report.seconds, seconds)
        yield from self.clock.add(picture, seconds)


def frames_in(item: Any) -> Iterator[tuple[Any, float | None]]:
    """What a caller gives as a frame or frames, as `(picture, seconds or None)`; `picture()` is uint8 `(H, W, 3)`."""
    if hasattr(item, "pixels") and hasattr(item, "timestamps"):
        for pixels, seconds in zip(item.pixels, item.timestamps, strict=True):
            yield _picture(pixels), float(seconds)
    elif isinstance(item, tuple):
        picture, seconds = item
        yield _picture(picture), None if seconds is None else float(seconds)
    elif getattr(item, "ndim", 0) == 4:
        for pixels in split_array(item, "<frames>"):
            yield _picture(pixels), None
    else:
        yield _picture(item), None


def _picture(frame: Any) -> Any:
    pixels: np.ndarray = PictureSource([frame], "<frame>").pixels(0)
    return lambda: pixels
