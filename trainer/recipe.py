"""Recipes: one YAML file that says what is trained, on what and how; read, overridden, checked."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from .recipe_files import recipe_content
from .training_config import VideoMa2mbaTrainingConfig

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class Recipe:
    """What a recipe says beside the trainer's settings.

    Attributes:
        model: directory or Hub id to start from; `bundled` is the checkpoint that comes with the package.
        train_data: what `load_training_data` takes: a file, a folder, a Hub id, or a list of these; likewise
            eval_data. base_dir: folder of the videos where it is another than the data's.
        eval_share: of the training rows, put aside for evaluation where there is no eval_data.
        merge_by_video: all questions about one video make one chat (clips of one video always make one sample).
        streaming: read rows as they are needed (set max_steps).
        lora_rank: train adapters of this rank beside the frozen model; None trains the model itself.
        lora_alpha, lora_dropout: as in PEFT. lora_vision: adapters in the vision tower, too.
        four_bit: QLoRA: the language model's projections are kept in 4 bits (NF4) beside the adapters, which takes
            bitsandbytes; what is merged has all its bits again.
        merge_adapter: also write the model with the adapters merged into it, to output_dir/merged.
        resume: go on from the newest complete checkpoint in output_dir, if there is one.
        smoke_data: kind of rendered data of a smoke run; see `smoke_data.SMOKE_DATA`.
    """

    model: str | None = None
    train_data: Any = None
    eval_data: Any = None
    base_dir: str | None = None
    eval_share: float = 0.0
    merge_by_video: bool = False
    streaming: bool = False
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_vision: bool = False
    four_bit: bool = False
    merge_adapter: bool = True
    resume: bool = False
    smoke_data: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is not valid: it must be in 0..1")
        if self.four_bit and self.lora_rank is None:
            raise ValueError("four_bit=true is for adapters, whole models do not train in 4 bits: give lora_rank, too")


_NUMBERS = ("float", "int", "float | None", "int | None", float, int, float | None, int | None)


def read_recipe(
    source: str | os.PathLike[str], overrides: Sequence[str] = (), smoke: bool = False
) -> tuple[Recipe, VideoMa2mbaTrainingConfig]:
    """Read a recipe file, or the shipped one of that name, and lay overrides over it.

    Args:
        overrides: `key=value` texts; the value is read as YAML.
        smoke: take the recipe's smoke section, too, which turns it into a short run on rendered videos.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: an unknown key, a value that makes no sense, or no smoke section.
    """
    return build_recipe(recipe_content(source, overrides, smoke))


def build_recipe(content: dict[str, Any]) -> tuple[Recipe, VideoMa2mbaTrainingConfig]:
    """Recipe and settings from plain data.

    Raises:
        ValueError: an unknown key or a value that makes no sense.
    """
    kinds = (Recipe, VideoMa2mbaTrainingConfig)
    known = [{field.name for field in fields(kind) if field.init} for kind in kinds]
    for key in content:
        if not any(key in names for names in known):
            close = difflib.get_close_matches(key, set.union(*known), 1)
            raise ValueError(f"{key!r} is no setting" + (f": do you mean {close[0]!r}?" if close else ""))
    content = {key: _yaml_value(key, value) for key, value in content.items()}
    if workers := content.get("dataloader_num_workers"):
        content["dataloader_num_workers"] = min(workers, _processors())  # more of them slow each other down
    if not content.get("eval_share", 1) and not content.get("eval_data"):  # nothing is put aside, so nothing evaluated
        content |= {"eval_strategy": "no", "early_stopping_patience": None, "load_best_model_at_end": False}
    if content.get("deepspeed") and ParallelDims.of_run().world == 1:
        content["deepspeed"] = None  # one process has nothing to share its optimizer state with
    for field in fields(VideoMa2mbaTrainingConfig):
        value = content.get(field.name)
        if isinstance(value, str) and field.type in _NUMBERS:
            raise ValueError(f"{field.name}={value} is not valid: it must be a number")
    recipe, config = (
        kind(**{key: value for key, value in content.items() if key in names})
        for kind, names in zip(kinds, known, strict=True)
    )
    return recipe, config


def _processors() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _yaml_value(key: str, value: Any) -> Any:
    """YAML 1.1 takes 4e-5 for a text and no for False."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return "no" if value is False and key.endswith("_strategy") else value
