"""A VideoMamba recipe, read and carried out: data, model and objective put together, trained, saved and published."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...modeling_video_ma2mba.state_writing import give_usual_permissions
from ..checkpoint_files import last_complete_checkpoint
from ..data.broken_samples import BrokenSamples
from .augmentation import Augmentation
from .clip_data import TestClips, TrainingClips
from .clip_rows import ClipRows, load_clip_rows
from .clip_trainer import Classification, VideoMambaTrainer, accuracy, clip_processor, squared_error
from .smoke_clips import write_smoke_clips
from .starting_model import starting_classifier
from .training_settings import VideoMambaRecipe, VideoMambaTrainingConfig

_LORA_TARGETS = ["in_proj", "out_proj"]


def build_recipe(content: dict[str, Any]) -> tuple[VideoMambaRecipe, VideoMambaTrainingConfig]:
    """Recipe and settings from plain data, as `recipe_files.recipe_content` reads it.

    Raises:
        ValueError: an unknown key or a value that makes no sense.
    """
    kinds = (VideoMambaRecipe, VideoMambaTrainingConfig)
    known = [{field.name for field in dataclasses.fields(kind) if field.init} for kind in kinds]
    for key in content:
        if not any(key in names for names in known):
            close = difflib.get_close_matches(key, set.union(*known), 1)
            raise ValueError(f"{key!r} is no setting" + (f": do you mean {close[0]!r}?" if close else ""))
    given = {key: _plain(key, value) for key, value in content.items()}
    if workers := given.get("dataloader_num_workers"):
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given["dataloader_num_workers"] = min(workers, processors)  # more of them slow each other down
    if not given.get("eval_share", 0) and not given.get("eval_data"):
        given["eval_strategy"] = "no"
    recipe, args = (
        kind(**{key: value for key, value in given.items() if key in names})
        for kind, names in zip(kinds, known, strict=True)
    )
    return recipe, args


def _plain(key: str, value: Any) -> Any:
    """YAML 1.1 takes 4e-5 for a text and no for False."""
    if isinstance(value, str) and key.endswith(("rate", "decay", "epsilon", "_norm")):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{key}={value} is not valid: it must be a number") from None
    return "no" if value is False and key.endswith("_strategy") else value


def build_trainer(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig, smoke: bool = False) -> VideoMambaTrainer:
    """The trainer of a recipe, ready to train.

    Args:
        smoke: on rendered clips where the recipe names no data.

    Raises:
        ValueError, FileNotFoundError: model or data are missing or make no sense, in one sentence.
    """
    if smoke and recipe.data is None:
        with args.main_process_first(desc="rendering"):
            written = write_smoke_clips(Path(args.output_dir, "smoke_data"), recipe)
        recipe = dataclasses.replace(recipe, data=str(written), eval_data=str(written))
    if recipe.data is None:
        raise ValueError("the recipe names no data: add data=...")
    torch.manual_seed(args.seed)
    return _classification_trainer(recipe, args)


def _rows(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig) -> tuple[ClipRows, ClipRows | None]:
    """Training rows and held-out ones."""
    names = None
    if recipe.class_names is not None:
        names = [line.strip() for line in Path(recipe.class_names).read_text(encoding="utf-8").splitlines() if line]
    options: dict[str, Any] = {
        "base_dir": recipe.base_dir,
        "regression": recipe.task == "regression",
        "window": recipe.window_seconds,
        "stride": recipe.window_stride,
    }
    with args.main_process_first(desc="reading the data"):
        train = load_clip_rows(recipe.data, classes=names, **options)
        if recipe.eval_data is not None:
            classes = list(train.classes) or None
            return train, load_clip_rows(recipe.eval_data, split="val", classes=classes, **options)
    if not recipe.eval_share:
        return train, None
    order = np.random.default_rng(args.seed).permutation(len(train))
    aside = max(1, round(len(train) * recipe.eval_share))
    if aside >= len(train):
        raise ValueError(f"{recipe.data} has {len(train)} rows, of which none can be put aside: add rows")
    parts = order[aside:], order[:aside]
    kept, held = (ClipRows([train.rows[i] for i in sorted(part)], train.classes) for part in parts)
    return kept, held


def training_clips(rows: ClipRows, config: Any, args: VideoMambaTrainingConfig) -> TrainingClips:
    """The training data set of a recipe; broken rows are listed in output_dir."""
    return TrainingClips(
        rows,
        config.num_frames,
        Augmentation(
            config.image_size,
            args.crop,
            args.flip,
            args.randaugment_ops,
            args.randaugment_magnitude,
            args.randaugment_std,
            args.random_erasing,
        ),
        repeats=args.repeated_augmentation,
        seed=args.seed,
        report=BrokenSamples(Path(args.output_dir, "broken_samples.jsonl")),
    )


def _classification_trainer(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig) -> VideoMambaTrainer:
    regression = recipe.task == "regression"
    train, held_out = _rows(recipe, args)
    if not regression and not train.classes:
        raise ValueError(f"{recipe.data} has no labels")
    model: nn.Module = starting_classifier(recipe, args.drop_path_rate, train.classes, regression)
    config: Any = model.config
    export = None
    if recipe.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=_LORA_TARGETS, modules_to_save=["head"]
        )
        model = get_peft_model(model, adapters)
        export = _merged
    report = BrokenSamples(Path(args.output_dir, "broken_eval_samples.jsonl"))
    return VideoMambaTrainer(
        model,
        args,
        Classification(args, config),
        training_clips(train, config, args),
        None if held_out is None else TestClips(held_out, clip_processor(config, args, tests=True), report=report),
        processing_class=clip_processor(config, args),
        data_name=_data_name(recipe),
        export=export,
        compute_metrics=squared_error if regression else accuracy,
    )


def _merged(model: Any) -> nn.Module:
    """A copy of an adapted model with the adapters in its weights."""
    import copy

    return copy.deepcopy(model).merge_and_unload()


def _data_name(recipe: VideoMambaRecipe) -> str:
    parts = recipe.data if isinstance(recipe.data, list) else [recipe.data]
    return ", ".join(Path(str(part)).name for part in parts)


def run_recipe(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig, smoke: bool = False) -> Path:
    """Train as the recipe says, save model, processor and card, publish where asked for; the folder to use next.

    Raises:
        ValueError: the output folder holds checkpoints of another run and `resume` is off; see also `build_trainer`.
    """
    earlier = last_complete_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if earlier and not recipe.resume:
        raise ValueError(
            f"{args.output_dir} holds {Path(earlier).name} of an earlier run: add resume=true, or another output_dir"
        )
    push, args.push_to_hub = args.push_to_hub, False  # once, at the end: what is published is not what is trained
    trainer = build_trainer(recipe, args, smoke)
    trainer.train(resume_from_checkpoint=earlier)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    result = Path(args.output_dir)
    trainer.save_exported(result)
    if trainer.is_world_process_zero():
        give_usual_permissions(result)
        if push:
            trainer.push_result(result)
    return result


def what_next(recipe: VideoMambaRecipe, result: Path) -> str:
    """What to do with the folder that `run_recipe` gave."""
    if recipe.task == "masked":
        return f"fine-tune it: video-ma2mba train --config videomamba/k400 size=m_masked model={result} data=LIST"
    if recipe.task == "retrieval":
        return f'search with it: video-ma2mba retrieve "TEXT" --videos DIR --model {result}'
    what = "PICTURE" if recipe.tubelet_size is None else "VIDEO"
    return f"use it: video-ma2mba classify {what} --model {result}"
