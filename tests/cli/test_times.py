"""Times and subtitles from the command line: `ask --times`, `--subtitles`, `--where`, `read`, `watch`, `describe`."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.explain.description import Description, chapters_of, cut_by_time
from video_ma2mba.loading import load_pipeline
from video_ma2mba.processing.frame_times import Cue
from video_ma2mba.processing.video_reader import open_video
from video_ma2mba.processing.video_subtitles import read_subtitles

SRT = "1\n00:00:01,000 --> 00:00:02,000\nHello\n\n2\n00:00:04,500 --> 00:00:05,000\nBye\n"


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu", "--max-new-tokens", "4"])


@pytest.fixture(scope="module")
def timed_checkpoint(make_timed_checkpoint) -> Path:
    return make_timed_checkpoint(2.0)


@pytest.fixture(scope="module")
def film(tiny_video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 6 seconds with a file of subtitles beside it."""
    folder = tmp_path_factory.mktemp("film")
    shutil.copy(tiny_video, folder / "film.mp4")
    (folder / "film.srt").write_text(SRT)
    return folder / "film.mp4"


def test_ask_with_times_and_subtitles(timed_checkpoint, film):
    asked = run(
        "ask", film, "What?", "--times", "--subtitles", "auto", "--where", "--json", "--model", timed_checkpoint
    )
    assert asked.exit_code == 0, asked.output
    record = json.loads(asked.stdout)
    pipe = load_pipeline(str(timed_checkpoint), device="cpu")
    state = pipe.read(str(film), subtitles=str(film.with_suffix(".srt")))
    expected = pipe.ask(state, "What?", times=True, max_new_tokens=4)
    assert {name: record[name] for name in expected} == expected
    assert expected["start"] is None, "a model of random weights answers with noise, and says that there is no span"
    assert "does not end in [start-end]" in record["reason"]
    assert record["where"] is None or 0 <= record["where"] < 6
    plain = run("ask", film, "What?", "--times", "--subtitles", "auto", "--model", timed_checkpoint)
    assert plain.stdout.strip() == record["answer"]
    assert "no times: the answer does not end in [start-end]" in plain.stderr
    assert pipe(str(film), "What?", subtitles="auto", times=True, max_new_tokens=4) == [expected]


def test_a_checkpoint_without_times_says_so_in_one_line(tiny_checkpoint, film):
    done = run("ask", film, "What?", "--times", "--model", tiny_checkpoint)
    assert done.exit_code != 0
    assert "this checkpoint never learnt times" in done.stderr
    done = run("ask", film, "What?", "--subtitles", film.with_name("none.srt"), "--model", tiny_checkpoint)
    assert done.exit_code != 0
    assert "none.srt: no such file of subtitles" in done.stderr


def test_states_keep_times_and_subtitles(timed_checkpoint, film, tmp_path):
    state = tmp_path / "film.state"
    arguments = ["read", str(film), "--out", str(state), "--subtitles", "auto", "--model", str(timed_checkpoint)]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    shown = json.loads(CliRunner().invoke(app, ["state", "show", str(state), "--json"]).stdout)
    assert shown["sources"][0]["subtitles"]["cues"] == 2
    assert shown["processor"]["frame_times_every"] == 2.0
    from_state = json.loads(run("ask", state, "What?", "--times", "--json", "--model", timed_checkpoint).stdout)
    again = run("ask", film, "What?", "--times", "--json", "--subtitles", "auto", "--model", timed_checkpoint)
    assert from_state["answer"] == json.loads(again.stdout)["answer"]
    refused = run("ask", state, "What?", "--subtitles", "auto", "--model", timed_checkpoint)
    assert "leave subtitles out" in refused.stderr


def test_watch_answers_with_times(timed_checkpoint, film):
    watched = run("watch", film, "--ask", "What?", "--every", "3", "--times", "--json", "--policy", "queue",
                  "--subtitles", film.with_suffix(".srt"), "--model", timed_checkpoint)  # fmt: skip
    assert watched.exit_code == 0, watched.output
    records = [json.loads(line) for line in watched.stdout.splitlines()]
    assert {"answer", "start", "end", "reason"} <= records[0].keys()
    last = run("ask", film, "What?", "--times", "--json", "--subtitles", "auto", "--model", timed_checkpoint)
    assert records[-2]["answer"] == json.loads(last.stdout)["answer"]


def test_describe_reads_once_and_writes_what_players_show(timed_checkpoint, film, tmp_path):
    pipe = load_pipeline(str(timed_checkpoint), device="cpu")
    asked = "What is from {start} to {end}?"
    for kind in ("srt", "vtt", "json", "md"):
        out = tmp_path / f"film.{kind}"
        done = run("describe", film, "--every", "2.5", "--out", out, "--question", asked, "--model", timed_checkpoint)
        assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "film.json").read_text())
    assert [(cue["start"], cue["end"]) for cue in found["segments"]] == [(0, 2.5), (2.5, 5), (5, 6)]
    spans = [("0:00", "0:02.5"), ("0:02.5", "0:05"), ("0:05", "0:06")]
    for end, (start, stop), cue in zip((2.5, 5, None), spans, found["segments"], strict=True):
        state = pipe.read(str(film), end=end)
        assert cue["text"] == pipe.ask(state, asked.format(start=start, end=stop), max_new_tokens=4)
    assert found["summary"] == pipe.ask(pipe.read(str(film)), "Describe the video.", max_new_tokens=4)
    told = [Cue(c["start"], c["end"], " ".join(c["text"].split())) for c in found["segments"] if c["text"].strip()]
    if told:
        for kind in ("srt", "vtt", "json"):
            times = [(cue.start, cue.end) for cue in read_subtitles(tmp_path / f"film.{kind}").cues]
            assert times == [(cue.start, cue.end) for cue in told]
    assert run("describe", film, "--format", "txt", "--model", timed_checkpoint).exit_code != 0
    assert "and no other" in run("describe", film, "--question", "{x}", "--model", timed_checkpoint).stderr


def test_descriptions_are_read_again_as_subtitles(tmp_path):
    """Against FFmpeg's own parsers: what is written is what comes back."""
    segments = [Cue(0, 10, "A dog runs.\nIt barks."), Cue(10, 20, "A dog runs. It barks!"), Cue(20, 3725.25, "Rain")]
    found = Description("film.mp4", 3725.25, segments, chapters_of(segments), "A dog, then --> rain.")
    assert found.chapters == [Cue(0, 20, "A dog runs."), Cue(20, 3725.25, "Rain")]
    for kind in ("srt", "vtt", "json"):
        (tmp_path / kind).write_text(found.text(kind))
        told = read_subtitles(tmp_path / kind)
        assert told.problems == []
        assert told.cues == [Cue(c.start, c.end, " ".join(c.text.split())) for c in segments]
    assert re.search(r"^- 0:20-1:02:05.2 Rain$", found.text("md"), re.M)
    with pytest.raises(ValueError, match="use one of srt, vtt, json, md"):
        found.text("ass")


def test_cuts_keep_every_frame_and_whole_clips(tiny_video):
    for clip in (1, 4):
        frames = open_video(tiny_video, fps=4)
        pieces = list(cut_by_time(frames.chunks(5), 1.6, clip))
        counts = [sum(map(len, chunks)) for _, chunks in pieces]
        assert sum(counts) == 24
        assert all(count % clip == 0 for count in counts[:-1])
        firsts = [next(t for chunk in chunks for t in chunk.timestamps) for _, chunks in pieces]
        assert [number for number, _ in pieces] == [int(first // 1.6) for first in firsts]
