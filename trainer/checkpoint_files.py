"""Complete checkpoints only: every checkpoint lists its files, and one that lacks any of them is never loaded.

The list is written last, in one rename. A kill in the middle of saving leaves no list; one in the middle of deleting
an old checkpoint leaves a list that names files which are gone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..modeling_video_ma2mba.state_writing import give_usual_permissions, write_whole

MANIFEST = "checkpoint_files.json"
_log = logging.getLogger(__name__)


def write_manifest(checkpoint: str | os.PathLike[str]) -> None:
    """List all files of a finished checkpoint with their sizes."""
    folder = Path(checkpoint)
    give_usual_permissions(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_whole(folder / MANIFEST, json.dumps(sizes, indent=1) + "\n")


def what_is_missing(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint must not be loaded, in a few words; None if it is complete."""
    folder = Path(checkpoint)
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except ValueError:
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, None if there is none; incomplete ones are named in a warning."""
    steps: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if path.is_dir() and number.isdecimal():
            steps[int(number)] = path
    for step in sorted(steps, reverse=True):
        reason = what_is_missing(steps[step])
        if reason is None:
            return str(steps[step])
        _log.warning("checkpoint %s is passed over: %s", steps[step], reason)
    return None


def checkpoint_of_earlier_run(output_dir: str | os.PathLike[str], resume: bool) -> str | None:
    """The checkpoint that a run in this folder goes on from, None where it begins.

    Raises:
        ValueError: there is one, and `resume` is off.
    """
    earlier = last_complete_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if earlier and not resume:
        raise ValueError(
            f"{output_dir} holds {Path(earlier).name} of an earlier run: add resume=true, or another output_dir"
        )
    return earlier


def require_complete(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is not complete.

    Raises:
        ValueError: it is not; says why.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    reason = what_is_missing(checkpoint)
    if reason is not None:
        raise ValueError(f"checkpoint {checkpoint} cannot be resumed from: {reason}; choose an earlier one")


class WholeCheckpoints(Trainer):
    """A Trainer that lists the files of its checkpoints and resumes from complete ones only."""

    def write_beside(self, folder: Path) -> None:
        """What else belongs into a checkpoint, before its files are listed."""

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The folder to resume from: `True` is the newest complete checkpoint.

        Raises:
            ValueError: the checkpoint named is not complete, or there is none.
        """
        if asked is True:
            asked = last_complete_checkpoint(self.args.output_dir)
            if asked is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from")
        if asked:
            require_complete(asked)
        return asked or None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then its list of files, and only then delete older ones and upload."""
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists() and what_is_missing(folder):
            shutil.rmtree(folder)  # of an interrupted save: nothing of it may mix with what comes now
        self.accelerator.wait_for_everyone()
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.write_beside(folder)
            write_manifest(folder)
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)
        if push:
            self._push_from_checkpoint(str(folder))
