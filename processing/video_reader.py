"""The video reader: `open_video` turns anything that is a video into chunks of frames with their times."""

import hashlib
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .frame_decoding import decode_frames
from .frame_fitting import check_resize, fit_frame
from .frame_sampling import Sampling
from .frame_times import Cue
from .picture_sources import (
    PictureSource,
    is_image_bytes,
    is_image_file,
    is_picture,
    refuse_ambiguous_array,
    split_array,
)
from .video_decoding import VideoIndex, open_stream, scan_video
from .video_playlists import LocalCopy, is_playlist
from .video_source_names import address_to_open, check_source, is_address, list_directory, local_path, shown_name
from .video_subtitles import choose_track, track_cues


@dataclass(frozen=True)
class FrameChunk:
    """Frames that follow one another: `pixels` uint8 `(n, h, w, 3)` RGB, `timestamps` float64 `(n,)` seconds.

    A time stamp is the moment at which the frame itself is first shown, counted from the first frame of the video.
    """

    pixels: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


class FrameReader:
    """Sampled frames of one video, read chunk by chunk; made by `open_video`.

    Nothing is opened before frames (or `duration`, `expected_frames`) are asked for, so a reader can be sent to
    another process first. `chunks` may be called again: it starts over.

    Attributes:
        name: what to call the video in messages.
        warnings: what was wrong with the video, so far as it has been read.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        size: tuple[int, int] | None,
        resize_mode: str,
        file: str | Path | bytes | None = None,
        pictures: PictureSource | None = None,
    ):
        self.name = name
        self.sampling = sampling
        self.size = size
        self.resize_mode = resize_mode
        self.warnings: list[str] = []
        self._file = file
        self._pictures = pictures
        self._scanned: tuple[VideoIndex, np.ndarray] | None = None  # and the frames wanted
        self._running: list[Generator[FrameChunk, None, None]] = []
        self._copy: LocalCopy | None = None

    def __enter__(self) -> "FrameReader":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[FrameChunk]:
        return self.chunks()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": [], "_copy": None}

    def resampled(self, **changes: Any) -> "FrameReader":
        """Another reader of this video, its sampling differing in `changes`; what was scanned is not scanned again.

        Raises:
            ValueError: a setting is out of range.
        """
        sampling = replace(self.sampling, **changes)
        other = FrameReader(self.name, sampling, self.size, self.resize_mode, self._file, self._pictures)
        if self._scanned is not None and self._pictures is None:  # the times of pictures depend on the sampling
            index, _ = self._scanned
            other.warnings, other._copy = list(self.warnings), self._copy
            other._scanned = index, sampling.choose(index.times, index.duration, self.name)
        return other

    def close(self) -> None:
        """Close the file, ending unfinished `chunks`. A reader that was read to its end is closed already."""
        for running in self._running:
            running.close()
        self._running = []

    @property
    def duration(self) -> float:
        """Seconds the whole video lasts, from its packets (its header is not trusted)."""
        return self._scan()[0].duration

    @property
    def expected_frames(self) -> int:
        """Number of frames `chunks` will give in all; fewer come only where the file is damaged."""
        return len(self._scan()[1])

    @property
    def frame_times(self) -> np.ndarray:
        """Seconds at which the sampled frames are shown, `(expected_frames,)` float64."""
        index, chosen = self._scan()
        return index.times[np.minimum(chosen, len(index.times) - 1)]

    @property
    def file(self) -> Path | None:
        """Where the video is, if it is a file."""
        return self._file if isinstance(self._file, Path) else None

    def text_track(self) -> list[Cue] | None:
        """What the video's own subtitles say, in seconds from its first frame; None where it has none in text."""
        if self._file is None:
            return None
        begin = self._scan()[0].begin
        with open_stream(self._readable(), self.name) as (container, _):
            track, remark = choose_track(container)
            self._report([remark] if remark else [])
            return None if track is None else track_cues(container, track, begin)

    def _scan(self) -> tuple[VideoIndex, np.ndarray]:
        if self._scanned is None:
            if self._pictures is not None:
                # Pictures have no times of their own: they are taken as already sampled at `fps`.
                times = np.arange(len(self._pictures)) / (self.sampling.fps or 1.0)
                index = VideoIndex(None, times, np.array([]), len(times) / (self.sampling.fps or 1.0), [])
            else:
                index = scan_video(self._readable(), self.name)
                index.problems.extend(self._copy.problems if self._copy else [])
            self._scanned = index, self.sampling.choose(index.times, index.duration, self.name)
            self._report(index.problems)
        return self._scanned

    def _readable(self) -> str | Path | bytes:
        """What to decode: the file, or a copy of what would be fetched piece by piece."""
        assert self._file is not None, "pictures are not decoded"
        if not is_playlist(self._file):
            return self._file
        self._copy = self._copy or LocalCopy(self._file)
        return self._copy.path or self._file

    def _report(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self.warnings:
                self.warnings.append(problem)
                warnings.warn(f"{self.name}: {problem}", stacklevel=3)

    def content_digest(self) -> str | None:
        """SHA-256 of the video's file or bytes; None for addresses, folders and pictures."""
        if isinstance(self._file, bytes):
            return hashlib.sha256(self._file).hexdigest()
        if not isinstance(self._file, Path):
            return None
        digest = hashlib.sha256()
        with self._file.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def chunks(
        self,
        n: int = 32,
        skip: int = 0,
        threads: int | None = None,
        turn: tuple[int, int] = (0, 1),
        places: Sequence[int] | None = None,
    ) -> Iterator[FrameChunk]:
        """Yield the sampled frames in chunks of `n` (the last may be shorter).

        Files are decoded in threads ahead of what has been asked for; how far ahead, and so the memory, is bounded
        whatever the video's length.

        Args:
            skip: leave out so many frames at the beginning, which have been read before; a video that has no more
                gives no chunk.
            threads: decode with at most so many (default: as many as PyTorch uses); 0 decodes when asked.
            turn: where several readers of a video take turns, which of how many this one is: (1, 3) gives the chunks
                1, 4, 7, … and decodes no others; pictures are all looked at. A turn may bring no chunk.
            places: of the sampled frames only these, by their numbers from 0; no others are decoded than these need.

        Raises:
            ValueError: not one frame can be read, or the video cannot be read at all (see `open_video`).
        """
        if n < 1:
            raise ValueError(f"a chunk must have at least 1 frame, not {n}")
        if skip < 0:
            raise ValueError(f"skip must be at least 0 frames, not {skip}")
        if not 0 <= turn[0] < turn[1]:
            raise ValueError(f"turn {turn[0]} is not one of {turn[1]}")
        running = self._chunks(n, skip, torch.get_num_threads() if threads is None else threads, turn, places)
        self._running.append(running)
        return running

    def _chunks(
        self, n: int, skip: int, threads: int, turn: tuple[int, int], places: Sequence[int] | None
    ) -> Generator[FrameChunk, None, None]:
        index, chosen = self._scan()
        problems: list[str] = []
        own = (np.arange(len(chosen)) - skip) // n % turn[1] == turn[0]
        own[:skip] = False
        if places is not None:
            own &= np.isin(np.arange(len(chosen)), np.asarray(places, dtype=np.int64))
        wanted = int(own.sum())
        if wanted == 0 and (skip or turn[1] > 1 or places is not None):
            return
        frames = self._fitted_frames(index, chosen, skip, own, threads, problems)
        size = self.size
        pixels, times, count = [], [], 0
        try:
            for fitted, number in frames:
                size = size or fitted.shape[:2]  # without a given size, all frames get that of the first
                pixels.append(fit_frame(fitted, size, self.resize_mode))
                times.append(index.times[min(number, len(index.times) - 1)])
                count += 1
                if len(pixels) == n:
                    yield FrameChunk(np.stack(pixels), np.array(times))
                    pixels, times = [], []
            if pixels:
                yield FrameChunk(np.stack(pixels), np.array(times))
        finally:
            frames.close()
        if 0 < count < wanted:
            before = skip if turn[1] == 1 else 0
            problems.append(f"only {count + before} of {wanted + before} frames could be read")
        self._report(problems)
        if count + skip == 0 and turn[1] == 1:
            reason = f" ({'; '.join(self.warnings)})" if self.warnings else ""
            raise ValueError(f"{self.name}: not one frame could be decoded{reason}")

    def _fitted_frames(
        self, index: VideoIndex, wanted: np.ndarray, skip: int, own: np.ndarray, threads: int, problems: list[str]
    ) -> Generator[tuple[np.ndarray, int], None, None]:
        """Those of the sampled frames that are `own`, in the size wanted, each with its number; those of files are
        decoded ahead, in threads."""

        def fit(pixels: np.ndarray) -> np.ndarray:
            return fit_frame(pixels, self.size, self.resize_mode)

        if self._pictures is None:
            return decode_frames(
                self._readable(),
                self.name,
                index,
                wanted,
                problems,
                own=own,
                fit=fit,
                fitted_pixels=None if self.size is None else self.size[0] * self.size[1],
                threads=threads,
            )

        # An unreadable picture takes up no frame: only counting those that come finds the place again.
        pictures = self._pictures.read(wanted, problems)
        return ((fit(pixels), number) for (pixels, number), mine in zip(pictures, own, strict=False) if mine)

    def read(self) -> FrameChunk:
        """All sampled frames at once, as one chunk."""
        chunks = list(self.chunks())
        return FrameChunk(np.concatenate([c.pixels for c in chunks]), np.concatenate([c.timestamps for c in chunks]))


def open_video(
    source: Any,
    *,
    fps: float | None = 1.0,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    max_frames: int | None = None,
    size: tuple[int, int] | None = None,
    resize_mode: str = "squash",
) -> FrameReader:
    """Open a video for reading frames at a steady rate.

    Args:
        source: path of a video or image file; http(s) address; bytes of such a file; directory of images (in natural
            order); a list of pictures (PIL images, arrays, image paths); an array or tensor `(F, H, W, 3)` or
            `(F, 3, H, W)` (grey: 1 instead of 3), uint8 or floating point within 0..1; one picture (a video of one
            frame); a dict with "path" or "bytes" as `datasets.Video(decode=False)` gives. Pictures count as already
            sampled: all are taken, `fps` apart, unless `num_frames` or `max_frames` says otherwise. Of a file with
            several videos, the film is read: neither cover nor preview, marked as default, the largest. Frames come
            upright, with square pixels, HDR tone-mapped to SDR, and transparent parts on black.
        fps: frames per second to look at: the frame on screen at `start`, `start + 1/fps`, ...
        num_frames: look at so many frames spread evenly instead; takes the place of `fps`.
        start, end: seconds from the first frame; `end` is not included.
        max_frames: at most so many frames, spread evenly where `fps` would give more.
        size: `(height, width)` in pixels of the frames to give; None keeps that of the first frame.
        resize_mode: "squash", "crop" or "pad" (see `fit_frame`).

    Raises:
        FileNotFoundError: no such file, directory or address.
        ConnectionError: a server does not answer.
        ValueError: a setting is out of range, or the source is no video. Files are opened on the first read, so
            damage in them (no video stream, no frame to decode, frames too large, ...) is raised then.
    """
    sampling = Sampling(fps=fps, num_frames=num_frames, start=start, end=end, max_frames=max_frames)
    size = check_resize(size, resize_mode)
    name, file, pictures = _classify(source)
    return FrameReader(name, sampling, size, resize_mode, file=file, pictures=pictures)


def _classify(source: Any) -> tuple[str, str | Path | bytes | None, PictureSource | None]:
    """Tell what a source is: `(name, file to decode or None, pictures or None)`."""
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            name, file, pictures = _classify(source["bytes"])
            return (shown_name(source["path"]) if source.get("path") else name), file, pictures
        if source.get("path") is not None:
            return _classify(source["path"])
        raise ValueError("a video given as a dict needs 'path' or 'bytes'")
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise ValueError("the video is empty (0 bytes)")
        name = f"<{len(data)} bytes>"
        return (name, None, PictureSource([data], name)) if is_image_bytes(data) else (name, data, None)
    if is_address(source):
        check_source(source)
        return shown_name(source), address_to_open(source), None
    if isinstance(source, str | os.PathLike):
        return _classify_path(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        refuse_ambiguous_array(source, f"<array of shape {tuple(source.shape)}>")
    if is_picture(source):
        name = f"<image {source.size[0]}x{source.size[1]}>" if isinstance(source, Image.Image) else "<image array>"
        return name, None, PictureSource([source], name)
    if isinstance(source, np.ndarray | torch.Tensor):
        name = f"<array of shape {tuple(source.shape)}>"
        return name, None, PictureSource(split_array(source, name), name)
    if isinstance(source, list | tuple):
        name = f"<list of {len(source)} frames>"
        frames = [local_path(frame) if isinstance(frame, str | os.PathLike) else frame for frame in source]
        for frame in frames:
            if not (is_picture(frame) or isinstance(frame, Path | bytes)):
                raise ValueError(f"{name}: a frame must be an image, not {type(frame).__name__}")
        return name, None, PictureSource(frames, name)
    raise ValueError(
        "a video must be a path, an address, bytes, a list of images, an array or a tensor, "
        f"not {type(source).__name__}"
    )


def _classify_path(source: str | os.PathLike[str]) -> tuple[str, Path | None, PictureSource | None]:
    check_source(source)
    path, name = local_path(source), shown_name(source)
    if path.is_dir():
        return name, None, PictureSource(list_directory(path), name, skip_unreadable=True)
    if is_image_file(path):
        return name, None, PictureSource([path], name)
    return name, path, None
