"""Opens a video file with PyAV (FFmpeg) and finds out which frames it has, without decoding any.

The first of two passes over the packets: `scan_video` reads time stamps only, so lengths come from packets that exist
and never from a header. `decode_frames` (frame_decoding.py) then decodes just the groups of pictures that hold a
wanted frame, each only up to the last one wanted.
"""

from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .frame_fitting import MAX_FRAME_PIXELS, check_frame_pixels
from .mp4_index import refuse_endless_index
from .video_source_names import without_secrets

FALLBACK_RATE = 25.0  # FFmpeg's own assumption for streams without any timing
PLAUSIBLE_RATES = (0.1, 1000.0)
LONGEST_GAP = 3600.0
"""Seconds between two frames beyond which time stamps count as damaged, and not the picture as standing still."""
LONGEST_LAST_FRAME = 60.0
NETWORK_TIMEOUT = (15.0, 60.0)  # seconds to connect, to wait for data
UNTIMED_SHARE = 0.1  # share of packets that may lack a time stamp before all of them are ignored
UNTIMED_SHARE_OF_FIELDS = 0.6  # interlaced broadcasts send every other field without a time stamp


@dataclass
class VideoIndex:
    """What `scan_video` found. N: number of frames in display order.

    `pts` int64 `(N,)` in units of the stream's time base, or None where the stream has no usable time stamps and
    frames are counted instead; `times` float64 `(N,)` seconds from the first frame; `keys` int64, time stamps of key
    frames; `duration` seconds; `frame_pixels` width times height as the header says; `seekable`: the file's own index
    says exactly where each packet is.
    """

    pts: np.ndarray | None
    times: np.ndarray
    keys: np.ndarray
    duration: float
    problems: list[str]
    frame_pixels: int = 0
    seekable: bool = False


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
    import av
    import av.error

    limits = {"max_pixels": str(MAX_FRAME_PIXELS)}
    is_url = isinstance(target, str)
    # The protocol is spelled out, so that no file name is read as another of FFmpeg's protocols.
    file = f"file:{target}" if isinstance(target, Path) else target
    file = BytesIO(target) if isinstance(target, bytes) else file
    try:
        container = av.open(
            file,
            mode="r",
            format=file_format,
            options={**(options or {}), **limits},
            metadata_errors="replace",
            timeout=timeout if is_url else None,
        )
    except av.error.FFmpegError as error:
        failed = _opening_error(error, name, is_url)
    else:
        failed = None
    if failed is not None:  # outside of `except`: FFmpeg's own error tells the address, and with it its password
        raise failed
    with container:
        videos = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not videos:
            kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
            reason = f"it contains only {' and '.join(kinds)}" if kinds else "it contains no streams"
            raise ValueError(f"{name}: there is no video in this file, {reason}")
        stream = videos[0]
        if stream.codec_context is None:
            raise ValueError(f"{name}: the video's codec is not supported by the installed FFmpeg")
        check_frame_pixels(stream.codec_context.width, stream.codec_context.height, name)
        stream.codec_context.options = limits  # frame size may still change in the middle of the stream
        stream.thread_type = "SLICE"  # frame threads would delay frames, and skip_frame with them
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Whether a "video" stream is the cover picture of a music file."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


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
    """Read the time stamps of all packets without decoding any.

    Raises:
        ValueError: there is not one video packet; and what `open_stream` raises.
    """
    problems: list[str] = []
    refuse_endless_index(target, name)
    with open_stream(target, name) as (container, stream):
        time_base = float(stream.time_base or 0) or 1 / FALLBACK_RATE
        rate = float(stream.guessed_rate or stream.average_rate or 0)
        rate = rate if PLAUSIBLE_RATES[0] <= rate <= PLAUSIBLE_RATES[1] else FALLBACK_RATE
        promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        container_name, codec_name = container.format.name, stream.codec_context.name
        frame_pixels = stream.codec_context.width * stream.codec_context.height
        pts, keys, untimed, count, latest, last_duration = array("q"), array("q"), 0, 0, None, 0
        for packet in packets_of(container, stream, problems):
            if packet.size == 0 or packet.is_discard:  # the final flush; frames an edit list hides
                continue
            count += 1
            if packet.pts is None:
                untimed += 1
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            if latest is None or packet.pts >= latest:
                latest, last_duration = packet.pts, packet.duration or 0
            pts.append(packet.pts)
    if count == 0:
        raise ValueError(f"{name}: the video stream is empty, not one frame could be read")

    key_array, stamps = np.frombuffer(keys, np.int64), np.unique(np.frombuffer(pts, np.int64))
    if len(key_array):
        stamps = stamps[stamps >= key_array[0]]  # what precedes the first key frame cannot be decoded
    times = (stamps - stamps[:1]) * time_base
    # AVI stores no display times; where frames are reordered those of FFmpeg are decoding times.
    reordered_avi = container_name == "avi" and codec_name == "h264"
    fields = container_name == "mpegts" and codec_name == "h264"
    timed = (
        not reordered_avi
        and len(stamps) > 0
        and untimed <= (UNTIMED_SHARE_OF_FIELDS if fields else UNTIMED_SHARE) * count
    )
    if timed and bool(np.all(np.diff(key_array) > 0)) and bool(np.all(np.diff(times) <= LONGEST_GAP)):
        typical = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
        last = last_duration * time_base
        index = VideoIndex(
            stamps,
            times,
            key_array,
            float(times[-1]) + (last if 0 < last <= LONGEST_LAST_FRAME else typical),
            problems,
        )
    else:
        if timed:
            problems.append(f"its time stamps are not usable; {rate:g} frames per second are assumed")
        index = VideoIndex(None, np.arange(count) / rate, key_array, count / rate, problems)
    if promised is not None and promised < 1e7 and index.duration < 0.95 * promised - 0.5:
        problems.append(f"the header promises {promised:.1f} s, but only {index.duration:.1f} s are there")
    index.frame_pixels, index.seekable = frame_pixels, "mp4" in container_name.split(",")
    return index
