"""`video-ma2mba batch`: every line gets its result, whatever happens to the process, the videos or the disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from video_ma2mba import VideoState
from video_ma2mba.cli import batch as verb
from video_ma2mba.cli import batch_queue, batch_work
from video_ma2mba.cli.main import app
from video_ma2mba.files import remote_files
from video_ma2mba.loading import load_pipeline
from video_ma2mba.modeling_video_ma2mba import answering_batches


@pytest.fixture(scope="module")
def tiny_pipe(tiny_checkpoint):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def run(tiny_checkpoint, tiny_pipe, monkeypatch):
    """Runs the verb in this process; `tiny_pipe` is loaded once."""
    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: tiny_pipe)

    def call(*arguments, code: int | None = None):
        found = CliRunner().invoke(app, ["batch", *map(str, arguments), "--max-new-tokens", "3"])
        if code is None:  # of a queue that was worked through: whether there are errors among the results
            code = int(any("error" in result for result in results(arguments[1])))
        assert found.exit_code == code, found.output
        return found.stderr

    return call


def write(path: Path, items) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def results(path: Path | str) -> list[dict]:
    with fsspec.open(str(path), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def queue(tmp_path, tiny_video) -> Path:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(tiny_video.read_bytes()[:300])
    items = [
        {"video": str(tiny_video), "question": "What is shown?", "id": "first"},
        {"video": str(tmp_path / "absent.mp4"), "question": "Why?", "id": 2},
        {"video": str(tiny_video), "questions": ["How many squares are there?", "Who?"]},
        {"video": str(damaged), "questions": ["Why?"]},
        {"video": str(tiny_video)},
        {"video": str(tiny_video), "question": " "},
        {"video": str(tiny_video), "question": "Last?"},
    ]
    path = write(tmp_path / "in.jsonl", items)
    with path.open("a") as file:
        file.write("\nnot JSON\n")
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_one_line_for_each_item(run, queue, tmp_path, tiny_video, tiny_pipe, batch_size):
    seen = []
    hook = tiny_pipe.model.model.vision_tower.embeddings.register_forward_hook(lambda _, i, __: seen.append(len(i[0])))
    said = run(queue, tmp_path / "out.jsonl", "--batch-size", batch_size, "--fps", 2)
    hook.remove()
    assert sum(seen) == 12  # 6 seconds, once, for three lines
    found = {result["line"]: result for result in results(tmp_path / "out.jsonl")}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7, 9]
    state = tiny_pipe.read(str(tiny_video), fps=2)
    ask = {
        question: tiny_pipe.ask(state, question, max_new_tokens=3) for question in ("What is shown?", "Who?", "Last?")
    }
    assert found[1]["answer"] == ask["What is shown?"] and found[1]["id"] == "first" and found[1]["frames"] == 12
    assert found[3]["answers"][1] == ask["Who?"] and len(found[3]["answers"]) == 2
    assert found[7]["answer"] == ask["Last?"]
    assert "absent.mp4: no such file" in found[2]["error"] and found[2]["id"] == 2
    assert "damaged.mp4: not a video" in found[4]["error"]
    assert "'question' must be a text" in found[5]["error"] and "'question' must be a text" in found[6]["error"]
    assert "not JSON" in found[9]["error"]
    assert "3 answered, 5 errors" in said


def test_it_goes_on_where_it_stopped(run, queue, tmp_path, tiny_video):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(queue, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        for torn in (b"", lines[kept][: len(lines[kept]) // 2], lines[kept][:-1]):
            run(queue, out)
            out.write_bytes(b"".join(lines[:kept]) + torn)
            said = run(queue, out)
            assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
            assert ("unfinished line" in said) == bool(torn)
            assert (f"{kept} of 8 results are there already" in said) == (kept > 0)
    (tmp_path / "absent.mp4").write_bytes(tiny_video.read_bytes())
    said = run(queue, out)
    assert "0 answered, 0 errors" in said
    assert "1 answered, 4 errors" in run(queue, out, "--retry-errors")
    assert len(results(out)) == 8 and sum("error" in result for result in results(out)) == 4


def test_a_video_of_another_content_is_asked_about_again(run, queue, tmp_path, tiny_video):
    out, clip = tmp_path / "out.jsonl", tmp_path / "clip.mp4"
    clip.write_bytes(tiny_video.read_bytes())
    items = write(tmp_path / "two.jsonl", [{"video": str(v), "question": "What?"} for v in (clip, tiny_video)])
    run(items, out)
    before = results(out)
    assert before[0]["shown"] == before[1]["shown"]
    clip.write_bytes(b"no video at all")
    said = run(items, out)
    assert "1 results are about other contents" in said and "1 of 2 results are there already" in said
    after = {row["line"]: row for row in results(out)}
    assert "error" in after[1] and after[1]["shown"] != before[0]["shown"] and after[2] == before[1]
    clip.write_bytes(tiny_video.read_bytes())
    run(items, out, "--retry-errors")
    assert {row["line"]: row for row in results(out)} == {1: before[0], 2: before[1]}


def test_results_of_something_else_are_not_touched(run, queue, tmp_path, tiny_video):
    out = tmp_path / "out.jsonl"
    run(queue, out)
    kept = out.read_bytes()
    assert "with another fps: name another file" in run(queue, out, "--fps", 3, code=2)
    other = write(tmp_path / "other.jsonl", [{"video": str(tiny_video), "question": "Another?"}])
    assert "is no result of this queue" in run(other, out, code=2)
    assert "give either fps or num_frames" in run(queue, out, "--fps", 1, "--num-frames", 2, code=2)
    assert out.read_bytes() == kept
    with batch_queue.Results(
        out, json.loads(Path(f"{out}.settings").read_text(encoding="utf-8")), batch_queue.read_queue(queue)
    ):
        assert "is being written by another run" in run(queue, out, code=2)
    (tmp_path / "out.jsonl.settings").unlink()
    assert "but not its settings" in run(queue, out, code=2)
    assert out.read_bytes() == kept
    empty = write(tmp_path / "empty.jsonl", [])
    assert "holds no questions" in run(empty, tmp_path / "new.jsonl", code=2)
    assert "no such file" in run(tmp_path / "none.jsonl", tmp_path / "new.jsonl", code=2).lower()


def test_a_full_disk_keeps_what_was_written(run, queue, tmp_path, monkeypatch):
    out, written, real = tmp_path / "out.jsonl", [0], os.write
    run(queue, tmp_path / "whole.jsonl")

    def full(descriptor: int, data: bytes) -> int:
        room = 700 - written[0]
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written[0] += min(room, len(data))
        return real(descriptor, data[:room])

    with monkeypatch.context() as patched:
        patched.setattr(batch_queue.os, "write", full)
        said = run(queue, out, code=2)
    assert "No space left on device" in said and "results so far are kept" in said
    assert 0 < len(results(out)) < 8
    run(queue, out)
    assert sorted(results(out), key=str) == sorted(results(tmp_path / "whole.jsonl"), key=str)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", 'Video,Question,ID,start,end\n{v},"Who, where?",a,0:01,0:03\n\n{v},"two\nlines?",,,\n{v},,c,,\n'),
        ("q.csv", "video;id;question;start;end\r\n{v};a;Who, where?;1;3\r\n;;;;\r\n{v};;'two\nlines?';;\r\n{v};c\r\n"),
        ("q.tsv", "\ufeffvideo\tid\tquestion\tstart\tend\n{v}\ta\tWho, where?\t1\t3\n\n{v}\t\t'two\nlines?'\n{v}\tc"),
    ],
)  # fmt: skip
def test_a_table_is_a_queue(tmp_path, name, text):
    (tmp_path / name).write_text(text.replace("{v}", "f.mp4").replace("'", '"'), encoding="utf-8", newline="")
    first, second, third = batch_queue.read_queue(tmp_path / name)
    assert (first.line, first.video, first.questions, first.id) == (2, "f.mp4", ["Who, where?"], "a")
    assert (first.start, first.end, first.error) == (1, 3, None)
    assert (second.line, second.questions, second.start, second.error) == (4, ["two\nlines?"], None, None)
    assert third.line == 6 and "'question' must be a text" in third.error and third.id == "c"
    with (tmp_path / name).open("a") as file:
        file.write("\nf.mp4,;\ta,;\tb,;\tc,;\td,;\te,;\tf")
    assert "unknown fields" in batch_queue.read_queue(tmp_path / name)[3].error
    (tmp_path / "latin.csv").write_bytes("video,question\nf.mp4,Größe?\nf.mp4,What?\n".encode("latin-1"))
    broken, usable = batch_queue.read_queue(tmp_path / "latin.csv")
    assert broken.error.startswith("this line cannot be read: the byte 0xf6 is not UTF-8") and usable.error is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("video,answer\na,b\n", "'answer' is no column of a queue"),
        ("question\nWhat?\n", "one of them 'video'"),
        ("video,video\na,b\n", "each column once"),
        ("", "one of them 'video'"),
        ("video,question\n", "holds no questions"),
    ],
)
def test_a_table_of_other_things_is_refused(run, tmp_path, text, told):
    (tmp_path / "q.csv").write_text(text)
    assert told in run(tmp_path / "q.csv", tmp_path / "out.jsonl", code=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_parts_of_a_video_are_read_apart(run, tmp_path, tiny_video, tiny_pipe):
    parts = [{}, {"start": "0:02"}, {"start": 1, "end": "0:00:03.5"}, {"end": 2}, {"start": 2.0}, {"start": "x"}]
    parts += [{"start": 3, "end": 1}, {"start": True}, {"start": "1:00"}]
    items = [{"video": str(tiny_video), "question": "What?"} | part for part in parts]
    run(write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl", "--fps", 2)
    found = {result["line"]: result for result in results(tmp_path / "out.jsonl")}
    assert [found[line].get("frames") for line in range(1, 7)] == [12, 8, 5, 4, 8, None]
    assert (found[3]["start"], found[3]["end"], found[2]["start"]) == (1, 3.5, 2) and "start" not in found[1]
    assert found[2]["answer"] == found[5]["answer"]
    state = tiny_pipe.read(str(tiny_video), fps=2, start="0:01", end=3.5)
    assert found[3]["answer"] == tiny_pipe.ask(state, "What?", max_new_tokens=3)
    for line, told in ((6, "is no time"), (7, "must come before"), (8, "is no time"), (9, "beyond the end")):
        assert told in found[line]["error"]


@pytest.mark.parametrize("place", ["states", "memory://batch-states/deep"])
def test_states_are_kept_and_no_video_is_read_twice(run, queue, tmp_path, tiny_video, tiny_pipe, monkeypatch, place):
    states = place if "://" in place else tmp_path / place
    items = [{"video": str(tiny_video)}, {"video": str(tiny_video), "question": "What?", "start": 2}]
    run(write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl", "--states", states)
    first, second = sorted(results(tmp_path / "out.jsonl"), key=lambda result: result["line"])
    assert "question" not in first and first["frames"] == 6 and second["frames"] == 4
    with fsspec.open(first["state"], "rb") as file:
        (tmp_path / "copy.state").write_bytes(file.read())
    state = VideoState.load(tmp_path / "copy.state")
    tiny_pipe.check(state)
    assert json.loads(state.metadata["sources"])[0]["name"] == str(tiny_video)
    assert tiny_pipe.ask(state, "Who?", max_new_tokens=3) == tiny_pipe.ask(
        tiny_pipe.read(str(tiny_video)), "Who?", max_new_tokens=3
    )
    with fsspec.open(second["state"], "wb") as file:
        file.write(b"torn")
    seen, real = [], type(tiny_pipe.model).read_together
    monkeypatch.setattr(
        type(tiny_pipe.model), "read_together", lambda self, p, v: seen.append(len(v)) or real(self, p, v)
    )
    asked = [item | {"question": "Why?"} for item in items]
    run(write(tmp_path / "more.jsonl", asked), tmp_path / "more.out", "--states", states)
    assert seen == [1]  # the torn one
    answers = {result["line"]: result["answer"] for result in results(tmp_path / "more.out")}
    assert answers[1] == tiny_pipe.ask(state, "Why?", max_new_tokens=3)


def test_results_at_an_address(run, queue, tmp_path, monkeypatch):
    """Any address that fsspec knows; here one whose files are in the memory of this process."""
    run(queue, tmp_path / "whole.jsonl")
    wanted = sorted(map(str, results(tmp_path / "whole.jsonl")))
    memory = fsspec.filesystem("memory")
    memory.put(str(queue), "/in.jsonl")
    run("memory://in.jsonl", "memory://there/out.jsonl")
    assert sorted(map(str, results("memory://there/out.jsonl"))) == wanted
    assert sorted(memory.find("/there")) == ["/there/out.jsonl", "/there/out.jsonl.settings"]
    assert "8 of 8 results are there already" in run(queue, "memory://there/out.jsonl")
    assert "with another fps" in run(queue, "memory://there/out.jsonl", "--fps", 3, code=2)
    assert "Protocol not known: nowhere" in run(queue, "nowhere://x/out.jsonl", code=2)

    monkeypatch.setattr(remote_files, "UPLOAD_SECONDS", 0)
    complete = remote_files.RemoteLog.complete
    monkeypatch.setattr(remote_files.RemoteLog, "complete", lambda self: None)  # killed before the end
    real, count = batch_queue.Results.add, []

    def stops(self, result):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        real(self, result)

    with monkeypatch.context() as patched:
        patched.setattr(batch_queue.Results, "add", stops)
        assert "interrupted after 3 of 8" in run(queue, "memory://torn/out.jsonl", code=130)
    assert not memory.exists("/torn/out.jsonl") and len(memory.find("/torn/out.jsonl.parts")) == 3
    monkeypatch.setattr(remote_files.RemoteLog, "complete", complete)
    assert "3 of 8 results are there already" in run(queue, "memory://torn/out.jsonl")
    assert sorted(map(str, results("memory://torn/out.jsonl"))) == wanted
    assert not memory.exists("/torn/out.jsonl.parts") or not memory.find("/torn/out.jsonl.parts")


def test_videos_at_an_address(run, tmp_path, tiny_video):
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_video), "/library/a film.mp4")
    items = [{"video": f"memory://library/{name}.mp4", "question": "What?"} for name in ("a film", "none")]
    run(write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl")
    found = {result["line"]: result for result in results(tmp_path / "out.jsonl")}
    assert found[1]["video"] == "memory://library/a film.mp4" and found[1]["frames"] == 6 and found[1]["shown"]
    assert "error" in found[2] and "none.mp4" in found[2]["error"]


def test_progress_within_a_long_video(run, tmp_path, tiny_video, monkeypatch):
    told = []
    real = batch_work._counted
    monkeypatch.setattr(
        batch_work,
        "_counted",
        lambda chunks, readers, tell: real(chunks, readers, lambda *said: told.append(said) or tell(*said)),
    )
    items = write(tmp_path / "in.jsonl", [{"video": str(tiny_video), "question": "What?"}])
    run(items, tmp_path / "out.jsonl", "--fps", 4)
    assert told[0] == (str(tiny_video), 0, 24) and told[-1] == (str(tiny_video), 24, 24) and len(told) > 2


def test_without_ray_its_extra_is_named(run, queue, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for words in (["--ray"], ["--ray", "local"], ["--ray", "ray://head:10001"], ["--ray=auto"]):
        said = run(queue, tmp_path / "out.jsonl", *words, code=2)
        assert said == "error: a cluster needs Ray: pip install 'video-ma2mba[ray]'\n"
    assert "add --ray" in run(queue, tmp_path / "out.jsonl", "--ray-workers", 2, code=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_fails_together_is_tried_alone(run, queue, tmp_path, tiny_pipe, monkeypatch):
    run(queue, tmp_path / "whole.jsonl")

    def too_much(*_, **__):
        raise RuntimeError("CUDA out of memory")

    real = answering_batches.decode

    def only_one(model, states, ids, *arguments, **settings):
        if len(ids) > 1:
            raise RuntimeError("CUDA out of memory")
        return real(model, states, ids, *arguments, **settings)

    monkeypatch.setattr(type(tiny_pipe.model), "read_together", too_much)
    monkeypatch.setattr(answering_batches, "decode", only_one)
    run(queue, tmp_path / "out.jsonl")
    assert results(tmp_path / "out.jsonl") == results(tmp_path / "whole.jsonl")
    monkeypatch.setattr(answering_batches, "decode", too_much)
    run(queue, tmp_path / "errors.jsonl")
    assert all("error" in result for result in results(tmp_path / "errors.jsonl"))
    assert results(tmp_path / "errors.jsonl")[-1]["error"] == "CUDA out of memory"


def test_killed_and_started_again(tiny_checkpoint, tiny_video, tmp_path):
    """A real process, ended by SIGKILL between and within lines; relative paths start from --videos."""
    items = [{"video": tiny_video.name, "question": f"What is number {n}?"} for n in range(40)]
    for number, item in enumerate(items[1:]):  # a video of its own for each: they are read one after the other
        item["video"] = f"{number}.mp4"
        (tmp_path / item["video"]).write_bytes(tiny_video.read_bytes())
    (tmp_path / tiny_video.name).write_bytes(tiny_video.read_bytes())
    queue, out = write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "video_ma2mba", "batch", queue, out, "--videos", tmp_path, "--batch-size", 1]
    command = [*map(str, command), "--model", str(tiny_checkpoint), "--max-new-tokens", "20", "--device", "cpu"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 250
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    killed_at = out.read_bytes().count(b"\n")
    assert running.returncode == -signal.SIGKILL and 3 <= killed_at < 40
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [result["line"] for result in results(out)] == list(range(1, 41))
    assert f"{40 - killed_at} answered, 0 errors" in done.stderr


def test_subtitles_and_times(tmp_path, tiny_video, make_timed_checkpoint, monkeypatch):
    """A checkpoint that tells times reads its stamps here, too; subtitles come by line or for all."""
    pipe = load_pipeline(str(make_timed_checkpoint(1.0)), device="cpu")
    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: pipe)

    def call(out, *options):
        command = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / out), "--max-new-tokens", "3", *options]
        found = CliRunner().invoke(app, [*command, "--videos", str(tmp_path), "--states", str(tmp_path / out) + "s"])
        return sorted(results(tmp_path / out), key=lambda result: result["line"]), found

    (tmp_path / "film.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    items = [{"question": "What?"}, {"questions": ["What?", "When at 2 s?"], "subtitles": "film.srt"}]
    items += [{"question": "What?", "subtitles": name} for name in ("absent.srt", "off", 3)]
    write(tmp_path / "in.jsonl", [{"video": str(tiny_video)} | item for item in items])
    (plain, told, absent, off, wrong), _ = call("out.jsonl")
    read = {name: pipe.read(str(tiny_video), subtitles=name and str(tmp_path / name)) for name in (None, "film.srt")}
    assert plain["answer"] == off["answer"] == pipe.ask(read[None], "What?", max_new_tokens=3)
    assert told["answers"] == pipe.ask(read["film.srt"], ["What?", "When at 0:02?"], max_new_tokens=3)
    assert told["subtitles"] == "film.srt"
    assert "no such file of subtitles" in absent["error"] and "'subtitles' must be" in wrong["error"]
    for result, name in ((plain, None), (told, "film.srt")):
        assert VideoState.load(result["state"]).seen_tokens == read[name].seen_tokens
    said = iter(["red [0:01-0:02.5]", "green", "blue [0:00-0:01]"])
    monkeypatch.setattr(pipe.processor.tokenizer, "batch_decode", lambda rows, **_: [next(said) for _ in rows])
    write(tmp_path / "in.jsonl", [{"video": str(tiny_video)} | item for item in items[:2]])
    (one, two), _ = call("spans.jsonl", "--times", "--subtitles", str(tmp_path / "film.srt"))
    assert (one["answer"], one["span"]) == ("red", [1.0, 2.5])
    assert (two["answers"], two["spans"]) == (["green", "blue"], [None, [0.0, 1.0]])
    assert VideoState.load(one["state"]).seen_tokens == read["film.srt"].seen_tokens, "an option for all videos"
    monkeypatch.setattr(pipe.processor, "frame_times", "none")
    monkeypatch.setattr(pipe.model.config, "frame_times", "none")
    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: pipe)
    assert "never learnt times" in call("spans.jsonl", "--times")[1].output
