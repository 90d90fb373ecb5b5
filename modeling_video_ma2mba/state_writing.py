"""Writes files whole: what is read at a path is the old content or the new one, whatever happens meanwhile."""

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

_DESCRIPTOR = re.compile(r"/dev/(?:fd/)?(\d+|stdout|stderr)|/proc/self/fd/(\d+)")


def is_written_through(path: str | os.PathLike[str]) -> bool:
    """Whether a path is no file of its own that could be replaced, but a device, a pipe or an open stream."""
    if _DESCRIPTOR.fullmatch(os.path.abspath(path)):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the path of a draft to write, which takes the place of `path` when all has gone well.

    A symbolic link stays, its target is written. A file that is replaced keeps its permissions and its owner, a new
    one gets those that the process gives to new files. Devices, pipes and open streams (`/dev/stdout`) get the bytes.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    if is_written_through(path):
        with tempfile.TemporaryDirectory() as folder:
            draft = os.path.join(folder, "draft")
            yield draft
            with open(draft, "rb") as source, open_through(path) as stream:
                shutil.copyfileobj(source, stream)
        return
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    folder, name = os.path.split(target)
    name = os.fsdecode(os.fsencode(name)[:200])
    draft = os.path.join(folder, f"{name}.{os.getpid()}-{threading.get_ident() % 10**6}.part")
    try:
        with open(draft, "wb") as file:
            new = os.fstat(file.fileno())
        yield draft
        with suppress(FileNotFoundError):
            old = os.stat(target)
            if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid) and hasattr(os, "chown"):
                with suppress(PermissionError):
                    os.chown(draft, old.st_uid, old.st_gid)
            new = old
        os.chmod(draft, stat.S_IMODE(new.st_mode))
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        if error.filename == draft:
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            os.remove(draft)


def open_through(path: str | os.PathLike[str]) -> BinaryIO:
    """A device, a pipe or an open stream, to write bytes to at once."""
    match = _DESCRIPTOR.fullmatch(os.path.abspath(path))
    if match is None:
        return open(path, "wb", buffering=0)
    number = match[1] or match[2]
    return os.fdopen(os.dup({"stdout": 1, "stderr": 2}.get(number) or int(number)), "wb", buffering=0)


def give_usual_permissions(folder: str | os.PathLike[str]) -> None:
    """Let others read weights in a folder as they may read new files: safetensors gives them to their owner alone."""
    probe = os.path.join(folder, f".{os.getpid()}.part")
    with open(probe, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    os.remove(probe)
    for entry in os.scandir(folder):
        if entry.name.endswith(".safetensors") and entry.is_file(follow_symlinks=False):
            os.chmod(entry.path, mode)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, text as UTF-8 (half characters as `\\udxxx`), complete or not at all; see `whole_file`."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with whole_file(path) as draft, open(draft, "wb") as file:
        file.write(data)
