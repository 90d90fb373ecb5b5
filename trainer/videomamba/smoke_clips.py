"""Rendered clips in the forms that the recipes read, for runs that only show that a recipe works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...modeling_video_ma2mba.state_writing import write_whole
from ...world.video_files import write_video

_CLIPS, _SIDE, _FRAMES = 8, 32, 8
DIRECTIONS = ("left", "right", "up", "down")
_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 230), "white": (240, 240, 240)}


def moving_square(direction: str, colour: str, frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A square that crosses half of the picture: uint8 (frames, side, side, 3). It starts anywhere and wraps around,
    so that only motion tells the direction."""
    size = side // 4
    place = rng.integers(side, size=2)
    step = np.array(_STEPS[direction]) * max(1, side // (2 * frames))
    clip = np.full((frames, side, side, 3), 20, dtype=np.uint8)
    for number in range(frames):
        rows, columns = ((place[axis] + step[axis] * number + np.arange(size)) % side for axis in range(2))
        clip[number][np.ix_(rows, columns)] = _COLOURS[colour]
    return clip


def write_smoke_clips(folder: Path, recipe: Any) -> Path:
    """Write a few clips (pictures, of a model of pictures) into `folder`, or find them there; the list to train on."""
    captions = recipe.task == "retrieval"
    target = folder / ("clips.jsonl" if captions else "clips.csv")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(_CLIPS):
        direction, colour = DIRECTIONS[number % 4], list(_COLOURS)[number % len(_COLOURS)]
        clip = moving_square(direction, colour, _FRAMES, _SIDE, rng)
        if recipe.tubelet_size is None:
            name = f"{number}.png"
            Image.fromarray(clip[0]).save(folder / name)
        else:
            name = f"{number}.mp4"
            write_video(folder / name, [clip])
        if captions:
            lines.append(json.dumps({"video": name, "caption": f"a {colour} square moves {direction}"}))
            continue
        label = f"{number / 10}" if recipe.task == "regression" else f"{number % 4}"
        lines.append(f"{name},{label},{_FRAMES}" if recipe.window_seconds else f"{name},{label}")
    write_whole(target, "\n".join(lines) + "\n")
    return target
