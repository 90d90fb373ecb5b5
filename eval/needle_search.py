"""Needle in a haystack: is one frame found in a video of many, wherever it stands? Depth x length, resumable.

Each haystack is read once, in front-to-back order of the depths: at a depth the state is forked into one row for each
needle, each row reads its needle and the rest of the video, and all questions are asked from the rows' states.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from ..modeling_video_ma2mba.state_writing import write_whole
from .needle_grid import NeedleGrid
from .needle_haystack import Distracted, Needle, make_needles
from .needle_scoring import NeedleReader, normalised
from .ranks import SHARE_FRAMES, everyone
from .time_estimate import needle_estimate

Cell = dict[str, Any]


def measure(
    pipe: Any,
    haystack: Any,
    grid: NeedleGrid,
    out: Path,
    on_cell: Callable[[Cell], None] | None = None,
    on_frames: Callable[[int, int], None] | None = None,
    group: Any = None,
    share_frames: int = SHARE_FRAMES,
    announce: Callable[[str], None] | None = None,
) -> list[Cell]:
    """Measure the cells that `out` does not hold yet.

    Args:
        pipe: the pipeline whose model and processor answer.
        haystack: from `open_haystack`.
        out: folder for `settings.json` and one file a cell in `cells/`, each written as soon as it is known.
        on_cell: called with each new cell; on_frames: with the frames that the language model has read and will read.
        group: a process group whose ranks all call this. They share haystacks of at least `share_frames` frames (0:
            none); shorter ones are dealt out.
        announce: told, before anything is measured, how much that is and about how long it takes.

    Returns:
        All cells of the grid, by length, then depth.

    Raises:
        ValueError: the haystack is too short, or `out` holds cells of other settings, which are named.
    """
    if grid.distractors:
        haystack = Distracted(haystack, grid.distractors, grid.seed)
    for frames in grid.frames:
        haystack.check(frames)
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(out / "settings.json", _settings(pipe, haystack, grid))
    known = {(frames, depth): _load(_path(folder, frames, depth)) for frames in grid.frames for depth in grid.depths}
    missing = {frames: [d for d in grid.depths if known[frames, d] is None] for frames in grid.frames}
    missing = {frames: depths for frames, depths in missing.items() if depths}
    rank = 0
    together: list[int] = []
    if group is not None:  # all look before any writes
        (missing, *_), rank = everyone(missing, group), distributed.get_rank(group)
        together = [frames for frames in missing if 0 < share_frames <= frames]
        dealt = sorted((frames for frames in missing if frames not in together), reverse=True)
        own = together + dealt[rank :: distributed.get_world_size(group)]
        missing = {frames: missing[frames] for frames in own}
    total = sum(_work(frames, depths, grid.needles) for frames, depths in missing.items())
    read = 0

    def report(new: int) -> None:
        if on_frames is not None:
            on_frames(read + new, total)

    with torch.inference_mode():
        if missing and announce is not None and group is None:
            announce(needle_estimate(NeedleReader(pipe.model, pipe.processor), haystack, missing, total))
        if missing:
            report(0)
        for frames, depths in missing.items():
            reader = NeedleReader(pipe.model, pipe.processor, group if frames in together else None)
            if hasattr(haystack, "reader"):
                reader.fps = haystack.reader.sampling.fps or reader.fps
            for cell in _cells(reader, haystack, grid, frames, depths, report):
                if frames in together and rank > 0:
                    continue
                write_json(_path(folder, frames, cell["depth"]), cell)
                known[frames, cell["depth"]] = cell
                if on_cell is not None:
                    on_cell(cell)
            read += reader.frames_read
    if group is not None:
        for cells in everyone({place: cell for place, cell in known.items() if cell is not None}, group):
            known |= cells
    return [cell for cell in known.values() if cell is not None]


def _cells(
    reader: NeedleReader,
    haystack: Any,
    grid: NeedleGrid,
    frames: int,
    depths: Sequence[float],
    on_frames: Callable[[int], None] | None,
) -> Iterator[Cell]:
    """Yield the cells of one length, by depth."""
    features = reader.haystack(haystack, frames)
    prefix, read = reader.opening(), 0
    for depth in sorted(depths):
        began = time.perf_counter()
        position = round(depth * frames)
        if position > read:
            reader.advance(prefix, features[read:position], on_frames)
            read = position
        needles = make_needles(haystack, frames, position, grid.needles, grid.forms, grid.seed)
        pictures = reader.features(np.stack([needle.frame for needle in needles]))
        state = reader.with_needles(prefix, pictures, features[position:], on_frames)
        answers = reader.answers(state, [needle.questions for needle in needles])
        seconds = round(time.perf_counter() - began, 3)
        yield {"frames": frames, "depth": depth, "position": position, **_scores(needles, answers), "seconds": seconds}


def _scores(needles: Sequence[Needle], answers: Sequence[Sequence[tuple[str, bool]]]) -> dict[str, Any]:
    rows = [
        {
            "needle": number,
            "form": question.form,
            "question": question.text,
            "answer": question.answer,
            "given": given,
            "greedy": normalised(given) == normalised(question.answer),
            "forced": forced,
            "chance": 1 / question.choices,
        }
        for number, (needle, found) in enumerate(zip(needles, answers, strict=True))
        for question, (given, forced) in zip(needle.questions, found, strict=True)
    ]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("greedy", "forced", "chance")}
    return {"questions": len(rows), **means, "answers": rows}


def _work(frames: int, depths: Sequence[float], needles: int) -> int:
    """Frames that the language model reads for these depths of one length, each row counted."""
    positions = [round(depth * frames) for depth in depths]
    return max(positions, default=0) + sum(needles * (1 + frames - position) for position in positions)


def _settings(pipe: Any, haystack: Any, grid: NeedleGrid) -> dict[str, Any]:
    """What decides a cell's result; lengths and depths are not among it, so a grid can be extended."""
    identity = pipe.identity()
    settings = {name: identity[name] for name in ("weights", "model_config", "processor", "dtype")}
    settings |= {"haystack": haystack.name, "sha256": haystack.sha256}
    if hasattr(haystack, "reader"):
        settings["fps"] = haystack.reader.sampling.fps
    chosen = {name: value for name, value in asdict(grid).items() if name not in ("frames", "depths")}
    if not grid.distractors:  # which earlier versions did not know
        del chosen["distractors"]
    return settings | chosen | {"forms": list(grid.forms)}


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if path.exists():
        try:
            kept = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): choose another --out") from error
        for name in {**settings, **kept}:
            if kept.get(name) != settings.get(name):
                raise ValueError(
                    f"--out {path.parent} holds cells of another run: its {name} is {kept.get(name)}, now it is "
                    f"{settings.get(name)}; choose another --out"
                )
    elif any((path.parent / "cells").glob("*.json")):
        raise ValueError(f"--out {path.parent} holds cells, but no settings.json says whose: choose another --out")
    else:
        write_json(path, settings)


def _path(folder: Path, frames: int, depth: float) -> Path:
    return folder / f"frames_{frames}_depth_{depth:g}.json"


def _load(path: Path) -> Cell | None:
    """A finished cell; None where there is none, or where its file is damaged and has to be made again."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        return cell if {"greedy", "forced", "chance", "answers"} <= cell.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Complete or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
