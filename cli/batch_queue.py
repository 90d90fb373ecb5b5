"""The two files of `video-ma2mba batch`: the queue of questions, and the results, which survive any interruption."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from video_ma2mba.files.append_log import AppendLog, read_log
from video_ma2mba.files.remote_files import RemoteLog, exists, is_remote, local_copy, read_bytes, write_bytes
from video_ma2mba.files.text_files import check_text, open_text, parse_json, read_json, text_lines

_FIELDS = ("video", "question", "questions", "id", "start", "end", "subtitles")
_TABLES = {".csv": ",;\t", ".tsv": "\t"}
Source = tuple[str, float | None, float | None, str | None]


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
    start: float | None = None
    end: float | None = None
    subtitles: str | None = None
    error: str | None = None
    shown: str | None = None

    @property
    def source(self) -> Source:
        """What is read: items that share it are asked of one reading."""
        return self.video, self.start, self.end, self.subtitles

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
            own = ("start", "end", "subtitles")
            facts |= {name: value for name in own if (value := getattr(self, name)) is not None}
            if self.questions:
                facts |= {"questions": self.questions} if self.several else {"question": self.questions[0]}
        return facts | found


def read_queue(path: str | os.PathLike[str], needs_question: bool = True) -> list[Item]:
    """The items of a JSONL file, or of a table (.csv, .tsv) with a line of names on top; blank lines are passed over.

    Args:
        path: a file, or an address that fsspec knows.
        needs_question: a line without a question is an error; else its video is read and not asked.

    A line that is no item becomes one with an `error`.

    Raises:
        ValueError: a table without the columns that it needs, or with others. OSError: it cannot be read.
    """
    with local_copy(os.fspath(path)) if is_remote(path) else nullcontext(Path(path)) as file:
        if file.suffix.lower() in _TABLES:
            return [_item(*row, needs_question) for row in _table(file, os.fspath(path))]
        lines = ((number, line.strip()) for number, line in enumerate(text_lines(file), 1))
        return [_item(number, line, None, needs_question) for number, line in lines if line]


def _table(file: Path, name: str) -> Iterator[tuple[int, str, dict[str, str]]]:
    """The rows of a table: line, what it says as one text, and its fields by name."""
    with open_text(file, newline="") as text:
        first = text.readline()
        marks = _TABLES[file.suffix.lower()]
        mark = max(marks, key=first.count)
        names = [word.strip().lower() for word in next(csv.reader([first], delimiter=mark), [])]
        known = [word for word in _FIELDS if word != "questions"]
        if unknown := [word for word in names if word not in known]:
            wanted = ", ".join(known)
            raise ValueError(f"{name}: {unknown[0]!r} is no column of a queue: the first line names some of {wanted}")
        if "video" not in names or len(set(names)) < len(names):
            raise ValueError(f"{name}: the first line must name each column once, and one of them 'video'")
        rows, line = csv.reader(text, delimiter=mark), 2
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(f"{name}, line {line}: {error}") from None
            if row is None:
                return
            if any(cell.strip() for cell in row):
                given = {word: cell.strip() for word, cell in zip(names, row, strict=False) if cell.strip()}
                extra = {"": "more cells than columns"} if len(row) > len(names) else {}
                yield line, json.dumps(given | extra, ensure_ascii=False), given | extra
            line = rows.line_num + 2


def _item(number: int, line: str, given: Any, needs_question: bool) -> Item:
    item = Item(number, hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()[:12])
    try:
        check_text(line)
        given = parse_json(line, strict=True) if given is None else given
    except ValueError as error:
        item.error = f"this line {'is not JSON' if given is None else 'cannot be read'}: {error}"[:300]
        return item
    if not isinstance(given, dict):
        item.error = "this line is not a JSON object"
        return item
    from video_ma2mba.processing.frame_sampling import Sampling, seconds_of

    item.id = given.get("id")
    asked = given.get("questions", given.get("question"))
    item.several = "questions" in given
    questions = asked if isinstance(asked, list) and item.several else [] if asked is None else [asked]
    if unknown := sorted(given.keys() - set(_FIELDS)):
        item.error = f"unknown fields {unknown}: use {list(_FIELDS)}"
    elif "question" in given and "questions" in given:
        item.error = "give either 'question' or 'questions'"
    elif not isinstance(given.get("video"), str) or not given["video"]:
        item.error = "'video' must name a video"
    elif not isinstance(given.get("subtitles", "off"), str) or not given.get("subtitles", "off"):
        item.error = "'subtitles' must be auto, off or the name of a file"
    elif not all(isinstance(text, str) and text.strip() for text in questions) or (needs_question and not questions):
        item.error = "'question' must be a text, 'questions' a list of texts, none of them empty"
    else:
        try:
            start, end = (seconds_of(given.get(name), name) for name in ("start", "end"))
            Sampling(start=start, end=end)
        except ValueError as error:
            item.error = str(error)
            return item
        item.video, item.start, item.end, item.subtitles = given["video"], start, end, given.get("subtitles")
        item.questions = [text.strip() for text in questions]
    return item


class Results:
    """The result file, open for adding lines; a line is in it whole or not at all.

    Args:
        path: a file, or an address that fsspec knows; continued where it exists.
        settings: what all results of a file share (model, frames, ...). They are kept in `PATH.settings`.
        items: of the queue, to which the results there must belong.
        retry_errors: forget results that are errors.

    Attributes:
        done: lines of the queue that have their result.
        torn: whether an unfinished line at the end, left by an interruption, was taken away.
        stale: results that were taken out because their videos have another content now.
        errors: results that are errors.

    Raises:
        ValueError: the file holds something else, results of another queue or with other settings, or is being
            written by another run.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: dict[str, Any], items: list[Item], retry_errors: bool = False
    ):
        from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through

        self.path = os.fspath(path)
        self.torn, self.done, self.stale, self.errors = False, set(), 0, 0
        self._items = len(items)
        self._log = RemoteLog(self.path) if is_remote(self.path) else AppendLog(path, alone=True)
        if not is_remote(self.path) and is_written_through(path):  # nothing to go on from
            return
        try:
            self._claim(settings)
            kept = self._kept_results({item.line: item for item in items}, retry_errors)
            self.done = {result["line"] for result in kept}
            self.errors = sum("error" in result for result in kept)
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: Any) -> None:
        if isinstance(self._log, RemoteLog) and len(self.done) == self._items:
            self._log.complete()
        self._log.close()

    def add(self, result: dict[str, Any]) -> None:
        """Write one line. OSError when the disk is full: what was written before stays, the line is not begun."""
        try:
            self._log.add(result)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror or error}): the results so far are kept; "
                "make room, and the same command goes on from there"
            ) from error
        self.done.add(result["line"])
        self.errors += "error" in result

    def flush(self) -> None:
        """Make sure that the lines survive a power failure."""
        self._log.flush()

    def _claim(self, settings: dict[str, Any]) -> None:
        """Compare with the settings of the results that are there; a new file gets them."""
        from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole

        beside = f"{self.path}.settings"
        text = json.dumps(settings, indent=1) + "\n"
        remote = is_remote(self.path)
        if not exists(beside) and next(self._log.read(), None) is None if remote else os.path.getsize(self.path) == 0:
            write_bytes(beside, text.encode()) if remote else write_whole(beside, text)
            return
        try:
            there = dict(parse_json(read_bytes(beside)) if remote else read_json(beside))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.path} exists, but not its settings ({beside}): name another file") from error
        if differing := [name for name in {**settings, **there} if settings.get(name) != there.get(name)]:
            raise ValueError(
                f"{self.path} holds results with another {' and another '.join(differing)}: name another file"
            )

    def _kept_results(self, items: dict[int, Item], retry_errors: bool) -> list[dict[str, Any]]:
        """Results that are there; those about another content of a video are taken out, and by request the errors."""
        kept: dict[int, tuple[bytes, dict[str, Any]]] = {}
        entries = self._log.read() if isinstance(self._log, RemoteLog) else read_log(self.path)
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
            before = kept.get(item.line)
            again = before is not None and "error" in result and "error" not in before[1]
            if not stale and not (retry_errors and "error" in result) and not again:
                kept[item.line] = line, result
        self.torn = self._log.cut_torn_line()  # not before it is known to be a file of ours
        if len(kept) < number - 1:
            self._log.replace([line for line, _ in kept.values()])
        return [result for _, result in kept.values()]


def by_video(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items about the same part of a video together, wherever they stand in the queue, in order of the first."""
    groups: dict[Source, list[Item]] = {}
    for item in items:
        groups.setdefault(item.source, []).append(item)
    yield from groups.values()
