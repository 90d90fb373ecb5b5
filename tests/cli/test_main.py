"""The command as a user meets it: help, version, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import video_ma2mba
from video_ma2mba.cli.errors import is_expected, one_line
from video_ma2mba.cli.main import app

COMMAND = str(Path(sys.executable).parent / "video-ma2mba")
VERBS = ["ask", "convert", "demo", "init", "niah", "plan", "push", "read", "state", "world"]


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "video_ma2mba"]], ids=["script", "module"])
def test_help_names_every_verb(command: list[str]):
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert [verb for verb in VERBS if f" {verb} " not in done.stdout] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert verb in result.output


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.strip() == video_ma2mba.__version__


def test_unknown_verb_is_a_usage_error():
    assert CliRunner().invoke(app, ["sing"]).exit_code == 2


def test_bad_input_ends_a_process_with_one_line_and_code_2(tmp_path: Path):
    done = subprocess.run(
        [COMMAND, "ask", "video.mp4", "What is it?", "--model", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "none does not exist" in done.stderr


def test_debug_keeps_the_traceback(tmp_path: Path):
    done = subprocess.run(
        [COMMAND, "--debug", "ask", "video.mp4", "What is it?", "--model", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "holds no config.json" in done.stderr


def test_defects_are_not_dressed_up_as_bad_input():
    assert not is_expected(RuntimeError("The expanded size of the tensor (3) must match the existing size (4)"))
    assert not is_expected(TypeError("unexpected keyword"))
    assert not is_expected(BrokenPipeError())
    assert not is_expected(ModuleNotFoundError("No module named x", name="video_ma2mba.x"))
    assert is_expected(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"))
    assert is_expected(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_expected(FileNotFoundError("no such video"))


def test_messages_are_one_short_line():
    message = one_line(ValueError("first\n   second\n" + "word " * 1000))
    assert message.startswith("first second word")
    assert "\n" not in message
    assert len(message) <= 600
    assert one_line(ValueError()) == "ValueError"
    assert one_line(FileNotFoundError(2, "No such file or directory", "queue.jsonl")) == (
        "queue.jsonl: No such file or directory"
    )
    assert one_line(IsADirectoryError(21, "Is a directory", "x.part", None, "x")) == "x: Is a directory"
    assert one_line(FileNotFoundError("x.mp4: no such file")) == "x.mp4: no such file"
