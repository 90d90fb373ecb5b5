"""Reads rows of training files (.jsonl, .json, .csv, .tsv) one by one, and finds the files of a folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ...files.text_files import check_text, open_text, parse_json, read_json, text_lines
from .row_formats import COLUMNS

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
PREFERRED_NAMES = ("questions", "metadata", "data", "annotations")
_FIELD_LIMIT = 2**27  # characters of a CSV field


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """`(name, row)` of each row, the name being `file:line` (in a JSON list `file[number]`); for a row that cannot be
    read, the reason in place of the row.

    Columns that only differ in upper case from known ones get the known names; a table's empty fields are None.

    Raises:
        ValueError: a .json file that is no list of objects, a table that is not UTF-8 or UTF-16 or breaks CSV's rules,
            or no file.
    """
    file, label = Path(path), Path(path).name
    if not file.is_file():
        raise ValueError(f"{path}: this is no file, and training data is read more than once: write it into a file")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text_lines(file), 1):
            if line.strip():
                yield f"{label}:{number}", _parse(line)
    elif file.suffix == ".json":
        try:
            found = read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}; for one object a line, name it .jsonl") from None
        if isinstance(found, dict):  # {"data": [...]}
            lists = (value for value in found.values() if isinstance(value, list) and value)
            found = next((value for value in lists if isinstance(value[0], dict)), found)
        if not isinstance(found, list):
            raise ValueError(f"{path}: a .json file must hold a list; with an object on each line it is a .jsonl")
        for number, row in enumerate(found):
            yield f"{label}[{number}]", _named(row) if isinstance(row, dict) else f"it is no object but {row!r:.60}"
    else:
        with open_text(file, newline="") as text:
            yield from _table(text, path, label)


def _table(text: TextIO, path: str, label: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    header, skipped = text.readline(_FIELD_LIMIT), 0
    if match := re.fullmatch(r"sep=(.)\s*", header):  # Excel's way to say it
        header, skipped = text.readline(_FIELD_LIMIT), 1
    outside = re.sub(r'"[^"]*"', "", header)
    usual = "\t" if Path(path).suffix == ".tsv" else ","
    delimiter = match[1] if match else max((usual, ",", ";", "\t", "|"), key=outside.count)
    reader = csv.DictReader(chain([header], text), delimiter=delimiter)
    try:
        for row in reader:
            name = f"{label}:{reader.line_num + skipped}"
            if None in row:
                yield name, "it has more fields than the header: put quotes around texts that hold commas"
                continue
            for value in row.values():
                check_text(value or "")
            yield name, _named({key.strip(): value or None for key, value in row.items()})
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {reader.line_num + skipped}: {error}") from None


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns have the names that are known: `Video` is `video`."""
    known = {column.lower(): column for column in COLUMNS}
    return {key if key in COLUMNS else known.get(key.lower(), key): value for key, value in row.items()}


def _parse(line: str) -> dict[str, Any] | str:
    try:
        check_text(line)
        row = parse_json(line)
    except ValueError as error:
        return f"it is not JSON ({error})"
    return _named(row) if isinstance(row, dict) else f"it is no object but {row!r:.60}"


def files_in(folder: Path, split: str) -> list[Path]:
    """The data files of a folder: those named after the split, else `questions`, `metadata`, ..., else the only one.

    Raises:
        FileNotFoundError: there is none. ValueError: there are several, and it is not clear which is meant.
    """
    found = sorted(file for suffix in DATA_SUFFIXES for file in folder.glob(f"*{suffix}"))
    found += sorted(file for suffix in DATA_SUFFIXES for file in folder.glob(f"data/*{suffix}"))
    named = [file for file in found if file.stem == split or file.stem.startswith((f"{split}-", f"{split}_"))]
    for name in PREFERRED_NAMES:
        named = named or [file for file in found if file.stem == name]
    named = named or (found if len(found) == 1 else [])
    if named:
        return named
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no training data: put a {split}.jsonl, .json, .csv or .parquet there, with a row for "
            "each sample (such as video,question,answer)"
        )
    names = ", ".join(str(file.relative_to(folder)) for file in found[:8])
    raise ValueError(f"{folder} holds several data files ({names}): name one of them, or call it {split}.jsonl")
