"""`load_training_data`: rows of any source that is understood, as a data set of canonical rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset, IterableDataset

from ...files.text_files import check_text, open_text, parse_json, read_json, text_lines
from ...processing.video_source_names import local_path, shown_name
from ..setting_names import DATA_SUFFIXES, TEXT_SUFFIXES, check_data_file, check_shares
from .canonical import MEDIA_COLUMNS, broken_row, canonical_row, features, merge_neighbours
from .dataset_rows import from_dataset, merge_groups
from .row_formats import COLUMNS, Row, detect_format

Source = str | PathLike[str] | Dataset | IterableDataset
_VERSION = 3  # of what a row becomes; a new one sets aside what `datasets` has cached
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")

PREFERRED_NAMES = ("questions", "metadata", "data", "annotations")
_FIELD_LIMIT = 2**27  # characters of a CSV field


def load_training_data(
    source: Source | Sequence[Source],
    *,
    base_dir: str | PathLike[str] | None = None,
    streaming: bool = False,
    split: str = "train",
    merge_by_video: bool = False,
) -> Dataset | IterableDataset:
    """Load training data of any form in `row_formats.FORMATS`, told by the columns.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file; a folder with one of them, or one that `save_to_disk`
            wrote; a data set on the Hub (`owner/name`, with a configuration `owner/name:configuration`); a data set
            that is loaded already; or a list of these, one after the other.
        base_dir: where relative paths of videos and images begin; by default the folder of the file.
        streaming: read rows when they are asked for; clips and questions are then merged only where those of one
            video follow one another (in data sets that stream: within a thousand rows).
        split: of folders and data sets that have several.
        merge_by_video: make all questions about one video one conversation (stage 2). Clips of one video always are.

    Returns:
        Canonical rows (see `canonical`): `messages`, `id`, `problem`, and columns with videos that the source holds
        itself. Nothing is decoded. Rows that are malformed are there too, with their problem.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: the columns are of no known form (both what was found
        and what is understood is listed), there are no rows, or it is not clear which file is meant.
    """
    base = None if base_dir is None else str(base_dir)
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise ValueError("there is no source of training data")
    parts = [_load(one, base, streaming, split, merge_by_video) for one in sources]
    if len(parts) == 1:
        return parts[0]
    if len({isinstance(part, IterableDataset) for part in parts}) > 1:
        raise ValueError("some sources stream and some do not: load all of them with the same streaming=")
    return datasets.concatenate_datasets(parts)


def mix(parts: Sequence[Dataset | IterableDataset], shares: Sequence[float] | None, seed: int) -> Any:
    """Data sets of one kind mixed, each until it ends, none of its rows twice.

    Args:
        shares: chance of each to give the next row, in any unit; None: they take turns.

    Raises:
        ValueError: shares that are none, or not one for each data set.
    """
    if shares is not None:
        check_shares(shares, len(parts))
        shares = [share / sum(shares) for share in shares]
    return datasets.interleave_datasets(
        list(parts), probabilities=shares, seed=seed, stopping_strategy="all_exhausted_without_replacement"
    )


def _load(source: Source, base: str | None, streaming: bool, split: str, merge: bool) -> Dataset | IterableDataset:
    if isinstance(source, Dataset | IterableDataset):
        return from_dataset(source, base, merge, "the data set")
    path, name = local_path(source), shown_name(source)
    if path.is_dir():
        if any((path / mark).exists() for mark in ("dataset_info.json", "state.json", "dataset_dict.json")):
            return from_dataset(_saved(path, split, streaming), base or str(path), merge, name)
        files = files_in(path, split)
    elif path.is_file():
        check_data_file(path, name)
        files = [path]
    else:
        match = _HUB_ID.fullmatch(name)
        if match is None or name.startswith(".") or path.suffix in DATA_SUFFIXES:
            raise FileNotFoundError(f"{name}: no such file or folder (and it is no data set id such as owner/name)")
        found = datasets.load_dataset(match[1], match[2], split=split, streaming=streaming)
        return from_dataset(found, base, merge, name)
    if all(file.suffix == ".parquet" for file in files):
        found = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
        return from_dataset(found, base or str(path if path.is_dir() else path.parent), merge, name)
    files = [file for file in files if file.suffix in TEXT_SUFFIXES]
    return _from_files(files, base, streaming, merge)


def _saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(found)}")
        found = found[split]
    return found.to_iterable_dataset() if streaming else found


def _from_files(files: list[Path], base: str | None, streaming: bool, merge: bool) -> Dataset | IterableDataset:
    for file in files:
        first = next((row for _, row in read_rows(str(file))), None)
        if first is None:
            raise ValueError(f"{file}: there are no rows in this file")
        if isinstance(first, dict):
            detect_format(list(first), str(file))
    shards = [(str(file.resolve()), base or str(file.resolve().parent)) for file in files]
    if streaming:
        arguments = {"files": shards, "merge": merge}
        return IterableDataset.from_generator(_merged_rows, features=features(), gen_kwargs=arguments)
    stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    try:
        rows = Dataset.from_generator(
            _canonical_rows,
            features=features(grouped=True),
            gen_kwargs={"files": tuple(shards), "merge": merge, "stamps": stamps, "version": _VERSION},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what `read_rows` says
    return merge_groups(rows)


def _canonical_rows(files: Sequence[tuple[str, str]], merge: bool, **_: Any) -> Iterator[Row]:
    for path, base in files:
        for name, row in read_rows(path):
            if isinstance(row, str):
                yield broken_row(name, f"{name}: {row}")
            else:
                yield canonical_row(row, name, base, merge)


def _merged_rows(files: Sequence[tuple[str, str]], merge: bool) -> Iterator[Row]:
    return merge_neighbours(_canonical_rows(files, merge))


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
    row = {key if key in COLUMNS else known.get(key.lower(), key): value for key, value in row.items()}
    media = {key: row[key].strip() or None for key in MEDIA_COLUMNS if isinstance(row.get(key), str)}
    return row | media  # `a.mp4 , What?`: no name of a file has spaces around it


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
