"""Files that a verb will write are looked at before minutes of computing rather than behind them."""

import os
from pathlib import Path


def check_out_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written; None is no file. Of a symbolic link, its target is meant.

    Raises:
        FileNotFoundError: its folder does not exist. ValueError: it is a folder. PermissionError: its folder, or the
            file itself, is not writable.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if os.path.exists(path) and not path.is_file():  # a device or a pipe
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{option} {path}: writing there is not permitted")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{option} {path}: there is no folder {str(path.parent)!r}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{option} {path}: writing there is not permitted")
