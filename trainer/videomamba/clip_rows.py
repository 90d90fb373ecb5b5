"""Lists of videos or pictures with a label: the forms in which Kinetics, Something-Something, Breakfast, COIN, LVU and
ImageNet come, as rows that name a file and what is to be learnt of it. Nothing is decoded here."""

from __future__ import annotations

import csv
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...files.text_files import open_text, read_json, text_lines
from ...processing.frame_sampling import seconds_of
from ...processing.video_source_names import IMAGE_SUFFIXES, is_address, local_path

VIDEO_SUFFIXES = frozenset((".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"))
LIST_SUFFIXES = (".csv", ".txt", ".tsv", ".list", ".json", ".jsonl")
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
SPLITS = {"val": ("val", "validate", "validation"), "train": ("train", "training"), "test": ("test", "testing")}
SOURCE_FIELDS = (
    *("video", "image", "path", "file", "filename", "file_name", "filepath", "file_path", "video_path", "video_name"),
    *("clip", "video_id", "videoid"),
)
_SOURCE = (*SOURCE_FIELDS, "name")
_LABEL = ("label", "class", "class_id", "class_name", "label_name", "target", "value", "category", "action")
_START, _END, _LENGTH = ("start", "time_start", "begin"), ("end", "time_end", "stop"), ("duration", "seconds")
_DIGITS = re.compile(r"-?\d+")
Row = TypeVar("Row")


@dataclass(frozen=True)
class ClipRow:
    """One video or picture: whatever `open_video` takes, its label (a class's number or name, or a value to predict),
    and the part that counts, in seconds."""

    source: Any
    label: int | float | str | None = None
    start: float | None = None
    end: float | None = None
    seconds: float | None = None  # length of the whole, where the list says it

    def open(self) -> Any:
        """What `open_video` takes."""
        return self.source.open() if isinstance(self.source, StoredMedia) else self.source

    @property
    def name(self) -> str:
        """For messages."""
        shown = self.source if isinstance(self.source, str | os.PathLike) else type(self.source).__name__
        if isinstance(self.source, StoredMedia):
            shown = f"row {self.source.place}"
        return f"{shown}" + (f" from {self.start:g} s" if self.start else "")


@dataclass(frozen=True)
class ClipRows:
    """Rows whose labels are numbers, and the names of the classes (none where values are predicted)."""

    rows: Sequence[ClipRow]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def load_clip_rows(
    source: Any,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    regression: bool = False,
    classes: Sequence[str] | None = None,
    window: float | None = None,
    stride: float | None = None,
) -> ClipRows:
    """Read a list, told by its form.

    Args:
        source: a folder with a folder for every class (or such folders under `split`); a folder with a list named
            after `split`; a list: `path,label` or `path label` a line without header, in a third place the seconds of
            the video (as LVU's lists have it) or, for folders of pictures, how many, before the label; a table with
            header (`video` or `path`, `label` or `value`, `start`, `end`, `duration`; Kinetics's with `youtube_id`);
            Something-Something's or COIN's JSON; a data set of `datasets`, loaded, saved or on the Hub; or several.
        base_dir: where relative paths begin; by default the list's folder.
        regression: labels are values to predict.
        classes: names of the classes in their order, as an earlier list had them; else they are found here: numbers
            as they are, names in alphabetical order.
        window, stride: cut videos of known length that are not shorter than `window` seconds into windows of that
            length, one every `stride` seconds; a last one may be shorter, down to half.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: the form is not understood, or a label is no number, or
        there is no row.
    """
    sources = source if isinstance(source, list | tuple) else [source]
    base = None if base_dir is None else Path(base_dir)
    rows = [
        row
        for one in sources
        for row in read_source(one, base, split, dataset=_from_dataset, file=_from_file, folder=_from_folder)
    ]
    if not rows:
        raise ValueError(f"{source}: there are no rows in it")
    if window is not None:
        rows = [part for row in rows for part in windows(row, window, stride or window)]
    if regression:
        return ClipRows([replace(row, label=_value(row)) for row in rows])
    if all(row.label is None for row in rows):
        return ClipRows(rows)
    return _numbered(rows, classes)


def windows(row: ClipRow, length: float, stride: float) -> Iterator[ClipRow]:
    """Windows of a video, as LVU is trained on; the whole where it is shorter, or its length is not known."""
    if row.seconds is None or row.seconds < length:
        yield row
        return
    start = 0.0
    while start < row.seconds:
        if row.seconds - start >= length / 2:
            yield replace(row, start=start, end=min(start + length, row.seconds))
        start += stride


def _value(row: ClipRow) -> float:
    try:
        value = float(row.label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{row.name}: the value to predict must be a number, not {row.label!r}")
    return value


def _numbered(rows: list[ClipRow], classes: Sequence[str] | None) -> ClipRows:
    labels = [row.label for row in rows]
    missing = next((row for row in rows if row.label is None), None)
    if missing is not None:
        raise ValueError(f"{missing.name} has no label, others have one")
    numbers = all(isinstance(label, int) or _DIGITS.fullmatch(str(label)) for label in labels)
    if numbers and (classes is None or not set(map(str, labels)) <= set(classes)):
        found = [int(label) for label in labels]  # type: ignore[arg-type]
        if min(found) < 0:
            raise ValueError(f"{rows[found.index(min(found))].name}: there is no class {min(found)}, they begin at 0")
        names = tuple(classes or map(str, range(max(found) + 1)))
        if max(found) >= len(names):
            row = rows[found.index(max(found))]
            raise ValueError(f"{row.name}: there is no class {max(found)}, there are {len(names)}, 0 first")
    else:
        names = tuple(classes or sorted(set(map(str, labels))))
        where = {name: number for number, name in enumerate(names)}
        unknown = next((row for row in rows if str(row.label) not in where), None)
        if unknown is not None:
            raise ValueError(f"{unknown.name}: there is no class {unknown.label!r} among the {len(names)} known ones")
        found = [where[str(label)] for label in labels]
    return ClipRows([replace(row, label=label) for row, label in zip(rows, found, strict=True)], names)


# ------------------------------------------------------------------------------------------------ forms
def read_source(
    source: Any,
    base: Path | None,
    split: str,
    *,
    dataset: Callable[[Any, Path | None, str], Iterable[Row]],
    file: Callable[[Path, Path, str], Iterable[Row]],
    folder: Callable[[Path, str], Iterable[Row]],
) -> Iterable[Row]:
    """Rows of a data set (given, saved in a folder, or by its Hub id), a file, or a folder.

    Args:
        base: where the files are that rows name; None is where the source is.
        dataset: makes rows of a data set of `datasets`, the files' folder and a name for messages. file: of a file,
            the files' folder and the split. folder: of a folder that holds no list named after the split.

    Raises:
        FileNotFoundError: there is no such source.
    """
    _files_of.cache_clear()
    if hasattr(source, "column_names"):
        return dataset(source, base, "the data set")
    path = local_path(source)
    if path.is_dir():
        if any((path / mark).exists() for mark in ("dataset_info.json", "state.json", "dataset_dict.json")):
            import datasets

            found = datasets.load_from_disk(str(path))
            one = found[_split_among(found, split, source)] if isinstance(found, dict) else found
            return dataset(one, base or path, str(path))
        lists = (path / f"{name}{suffix}" for name in names_of_split(split) for suffix in LIST_SUFFIXES)
        if (found := next((each for each in lists if each.is_file()), None)) is not None:
            return file(found, base or path, split)
        return folder(path, split)
    if path.is_file():
        return file(path, base or path.parent, split)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        import datasets

        for name in names_of_split(split):
            try:
                return dataset(datasets.load_dataset(str(source), split=name), base, str(source))
            except ValueError as error:
                if "Unknown split" not in str(error):
                    raise
        raise ValueError(f"{source} has no split {' or '.join(names_of_split(split))}")
    raise FileNotFoundError(f"{source}: no such file or folder (and it is no data set id such as owner/name)")


def _from_file(path: Path, base: Path, split: str) -> Iterable[ClipRow]:
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise ValueError(f"{path}: a list of videos must end in {', '.join(LIST_SUFFIXES)}")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _from_json(path, base, split)
    return _from_text(path, base)


def _from_folder(folder: Path, split: str) -> Iterable[ClipRow]:
    """A folder for every class."""
    root = folder_of_split(folder, split)
    rows = []
    for kind in sorted(part for part in root.iterdir() if part.is_dir()):
        files = sorted(path for path in kind.rglob("*") if path.suffix.lower() in MEDIA_SUFFIXES)
        rows += [ClipRow(str(path), kind.name) for path in files]
    if not rows:
        raise FileNotFoundError(
            f"{folder} holds neither a list ({split}.csv with path,label a line) nor a folder of videos or pictures "
            "for every class"
        )
    return rows


def names_of_split(split: str) -> tuple[str, ...]:
    """How else `split` is called."""
    return next((names for names in SPLITS.values() if split in names), (split,))


def _split_among(there: Iterable[str], split: str, source: Any) -> str:
    """How a data set calls `split`; ValueError where it has none."""
    found = next((name for name in names_of_split(split) if name in there), None)
    if found is None:
        raise ValueError(f"{source} has the splits {', '.join(there)}: there is no {split} among them")
    return found


def folder_of_split(folder: Path, split: str) -> Path:
    """The folder inside `folder` that is called as `split`, or `folder`."""
    return next((folder / name for name in names_of_split(split) if (folder / name).is_dir()), folder)


@functools.lru_cache(maxsize=4096)
def _files_of(folder: Path) -> dict[str, str]:
    """Videos and pictures of a folder by their names, and by those without suffix."""
    if not folder.is_dir():
        return {}
    media = [entry for entry in folder.iterdir() if entry.suffix.lower() in MEDIA_SUFFIXES]
    return {entry.stem: str(entry) for entry in media} | {entry.name: str(entry) for entry in media}


def located(name: Any, base: Path, *inside: str) -> str | None:
    """The file that a list calls `name`, with this suffix, another or none, in folders `inside` of `base` or in it;
    None where there is none."""
    suffix = Path(name).suffix if Path(name).suffix.lower() in MEDIA_SUFFIXES else ""
    for folder in (*inside, ""):
        whole = base / folder / name
        there = _files_of(whole.parent)
        if (found := there.get(whole.name) or there.get(whole.name.removesuffix(suffix))) is not None:
            return found
    return None


def _located(name: Any, base: Path) -> Any:
    if not isinstance(name, str) or is_address(name) or Path(name).is_absolute():
        return name
    whole = base / name
    if whole.suffix.lower() in MEDIA_SUFFIXES or whole.is_dir():  # not looked for: lists are long, disks are far
        return str(whole)
    return located(name, base) or str(whole)


def _from_text(path: Path, base: Path) -> list[ClipRow]:
    """A table with header, or lines of path and label between commas, tabs or blanks."""
    lines = [(number, line.strip()) for number, line in enumerate(text_lines(path), 1) if line.strip()]
    if not lines:
        return []
    first = lines[0][1]
    separator = next((mark for mark in (",", "\t", ";") if mark in first), " ")
    cells = [cell.strip().strip('"').lower() for cell in first.split(separator)]
    if {*cells} & {*_SOURCE, "youtube_id"} and {*cells} & {*_LABEL, *_START, *_LENGTH, "split"}:
        with open_text(path, newline="") as text:
            return [
                _from_record(
                    {str(k).strip().lower(): v for k, v in record.items()}, base, f"{path.name}, row {number}"
                )
                for number, record in enumerate(csv.DictReader(text, delimiter=separator), 1)
            ]
    refuse_unknown_header(path, cells, [line for _, line in lines[1:2]], separator, _SOURCE, _LABEL)
    rows = []
    for number, line in lines:
        parts = next(csv.reader([line], delimiter=separator))
        parts = [part.strip() for part in parts if part.strip()]
        if separator == " " and len(parts) > 2:  # a path with blanks in it
            path_words = len(parts) - (2 if _is_number(parts[-2]) and _is_number(parts[-1]) else 1)
            parts[:path_words] = [" ".join(parts[:path_words])]
        if len(parts) == 1:
            rows.append(ClipRow(_located(parts[0], base)))
        elif len(parts) == 2:
            rows.append(ClipRow(_located(parts[0], base), parts[1]))
        elif len(parts) == 3 and _is_number(parts[1]) and _is_number(parts[2]):
            source = _located(parts[0], base)
            if isinstance(source, str) and Path(source).is_dir():  # a folder of frames: path, how many, label
                rows.append(ClipRow(source, parts[2]))
            else:
                rows.append(ClipRow(source, parts[1], seconds=float(parts[2])))
        else:
            raise ValueError(
                f"{path.name}, line {number}: it must be path{separator}label (in a third place the seconds), "
                f"not {line[:80]!r}"
            )
    return rows


def refuse_unknown_header(
    path: Path, cells: list[str], following: Sequence[str], separator: str, sources: Sequence[str], said: Sequence[str]
) -> None:
    """ValueError where the first line's `cells` name no file, but the line `following` it does."""
    first = next((line.split(separator)[0].strip().strip('"') for line in following), "")
    if Path(first).suffix.lower() in MEDIA_SUFFIXES and not any(Path(cell).suffix or "/" in cell for cell in cells):
        raise ValueError(
            f"{path.name}, line 1 names no file: of a header one of {', '.join(sources)} is understood, with one of "
            f"{', '.join(said)}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_record(record: dict[str, Any], base: Path, where: str) -> ClipRow:
    """A row of a table or a JSON object with named fields."""

    def first(names: Iterable[str]) -> Any:
        return next((record[name] for name in names if record.get(name) not in (None, "")), None)

    source, label = first(_SOURCE), first(_LABEL)
    start, end = (seconds_of(first(names), names[0]) for names in (_START, _END))
    if source is None and record.get("youtube_id"):  # Kinetics' own lists, and the names that its crawlers give
        name = f"{record['youtube_id']}_{int(start or 0):06d}_{int(end or 0):06d}.mp4"
        kinds = [str(label), str(label).replace(" ", "_")]
        inside = [
            *kinds,
            *(f"{part}/{kind}" for part in names_of_split(str(record.get("split", ""))) for kind in (*kinds, "")),
        ]
        return ClipRow(located(name, base, *inside) or str(base / name), label)
    if source is None:
        raise ValueError(f"{where}: there is no field that names a file ({', '.join(_SOURCE)})")
    return ClipRow(_located(source, base), label, start, end, seconds_of(first(_LENGTH), "duration"))


def _from_json(path: Path, base: Path, split: str) -> list[ClipRow]:
    """Something-Something's list, COIN's data base, or objects with named fields."""
    if path.suffix.lower() == ".jsonl":
        import json

        found: Any = [json.loads(line) for line in text_lines(path) if line.strip()]
    else:
        found = read_json(path)
    if isinstance(found, dict) and isinstance(found.get("database"), dict):
        wanted = "training" if split in SPLITS["train"] else "testing"
        rows = []
        for name, entry in found["database"].items():
            if entry.get("subset") == wanted:
                place = located(f"{name}.mp4", base, str(entry.get("recipe_type", ""))) or str(base / f"{name}.mp4")
                rows.append(ClipRow(place, entry.get("class"), seconds=entry.get("duration")))
        return rows
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: it must hold a list of objects, or COIN's data base")
    if found and "template" in found[0]:
        names = {}
        for other in (path.parent / "labels.json", path.parent / "something-something-v2-labels.json"):
            if other.is_file():
                names = {name: int(number) for name, number in read_json(other).items()}
        rows = []
        for entry in found:
            said = re.sub(r"[\[\]]", "", str(entry["template"]))
            if names and said not in names:
                raise ValueError(f"{path.name}: {said!r} is no class of labels.json")
            name = f"{entry['id']}.webm"
            rows.append(ClipRow(located(name, base) or str(base / name), names.get(said, said)))
        return rows
    return [_from_record(entry, base, f"{path.name}[{number}]") for number, entry in enumerate(found)]


@dataclass(frozen=True)
class StoredMedia:
    """The video or picture in a place of a data set of `datasets`, which is read when it is opened."""

    data: Any
    place: int
    column: str
    base: Path | None = None

    def open(self) -> Any:
        """What `open_video` takes."""
        found = self.data[self.place][self.column]
        return found if self.base is None else _located(found, self.base)


def _from_dataset(data: Any, base: Path | None, name: str) -> Iterator[ClipRow]:
    import datasets

    media = next((column for column in (*_SOURCE, "webm", "mp4", "jpg") if column in data.column_names), None)
    label = next((column for column in (*_LABEL, "labels", "cls") if column in data.column_names), None)
    if media is None:
        raise ValueError(f"{name} has the columns {', '.join(data.column_names)}: none of them names a video or image")
    feature = data.features[media]
    if isinstance(feature, datasets.Image | datasets.Video):
        data = data.cast_column(media, type(feature)(decode=False))
    labels = [None] * len(data) if label is None else list(data[label])
    if label is not None and isinstance(data.features[label], datasets.ClassLabel):
        labels = [data.features[label].int2str(number) for number in labels]
    for place, found in enumerate(labels):
        yield ClipRow(StoredMedia(data, place, media, base), found)
