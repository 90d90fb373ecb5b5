"""Streams, arguments and messages in any encoding: an answer or one line, never a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from video_ma2mba.cli.errors import OneLineErrors, one_line
from video_ma2mba.cli.main import app
from video_ma2mba.cli.run_facts import command_line
from video_ma2mba.cli.terminal import echo_json, given_text, input_lines

COMMAND = [sys.executable, "-m", "video_ma2mba"]


class Stream(io.TextIOWrapper):
    """A text stream over bytes that are kept."""

    def __init__(self, encoding: str, data: bytes = b""):
        super().__init__(io.BytesIO(data), encoding=encoding)

    @property
    def written(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["plain", "Größe", "有几个", "🎬", "cut \ud83d", "caf\udce9"])
def test_json_is_json_on_every_terminal(encoding: str, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", Stream(encoding))
    echo_json({"answer": text})
    assert json.loads(sys.stdout.written.decode(encoding)) == {"answer": text}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("  How many? \n", "How many?"),
        (os.fsdecode("有几个?".encode()), "有几个?"),
        ("Gr\udcf6\udcdfe?", "Größe?"),
        ("".join(chr(0xDC00 + byte) for byte in "有?".encode()[:3]) + "?", "有?"),
        ("cut \ud83d?", "cut \ud83d?"),
        ("\udca0", ""),
    ],
)
def test_arguments_are_read_as_they_were_meant(given: str, meant: str):
    assert given_text(given) == meant


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_questions_from_a_file_of_another_system(encoding: str, end: str, monkeypatch: pytest.MonkeyPatch):
    data = f"Größe?{end}how many?".encode(encoding)
    monkeypatch.setattr(sys, "stdin", Stream("utf-8", data))
    assert [line.strip() for line in input_lines()] == ["Größe?", "how many?"]


def test_messages_keep_their_beginning_and_their_end_in_one_line_without_secrets():
    for text in ("x" * 5000, f"{'x' * 5000}: no such file", "word " * 1000 + "end"):
        line = one_line(ValueError(text))
        assert (line[:4], line[-4:]) == (text[:4], text[-4:])
        assert 500 < len(line) <= 600
    assert one_line(ValueError("a\0b\x1b[31m\ud83d\udce9 é\n\tx")) == "a\\x00b\\x1b[31m\\ud83d\\udce9 é x"
    told = one_line(OSError(5, "I/O error", "rtsp://me:ses@me@cam/s?token=sesame"))
    assert told == "rtsp://cam/s: I/O error"
    given = {"--haystack": "http://me:sesame@host/a.mp4?token=sesame", "--judge": "http://k:sesame@h/v1"}
    assert "sesame" not in command_line("niah", given)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, RecursionError])
def test_no_kind_of_error_warning_or_usage_tells_a_password(kind: type[Exception]):
    own = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @own.command()
    def first() -> None:
        warnings.warn("http://me:sesame@host/ is slow", stacklevel=1)
        warnings.warn("this_name is deprecated", FutureWarning, stacklevel=1)
        try:
            raise OSError(5, "I/O error", "rtsp://me:sesame@cam/s")
        except OSError as error:
            raise kind("rtsp://cam/s failed, token=sesame") from error

    @own.command()
    def second() -> None:
        return None

    for arguments in (["first"], ["second", "rtsp://me:sesame@cam/s"], ["rtsp://me:sesame@cam/s"]):
        result = CliRunner().invoke(own, arguments)
        assert result.exit_code == (1 if arguments == ["first"] and kind is not ValueError else 2)
        assert "sesame" not in result.output + str(result.exception)
        assert result.output
        assert "deprecated" not in result.output


def test_json_that_is_nested_too_deeply_is_bad_input():
    with pytest.raises(RecursionError) as caught:
        json.loads("[" * 100_000)
    from video_ma2mba.cli.errors import is_expected

    assert is_expected(caught.value)
    assert not is_expected(RecursionError("maximum recursion depth exceeded"))


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_and_names_of_bytes(closed: str, tmp_path: Path):
    """Nothing but exit code 2, and a line where it can be printed; under a C locale without UTF-8 mode."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = b"'no such caf\xe9 \xf0\x9f\x8e\xac.mp4' 'Gr\xf6\xdfe?'"
    line = " ".join(COMMAND).encode() + b" ask " + words + b" " + closed.encode()
    done = subprocess.run([b"sh", b"-c", line], capture_output=True, env=environment, cwd=tmp_path, timeout=100)
    assert done.returncode == 2
    assert done.stdout == b""
    if "2>" not in closed:
        assert done.stderr.startswith(b"error: no such caf\\udce9 ")
        assert done.stderr.count(b"\n") == 1


def test_a_question_of_spaces_is_empty():
    result = CliRunner().invoke(app, ["ask", "x.mp4", " \u2003 "])
    assert (result.exit_code, result.output) == (2, "error: a question is empty: ask something about the video\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_leaves_a_line_of_its_own_to_the_prompt():
    import pty

    code = "from video_ma2mba.cli.main import app\nimport video_ma2mba.cli.main as m\n"
    code += (
        "@app.command()\ndef wait():\n    print('ready', flush=True)\n    import time\n    time.sleep(60)\nm.main()"
    )
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
        os.execv(sys.executable, [sys.executable, "-c", code, "wait"])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    while True:
        try:
            seen += os.read(terminal, 1000)
        except OSError:  # closed by its end
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert seen.endswith(b"^C\r\n")
