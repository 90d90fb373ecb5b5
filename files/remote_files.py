"""Files at addresses that fsspec knows (s3://, gs://, memory://, ...): a log that survives, states, copies to read.

Object stores write a file whole or not at all and cannot add to one. So a log is a folder of parts, each written once,
until it is complete; then it becomes one file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .text_files import json_line, parse_json

UPLOAD_SECONDS = 20.0
"""Records of a log wait no longer than this before they are written; a crash costs no more than them."""
_UPLOAD_BYTES = 2**22


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether this is an address for fsspec: of any kind but `file:`, http and https."""
    scheme, colon, _ = os.fspath(path).partition("://")
    return bool(colon) and scheme.lower() not in ("file", "http", "https")


@contextmanager
def _named_errors(address: str) -> Iterator[None]:
    """Libraries of object stores raise errors of their own; here they are OSError with the address."""
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{address}: {type(error).__name__}: {error}") from error


def _opened(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    with _named_errors(address):
        return url_to_fs(address)


def exists(address: str) -> bool:
    """Whether there is such a file."""
    system, path = _opened(address)
    with _named_errors(address):
        return bool(system.exists(path))


def read_bytes(address: str) -> bytes:
    """What is in a file. FileNotFoundError: there is none. OSError: it cannot be read."""
    system, path = _opened(address)
    with _named_errors(address):
        return system.cat_file(path)


def write_bytes(address: str, data: bytes) -> None:
    """Write a file whole. OSError: it cannot be written."""
    system, path = _opened(address)
    with _named_errors(address):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)


def put_file(source: Path, address: str) -> None:
    """Copy a file of this machine there: whole, under its name only once it is complete."""
    system, path = _opened(address)
    with _named_errors(address):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        unfinished = f"{path}.{uuid.uuid4().hex}.part"
        system.put_file(os.fspath(source), unfinished)
        system.mv(unfinished, path)


@contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """A copy on this machine under the file's own name, for as long as the context lasts."""
    system, path = _opened(address)
    folder = tempfile.mkdtemp(prefix="video-copy-")
    try:
        copy = Path(folder) / path.rpartition("/")[2]
        with _named_errors(address):
            system.get_file(path, os.fspath(copy))
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def version_of(address: str) -> str:
    """What tells, without reading it, whether a file has changed: checksum or size and time, as the store says."""
    system, path = _opened(address)
    with _named_errors(address):
        return str(system.ukey(path))


class RemoteLog:
    """A log at an address, with the methods of `AppendLog`: begun where it does not exist, continued where it does.

    Records are in parts in `ADDRESS.parts/` until `complete` puts them into ADDRESS itself.
    """

    def __init__(self, address: str):
        self.address = address
        self._folder = f"{address}.parts"
        self._waiting = bytearray()
        self._last = time.monotonic()
        with suppress(FileNotFoundError):
            _opened(address)[0].invalidate_cache()

    def read(self) -> Iterator[tuple[bytes, Any]]:
        """Lines and what they say; a last line that was torn is passed over."""
        places = ([self.address] if exists(self.address) else []) + self._parts()
        for place in places:
            for number, line in enumerate(read_bytes(place).splitlines(keepends=True), 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield line, parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{place}, line {number}: no JSON ({error})") from None

    def add(self, *records: Any) -> None:
        """Add records; they are written within `UPLOAD_SECONDS`, or with the next one after that."""
        self._waiting += b"".join(map(json_line, records))
        if len(self._waiting) > _UPLOAD_BYTES or time.monotonic() - self._last > UPLOAD_SECONDS:
            self.upload()

    def flush(self) -> None:
        """Write what has waited long enough."""
        if time.monotonic() - self._last > UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        """Write what waits, as a part of its own."""
        if self._waiting:
            write_bytes(f"{self._folder}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl", bytes(self._waiting))
            self._waiting.clear()
        self._last = time.monotonic()

    def close(self) -> None:
        """Write what waits."""
        self.upload()

    def cut_torn_line(self) -> bool:
        """Parts are written whole: there is none."""
        return False

    def replace(self, records: list[Any]) -> None:
        """Have the log hold these records instead; lines of `read` (bytes) stay as they are."""
        parts = self._parts()
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            with whole.open("wb") as file:
                file.writelines(record if isinstance(record, bytes) else json_line(record) for record in records)
            put_file(whole, self.address)
        system, _ = _opened(self.address)
        with _named_errors(self._folder):
            for part in parts:
                system.rm(_opened(part)[1])

    def complete(self) -> None:
        """Make one file of it: nothing more is to come."""
        self.upload()
        if self._parts():
            self.replace([line for line, _ in self.read()])

    def _parts(self) -> list[str]:
        system, path = _opened(self._folder)
        with _named_errors(self._folder):
            if not system.exists(path):
                return []
            return sorted(system.unstrip_protocol(name) for name in system.ls(path, detail=False))
