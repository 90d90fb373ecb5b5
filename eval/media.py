"""What a question is asked about: videos, pictures and folders of pictures, and by what each is known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.video_source_names import list_directory

_SUBTITLE_FOLDERS = ("subtitle", "subtitles")
_SUBTITLE_ENDS = (".srt", ".vtt", ".jsonl", "_en.json", ".json")


@dataclass(frozen=True)
class Medium:
    """One thing to look at before a question.

    `source` is a path (video, picture, folder of pictures), an address, or a tuple of PIL images, which are the frames
    of one video. `start`, `end` (seconds) choose a part of a video.
    """

    source: Any
    start: float | None = None
    end: float | None = None

    @property
    def in_memory(self) -> bool:
        """Whether `source` is a tuple of pictures rather than a path or an address."""
        return not isinstance(self.source, str)

    @property
    def label(self) -> str:
        """Cheap to compute, the same for the same file: by this requests are put in order."""
        if self.in_memory:
            return f"pictures:{self.digest()}"
        return f"{os.path.abspath(self.source)}:{self.start}:{self.end}"

    @property
    def name(self) -> str:
        """For people: the last parts of the path."""
        return f"{len(self.source)} pictures" if self.in_memory else "/".join(Path(self.source).parts[-2:])

    def weight(self) -> int:
        """Roughly how long reading takes: bytes of a file or folder, pixels of pictures in memory."""
        if self.in_memory:
            return sum(picture.width * picture.height for picture in self.source)
        path = Path(self.source)
        if path.is_dir():
            return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
        return path.stat().st_size if path.is_file() else 0

    def digest(self) -> str:
        """SHA-256 of what is shown, wherever it lies and whatever it is called; of the name for an address."""
        digest = hashlib.sha256(f"{self.start}:{self.end}:".encode())
        if self.in_memory:
            for picture in self.source:
                digest.update(f"{picture.mode}{picture.size}".encode() + picture.tobytes())
        elif os.path.isdir(self.source):
            for file in list_directory(Path(self.source)):
                digest.update(file_digest(str(file)).encode())
        elif os.path.isfile(self.source):
            digest.update(file_digest(self.source).encode())
        else:
            digest.update(str(self.source).encode())
        return digest.hexdigest()


def media_of(visuals: Iterable[Any]) -> tuple[Medium, ...]:
    """Visuals as lmms-eval's tasks give them: each path is a medium, pictures that follow one another are one video.

    Raises:
        TypeError: a visual is of a kind that this model does not read.
    """
    media: list[Medium] = []
    pictures: list[Image.Image] = []

    def close() -> None:
        if pictures:
            media.append(Medium(tuple(pictures)))
            pictures.clear()

    for visual in visuals:
        if isinstance(visual, Image.Image):
            pictures.append(visual)
            continue
        close()
        if not isinstance(visual, str | os.PathLike):
            raise TypeError(f"a question comes with a {type(visual).__name__}; videos, folders and pictures are read")
        media.append(Medium(os.fspath(visual)))
    close()
    return tuple(media)


def subtitles_of(medium: Medium) -> str | None:
    """A video's file of subtitles: beside it, or in a folder `subtitle(s)` beside it or beside its folder."""
    if medium.in_memory or not os.path.isfile(medium.source):
        return None
    path = Path(medium.source)
    folders = [path.parent, *(base / name for base in (path.parent, path.parent.parent) for name in _SUBTITLE_FOLDERS)]
    named = (folder / f"{path.stem}{end}" for folder in folders for end in _SUBTITLE_ENDS)
    return next((str(file) for file in named if file.is_file()), None)


def subtitles_digest(medium: Medium) -> str | None:
    """SHA-256 of a video's file of subtitles, if there is one."""
    file = subtitles_of(medium)
    return None if file is None else file_digest(file)


def frames_of_folder(folder: str, folder_fps: float, fps: float | None) -> list[str]:
    """Pictures of a folder that holds `folder_fps` a second, as looked at `fps` times a second (None: all)."""
    files = [str(file) for file in list_directory(Path(folder))]
    if fps is None or fps >= folder_fps:
        return files
    step, count = folder_fps / fps, len(files)
    return [files[int(place * step)] for place in range(count) if int(place * step) < count]


def file_digest(path: str) -> str:
    """SHA-256 of a file; looked at again only when its size or its time changed."""
    facts = os.stat(path)
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slowly(file)


def _slowly(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
