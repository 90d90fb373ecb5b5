"""Where an option's value comes from: command line, environment, file; -q and -v; completion in shells."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from video_ma2mba.cli import terminal
from video_ma2mba.cli.errors import OneLineErrors
from video_ma2mba.cli.main import app, options
from video_ma2mba.cli.options import End, Fps, Start

own = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
own.callback()(options)
group = typer.Typer()
own.add_typer(group, name="group")


@own.command()
def first(
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    flag: Annotated[bool, typer.Option("--flag")] = False,
    include: Annotated[list[str] | None, typer.Option("--include")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    terminal.note("a note")
    terminal.step("a step")
    terminal.warn("a warning")
    typer.echo([fps, start, end, flag, include, as_json, terminal.verbosity()])


@group.callback()
def _group() -> None:
    """A group."""


@group.command()
def second(fps: Fps = 7.0, batch_size: int = 1) -> None:
    typer.echo([fps, batch_size])


@pytest.fixture
def run(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("VIDEO_MA2MBA_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("video_ma2mba.cli.defaults.config_file", lambda: tmp_path / "config.toml")
    monkeypatch.setenv("COLUMNS", "500")

    def call(line: str, code: int = 0, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(f"VIDEO_MA2MBA_{name}", value)
        found = CliRunner().invoke(own, line.split())
        for name in environment:
            monkeypatch.delenv(f"VIDEO_MA2MBA_{name}")
        assert found.exit_code == code, found.output
        return found

    return call


def test_the_command_line_comes_first_then_environment_then_file(run, tmp_path):
    file = tmp_path / "config.toml"
    assert run("group second").stdout == "[7.0, 1]\n"
    file.write_text(
        'fps = 2\n[first]\nstart = "0:05"\nflag = true\ninclude = ["a", "b c"]\n[group.second]\nfps = 3.5\n'
    )
    assert run("group second").stdout == "[3.5, 1]\n"
    assert run("first").stdout == "[2.0, 5.0, None, True, ['a', 'b c'], False, 0]\n"
    assert run("first", FPS="4", JSON="1").stdout == "[4.0, 5.0, None, True, ['a', 'b c'], True, 0]\n"
    assert run("first --fps 6", FIRST_FPS="5", FPS="4", START="1:02:03").stdout.startswith("[6.0, 3723.0,")
    assert run("first", FIRST_FPS="5", FPS="4").stdout.startswith("[5.0,")
    assert run("group second", GROUP_SECOND_BATCH_SIZE="9").stdout == "[3.5, 9]\n"
    other = tmp_path / "other.toml"
    other.write_text("batch-size = 4\nquiet = true")
    assert run(f"--config-file {other} group second").stdout == "[7.0, 4]\n"
    found = run("first", CONFIG=str(other))
    assert found.stdout.endswith(", -1]\n") and found.stderr == "a warning\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fsp = 1", "fsp is no option of any command"),
        ("[first]\nbatch-size = 1", "first.batch-size is no option of first"),
        ("[third]\nfps = 1", "third is no option"),
        ("fps = true", "fps: true and false are no values"),
        ("flag = 1", "flag: true or false is meant"),
        ("fps = [1]", "fps: one value is meant, not a list"),
        ("fps = {a = 1}", "fps: a text or a number is meant"),
        ("fps = ", "this is not TOML"),
    ],
)
def test_a_file_with_mistakes_is_refused(run, tmp_path, text, told):
    (tmp_path / "config.toml").write_text(text)
    for line in ("first", "--debug group second", "first --help"):
        found = run(line, code=2)
        assert found.stderr.startswith(f"error: {tmp_path / 'config.toml'}: ") and told in found.stderr
        assert found.stderr.count("\n") == 1 and not found.stdout


def test_a_bad_value_is_told_with_its_place(run, tmp_path):
    assert "(from VIDEO_MA2MBA_FPS)" in run("first", code=2, FPS="x").stderr
    (tmp_path / "config.toml").write_text('start = "noon"')
    said = run("first", code=2).stderr
    assert f"'noon' is no time: write seconds, m:ss or h:mm:ss (from {tmp_path / 'config.toml'})" in said
    assert "(from" not in run("first --start noon", code=2).stderr
    (tmp_path / "config.toml").unlink()
    assert "VIDEO_MA2MBA_FSP is set, but no option is called so (is VIDEO_MA2MBA_FPS m" in run("first", FSP="1").stderr
    assert "warning: VIDEO_MA2MBA" not in run("first", OF_ANOTHER_PROGRAM="1").stderr
    assert "does not exist" in run(f"--config-file {tmp_path / 'none.toml'} first", code=2).stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("0:05", 5), ("1:02:03", 3723), ("1:02:03.5", 3723.5), ("90:00", 5400), (" 2.5 ", 2.5), ("1e2", 100)],
)
def test_times_are_seconds_or_clock_times(text, seconds):
    found = CliRunner().invoke(own, ["first", "--end", text])
    assert found.stdout.startswith(f"[None, None, {float(seconds)},")


@pytest.mark.parametrize("text", ["", "a", "0:", ":5", "1:2:3:4", "0:05:", "-1:00", "1:00:000"])
def test_what_is_no_time_is_refused(text):
    assert CliRunner().invoke(own, ["first", "--end", text]).exit_code == 2


def test_quiet_and_verbose_stand_before_or_behind_the_verb(run):
    assert run("first").stderr == "a note\na warning\n"
    for line in ("-q first", "first -q", "--quiet first", "first --quiet", "-q first -q"):
        found = run(line)
        assert found.stderr == "a warning\n" and found.stdout.endswith(", -1]\n")
        assert os.environ["TQDM_DISABLE"] == "1"
    assert "s] a step" in run("first -v").stderr and "a note" in run("-v first").stderr
    assert "TQDM_DISABLE" not in os.environ
    assert "exclude each other" in run("-q first -v", code=2).stderr
    assert run("first", VERBOSE="1").stdout.endswith(", 1]\n")


def test_every_verb_takes_them():
    def leaves(command):
        for child in getattr(command, "commands", {}).values():
            yield from leaves(child)
        if not hasattr(command, "commands"):
            yield command

    commands = list(leaves(typer.main.get_command(app)))
    assert len(commands) >= 20
    for command in commands:
        flags = [name for option in command.params for name in option.opts]
        assert sorted(flags) == sorted(set(flags)), command.name
        assert {"-q", "--quiet", "-v", "--verbose"} <= set(flags), command.name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(shell: str):
    """What the scripts of `--show-completion` call at a press of the tabulator key."""
    command = str(Path(sys.executable).parent / "video-ma2mba")
    for typed, wanted in (("video-ma2mba wa", "watch"), ("video-ma2mba ask --num", "--num-frames")):
        asked = {"_VIDEO_MA2MBA_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed}
        asked |= {"COMP_WORDS": typed.replace(" ", "\n"), "COMP_CWORD": str(typed.count(" "))}
        asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        done = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True)
        assert wanted in done.stdout and "Traceback" not in done.stderr
