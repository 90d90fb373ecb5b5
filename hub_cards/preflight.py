"""What is tried and searched for before a folder may go to the Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .checkpoint_facts import tensors_in

LARGEST_FILE = 50 * 10**9  # bytes: what the Hub takes as one file, https://huggingface.co/docs/hub/storage-limits
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
}
_SCRIPT = Path(__file__).with_name("ask_remote_code.py")


def refuse_secrets(folder: Path) -> None:
    """Search every file for keys and tokens; of weights, the header, which may hold any text.

    Raises:
        ValueError: one was found. The message names the file and line and never repeats the secret.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            for name, pattern in _SECRETS.items():
                if re.search(pattern, line):
                    raise ValueError(f"{path.name}, line {number}, seems to hold {name}: remove it, and revoke it")


def _text_of(path: Path) -> str:
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8", errors="replace")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length).decode("utf-8", errors="replace")


def refuse_wrong_sizes(folder: Path) -> None:
    """Every file must be whole and no larger than the Hub takes.

    Raises:
        ValueError: an empty, damaged or too large file.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"{path.name} is empty: save the checkpoint again")
        if size > LARGEST_FILE:
            raise ValueError(
                f"{path.name} has {size / 1e9:.0f} GB, the Hub takes {LARGEST_FILE / 1e9:.0f}: save it with a smaller "
                "max_shard_size"
            )
        if path.suffix == ".safetensors":
            tensors_in(path)


def ask_remote_code(folder: Path, base_model: str | None = None) -> str:
    """Let a clean process without this package load `folder` and answer a question about a small rendered video.

    Args:
        base_model: folder or Hub id that an adapter belongs to. Only a Hub id needs the network, or the Hub's cache.

    Returns:
        The answer, which nobody judges here.

    Raises:
        ValueError: the folder does not load or does not answer; the message ends with what that process said last.
    """
    from ..world import WorldDataset
    from ..world.video_files import write_video

    sample = WorldDataset("test", 1, frames=(8, 8), questions=1)[0]
    with tempfile.TemporaryDirectory() as scratch:
        video = Path(scratch) / "world.mp4"
        write_video(video, [sample.frames])
        # -I: neither PYTHONPATH nor the current folder; no token, so that the folder cannot need one.
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        environment["HF_MODULES_CACHE"] = str(Path(scratch) / "modules")
        if base_model is None or Path(base_model).is_dir():
            environment |= {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", str(_SCRIPT), str(folder.absolute()), str(video), sample.questions[0].text]
        if base_model is not None:
            command.append(str(Path(base_model).absolute()) if Path(base_model).is_dir() else base_model)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"without the package, the folder does not answer a question: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])["answer"]
