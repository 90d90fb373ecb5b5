"""`video-ma2mba data check`, run on good and broken data."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.main import app


@pytest.fixture
def folder(tmp_path: Path, tiny_video: Path) -> Path:
    """Four good rows about two files of one content, one broken file, one missing one."""
    for name in ("a", "same"):
        shutil.copy(tiny_video, tmp_path / f"{name}.mp4")
    (tmp_path / "cut.mp4").write_bytes(tiny_video.read_bytes()[:200])
    rows = ["video,question,answer", "a.mp4,Q1,A1", "a.mp4,Q2,A2", "a.mp4,Q1,A1", "same.mp4,Q,A"]
    (tmp_path / "good.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "bad.csv").write_text("\n".join([*rows, "cut.mp4,Q,A", "gone.mp4,Q,A"]) + "\n")
    return tmp_path


@pytest.fixture
def run(tiny_checkpoint: Path):
    def invoke(*arguments) -> object:
        return CliRunner().invoke(app, ["data", "check", "--model", str(tiny_checkpoint), *map(str, arguments)])

    return invoke


def test_good_data_passes(run, folder: Path):
    out = folder / "found.json"
    done = run(folder / "good.csv", "--json-file", out, "--gpu-memory", "24GB")
    assert done.exit_code == 0, done.output
    assert "4 can be used, 0 are broken" in done.output
    found = json.loads(out.read_text())
    assert found["samples"] == found["usable"] == 4 and found["broken"] == []
    assert found["same_rows"] == [["good.csv:2", "good.csv:4"]]
    assert found["same_videos"] == [[str(folder / "a.mp4"), str(folder / "same.mp4")]]
    assert found["frames"] == {"shortest": 6, "median": 6, "95 %": 6, "longest": 6}
    assert found["plans"]["longest"]["tokens"] == found["tokens"]["longest"]
    assert found["plans"]["longest"]["gpu_peak_bytes"] > 0
    assert not (folder / "found.json.partial").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_data_is_listed_with_what_to_do(run, folder: Path, workers: int):
    done = run(folder / "bad.csv", "--workers", workers)
    assert done.exit_code == 1
    assert "6 samples: 4 can be used, 2 are broken" in done.output
    assert re.search(r"bad.csv:6: .*cut.mp4: not a video.*-> download the file again", done.output)
    assert re.search(r"bad.csv:7: .*gone.mp4: no such file -> put the video there", done.output)


def test_merging_truncation_and_a_gpu_that_is_too_small(run, folder: Path):
    done = run(folder / "good.csv", "--merge-by-video", "--max-length", 70)
    assert done.exit_code == 0, done.output
    assert "2 samples: 2 can be used" in done.output
    assert re.search(r"shortened, .*: 1\n\s+good.csv:2: [12] answers left out -> raise --max-length", done.output)
    small = run(folder / "good.csv", "--gpu-memory", "100MB")
    assert small.exit_code == 1
    assert "does not fit" in small.output


def test_an_interrupted_check_goes_on(folder: Path, run, monkeypatch: pytest.MonkeyPatch):
    from video_ma2mba.trainer.data import checking

    whole, out = folder / "whole.json", folder / "out.json"
    assert run(folder / "bad.csv", "--json-file", whole).exit_code == 1
    real, read = checking.check_row, []

    def interrupted(processor, row, settings):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(row["id"])
        return real(processor, row, settings)

    monkeypatch.setattr(checking, "check_row", interrupted)
    assert run(folder / "bad.csv", "--json-file", out).exit_code == 130
    with (folder / "out.json.partial").open("a") as file:
        file.write('[4, {"id": "half a li')
    monkeypatch.setattr(checking, "check_row", lambda *a: (read.append(a[1]["id"]), real(*a))[1])
    assert run(folder / "bad.csv", "--json-file", out).exit_code == 1
    assert read == [f"bad.csv:{n}" for n in range(2, 8)]  # each read once
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    assert not (folder / "out.json.partial").exists()


def test_a_check_with_other_settings_begins_anew(folder: Path, run):
    out = folder / "out.json"
    partial = folder / "out.json.partial"
    partial.write_text('some other key\n[0, {"id": "wrong"}]\n')
    assert run(folder / "good.csv", "--json-file", out).exit_code == 0
    assert "wrong" not in out.read_text()


def test_one_sample_is_shown_with_what_is_learnt(run, folder: Path):
    done = run(folder / "good.csv", "--merge-by-video", "--show", 0)
    assert done.exit_code == 0, done.output
    assert "<|user|>[6 frames, 24 tokens]\nQ1<|endoftext|><|assistant|>«A1<|endoftext|>»<|user|>Q2" in done.output
    captions = run(folder / "good.csv", "--labels", "captions", "--show", 3)
    assert "[6 frames, 24 tokens]\n«A<|endoftext|>»" in captions.output
    assert run(folder / "good.csv", "--show", 9).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "no such file or folder"),
        (["."], "several data files"),
        (["good.csv", "--labels", "all"], "--labels all: use one of"),
        (["good.csv", "--json-file", "no/folder/x.json"], "there is no folder"),
        (["good.csv", "--max-length", "0"], "max_length=0"),
        (["good.csv", "--fps", "0"], "fps must be more than 0"),
        (["good.csv", "--num-frames", "0"], "num_frames must be a whole number of at least 1"),
        (["good.csv", "--max-frames", "0"], "max_frames must be a whole number of at least 1"),
        (["good.csv", "--gpu-memory", "lots"], "'lots' is not a size"),
        (["good.csv", "--train", "lm,head"], "there is no part 'head'"),
    ],
)
def test_mistakes_are_one_line(run, folder: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(folder)
    done = run(*arguments)
    assert done.exit_code == 2
    errors = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
