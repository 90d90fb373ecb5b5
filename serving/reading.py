"""The thread that reads: queued videos one after the other, in turns with the questions, resumably."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..modeling_video_ma2mba.answering_questions import video_prefix
from ..modeling_video_ma2mba.reading_resumable import read_resumably
from ..modeling_video_ma2mba.state_identity import identity_facts, record_source, source_facts
from ..modeling_video_ma2mba.state_video import VideoState
from ..processing.frame_fitting import fit_frame
from ..processing.frame_times import TimedChunk
from ..processing.picture_sources import file_pixels
from ..processing.video_decoding import open_container
from ..processing.video_reader import FrameChunk
from ..processing.video_source_names import without_secrets
from ..streaming.turns import Turns
from .answering import StateCache
from .errors import BadRequest, Conflict, NotThere, TooLarge, error_of
from .store import Video, VideoStore

SAMPLING = ("fps", "num_frames", "start", "end", "max_frames")
FORMATS = (
    "3g2,3gp,apng,asf,av1,avi,dv,flv,gif,h264,hevc,ivf,jpeg_pipe,live_flv,m4v,matroska,mj2,mjpeg,mov,mp4,mpeg,mpegts,"
    "mpegvideo,mxf,nut,obu,ogg,png_pipe,rm,vc1,webm,webp_pipe,wtv,yuv4mpegpipe"
)
"""FFmpeg's containers that an upload may be: all hold their own pictures, and name no other file or address."""
_NOTED = 0.5  # seconds between two notes of how far a reading is


class _Stopped(Exception):
    """Nobody wants the reading any more, or the server stops."""


@dataclass(frozen=True)
class Limits:
    """What may be read: seconds of a video, frames of it."""

    seconds: float = 86400.0
    frames: int = 200_000


class Reader:
    """Reads videos of a store into states.

    Args:
        pipe: the question-answering pipeline. cache: is given what was read.
        save_seconds: between two saves of an unfinished state.
        read: called with the number of frames of each chunk.
    """

    def __init__(
        self,
        pipe: Any,
        store: VideoStore,
        turns: Turns,
        cache: StateCache,
        limits: Limits,
        save_seconds: float = 10.0,
        read: Callable[[int], None] = lambda frames: None,
    ):
        self.model, self.processor = pipe.model, pipe.processor
        self.store, self.turns, self.cache, self.limits = store, turns, cache, limits
        self.save_seconds, self._read = save_seconds, read
        self.identity = identity_facts(self.model, self.processor)
        self.prefix = video_prefix(self.processor)
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to read."""
        self._wake.set()

    def close(self, seconds: float = 10.0) -> None:
        """Stop; a reading that is under way goes on when the server starts again."""
        self._closing = True
        self._wake.set()
        self._thread.join(seconds)

    def key(self, base: str, prefix: Sequence[int], kind: str, digest: str, sampling: dict[str, Any]) -> str:
        """Tells readings apart: by model, by what was read before, by content and sampling."""
        own = [self.identity[name] for name in ("model_config", "weights", "processor", "dtype")]
        chosen = [sampling.get(name) for name in SAMPLING]
        if kind == "video" and chosen[0] is None and chosen[1] is None:
            defaults = self.processor.video_processor
            chosen[:2] = [None, defaults.num_frames] if defaults.num_frames else [defaults.fps, None]
        if told := sampling.get("subtitles"):
            chosen.append(told)
        return hashlib.sha256(json.dumps([own, base, list(prefix), kind, digest, chosen]).encode()).hexdigest()

    def state_of(self, video: Video) -> VideoState:
        """What was read of a video, where the model computes.

        Raises:
            Conflict: it was not read yet, or by another model. NotThere: it has made room for others.
        """
        if video.status != "completed" or not video.bytes:
            raise Conflict(f"{video.id} has not been read: it is {video.status}, with {video.frames} frames")

        def load() -> VideoState:
            try:
                state = VideoState.load(self.store.state_file(video))
                self.model.check_state(state, self.processor)
            except FileNotFoundError:
                raise NotThere(f"there is no video {video.id!r} any more: it has made room for others") from None
            except ValueError as error:
                raise Conflict(str(error).replace(str(self.store.folder), "…")) from None
            return self._placed(state)

        return self.cache.get((video.id, video.version), load)

    def _placed(self, state: VideoState) -> VideoState:
        weight = self.model.get_input_embeddings().weight
        return state.to(self.model.device, weight.dtype)

    def take_state(self, video: Video, file: Path) -> Video:
        """Make a file, uploaded as a state, the state of a video.

        Raises:
            BadRequest: it is damaged, no state, or of another model or processor.
        """
        try:
            state = VideoState.load(file)
            self.model.check_state(state, self.processor)
            if state.batch_size != 1:
                raise ValueError(f"the state has {state.batch_size} rows: a video has one")
            _check_facts(state.metadata)
        except ValueError as error:
            raise BadRequest(str(error).replace(repr(str(file)), "the uploaded file")) from None
        with self.store.lock(video, 30.0) as mine:
            if not mine:
                raise Conflict(f"{video.id} is being read: wait for its end")
            return self.store.finish(self.store.get(video.id), state, key="")

    # frames added one by one

    def append(self, video: Video, name: str, frames: Iterator[FrameChunk], fps: float) -> Video:
        """Read more frames into a video's state; returns when it is saved.

        Raises:
            Conflict: it is being read by somebody else. BadRequest: the frames cannot be read.
        """
        with self.store.lock(video, 60.0) as mine:
            if not mine:
                raise Conflict(f"{video.id} is being read: wait for its end")
            video = self.store.get(video.id)
            if video.status not in ("completed", "failed"):
                raise Conflict(f"{video.id} is {video.status}: wait until it was read")
            before = self.state_of(video) if video.bytes else None
            metadata = {} if before is None else dict(before.metadata)
            prefix = self.prefix if before is None else self.prefix[:, -1:]
            began = time.monotonic()
            count = 0

            text, begin = self.processor.frame_text(), float(metadata.get("seconds", 0))
            last = float(metadata["frame_time"]) if "frame_time" in metadata else None

            def counted() -> Iterator[TimedChunk]:
                nonlocal count, last
                for chunk in self._in_turns(frames):
                    count += len(chunk)
                    if video.frames + count > self.limits.frames:
                        raise TooLarge(f"{video.id}: it has more than {self.limits.frames} frames")
                    seconds = begin + chunk.timestamps
                    yield TimedChunk(chunk.pixels, seconds, text.texts(seconds, last))
                    last = float(seconds[-1])
                    self._read(len(chunk))

            try:
                state = self.model.read(prefix, [counted()], before)
            except ValueError as error:
                raise BadRequest(without_secrets(str(error))) from None
            state.metadata |= self.identity
            state.metadata["seconds"] = metadata.get("seconds", "0")
            source = {"name": name, "sha256": None, "fps": fps, **dict.fromkeys(SAMPLING[1:])}
            record_source(state.metadata, metadata, source, count / fps)
            spent = video.read_seconds + time.monotonic() - began
            kept = self.store.finish(video, state, key="", expected=None, read_seconds=spent)
            self.cache.put((kept.id, kept.version), self._placed(state))
            return kept

    def pictures(self, files: Sequence[bytes], names: Sequence[str], fps: float) -> Iterator[FrameChunk]:
        """Pictures as frames, decoded one chunk at a time; raises ValueError where one is none, or too large."""
        size = self.processor.video_processor.size
        most = self.model.config.read_chunk_frames
        for start in range(0, len(files), most):
            fitted = [
                fit_frame(file_pixels(file, name), (size["height"], size["width"]), self._resize_mode)
                for file, name in zip(files[start : start + most], names[start : start + most], strict=True)
            ]
            yield FrameChunk(np.stack(fitted), (start + np.arange(len(fitted))) / fps)

    @property
    def _resize_mode(self) -> str:
        return self.processor.video_processor.resize_mode

    def film(self, file: Path, name: str, sampling: dict[str, Any], timed: bool = True, subtitles: Any = None) -> Any:
        """A reader of a video file that keeps to the limits.

        Args:
            timed: give time stamps between the frames to a model that reads them, and `subtitles` ("auto" or cues).

        Raises:
            BadRequest: it is no video, or of a kind that names other files. TooLarge: it is too long.
        """
        try:
            check_container(file, name)
            reader = self.processor.video_processor.open(str(file), **sampling)
            reader.name = name
            reader = self.processor.timed(reader, subtitles) if timed else reader
            seconds, frames = reader.duration, reader.expected_frames
        except (OSError, ValueError) as error:
            raise BadRequest(str(error).replace(str(file), name)) from None
        if seconds > self.limits.seconds:
            raise TooLarge(
                f"{name}: it lasts {seconds:.0f} s, and this server reads up to {self.limits.seconds:.0f} s"
            )
        if frames > self.limits.frames:
            raise TooLarge(f"{name}: {frames} frames are more than {self.limits.frames}: choose a lower fps")
        return reader

    # queued videos

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            read_one = False
            for video in self.store.waiting():
                if self._closing:
                    return
                with self.store.lock(video) as mine:
                    if mine:
                        read_one = True
                        self._read_queued(video)
                        break  # the queue may look different now
            if not read_one:
                self.store.forget_abandoned()
                self._wake.wait(0.5)  # another process may have left something behind

    def _read_queued(self, video: Video) -> None:
        """Read one; what is wrong with it is told by its status."""
        try:
            video = self.store.get(video.id)
            if video.status not in ("queued", "in_progress"):
                return
            self._read_video(video)
        except _Stopped:
            with suppress(NotThere):
                self.store.update(video, status="queued")
        except NotThere:  # deleted meanwhile
            pass
        except Exception as error:
            told = BadRequest(str(error)) if isinstance(error, ValueError) else error_of(error)
            if told.status == 500:
                import traceback

                traceback.print_exception(error)
            text = without_secrets(str(told)).replace(str(self.store.folder), "…")
            with suppress(NotThere):
                self.store.update(video, status="failed", error=text[:600], error_code=told.code)
                for file in (self.store.source_file(video), self.store.partial_file(video)):
                    file.unlink(missing_ok=True)

    def _read_video(self, video: Video) -> None:
        began = time.monotonic()
        spent = video.read_seconds
        settings, file = video.settings, self.store.source_file(video)
        twin = self.store.of_key(video.owner, video.key) if video.key else None
        if twin is not None and twin.status == "completed" and twin.bytes:
            with suppress(NotThere, Conflict):
                self.store.finish(video, self.state_of(twin), expected=twin.frames, read_seconds=0.0)
                return
        base = self.store.get(settings["base"], video.owner) if settings.get("base") else None
        before = None if base is None else self.state_of(base)
        metadata = {} if before is None else dict(before.metadata)
        prefix = torch.tensor([settings["prefix"]]) if settings.get("prefix") else self.prefix
        if settings.get("kind") == "image":
            pixels = file_pixels(file.read_bytes(), video.name)
            reader = self.processor.video_processor.open(pixels, num_frames=1)
            reader.name = video.name
        else:
            sampling = {n: v for n, v in settings.items() if n in SAMPLING}
            reader = self.film(file, video.name, sampling, subtitles=settings.get("subtitles"))
        earlier = int(metadata.get("frames", 0))
        video = self.store.update(
            video, status="in_progress", expected=earlier + reader.expected_frames, fps=reader.sampling.fps
        )
        noted = time.monotonic()

        def on_frames(count: int) -> None:
            nonlocal noted, video
            if time.monotonic() - noted < _NOTED:
                return
            noted = time.monotonic()
            video = self.store.update(video, frames=earlier + count, read_seconds=spent + noted - began)

        def wanted() -> bool:
            return not self._closing and (video.lease is None or video.lease > time.time())

        source = source_facts(reader)
        request = {"video": video.id, "weights": self.identity["weights"]}
        paced = _InTurns(reader, self, wanted)
        try:
            state = read_resumably(
                self.model,
                prefix,
                paced,
                before,
                partial=self.store.partial_file(video),
                request=request,
                save_seconds=self.save_seconds,
                on_frames=on_frames,
            )
        finally:
            reader.close()
        state.metadata |= self.identity
        record_source(state.metadata, metadata, source, reader.duration)
        seconds = spent + time.monotonic() - began
        kept = self.store.finish(video, state, read_seconds=seconds)
        self.cache.put((kept.id, kept.version), self._placed(state))

    def _in_turns(
        self, chunks: Iterator[FrameChunk], wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[FrameChunk]:
        """Chunks, each with the model to itself until the next is asked for."""
        for chunk in chunks:
            if not wanted():
                raise _Stopped
            with self.turns.turn():
                yield chunk


class _InTurns:
    """A reader whose chunks take turns with the questions, as long as the reading is wanted."""

    def __init__(self, reader: Any, owner: Reader, wanted: Callable[[], bool]):
        self.reader, self.owner, self.wanted = reader, owner, wanted
        self.name = reader.name

    @property
    def after(self) -> float | None:
        """As of a `FrameReader`."""
        return self.reader.after

    @after.setter
    def after(self, seconds: float | None) -> None:
        self.reader.after = seconds

    def chunks(self, n: int = 32, skip: int = 0) -> Iterator[FrameChunk]:
        """As of a `FrameReader`."""
        for chunk in self.owner._in_turns(self.reader.chunks(n, skip=skip), self.wanted):
            yield chunk
            self.owner._read(len(chunk))


def _check_facts(metadata: dict[str, str]) -> None:
    """See that what a state says of its video are numbers. Raises ValueError."""
    for name in ("frames", "seconds", "fps", "frame_time"):
        text = metadata.get(name, "None")
        try:
            if text != "None" and not 0 <= (int(text) if name == "frames" else float(text)) < 2**53:
                raise ValueError
        except ValueError:
            raise ValueError(f"the state says {name} = {text!r:.40}, which is no number of at least 0") from None


def check_container(file: Path, name: str) -> None:
    """See that an upload is a video that holds its own pictures, by FFmpeg's own judgement of its content.

    Playlists and the like name other files and addresses, which FFmpeg would open.

    Raises:
        ValueError: it is not.
    """
    import av.error

    try:
        with open_container(f"file:{file}", None, {"format_whitelist": FORMATS, "protocol_whitelist": "file"}):
            pass
    except av.error.FFmpegError:
        raise ValueError(
            f"{name}: this is no video that can be uploaded: send mp4, mkv, webm, mov, avi, ts or gif"
        ) from None
