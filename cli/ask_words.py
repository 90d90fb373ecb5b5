"""Which words of `ask` are videos and which are questions, and which files a folder stands for."""

import difflib
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .terminal import given_text

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg"}
    | {".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm"}
    | {".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""Names of files in a folder that are taken for videos; named by itself, any file may be one."""
STDIN = "-"
_FILE_LIKE = re.compile(
    r"\S*\w\.(?=\d*[a-z])[a-z0-9]{2,5}"  # one word that ends as names of files do
    r"|\S*\w/\S*\w|\S*\\\S+|[~.]*/\S*"  # or a path
    rf"|.*\.(?:{'|'.join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES))})",  # or the name of a video, with spaces
    re.IGNORECASE | re.DOTALL,
)


def split_words(words: list[str], behind: list[str] | None) -> tuple[list[str], list[str]]:
    """Videos and questions.

    Args:
        words: in the order given. The first is a video; so are those after it that exist, are addresses or `-`, up to
            the first that is none of these, which is a question as are all after it.
        behind: words behind `--`: questions, whatever they look like, and then all of `words` are videos.

    Returns:
        videos (patterns and folders of videos replaced by the files in them) and questions.

    Raises:
        ValueError: a question that is a file, or looks like the name of one that is not there; an empty question; one
            video given twice. FileNotFoundError: the first video is not there.
    """
    if behind is not None:
        if not words:
            raise ValueError("name a video in front of --; what stands behind it are questions")
        places, questions = words, behind
    else:
        count = 1
        while count < len(words) and _is_place(words[count]):
            count += 1
        places, questions = words[:count], words[count:]
        for word in questions:
            if _is_place(word) and word != STDIN:
                raise ValueError(
                    f"{word!r} is a file and stands behind a question ({questions[0]!r}): put videos first, and "
                    "questions that are also names of files behind --"
                )
            if _FILE_LIKE.fullmatch(word.strip()):
                raise FileNotFoundError(f"{word}: no such file{_alike(word)}; a question of this form goes behind --")
    questions = [given_text(question) for question in questions]
    if not all(questions):
        raise ValueError("a question is empty: ask something about the video")
    videos = [video for place in places for video in _videos_of(place)]
    twice = {video for video in videos if videos.count(video) > 1}
    if twice:
        raise ValueError(f"{min(twice)} is named twice")
    return videos, questions


def _is_place(word: str) -> bool:
    from video_ma2mba.processing.video_source_names import is_address, local_path

    if word == STDIN or (is_address(word) and not re.search(r"\s", word)):
        return True
    try:
        return bool(word) and (os.path.lexists(local_path(word)) or _is_pattern(word))
    except ValueError:  # no name that a file can have
        return False


def _is_pattern(word: str) -> bool:
    """Whether a word names existing files by `*`, `?` or `[...]`, which not every shell puts in their place."""
    return glob.has_magic(word) and bool(glob.glob(word))


def _videos_of(place: str) -> list[str]:
    """The videos that a word stands for: itself, or those of a folder (with the folders in it), in order of names."""
    from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file
    from video_ma2mba.processing.video_source_names import is_address, local_path

    if place == STDIN or is_address(place):
        return [place]
    path = local_path(place)
    if not os.path.lexists(path):
        if _is_pattern(place):
            return [video for name in sorted(glob.glob(place)) for video in _videos_of(name)]
        raise FileNotFoundError(f"{place}: no such file{_alike(place)}")
    if not path.is_dir():
        return [place]
    files = sorted(file for file in _files_below(path) if not _hidden(file.relative_to(path)))
    found = [str(file) for file in files if file.suffix.lower() in VIDEO_SUFFIXES or is_state_file(file)]
    return found or [place]  # a folder of pictures is one video


def _files_below(path: Path) -> Iterator[Path]:
    """All files of a folder, also those of folders that links lead to, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(place)
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _alike(word: str) -> str:
    """A file beside that may have been meant."""
    path = Path(word)
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" (is {str(path.parent / near[0])!r} meant?)" if near else ""


@contextmanager
def standard_input() -> Iterator[str]:
    """Standard input as a file, for as long as the context lasts: a video is read more than once.

    Raises:
        ValueError: it is a terminal, or empty.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("-: standard input is a terminal: pipe a video into it, or name a file")
    with tempfile.TemporaryDirectory(prefix="video-input-") as folder:
        path = Path(folder) / "standard input"
        with path.open("wb") as file:
            while block := sys.stdin.buffer.read(2**20):
                file.write(block)
        if not path.stat().st_size:
            raise ValueError("-: standard input is empty")
        yield str(path)
