"""A VideoMamba recipe, read and carried out: data, model and objective put together, trained, saved and published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...conversion.videomamba_checkpoint import read_class_names
from ...modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ...modeling_video_ma2mba.modeling_videomamba import VideoMambaModel
from ...modeling_video_ma2mba.state_writing import give_usual_permissions
from ..checkpoint_files import checkpoint_of_earlier_run
from ..data.broken_samples import BrokenSamples
from ..setting_names import checked_settings, made_of
from .augmentation import Augmentation
from .clip_data import TestClips, TrainingClips
from .clip_rows import ClipRows, load_clip_rows
from .clip_trainer import Classification, VideoMambaTrainer, accuracy, clip_processor, squared_error
from .masked_pretraining import ClipTeacher, MaskedAlignment, MaskedVideoMamba
from .retrieval_run import retrieval_trainer
from .self_distillation import Distillation, DistilledClassifier
from .smoke_clips import write_smoke_clips
from .starting_model import frozen, load_encoder_, starting_classifier, starting_encoder
from .training_settings import TASKS, VideoMambaRecipe, VideoMambaTrainingConfig

_LORA_TARGETS = ["in_proj", "out_proj"]
# What only some tasks look at; elsewhere it would be left out without a word.
_LABELLED = ("classification", "regression", "distillation")
_ALIGNED = ("masked", "retrieval")
_CLIPS = (*_LABELLED, "masked")
_TASKS_OF = {
    **dict.fromkeys(("teacher", "teacher_config"), ("distillation", *_ALIGNED)),
    **dict.fromkeys(("distillation_weight", "distillation_until"), ("distillation",)),
    **dict.fromkeys(("mask", "mask_ratio", "align_layers", "align_before_last_mixer"), _ALIGNED),
    **dict.fromkeys(("eval_data", "eval_share"), (*_LABELLED, "retrieval")),
    **dict.fromkeys(("num_labels", "class_names", "eval_segments", "eval_crops"), _LABELLED),
    **dict.fromkeys(("mixup", "cutmix", "label_smoothing"), ("classification", "distillation")),
    **dict.fromkeys(("window_seconds", "window_stride", "repeated_augmentation", "repeats_in_epoch"), _CLIPS),
    **dict.fromkeys(("lora_rank", "lora_alpha"), ("classification", "regression")),
    **dict.fromkeys(("text_model", "text_config", "fusion_layers", "projection_dim", "paragraphs"), ("retrieval",)),
    **dict.fromkeys(("max_text_length", "vtc_weight", "vtm_weight", "mlm_weight", "uta_weight"), ("retrieval",)),
    **dict.fromkeys(("mlm_probability", "picture_mask_ratio", "eval_split"), ("retrieval",)),
}


def build_recipe(content: dict[str, Any]) -> tuple[VideoMambaRecipe, VideoMambaTrainingConfig]:
    """Recipe and settings from plain data, as `recipe_files.recipe_content` reads it.

    Raises:
        ValueError: an unknown key, a value that makes no sense, or one that the task does not look at.
    """
    kinds = (VideoMambaRecipe, VideoMambaTrainingConfig)
    given = checked_settings(content, kinds)
    task = given.get("task", VideoMambaRecipe.task)
    usual = {each.name: each.default for kind in kinds for each in dataclasses.fields(kind)}
    for name, value in given.items():
        tasks = _TASKS_OF.get(name, (task,))
        if value and value != usual[name] and task in TASKS and task not in tasks:
            raise ValueError(f"{name}={value} is for task={' or '.join(tasks)}, not {task}: leave it out")
    if not given.get("eval_share", 0) and not given.get("eval_data"):
        given["eval_strategy"] = "no"
    recipe, args = made_of(given, kinds)
    return recipe, args


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
    if recipe.task == "retrieval":
        return retrieval_trainer(recipe, args, _data_name(recipe))
    return {"masked": _masked_trainer}.get(recipe.task, _classification_trainer)(recipe, args)


def _rows(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig) -> tuple[ClipRows, ClipRows | None]:
    """Training rows and held-out ones."""
    names = None
    if recipe.class_names is not None:
        names = read_class_names(Path(recipe.class_names))
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
    export: Callable[[nn.Module], nn.Module] | None = None
    if recipe.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=_LORA_TARGETS, modules_to_save=["head"]
        )
        model = get_peft_model(model, adapters)
        export = _merged
    objective = Classification(args, config)
    if recipe.task == "distillation":
        teacher = _smaller_teacher(recipe, config)
        objective = Distillation(args, config, teacher)
        model, export = DistilledClassifier(model, teacher.config), lambda trained: trained.student  # type: ignore[arg-type]
    report = BrokenSamples(Path(args.output_dir, "broken_eval_samples.jsonl"))
    return VideoMambaTrainer(
        model,
        args,
        objective,
        training_clips(train, config, args),
        None if held_out is None else TestClips(held_out, clip_processor(config, args, tests=True), report=report),
        processing_class=clip_processor(config, args),
        data_name=_data_name(recipe),
        export=export,
        compute_metrics=squared_error if regression else accuracy,
    )


def _smaller_teacher(recipe: VideoMambaRecipe, config: Any) -> nn.Module:
    """The frozen teacher of a distillation, fitted to the student's clips."""
    clips = {name: getattr(config, name) for name in ("image_size", "num_frames")}
    tubelet = config.tubelet_size if config.is_video else None
    source = dataclasses.replace(recipe, model=recipe.teacher, model_config=None, tubelet_size=tubelet, **clips)
    if recipe.teacher_config is not None:
        fresh = VideoMambaConfig(**{**config.to_dict(), "time_step_rank": None, **recipe.teacher_config})
        return frozen(VideoMambaModel(fresh))
    if recipe.teacher is None:
        raise ValueError("the recipe names no teacher: add teacher=..., a smaller VideoMamba")
    fitted, weights = starting_encoder(source, 0.0, setting="teacher")
    holder = nn.Module()
    holder.videomamba = VideoMambaModel(fitted)
    load_encoder_(holder, weights, recipe.teacher, setting="teacher")
    return frozen(holder.videomamba)


def _masked_trainer(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig) -> VideoMambaTrainer:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    train, _ = _rows(dataclasses.replace(recipe, eval_data=None, eval_share=0.0), args)
    config, weights = starting_encoder(recipe, args.drop_path_rate)
    encoder = VideoMambaModel(config)
    if weights:
        holder = nn.Module()
        holder.videomamba = encoder
        load_encoder_(holder, weights, recipe.model)
    if recipe.teacher_config is not None:
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**recipe.teacher_config))
    elif recipe.teacher is not None:
        clip = CLIPVisionModelWithProjection.from_pretrained(recipe.teacher)
    else:
        raise ValueError("the recipe names no teacher: add teacher=..., a CLIP such as openai/clip-vit-base-patch16")
    model = MaskedVideoMamba(encoder, clip.config.projection_dim, args.align_layers, args.align_before_last_mixer)
    return VideoMambaTrainer(
        model,
        args,
        MaskedAlignment(args, config, ClipTeacher(clip, args.align_layers)),
        training_clips(train, config, args),
        processing_class=clip_processor(config, args),
        data_name=_data_name(recipe),
        export=lambda trained: trained.videomamba,  # type: ignore[arg-type, return-value]
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
    earlier = checkpoint_of_earlier_run(args.output_dir, recipe.resume)
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
