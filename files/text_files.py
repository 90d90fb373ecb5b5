"""Reads texts that other programs wrote: UTF-8 with or without byte order mark, UTF-16, UTF-32; nothing endless."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, TextIO

LONGEST_LINE = 2**27
"""Characters. A file without line breaks would fill the memory."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_text(path: str | os.PathLike[str], newline: str | None = None) -> TextIO:
    """A file, or a pipe, of text; bytes that are not of its encoding come as lone surrogates (see `check_text`).

    Args:
        newline: as for `open`.

    Raises:
        ValueError: it is a device. OSError: it cannot be opened.
    """
    mode = os.stat(path).st_mode
    if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and not os.path.samefile(path, os.devnull):
        raise ValueError(f"{os.fspath(path)}: this is a device, not a file")
    file = open(path, "rb")  # noqa: SIM115 (the text that is returned closes it)
    head = file.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding is None and len(head) >= 2 and (head[0] == 0) != (head[1] == 0):  # UTF-16 without its mark
        encoding = "utf-16-be" if head[0] == 0 else "utf-16-le"
    errors = "replace" if encoding and encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    return io.TextIOWrapper(file, encoding or "utf-8", errors, newline)


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Lines of a text with their ends, whatever those are (in the text: `\\n`).

    Raises:
        ValueError: a line is longer than `LONGEST_LINE`; and what `open_text` raises.
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE and not line.endswith("\n"):
                raise ValueError(f"{os.fspath(path)}, line {number}, does not end: this is no file of lines")
            yield line


def check_text(text: str) -> None:
    """See that a text was decoded as it was written.

    Raises:
        ValueError: it holds bytes that are not UTF-8; the message says how to convert the file.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise ValueError(
            f"the byte 0x{byte:02x} is not UTF-8 (Windows-1252 or Latin-1, perhaps): save the file as UTF-8, or "
            "convert it: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """What a JSON text says. `strict`: NaN and numbers too large for a float are refused.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text, **({"parse_constant": _refuse, "parse_float": _number} if strict else {}))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is none; the file is named. OSError: it cannot be read.
    """
    with open_text(path) as file:
        text = file.read(LONGEST_LINE * 8)
    try:
        check_text(text)
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: this is not JSON ({error})") from None


def json_line(record: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """One object as a line of UTF-8, with JSON's own escapes where it holds half a character; `default` as there."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=default) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, default=default) + "\n").encode()
