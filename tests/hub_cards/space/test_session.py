"""Reading and answering in the background: what is handed over, how it ends, what is kept."""

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from video_ma2mba import EXAMPLE_VIDEOS as EXAMPLES
from video_ma2mba.hub_cards.space.web.background import Stopped, latest_reports
from video_ma2mba.hub_cards.space.web.markup import note, problem, progress, span, what_was_read
from video_ma2mba.hub_cards.space.web.session import Session
from video_ma2mba.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


def test_reports_arrive_and_the_last_one_always():
    def work(report) -> str:
        for number in range(1000):
            report(number)
        return "done"

    seen = list(results := _Kept(latest_reports(work, every=0.001)))
    assert results.value == "done"
    assert seen == sorted(seen)
    assert seen[-1] == 999


class _Kept:
    """Iterates over a generator and keeps what it returns."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        self.value = yield from self.generator


def test_an_error_in_the_thread_is_raised_here():
    def work(report) -> None:
        report("first")
        raise ValueError("a broken video")

    reports = latest_reports(work, every=0.001)
    with pytest.raises(ValueError, match="a broken video"):
        list(reports)


def test_work_ends_when_nobody_listens():
    ended = threading.Event()

    def work(report) -> None:
        try:
            while True:
                report(1)
        finally:
            ended.set()

    reports = latest_reports(work, every=0.001)
    next(reports)
    reports.close()
    assert ended.is_set()


def test_stopping_keeps_what_was_there_before(pipe, tiny_video: Path):
    session = Session()
    list(session.read(pipe, str(tiny_video), fps=1))
    before = session.state

    class Slow:
        def read(self, video, *, fps, on_frames):
            on_frames(1, 10)
            while not session.stopped:
                time.sleep(0.001)
            on_frames(2, 10)
            raise AssertionError("it was to stop")

    reading = session.read(Slow(), "film.mp4", fps=1)
    assert next(reading) == (1, 10)
    session.stopped = True
    with pytest.raises(Stopped):
        next(reading)
    assert session.state is before
    assert session.video == str(tiny_video)


def test_a_stopped_reading_can_be_asked_and_goes_on_to_the_same_bits(pipe, tmp_path: Path):
    film, size = EXAMPLES / "000001.mp4", pipe.model.config.read_chunk_frames
    whole = pipe.read(str(film), fps=8)
    frames = int(whole.metadata["frames"])
    assert frames > 2 * size, "more than two chunks, or nothing is left to read"

    session = Session()
    for seen, expected in session.read(pipe, str(film), fps=8):
        session.stopped = session.stopped or seen > 0
        assert expected == frames
    stopped = int(session.state.metadata["frames"])
    assert 0 < stopped < frames and session.unfinished
    assert session.state.metadata["unfinished"] == str(stopped)
    assert float(session.state.metadata["seconds"]) == pytest.approx(stopped / 8, abs=0.1)
    assert "go on" in what_was_read(session)
    list(session.ask(pipe, "What is shown?"))
    assert session.messages[1]["content"] == pipe.ask(session.state, "What is shown?", max_new_tokens=128)

    session.save(tmp_path)
    counted = [seen for seen, _ in session.go_on(pipe)]
    assert counted[0] > 0 and counted[-1] == frames
    assert not session.unfinished and "unfinished" not in session.state.metadata
    assert session.state.fingerprint() == whole.fingerprint()
    assert session.state.metadata == {**whole.metadata}
    with pytest.raises(ValueError, match="no reading to go on with"):
        list(session.go_on(pipe))


def test_the_answer_grows(pipe, tiny_video: Path):
    session = Session()
    with pytest.raises(ValueError, match="read a video first"):
        list(session.ask(pipe, "What?"))
    list(session.read(pipe, str(tiny_video), fps=1))
    answers = list(session.ask(pipe, " What is shown? "))
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    assert session.messages[0] == {"role": "user", "content": "What is shown?"}
    assert session.messages[1]["content"] == pipe.ask(session.state, "What is shown?", max_new_tokens=128)


def test_an_answer_with_times_names_its_seconds(pipe, make_timed_checkpoint, tiny_video: Path, monkeypatch):
    timed = load_pipeline(str(make_timed_checkpoint(1.0)), device="cpu")
    session = Session()
    list(session.read(timed, str(tiny_video), fps=1))
    said = {"text": "red [0:01-1:02:03.5]"}
    monkeypatch.setattr(timed.processor.tokenizer, "batch_decode", lambda rows, **_: [said["text"]] * len(rows))
    list(session.ask(timed, "What?", times=True))
    assert (session.messages[-1]["content"], session.span) == ("red", (1.0, 3723.5))
    shown = span(session.span)
    assert "Shown from 0:01 to 1:02:03.5." in shown
    assert "film.currentTime = 1.000;" in shown
    said["text"] = "red"
    list(session.ask(timed, "What else?", times=True))
    assert session.span is None
    assert "names no times" in span(session.span)
    list(session.read(pipe, str(tiny_video), fps=1))
    with pytest.raises(ValueError, match="never learnt times"):
        list(session.ask(pipe, "What?", times=True))
    pytest.importorskip("gradio")
    from video_ma2mba.hub_cards.space.web.layout import build_page

    for model in (timed, pipe):
        parts = [part["props"] for part in build_page(model, [], "Ask", "").config["components"]]
        (box,) = [part for part in parts if part.get("label") == "With the seconds that show the answer"]
        assert box["visible"] is box["value"] is (model is timed), "only where the model tells times"


@pytest.mark.parametrize("chat", ["{", "[1]", '[{"role": "user", "content": "x"}]', '[{"role": "user"}]'])
def test_damaged_conversations_are_refused(chat: str, pipe, tiny_video: Path, tmp_path: Path):
    session = Session()
    list(session.read(pipe, str(tiny_video), fps=1))
    file = session.save(tmp_path)
    assert file.parent.parent == tmp_path
    session.state.metadata["chat"] = chat
    session.state.save(file)
    other = Session()
    with pytest.raises(ValueError, match="conversation in the state file is damaged"):
        other.open(pipe, file)
    assert other.state is None


def test_states_of_other_models_are_refused(pipe, make_model, tiny_video: Path, tmp_path: Path):
    session = Session()
    list(session.read(pipe, str(tiny_video), fps=1))
    facts = json.loads(session.state.metadata["model_config"]) | {"spatial_pool_mode": "of another kind"}
    session.state.metadata["model_config"] = json.dumps(facts)
    with pytest.raises(ValueError, match="belongs to another model: spatial_pool_mode"):
        Session().open(pipe, session.save(tmp_path))


def test_nothing_foreign_is_shown_as_html():
    evil = "<img src=x onerror=alert(1)>"
    for shown in (note(evil), problem(ValueError(evil))):
        assert "<img" not in shown
    assert 'value="3" max="3"' in progress(5, 3)
    assert "max" not in progress(5, None)
