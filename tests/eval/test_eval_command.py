"""`video-ma2mba eval`: bad input, a run that is killed, several processes, and the rendered world."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")

from video_ma2mba.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def rows(folder: Path) -> list[dict]:
    return [
        json.loads(line) for file in sorted(folder.glob("answers*.jsonl")) for line in file.read_text().splitlines()
    ]


def free_port() -> int:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return port.getsockname()[1]


BAD_INPUT = {
    "unknown task": (["--tasks", "videomee"], "--tasks videomee: neither"),
    "no task": (["--tasks", " , "], "names no task"),
    "no judge": (["--tasks", "activitynetqa"], "--no-judge"),
    "judge that is not there": (["--tasks", "activitynetqa", "--judge", "http://127.0.0.1:9/v1"], "no usable reply"),
    "judge without address": (["--tasks", "activitynetqa", "--judge", "gpt-4"], "--judge gpt-4"),
    "both rates": (["--tasks", "videomme", "--fps", "1", "--num-frames", "8"], "exclude each other"),
    "no rate": (["--tasks", "videomme", "--fps", "0"], "fps=0"),
    "no frames": (["--tasks", "videomme", "--num-frames", "0"], "num_frames=0"),
    "out is a file": (["--tasks", "videomme", "--out", "FILE"], "is a file"),
    "tasks are in no folder": (["--tasks", "videomme", "--include", "none"], "--include none is no folder"),
    "cache is a file": (["--tasks", "videomme", "--cache-dir", "FILE"], "is a file"),
    "cache without room": (["--tasks", "videomme", "--cache-gb", "0"], "--cache-gb must be more than 0"),
    "data is no folder": (["--tasks", "videomme", "--data", "FILE"], "is no folder"),
    "data set that is not there": (
        ["--tasks", "gone", "--include", "TASKS"],
        "the data of task gone cannot be loaded",
    ),
    "unknown model": (["--tasks", "videomme", "--model", "no/such/model"], "no/such/model"),
    "no recorded answers": (["--tasks", "videomme", "--replay", "none.jsonl"], "--replay none.jsonl"),
    "recorded answers of another task": (["--tasks", "videomme", "--replay", "FILE"], "9 questions have no recorded"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_code_2(
    case: str, in_bench: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("video_ma2mba.eval.judge.Judge.__init__.__defaults__", ("", None, 2, 5.0, 0.01))
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # the harness tries to load data five times
    (tmp_path / "file").write_text('{"task": "mvbench_state_change", "doc_id": 0, "answer": "A"}\n')
    arguments, message = BAD_INPUT[case]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/gone.yaml").write_text("task: gone\ndataset_path: no/such-data\ntest_split: test\n")
    places = {"FILE": str(tmp_path / "file"), "TASKS": str(tmp_path / "tasks")}
    given = [places.get(word, word) for word in arguments]
    for option, value in (("--out", tmp_path / "out"), ("--data", in_bench), ("--model", tiny_checkpoint)):
        if option not in given:
            given += [option, str(value)]
    result = run(*given, "--device", "cpu")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_missing_and_broken_videos_are_found(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    """Missing ones before the start, damaged ones with everything kept that came before."""
    video = in_bench / "hf_home/videomme/data/vmm1.mp4"
    content, out = video.read_bytes(), tmp_path / "out"
    given = ["--tasks", "videomme", "--model", tiny_checkpoint, "--data", in_bench, "--out", out, "--device", "cpu"]
    try:
        video.unlink()
        result = run(*given)
        assert result.exit_code == 2 and "videomme lacks 3 media, the first is" in result.stderr
        assert "vmm1.mp4" in result.stderr and not out.exists()
        video.write_bytes(content[:200])
        result = run(*given)
        assert result.exit_code == 2 and "vmm1.mp4" in result.stderr and len(rows(out)) == 3
        result = run(*given, "--skip-unreadable")
        assert result.exit_code == 0, result.output
        assert "3 questions are about videos that cannot be read" in (out / "report.md").read_text()
    finally:
        video.write_bytes(content)


def test_another_way_of_reading_needs_another_folder(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    given = ["--tasks", "videomme", "--model", tiny_checkpoint, "--data", in_bench, "--out", tmp_path, "--limit", 2]
    assert run(*given, "--num-frames", 2).exit_code == 0
    result = run(*given, "--num-frames", 4)
    assert result.exit_code == 2 and "its num_frames is 2, now it is 4" in result.stderr
    result = run(*given, "--num-frames", 2)
    assert result.exit_code == 0 and "0 answers given, 2 known from an earlier run; 0 videos read" in result.stderr
    page = (tmp_path / "report.md").read_text()
    assert "Frames: 2 frames." in page and "**Only the first 2 documents of each task.**" in page


def test_frames_at_inference(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    """A report for each number of frames, and all of them in one table; the same command finds everything done."""
    given = ["--tasks", "videomme", "--model", tiny_checkpoint, "--data", in_bench, "--out", tmp_path, "--limit", 2]
    result = run(*given, "--frames-sweep", "max,3,2")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["frames"] == ["2", "3", "max"]
    for count in found["frames"]:
        report = json.loads((tmp_path / f"frames_{count}" / "report.json").read_text())
        assert report["frames"] == ("1 fps" if count == "max" else f"{count} frames"), report["frames"]
        scores = report["benchmarks"]["videomme"]
        (row,) = [row for row in scores["rows"] if row["category"] == scores["headline"]]
        assert found["benchmarks"]["videomme"][count] == {"value": row["value"], "questions": 2}
    page = (tmp_path / "sweep.md").read_text()
    assert "| benchmark | 2 | 3 | max |" in page and "![Scores by frames](sweep.png)" in page
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for words, message in (
        (["--frames-sweep", "8,few"], "write numbers of frames"),
        (["--frames-sweep", "0"], "write numbers of frames"),
        (["--frames-sweep", "2", "--fps", "1"], "leave --fps out"),
    ):
        refused = run(*given, *words)
        assert refused.exit_code == 2 and message in refused.stderr


def start(arguments: list, **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )


@pytest.mark.slow
def test_a_killed_run_continues(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    given = ["--tasks", "videomme,mvbench", "--model", tiny_checkpoint, "--data", in_bench, "--out", tmp_path]
    given += ["--device", "cpu"]
    process = start(["-m", "video_ma2mba", "eval", *given], cwd=ROOT.parent)
    log = tmp_path / "answers.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = log.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    known = whole.count(b"\n")
    assert 4 <= known < 49, "the run was over before it could be killed"
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert f"{49 - known} answers given, {known} known from an earlier run" in result.stderr
    assert log.read_bytes().startswith(whole)
    assert len({(row["task"], row["doc_id"]) for row in rows(tmp_path)}) == len(rows(tmp_path)) == 49


@pytest.mark.slow
def test_two_processes_share_the_videos(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    """Each video is read by one of them, although the harness deals its questions to both; scores are as of one."""
    given = ["--tasks", "videomme,mvbench", "--model", tiny_checkpoint, "--data", in_bench, "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), "-m"]
    together = start([*launch, "video_ma2mba", "eval", *given, "--out", tmp_path / "two"], cwd=ROOT.parent)
    _, errors = together.communicate(timeout=500)
    assert together.returncode == 0, errors.decode()
    result = run(*given, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    found = {rank: file for rank, file in enumerate(sorted((tmp_path / "two").glob("answers*.jsonl")))}
    assert len(found) == 2
    media = [{tuple(json.loads(line)["media"]) for line in file.read_text().splitlines()} for file in found.values()]
    assert media[0] and media[1] and not media[0] & media[1]
    answers = [{(r["task"], r["doc_id"]): r["answer"] for r in rows(tmp_path / name)} for name in ("one", "two")]
    assert len(answers[0]) == 49 and answers[0] == answers[1]
    scores = [json.loads((tmp_path / name / "report.json").read_text())["benchmarks"] for name in ("one", "two")]
    assert scores[0]["videomme"]["rows"] == scores[1]["videomme"]["rows"]
    assert scores[0]["mvbench"]["rows"] == scores[1]["mvbench"]["rows"]


@pytest.mark.slow
def test_the_harness_alone(in_bench: Path, tiny_checkpoint: Path, tmp_path: Path):
    """`python -m lmms_eval --model video_ma2mba` finds the adapter and says what reading once has saved."""
    settings = f"pretrained={tiny_checkpoint},num_frames=4,answers={tmp_path / 'answers.jsonl'}"
    given = ["--model", "video_ma2mba", "--model_args", settings, "--tasks", "videomme", "--device", "cpu"]
    given += ["--batch_size", 4, "--output_path", tmp_path, "--log_samples", "--verbosity", "DEBUG"]
    process = start(["-m", "lmms_eval", *given, "--include_path", ROOT / "eval/lmms_tasks"], cwd=in_bench)
    out, errors = (stream.decode() for stream in process.communicate(timeout=500))
    assert process.returncode == 0, errors
    (results,) = tmp_path.glob("**/*_results.json")
    found = json.loads(results.read_text())
    assert found["results"]["videomme"]["videomme_perception_score,none"] in [100 * n / 9 for n in range(10)]
    assert "3 videos read" in out + errors and "6 answers needed no reading of their own" in out + errors
    assert len(rows(tmp_path)) == 9


ROUNDS_YAML = """
task: rounds
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: generate_until_multi_round
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, do_sample: false}
process_results: !function utils.results
metric_list:
  - {metric: rounds, aggregation: !function utils.mean, higher_is_better: true}
"""
ROUNDS_PY = """
def visuals(doc, lmms_eval_specific_kwargs=None):
    return [doc["video"]]

def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return "First?"
    return [doc["video"]], f"After {previous_output[-1]!r}?", round_idx == doc["rounds"], previous_output, None

def results(doc, results):
    (given,) = results if isinstance(results[0], list) else [results]
    return {"rounds": len(given) == doc["rounds"]}

def mean(values):
    return sum(values) / len(values)
"""


def test_a_task_of_ones_own_with_rounds(
    bench: Path, tiny_checkpoint: Path, tiny_video: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks" / "rounds"
    folder.mkdir(parents=True)
    (folder / "rounds.yaml").write_text(ROUNDS_YAML)
    (folder / "utils.py").write_text(ROUNDS_PY)
    docs = [{"video": str(tiny_video), "rounds": n, "answer": ""} for n in (1, 3, 2)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    given = ["--tasks", "rounds", "--include", folder, "--model", tiny_checkpoint, "--out", "out", "--device", "cpu"]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "rounds rounds | **1.0**" in Path("out/report.md").read_text(encoding="utf-8")
    asked = [(row["doc_id"], row["round"], row["question"]) for row in rows(Path("out"))]
    assert len(asked) == 6 and asked[0] == (0, 0, "First?") and asked[2][2].startswith("After ")
    result = run(*given)
    assert result.exit_code == 0 and "0 answers given, 6 known" in result.stderr


@pytest.mark.bundled
def test_the_rendered_world_needs_no_download(bench: Path, tmp_path: Path, monkeypatch):
    """The bundled checkpoint knows the answers about short videos; the report says chance beside them."""
    monkeypatch.chdir(tmp_path)
    result = run("--tasks", "rendered_world", "--limit", 28, "--out", "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    rows = {row["category"]: row for row in report["benchmarks"]["rendered_world"]["rows"]}
    assert rows["16 frames"]["questions"] == rows["all"]["questions"] == 28 and rows["all"]["value"] > 90
    assert report["benchmarks"]["rendered_world"]["harness"] == {
        "rendered_world/world_accuracy,none": pytest.approx(rows["all"]["value"])
    }
    assert "Guessing blindly" in Path("out/report.md").read_text(encoding="utf-8")
