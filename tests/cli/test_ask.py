"""`video-ma2mba ask`, with a tiny random model: what it answers is noise, how it answers is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.loading import join_ranks, load_pipeline, pick_device, pick_dtype

COMMAND = str(Path(sys.executable).parent / "video-ma2mba")
QUICK = ["--device", "cpu", "--max-new-tokens", "4"]


def ask(video, *arguments, model: Path):
    return CliRunner().invoke(app, ["ask", str(video), *arguments, "--model", str(model), *QUICK])


def test_answers_are_those_of_the_pipeline(tiny_checkpoint: Path, tiny_video: Path):
    questions = ["What is it?", "How many?"]
    result = ask(tiny_video, *questions, "--json", model=tiny_checkpoint)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    pipe = load_pipeline(str(tiny_checkpoint), device="cpu")
    state = pipe.read(str(tiny_video), fps=1)
    assert [record["answer"] for record in records] == [pipe.ask(state, q, max_new_tokens=4) for q in questions]
    for record, question in zip(records, questions, strict=True):
        assert record["question"] == question
        assert record["video"] == str(tiny_video)
        assert record["frames"] == 6
        assert record["state_bytes"] == state.nbytes
        assert record["read_seconds"] > 0
        assert record["answer_seconds"] > 0


def test_answers_stream_to_stdout_and_figures_to_stderr(tiny_checkpoint: Path, tiny_video: Path):
    plain = ask(tiny_video, "What is it?", model=tiny_checkpoint)
    record = json.loads(ask(tiny_video, "What is it?", "--json", model=tiny_checkpoint).stdout)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.strip() == record["answer"]
    assert plain.stderr.startswith("6 frames")


@pytest.mark.parametrize(
    ("options", "frames"),
    [(["--fps", "2"], 12), (["--num-frames", "3"], 3), (["--start", "2", "--end", "4"], 2), (["--start", "4"], 2)],
)
def test_options_choose_the_frames(tiny_checkpoint: Path, tiny_video: Path, options: list[str], frames: int):
    result = ask(tiny_video, "What is it?", "--json", *options, model=tiny_checkpoint)
    assert json.loads(result.stdout)["frames"] == frames


def checkpoint_with_damage(source: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("linear_1.weight"))
    if damage == "missing":
        del tensors[name]
    elif damage == "mismatched":
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize("damage", ["missing", "mismatched", "truncated"])
def test_a_damaged_checkpoint_is_refused(tiny_checkpoint: Path, tiny_video: Path, tmp_path: Path, damage: str):
    folder = checkpoint_with_damage(tiny_checkpoint, tmp_path / "damaged", damage)
    result = ask(tiny_video, "What is it?", model=folder)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if damage != "truncated":
        assert "linear_1.weight" in line
        with pytest.raises(ValueError, match=r"linear_1\.weight") as raised:
            AutoModelForImageTextToText.from_pretrained(folder)
        assert line == f"error: {raised.value}"


BAD_INPUT = {
    "no such video": (["none.mp4", "What?"], "none.mp4"),
    "empty question": (["VIDEO", " "], "question is empty"),
    "fps 0": (["VIDEO", "What?", "--fps", "0"], "fps"),
    "negative number of frames": (["VIDEO", "What?", "--num-frames", "-1"], "num_frames"),
    "end before start": (["VIDEO", "What?", "--start", "3", "--end", "1"], "end"),
    "start behind the end": (["VIDEO", "What?", "--start", "1000"], "1000"),
    "unknown device": (["VIDEO", "What?", "--device", "abacus"], "abacus"),
    "unknown dtype": (["VIDEO", "What?", "--dtype", "int3"], "int3"),
    "empty file": (["EMPTY", "What?"], "empty.mp4"),
    "text file": (["TEXT", "What?"], "text.mp4"),
    "empty folder": (["FOLDER", "What?"], "folder"),
    "unknown model directory": (["VIDEO", "What?", "--model", "no/such/model"], "no/such/model"),
    "no model": (["VIDEO", "What?", "--model", ""], "--model is empty"),
    "model that cannot be fetched": (
        ["VIDEO", "What?", "--model", "nobody/nothing"],
        "nobody/nothing cannot be loaded",
    ),
    "model of another kind": (["VIDEO", "What?", "--model", "MAMBA"], "mamba2"),
    "model without configuration": (["VIDEO", "What?", "--model", "FOLDER"], "config.json"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_code_2(case: str, tiny_checkpoint: Path, tiny_video: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    places = {"VIDEO": tiny_video, "EMPTY": tmp_path / "empty.mp4", "TEXT": tmp_path / "text.mp4"}
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba2"}')
    places |= {"FOLDER": tmp_path / "folder", "MAMBA": tmp_path / "mamba"}
    arguments, named = BAD_INPUT[case]
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_checkpoint)]
    result = CliRunner().invoke(app, ["ask", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert named in result.stderr.splitlines()[-1]


def test_an_answer_in_a_process_of_its_own(tiny_checkpoint: Path, tiny_video: Path):
    """With the console script, the way a user types it, and nothing on standard output but the answer."""
    command = [COMMAND, "ask", str(tiny_video), "What is it?", "--model", str(tiny_checkpoint), "--json", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 6


def test_devices_and_dtypes():
    cpu = pick_device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bf16", cpu) == pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="CUDA devices"):
        pick_device("cuda:99")


def test_each_of_several_processes_takes_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu: SimpleNamespace(device="cpu" if cpu else "cuda:1"))
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for there in (0, 1, 2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert join_ranks("cpu") == "cpu"
        if there == 0:
            assert join_ranks("auto") == "cpu"
        for device in ("auto", "cuda", "cuda:0") if there == 2 else ():
            assert join_ranks(device) == "cuda:1"
        for device in ("cuda", "cuda:0") if there < 2 else ("mps", "cuda:2"):
            with pytest.raises(ValueError, match="1 CUDA dev" if there == 1 else "use cpu"):
                join_ranks(device)
