"""`video-ma2mba batch`: every line gets its result, whatever happens to the process, the videos or the disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli import batch as verb
from video_ma2mba.cli import batch_queue
from video_ma2mba.cli.main import app
from video_ma2mba.loading import load_pipeline
from video_ma2mba.modeling_video_ma2mba import answering_batches


@pytest.fixture(scope="module")
def tiny_pipe(tiny_checkpoint):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def run(tiny_checkpoint, tiny_pipe, monkeypatch):
    """Runs the verb in this process; `tiny_pipe` is loaded once."""
    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: tiny_pipe)

    def call(*arguments, code: int = 0):
        found = CliRunner().invoke(app, ["batch", *map(str, arguments), "--max-new-tokens", "3"])
        assert found.exit_code == code, found.output
        return found.stderr

    return call


def write(path: Path, items) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
