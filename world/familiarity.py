"""What a model of the rendered world is familiar with: questions and frames, written into a checkpoint; measured.

    python -m video_ma2mba.world.familiarity DIR                      # fit on rendered frames, write into a checkpoint
    python -m video_ma2mba.world.familiarity DIR --videos FOLDER      # a model of other videos: fit on those instead
    python -m video_ma2mba.world.familiarity DIR --strange FOLDER     # measure: videos of other kinds, KIND-NAME.mp4

`answering_familiarity` tells what is done with it.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..loading import load_pipeline
from ..modeling_video_ma2mba.answering_familiarity import (
    FILE,
    MOST_STRANGE,
    Familiarity,
    Likeness,
    QuestionForms,
    small_pictures,
)
from ..modeling_video_ma2mba.reading_prompt import frames_of
from ..modeling_video_ma2mba.state_writing import write_whole
from .dataset import WorldDataset
from .questions import COUNTS
from .render import WorldRenderer, render
from .world import CARD_SYMBOLS, COLOURS, DIRECTIONS, QUARTERS, SHAPES

FALSE_ALARMS = 0.01
"""Share of a model's own frames that may be taken for strange ones."""
DIRECTIONS_KEPT, PICTURES_KEPT = 1 / 3, 1 / 4
"""Shares of the tower's features, and of the numbers of a small picture, in whose directions training varies least."""
VIDEOS_FITTED, FRAMES_OF_EACH = 2_500, 8
VIDEOS_HELD_OUT = 30
_LENGTHS = (8, 64)
# Codec, its options, size, times that each frame is repeated: what becomes of a rendered video on its way to a user.
ENCODINGS: dict[str, tuple[str, dict[str, str], tuple[int, int], int]] = {
    "as rendered": ("libx264", {"crf": "10"}, (64, 64), 1),
    "H.264, crf 30": ("libx264", {"crf": "30"}, (64, 64), 1),
    "H.264, crf 28, 320x240, 25 fps": ("libx264", {"crf": "28"}, (320, 240), 25),
    "H.264, crf 36, 160x160, 10 fps": ("libx264", {"crf": "36"}, (160, 160), 10),
    "MPEG-4, 640x480, 5 fps": ("mpeg4", {"qmin": "6", "qmax": "10"}, (640, 480), 5),
    "VP9, crf 40, 480x270": ("libvpx-vp9", {"crf": "40", "b": "0", "cpu-used": "8"}, (480, 270), 1),
}


_TIMED_FORMS = (
    "when is the {thing|card} in view",
    "from when to when is the {thing|card} shown",
    "what comes at {clock}",
    "what appears at {clock}",
    "what comes between {clock} and {clock}",
    "which sign was named aloud",
    "what sign did the voice name",
    "which colour did the voice give the {shape}",
    "what colour is the {shape}, says the voice",
    'a voice says "the sign is {sign}." which sign did it name',
    'a voice says "remember the sign {sign}." which sign did it name',
)


def world_questions(timed: bool = False) -> QuestionForms:
    """The forms of `questions`, those that only training asks included.

    Args:
        timed: also those of models that read times, which know speech and follow-up questions, too.
    """
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    plurals = [f"{colour} objects" for colour in COLOURS]
    plurals += ["crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES]
    return QuestionForms(
        forms=(
            "what colour is the {shape}",
            "which colour does the {shape} have",
            "which shape is {colour}",
            "what shape is the {colour} object",
            "how many {plural} appear",
            "how many {plural} are there",
            "which way does the {thing} move",
            "in which direction does the {thing} go",
            "which came first, the {thing} or the {thing}",
            "which came last, the {thing} or the {thing}",
            "which came {end}? (a) {thing} (b) {thing}",
            "what stood on the card",
            "which sign did the card show",
            "in which quarter of the video did the {thing|card} appear",
            "which quarter of the video first shows the {thing|card}",
            "list everything in the video",
            "which option is {colour|shape|thing|word}",
            *(_TIMED_FORMS if timed else ()),
        ),
        slots={
            "shape": SHAPES,
            "colour": list(COLOURS),
            "plural": plurals,
            "thing": things,
            "card": ("card",),
            "end": ("first", "last"),
            "word": [*COUNTS, *DIRECTIONS, *QUARTERS, *CARD_SYMBOLS.lower()],
            **({"clock": ("0:00",), "sign": tuple(CARD_SYMBOLS.lower())} if timed else {}),
        },
        follow_ups=timed,
    )


def rendered_frames(split: str, videos: int, of_each: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Some frames of each of many videos of a split, uint8 (n, 64, 64, 3)."""
    random = np.random.default_rng(seed)
    data = WorldDataset(split, videos, frames=_LENGTHS, seed=seed)
    for number in range(videos):
        world = data.world(number)
        moments = random.choice(world.seconds, min(of_each, world.seconds), replace=False)
        yield WorldRenderer(world).frames(sorted(float(moment) for moment in moments))


def encoded_videos(folder: Path, split: str, videos: int, seed: int = 1) -> Iterator[tuple[str, Path]]:
    """Whole videos of a split as files in every one of `ENCODINGS`, each gone when the next one is asked for."""
    data = WorldDataset(split, videos, frames=_LENGTHS, seed=seed)
    for number in range(videos):
        frames = render(data.world(number))
        for name, (codec, options, size, repeats) in ENCODINGS.items():
            path = folder / ("film.webm" if "vp9" in codec else "film.mp4")
            scaled = np.stack([Image.fromarray(frame).resize(size) for frame in frames])
            _encode(path, np.repeat(scaled, repeats, axis=0), repeats, codec, options)
            yield name, path
            path.unlink()


def _encode(path: Path, frames: np.ndarray, fps: int, codec: str, options: dict[str, str]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class Seen(NamedTuple):
    """What was seen of frames: means of the tower's rows (F, C), and `small_pictures` (F, 192)."""

    features: Tensor
    pictures: Tensor

    @classmethod
    def together(cls, several: Iterable[Seen]) -> Seen:
        """All of them."""
        return cls(*map(torch.cat, zip(*several, strict=True)))


def look_at(pipe: Any, chunks: Iterable[Any]) -> Seen:
    """What the pipeline's model sees of frames."""
    seen: list[Seen] = []

    def keep(rows: Tensor, frames: Tensor) -> None:
        seen.append(Seen(rows.float().mean(1).cpu(), small_pictures(frames).cpu()))

    with torch.no_grad():
        for chunk in chunks:
            pipe.model.get_video_features(frames_of(chunk), on_features=keep)
    return Seen.together(seen)


def look_at_file(pipe: Any, path: Path, fps: float = 1.0) -> Seen:
    """`look_at` a video file, at most 64 frames of it."""
    with pipe.processor.video_processor.open(str(path), fps=fps, max_frames=64) as reader:
        return look_at(pipe, reader.chunks(32))


def strange(known: Familiarity, seen: Seen) -> Tensor:
    """(F,) bool: which frames are unlike what is known."""
    found = torch.zeros(len(seen.features), dtype=torch.bool)
    for likeness, numbers in ((known.features, seen.features), (known.pictures, seen.pictures)):
        if likeness is not None:
            found |= likeness.strange(numbers)
    return found


def fit_world(pipe: Any) -> Familiarity:
    """What the pipeline's model is familiar with, if it was trained on the rendered world."""
    fitted = look_at(pipe, rendered_frames("train", VIDEOS_FITTED, FRAMES_OF_EACH))
    with tempfile.TemporaryDirectory() as folder:
        files = encoded_videos(Path(folder), "validation", VIDEOS_HELD_OUT)
        held_out = Seen.together(look_at_file(pipe, path) for _, path in files)
    counts = f"{len(fitted.features)} frames of rendered training videos, thresholds from {len(held_out.features)}"
    questions = world_questions(timed=pipe.model.config.frame_times != "none")
    return _fit(fitted, held_out, questions=questions, facts={"fitted": counts})


def fit_videos(pipe: Any, files: list[Path]) -> Familiarity:
    """The same for a model of other videos: fitted on most of the files, its threshold on every fifth.

    Raises:
        ValueError: fewer than ten videos, or too few frames in all.
    """
    if len(files) < 10:
        raise ValueError(f"{len(files)} videos are too few to tell what a model is familiar with: give ten or more")
    seen = [look_at_file(pipe, path) for path in files]
    fitted = Seen.together(found for number, found in enumerate(seen) if number % 5)
    facts = {"fitted": f"{len(fitted.features)} frames of {len(files)} videos"}
    return _fit(fitted, Seen.together(seen[::5]), facts=facts)


def _fit(fitted: Seen, held_out: Seen, **known: Any) -> Familiarity:
    found = [
        Likeness.fit(numbers, others, FALSE_ALARMS, max(1, round(kept * numbers.shape[1])))
        for numbers, others, kept in zip(fitted, held_out, (DIRECTIONS_KEPT, PICTURES_KEPT), strict=True)
    ]
    return Familiarity(*found, **known)


def measure(pipe: Any, known: Familiarity, strange: Path | None, videos: int = 50) -> list[dict[str, Any]]:
    """How often frames and videos are taken for strange ones: test videos in every encoding, and those in a folder.

    Returns:
        A row for each kind: `kind`, `videos`, `frames`, and in % `strange_frames`, `strange_videos`.
    """
    counted: dict[str, list[tuple[int, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in encoded_videos(Path(folder), "test", videos):
            counted.setdefault(name, []).append(_counts(known, look_at_file(pipe, path)))
    for path in sorted(strange.iterdir()) if strange is not None else ():
        kind = path.stem.partition("-")[0]
        counted.setdefault(kind, []).append(_counts(known, look_at_file(pipe, path, fps=2)))
    return [
        {
            "kind": kind,
            "videos": len(found),
            "frames": sum(frames for frames, _ in found),
            "strange_frames": round(100 * sum(n for _, n in found) / sum(frames for frames, _ in found), 2),
            "strange_videos": round(100 * sum(n >= MOST_STRANGE * frames for frames, n in found) / len(found), 1),
        }
        for kind, found in counted.items()
    ]


def _counts(known: Familiarity, seen: Seen) -> tuple[int, int]:
    return len(seen.features), int(strange(known, seen).sum())


def write_into(folder: Path, known: Familiarity) -> None:
    """Put the file into a checkpoint's folder and its name into the configuration."""
    known.save(folder / FILE)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "familiarity": FILE}, indent=2, sort_keys=True) + "\n"
    write_whole(folder / "config.json", text)


def main() -> None:
    """The command at the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m video_ma2mba.world.familiarity", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a model and its processor")
    parser.add_argument("--videos", type=Path, help="fit on the videos in this folder instead of rendered ones")
    parser.add_argument("--strange", type=Path, help="fit nothing: measure, also on the videos in this folder")
    parser.add_argument("--out", type=Path, help="CSV file for what is measured")
    options = parser.parse_args()
    pipe = load_pipeline(str(options.checkpoint))
    if options.strange is None:
        known = fit_world(pipe) if options.videos is None else fit_videos(pipe, sorted(options.videos.iterdir()))
        write_into(options.checkpoint, known)
        thresholds = [f"{one.threshold:.2f}" for one in (known.features, known.pictures) if one is not None]
        print(f"{options.checkpoint / FILE}: strange from a distance of {' or '.join(thresholds)} on")
        return
    known = pipe.model.model.familiarity
    if known is None:
        parser.error(f"{options.checkpoint} does not say what it is familiar with: run this without --strange first")
    rows = measure(pipe, known, options.strange)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if options.out is not None:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
