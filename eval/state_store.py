"""States of videos that were read, found again by content: a video is read once for all its questions.

A few states stay in memory; by request they are kept on disk as well, where later runs and other processes find them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from ..modeling_video_ma2mba.state_video import VideoState
from .media import Medium, frames_of_folder, subtitles_digest, subtitles_of
from .ranks import everyone

_IDENTITY = ("weights", "model_config", "processor", "dtype")
_SECONDS = "eval_read_seconds"  # entry of a state's metadata: what reading it took


@dataclass
class Reading:
    """How frames are chosen. `num_frames` (evenly spread) takes the place of `fps`; `max_frames` limits `fps`.

    `folder_fps`: so many pictures a second are in a folder of pictures (MVBench's episodic reasoning has 3).
    `subtitles`: "auto" reads a video's subtitles between its frames, None or "off" does not.
    """

    fps: float = 1.0
    num_frames: int | None = None
    max_frames: int | None = None
    folder_fps: float = 3.0
    subtitles: str | None = None

    def __post_init__(self) -> None:
        if self.subtitles == "off":
            self.subtitles = None
        if self.subtitles not in (None, "auto"):
            raise ValueError(f"subtitles={self.subtitles}: must be auto or off")
        for name, value in asdict(self).items():
            if name != "subtitles" and value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be more than 0")

    @property
    def chosen(self) -> dict[str, Any]:
        """Settings for the pipeline."""
        rate = {"fps": self.fps} if self.num_frames is None else {"num_frames": self.num_frames}
        return rate if self.max_frames is None else {**rate, "max_frames": self.max_frames}

    @property
    def facts(self) -> dict[str, Any]:
        """All settings, by which answers and states are found again; subtitles only where they are read."""
        return {name: value for name, value in asdict(self).items() if name != "subtitles" or value is not None}

    @property
    def text(self) -> str:
        """For people: `1 fps`, `1 fps, at most 64 frames` or `16 frames`."""
        if self.num_frames is not None:
            frames = f"{self.num_frames} frames"
        else:
            frames = f"{self.fps:g} fps" + (f", at most {self.max_frames} frames" if self.max_frames else "")
        return frames + (", with subtitles" if self.subtitles else "")


@dataclass
class Tally:
    """What was read, and how often a state was there already."""

    videos_read: int = 0
    frames_read: int = 0
    seconds_reading: float = 0.0
    from_memory: int = 0
    from_disk: int = 0


class StateStore:
    """Gives the state after reading some media.

    Args:
        pipe: the pipeline that reads.
        reading: how frames are chosen.
        keep: states in memory, the ones used last.
        folder: keep states here as well.
        folder_bytes: limit of the folder; the files not used for longest go first.
    """

    def __init__(
        self, pipe: Any, reading: Reading, keep: int = 8, folder: Path | None = None, folder_bytes: int = 10**10
    ):
        if keep < 1:
            raise ValueError(f"cache_states={keep}: must be at least 1")
        self.pipe, self.reading, self.keep = pipe, reading, keep
        self.folder, self.folder_bytes = folder, folder_bytes
        self.tally = Tally()
        self._states: OrderedDict[str, VideoState] = OrderedDict()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def state(self, media: Sequence[Medium], group: Any = None) -> VideoState:
        """The state after `media`, read now or before. It must not be changed (asking does not).

        Args:
            group: a process group whose ranks all ask for it, and share the reading.

        Raises:
            ValueError, FileNotFoundError: a video cannot be read.
        """
        key = self.key(media)
        kept, state = self._states.get(key), None
        found = kept or self._load(key)
        if group is None or all(everyone(found is not None, group)):
            state = found
        if state is None:
            state = self._read(media, group)
            if group is None or ParallelDims.of_run().first:
                self._save(key, state)
        elif kept is not None:
            self.tally.from_memory += 1
        else:
            self.tally.from_disk += 1
        self._states[key] = state
        self._states.move_to_end(key)
        while len(self._states) > self.keep:
            self._states.popitem(last=False)
        return state

    def key(self, media: Sequence[Medium]) -> str:
        """SHA-256 of the content of `media`, of how it is read, and of what reads it."""
        identity = self.pipe.identity()
        shown = [medium.digest() for medium in media]
        facts = [shown, self.reading.facts, [identity[name] for name in _IDENTITY]]
        facts += [[subtitles_digest(medium) for medium in media]] if self.reading.subtitles else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @staticmethod
    def seconds(state: VideoState) -> float:
        """What reading a state took, whenever and wherever that was."""
        return float(state.metadata[_SECONDS])

    def frames(self, media: Sequence[Medium]) -> int:
        """How many frames of `media` would be read; 0 where that cannot be told."""
        total = 0
        for medium in media:
            try:
                places = {"start": medium.start, "end": medium.end}
                source = self._source(medium)
                reader = self.pipe.processor.video_processor.open(source, **places, **self.reading.chosen)
                total += reader.expected_frames
            except (ValueError, OSError):  # reading it says why
                return 0
        return total

    def _source(self, medium: Medium) -> Any:
        source = list(medium.source) if medium.in_memory else medium.source
        if not medium.in_memory and os.path.isdir(source):
            wanted = None if self.reading.num_frames else self.reading.fps
            source = frames_of_folder(source, self.reading.folder_fps, wanted)
        return source

    def _read(self, media: Sequence[Medium], group: Any = None) -> VideoState:
        began = time.perf_counter()
        state = None
        for medium in media:
            places = {"start": medium.start, "end": medium.end, "group": group}
            told = {"subtitles": subtitles_of(medium) or "auto"} if self.reading.subtitles else {}
            state = self.pipe.read(self._source(medium), state=state, **places, **told, **self.reading.chosen)
        seconds = time.perf_counter() - began
        state.metadata[_SECONDS] = f"{seconds:.6f}"
        self.tally.videos_read += 1
        self.tally.frames_read += int(state.metadata["frames"])
        self.tally.seconds_reading += seconds
        return state

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:40]}.state"

    def _load(self, key: str) -> VideoState | None:
        if self.folder is None or not self._path(key).is_file():
            return None
        path = self._path(key)
        try:
            state = VideoState.load(path)
            float(state.metadata[_SECONDS])
            os.utime(path)
        except (OSError, KeyError, ValueError) as error:
            warnings.warn(f"{path} is not used, the video is read again: {error}", stacklevel=2)
            return None
        return state

    def _save(self, key: str, state: VideoState) -> None:
        if self.folder is None:
            return
        path = self._path(key)
        try:
            state.save(path)
            kept = sorted(self.folder.glob("*.state"), key=lambda file: file.stat().st_mtime)
            excess = sum(file.stat().st_size for file in kept) - self.folder_bytes
            for file in kept[:-1]:
                if excess <= 0:
                    break
                excess -= file.stat().st_size
                file.unlink(missing_ok=True)
        except OSError as error:  # a copy that spares work later: without it the run is slower, not wrong
            warnings.warn(f"the state cannot be kept in {self.folder}: {error}", stacklevel=2)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            warnings.warn(f"the state cannot be kept in {self.folder}: {error}", stacklevel=2)
