"""Rendered videos as mp4 files with their questions in `questions.jsonl`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..files.progress import counted
from ..modeling_video_ma2mba.state_writing import write_whole
from ..processing.video_subtitles import srt_text
from .dataset import WorldDataset
from .questions import FOLLOW_KINDS, FORMS, KINDS
from .render import WorldRenderer
from .world import World

QUESTIONS_FILE = "questions.jsonl"
SETTINGS_FILE = "world.json"
_CRF = "10"  # x264's constant quality: glyphs and colours stay clean at 64 x 64 pixels


def write_video(path: str | os.PathLike[str], chunks: Iterable[np.ndarray], fps: float = 1.0) -> int:
    """Write frames, uint8 (n, H, W, 3) RGB at a time, as an H.264 mp4 file; complete or not at all.

    Returns
    -------
    Number of frames written.

    Raises
    ------
    ValueError: no frames, or a side that is odd (H.264 with 4:2:0 colour needs even ones).
    OSError: the file cannot be written, for instance because the disk is full; nothing is left behind.
    """
    import av

    path = Path(path)
    draft = path.with_name(f".{path.stem}.part{path.suffix}")
    count = 0
    try:
        with av.open(str(draft), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": _CRF, "preset": "fast"}
            stream.codec_context.thread_count = 1
            for chunk in chunks:
                height, width = chunk.shape[1:3]
                if height % 2 or width % 2:
                    raise ValueError(f"frames of {width} x {height} pixels: both sides must be even.")
                if not count:
                    stream.height, stream.width = height, width
                for frame in chunk:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                    count += 1
            if not count:
                raise ValueError(f"{path}: there are no frames to write.")
            container.mux(stream.encode())
        os.replace(draft, path)
    except av.FFmpegError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        draft.unlink(missing_ok=True)
    return count


def write_world(path: str | os.PathLike[str], world: World, fps: float = 1.0, size: int = 64) -> int:
    """Write one world as an mp4 file, a chunk of frames at a time; returns the number of frames."""
    return write_video(path, WorldRenderer(world, size).chunks(fps), fps)


def render_to_folder(
    out: str | os.PathLike[str],
    count: int,
    kinds: Sequence[str] = KINDS,
    frames: tuple[int, int] = (8, 64),
    seed: int = 0,
    size: int = 64,
    split: str = "train",
    *,
    fps: float = 1.0,
    questions: int | None = None,
    forms: Sequence[str] = FORMS,
    progress: bool = True,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """Write `count` videos and their questions (one per kind and video unless `questions` says otherwise) to `out`.

    A folder that an interrupted call with the same settings left behind is completed; `questions.jsonl` appears last.

    `rename` puts other words, such as names of colours, into questions, options and answers: something to teach.

    Returns
    -------
    Path of `questions.jsonl`: one JSON object a line with `video` (file name), `kind`, `question`, `options` (empty
    for open questions), `answer` and `frames`; with kinds about speech also `subtitles`, an SRT file beside the video.

    Raises
    ------
    ValueError: a setting makes no sense, or `out` holds something else.
    OSError: the disk is full or not writable; finished videos stay, nothing half-written does.
    """
    if size % 2:
        raise ValueError(f"size={size}: video files need an even number of pixels.")
    if alone := [kind for kind in kinds if kind in FOLLOW_KINDS]:
        raise ValueError(f"rows of files hold one question each, which {', '.join(alone)} cannot be: leave them out.")
    options: dict[str, Any] = {
        "split": split,
        "seed": seed,
        "frames": list(frames),
        "kinds": list(kinds),
        "forms": list(forms),
        "questions": len(kinds) if questions is None else questions,
        "resolution": size,
        "fps": fps,
    }
    data = WorldDataset(size=count, **(options | {"frames": tuple(frames)}))
    folder = Path(out)
    _claim(folder, options | ({"rename": dict(rename)} if rename else {}))
    for index in counted(range(count), "rendering", "videos", shown=progress):
        path = folder / _file_name(index)
        if not path.exists():
            write_world(path, data.world(index), fps, size)
        if data.speaks:
            write_whole(path.with_suffix(".srt"), srt_text(data.cues(data.world(index))))
    target = folder / QUESTIONS_FILE
    write_whole(target, "".join(json.dumps(row) + "\n" for row in _rows(data, rename or {})))
    return target


def _file_name(index: int) -> str:
    return f"{index:06d}.mp4"


def _rows(data: WorldDataset, rename: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(rename, key=len, reverse=True)))})\b")

    def said(text: str) -> str:
        return words.sub(lambda found: rename[found[0]], text) if rename else text

    for index in range(len(data)):
        for question in data.asked(index)[1]:
            yield {
                "video": _file_name(index),
                **({"subtitles": f"{index:06d}.srt"} if data.speaks else {}),
                "kind": question.kind,
                "question": said(question.text),
                "options": [said(option) for option in question.options],
                "answer": said(question.answer),
                "frames": data.length(index),
            }


def _claim(folder: Path, options: dict[str, Any]) -> None:
    """Make the folder ours, or see that it was made with the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / SETTINGS_FILE
    if settings.exists():
        if json.loads(settings.read_text(encoding="utf-8")) != options:
            raise ValueError(f"{folder} holds a world rendered with other settings: choose another folder.")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no rendered world: choose another folder.")
    else:
        write_whole(settings, json.dumps(options, indent=2) + "\n")
