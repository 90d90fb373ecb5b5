"""Small readers for what stands in the rows of training files: media placeholders in text, times, paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

Part = dict[str, Any]
_MARKS = re.compile(r"[ \t]*\n?(<image>|<video>)\n?[ \t]*")
_LEADING_MARKS = re.compile(r"^(?:[ \t]*(?:<image>|<video>))+[ \t]*\n?", re.M)
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


def media_part(kind: str, source: Any, start: float | None = None, end: float | None = None) -> Part:
    """A video or image as a part of a message; a list of frames (paths in order) is a video."""
    part: Part = {"type": kind}
    if isinstance(source, list | tuple) and all(isinstance(frame, str) for frame in source):
        part["frames"] = list(source)
    elif source is not None:
        part[kind] = source
    if start is not None:
        part["start"] = start
    if end is not None:
        part["end"] = end
    return part


def text_part(text: str) -> Part:
    """Part of a message that holds `text`."""
    return {"type": "text", "text": text}


def take_marks(text: str, leading: bool = False) -> tuple[str, int]:
    """The text without its `<image>` and `<video>` placeholders and the line breaks beside them, and their number.

    `leading`: only those at the beginning of a line.
    """
    if not leading:
        rest, count = _MARKS.subn("\n", text)
    else:
        count = sum(len(_MARKS.findall(found)) for found in _LEADING_MARKS.findall(text))
        rest = _LEADING_MARKS.sub("", text)
    return (rest.strip("\n") if count else text), count


def locate(source: Any, base_dir: str | None, subfolder: Any = None) -> Any:
    """A path relative to `base_dir` made whole; `subfolder` is tried where it is not found there directly.

    Addresses, absolute paths and what is no path (bytes, pictures) are handed back as they are.
    """
    if isinstance(source, dict) and source.get("bytes") is None and isinstance(source.get("path"), str):
        source = source["path"]
    if isinstance(source, list | tuple):
        return [locate(item, base_dir, subfolder) for item in source]
    if not isinstance(source, str) or "://" in source or os.path.isabs(source) or base_dir is None or not source:
        return source
    whole = Path(base_dir) / source
    if subfolder and not whole.exists() and (other := Path(base_dir) / str(subfolder) / source).exists():
        whole = other
    return str(whole)


def subtitles_of(value: Any, base_dir: str | None) -> Any:
    """What a row says about subtitles: `auto`, a file (relative ones made whole), cues; None for nothing, or `off`."""
    if value is None or (isinstance(value, str) and value in ("", "off")):
        return None
    return value if isinstance(value, str) and value == "auto" else locate(value, base_dir)


def find_video(names: list[str], base_dir: str | None) -> str:
    """The file under `base_dir` that has one of these names, with any of the usual suffixes.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in names:
        for suffix in ("", *VIDEO_SUFFIXES):
            path = Path(base_dir or ".") / f"{name}{suffix}"
            if path.is_file():
                return str(path)
    wanted = " or ".join(f"{name}.mp4" for name in names)
    raise FileNotFoundError(f"no video {wanted} in {base_dir or 'the current folder'}: download it, or set base_dir")
