"""Batches of rendered videos with many questions each, drawn in the data loader's workers.

All videos of a batch have the same number of frames, so frames need no padding; the number of videos is chosen so that
a batch holds about `tokens_per_batch` tokens. Training begins with pictures and short videos, which cost little and
teach to see, and lengthens them as it goes. Shapes: B videos, F frames of each, S tokens.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..processing.frame_times import TIME_TOKENS
from ..trainer.data import VideoChatCollator
from . import Question, WorldDataset, chat
from .questions import TIMED_KINDS, list_things, list_times, name_option, repeat_sign
from .speech import TimedFrames
from .stretch import STRETCH, calm_frames, token_stretch
from .world import COLOURS, SHAPES, whole

_TURN_TOKENS = 20  # of one question with its answer, on average
_NAMED_OPTIONS = 2  # turns of a chat that say which option is right and ask for its letter, at most
_LIST_ALONE, _LIST_LAST = 0.3, 0.5  # shares of chats that only list the things, and that end with the list, at first
_FRAMES_AT_ONCE = 32  # of what is computed on them: as much as a cache holds
MOST_STRETCHED = 64  # frames that one calm frame counts as, at most
SHORTER = 0.15  # share of batches below the shortest length asked for, once training is past that length
# Later turns could be answered from the words of earlier ones ("the red star" gives away a colour and a shape), so
# kinds that give away little come first.
_TURNS = (
    *("needle", "spoken", "said", "count", "colour", "shape", "follow", "follow_timed", "direction", "timed"),
    *("moment", "between", "order", "time", "span", "list", "times"),
)
_WORDS = re.compile("[a-z]+")
_NAMES = frozenset([*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses", "card"])


def imitate_mp4(frames: np.ndarray, noise_seed: int) -> np.ndarray:
    """Frames, uint8 (F, H, W, 3), much as an mp4 file would give them back: colour at half resolution, slight noise.

    The model is trained on pictures from memory and used on files; this keeps it from depending on the difference.
    """
    height, width = frames.shape[1:3]
    noise = np.random.RandomState(noise_seed).randint(-3, 4, size=(1, height, width)).astype(np.float32)
    return np.concatenate(
        [_imitate(frames[at : at + _FRAMES_AT_ONCE], noise) for at in range(0, len(frames), _FRAMES_AT_ONCE)]
    )


def _imitate(frames: np.ndarray, noise: np.ndarray) -> np.ndarray:
    wide = frames.astype(np.float32)
    light = wide @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = wide - light[..., None]
    quarters = (colour[:, row::2, column::2] for row in (0, 1) for column in (0, 1))
    colour = (sum(quarters) / 4).repeat(2, axis=1).repeat(2, axis=2)
    return np.clip(light[..., None] + colour + noise[..., None], 0, 255).astype(np.uint8)


def longest_at(progress: float, longest: int, ramp: float, begin: int = 2) -> int:
    """The curriculum: frames of the longest video at `progress` 0..1 of training, from `begin` in doublings at a
    steady pace up to `longest`, which is reached at `ramp`."""
    begin = min(begin, longest)
    return min(round(begin * (longest / begin) ** min(progress / ramp, 1.0)), longest)


def draw_length(rng: random.Random, top: int, shortest: int, shorter: float = SHORTER) -> int:
    """Frames of one batch: up to `shortest` while the curriculum has not got beyond it, then from there up, but for a
    share `shorter` of the batches."""
    if top <= shortest:
        return whole(rng, max(top // 2, 1), top)
    if rng.random() < shorter:
        return whole(rng, 1, shortest)
    return whole(rng, shortest, top)


def question_subject(question: Question) -> tuple[str, frozenset[str]]:
    """What a question is about, the same for every wording and for both forms: kind and the things that it names.

    Every question that tells when a thing is seen is about the same: one gives away the others.
    """
    text = question.text if question.kind == "order" else question.text.partition(" (A)")[0]
    if question.kind in TIMED_KINDS:
        told = [turn.answer if turn.kind == "order" else f"{turn.text} {turn.answer}" for turn in question.before]
        told += [question.text, question.answer]
        return "when", frozenset(_NAMES & set(_WORDS.findall(" ".join(told))))
    if question.before:
        return question.kind, question_subject(question.before[-1])[1]
    return question.kind, frozenset(_NAMES & set(_WORDS.findall(text)))


def choose_questions(
    rng: random.Random, asked: Sequence[Question], count: int, weights: Mapping[str, float]
) -> list[Question]:
    """Up to `count` of the questions that were asked, drawn by the weights of their kinds, one on each subject: a
    second one could be answered from the first.

    The first turn, which is how questions are asked later on, is any of them; the others are in the order of `_TURNS`.
    """
    keyed = sorted(asked, key=lambda question: math.log(1 - rng.random()) / weights[question.kind], reverse=True)
    subjects: set[tuple[str, frozenset[str]]] = set()
    chosen: list[Question] = []
    for question in keyed:
        about = {question_subject(turn) for turn in (*question.before, question)}
        if len(chosen) < count and not about & subjects:
            subjects |= about
            chosen.append(question)
    return chosen[:1] + sorted(chosen[1:], key=lambda question: _TURNS.index(question.kind))


class WorldBatches(IterableDataset):
    """Endless training batches. Each item is one whole batch; read it with `batch_size=1` and `only_item` as collator.

    `progress` (1,) and `weights` (one per kind) are tensors in shared memory: training writes them, workers follow.
    """

    def __init__(
        self,
        dataset: WorldDataset,
        processor: Any,
        tokens_per_batch: int,
        progress: torch.Tensor,
        weights: torch.Tensor,
        first_batch: int = 0,
        ramp: float = 0.5,
        ramp_from: int = 2,
        shorter: float = SHORTER,
        stretch: int = 0,
    ):
        self.dataset, self.processor, self.tokens_per_batch = dataset, processor, tokens_per_batch
        self.collator = VideoChatCollator(processor, ends="first", on_broken="raise")
        self.progress, self.weights, self.first_batch = progress, weights, first_batch
        self.ramp, self.ramp_from, self.shorter, self.stretch = ramp, ramp_from, shorter, stretch
        known = processor.tokenizer.get_vocab()
        self.stamps = torch.tensor([known[name] for name in TIME_TOKENS if name in known], dtype=torch.long)
        stamp = sum(len(ids) for _, ids in processor.frame_text().texts([0.0]))
        self.frame_tokens = processor.tokens_per_frame + stamp * min(
            1 / (dataset.fps * processor.frame_times_every), 1
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number = self.first_batch + worker
        shortest, longest = self.dataset.frames
        while True:
            rng = random.Random(f"{self.dataset.seed} {number}")
            frames = draw_length(rng, self._longest(longest), shortest, self.shorter)
            length = frames * self.frame_tokens + (self.questions_per_video(frames) + 3) * _TURN_TOKENS
            videos = max(int(self.tokens_per_batch // length), 1)
            indices = [int(rng.random() * len(self.dataset)) for _ in range(videos)]
            longest_calm = math.log(min(max(self.stretch / frames, 1), MOST_STRETCHED))
            amount = longest_calm * rng.random() if rng.random() < 0.5 else 0.0
            yield self.batch(indices, frames, files=0.5, stretch=amount)
            number += workers

    def _longest(self, longest: int) -> int:
        return longest_at(float(self.progress), longest, self.ramp, self.ramp_from)

    def questions_per_video(self, frames: int) -> int:
        """Questions about a video of `frames`: more where reading the video costs more."""
        return min(4 + frames // 3, self.dataset.questions)

    def batch(
        self, indices: Sequence[int], frames: int, files: float = 0.0, stretch: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Videos `indices`, each `frames` frames long; a share `files` of them as if read from mp4 files.

        Each calm frame counts as `exp(stretch)` (`stretch.py`)."""
        weights = dict(zip(self.dataset.kinds, self.weights.tolist(), strict=True))
        lists = 1 - 0.7 * float(self.progress)
        timed = any(kind in TIMED_KINDS for kind in self.dataset.kinds)
        rows, calm = [], []
        for place, index in enumerate(indices):
            world, asked = self.dataset.asked(index, frames)
            rng = random.Random(f"turns {world.seed} {frames}")
            mark, listed = rng.random(), list_things(world)
            if timed and rng.random() < 0.7:
                listed = list_times(world, self.dataset.speaks)
            if (mark < _LIST_ALONE * lists and not world.earlier) or not asked:
                turns = [listed]
            else:
                turns = choose_questions(rng, asked, self.questions_per_video(frames), weights)
                spare = [question for question in asked if question.options and question not in turns]
                turns += [name_option(question) for question in spare[:_NAMED_OPTIONS]]
                if mark < (_LIST_ALONE + _LIST_LAST) * lists and not world.earlier:
                    turns.append(listed)
                elif self.dataset.speaks:  # behind everything about what the video's voice says
                    turns += [repeat_sign(rng) for _ in range(_NAMED_OPTIONS)]
            video = self.dataset.drawn(index, world)
            video = imitate_mp4(video, index % 2**32) if place < files * len(indices) else video
            shown = TimedFrames.of_world(video, world, self.dataset.fps)
            calm.append(calm_frames(world, self.dataset.fps))
            rows.append({"id": str(index), "messages": chat(turns, shown, self.dataset.cues(world))})
        made = self.collator(rows)
        if stretch:
            token = self.processor.video_token_id
            made[STRETCH] = token_stretch(made["input_ids"], torch.stack(calm), stretch, token, self.stamps)
        return made


def only_item(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collator for items that are batches already."""
    return items[0]
