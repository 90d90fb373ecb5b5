"""What can be watched: tells from what the user names how to open it, and what a break in it means."""

import os
import select
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processing.video_source_names import address_to_open, is_address, local_path, shown_name

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class LiveSource:
    """How to open a source.

    Attributes:
        name: what to call it in messages and in a state's metadata; holds no password.
        kind: "camera", "address", "pipe", "file", "growing file" or "frames".
        target: device, address, path, file descriptor, or iterable of frames.
        file_format, options: for FFmpeg.
    """

    name: str
    kind: str
    target: Any = field(repr=False)  # an address has its password
    file_format: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def may_drop(self) -> bool:
        """Whether it may break off and be there again later."""
        return self.kind in ("camera", "address")

    def readable(self, stop: threading.Event, patience: float) -> Any:
        """What `open_stream` takes; an object with `read` comes back empty-handed once `stop` is set.

        Args:
            patience: seconds without a new byte after which a growing file has ended.
        """
        if self.kind == "pipe":
            return _Pipe(self.target, stop)
        if self.kind == "growing file":
            return _GrowingFile(self.target, stop, patience)
        return self.target


def find_source(source: Any, follow: bool = False) -> LiveSource:
    """Tell what a source is.

    Args:
        source: number of a camera (or the digits as text); an address FFmpeg opens (`rtsp://`, `http://`, ...); "-"
            for standard input; a path of a file, a device or a named pipe; an iterable of frames, each an image, an
            array `(H, W, 3)`, a pair `(image, seconds)`, or an object with `pixels` and `timestamps`; a `LiveSource`.
        follow: the file is still being written.

    Raises:
        FileNotFoundError: no such file or camera.
        ValueError: an address of another kind, or nothing that can be watched.
    """
    if isinstance(source, LiveSource):
        return source
    if isinstance(source, int) or (isinstance(source, str) and source.isdecimal()):
        return _camera(int(source))
    if isinstance(source, str) and source == "-":
        return LiveSource("standard input", "pipe", sys.stdin.fileno())
    if is_address(source):
        scheme = source.split("://", 1)[0].lower()
        if scheme not in SCHEMES:
            raise ValueError(f"addresses of the kind {scheme}:// cannot be watched; use one of {', '.join(SCHEMES)}")
        options = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}  # UDP loses packets without a word
        return LiveSource(shown_name(source), "address", address_to_open(source), options=options)
    if isinstance(source, str | os.PathLike):
        return _from_path(local_path(source), shown_name(source), follow)
    if isinstance(source, Iterable) and not isinstance(source, bytes | dict):
        return LiveSource("<frames>", "frames", source)
    raise ValueError(
        "a source must be a camera's number, an address, a path, '-' or an iterable of frames, "
        f"not {type(source).__name__}"
    )


def _camera(number: int) -> LiveSource:
    name = f"camera {number}"
    if sys.platform == "darwin":
        return LiveSource(name, "camera", f"{number}:none", "avfoundation", {"framerate": "30"})
    if not sys.platform.startswith("linux"):
        raise ValueError(f"{name}: cameras are known by number on Linux and macOS only; give an address or a pipe")
    device = Path(f"/dev/video{number}")
    if not device.exists():
        found = sorted(path.name.removeprefix("video") for path in Path("/dev").glob("video[0-9]*"))
        raise FileNotFoundError(f"{name}: there is no such camera (cameras here: {', '.join(found) or 'none'})")
    return LiveSource(name, "camera", str(device), "video4linux2")


def _from_path(path: Path, name: str, follow: bool) -> LiveSource:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}: no such file")
    if path.is_char_device():
        return LiveSource(name, "camera", str(path), "video4linux2")
    if path.is_fifo():
        return LiveSource(name, "pipe", os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    if path.is_dir():
        raise ValueError(f"{name}: a directory cannot be watched; name a file, or use `ask` for a folder of images")
    return LiveSource(name, "growing file" if follow else "file", path)


class _Pipe:
    """Bytes of a file descriptor; waiting for them can be stopped."""

    def __init__(self, descriptor: int, stop: threading.Event):
        self._descriptor = descriptor
        self._stop = stop

    def read(self, size: int) -> bytes:
        while not self._stop.is_set():
            # Windows waits for sockets only: there a read begins at once, and ends with the next bytes.
            if os.name == "nt" or select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
                return os.read(self._descriptor, size)
        return b""


class _GrowingFile:
    """Bytes of a file that somebody else is writing; ends when nothing was added for `patience` seconds."""

    def __init__(self, path: Path, stop: threading.Event, patience: float):
        self._file = path.open("rb")
        self._stop = stop
        self._patience = patience

    def read(self, size: int) -> bytes:
        waited = 0.0
        while not (data := self._file.read(size)) and waited < self._patience and not self._stop.wait(_POLL_SECONDS):
            waited += _POLL_SECONDS
        return data

    def close(self) -> None:
        self._file.close()
