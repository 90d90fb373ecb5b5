"""A file of answers that is used again: an answer belongs to the content that was shown, and an error is no answer."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from video_ma2mba.eval.answer_log import AnswerLog, read_rows
from video_ma2mba.eval.lmms_adapter import VideoMa2mbaChat, VideoMa2mbaSimple
from video_ma2mba.eval.lmms_replay import ReplaySimple

SETTINGS = {"max_new_tokens": 4, "do_sample": False, "until": ["\n\n"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read")


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path):
    from video_ma2mba.loading import load_pipeline

    return load_pipeline(str(tiny_checkpoint), device="cpu")


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 255 - shade, shade))


@pytest.fixture
def clips(tmp_path):
    """Folders of pictures: three videos of different content."""
    for number in range(3):
        folder = tmp_path / f"clip{number}"
        folder.mkdir()
        for frame in range(2):
            picture(100 * number + 10 * frame).save(folder / f"{frame}.png")
    return [str(tmp_path / f"clip{number}") for number in range(3)]


class Run:
    """Asks about documents, one after the other, with a file of answers."""

    def __init__(self, pipe, log, kind=VideoMa2mbaSimple, **settings):
        self.pipe, self.log, self.kind, self.settings = pipe, log, kind, settings

    def __call__(self, docs, question="What is shown?"):
        model = self.kind(pipe=self.pipe, answers=str(self.log), stop_repeat_ngram=0, **self.settings)
        model.task_dict = {"t": {"test": docs}}
        self.answers = [result.text for result in model.generate_until(self.requests(docs, question))]
        self.given, self.reused, self.said = model.answerer.answered, model.answerer.reused, model.summary
        return self.answers

    def requests(self, docs, question):
        def messages(doc):
            media = [{"type": "video" if isinstance(v, str) else "image", "url": v} for v in doc["visuals"]]
            return [{"role": "user", "content": [*media, {"type": "text", "text": doc.get("said", question)}]}]

        found = []
        for number in range(len(docs)):
            if self.kind is VideoMa2mbaChat:
                arguments = (question, messages, dict(SETTINGS), number, "t", "test")
            else:
                arguments = (question, dict(SETTINGS), lambda doc: doc["visuals"], number, "t", "test")
            found.append(SimpleNamespace(args=arguments, metadata={}))
        return found


def right(pipe, source, question="What is shown?"):
    return pipe.ask(pipe.read(source, fps=1), question, max_new_tokens=4).strip()


@pytest.mark.parametrize("kind", [VideoMa2mbaSimple, VideoMa2mbaChat])
def test_a_row_in_front_moves_all_others(pipe, clips, tmp_path, kind):
    run = Run(pipe, tmp_path / "a.jsonl", kind, folder_fps=1.0)
    docs = [{"visuals": [clip]} for clip in clips]
    run(docs[:2])
    assert (run.given, run.reused) == (2, 0)
    answers = run([docs[2], docs[0], docs[1]])
    frames = [[picture(100 * number + 10 * frame) for frame in range(2)] for number in (2, 0, 1)]
    assert answers == [right(pipe, clip) for clip in frames]
    assert (run.given, run.reused) == (3, 0) and "2 answers there" in run.said and "replaced" in run.said
    rows = read_rows(tmp_path / "a.jsonl")
    assert sorted(row["doc_id"] for row in rows) == [0, 1, 2], "each question has one answer"
    assert ReplaySimple(str(tmp_path / "a.jsonl")).generate_until(run.requests(docs, "")) == answers
    assert run([docs[2], docs[0], docs[1]]) == answers
    assert (run.given, run.reused) == (0, 3) and "replaced" not in run.said


def test_the_same_name_with_another_content(pipe, clips, tmp_path):
    run = Run(pipe, tmp_path / "a.jsonl", folder_fps=1.0)
    docs = [{"visuals": [clips[0]]}]
    run(docs)
    shutil.copytree(clips[2], clips[0], dirs_exist_ok=True)
    assert run(docs) == [right(pipe, [picture(200), picture(210)])] and run.given == 1
    moved = tmp_path / "elsewhere"
    shutil.move(clips[0], moved)
    run([{"visuals": [str(moved)]}])
    assert (run.given, run.reused) == (0, 1), "the name does not matter"


def test_pictures_in_memory(pipe, tmp_path):
    run = Run(pipe, tmp_path / "a.jsonl")
    for shade, given in ((0, 1), (0, 0), (200, 1), (200, 0)):
        run([{"visuals": [picture(shade)]}])
        assert run.given == given


def test_words_count_too(pipe, clips, tmp_path):
    run = Run(pipe, tmp_path / "a.jsonl", VideoMa2mbaChat, folder_fps=1.0)
    for said, given in (("Who?", 1), ("Why?", 1), ("Why?", 0)):
        run([{"visuals": clips[:1], "said": said}])  # the task's context stays the same
        assert run.given == given


def test_another_way_of_looking(pipe, clips, tmp_path):
    docs = [{"visuals": clips[:1]}]
    for settings, given in (({}, 1), ({}, 0), ({"num_frames": 1}, 1), ({"max_frames": 1}, 1), ({"fps": 3.0}, 1)):
        run = Run(pipe, tmp_path / "a.jsonl", **settings)
        run(docs)
        assert run.given == given


def test_errors_are_no_answers(pipe, clips, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    docs = [{"visuals": [str(broken)]}, {"visuals": [clips[0]]}]
    skip = Run(pipe, tmp_path / "a.jsonl", broken="skip", folder_fps=1.0)
    assert skip(docs)[0] == ""
    assert skip(docs)[0] == "" and (skip.given, skip.reused) == (1, 1)
    rows = read_rows(tmp_path / "a.jsonl")
    assert [row["doc_id"] for row in rows if "error" in row] == [0] and len(rows) == 2
    assert ReplaySimple(str(tmp_path / "a.jsonl")).generate_until(skip.requests(docs, ""))[0] == ""
    stop = Run(pipe, tmp_path / "a.jsonl", folder_fps=1.0)
    with pytest.raises(ValueError, match="document 0"):
        stop(docs)
    broken.unlink()
    shutil.copytree(clips[1], broken)
    assert stop(docs)[0] == right(pipe, [picture(100), picture(110)])
    assert not any("error" in row for row in read_rows(tmp_path / "a.jsonl"))


def test_an_answer_counts_more_than_an_error_of_the_same_question(tmp_path):
    log = AnswerLog(tmp_path / "a.jsonl")
    row = {"key": "k", "task": "t", "doc_id": 0}
    log.add({**row, "answer": "", "error": "no memory"})
    assert not AnswerLog(tmp_path / "a.jsonl").holds("k")
    log.add({**row, "answer": "yes"})
    again = AnswerLog(tmp_path / "a.jsonl")
    assert again.holds("k") and ReplaySimple(str(tmp_path / "a.jsonl")).known == {("t", 0, 0): "yes"}
    again.expect(("t", 0, 0), "k")
    assert again.drop_others() == 1 and [row["answer"] for row in read_rows(tmp_path / "a.jsonl")] == ["yes"]


def test_files_of_other_ranks_are_looked_through_too(tmp_path):
    for rank, key in ((0, "old"), (1, "older"), (2, "new")):
        AnswerLog(tmp_path / "a.jsonl", rank).add({"key": key, "task": "t", "doc_id": 0, "answer": key})
    log = AnswerLog(tmp_path / "a.jsonl")
    log.expect(("t", 0, 0), "new")
    assert log.holds("new") and log.drop_others() == 2
    assert ReplaySimple(str(tmp_path)).known == {("t", 0, 0): "new"}
