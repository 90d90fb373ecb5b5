"""Opens a video file with PyAV (FFmpeg) and finds out which frames it has, without decoding any.

The first of two passes over the packets: `scan_video` reads time stamps only, so lengths come from packets that exist
and never from a header. `decode_frames` (frame_decoding.py) then decodes just the groups of pictures that hold a
wanted frame, each only up to the last one wanted. Where packets do not tell what will be shown when (see
`_Packets.differ`), the first pass decodes, too.
"""

import functools
import gc
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .frame_fitting import MAX_FRAME_PIXELS, check_frame_pixels
from .mp4_index import refuse_endless_index
from .video_clean_starts import NOT_CLEAN, mpeg4_pictures, start_test
from .video_source_names import without_secrets

FALLBACK_RATE = 25.0  # FFmpeg's own assumption for streams without any timing
PLAUSIBLE_RATES = (0.1, 1000.0)
LONGEST_GAP = 3600.0
"""Seconds between two frames beyond which time stamps count as damaged, and not the picture as standing still."""
LONGEST_LAST_FRAME = 60.0
_BEFORE_HTML = rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*"
_HTML = re.compile(_BEFORE_HTML + rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_FETCHED_BLOCK = 2**16
NETWORK_TIMEOUT = (15.0, 60.0)  # seconds to connect, to wait for data
_DISPOSITIONS = {  # FFmpeg's AV_DISPOSITION_...
    "default": 1,
    "comment": 8,
    "attached_pic": 1 << 10,
    "timed_thumbnails": 1 << 11,
    "descriptions": 1 << 17,
    "dependent": 1 << 19,
    "still_image": 1 << 20,
}
_STILLS = frozenset({"bmp", "gif", "jpeg2000", "mjpeg", "png", "tiff", "webp"})
"""Decoders of pictures: beside another video, these are its preview."""
UNTIMED_SHARE = 0.1  # share of packets that may lack a time stamp before all of them are ignored
UNTIMED_SHARE_OF_FIELDS = 0.6  # interlaced broadcasts send every other field without a time stamp


_REORDERED = frozenset(
    {"av1", "h264", "hevc", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4", "vc1", "vp8", "vp9", "vvc", "wmv3"}
)
"""Decoders whose frames may come at other times, or in other numbers, than packets that have no display times."""
_NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS
_UNTIMED = frozenset({"mpjpeg", "mjpeg", "mjpeg_2000", "image2pipe", "jpeg_pipe", "png_pipe"})
MPEG4_STUB = 8
"""Bytes up to which an MPEG-4 packet may hold no picture at all."""


@dataclass
class VideoIndex:
    """What `scan_video` found. N: number of frames in display order.

    `pts` int64 `(N,)` in units of the stream's time base, or None where the stream has no usable time stamps and
    frames are counted instead; `times` float64 `(N,)` seconds from the first frame; `entries` int64, time stamps of
    the key frames at which decoding may begin, ascending, and `entries_dts`, their decoding times; `keys` int64, for
    each entry the time stamp from which on all frames come out right (its own, but for intra refresh); `duration`
    seconds; `begin` the first frame's time on the container's clock; `frame_pixels` width times height as the header
    says; `seekable`: the file's own index says exactly where each packet is.
    """

    pts: np.ndarray | None
    times: np.ndarray
    keys: np.ndarray
    duration: float
    problems: list[str]
    frame_pixels: int = 0
    seekable: bool = False
    begin: float = 0.0
    entries: np.ndarray = field(default_factory=lambda: np.array([], np.int64))
    entries_dts: np.ndarray = field(default_factory=lambda: np.array([], np.int64))


@contextmanager
def open_stream(
    target: str | Path | bytes | Any,
    name: str,
    *,
    timeout: tuple[float, float] = NETWORK_TIMEOUT,
    file_format: str | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Open a file, URL, bytes or object with `read` and yield `(container, video stream)`; closed on leaving.

    Args:
        timeout: seconds to connect to a URL, and to wait for its data.
        file_format, options: for FFmpeg, where it cannot tell by itself.

    Raises:
        FileNotFoundError: no such file or URL.
        ConnectionError: the server does not answer.
        ValueError: not a video, no video stream, no decoder, or frames too large.
    """
    import av.error

    spare_forks()
    limits = {"max_pixels": str(MAX_FRAME_PIXELS)}
    if isinstance(target, Path) and target.suffix.lower() in (".m3u8", ".m3u"):  # the pieces may have any name
        options = {"allowed_extensions": "ALL", "extension_picky": "0", **(options or {})}
    is_url = isinstance(target, str)
    # The protocol is spelled out, so that no file name is read as another of FFmpeg's protocols.
    file = f"file:{target}" if isinstance(target, Path) else target
    file = BytesIO(target) if isinstance(target, bytes) else file
    failed: Exception | None = None
    try:
        container = open_container(
            file, file_format, {**(options or {}), **limits}, timeout=timeout if is_url else None
        )
    except av.error.FFmpegError as error:
        failed = _opening_error(error, name, is_url)
    missing = failed is None or isinstance(failed, FileNotFoundError)
    if isinstance(target, str) and not missing and _is_web_page(target, timeout):
        failed = ValueError(
            f"{name}: this is a web page, not a video: save the video of the page first (yt-dlp does, for many sites) "
            "and name the file"
        )
    if failed is not None:  # outside of `except`: FFmpeg's own error tells the address, and with it its password
        raise failed
    with container:
        stream = choose_stream(container, name)
        if stream.codec_context is None:
            raise ValueError(f"{name}: the video's codec is not supported by the installed FFmpeg")
        check_frame_pixels(stream.codec_context.width, stream.codec_context.height, name)
        stream.codec_context.options = limits  # frame size may still change in the middle of the stream
        if container.format.name == "hls":
            _fetch_only(container, stream)
        stream.thread_type = "SLICE"  # frame threads would delay frames, and skip_frame with them
        yield container, stream


def open_container(
    file: Any, file_format: str | None = None, options: Mapping[str, str] | None = None, **given: Any
) -> Any:
    """PyAV's container for reading, whatever letters the titles in a file are written in.

    Raises:
        av.error.FFmpegError: it cannot be opened.
    """
    import av

    if int(av.__version__.partition(".")[0]) < 19:  # later ones decode any titles, and take no such argument
        given["metadata_errors"] = "replace"
    return av.open(file, mode="r", format=file_format, options=dict(options or {}), **given)


@functools.cache
def spare_forks() -> None:
    """Leave FFmpeg's objects of this process alone in processes forked from it, such as a DataLoader's workers: when
    their garbage collection found some, FFmpeg would wait there for ever for threads that a fork does not copy."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def choose_stream(container: Any, name: str) -> Any:
    """The stream that is the film: no cover picture, no preview; what the file marks as default; the largest.

    A broadcast's first programme is taken whatever its size, as a television set does.

    Raises:
        ValueError: there is no video, or a picture cut into tiles that FFmpeg does not put together.
    """

    def is_marked(stream: Any, *marks: str) -> bool:
        return any(_number(stream.disposition) & _DISPOSITIONS[mark] for mark in marks)

    videos = [
        stream for stream in container.streams.video if not is_marked(stream, "attached_pic", "timed_thumbnails")
    ]
    if not videos:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        reason = f"it contains only {' and '.join(kinds)}" if kinds else "it contains no streams"
        raise ValueError(f"{name}: there is no video in this file, {reason}")
    if len(videos) == 1:
        return videos[0]
    tiles = sum(is_marked(stream, "dependent") for stream in videos)
    if container.format.name.startswith("mov") and tiles > 1:
        raise ValueError(
            f"{name}: a picture cut into {tiles} tiles; read it with Pillow 11.3 or newer (AVIF), or install "
            "and register pillow-heif (HEIC)"
        )
    broadcast = container.format.name == "mpegts"
    filmed = any(stream.codec_context is not None and stream.codec_context.name not in _STILLS for stream in videos)
    length = max((_length(stream) or 0.0 for stream in videos), default=0.0)

    def rank(stream: Any) -> tuple[Any, ...]:
        decoder, seconds = stream.codec_context, _length(stream)
        return (
            decoder is not None,
            stream.frames != 1 and not (seconds is not None and seconds < 0.02 * length),
            not (filmed and decoder is not None and decoder.name in _STILLS),
            not is_marked(stream, "still_image", "dependent", "comment", "descriptions"),
            is_marked(stream, "default"),
            0 if broadcast or decoder is None else decoder.width * decoder.height,
            int(stream.metadata.get("variant_bitrate") or 0),
            -stream.index,
        )

    return max(videos, key=rank)


def _fetch_only(container: Any, stream: Any) -> None:
    """Fetch no other variants of a stream than the one chosen."""
    for other in container.streams:
        if other.index != stream.index:
            with suppress(AttributeError, ImportError):  # PyAV before 16
                other.discard = import_module("av.stream").Discard.all


def _number(flags: Any) -> int:
    return int(getattr(flags, "value", flags))  # before PyAV 16, flags are no numbers


def _length(stream: Any) -> float | None:
    """Seconds of a stream, if the file says so."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    said = next((text for key, text in stream.metadata.items() if key.upper().startswith("DURATION")), "")
    parts = said.split(":")
    try:
        return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:
        return None


def decoder_of(stream: Any) -> Any:
    """The decoder for a stream: its own, but for VP8 and VP9 with an alpha channel, which only libvpx reads."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    tags = {key.lower(): text for key, text in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1" or name not in av.codecs_available:
        return stream.codec_context
    decoder = av.CodecContext.create(name, "r")
    decoder.options = stream.codec_context.options
    return decoder


def reason_of(error: Exception) -> str:
    """FFmpeg's words for what went wrong, without the address (which may hold a password)."""
    return getattr(error, "strerror", None) or without_secrets(str(error))


def _opening_error(error: Exception, name: str, is_url: bool) -> Exception:
    import av.error

    reason = reason_of(error)
    if isinstance(error, FileNotFoundError | av.error.HTTPNotFoundError):
        return FileNotFoundError(f"{name}: no such {'address' if is_url else 'file'}")
    if isinstance(error, PermissionError):
        return PermissionError(f"{name}: permission denied")
    if is_url and not isinstance(error, av.error.InvalidDataError):
        return ConnectionError(f"{name}: cannot read from this address ({reason})")
    return ValueError(f"{name}: not a video, or its header is damaged ({reason})")


def fetched(address: str, timeout: tuple[float, float] = NETWORK_TIMEOUT) -> Any:
    """Yield the bytes behind an address, block by block, through FFmpeg's own protocols (logins, TLS, redirections).

    Raises:
        OSError: it cannot be fetched, or not to its end.
    """
    import av.error

    try:
        options = {"raw_packet_size": str(_FETCHED_BLOCK)}
        with open_container(address, "data", options, timeout=timeout) as container:
            for packet in container.demux():
                if packet.size:
                    yield bytes(packet)
    except (av.error.FFmpegError, EOFError):
        failed = True
    else:
        failed = False
    if failed:  # outside of `except`: FFmpeg's own error tells the address, and with it its password
        raise OSError("cannot be fetched")


def _is_web_page(address: str, timeout: tuple[float, float]) -> bool:
    """Whether HTML lies behind an address that no video could be opened from."""
    try:
        begin = next(iter(fetched(address, timeout)), b"")
    except OSError:
        return False
    return _HTML.match(begin) is not None


def packets_of(container: Any, stream: Any, problems: list[str]) -> Iterator[Any]:
    """Packets of the stream until the file ends or becomes unreadable (which is noted, once)."""
    import av.error

    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer)
        except (StopIteration, IndexError):  # PyAV's IndexError: the end of a file in which further streams appeared
            return
        except (av.error.FFmpegError, EOFError) as error:
            problems.append(f"the file is damaged or cut off: reading stopped early ({reason_of(error)})")
            return
        yield packet


def scan_video(target: str | Path | bytes, name: str) -> VideoIndex:
    """Find out which frames will be shown when: from the time stamps of all packets, decoding only where these lie.

    Raises:
        ValueError: there is not one video packet; and what `open_stream` raises.
    """
    problems: list[str] = []
    refuse_endless_index(target, name)
    with open_stream(target, name) as (container, stream):
        time_base = float(stream.time_base or 0) or 1 / FALLBACK_RATE
        rate = declared_rate(container, stream)
        promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        container_name, codec_name = container.format.name, stream.codec_context.name
        frame_pixels = stream.codec_context.width * stream.codec_context.height
        packets, invented = _Packets(codec_name, stream.codec_context.extradata), is_untimed(container)
        for packet in packets_of(container, stream, problems):
            if packet.size:
                packets.add(packet)
    if packets.count == 0:
        raise ValueError(f"{name}: the video stream is empty, not one frame could be read")

    stamps = np.unique(np.frombuffer(packets.pts, np.int64))
    if packets.first_mark is not None:
        stamps = stamps[stamps >= packets.first_mark]  # what precedes the first key frame cannot be decoded
    entries = np.frombuffer(packets.entries, np.int64)
    keys = _recovered(stamps, entries, np.frombuffer(packets.recovery, np.int64))
    times = (stamps - stamps[:1]) * time_base
    mp4 = "mp4" in container_name.split(",")
    share = UNTIMED_SHARE_OF_FIELDS if container_name == "mpegts" and codec_name == "h264" else UNTIMED_SHARE
    timed = not invented and len(stamps) > 0 and packets.untimed <= share * packets.count
    ordered = bool(np.all(np.diff(entries) > 0)) and bool(np.all(np.diff(times) <= LONGEST_GAP))
    index = None
    reordered = codec_name in _REORDERED and (invented or (container_name == "avi" and codec_name != "mpeg4"))
    if packets.differ or reordered or not (timed or invented) or (mp4 and (packets.overlap or not ordered)):
        index = _decoded_index(target, name, rate, problems)
    elif timed and ordered:
        typical = float(np.median(np.diff(times))) if len(times) > 1 else 1 / (rate or FALLBACK_RATE)
        last = packets.last_duration * time_base
        duration = float(times[-1]) + (last if 0 < last <= LONGEST_LAST_FRAME else typical)
        entries_dts = np.frombuffer(packets.entries_dts, np.int64)
        begin = float(stamps[0]) * time_base
        index = VideoIndex(
            stamps, times, keys, duration, problems, begin=begin, entries=entries, entries_dts=entries_dts
        )
    if index is None:
        index = counted_index(packets.count, rate, problems, timed)
    if promised is not None and promised < 1e7 and index.duration < 0.95 * promised - 0.5:
        problems.append(f"the header promises {promised:.1f} s, but only {index.duration:.1f} s are there")
    index.frame_pixels, index.seekable = frame_pixels, mp4
    return index


def declared_rate(container: Any, stream: Any) -> float | None:
    """Frames a second as the file says, or None where FFmpeg made its number up."""
    decoder_rate = float(getattr(stream.codec_context, "framerate", None) or 0)
    made_up = is_untimed(container)
    rate = decoder_rate if made_up else float(stream.guessed_rate or stream.average_rate or 0)
    return rate if PLAUSIBLE_RATES[0] <= rate <= PLAUSIBLE_RATES[1] else None


def is_untimed(container: Any) -> bool:
    """Whether the container holds no times, so that those of its packets are FFmpeg's invention."""
    return container.format.name in _UNTIMED or bool(_number(container.format.flags) & _NO_TIMESTAMPS)


class _Packets:
    """What the packets of a stream say: times, places to begin at, and whether frames may come out otherwise."""

    def __init__(self, codec: str, extradata: bytes | None):
        self.pts, self.entries, self.entries_dts, self.recovery = (array("q") for _ in range(4))
        self.count = self.untimed = self.last_duration = 0
        self.first_mark: int | None = None
        self.overlap = False  # decoding for a later part begins within the times of an earlier one: several edits
        self._begun_clean: bool | None = None
        self._stubs = self._known_start = False
        self._latest: int | None = None
        self._codec, self._start = codec, start_test(codec, extradata)
        self._later_pictures = False  # MPEG-4 pictures shown before the one ahead of them
        self._display_times = False

    @property
    def differ(self) -> bool:
        """Whether there may be other frames than packets, or at other times."""
        no_start = self._start is not None and not self._begun_clean
        return self._stubs or no_start or (self._later_pictures and not self._display_times)

    def add(self, packet: Any) -> None:
        self._display_times |= packet.pts != packet.dts
        if self._codec == "mpeg4":
            pictures = mpeg4_pictures(bytes(packet))
            # Two pictures in one packet, and an empty one to fill the gap: files of DivX and Xvid.
            self._stubs |= len(pictures) != 1 or packet.size <= MPEG4_STUB
            self._later_pictures |= 2 in pictures
        if packet.is_keyframe and packet.pts is not None:
            recovery = 0 if self._start is None else self._start(bytes(packet))
            if self.first_mark is None:
                self.first_mark, self._begun_clean = packet.pts, recovery == 0
            if recovery != NOT_CLEAN:
                self.overlap |= self._latest is not None and packet.pts < self._latest
                self.entries.append(packet.pts)
                self.entries_dts.append(packet.pts if packet.dts is None else packet.dts)
                self.recovery.append(recovery)
        if packet.is_discard:  # hidden by an edit list: decoded for others, not shown
            return
        self.count += 1
        if packet.pts is None:
            self.untimed += 1
            return
        if self._latest is None or packet.pts >= self._latest:
            self._latest, self.last_duration = packet.pts, packet.duration or 0
        self.pts.append(packet.pts)


def _recovered(stamps: np.ndarray, entries: np.ndarray, recovery: np.ndarray) -> np.ndarray:
    """Time stamps from which on each entry gives right frames; recovery counts reference pictures."""
    if len(stamps) == 0 or not recovery.any():
        return entries
    place = np.searchsorted(stamps, entries) + 4 * (recovery + 1)
    late = np.where(place < len(stamps), stamps[np.minimum(place, len(stamps) - 1)], np.iinfo(np.int64).max)
    return np.maximum.accumulate(np.where(recovery > 0, late, entries))


def _decoded_index(
    target: str | Path | bytes, name: str, rate: float | None, problems: list[str]
) -> VideoIndex | None:
    """Decode the whole video for the times of its frames; None where there is none."""
    import av.error

    found, count = array("d"), 0
    with open_stream(target, name) as (container, stream):
        decoder, times_of = decoder_of(stream), FrameTimes(container, stream)
        for packet in every_packet(packets_of(container, stream, [])):
            try:
                frames = decoder.decode(packet)
            except (av.error.FFmpegError, EOFError):
                continue
            for frame in frames:
                count += 1
                if (seconds := times_of.seconds(frame)) is not None:
                    found.append(seconds)
    if count == 0:
        return None
    times = np.frombuffer(found, np.float64)
    steps = np.diff(times)
    if len(times) < count or not (np.all(steps > 0) and np.all(steps <= LONGEST_GAP)):
        return counted_index(count, rate, problems, len(times) == count)
    typical = float(np.median(steps)) if count > 1 else 1 / (rate or FALLBACK_RATE)
    first, duration = float(times[0]), float(times[-1] - times[0]) + typical
    return VideoIndex(None, times - first, np.array([], np.int64), duration, problems, begin=first)


def counted_index(count: int, rate: float | None, problems: list[str], unusable: bool) -> VideoIndex:
    """Frames at a steady rate, for want of times."""
    if unusable:
        problems.append(f"its time stamps are not usable; {rate or FALLBACK_RATE:g} frames per second are assumed")
    elif rate is None:
        problems.append(f"it holds no times; {FALLBACK_RATE:g} frames per second are assumed")
    rate = rate or FALLBACK_RATE
    return VideoIndex(None, np.arange(count) / rate, np.array([], np.int64), count / rate, problems)


def every_packet(packets: Iterable[Any]) -> Iterator[Any | None]:
    """Packets for a decoder: None at the end, and no empty ones before, which FFmpeg would take for the end."""
    for packet in packets:
        if packet.size:
            yield packet
    yield None


class FrameTimes:
    """Times of the frames that a decoder gives, as FFmpeg guesses them.

    Display times, or decoding times where these are in better order, and always those in AVI, which has no others;
    without either a step after the frame before.
    """

    def __init__(self, container: Any, stream: Any):
        rate = declared_rate(container, stream)
        self._step = 1 / rate if rate else None
        self._untimed, self._decoding_times = is_untimed(container), container.format.name == "avi"
        self._tick = float(stream.time_base or 0) or self._step or 1 / FALLBACK_RATE
        self._latest = {"pts": -math.inf, "dts": -math.inf}
        self._faults = {"pts": 0, "dts": 0}
        self._seconds: float | None = None

    def seconds(self, frame: Any) -> float | None:
        """The frame's time, None where the file says nothing about it; call once for each frame, in order."""
        stamp, before = None if self._untimed else self._stamp(frame.pts, frame.dts), self._seconds
        if stamp is not None and (frame.dts is not None or before is None or stamp * self._tick > before):
            self._seconds = stamp * self._tick
            if before is not None and self._seconds > before:
                self._step = self._seconds - before
        elif self._step is not None:
            self._seconds = 0.0 if before is None else before + self._step
        return self._seconds

    def _stamp(self, pts: int | None, dts: int | None) -> int | None:
        if self._decoding_times:
            return dts
        for kind, stamp, other in (("dts", dts, pts), ("pts", pts, dts)):
            self._faults[kind] += stamp is not None and stamp <= self._latest[kind]
            if (latest := other if stamp is None else stamp) is not None:
                self._latest[kind] = latest
        in_order = self._faults["pts"] <= self._faults["dts"]
        return pts if pts is not None and (in_order or dts is None) else dts
