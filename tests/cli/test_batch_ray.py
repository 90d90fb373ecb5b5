"""`batch --ray`: a cluster of two cores, started here. The lines are those of one process, whatever dies."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from video_ma2mba.cli import batch_queue
from video_ma2mba.cli.main import app
from video_ma2mba.loading import load_pipeline

ray = pytest.importorskip("ray")


def lines(path: Path) -> list[str]:
    return sorted(path.read_text(encoding="utf-8").splitlines())


def cluster_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "ClusterWorker" in " ".join(process.cmdline())]


@pytest.fixture
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_worker_is_killed_then_the_run_and_it_goes_on(tiny_checkpoint, tiny_video, tmp_path, cluster, monkeypatch):
    items = [{"video": f"{number}.mp4", "questions": ["What?", "Who?"], "id": number} for number in range(12)]
    for item in items:
        (tmp_path / item["video"]).write_bytes(tiny_video.read_bytes() + os.urandom(8))
    items += [{"video": "absent.mp4", "question": "Why?"}, {"video": "0.mp4", "question": "When?", "start": "0:02"}]
    queue = tmp_path / "in.jsonl"
    queue.write_text("".join(json.dumps(item) + "\n" for item in items) + "not JSON\n")

    def run(out: str, *words: str, code: int = 1):
        command = ["batch", str(queue), str(tmp_path / out), "--videos", str(tmp_path), "--batch-size", "2"]
        command += ["--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "3", *words]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == code, found.output
        return found.stderr

    states = f"file://{tmp_path / 'states'}"
    run("one.jsonl", "--states", states)
    whole = lines(tmp_path / "one.jsonl")
    for state in (tmp_path / "states").iterdir():
        state.unlink()

    killed, added, real = [], [], batch_queue.Results.add

    def add(self, result):
        added.append(result)
        if len(added) == 2:  # one of two workers, while it works
            victim = cluster_workers()[0]
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)
        if len(added) == 9:
            raise KeyboardInterrupt
        real(self, result)

    with monkeypatch.context() as patched:
        patched.setattr(batch_queue.Results, "add", add)
        assert "interrupted after 8 of 15" in run("ray.jsonl", "--ray", "--states", states, code=130)
    assert killed and len(lines(tmp_path / "ray.jsonl")) == 8
    said = run("ray.jsonl", "--ray", "--ray-workers", "1", "--states", states)
    assert "8 of 15 results are there already" in said and "2 of 15 results are errors" in said
    assert lines(tmp_path / "ray.jsonl") == whole
    pipe = load_pipeline(str(tiny_checkpoint), device="cpu")
    from video_ma2mba import VideoState

    kept = sorted((tmp_path / "states").glob("*.state"))
    assert len(kept) == 13
    pipe.check(VideoState.load(kept[0]))
    assert "lower --ray-gpus" in run("gpu.jsonl", "--ray", "--ray-gpus", "0.5", code=2)
