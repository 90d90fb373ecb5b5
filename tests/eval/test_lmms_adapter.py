"""The adapter beyond single questions: states found again, answers found again, rounds, likelihoods, bad input."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from video_ma2mba.eval import answer_log
from video_ma2mba.eval.answer_log import AnswerLog, read_rows
from video_ma2mba.eval.lmms_adapter import VideoMa2mbaChat, VideoMa2mbaSimple
from video_ma2mba.eval.lmms_requests import job_of, prompt_of_messages
from video_ma2mba.eval.media import Medium, frames_of_folder, media_of

GREEDY = {"max_new_tokens": 5, "do_sample": False, "temperature": 0, "until": ["\n\n"]}


@pytest.fixture
def pipe(tiny_checkpoint: Path):
    from video_ma2mba.loading import load_pipeline

    return load_pipeline(str(tiny_checkpoint), device="cpu")


def requests(docs: list[dict], context: str = "What is shown?", settings: dict = GREEDY) -> list[SimpleNamespace]:
    arguments = [
        (f"{context} {i}", dict(settings), lambda doc: doc["visuals"], i, "t", "test") for i in range(len(docs))
    ]
    return [SimpleNamespace(args=args, metadata={}) for args in arguments]


def adapter(pipe, docs: list[dict], kind=VideoMa2mbaSimple, **settings):
    model = kind(pipe=pipe, **settings)
    model.task_dict = {"t": {"test": docs}}
    return model


def test_answers_are_those_of_the_pipeline(pipe, tiny_video: Path):
    """In whatever order and company a question is asked."""
    pictures = [Image.new("RGB", (20, 20), (60 * place, 0, 0)) for place in range(3)]
    sources = [[str(tiny_video)], pictures, [str(tiny_video)], [pictures[0]], []]
    docs = [{"visuals": visuals} for visuals in sources]
    model = adapter(pipe, docs, batch_size=3, fps=2, stop_repeat_ngram=0)
    found = [result.text for result in model.generate_until(requests(docs))]
    expected = []
    for number, visuals in enumerate(sources):
        question = f"What is shown? {number}"
        if not visuals:
            expected.append(pipe([{"role": "user", "content": question}], max_new_tokens=5)[0]["answer"])
            continue
        state = pipe.read(visuals[0] if isinstance(visuals[0], str) else visuals, fps=2)
        expected.append(pipe.ask(state, question, max_new_tokens=5))
    assert found == expected
    assert len(set(found)) > 1
    assert model.store.tally.videos_read == 3 and model.answerer.spared == 1


def test_states_are_known_by_content(pipe, tiny_video: Path, tmp_path: Path):
    """A copy under another name is not read again; another rate is another state; a damaged file is read anew."""
    copy = tmp_path / "other.mp4"
    shutil.copy(tiny_video, copy)
    docs = [{"visuals": [str(tiny_video)]}, {"visuals": [str(copy)]}]
    kept = tmp_path / "states"
    first = adapter(pipe, docs, cache_dir=str(kept))
    answers = [result.text for result in first.generate_until(requests(docs))]
    assert (first.store.tally.videos_read, first.store.tally.from_memory) == (1, 1)
    (file,) = kept.glob("*.state")

    second = adapter(pipe, docs, cache_dir=str(kept))
    assert [result.text for result in second.generate_until(requests(docs))] == answers
    assert (second.store.tally.videos_read, second.store.tally.from_disk) == (0, 1)
    assert second.answerer.seconds_saved > 0

    other = adapter(pipe, docs, cache_dir=str(kept), num_frames=3)
    other.generate_until(requests(docs))
    assert other.store.tally.videos_read == 1 and len(list(kept.glob("*.state"))) == 2

    file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="read again"):
        adapter(pipe, docs, cache_dir=str(kept)).generate_until(requests(docs))


def test_memory_and_folder_are_bounded(pipe, tmp_path: Path):
    docs = [{"visuals": [Image.new("RGB", (16, 16), (place, 0, 0))]} for place in range(4)]
    size = pipe.read(docs[0]["visuals"]).nbytes
    model = adapter(pipe, docs, cache_states=2, cache_dir=str(tmp_path), cache_gb=2.9 * size / 1e9)
    model.generate_until(requests(docs))
    assert len(model.store._states) == 2
    assert 1 <= len(list(tmp_path.glob("*.state"))) <= 2


def test_answers_survive_and_are_used_again(pipe, tiny_video: Path, tmp_path: Path):
    docs = [{"visuals": [str(tiny_video)]}] * 4
    log = tmp_path / "answers.jsonl"
    whole = adapter(pipe, docs, answers=str(log))
    answers = [result.text for result in whole.generate_until(requests(docs))]
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2]) + lines[2][:40])  # killed while writing the third
    again = adapter(pipe, docs, answers=str(log))
    assert [result.text for result in again.generate_until(requests(docs))] == answers
    assert (again.answerer.reused, again.answerer.answered) == (2, 2)
    assert [row["doc_id"] for row in read_rows(log)] == [0, 1, 2, 3]
    changed = adapter(pipe, docs, answers=str(log), num_frames=2)  # other frames: other answers
    changed.generate_until(requests(docs))
    assert changed.answerer.reused == 0
    log.write_text("not json\n" + lines[0])
    with pytest.raises(ValueError, match="answers.jsonl, line 1"):
        AnswerLog(log)


def test_a_full_disk_is_named_and_keeps_what_was_written(pipe, tiny_video: Path, tmp_path: Path, monkeypatch):
    docs = [{"visuals": [str(tiny_video)]}] * 3
    log, written = tmp_path / "answers.jsonl", []
    real = answer_log._write

    def full(file, line: bytes) -> None:
        written.append(line)
        if len(written) == 3:
            real(file, line[:30])  # as far as there was room
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, line)

    monkeypatch.setattr(answer_log, "_write", full)
    with pytest.raises(OSError, match=r"No space left on device\); 2 are safe"):
        adapter(pipe, docs, answers=str(log)).generate_until(requests(docs))
    assert log.read_bytes() == b"".join(written[:2])
    monkeypatch.setattr(answer_log, "_write", real)
    model = adapter(pipe, docs, answers=str(log))
    model.generate_until(requests(docs))
    assert (model.answerer.reused, model.answerer.answered) == (2, 1)


def test_a_video_that_cannot_be_read(pipe, tiny_video: Path, tmp_path: Path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(tiny_video.read_bytes()[:300])
    docs = [{"visuals": [str(broken)]}, {"visuals": [str(tiny_video)]}]
    with pytest.raises(ValueError, match=r"t, document 0: .*broken.mp4.*broken=skip"):
        adapter(pipe, docs).generate_until(requests(docs))
    log = tmp_path / "answers.jsonl"
    with pytest.warns(UserWarning, match="stay empty"):
        adapter(pipe, docs, broken="skip", answers=str(log)).generate_until(requests(docs))
    first, second = read_rows(log)
    assert first["answer"] == "" and "broken.mp4" in first["error"]
    assert second["answer"] and "error" not in second


@pytest.mark.parametrize(
    "setting", ["fps=0", "num_frames=0", "broken=maybe", "cache_states=0", "stop_repeat_ngram=-1"]
)
def test_bad_settings(setting: str, pipe):
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=name):
        adapter(pipe, [], **{name: int(value) if value.lstrip("-").isdecimal() else value})


def test_rounds_see_what_was_answered(pipe, tiny_video: Path):
    """The task gives media and text round by round, in both interfaces."""
    docs = [{"visuals": [str(tiny_video)]}]
    told = []

    def text(doc, previous_output=None, round_idx=None, previous_round_info=None):
        told.append((list(previous_output), round_idx, previous_round_info))
        return doc["visuals"], f"Round {round_idx}", round_idx == 2, previous_output, "note"

    def messages(doc, round_idx=None, **told_too):
        turn = [{"role": "user", "content": [{"type": "video", "url": doc["visuals"][0]}]}]
        turn[0]["content"].append({"type": "text", "text": f"Round {round_idx or 0}"})
        if round_idx is None:
            return turn
        _, _, is_over, previous, note = text(doc, round_idx=round_idx, **told_too)
        return turn, is_over, previous, note

    simple = SimpleNamespace(args=("Round 0", dict(GREEDY), lambda d: d["visuals"], text, 0, "t", "test"), metadata={})
    chat = SimpleNamespace(args=("Round 0", messages, dict(GREEDY), 0, "t", "test"), metadata={})
    model = adapter(pipe, docs)
    (answers,) = model.generate_until_multi_round([simple])
    state = pipe.read(str(tiny_video))
    assert answers == [pipe.ask(state, f"Round {number}", max_new_tokens=5) for number in range(2)]
    assert told == [([answers[0]], 1, None), (answers, 2, "note")]
    assert model.store.tally.videos_read == 1
    told.clear()
    assert adapter(pipe, docs, VideoMa2mbaChat).generate_until_multi_round([chat]) == [answers]
    assert told == [([answers[0]], 1, None), (answers, 2, "note")]


def test_likelihoods_are_refused(pipe, tiny_video: Path):
    with pytest.raises(NotImplementedError, match="name a task that generates answers"):
        adapter(pipe, [{"visuals": [str(tiny_video)]}]).loglikelihood([])


def test_messages_of_all_kinds(tmp_path: Path):
    """Media before all text are read once; elsewhere the whole conversation is kept as it is."""
    picture = Image.new("RGB", (2, 2))
    video = {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": 2.5}
    ask = {"type": "text", "text": "What? <image>"}
    images = [{"type": "image", "url": picture}] * 2
    prompt = prompt_of_messages(
        [{"role": "user", "content": [video, *images, ask]}, {"role": "assistant", "content": "x"}]
    )
    assert prompt.media == (Medium("a.mp4", 1.0, 2.5), Medium((picture, picture)))
    assert prompt.messages[0]["content"] == [{"type": "text", "text": "What? "}] and len(prompt.messages) == 2
    late = prompt_of_messages([{"role": "user", "content": [ask, {"type": "video", "url": "a.mp4"}]}])
    assert late.whole and late.messages[0]["content"][1] == {"type": "video", "video": "a.mp4"}
    assert (
        prompt_of_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [ask]}]).media
        == ()
    )
    with pytest.raises(TypeError, match="audio"):
        prompt_of_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}, ask]}])
    with pytest.raises(TypeError, match="part of a video"):
        prompt_of_messages([{"role": "user", "content": [ask, video]}])
    with pytest.raises(TypeError, match="int"):
        media_of([3])


def test_a_conversation_with_media_inside_is_read_whole(pipe, tiny_video: Path):
    docs = [{}]
    content = [{"type": "text", "text": "Look:"}, {"type": "video", "url": str(tiny_video)}]
    request = SimpleNamespace(
        args=("x", lambda doc: [{"role": "user", "content": content}], dict(GREEDY), 0, "t", "test"), metadata={}
    )
    (found,) = adapter(pipe, docs, VideoMa2mbaChat).generate_until([request])
    plain = [{"role": "user", "content": [content[0], {"type": "video", "video": str(tiny_video)}]}]
    assert found.text == pipe(plain, max_new_tokens=5, fps=1)[0]["answer"]


def test_generation_settings_and_endings(pipe, tiny_video: Path, script):
    script({"": "One.\n\nTwo. ASSISTANT: three"})
    docs = [{"visuals": [str(tiny_video)]}]
    settings = {"until": ["\n\n", "ASSISTANT:"], "image_aspect_ratio": "original", "temperature": 0.7, "top_p": 0.9}
    (found,) = adapter(pipe, docs).generate_until(requests(docs, settings=settings))
    assert found.text == "One.\n\nTwo."  # what the harness injects does not cut an answer of several paragraphs
    job = job_of(requests(docs, settings=settings)[0])
    assert job.generation == {"temperature": 0.7, "top_p": 0.9, "do_sample": True}
    assert job_of(requests(docs, settings=GREEDY)[0]).generation == {"max_new_tokens": 5, "do_sample": False}


def test_several_drawn_answers_to_one_question_differ(pipe, tiny_video: Path):
    docs = [{"visuals": [str(tiny_video)]}]
    drawn = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0}
    model = adapter(pipe, docs)
    texts = {result.text for result in model.generate_until(requests(docs, settings=drawn) * 4)}
    assert len(texts) > 1 and model.answerer.answered == 4
    padded = requests(docs, settings=drawn)
    padded[0].metadata["__padding_only__"] = True
    model.generate_until(padded)
    assert model.answerer.answered == 4


def test_folders_are_thinned_to_the_rate(tmp_path: Path):
    for number in range(7):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{number}.png")
    names = lambda **how: [Path(file).stem for file in frames_of_folder(str(tmp_path), **how)]  # noqa: E731
    assert names(folder_fps=3.0, fps=1.0) == ["0", "3", "6"]
    assert names(folder_fps=3.0, fps=2.0) == ["0", "1", "3", "4", "6"]
    assert names(folder_fps=3.0, fps=None) == names(folder_fps=1.0, fps=2.0) == list("0123456")


def test_two_processes_do_not_share_a_file(tmp_path: Path):
    first, second = (AnswerLog(tmp_path / "answers.jsonl", rank) for rank in range(2))
    first.add({"key": "a", "answer": "1"})
    second.add({"key": "b", "answer": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.rank1.jsonl"]
    assert set(AnswerLog(tmp_path / "answers.jsonl", 1).answers) == {"a", "b"}
    assert json.loads((tmp_path / "answers.rank1.jsonl").read_text()) == {"key": "b", "answer": "2"}
