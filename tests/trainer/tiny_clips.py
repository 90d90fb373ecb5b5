"""Tiny trainings of VideoMamba shared by tests and the processes they start: moving squares in memory, no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, VideoMambaModel
from video_ma2mba.trainer.videomamba.augmentation import Augmentation
from video_ma2mba.trainer.videomamba.clip_data import TrainingClips
from video_ma2mba.trainer.videomamba.clip_rows import ClipRow, ClipRows
from video_ma2mba.trainer.videomamba.clip_trainer import Classification, VideoMambaTrainer
from video_ma2mba.trainer.videomamba.masked_pretraining import ClipTeacher, MaskedAlignment, MaskedVideoMamba
from video_ma2mba.trainer.videomamba.self_distillation import Distillation, DistilledClassifier
from video_ma2mba.trainer.videomamba.smoke_clips import DIRECTIONS, moving_square
from video_ma2mba.trainer.videomamba.starting_model import frozen
from video_ma2mba.trainer.videomamba.training_settings import VideoMambaTrainingConfig

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "image_size": 16, "patch_size": 8, "num_frames": 4}
AUGMENTED = {"mixup": 0.8, "cutmix": 1.0, "max_steps": 6, "repeated_augmentation": 2}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_model(**fields) -> VideoMambaForVideoClassification:
    torch.manual_seed(0)
    return VideoMambaForVideoClassification(VideoMambaConfig(**TINY, num_labels=4, **fields))


def squares(count: int = 8) -> ClipRows:
    rng = np.random.default_rng(0)
    clips = [moving_square(DIRECTIONS[n % 4], "white", 6, 16, rng) for n in range(count)]
    return ClipRows([ClipRow(clip, n % 4) for n, clip in enumerate(clips)], DIRECTIONS)


def settings(folder: Path, **changes) -> VideoMambaTrainingConfig:
    given = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"}
    given |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "weight_decay": 0.1}
    return VideoMambaTrainingConfig(str(folder), **(given | changes))


def tiny_clips(args: VideoMambaTrainingConfig, rows: ClipRows | None = None) -> TrainingClips:
    augmentation = Augmentation(16, "none", flip=False)
    return TrainingClips(rows or squares(), 4, augmentation, repeats=args.repeated_augmentation, seed=0)


def trainer_of(args, model=None, rows=None, **other) -> VideoMambaTrainer:
    model = model or tiny_model()
    return VideoMambaTrainer(model, args, Classification(args, model.config), tiny_clips(args, rows), **other)


def distillation_of(args) -> VideoMambaTrainer:
    student, teacher = tiny_model(), frozen(VideoMambaModel(VideoMambaConfig(**(TINY | {"hidden_size": 8}))))
    model = DistilledClassifier(student, teacher.config)
    return VideoMambaTrainer(model, args, Distillation(args, student.config, teacher), tiny_clips(args))


def masked_of(args) -> VideoMambaTrainer:
    encoder = tiny_model().videomamba
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, image_size=16, patch_size=8, projection_dim=12))
    objective = MaskedAlignment(args, encoder.config, ClipTeacher(clip, 1))
    return VideoMambaTrainer(MaskedVideoMamba(encoder, 12, 1, True), args, objective, tiny_clips(args))


WAYS = {"classification": trainer_of, "distillation": distillation_of, "masked": masked_of}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
