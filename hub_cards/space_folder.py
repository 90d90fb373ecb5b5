"""Writes the folder of a Space: the page, example videos, and a checkpoint that brings its own code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from video_ma2mba import EXAMPLE_VIDEOS

from .hub_folder import HubFolder, write_hub_folder

_SPACE = Path(__file__).parent / "space"
_PAGE = ("app.py", "requirements.txt", "README.md")
CHECKPOINT = "checkpoint"  # where `app.py` looks for the model


def write_space_folder(source: Path, target: Path, **card: Any) -> HubFolder:
    """Copy the page and the checkpoint in `source` to `target`; see `write_hub_folder`, whose settings `card` takes.

    Raises:
        ValueError: a LoRA adapter, which a Space cannot run alone; and what `write_hub_folder` raises.
    """
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} is an adapter: merge it into its model (merge_and_unload) and save that for a Space"
        )
    written = write_hub_folder(source, target / CHECKPOINT, CHECKPOINT, pin=False, **card)  # by its path in the Space
    for name in _PAGE:
        shutil.copyfile(_SPACE / name, target / name)
    shutil.copytree(_SPACE / "web", target / "web", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE_VIDEOS, target / "examples")
    return written
