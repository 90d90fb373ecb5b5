"""Every answer of an evaluation, written as it comes, one JSON object a line: what a crash leaves is used again.

An answer is found again by its key, which covers all that it depends on. A row with an "error" is a record, no answer:
what it says could not be done is tried again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..files.append_log import AppendLog, read_log
from ..files.append_log import write_durably as _write


class AnswerLog:
    """Answers by key. Each process appends to a file of its own; all files of the same stem are read.

    Args:
        path: such as `answers.jsonl`; rank 1 writes `answers.rank1.jsonl` beside it. None keeps answers in memory.

    Raises:
        ValueError: a line that is not the last of its file is damaged.
    """

    def __init__(self, path: Path | None, rank: int = 0):
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        self.expected: dict[tuple[str, int, int], set[str]] = {}  # keys of what is asked now, by place
        if path is None:
            return
        if rank:
            self.path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in files_of(path):
            for entry in read_rows(file):
                if "error" not in entry or entry["key"] not in self.answers:
                    self.answers[entry["key"]] = entry
        self._log = AppendLog(self.path, write=lambda file, line: _write(file, line))

    def holds(self, key: str) -> bool:
        """Whether there is an answer; an error of an earlier run is none."""
        return key in self.answers and "error" not in self.answers[key]

    def expect(self, place: tuple[str, int, int], key: str) -> None:
        """Note what is asked now in a place (task, document, round)."""
        self.expected.setdefault(place, set()).add(key)

    def drop_others(self, only_own: bool = False) -> int:
        """Take rows out of the files in whose place something else is expected, and all but the last of one key.

        Args:
            only_own: leave files of other ranks alone.

        Returns:
            How many rows were taken out.
        """
        if self.path is None:
            return 0
        first = self.path.with_name(re.sub(r"\.rank\d+(?=\.)", "", self.path.name))
        dropped = 0
        for file in [self.path] if only_own else files_of(first):
            rows = read_rows(file)
            last = {row["key"]: number for number, row in enumerate(rows)}
            kept = [row for number, row in enumerate(rows) if last[row["key"]] == number and self._fits(row)]
            if len(kept) < len(rows):
                dropped += len(rows) - len(kept)
                AppendLog(file).replace(kept)
        return dropped

    def _fits(self, row: dict[str, Any]) -> bool:
        place = (row.get("task"), row.get("doc_id"), row.get("round", 0))
        if "error" in row and self.holds(row["key"]):
            return False
        return place not in self.expected or row["key"] in self.expected[place]

    def add(self, entry: dict[str, Any]) -> None:
        """Keep an answer; `entry` holds its "key".

        Raises:
            OSError: it cannot be written, for instance because the disk is full. The file keeps what was whole.
        """
        self.answers[entry["key"]] = entry
        if self.path is None:
            return
        try:
            self._log.add(entry)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} cannot take another answer ({error.strerror}); {len(self.answers) - 1} are safe: make "
                "room and run the same command again",
            ) from error


def files_of(path: Path) -> list[Path]:
    """Files of answers that exist for a log: its own and those of further ranks; of a folder, all in it."""
    if path.is_dir():
        return sorted(path.glob("*.jsonl"))
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))) if file.is_file()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, without a last line that was cut off.

    Raises:
        ValueError: another line is damaged.
    """
    rows = []
    for number, (_, row) in enumerate(read_log(path), 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: no JSON object")
        rows.append(row)
    return rows
