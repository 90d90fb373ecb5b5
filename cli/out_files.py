"""Files that a verb will write are looked at before minutes of computing rather than behind them."""

import os
from pathlib import Path


def check_out_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written; None is no file.

    Raises:
        FileNotFoundError: its folder does not exist. ValueError: it is a folder. PermissionError: its folder, or the
            file itself, is not writable.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{option} {path}: writing there is not permitted")
