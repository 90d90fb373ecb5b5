"""`ask` with many videos: what is a video and what a question, folders, standard input, failures of some."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli import ask as verb
from video_ma2mba.cli import ask_words
from video_ma2mba.cli.ask_words import split_words
from video_ma2mba.cli.main import app
from video_ma2mba.loading import load_pipeline


@pytest.fixture(scope="module")
def tiny_pipe(tiny_checkpoint):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def here(tmp_path, tiny_video, monkeypatch) -> Path:
    for name in (
        "a.mp4",
        "b c.mp4",
        "-",
        "films/2.webm",
        "films/sub/1.mkv",
        "films/.hidden/3.mp4",
        "Why?",
        "übung.mov",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_video, tmp_path / name)
    (tmp_path / "films" / "notes.txt").write_text("no video")
    (tmp_path / "films" / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, tiny_pipe, monkeypatch):
    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: tiny_pipe)

    def call(*words: str, code: int = 0, data: bytes | None = None):
        found = CliRunner().invoke(app, ["ask", "--max-new-tokens", "3", *words], input=data)
        assert found.exit_code == code, found.output
        return found

    return call


@pytest.mark.parametrize(
    ("words", "behind", "videos", "questions"),
    [
        (["a.mp4"], None, ["a.mp4"], []),
        (["a.mp4", "What?", "Who?"], None, ["a.mp4"], ["What?", "Who?"]),
        (["a.mp4", "b c.mp4", "übung.mov", "Is v1.0 it?"], None, ["a.mp4", "b c.mp4", "übung.mov"], ["Is v1.0 it?"]),
        (["films", "red"], None, ["films/2.webm", "films/sub/1.mkv"], ["red"]),
        (["pictures", "red/blue?"], None, ["pictures"], ["red/blue?"]),
        (["*.m*", "有几个?"], None, ["a.mp4", "b c.mp4", "übung.mov"], ["有几个?"]),
        (["a.mp4", "https://host/f?x=1", "see https://h/"], None, ["a.mp4", "https://host/f?x=1"], ["see https://h/"]),
        (["-", "a.mp4", " What? "], None, ["-", "a.mp4"], ["What?"]),
        (["a.mp4", "Why?"], None, ["a.mp4", "Why?"], []),
        (["a.mp4"], ["Why?", "b c.mp4", "-x"], ["a.mp4"], ["Why?", "b c.mp4", "-x"]),
        (["a.mp4", "films"], ["b.mp5"], ["a.mp4", "films/2.webm", "films/sub/1.mkv"], ["b.mp5"]),
    ],
)  # fmt: skip
def test_files_come_first_and_then_questions(here, words, behind, videos, questions):
    assert split_words(words, behind) == (videos, questions)


@pytest.mark.parametrize(
    ("words", "behind", "told"),
    [
        (["none.mp4", "What?"], None, "none.mp4: no such file"),
        (["A.mp4", "What?"], None, "A.mp4: no such file (is 'a.mp4' meant?)"),
        (["a.mp4", "b d.mp4", "What?"], None, "b d.mp4: no such file (is 'b c.mp4' meant?); a question"),
        (["a.mp4", "films/3.webm", "What?"], None, "films/3.webm: no such file"),
        (["a.mp4", "x.jpeg"], None, "x.jpeg: no such file"),
        (["a.mp4", "other/thing"], None, "other/thing: no such file"),
        (["a.mp4", "../thing"], None, "../thing: no such file"),
        (["a.mp4", "C:\\films\\x"], None, "no such file"),
        (["a.mp4", "*.webm", "What?"], None, "*.webm: no such file"),
        (["a.mp4", "What?", "b c.mp4"], None, "'b c.mp4' is a file and stands behind a question ('What?')"),
        (["a.mp4", "b c.mp4", "a.mp4", "What?"], None, "a.mp4 is named twice"),
        (["a.mp4", " "], None, "a question is empty"),
        (["a.mp4"], ["What?", ""], "a question is empty"),
        (["a.mp4", "What?"], ["Who?"], "What?: no such file"),
        ([], ["What?"], "name a video in front of --"),
    ],
)
def test_what_is_ambiguous_or_misspelt_is_refused(here, words, behind, told):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        split_words(words, behind)
    assert told in str(caught.value)


def test_every_video_has_its_answers(run, tiny_pipe):
    asked = ["How many?", "Who?"]
    found = run("a.mp4", "films", "--json", "--start", "0:02", *asked)
    records = [json.loads(line) for line in found.stdout.splitlines()]
    names = ["a.mp4", "films/2.webm", "films/sub/1.mkv"]
    assert [(r["video"], r["question"]) for r in records] == [(name, question) for name in names for question in asked]
    state = tiny_pipe.read("a.mp4", start=2)
    assert [r["answer"] for r in records] == [tiny_pipe.ask(state, q, max_new_tokens=3) for q in asked] * 3
    assert {r["frames"] for r in records} == {4}
    plain = run("a.mp4", "films/2.webm", "How many?")
    answers = [r["answer"] for r in records if r["question"] == "How many?"]
    shown = run("a.mp4", "films/2.webm", "--start", "2", "How many?").stdout
    assert shown.startswith(f"a.mp4: {answers[0]}") and f"\nfilms/2.webm: {answers[1]}" in shown
    assert "films/2.webm: 6 frames read" in plain.stderr
    assert run("a.mp4", "films/2.webm", "How many?", "-q").stderr == ""


def test_names_stay_on_one_line(run, here):
    (here / "a.mp4").rename(here / "new\nline.mp4")
    found = run("new\nline.mp4", "b c.mp4", "Hm?")
    assert [line.partition(":")[0] for line in found.stdout.splitlines()] == ["new\\nline.mp4", "b c.mp4"]
    assert sum("read in" in line for line in found.stderr.splitlines()) == 2 and "new\n" not in found.stderr


def test_some_fail_and_the_others_are_answered(run, here):
    (here / "films" / "empty.mp4").touch()
    (here / "films" / "torn.mp4").write_bytes((here / "a.mp4").read_bytes()[:300])
    found = run("films", "What?", "--json", code=1)
    records = [json.loads(line) for line in found.stdout.splitlines()]
    assert [r["video"] for r in records] == [f"films/{n}" for n in ("2.webm", "empty.mp4", "sub/1.mkv", "torn.mp4")]
    assert [("error" in r, "answer" in r) for r in records] == [
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert (
        "error: films/empty.mp4: the file is empty" in found.stderr
        and "error: films/torn.mp4: not a v" in found.stderr
    )
    assert found.stderr.endswith("2 of 4 videos answered, 2 failed\n")
    assert "empty.mp4: the file is empty" in run("films/empty.mp4", "What?", code=2).stderr
    state = here / "films" / "seen.state"
    assert CliRunner().invoke(app, ["ask", "a.mp4"], input=f"/save {state}\n/quit\n").exit_code == 0
    assert json.loads(run("films/sub/1.mkv", str(state), "What?", "--json").stdout.splitlines()[1])["frames"] == 6
    assert "is a state file" in run("a.mp4", str(state), "What?", "--fps", "1", code=1).stderr
    assert "fps must be" in run("a.mp4", "films", "What?", "--fps", "0", code=2).stderr


def test_a_video_from_standard_input(run, here, tiny_pipe, monkeypatch):
    data = (here / "a.mp4").read_bytes()
    record = json.loads(run("-", "What?", "--json", data=data).stdout)
    assert record["video"] == "standard input" and record["frames"] == 6
    assert record["answer"] == tiny_pipe.ask(tiny_pipe.read("a.mp4"), "What?", max_new_tokens=3)
    two = run("-", "b c.mp4", "--", "What?", data=data).stdout
    assert two.count(f"standard input: {record['answer']}") == 1 and "b c.mp4: " in two
    assert "standard input is empty" in run("-", "What?", data=b"", code=2).stderr
    assert "is not a video" in (said := run("-", "What?", data=b"text " * 99, code=2).stderr) or "not a video" in said
    assert "has no questions" in run("-", data=data, code=2).stderr
    assert "a conversation is about one video" in run("-", "a.mp4", data=data, code=2).stderr

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(ValueError, match="standard input is a terminal"), ask_words.standard_input():
        pass
    assert not [name for name in os.listdir(here) if "standard" in name]


def test_links_to_folders_are_followed_once(here):
    (here / "shelf").mkdir()
    (here / "shelf" / "films").symlink_to(here / "films")
    (here / "films" / "sub" / "round").symlink_to(here / "films")
    assert split_words(["shelf", "What?"], None)[0] == ["shelf/films/2.webm", "shelf/films/sub/1.mkv"]
