"""`watch` as a user types it: intervals, pipes, real time, Ctrl-C, wrong input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba import VideoState
from video_ma2mba.cli.main import app
from video_ma2mba.cli.watch import clock_text

COMMAND = str(Path(sys.executable).parent / "video-ma2mba")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "videos"
ASKED = "What is shown?"


@pytest.fixture
def run(tiny_checkpoint: Path):
    def run(*arguments):
        model = () if "--model" in arguments else ("--model", tiny_checkpoint)
        return CliRunner().invoke(app, ["watch", *map(str, arguments), *map(str, model)])

    return run


def lines(done) -> list[dict]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_answers_at_an_interval(run, tiny_video, tmp_path):
    file = tmp_path / "seen.state"
    done = run(tiny_video, "--ask", ASKED, "--ask", "Why?", "--every", 2, "--json", "--fps", 2, "--save", file)
    *answers, end = lines(done)
    assert [(a["seconds"], a["frames"], a["question"]) for a in answers] == [
        (second, frames, question)
        for second, frames in ((1.5, 4), (3.5, 8), (5.5, 12))
        for question in (ASKED, "Why?")
    ]
    assert end["counters"]["frames_read"] == 12 and end["counters"]["questions"] == 6
    assert VideoState.load(file).metadata["frames"] == "12"
    again = run(tiny_video, "--ask", ASKED, "--every", 60, "--state", file, "--save", file)
    assert again.exit_code == 0 and again.stdout.startswith("0:00:05  ") and "ended" in again.stderr
    assert "frames_read 6" in again.stderr
    assert VideoState.load(file).metadata["frames"] == "18"


@pytest.mark.bundled
def test_the_bundled_checkpoint_sees_what_comes_through_a_pipe():
    asked = ["--ask", "Which sign did the card show?", "--every", "20", "--json"]
    with (EXAMPLES / "000001.mp4").open("rb") as video:
        done = subprocess.run([COMMAND, "watch", "-", *asked], stdin=video, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr
    *answers, end = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [answer["frames"] for answer in answers] == [20, 40, 55] and end["counters"]["frames_dropped"] == 0
    asked = CliRunner().invoke(app, ["ask", str(EXAMPLES / "000001.mp4"), "Which sign did the card show?", "--json"])
    assert answers[-1]["answer"] == json.loads(asked.stdout)["answer"]


def test_realtime_and_a_time_limit(run, tiny_video):
    began = time.monotonic()
    *answers, end = lines(run(tiny_video, "--ask", ASKED, "--every", 1, "--json", "--realtime", "--for", 2.5))
    assert time.monotonic() - began > 2
    assert 1 <= len(answers) <= 4 and end["counters"]["frames_read"] < 6


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_ctrl_c_saves_and_counts(tiny_checkpoint, tiny_video, tmp_path, sent):
    file = tmp_path / "seen.state"
    arguments = ["--realtime", "--every", "1", "--ask", ASKED, "--save", file, "--model", tiny_checkpoint, "--json"]
    arguments += ["--max-new-tokens", "2"]  # the answer must be there long before the video ends
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A suite started in the background passes on that Ctrl-C is ignored; a user's terminal does not.
    pipe["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([COMMAND, "watch", tiny_video, *arguments], **pipe) as process:
        try:
            first = json.loads(process.stdout.readline())
            process.send_signal(sent)
            out, errors = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    counters = json.loads(out.splitlines()[-1])["counters"]
    assert first["frames"] == 1 and "stopped" in errors and 0 < counters["frames_read"] <= 6
    assert VideoState.load(file).metadata["frames"] == str(counters["frames_read"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.mp4", "--ask", "x"], "nowhere.mp4: no such file"),
        (["rtsp://127.0.0.1:9/x", "--ask", "x", "--timeout", 2], "cannot read from this address"),
        (["gopher://host", "--ask", "x"], "addresses of the kind gopher://"),
        ([__file__, "--ask", "x"], "not a video"),
        (["VIDEO"], "there is nothing to do"),
        (["VIDEO", "--ask", " "], "a question is empty"),
        (["VIDEO", "--ask", "x", "--every", 0], "must be more than 0 seconds"),
        (["VIDEO", "--ask", "x", "--policy", "wish"], "policy must be one of auto, drop, queue"),
        (["VIDEO", "--ask", "x", "--save", "no/where/state"], "there is no folder"),
        (["VIDEO", "--ask", "x", "--save", "/"], "--save / is a folder"),
        (["VIDEO", "--ask", "x", "--fps", 0], "fps must be more than 0"),
        (["VIDEO", "--ask", "x", "--state", "nowhere.state"], "there is no state file"),
        (["VIDEO", "--ask", "x", "--remember", -1], "remember must be more than 0"),
    ],
)
def test_wrong_input_ends_in_one_line(run, tiny_video, arguments, said):
    done = run(*[tiny_video if argument == "VIDEO" else argument for argument in arguments])
    assert done.exit_code == 2 and done.stdout == "", done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line


def test_clock_text():
    assert [clock_text(s) for s in (0, 59.9, 3600, 90061)] == ["0:00:00", "0:00:59", "1:00:00", "25:01:01"]
