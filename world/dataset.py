"""The rendered world as a data set: frames in memory with their questions, made on the fly from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..processing.frame_times import Cue
from .endless import ENDLESS_KINDS, LONGEST_STRETCH, EndlessWorld
from .questions import FORMS, KINDS, SPOKEN_KINDS, Question, ask, check_kinds
from .render import render
from .speech import TimedFrames, speech_of
from .world import World, WorldSettings, build_world, video_seed, whole, with_decoys

_CALM: dict[str, Any] = {"min_objects": 1, "max_objects": 2, "clutter": False}
_BUSY: dict[str, Any] = {"min_objects": 6, "max_objects": 12}


@dataclass(frozen=True)
class WorldSample:
    """One video with its questions. `frames` is uint8 (F, H, W, 3) RGB, `fps` of them a second; `cues` are said."""

    frames: np.ndarray
    questions: tuple[Question, ...]
    world: World
    cues: tuple[Cue, ...] = ()
    fps: float = 1.0

    @property
    def timed_frames(self) -> TimedFrames:
        """The frames with their times, as a reader that a processor opens."""
        return TimedFrames.of_world(self.frames, self.world, self.fps)

    def messages(self, video: Any = None) -> list[dict[str, Any]]:
        """The sample as one chat: the video and the first question, then question and answer in turn."""
        return chat(self.questions, video, self.cues)


def chat(questions: Sequence[Question], video: Any = None, cues: Sequence[Cue] = ()) -> list[dict[str, Any]]:
    """Chat messages in the Hugging Face content format; the first user turn carries the video and its subtitles."""
    messages: list[dict[str, Any]] = []
    turns = [turn for asked in questions for turn in (*asked.before, asked)]
    for number, question in enumerate(turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        if number == 0:
            content.insert(0, {"type": "video"} if video is None else {"type": "video", "video": video})
            content[0] |= {"subtitles": list(cues)} if cues else {}
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages


def parse_frames(text: str) -> tuple[int, int]:
    """`"8..64"` or `"8"` as (shortest, longest)."""
    low, dots, high = text.partition("..")
    try:
        shortest, longest = int(low), int(high if dots else low)
    except ValueError:
        raise ValueError(f"frames {text!r}: give a number or a range such as 8..64.") from None
    if not 1 <= shortest <= longest:
        raise ValueError(f"frames {text!r}: must be 1 <= shortest <= longest.")
    return shortest, longest


class WorldDataset:
    """A map-style data set (works with `torch.utils.data.DataLoader`) of rendered videos.

    Parameters
    ----------
    split: ``train``, ``validation`` or ``test``; no seed of one is a seed of another.
    size: number of videos.
    frames: shortest and longest video, in frames at `fps`, drawn uniformly per video; (n, n) fixes it.
    questions: at most this many per video.
    kinds: of question; with one of ``SPOKEN_KINDS`` the videos have subtitles.
    begins: second at which the videos may begin, as parts of longer ones: 0 for half, up to this for the others, as
        many between one and ten minutes as between ten and a hundred. So every digit of a time is seen.
    variety: share of calm worlds, of one or two things before a still backdrop, and of busy ones, of up to twelve:
        half of it each.
    streams: share of videos that are the beginning of a world without end (`EndlessWorld`): one scene after the other,
        much more to be seen than in others; asked is about the last minute. They begin at 0 and keep to a second.
    decoys: half of the worlds hold up to so many cards whose sign is cut up, beside the one that can be read.
    pace: seconds between what a video of one frame a second shows, in slow motion: 1 for half, up to this for the
        others. So a short video spans minutes, and what minute it is depends on the frame.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 100_000,
        *,
        frames: tuple[int, int] = (8, 64),
        questions: int = 8,
        kinds: Sequence[str] = KINDS,
        forms: Sequence[str] = FORMS,
        seed: int = 0,
        resolution: int = 64,
        fps: float = 1.0,
        settings: WorldSettings | None = None,
        begins: int = 0,
        pace: int = 1,
        variety: float = 0.0,
        streams: float = 0.0,
        decoys: int = 0,
    ):
        low, high = frames
        if not 1 <= low <= high:
            raise ValueError(f"frames={frames}: give the shortest and the longest length, 1 <= shortest <= longest.")
        if not fps > 0:
            raise ValueError(f"fps={fps}: frames per second must be more than 0.")
        if size < 1 or questions < 1:
            raise ValueError(f"size={size}, questions={questions}: both must be at least 1.")
        if begins < 0 or pace < 1:
            raise ValueError(f"begins={begins}, pace={pace}: must be begins >= 0 and pace >= 1 second.")
        if decoys < 0:
            raise ValueError(f"decoys={decoys}: must be a number of cards, 0 for none.")
        if not 0 <= variety <= 1:
            raise ValueError(f"variety={variety}: must be a share from 0 to 1.")
        if not 0 <= streams <= 1 or (streams and fps != 1):
            raise ValueError(f"streams={streams}: must be a share from 0 to 1; with fps=1 only.")
        video_seed(split, size - 1, seed)  # refuses a wrong split or seed
        self.split, self.size, self.frames, self.questions = split, size, (low, high), questions
        self.kinds, self.forms = check_kinds(kinds), check_kinds(forms, FORMS, "form")
        self.seed, self.resolution, self.fps = seed, resolution, fps
        self.settings, self.begins, self.pace = settings or WorldSettings(), begins, pace
        self.variety, self.streams, self.decoys = variety, streams, decoys
        self.speaks = any(kind in SPOKEN_KINDS for kind in self.kinds)

    def __len__(self) -> int:
        return self.size

    def length(self, index: int) -> int:
        """Frames of video `index`, known without making it."""
        self._check(index)
        rng = random.Random(video_seed(self.split, index, self.seed) + (1 << 90))
        return whole(rng, *self.frames)

    def world(self, index: int, frames: int | None = None) -> World:
        """What video `index` shows; `frames` overrides its length."""
        frames = self.length(index) if frames is None else frames
        seconds = max(-int(-frames // self.fps), 1)
        if (stream := self._stream(index)) is not None:
            return stream.between(max(seconds - LONGEST_STRETCH, 0), seconds)
        seed = video_seed(self.split, index, self.seed)
        world = with_decoys(build_world(seed, seconds, self._settings(seed)), self.decoys)
        if not self.begins and self.pace == 1:
            return world
        rng = random.Random(world.seed + (1 << 91))
        begin = 0 if rng.random() < 0.5 else round((self.begins + 1) ** rng.random()) - 1
        return replace(world, begin=begin, pace=1 if rng.random() < 0.5 else whole(rng, 1, self.pace))

    def _stream(self, index: int) -> EndlessWorld | None:
        """The world without end that video `index` is the beginning of, where it is one."""
        seed = video_seed(self.split, index, self.seed)
        if not self.streams or random.Random(seed + (1 << 93)).random() >= self.streams:
            return None
        return EndlessWorld(seed, self.split)

    def _settings(self, seed: int) -> WorldSettings:
        mark = random.Random(seed + (1 << 92)).random() if self.variety else 1.0
        if mark >= self.variety:
            return self.settings
        return replace(self.settings, **(_CALM if 2 * mark < self.variety else _BUSY))

    def cues(self, world: World) -> tuple[Cue, ...]:
        """What is said in a world of this data set."""
        return speech_of(world).cues if self.speaks and not world.earlier else ()

    def asked(self, index: int, frames: int | None = None) -> tuple[World, list[Question]]:
        """World and questions of video `index`, nothing drawn."""
        self._check(index)
        world = self.world(index, frames)
        kinds = self.kinds if self._stream(index) is None else [kind for kind in self.kinds if kind in ENDLESS_KINDS]
        return world, ask(world, self.questions, kinds, self.forms) if kinds else []

    def drawn(self, index: int, world: World) -> np.ndarray:
        """Frames of video `index`, uint8 (F, H, W, 3), of which `world` is the whole or the latest part."""
        if (stream := self._stream(index)) is not None:
            return np.concatenate(list(stream.chunks(world.earlier + world.seconds, self.resolution)))
        return render(world, self.fps, self.resolution)

    def sample(self, index: int, frames: int | None = None) -> WorldSample:
        """Video `index`, drawn; `frames` overrides its length (the same index at another length is another video)."""
        world, questions = self.asked(index, frames)
        return WorldSample(self.drawn(index, world), tuple(questions), world, self.cues(world), self.fps)

    def __getitem__(self, index: int) -> WorldSample:
        return self.sample(index)

    def __iter__(self) -> Iterator[WorldSample]:
        return (self.sample(index) for index in range(self.size))

    def _check(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index}: this data set holds {self.size} videos.")
