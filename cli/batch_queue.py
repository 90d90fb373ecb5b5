"""The two files of `video-ma2mba batch`: the queue of questions, and the results, which survive any interruption."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from video_ma2mba.files.append_log import AppendLog, read_log
from video_ma2mba.files.text_files import check_text, parse_json, read_json, text_lines

_FIELDS = ("video", "question", "questions", "id")


@dataclass
class Item:
    """One line of the queue. `error` says why it cannot be asked; `digest` and `shown`, that of the video's content,
    tell whether a result belongs to it."""

    line: int
    digest: str
    video: str = ""
    questions: list[str] = field(default_factory=list)
    several: bool = False
    id: Any = None
    error: str | None = None
    shown: str | None = None

    def result(self, **found: Any) -> dict[str, Any]:
        """The line of results for this item; what was asked is repeated, so that it can be read by itself."""
        facts: dict[str, Any] = {"line": self.line, "item": self.digest}
        if self.id is not None:
            facts["id"] = self.id
        if self.shown is not None:
            facts["shown"] = self.shown
        if self.error is None:
            from video_ma2mba.processing.video_source_names import shown_name

            facts |= {"video": shown_name(self.video)}
            facts |= {"questions": self.questions} if self.several else {"question": self.questions[0]}
        return facts | found


def read_queue(path: Path) -> list[Item]:
    """The items of a JSONL file; blank lines are passed over.

    A line that is no item becomes one with an `error`. FileNotFoundError or another OSError: it cannot be read.
    """
    return [_item(number, line.strip()) for number, line in enumerate(text_lines(path), 1) if line.strip()]


def _item(number: int, line: str) -> Item:
    item = Item(number, hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()[:12])
    try:
        check_text(line)
        given = parse_json(line, strict=True)
    except ValueError as error:
        item.error = f"this line is not JSON: {error}"[:300]
        return item
    if not isinstance(given, dict):
        item.error = "this line is not a JSON object"
        return item
    item.id = given.get("id")
    asked = given.get("questions", given.get("question"))
    item.several = "questions" in given
    questions = asked if isinstance(asked, list) and item.several else [asked]
    if unknown := sorted(given.keys() - set(_FIELDS)):
        item.error = f"unknown fields {unknown}: use {list(_FIELDS)}"
    elif "question" in given and "questions" in given:
        item.error = "give either 'question' or 'questions'"
    elif not isinstance(given.get("video"), str) or not given["video"]:
        item.error = "'video' must name a video"
    elif not questions or not all(isinstance(text, str) and text.strip() for text in questions):
        item.error = "'question' must be a text, 'questions' a list of texts, none of them empty"
    else:
        item.video, item.questions = given["video"], [text.strip() for text in questions]
    return item


class Results:
    """The result file, open for adding lines; a line is in it whole or not at all.

    Args:
        path: continued where it exists.
        settings: what all results of a file share (model, frames, ...). They are kept in `PATH.settings`.
        items: of the queue, to which the results there must belong.
        retry_errors: forget results that are errors.

    Attributes:
        done: lines of the queue that have their result.
        torn: whether an unfinished line at the end, left by an interruption, was taken away.
        stale: results that were taken out because their videos have another content now.

    Raises:
        ValueError: the file holds something else, results of another queue or with other settings, or is being
            written by another run.
    """

    def __init__(self, path: Path, settings: dict[str, Any], items: list[Item], retry_errors: bool = False):
        from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through

        self.path = path
        self.torn, self.done, self.stale = False, set(), 0
        self._log = AppendLog(path, alone=True)
        if is_written_through(path):  # nothing to go on from
            return
        try:
            self._claim(settings)
            kept = self._kept_results({item.line: item for item in items}, retry_errors)
            self.done = {result["line"] for result in kept}
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._log.close()

    def add(self, result: dict[str, Any]) -> None:
        """Write one line. OSError when the disk is full: what was written before stays, the line is not begun."""
        try:
            self._log.add(result)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}): the results so far are kept; make room, and the "
                "same command goes on from there"
            ) from error
        self.done.add(result["line"])

    def flush(self) -> None:
        """Make sure that the lines survive a power failure."""
        self._log.flush()

    def _claim(self, settings: dict[str, Any]) -> None:
        """Compare with the settings of the results that are there; a new file gets them."""
        from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole

        beside = Path(f"{self.path}.settings")
        if os.path.getsize(self.path) == 0:
            write_whole(beside, json.dumps(settings, indent=1) + "\n")
            return
        try:
            there = dict(read_json(beside))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.path} exists, but not its settings ({beside}): name another file") from error
        if differing := [name for name in {**settings, **there} if settings.get(name) != there.get(name)]:
            raise ValueError(
                f"{self.path} holds results with another {' and another '.join(differing)}: name another file"
            )

    def _kept_results(self, items: dict[int, Item], retry_errors: bool) -> list[dict[str, Any]]:
        """Results that are there; those about another content of a video are taken out, and by request the errors."""
        kept, lines, entries = [], [], read_log(self.path)
        for number in count(1):
            try:
                entry = next(entries, None)
                if entry is None:
                    break
                line, result = entry
                item = items[result["line"]]
                if item.digest != result["item"]:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}, line {number}, is no result of this queue: name another file"
                ) from None
            stale = "error" not in result and item.shown not in (None, result.get("shown"))
            self.stale += stale
            if not stale and not (retry_errors and "error" in result):
                kept.append(result)
                lines.append(line)
        self.torn = self._log.cut_torn_line()  # not before it is known to be a file of ours
        if len(lines) < number - 1:
            self._log.replace(lines)
        return kept


def by_video(items: list[Item]) -> Iterator[list[Item]]:
    """Items of the same video together, wherever they stand in the queue; videos in the order they first appear."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.video, []).append(item)
    yield from groups.values()
