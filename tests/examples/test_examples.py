"""The scripts in `examples/` run as they stand, and its videos are what the rendered world says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from video_ma2mba.processing.video_reader import open_video
from video_ma2mba.world import WorldDataset

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "videos" / "questions.jsonl").read_text().splitlines()]


@pytest.mark.bundled
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_script_runs(script: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_videos_show_the_world_they_were_made_from():
    settings = json.loads((EXAMPLES / "videos" / "world.json").read_text())
    names = sorted({line["video"] for line in QUESTIONS})
    shapes = {"frames": tuple(settings.pop("frames")), "size": len(names)}
    world = WorldDataset(**(settings | shapes))
    for index, name in enumerate(names):
        sample = world[index]
        (chunk,) = open_video(EXAMPLES / "videos" / name, fps=1).chunks(100)
        assert chunk.pixels.shape == sample.frames.shape
        assert abs(chunk.pixels.astype(int) - sample.frames).mean() < 4  # of 255: compression, not another picture
        asked = [(question.text, question.answer) for question in sample.questions]
        assert asked == [(line["question"], line["answer"]) for line in QUESTIONS if line["video"] == name]


def test_videos_are_small():
    assert sum(path.stat().st_size for path in (EXAMPLES / "videos").iterdir()) <= 300_000
