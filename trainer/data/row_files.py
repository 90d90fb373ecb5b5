"""Reads rows of training files (.jsonl, .json, .csv, .tsv) one by one, and finds the files of a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
PREFERRED_NAMES = ("questions", "metadata", "data", "annotations")
_FIELD_LIMIT = 2**27  # characters of a CSV field


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """`(name, row)` of each row, the name being `file:line` (in a JSON list `file[number]`); for a row that cannot be
    read, the reason in place of the row.

    Raises:
        ValueError: a .json file that is no list of objects.
    """
    file, label = Path(path), Path(path).name
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{label}:{number}", _parse(line)
    elif file.suffix == ".json":
        try:
            found = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: this is not JSON ({error}); for one object a line, name it .jsonl") from error
        if isinstance(found, dict):  # {"data": [...]}
            lists = (value for value in found.values() if isinstance(value, list) and value)
            found = next((value for value in lists if isinstance(value[0], dict)), found)
        if not isinstance(found, list):
            raise ValueError(f"{path}: a .json file must hold a list; with an object on each line it is a .jsonl")
        for number, row in enumerate(found):
            yield f"{label}[{number}]", row if isinstance(row, dict) else f"it is no object but {row!r:.60}"
    else:
        csv.field_size_limit(_FIELD_LIMIT)
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",")
            for row in reader:
                name = f"{label}:{reader.line_num}"
                if None in row:
                    yield name, "it has more fields than the header: put quotes around texts that hold commas"
                else:
                    yield name, {key.strip(): value for key, value in row.items() if value not in (None, "")}


def _parse(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"it is not JSON ({error})"
    return row if isinstance(row, dict) else f"it is no object but {row!r:.60}"


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
