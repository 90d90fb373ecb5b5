"""Recipes: one YAML file that says what is trained, on what and how; read, overridden, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from .parameter_groups import ORDER
from .recipe_files import recipe_content
from .setting_names import Recipe, check_shares, checked_settings, made_of
from .training_config import VideoMa2mbaTrainingConfig


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
    content = checked_settings(content, kinds)
    if not content.get("eval_share", 1) and not content.get("eval_data"):  # nothing is put aside, so nothing evaluated
        content |= {"eval_strategy": "no", "early_stopping_patience": None, "load_best_model_at_end": False}
    if content.get("deepspeed") and ParallelDims.of_run().world == 1:
        content["deepspeed"] = None  # one process has nothing to share its optimizer state with
    recipe, config = made_of(content, kinds)
    _check_together(recipe, config)
    return recipe, config


def _check_together(recipe: Recipe, config: VideoMa2mbaTrainingConfig) -> None:
    """Refuse what would be told only when the data is read, or the model is there."""
    if unknown := set(config.parts or ()) - set(ORDER):
        raise ValueError(f"train_parts={config.train_parts}: {', '.join(unknown)} is none of {', '.join(ORDER)}")
    if recipe.streaming and config.max_steps <= 0:
        raise ValueError("streaming=true: nobody knows how many rows there are, so give max_steps")
    if recipe.shuffle_buffer and not recipe.streaming:
        raise ValueError("shuffle_buffer is for data that streams: other data is shuffled whole")
    if recipe.train_shares is None or recipe.train_data is None:
        return
    if not isinstance(recipe.train_data, list):
        raise ValueError("train_shares is for several sources: give train_data a list, or leave it out")
    check_shares(recipe.train_shares, len(recipe.train_data))
