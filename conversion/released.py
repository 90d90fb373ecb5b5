"""Checkpoints in the layout of the released ones, converted into the cache when they are first named as a model.

`usable_folder` is what every command and trainer puts between the name of a model and loading it.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, tqdm

from .report import RECORD

MODEL_TYPE = "llava_mamba"
_TEXT_FILES = ("*.json", "*.txt", "tokenizer*")


def usable_folder(source: str, revision: str | None = None) -> str:
    """What to load for a directory or Hub id: itself, or where a checkpoint in the released layout was converted to.

    Says on standard error how much is fetched and converted, and where to; both resume or start over where an earlier
    run was cut off, and processes that want the same conversion wait for one another. A source that changed since is
    converted again.

    Raises:
        OSError: it cannot be fetched, read or written. ValueError: its tensors do not make up a whole model.
    """
    path = Path(source).expanduser()
    is_folder = path.is_dir()
    if is_folder:
        config_file = path / "config.json"
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        return source  # neither: whoever loads it has the words for that
    else:
        try:
            config_file = Path(hf_hub_download(source, "config.json", revision=revision))
        except (OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return source  # an adapter, say
            raise OSError(_without_network(source, "config.json", error)) from error
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return source
    if not isinstance(fields, dict) or fields.get("model_type") != MODEL_TYPE:
        return source
    folder = path if is_folder else _fetch(source, revision)
    return str(_convert_once(source, folder))


def _without_network(source: str, file: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{source} cannot be loaded: {file} cannot be fetched from the Hub ({reason}). Check the name, and log in "
        "with `hf auth login` if access must be granted; without a network, run "
        f"`hf download {source} --local-dir FOLDER` where there is one, and name FOLDER"
    )


def _fetch(source: str, revision: str | None) -> Path:
    """Folder of a checkpoint on the Hub, pickles only where there is nothing else. A download cut off goes on."""
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*_TEXT_FILES, weights]
            if constants.HF_HUB_OFFLINE:
                files = []
            else:
                files = snapshot_download(source, revision=revision, allow_patterns=patterns, dry_run=True)
            missing = sum(file.file_size for file in files if file.will_download)
            if missing:
                print(f"{source}: {_size(missing)} to fetch, into {constants.HF_HUB_CACHE}", file=sys.stderr)
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
            if any(folder.glob(weights)):
                return folder
    except (OSError, ValueError) as error:
        raise OSError(_without_network(source, "model.safetensors", error)) from error
    raise FileNotFoundError(_without_network(source, "model.safetensors", ValueError("there is no such file")))


def _convert_once(source: str, folder: Path) -> Path:
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    name = re.sub(r"[^\w.-]+", "--", source.rstrip("/"))[-80:].lstrip("-.")
    out = Path(constants.HF_HOME) / "video_ma2mba" / f"{name}-{_fingerprint(folder)}"
    if (out / RECORD).is_file():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{out}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{source} is being converted by another process: waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"{source} must be converted first, and {out.parent} cannot be written ({error}): set HF_HOME to another "
            f"folder, or run `video-ma2mba convert {source} --out DIR` and name DIR"
        ) from error
    with lock:
        if (out / RECORD).is_file():
            return out
        for left in (out, out.with_name(f"{out.name}.partial")):  # of a conversion that was killed, or half removed
            shutil.rmtree(left, ignore_errors=True)
        size = sum(file.stat().st_size for file in weights)
        print(f"{source} is of the released layout: converting {_size(size)}, once, into {out}", file=sys.stderr)
        # Imports model classes: not before there is something to convert.
        from .convert_checkpoint import convert_checkpoint

        with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
            try:
                convert_checkpoint(folder, out, on_bytes=bar.update)
            except OSError as error:
                raise OSError(f"{error}; `video-ma2mba convert {source} --out DIR` has options for that") from error
    return out


def _fingerprint(folder: Path) -> str:
    """Changes with the package's version and with every file that a conversion reads, without reading them."""
    from video_ma2mba import __version__

    found = [__version__, str(folder.resolve())]
    for file in sorted(
        {file for pattern in (*_TEXT_FILES, "*.safetensors", "*.bin") for file in folder.glob(pattern)}
    ):
        status = file.stat()
        found.append(f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return hashlib.sha256("\n".join(found).encode(errors="surrogateescape")).hexdigest()[:16]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
