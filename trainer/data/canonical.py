"""Canonical rows: what every source is turned into, and how rows about one video become one sample.

Columns: `messages` (see row_formats), `id`, and `problem`, the reason why a row could not be understood (None where it
could): such rows are kept, so that they are listed with the other broken samples instead of vanishing. Videos and
images that a source holds itself stay in its own columns (video, videos, image, images) and fill the places that the
messages leave for them, in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .row_formats import Row, RowFormat, check_answers, detect_format
from .row_text import media_part

if TYPE_CHECKING:
    import datasets

_HALVES = re.compile("[\ud800-\udfff]")
MEDIA_COLUMNS = ("video", "videos", "image", "images")


def features(grouped: bool = False) -> datasets.Features:
    """Types of the canonical columns; with `grouped`, those by which rows are merged too."""
    from datasets import Features, Value

    text = Value("string")
    part = {"type": text, "text": text, "video": text, "image": text, "frames": [text], "subtitles": text}
    part |= {"start": Value("float64"), "end": Value("float64")}
    message = {"role": text, "content": [part], "learn": Value("bool")}
    columns = {"messages": [message], "id": text, "problem": text}
    return Features(columns | ({"group": text, "start": Value("float64")} if grouped else {}))


def canonical_row(row: Row, name: str, base_dir: str | None, merge: bool, held: tuple[str, ...] = ()) -> Row:
    """One row in canonical form, with `group` and `start`: rows of one group are to be merged in the order of start.

    Args:
        row: as read. name: its id where it has none, such as file:line.
        merge: group questions about the same video.
        held: columns whose videos or images stay where they are.

    Never fails: what is wrong with the row becomes its `problem`.
    """
    label = next((str(row[key]) for key in ("id", "question_id", "video_id") if row.get(key) not in (None, "")), name)
    label = _whole_characters(label)
    try:
        form, row = _form(row), {key: _whole_characters(value) for key, value in row.items() if value is not None}
        row |= {column: _places(row[column], column) for column in held if column in row}
        messages = form.convert(row, base_dir)
        check_answers(messages)
        group, start = _group(messages, form.clips, merge)
        messages = [
            {"role": m["role"], "content": [_plain(part) for part in m["content"]], "learn": m.get("learn")}
            for m in messages
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return broken_row(label, f"{name}: the row is malformed ({type(error).__name__}: {error})")
    except (ValueError, OSError) as error:
        return broken_row(label, f"{name}: {error}")
    return {"messages": messages, "id": label, "problem": None, "group": group, "start": start}


def _form(row: Row) -> RowFormat:
    filled = [key for key, value in row.items() if value is not None]
    try:
        return detect_format(filled)
    except ValueError:
        form = detect_format(list(row))
        raise ValueError(f"{' and '.join(key for key in form.needs if key not in filled)}: nothing is there") from None


def _whole_characters(value: Any) -> Any:
    """A value whose texts hold no half characters (of an emoji that was cut, say): neither Arrow nor tokenizers take
    them."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, list | tuple):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return value


def broken_row(label: str, problem: str) -> Row:
    """A row that cannot be used, and why."""
    label, problem = _whole_characters(label), _whole_characters(problem)
    return {"messages": [], "id": label, "problem": problem, "group": None, "start": None}


def _places(value: Any, column: str) -> Any:
    """Placeholders for media that stay in their column; `_plain` takes them for parts without a source."""
    return [_HELD] * len(value) if column.endswith("s") else _HELD


_HELD = {"held": True}


def _plain(part: Row) -> Row:
    """A part as the columns' types want it: every key, None where there is nothing."""
    part = {key: None if value is _HELD else value for key, value in part.items()}
    for key in ("video", "image"):
        if part.get(key) is not None and not isinstance(part[key], str):
            raise ValueError(
                f"a {key} in the messages must be a path or an address, not {type(part[key]).__name__}: put what it "
                f"holds into a column {key}s and leave its place in the messages empty"
            )
    return {key: part.get(key) for key in ("type", "text", "video", "image", "frames", "subtitles", "start", "end")}


def _group(messages: list[Row], clips: bool, merge: bool) -> tuple[str | None, float | None]:
    media = [part for message in messages for part in message["content"] if part["type"] != "text"]
    if len(media) != 1 or not isinstance(media[0].get("video"), str):
        return None, None
    part = media[0]
    if clips and ("start" in part or "end" in part):
        return json.dumps(["clips", part["video"]]), part.get("start", 0.0)
    if merge and not clips and next(m for m in messages if m["role"] == "user")["content"][0] is part:
        return json.dumps(["questions", part["video"], part.get("start"), part.get("end")]), None
    return None, None


def merge_rows(rows: list[Row]) -> Row:
    """One sample of rows of one group: clips one after the other in time, questions as turns about one video."""
    if len(rows) == 1:
        return without_group(rows[0])
    rows = sorted(rows, key=lambda row: row["start"] or 0.0)  # stable: questions keep their order
    messages = list(rows[0]["messages"])
    is_questions = rows[0]["start"] is None
    for row in rows[1:]:
        for message in row["messages"]:
            if is_questions:
                if message["role"] == "system":
                    continue
                message = {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
            messages.append(message)
    return {"messages": messages, "id": rows[0]["id"], "problem": None}


def without_group(row: Row) -> Row:
    """The row as training wants it, without the columns by which rows are merged."""
    return {name: row[name] for name in ("messages", "id", "problem")}


def merge_neighbours(rows: Iterable[Row]) -> Iterator[Row]:
    """Merge rows of one group that follow one another (all that can be done where rows stream past)."""
    waiting: list[Row] = []
    for row in rows:
        if waiting and (row["group"] is None or row["group"] != waiting[0]["group"]):
            yield merge_rows(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield merge_rows(waiting)


def drop_empty(message: Row) -> Row:
    """A message without the keys that Arrow fills with None, and a list of frames as the video it is."""
    parts = []
    for given in message["content"]:
        part = {key: value for key, value in given.items() if value is not None}
        if "frames" in part:
            part["video"] = part.pop("frames")
        parts.append(part)
    return {"role": message["role"], "content": parts, **({"learn": False} if message.get("learn") is False else {})}


__all__ = ["MEDIA_COLUMNS", "canonical_row", "drop_empty", "features", "media_part", "merge_neighbours", "merge_rows"]
