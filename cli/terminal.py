"""Standard streams as they may be found: closed, without some characters, fed from files of other systems."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer

_NAMES = ("stdin", "stdout", "stderr")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BEGAN = time.perf_counter()
_verbosity = 0


def prepare_streams() -> None:
    """Make sure that there are three streams, and that none of them fails at a character."""
    for descriptor, name in enumerate(_NAMES):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file to be opened would take its number, and with it what is printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 (for good)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by something else, or in use
            stream.reconfigure(errors="backslashreplace")


def set_verbosity(level: int) -> None:
    """How much a command says on standard error: -1 warnings and errors, 0 also progress and figures, 1 every step."""
    global _verbosity
    if level < 0:
        os.environ["TQDM_DISABLE"] = "1"  # every bar, also of libraries and of processes that this one starts
    elif _verbosity < 0:
        os.environ.pop("TQDM_DISABLE", None)
    _verbosity = level


def verbosity() -> int:
    """What `set_verbosity` was told."""
    return _verbosity


def printable(text: str) -> str:
    """A name or message as it can be shown on one line: characters that move the cursor, or are none, are escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """Say something on standard error that is neither a warning nor an error; bars that are shown make room for it."""
    if _verbosity >= 0:
        _say(text)


def step(text: str) -> None:
    """Say, where every step is wanted, what was done, after so many seconds."""
    if _verbosity > 0:
        _say(f"[{time.perf_counter() - _BEGAN:6.2f} s] {text}")


def warn(text: str) -> None:
    """Say something on standard error whatever is wanted."""
    _say(text)


def _say(text: str) -> None:
    if "tqdm" not in sys.modules:
        typer.echo(text, err=True)
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        typer.echo(text, err=True)


def echo_json(record: Any) -> None:
    """Print one object on one line; characters that the terminal lacks are written as JSON escapes them."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(record)
    typer.echo(text)


def given_text(text: str) -> str:
    """Text from the command line without the spaces around it; bytes foreign to the locale are UTF-8 or Latin-1."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):  # half an emoji is no byte
            text = decoded(os.fsencode(text))
    return text.strip()


def decoded(line: bytes) -> str:
    """A line as UTF-8, or where it is not that, as Latin-1."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def input_lines() -> Iterator[str]:
    """Lines of standard input, asked for one by one; a file in UTF-16, or with a byte order mark, is understood."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # replaced by an object of text
        yield from sys.stdin
        return
    first = binary.readline()
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield from (first + binary.read()).decode("utf-16", errors="replace").splitlines()
        return
    line = first.removeprefix(b"\xef\xbb\xbf")
    while first:
        yield decoded(line)
        first = line = binary.readline()
