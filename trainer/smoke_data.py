"""Rendered videos in the forms of each stage's data, for runs that only show that a recipe works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..modeling_video_ma2mba.state_writing import write_whole
from ..world import WorldDataset, render
from ..world.questions import list_things
from ..world.video_files import QUESTIONS_FILE, render_to_folder, write_video

_VIDEOS = 8
_FRAMES = (4, 12)


def _images_and_clips(folder: Path) -> Iterator[dict[str, Any]]:
    """Stage 1: images and short videos with a caption, as LLaVA writes them."""
    for index, (frames, caption) in enumerate(_scenes(2 * _VIDEOS, (1, 6))):
        if index % 2:
            name, kind = f"{index:03d}.png", "image"
            Image.fromarray(frames[len(frames) // 2]).save(folder / name)
        else:
            name, kind = f"{index:03d}.mp4", "video"
            write_video(folder / name, [frames])
        turns = [{"from": "human", "value": "<image>\nDescribe what is shown."}, {"from": "gpt", "value": caption}]
        yield {"id": str(index), kind: name, "conversations": turns}


def _captioned_clips(folder: Path) -> Iterator[dict[str, Any]]:
    """Stage 1.5: long videos made of clips, each with its caption."""
    scenes = list(_scenes(3 * _VIDEOS, (4, 6)))
    for index in range(_VIDEOS):
        clips, name, start = scenes[3 * index : 3 * index + 3], f"{index:03d}.mp4", 0
        write_video(folder / name, [frames for frames, _ in clips])
        for frames, caption in clips:
            yield {"video": name, "start": start, "end": start + len(frames), "caption": caption}
            start += len(frames)


def _texts_and_clips(folder: Path) -> Iterator[dict[str, Any]]:
    """Context extension: plain texts of several lengths, and long videos made of clips, each with its caption."""
    told = [caption for _, caption in _scenes(2 * _VIDEOS, (1, 6))]
    for index in range(_VIDEOS):
        yield {"id": f"text {index}", "text": " ".join(told[index : index + 1 + index])}
    yield from _captioned_clips(folder)


def _long_questions(folder: Path) -> Iterator[dict[str, Any]]:
    """Long supervised fine-tuning: questions about longer videos."""
    data = WorldDataset("train", _VIDEOS, frames=(20, 30), questions=3, seed=2)
    for index in range(_VIDEOS):
        sample = data[index]
        write_video(folder / f"{index:03d}.mp4", [sample.frames])
        for question in sample.questions:
            yield {"video": f"{index:03d}.mp4", "question": question.text, "answer": question.answer}


def _scenes(count: int, frames: tuple[int, int]) -> Iterator[tuple[np.ndarray, str]]:
    data = WorldDataset("train", count, frames=frames, seed=1)
    for index in range(count):
        world = data.world(index)
        yield render(world), list_things(world).answer


SMOKE_DATA: dict[str, Callable[[Path], Iterator[dict[str, Any]]] | None] = {
    "images_and_clips": _images_and_clips,
    "captioned_clips": _captioned_clips,
    "texts_and_clips": _texts_and_clips,
    "long_questions": _long_questions,
    "questions": None,  # as `video-ma2mba world render` writes them
}


def write_smoke_data(folder: Path, kind: str) -> Path:
    """Render the data of one `kind` of `SMOKE_DATA` into `folder`, or find it there; the file to train on.

    Raises:
        ValueError: no such kind.
    """
    if kind not in SMOKE_DATA:
        raise ValueError(f"smoke_data={kind!r} is unknown: use one of {', '.join(SMOKE_DATA)}")
    write = SMOKE_DATA[kind]
    if write is None:
        found = folder / QUESTIONS_FILE
        return found if found.exists() else render_to_folder(folder, _VIDEOS, frames=_FRAMES, seed=1, progress=False)
    target = folder / "rows.jsonl"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in write(folder)]
        write_whole(target, "".join(lines))
    return target
