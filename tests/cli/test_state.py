"""`read`, `state` and `ask` with a state file, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoState
from video_ma2mba.cli.main import app
from video_ma2mba.loading import load_pipeline

COMMAND = str(Path(sys.executable).parent / "video-ma2mba")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "videos"


@pytest.fixture
def run(tiny_checkpoint: Path):
    """Runs the command with the tiny model."""

    def run(*arguments, typed: str | None = None, model: Path = tiny_checkpoint):
        return CliRunner().invoke(app, [*map(str, arguments), "--model", str(model)], input=typed)

    return run


@pytest.fixture
def film(run, tiny_video: Path, tmp_path: Path) -> Path:
    file = tmp_path / "film.state"
    done = run("read", tiny_video, "--out", file, "--fps", "4")
    assert done.exit_code == 0, done.output
    assert os.listdir(tmp_path) == ["film.state"]
    return file


def answers(result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [json.loads(line)["answer"] for line in result.stdout.splitlines()]


def refused(result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_state_file_answers_as_its_video_does(run, film, tiny_video, tmp_path):
    asked = ["What is it?", "How many?", "--json", "--max-new-tokens", "6"]
    expected = answers(run("ask", tiny_video, "--fps", "4", *asked))
    assert answers(run("ask", film, *asked)) == expected
    disguised = film.rename(tmp_path / "film.mp4")
    assert answers(run("ask", disguised, *asked)) == expected


def test_show_says_what_is_in_a_file(film, tiny_video):
    shown = CliRunner().invoke(app, ["state", "show", str(film)])
    assert shown.exit_code == 0, shown.output
    assert "frames: 24" in shown.stdout and "model: checkpoint" in shown.stdout and str(tiny_video) in shown.stdout
    facts = json.loads(CliRunner().invoke(app, ["state", "show", str(film), "--json"]).stdout)
    assert facts["sources"][0]["fps"] == 4
    assert facts["model_config"]["text_config.num_hidden_layers"] == 2
    assert int(facts["bytes"]) == VideoState.load(film).nbytes
    assert (facts["format"], facts["layers"]) == ("2", "2 mamba2")
    assert "format: 2" in shown.stdout and "layers: 2 mamba2" in shown.stdout


def test_a_file_of_the_first_release_is_shown_with_its_format():
    old = Path(__file__).resolve().parents[1] / "modeling_video_ma2mba" / "data" / "format_1.state"
    shown = CliRunner().invoke(app, ["state", "show", str(old)])
    assert "format: 1" in shown.stdout and "layers: 2 mamba2" in shown.stdout and "tokens: 1033" in shown.stdout


def test_append_reads_on(run, film, tiny_video, tmp_path):
    longer = tmp_path / "longer.state"
    assert run("state", "append", film, tiny_video, "--out", longer).exit_code == 0
    assert VideoState.load(film).metadata["frames"] == "24"
    assert VideoState.load(longer).metadata["frames"] == "30"
    assert run("state", "append", film, tiny_video).exit_code == 0
    assert torch.equal(VideoState.load(film).ssm, VideoState.load(longer).ssm)


def test_an_interrupted_append_goes_on(run, film, tiny_video, tmp_path, monkeypatch):
    expected = tmp_path / "expected.state"
    command = ["state", "append", film, tiny_video, "--fps", "2", "--save-every", "0"]
    assert run(*command, "--out", expected).exit_code == 0
    before, whole, calls = film.read_bytes(), VideoMa2mbaForConditionalGeneration.read, []

    def until_control_c(self, *arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments, **settings)

    monkeypatch.setattr(VideoMa2mbaForConditionalGeneration, "read", until_control_c)
    assert run(*command).exit_code == 130
    assert film.read_bytes() == before
    assert "with another state to continue" in refused(
        run("read", tiny_video, "--out", film, "--overwrite", *command[4:])
    )
    assert "continuing from" in run(*command).stderr
    assert torch.equal(VideoState.load(film).ssm, VideoState.load(expected).ssm)
    assert VideoState.load(film).metadata == VideoState.load(expected).metadata
    assert sorted(os.listdir(tmp_path)) == ["expected.state", "film.state"]


def test_check_names_what_is_wrong(run, film, make_model, tiny_checkpoint, tiny_video, tmp_path):
    whole = run("state", "check", film)
    assert (whole.exit_code, whole.stdout.strip()) == (
        0,
        f"{film}: whole (format 2, 2 mamba2), and read by this model (checkpoint)",
    )
    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other)
    for file in tiny_checkpoint.iterdir():
        if not (other / file.name).exists():
            (other / file.name).write_bytes(file.read_bytes())
    for command in (["state", "check", film], ["ask", film, "What?"], ["state", "append", film, tiny_video]):
        assert "another model: its weights have the digest" in refused(run(*command, model=other))
    damaged = bytearray(film.read_bytes())
    damaged[-5] ^= 1
    film.write_bytes(damaged)
    for command in (["state", "check"], ["ask"]):
        assert f"{str(film)!r} is damaged" in refused(run(*command, film))


def test_bad_input(run, film, tiny_video, tmp_path):
    assert "pass --overwrite" in refused(run("read", tiny_video, "--out", film))
    assert f"--out {tmp_path} is a folder" in refused(run("read", tiny_video, "--out", tmp_path, "--overwrite"))
    assert "no folder" in refused(run("read", tiny_video, "--out", tmp_path / "none" / "film.state"))
    assert "leave fps, end out" in refused(run("ask", film, "What?", "--fps", "2", "--end", "3"))
    assert "question is empty" in refused(run("ask", film, " "))
    assert "add one" in refused(run("ask", film, "--json"))
    assert "no state file" in refused(run("state", "check", tmp_path / "none"))
    before = film.read_bytes()
    assert run("read", tiny_video, "--out", film, "--overwrite", "--fps", "1").exit_code == 0
    assert film.read_bytes() != before


def test_an_interrupted_read_goes_on(run, film, tiny_video, tmp_path, monkeypatch):
    file = tmp_path / "again.state"
    command = ["read", tiny_video, "--out", file, "--fps", "4", "--save-every", "0"]
    whole, calls = VideoMa2mbaForConditionalGeneration.read, []

    def until_control_c(self, *arguments, **settings):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, *arguments, **settings)

    monkeypatch.setattr(VideoMa2mbaForConditionalGeneration, "read", until_control_c)
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert "the same command continues" in stopped.stderr
    assert not file.exists()
    wanted = len(calls) - 1
    monkeypatch.setattr(VideoMa2mbaForConditionalGeneration, "read", whole)
    assert "with another fps" in refused(run(*command[:-3], "2", "--save-every", "0"))

    done = run(*command)
    assert done.exit_code == 0 and "continuing from" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["again.state", "film.state"]
    again, expected = VideoState.load(file), VideoState.load(film)
    assert wanted == 3 and torch.equal(again.conv, expected.conv) and torch.equal(again.ssm, expected.ssm)
    assert again.metadata == expected.metadata


def test_a_killed_read_goes_on(run, film, tiny_checkpoint, tiny_video, tmp_path):
    """SIGKILL, at whatever moment the first partial state is there."""
    file, partial = tmp_path / "killed.state", tmp_path / "killed.state.partial"
    command = ["read", str(tiny_video), "--out", str(file), "--fps", "250", "--save-every", "0"]
    command += ["--model", str(tiny_checkpoint)]
    process = subprocess.Popen([COMMAND, *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 250
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists() and not file.exists()
    assert run(*command[:-2]).exit_code == 0
    assert run("read", tiny_video, "--out", tmp_path / "whole.state", "--fps", "250").exit_code == 0
    killed, expected = VideoState.load(file), VideoState.load(tmp_path / "whole.state")
    assert torch.equal(killed.ssm, expected.ssm) and killed.metadata == expected.metadata
    assert killed.metadata["frames"] == "1500"


def test_chat(run, film, tiny_checkpoint, tiny_video, tmp_path):
    saved = tmp_path / "chat.state"
    typed = f"What is it?\n\nWhy?\n/save {saved}\n/new\nWhy?\n/save\n/sing\n/save {tmp_path}/none/x\n/quit\nWho?\n"
    done = run("ask", film, "--max-new-tokens", "6", typed=typed)
    assert done.exit_code == 0, done.output
    assert "/save is no command" in done.stderr and "/sing is no command" in done.stderr
    assert "error: there is no folder" in done.stderr

    pipe, state = load_pipeline(str(tiny_checkpoint), device="cpu"), VideoState.load(film)
    messages = []
    for question in ("What is it?", "Why?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": pipe.ask(state, messages, max_new_tokens=6)})
    assert json.loads(VideoState.load(saved).metadata["chat"]) == messages
    assert torch.equal(VideoState.load(saved).ssm, state.ssm)

    again = run("ask", saved, "--max-new-tokens", "6", typed=f"Who?\n/save {saved}\n/new\nWhat is it?\n/save {film}")
    assert again.exit_code == 0 and "goes on after 2 questions" in again.stderr
    assert json.loads(VideoState.load(saved).metadata["chat"])[:4] == messages
    assert json.loads(VideoState.load(film).metadata["chat"]) == messages[:2]
    shown = CliRunner().invoke(app, ["state", "show", str(saved)])
    assert "chat: 3 questions answered" in shown.stdout
    assert run("state", "append", saved, tiny_video).exit_code == 0
    assert "chat" not in VideoState.load(saved).metadata


@pytest.mark.bundled
def test_the_bundled_checkpoint_answers_from_a_file(tmp_path):
    lines = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
    video, file = lines[0]["video"], tmp_path / "film.state"
    lines = [line for line in lines if line["video"] == video]
    run = CliRunner()
    assert run.invoke(app, ["read", str(EXAMPLES / video), "--out", str(file), "--device", "cpu"]).exit_code == 0
    asked = [*(line["question"] for line in lines), "--json", "--device", "cpu"]
    found = answers(run.invoke(app, ["ask", str(file), *asked]))
    assert found == answers(run.invoke(app, ["ask", str(EXAMPLES / video), *asked]))
    right = [line["answer"] == answer for line, answer in zip(lines, found, strict=True)]
    assert sum(right) >= len(right) - 1
