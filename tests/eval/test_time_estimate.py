"""What a run will take is told before it begins."""

import re
import shutil

import pytest

from video_ma2mba.eval import time_estimate
from video_ma2mba.eval.media import Medium
from video_ma2mba.eval.needle_haystack import open_haystack
from video_ma2mba.eval.needle_search import NeedleGrid, measure
from video_ma2mba.eval.state_store import Reading
from video_ma2mba.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


def test_needles_are_counted_and_timed_before_the_first_cell(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(time_estimate, "_WORTH_IT", 1)
    told = []
    grid = NeedleGrid([8, 16], [0, 0.5, 1], needles=2)
    source = open_haystack("synthetic", pipe.processor, fps=1, seed=0)
    events = {"on_cell": lambda cell: told.append(cell), "on_frames": lambda read, total: told.append((read, total))}
    measure(pipe, source, grid, tmp_path, **events, announce=told.append)
    # 8 and 16 frames of haystack; the rows of each depth read a needle and what stands behind it
    work = sum(frames + sum(2 * (1 + frames - round(depth * frames)) for depth in grid.depths) for frames in (8, 16))
    counts = f"6 cells: 24 frames of haystacks, {work} frames for the language model"
    assert re.fullmatch(rf"{counts}; about \d+:\d\d \(by 8 frames tried\)", told[0])
    assert told[1] == (0, work) and (work, work) in told
    told.clear()
    measure(pipe, source, grid, tmp_path, **events, announce=told.append)
    assert told == []  # nothing is left


def test_frames_of_a_benchmark_are_told_from_a_few_of_its_videos(pipe, tiny_video, tmp_path, monkeypatch):
    videos = [shutil.copy(tiny_video, tmp_path / f"{number}.mp4") for number in range(20)]
    (tmp_path / "0.mp4").write_bytes(b"no video")
    media = [(medium.weight(), medium) for medium in (Medium(str(video)) for video in videos)]
    told = time_estimate.benchmark_estimate(pipe, Reading(fps=2), media, 60)
    assert told == "60 questions about 20 videos, about 228 frames (by 8 of them)"  # 19 whole ones of 12 frames
    monkeypatch.setattr(time_estimate, "_WORTH_IT", 100)
    told = time_estimate.benchmark_estimate(pipe, Reading(fps=8), media, 60)
    assert re.search(r"about 912 frames .*takes about \d+:\d\d \(by 32 frames tried\), answers come on top", told)
    told = time_estimate.benchmark_estimate(pipe, Reading(num_frames=3), media[1:], 7)
    assert told == "7 questions about 19 videos, about 57 frames (by 8 of them)"
    assert time_estimate.benchmark_estimate(pipe, Reading(), media[:1], 3) == "3 questions about 1 video"
    assert time_estimate.benchmark_estimate(pipe, Reading(), [], 3) == "3 questions about 0 videos"
