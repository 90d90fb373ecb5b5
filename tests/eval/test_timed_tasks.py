"""Spans and subtitles in lmms-eval: its real tasks on videos of our own, read by a model with time stamps."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.eval.grounding import asks_span, in_seconds
from video_ma2mba.eval.media import Medium, subtitles_of


@pytest.fixture(scope="module")
def timed_checkpoint(make_timed_checkpoint) -> Path:
    return make_timed_checkpoint(1.0)


def test_only_questions_for_a_span_are_asked_for_one():
    assert asks_span("determining its starting and ending times. The format should be:")
    assert asks_span("Please return its start time and end time.")
    assert not asks_span("What happens at the start and at the end of the video?")
    assert not asks_span("Which time is shown when they start and end the game?")
    assert in_seconds("red [0:03-1:09.5]") == "The event happens in the 3.0 - 69.5 seconds."
    assert in_seconds("from 3 to 9") == "from 3 to 9"


def test_timed_tasks_run_with_spans_and_subtitles(in_bench, timed_checkpoint, tmp_path, script):
    """Right: one of two spans whole, TimeLens' by two thirds, all of OVO-Bench but one step."""
    srt = in_bench / "hf_home/subtitle/long0.srt"
    srt.parent.mkdir(exist_ok=True)
    srt.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    answers = {"Span question 0": "[0:01-0:03]", "Span question 1": "[0:02-0:04]", " event": "it [0:01-0:04]"}
    answers |= {"ovo backward": "B", "ovo realtime": "A", "ovo step 0": "No", "ovo step 1": "No"}
    asked = script(answers)
    given = ["--tasks", "timed", "--data", in_bench, "--out", tmp_path / "out", "--model", timed_checkpoint]
    given += ["--subtitles", "auto", "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", *map(str, given)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {
        name: {metric.removesuffix(",none"): value for metric, value in table["harness"].items()}
        for name, table in report["benchmarks"].items()
    }
    assert found["extremewhenbench"]["extremewhenbench/ewb_mIoU"] == pytest.approx(0.5)
    assert found["extremewhenbench"]["extremewhenbench/ewb_parse_fail"] == 0
    for split in ("activitynet", "charades", "qvhighlights"):
        assert found["timelens"][f"timelens_{split}/timelens_mIOU"] == pytest.approx(200 / 3)
    ovo = found["ovobench"]
    assert ovo["ovo_backward/back_real_acc"] == ovo["ovo_realtime/back_real_acc"] == 100
    assert ovo["ovo_forward/forward_acc"] == 50
    spans = [one for one in asked if "starting and ending times" in one.text]
    assert len(spans) == 5
    assert all("Give the times." in one.text for one in spans), "asked in the form that the model was taught"
    assert not any("Give the times." in one.text for one in asked if "ovo" in one.text)
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    seen = {row["media"][0]: row["frames"] for row in rows if row["task"] == "extremewhenbench"}
    assert seen == {"lvbench/long0.mp4": 4, "lvbench/long1.mp4": 4}
    assert "with subtitles" in (tmp_path / "out/report.md").read_text()


def test_subtitles_are_found_where_the_tasks_keep_them(tmp_path):
    video = tmp_path / "data/a.mp4"
    video.parent.mkdir()
    video.write_bytes(b"x")
    assert subtitles_of(Medium(str(video))) is None
    for place in (
        "subtitles/a_en.json",
        "subtitle/a.srt",
        "data/subtitle/a.jsonl",
        "data/a.vtt",
    ):  # the later, the nearer
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        assert subtitles_of(Medium(str(video))) == str(file)
