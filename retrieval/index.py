"""The index of a collection of videos: one safetensors file with a vector and the tokens of each, and which file they
are of.

It is read once and searched many times; what has changed since is noticed by size and time of the files. While it is
made, every video that was read lies in a file of its own beside it, so that a killed process goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conversion.tensor_store import TensorSpec, write_file
from ..modeling_video_ma2mba.state_writing import whole_file

_FORMAT = "video-ma2mba retrieval index 1"
_AHEAD = 4  # videos that are decoded while one is encoded
_VECTORS, _TOKENS = "vectors", "tokens.{}"


@dataclass(frozen=True)
class Clip:
    """A video, or a part of one in seconds, and what tells its file from what stood there before: bytes, and the time
    of the last change in nanoseconds."""

    file: str
    start: float | None = None
    end: float | None = None
    size: int = 0
    changed: int = 0

    @classmethod
    def of(cls, file: str | os.PathLike[str], start: float | None = None, end: float | None = None) -> Clip:
        """A file, or a folder of pictures, as it is now. OSError: it is not there."""
        path = os.path.abspath(os.fspath(file))
        found = os.stat(path)
        return cls(path, start, end, found.st_size, found.st_mtime_ns)

    @property
    def part(self) -> str:
        """For messages: the file, and from where."""
        return self.file + (f" from {self.start:g} s" if self.start else "")


class Maker(NamedTuple):
    """What makes an index: a text that tells model and clips from others, the widths of vectors and of tokens."""

    name: str
    vector: int
    token: int


class VideoIndex:
    """An index that is open; its tokens stay on the disk until they are asked for.

    Attributes:
        clips: what is in it. vectors: fp32 (clips, D).

    Raises:
        FileNotFoundError: there is none. ValueError: the file is no index, is damaged, or of another model.
    """

    def __init__(self, path: str | os.PathLike[str], maker: Maker) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: there is no such index")
        try:
            self._file = safe_open(str(self.path), framework="pt")
            facts = self._file.metadata() or {}
            if facts.get("kind") != _FORMAT:
                raise _Unusable("it is no index of video-ma2mba retrieve")
            self.clips = _clips(facts.get("clips", ""))
            _check_tensors(self._file, len(self.clips), maker)
            if facts.get("model") != maker.name:
                raise _Unusable("it was made with another model, or another number or size of frames")
            self.vectors = self._file.get_tensor(_VECTORS).float()
            if not bool(self.vectors.isfinite().all()):
                raise _Unusable("it holds vectors that are no numbers")
        except (SafetensorError, _Unusable, OSError) as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:200]
        return ValueError(f"{self.path} cannot be used: {reason}. Delete it, or name another with --index")

    def __len__(self) -> int:
        return len(self.clips)

    def tokens(self, number: int) -> Tensor:
        """Tokens fp16 (patches, C) of a clip. ValueError: they are damaged."""
        found = self._file.get_tensor(_TOKENS.format(number))
        if not bool(found.isfinite().all()):
            raise self._refused(_Unusable("it holds tokens that are no numbers"))
        return found


class _Unusable(Exception):
    """Why a file is no index."""


def _clips(text: str) -> list[Clip]:
    try:
        found = [Clip(**entry) for entry in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        raise _Unusable("its list of videos is damaged") from None
    for clip in found:
        times = (clip.start, clip.end)
        plain = isinstance(clip.file, str) and all(isinstance(n, int) for n in (clip.size, clip.changed))
        if not plain or not all(each is None or isinstance(each, int | float) for each in times):
            raise _Unusable("its list of videos is damaged")
    return found


def _check_tensors(file: Any, count: int, maker: Maker) -> None:
    """See that there is a vector and tokens for each of `count` clips, all of one size, as wide as by `maker`."""
    wanted = {_VECTORS, *(_TOKENS.format(number) for number in range(count))}
    if set(file.keys()) != wanted:
        raise _Unusable(f"it lists {count} videos, but does not hold a vector and tokens of each")
    sizes = {
        (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in wanted - {_VECTORS}
    }
    vectors = file.get_slice(_VECTORS)
    plain = vectors.get_dtype() == "F32" and vectors.get_shape() == [count, maker.vector]
    fitting = all(len(shape) == 2 and shape[1] == maker.token and dtype == "F16" for shape, dtype in sizes)
    if len(sizes) > 1 or not plain or not fitting:
        raise _Unusable("its tensors have other types or shapes than an index has")


@dataclass
class Update:
    """What `update_index` found: the index, which clips were read, taken over, left out since they are no longer
    wanted, and which could not be read, with why."""

    index: VideoIndex
    read: int
    kept: int
    gone: int
    failed: list[tuple[Clip, Exception]]


def update_index(
    path: str | os.PathLike[str],
    maker: Maker,
    clips: Sequence[Clip],
    *,
    decode: Callable[[Clip], Tensor],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    tell: Callable[..., None] = lambda *args, **kwargs: None,
) -> Update:
    """Bring an index up to date, or make it.

    Args:
        path: of the index. A folder `path` with `.parts` added holds what was read until all of it is there.
        maker: the model and the clips that it takes.
        clips: what shall be in it. Those that it holds already, of unchanged files, are not read again.
        decode: pixels uint8 (frames, 3, H, W) of a clip; what it raises is kept for the report.
        encode: vectors (B, D) and tokens (B, patches, C) of pixels (B, frames, 3, H, W).
        tell: is told how many clips are read of those that had to be, and how many failed.

    Raises:
        ValueError: the index that is there is damaged or of another model; or no clip could be read. OSError: it
            cannot be written.
    """
    path = Path(path)
    parts = path.with_name(f"{path.name}.parts")
    before = VideoIndex(path, maker) if path.is_file() else None
    known = {clip: number for number, clip in enumerate(before.clips)} if before is not None else {}
    wanted = list(dict.fromkeys(clips))
    new = [clip for clip in wanted if clip not in known]
    gone = len(known.keys() - set(wanted))
    if before is not None and not new and not gone and not parts.is_dir():
        return Update(before, 0, len(wanted), 0, [])
    files = {clip: parts / f"{_name(clip, maker.name)}.safetensors" for clip in new}
    missing = [clip for clip in new if _part(files[clip], _VECTORS) is None]
    failed: list[tuple[Clip, Exception]] = []
    if missing:
        parts.mkdir(exist_ok=True)
    done = len(new) - len(missing)
    for clip, pixels in _decoded(missing, decode):
        done += 1
        if isinstance(pixels, Exception):
            failed.append((clip, pixels))
        else:
            vectors, tokens = encode(pixels[None])
            with whole_file(files[clip]) as draft:
                save_file({_VECTORS: vectors[0].contiguous(), "tokens": tokens[0].contiguous()}, draft)
        tell(done, len(new), f"{len(failed)} failed" if failed else "")
    lost = {clip for clip, _ in failed}
    found = [clip for clip in wanted if clip not in lost]
    if not found and failed:
        raise failed[0][1]
    if not found:
        raise ValueError("there is no video to search among")
    kept, read = len(wanted) - len(new), len(new) - len(failed)

    def stored(clip: Clip, vector: bool) -> Tensor:
        if before is not None and clip in known:
            return before.vectors[known[clip]] if vector else before.tokens(known[clip])
        part = _part(files[clip], _VECTORS if vector else "tokens")
        if part is None:
            raise ValueError(f"{files[clip]} was deleted or damaged meanwhile: run the same command again")
        return part

    if before is None or read or gone:
        _write(path, maker.name, found, stored)
        before = VideoIndex(path, maker)
    shutil.rmtree(parts, ignore_errors=True)
    return Update(before, read, kept, gone, failed)


def _name(clip: Clip, identity: str) -> str:
    text = json.dumps([identity, asdict(clip)])
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _part(file: Path, name: str) -> Tensor | None:
    """A tensor of one clip; None where it was not read, or the file is damaged."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError):
        return None


def _decoded(clips: Sequence[Clip], decode: Callable[[Clip], Tensor]) -> Iterator[tuple[Clip, Tensor | Exception]]:
    """Clips with their pixels, or with why they cannot be read; the next ones are decoded meanwhile."""
    waiting: deque[tuple[Clip, Future[Tensor]]] = deque()
    rest = iter(clips)
    with ThreadPoolExecutor(min(_AHEAD, os.cpu_count() or 1)) as pool:
        try:
            while True:
                while len(waiting) <= _AHEAD and (clip := next(rest, None)) is not None:
                    waiting.append((clip, pool.submit(decode, clip)))
                if not waiting:
                    return
                clip, future = waiting.popleft()
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield clip, future.result() if error is None else error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write(path: Path, identity: str, clips: Sequence[Clip], stored: Callable[[Clip, bool], Tensor]) -> None:
    """Write an index, the tokens of one clip in memory at a time."""
    vectors = torch.stack([stored(clip, True).float() for clip in clips])
    shape = tuple(stored(clips[0], False).shape)
    numbers = {_TOKENS.format(number): clip for number, clip in enumerate(clips)}
    specs = {_VECTORS: TensorSpec("F32", tuple(vectors.shape))} | dict.fromkeys(numbers, TensorSpec("F16", shape))

    def read(key: str) -> Tensor:
        return vectors if key == _VECTORS else stored(numbers[key], False)

    facts = {"kind": _FORMAT, "model": identity, "clips": json.dumps([asdict(clip) for clip in clips])}
    with whole_file(path) as draft:
        write_file(Path(draft), list(specs), specs, read, facts)
