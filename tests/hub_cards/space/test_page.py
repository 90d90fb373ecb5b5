"""The page's calls, as a program makes them: reading, asking, the state file, and what goes wrong."""

import re
import shutil
from pathlib import Path

import pytest

gradio_client = pytest.importorskip("gradio_client")
pytestmark = [pytest.mark.bundled, pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")]
VIDEO = Path(__file__).resolve().parents[3] / "examples" / "videos" / "000000.mp4"
QUESTIONS = {"Which sign did the card show?": "2", "How many squares are there?": "1"}  # with right answers
SPANS = ("Shown from 0:00 to 0:01.", "Shown from", "Shown from 0:03 to 0:13.")  # a count has no one span


@pytest.fixture
def client(served):
    """A visitor of their own."""
    return gradio_client.Client(served.url, verbose=False)


def read(client, video: Path = VIDEO, fps: float = 1.0) -> list[str]:
    """What the page says, in turn, while it reads."""
    job = client.submit(gradio_client.handle_file(str(video)), fps, api_name="/read")
    job.result(timeout=250)
    return [output[0] for output in job.outputs() if isinstance(output[0], str)]  # the others change something else


def where(client) -> tuple[str, str]:
    """The filmstrip, and what the page says."""
    job = client.submit(api_name="/where")
    job.result(timeout=250)
    strips = [strip for strip, *_ in job.outputs() if isinstance(strip, str)]
    said = [said for _, said, *_ in job.outputs() if isinstance(said, str)]
    return strips[-1], said[-1]


def ask(client, question: str) -> tuple[list[str], str]:
    """Texts of the conversation afterwards, and what the page says."""
    job = client.submit(question, api_name="/ask")
    job.result(timeout=250)
    seen = [(messages, said) for messages, _, said, *_ in job.outputs() if isinstance(said, str)]
    return texts_of(seen[-1][0]), seen[-1][1]


def texts_of(messages: list[dict]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"]]


def alert(said: str) -> str:
    assert said.startswith('<p role="alert"'), said
    return said


def test_read_ask_twice_keep_and_go_on(client, served, tmp_path: Path):
    before = len(served.readings)
    said = read(client)
    assert said[0].startswith("<progress")
    assert "40 frames of 40 s of video read" in said[-1]
    assert "kept in 2.8 MB" in said[-1]
    texts = []
    for (question, answer), span in zip(QUESTIONS.items(), SPANS, strict=False):
        texts += [question, answer]
        told, said = ask(client, question)
        assert told == texts and span in said
    assert len(served.readings) == before + 1  # the second question read nothing again

    said, file = client.predict(api_name="/save")
    assert ".state, 2.8 MB" in said
    other = gradio_client.Client(served.url, verbose=False)
    said, messages, *_ = other.predict(gradio_client.handle_file(file), api_name="/open")
    assert "40 frames of 40 s of video read" in said
    assert texts_of(messages) == texts
    question, answer = "What shape is the red object?", "circle"
    told, said = ask(other, question)
    assert told == [*texts, question, answer] and SPANS[2] in said
    assert len(served.readings) == before + 1

    from video_ma2mba.loading import load_pipeline

    pipe = load_pipeline(device="cpu")  # the file is one that `video-ma2mba ask` takes, and with the same answer
    from video_ma2mba import VideoState

    assert pipe.ask(VideoState.load(file), question, max_new_tokens=32) == answer


def test_errors_are_sentences(client, tmp_path: Path):
    assert "read a video first" in alert(ask(client, "What?")[1]).lower()
    assert "nothing to save" in alert(client.predict(api_name="/save")[0])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"<script>alert(1)</script>" * 100)
    said = alert(read(client, broken)[-1])
    assert "<script" not in said and ">broken.mp4: " in said.lower()
    assert "/broken.mp4" not in said and "uploads" not in said  # where it lies on this machine is nobody's business
    other = shutil.copy(VIDEO, tmp_path / "film.state")
    assert "not a readable state file" in alert(client.predict(gradio_client.handle_file(other), api_name="/open")[0])
    read(client)
    assert "the question is empty" in alert(ask(client, "  ")[1]).lower()


def test_an_example_is_shown_wherever_the_command_was_started(client, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page may show files below it without being told
    shown, *_ = client.predict("Video 1 (40 s)", api_name="/pick")
    assert Path(shown).stat().st_size == VIDEO.stat().st_size


def test_a_failed_reading_keeps_what_was_read_before(client, tmp_path: Path):
    read(client)
    (question, answer), *_ = QUESTIONS.items()
    ask(client, question)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    alert(read(client, broken)[-1])
    assert ask(client, question)[0] == [question, answer] * 2
    client.predict(api_name="/forget")
    assert ask(client, question)[0] == [question, answer]


def test_the_filmstrip_marks_the_second_that_the_answer_rests_on(client, monkeypatch):
    monkeypatch.setattr("video_ma2mba.hub_cards.relevance_strip._STEPS", 4)
    read(client, VIDEO.with_name("000001.mp4"))
    assert "ask a question first" in alert(where(client)[1]).lower()
    ask(client, "Which sign did the card show?")
    strip, said = where(client)
    assert said == ""
    assert strip.count("<img") == 8
    (best,) = re.findall(r'<li class="best">.*? alt="([^"]+)"', strip)
    assert best == "Second 5: 100 % of the strongest, for the answer"  # when the card is held up


def test_a_state_file_has_no_filmstrip(client):
    read(client)
    ask(client, "Which sign did the card show?")
    _, file = client.predict(api_name="/save")
    client.predict(gradio_client.handle_file(file), api_name="/open")
    assert "a state file holds no pictures" in alert(where(client)[1]).lower()
