"""Lists of videos or pictures with captions, in the forms in which retrieval's benchmarks come, as rows that name a
file and what is said of it. Nothing is decoded here."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...files.text_files import open_text, read_json, text_lines
from ...processing.frame_sampling import seconds_of
from ...processing.video_source_names import IMAGE_SUFFIXES, is_address
from .clip_rows import (
    LIST_SUFFIXES,
    MEDIA_SUFFIXES,
    SOURCE_FIELDS,
    SPLITS,
    ClipRow,
    ClipRows,
    StoredMedia,
    folder_of_split,
    located,
    read_source,
    refuse_unknown_header,
)

_CAPTION = ("caption", "captions", "sentence", "sentences", "text", "description", "name")
_START, _END = ("start", "time_start", "begin"), ("end", "time_end", "stop")
_LSMDC_TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d+-\d\d\.\d\d\.\d\d\.\d+$")
_DIDEMO_SECONDS = 30.0  # of a video are described


@dataclass(frozen=True)
class CaptionRow:
    """A video or picture (or part of one) and all that is said of it."""

    clip: ClipRow
    captions: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return self.clip.name

    @property
    def key(self) -> str:
        """What tells this video, or part of one, from others."""
        source = self.clip.source if isinstance(self.clip.source, str) else self.name
        return f"{source} {self.clip.start} {self.clip.end}"

    @property
    def is_picture(self) -> bool:
        """Whether it is one picture, told by the name; else a video."""
        return isinstance(self.clip.source, str) and Path(self.clip.source).suffix.lower() in IMAGE_SUFFIXES


def load_caption_rows(
    source: Any,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    paragraphs: bool = False,
) -> list[CaptionRow]:
    """Read a list with captions, told by its form; one row a video.

    Args:
        source: ActivityNet Captions' JSON (the sentences of a video are one paragraph), DiDeMo's (likewise; the first
            30 s count), MSRVTT's `MSRVTT_data.json` or its CSV with `video_id` (and `sentence`, or that JSON beside
            it), LSMDC's lines of six fields, MSVD's CSV, `AllVideoDescriptions.txt` or pickle (a list named after the
            split beside it, `test_list.txt`, chooses); COCO's captions; WebVid's CSV; a dictionary of captions by
            video; a table with `video` or `image` and `caption`, JSON objects with the same (a caption may be a
            list), or lines of `path,caption`; a folder with such a list, named after the split, or with a `.txt` of
            captions beside every video; a data set of `datasets`; or several of all these.
        base_dir: where the files are; by default the list's folder.
        split: train, val or test, where a form holds several.
        paragraphs: several captions of a row are one text.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: the form is not understood, or there is no row.
    """
    sources = source if isinstance(source, list | tuple) else [source]
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not valid: use one of {', '.join(SPLITS)}")
    base = None if base_dir is None else Path(base_dir)
    rows, empty = [], 0
    for one in sources:
        found = read_source(one, base, split, dataset=_from_dataset, file=_from_file, folder=_from_folder)
        for clip, said in found:
            captions = [caption for each in said if (caption := " ".join(str(each).split()))]
            empty += len(said) - len(captions)
            if captions:
                rows.append(CaptionRow(clip, (" ".join(captions),) if paragraphs else tuple(captions)))
    shown = ", ".join(str(one) for one in sources if isinstance(one, str | os.PathLike))
    if empty:
        warnings.warn(f"{shown}: {empty} captions are empty and left out", stacklevel=2)
    if not rows:
        raise ValueError(f"{shown or 'the data set'}: there is no video with a caption (of the split {split})")
    return rows


def as_clip_rows(rows: Sequence[CaptionRow]) -> ClipRows:
    """The same videos with their captions as label, for what knows labels."""
    return ClipRows([replace(row.clip, label=" / ".join(row.captions)) for row in rows])


Said = tuple[ClipRow, Sequence[Any]]


def _from_file(path: Path, base: Path, split: str) -> Iterable[Said]:
    if path.suffix.lower() in (".pkl", ".pickle"):
        return _of_split(_plain_pickle(path), path, base, split)
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise ValueError(f"{path}: a list of videos with captions must end in {', '.join(LIST_SUFFIXES)} or .pkl")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _from_json(path, base, split)
    return _from_text(path, base, split)


def _from_folder(folder: Path, split: str) -> Iterable[Said]:
    """Videos with a text beside each."""
    root = folder_of_split(folder, split)
    media = sorted(path for path in root.iterdir() if path.suffix.lower() in MEDIA_SUFFIXES)
    texts = [path.with_suffix(".txt") for path in media]
    found = [
        (ClipRow(str(one)), list(text_lines(text))) for one, text in zip(media, texts, strict=True) if text.is_file()
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds neither a list ({split}.json, {split}.csv, ...) nor videos with a .txt of captions "
            "beside each"
        )
    return found


def _located(name: Any, base: Path, *inside: str) -> Any:
    """The file that a list calls `name`, with or without suffix, in `base` or its folders `inside`."""
    if not isinstance(name, str) or is_address(name) or Path(name).is_absolute():
        return name
    whole = name if Path(name).suffix.lower() in MEDIA_SUFFIXES else f"{name}.mp4"
    return located(name, base, *inside) or str(base / whole)


def _grouped(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, caption in pairs:
        found.setdefault(name, []).append(caption)
    return found


def _of_split(captions: dict[str, list[Any]], path: Path, base: Path, split: str) -> Iterator[Said]:
    """Videos of a form that does not say to which split they belong: those that a list beside it names, or all."""
    for name in SPLITS[split]:
        if (chosen := path.with_name(f"{name}_list.txt")).is_file():
            wanted = {line.strip() for line in text_lines(chosen) if line.strip()}
            captions = {video: said for video, said in captions.items() if video in wanted}
            break
    for video, said in captions.items():
        yield ClipRow(_located(video, base)), said


# ------------------------------------------------------------------------------------------------ JSON
def _from_json(path: Path, base: Path, split: str) -> Iterable[Said]:
    if path.suffix.lower() == ".jsonl":
        found: Any = [json.loads(line) for line in text_lines(path) if line.strip()]
    else:
        found = read_json(path)
    if isinstance(found, dict) and {"videos", "sentences"} <= found.keys():
        return _msrvtt(found, base, split)
    if isinstance(found, dict) and {"images", "annotations"} <= found.keys():
        names = {entry["id"]: entry["file_name"] for entry in found["images"]}
        said = _grouped((names[entry["image_id"]], entry.get("caption", "")) for entry in found["annotations"])
        return [(ClipRow(_located(name, base)), captions) for name, captions in said.items()]
    if isinstance(found, dict) and found and all(isinstance(v, dict) and "sentences" in v for v in found.values()):
        return [
            (ClipRow(_located(name, base), seconds=entry.get("duration")), [" ".join(map(str, entry["sentences"]))])
            for name, entry in found.items()
        ]
    if isinstance(found, dict) and found and all(isinstance(said, str | list) for said in found.values()):
        captions = {video: said if isinstance(said, list) else [said] for video, said in found.items()}
        return _of_split(captions, path, base, split)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: it is none of the forms of captions that are known (see docs/retrieval.md)")
    if found and all("description" in entry and "video" in entry for entry in found) and "times" in found[0]:
        said = _grouped((entry["video"], entry["description"]) for entry in found)
        return [(ClipRow(_located(v, base), end=_DIDEMO_SECONDS), [" ".join(each)]) for v, each in said.items()]
    return _merged(_from_record(entry, base, f"{path.name}[{number}]") for number, entry in enumerate(found))


def _msrvtt(found: dict[str, Any], base: Path, split: str) -> Iterator[Said]:
    said = _grouped((entry["video_id"], entry["caption"]) for entry in found["sentences"])
    splits = {entry.get("split") for entry in found["videos"]}
    for entry in found["videos"]:
        if len(splits) == 1 or entry.get("split") in SPLITS[split]:
            yield ClipRow(_located(entry["video_id"], base)), said.get(entry["video_id"], [])


def _from_record(record: dict[str, Any], base: Path, where: str) -> Said:
    """A row of a table or a JSON object with named fields."""

    def first(names: Iterable[str]) -> Any:
        return next((record[name] for name in names if record.get(name) not in (None, "")), None)

    source, caption = first(SOURCE_FIELDS), first(_CAPTION)
    if caption is None and not {*record}.isdisjoint(_CAPTION):
        caption = ""  # counted with the empty ones
    if source is None or caption is None:
        lacks = "names a file" if source is None else "says a caption"
        names = SOURCE_FIELDS if source is None else _CAPTION
        raise ValueError(f"{where}: there is no field that {lacks} ({', '.join(names)})")
    start, end = (seconds_of(first(names), names[0]) for names in (_START, _END))
    folders = [str(record[name]) for name in ("page_dir",) if record.get(name)]
    located = _located(source, base, *folders)
    return ClipRow(located, start=start, end=end), caption if isinstance(caption, list) else [caption]


def _merged(rows: Iterable[Said]) -> list[Said]:
    """Rows about the same part of the same video as one."""
    found: dict[Any, tuple[ClipRow, list[Any]]] = {}
    for clip, captions in rows:
        found.setdefault((str(clip.source), clip.start, clip.end), (clip, []))[1].extend(captions)
    return list(found.values())


# ------------------------------------------------------------------------------------------------ text
def _from_text(path: Path, base: Path, split: str) -> Iterable[Said]:
    lines = [(number, line) for number, line in enumerate(text_lines(path), 1) if line.strip()]
    if not lines:
        return []
    first = lines[0][1]
    separator = next((mark for mark in ("\t", ",", ";") if mark in first), "")
    cells = [cell.strip().strip('"').lower() for cell in first.split(separator or ",")]
    if {"videoid", "start", "end", "description"} <= {*cells}:
        return _msvd_table(path, base, separator, split)
    if {*cells} & {*SOURCE_FIELDS} and ({*cells} & {*_CAPTION} or cells == ["video_id"]):
        return _table(path, base, separator or ",", cells, split)
    if separator == "\t" and first.count("\t") == 5:
        return _lsmdc(lines, base, path)
    if first.startswith("#") or not separator or re.match(r"^[\w-]{11}_\d+_\d+ ", first):  # MSVD: name, blank, text
        said = _grouped(tuple(line.strip().split(" ", 1)) for _, line in lines if " " in line and line[0] != "#")  # type: ignore[misc]
        return _of_split(said, path, base, split)
    refuse_unknown_header(path, cells, [line for _, line in lines[1:2]], separator, SOURCE_FIELDS, _CAPTION)
    rows = []
    for number, line in lines:
        name, mark, caption = line.strip().partition(separator)
        if not mark:
            raise ValueError(
                f"{path.name}, line {number}: it must be path{separator}caption, not {line.strip()[:80]!r}"
            )
        if name.startswith('"') or caption.lstrip().startswith('"'):
            name, *parts = next(csv.reader([line.strip()], delimiter=separator, skipinitialspace=True))
            caption = separator.join(parts)
        rows.append((ClipRow(_located(name.strip(), base)), [caption]))
    return _merged(rows)


def _records(path: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path, newline="") as text:
        for number, record in enumerate(csv.DictReader(text, delimiter=separator), 1):
            yield f"{path.name}, row {number}", {str(k).strip().lower(): v for k, v in record.items()}


def _table(path: Path, base: Path, separator: str, cells: list[str], split: str) -> Iterable[Said]:
    if not {*cells} & {*_CAPTION}:  # MSRVTT's list of 9,000 training videos: what is said of them stands beside it
        whole = next((each for each in sorted(path.parent.glob("*.json")) if "msrvtt" in each.name.lower()), None)
        if whole is None:
            raise ValueError(f"{path} has no captions: put MSRVTT_data.json beside it")
        said = _grouped((entry["video_id"], entry["caption"]) for entry in read_json(whole)["sentences"])
        names = [record["video_id"] for _, record in _records(path, separator)]
        return [(ClipRow(_located(name, base)), said.get(name, [])) for name in names]
    return _merged(_from_record(record, base, where) for where, record in _records(path, separator))


def _msvd_table(path: Path, base: Path, separator: str, split: str) -> Iterable[Said]:
    """Microsoft's corpus of video descriptions; of its languages English."""
    said = _grouped(
        (f"{record['videoid']}_{record['start']}_{record['end']}", record["description"])
        for _, record in _records(path, separator)
        if record.get("language", "English") == "English"
    )
    return _of_split(said, path, base, split)


def _lsmdc(lines: list[tuple[int, str]], base: Path, path: Path) -> list[Said]:
    rows = []
    for number, line in lines:
        parts = line.rstrip("\n").split("\t")
        if len(parts) != 6:
            raise ValueError(
                f"{path.name}, line {number}: LSMDC's lines have six fields between tabs, not {len(parts)}"
            )
        rows.append((ClipRow(_located(parts[0], base, _LSMDC_TIMES.sub("", parts[0]))), [parts[5]]))
    return _merged(rows)


class _NoObjects(pickle.Unpickler):
    """Reads plain values only: a pickle could run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


def _plain_pickle(path: Path) -> dict[str, list[Any]]:
    """MSVD's captions: a dictionary of videos with lists of captions, each a text or a list of words."""
    try:
        with open(path, "rb") as file:
            found = _NoObjects(file, encoding="utf-8", errors="replace").load()
        return {
            str(name): [" ".join(map(str, each)) if isinstance(each, list | tuple) else each for each in captions]
            for name, captions in found.items()
        }
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not a pickle of plain captions by video ({error}): convert it to JSON") from None


def _from_dataset(data: Any, base: Path | None, name: str) -> Iterator[Said]:
    import datasets

    media = next((column for column in (*SOURCE_FIELDS, "mp4", "jpg") if column in data.column_names), None)
    caption = next((column for column in _CAPTION if column in data.column_names), None)
    if media is None or caption is None:
        lacks = "names a video or image" if media is None else "says a caption"
        raise ValueError(f"{name} has the columns {', '.join(data.column_names)}: none of them {lacks}")
    feature = data.features[media]
    if isinstance(feature, datasets.Image | datasets.Video):
        data = data.cast_column(media, type(feature)(decode=False))
    for place, said in enumerate(data[caption]):
        yield ClipRow(StoredMedia(data, place, media, base)), said if isinstance(said, list) else [said]
