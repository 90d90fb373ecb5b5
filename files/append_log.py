"""The one log: JSON, one value a line, added whole or not at all. What a crash tore off is cut away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .text_files import json_line, parse_json

_BLOCK = 1 << 16
_LOCKED = 0x7FFFFFF0  # the byte that is locked on Windows, whose C library takes 31 bits for its place


def write_lines(file: BinaryIO, data: bytes) -> None:
    """Write all of it; it survives the end of the process."""
    while data:
        data = data[os.write(file.fileno(), data) :]


def write_durably(file: BinaryIO, data: bytes) -> None:
    """Write all of it; it survives a power failure."""
    write_lines(file, data)
    os.fsync(file.fileno())


class AppendLog:
    """A file to which records are added, by several processes at once if need be.

    Args:
        path: begun where it does not exist. A device or a pipe takes records, too.
        write: how lines are written; `write_durably` for what took long to find out.
        alone: keep the file, and refuse it where another has it so.

    Raises:
        ValueError: `alone`, and another process has the file. OSError: it cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        write: Callable[[BinaryIO, bytes], None] = write_lines,
        alone: bool = False,
    ):
        # Where it is needed: its folder imports transformers, which no command should wait for.
        from ..modeling_video_ma2mba.state_writing import is_written_through

        self.path = Path(path)
        self._write = write
        self._through = is_written_through(path)
        self._file: BinaryIO | None = self._opened(wait=False) if alone else None

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, *records: Any) -> None:
        """Add records, all of them or none.

        Raises:
            OSError: they cannot be written, for instance because the disk is full; the file is as it was.
        """
        file = self._file or self._opened(wait=True)
        try:
            if not self._through:
                _cut_torn_line(file)
            end = os.fstat(file.fileno()).st_size
            try:
                self._write(file, b"".join(map(json_line, records)))
            except OSError:
                if not self._through:
                    os.ftruncate(file.fileno(), end)
                raise
        finally:
            if file is not self._file:
                file.close()

    def flush(self) -> None:
        """Make sure that what was added survives a power failure."""
        if self._file is not None and not self._through:
            os.fsync(self._file.fileno())

    def cut_torn_line(self) -> bool:
        """Cut off an unfinished last line now rather than with the next record; whether there was one."""
        file = self._file or self._opened(wait=True)
        try:
            return not self._through and _cut_torn_line(file)
        finally:
            if file is not self._file:
                file.close()

    def replace(self, records: list[Any]) -> None:
        """Have the file hold these records instead; lines of `read_log` (bytes) stay as they are."""
        from ..modeling_video_ma2mba.state_writing import write_whole

        alone = self._file is not None
        lines = (record if isinstance(record, bytes) else json_line(record) for record in records)
        content = b"".join(lines)
        if os.name == "nt":  # no file is replaced there while it is open
            self.close()
        write_whole(self.path, content)
        self.close()
        self._file = self._opened(wait=False) if alone else None

    def _opened(self, wait: bool) -> BinaryIO:
        """The file, locked."""
        if self._through:
            from ..modeling_video_ma2mba.state_writing import open_through

            return open_through(self.path)
        file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (kept, or closed by whoever asked)
        try:
            _lock(file, self.path, wait)
        except BaseException:
            file.close()
            raise
        return file


def read_log(path: str | os.PathLike[str], skip_damaged: bool = False) -> Iterator[tuple[bytes, Any]]:
    """Whole lines of a log, with their ends, and what they say; a last line that was torn is passed over.

    Args:
        skip_damaged: pass over every line that is no JSON.

    Raises:
        ValueError: a line is no JSON. OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_json(line)
            except ValueError as error:
                if skip_damaged:
                    continue
                raise ValueError(f"{os.fspath(path)}, line {number}: no JSON ({error})") from None
            yield line, record


def _cut_torn_line(file: BinaryIO) -> bool:
    """Cut off what stands behind the last line break; whether there was something."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file.fileno(), end)
    return end < size


def _lock(file: BinaryIO, path: Path, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:
        _lock_on_windows(file, path, wait)
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another run: wait for it, or name another file") from error
    except OSError:  # file systems without locks
        return


def _lock_on_windows(file: BinaryIO, path: Path, wait: bool) -> None:
    """The same with Windows' locks, which are mandatory: of one byte far behind the end, so that all may read."""
    import msvcrt

    file.seek(_LOCKED)
    try:
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return
            except PermissionError as error:
                if not wait:
                    message = f"{path} is being written by another run: wait for it, or name another file"
                    raise ValueError(message) from error
                time.sleep(0.05)
    finally:
        file.seek(0, os.SEEK_END)
