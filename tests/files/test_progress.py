"""Bars keep their figures at every width and for every name; elsewhere they are lines; quiet, they are nothing."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from fcntl import ioctl

import pytest
from tqdm import std
from tqdm.utils import disp_len

from video_ma2mba.files import progress as bars

NAMES = [
    "film.mp4",
    "eine sehr lange 视频文件 Größe 🎬🎬 film with {braces} and spaces part 2.mp4",
    "x" * 500,
    "a\nb\x1b[31m",
]
DRAWING = """
import sys
from tqdm import std
from video_ma2mba.files import progress as bars
now = [0.0]
std.time = lambda: now[0]
for name in sys.argv[1:]:
    with bars.progress("reading " + name) as tell:
        for done in range(0, 86401, 8640):
            tell(done, 86400)
            now[0] += 36
"""


def drawn(columns: int, names: list[str], encoding: str = "utf-8", **environment: str) -> list[str]:
    """What a terminal of so many columns gets, one entry a state of the bar."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    words = [sys.executable, "-c", DRAWING, *names]
    running = subprocess.Popen(
        words, stderr=theirs, env={**os.environ, "PYTHONIOENCODING": encoding, **environment}, text=True
    )
    os.close(theirs)
    data = b""
    with suppress(OSError):  # the other end is closed
        while block := os.read(ours, 65536):
            data += block
    os.close(ours)
    assert running.wait() == 0
    return [state for state in re.split(r"[\r\n]+", data.decode(encoding)) if state.strip()]


@pytest.mark.parametrize(("columns", "encoding"), [(60, "utf-8"), (120, "utf-8"), (60, "ascii"), (35, "utf-8")])
def test_figures_stay_whatever_the_width_and_the_name(columns: int, encoding: str):
    states = drawn(columns, NAMES, encoding)
    assert max(map(disp_len, states)) < columns
    half = [state for state in states if "43,200/86,400" in state]
    assert len(half) == len(NAMES)
    for state in half:
        assert " 50%" in state and "|" in state
        assert columns < 60 or "3:00 left" in state
        assert columns < 60 or "240/s" in state
        assert "\x1b[31m" not in state
    if columns == 120:
        assert half[0].startswith("reading film.mp4 ") and "43,200/86,400 frames, 3:00 left, 240/s" in half[0]
        assert "part 2.mp4" in half[1]


def test_quiet_draws_nothing():
    assert drawn(80, NAMES[:1], TQDM_DISABLE="1") == []


def test_without_a_terminal_a_line_at_intervals(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    with bars.progress("reading film.mp4") as tell:
        for done in range(0, 3601, 60):  # a minute of film each second, for a minute
            tell(done, 3600)
            now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "reading film.mp4: 17%, 600/3,600 frames, 0:50 left, 60/s"


def test_what_an_earlier_run_did_is_not_this_run_s_speed(capsys):
    with bars.progress("answered", "lines") as tell:
        tell(900, 1000)
        assert tell.__self__.initial == 900


@pytest.mark.parametrize(
    ("text", "room", "short"),
    [("film.mp4", 8, "film.mp4"), ("film.mp4", 7, "fi..mp4"), ("视频文件.mp4", 9, "视频..mp4"), ("film", 0, "")],
)
def test_names_lose_their_middle(text: str, room: int, short: str):
    assert bars.shortened(text, room) == short


def test_words_for_times_and_rates():
    texts = [bars.clock_text(seconds) for seconds in (0, 59.6, 61, 3600, 86400)]
    assert texts == ["0:00", "1:00", "1:01", "1:00:00", "24:00:00"]
    texts = [bars.rate_text(rate) for rate in (16952.4, 240, 5.25, 0.5, 0.001)]
    assert texts == ["16,952/s", "240/s", "5.25/s", "30/min", "3.6/h"]
