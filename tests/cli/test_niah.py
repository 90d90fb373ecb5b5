"""`video-ma2mba niah`: report and picture, bad input, and what the model that ships finds."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from video_ma2mba.cli.main import app

QUICK = ["--needles", "1", "--device", "cpu"]


def niah(*arguments, model: Path | None = None):
    chosen = [] if model is None else ["--model", str(model)]
    return CliRunner().invoke(app, ["niah", *map(str, arguments), *chosen, *QUICK])


def test_report_and_picture(tiny_checkpoint: Path, tiny_video: Path, tmp_path: Path):
    out = tmp_path / "needles"
    result = niah("--haystack", tiny_video, "--frames", "2..6:2", "--out", out, model=tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert result.stderr.count(" of 1 (") == 15
    report = json.loads((out / "cells.json").read_text())
    assert len(report["cells"]) == 15
    assert report["mean"]["chance"] == pytest.approx(1 / 24)
    page = (out / "summary.md").read_text()
    assert report["command"] in page
    assert f"--haystack {tiny_video} --frames 2..6:2 --depths 0..1" in report["command"]
    assert page.count("\n| ") == 5
    assert "chance 4.2%" in page
    with Image.open(out / "heatmap.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**24)) > 20

    again = niah("--haystack", tiny_video, "--frames", "2..6:2", "--out", out, model=tiny_checkpoint)
    assert again.exit_code == 0, again.output
    assert " of 1 (" not in again.stderr  # nothing is measured twice
    assert again.stdout == result.stdout


BAD_INPUT = {
    "unknown haystack": (["--haystack", "none.mp4"], "--haystack none.mp4"),
    "haystack that is no video": (["--haystack", "TEXT"], "text.mp4"),
    "too short a video": (["--haystack", "VIDEO", "--frames", "3,100"], "--frames asks for 100"),
    "bad frames": (["--frames", "9..3"], "--frames 9..3"),
    "bad depths": (["--depths", "0..3"], "--depths 0..3"),
    "no needles": (["--needles", "0"], "--needles 0"),
    "unknown form": (["--forms", "sung"], "'sung'"),
    "bad fps": (["--haystack", "VIDEO", "--fps", "0"], "fps"),
    "bad fps, no video": (["--fps", "-1"], "--fps must be more than 0"),
    "negative seed": (["--seed", "-1"], "--seed -1"),
    "out is a file": (["--out", "TEXT"], "is a file"),
    "unknown model": (["--model", "no/such/model"], "no/such/model"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_code_2(case: str, tiny_checkpoint: Path, tiny_video: Path, tmp_path: Path):
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    places = {"VIDEO": str(tiny_video), "TEXT": str(tmp_path / "text.mp4")}
    arguments, named = BAD_INPUT[case]
    defaults = {
        "--out": str(tmp_path / "out"),
        "--frames": "3",
        "--depths": "0",
        "--needles": "1",
        "--model": str(tiny_checkpoint),
    }
    given = dict(zip(arguments[::2], [places.get(word, word) for word in arguments[1::2]], strict=True))
    words = [word for pair in (defaults | given).items() for word in pair]
    result = CliRunner().invoke(app, ["niah", *words, "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert named in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/*.md"))


@pytest.mark.bundled
def test_the_bundled_checkpoint_finds_needles(tmp_path: Path):
    result = niah("--frames", "48", "--depths", "0,0.5,1", "--forms", "open,choice", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cells.json").read_text())["mean"]["greedy"] == 1
