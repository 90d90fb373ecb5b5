"""What decides a VideoMamba training: the recipe (model and data) and the settings of its trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...modeling_video_ma2mba.parallel_dims import ParallelDims
from ..run_settings import accumulation_steps, check_clock, fit_batches_to_machine, fit_to_machine

TASKS = ("classification", "regression", "distillation", "masked", "retrieval")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class VideoMambaRecipe:
    """What a recipe says beside the trainer's settings.

    Attributes:
        task: classification, regression (values), distillation (classification beside a frozen teacher), masked
            (pre-training beside a frozen CLIP) or retrieval (clips and captions).
        model: where to start: a folder, a Hub id, a released `.pth` file; None begins with fresh weights.
        model_size: ti, s, m or b, of fresh weights. model_config: fields of VideoMambaConfig, over all else.
        num_frames, image_size, tubelet_size: of clips; positions of the model to start from are interpolated.
            tubelet_size null makes a model of pictures.
        data, eval_data: what `load_clip_rows` takes. base_dir: where paths begin.
        eval_share: of the training rows, put aside for evaluation where there is no eval_data.
        num_labels: classes, where the training list does not have all of them. class_names: a file with their names.
        window_seconds, window_stride: cut long videos into windows (LVU).
        teacher: distillation: folder or `.pth` of the smaller model; masked pre-training: folder or Hub id of a CLIP.
        teacher_config: fields of a teacher with random weights instead, for runs that only show that it works.
        lora_rank: train adapters of this rank and the head; None trains the whole model. lora_alpha: as in PEFT.
        text_model: retrieval: folder or Hub id of the BERT that reads captions. text_config: fields of a BERT with
            fresh weights instead; without text_model as well its vocabulary is made from the captions.
        fusion_layers, projection_dim, max_text_length: retrieval, of VideoMambaRetrievalConfig.
        paragraphs: retrieval: several captions of a video are one text. eval_split: of eval_data, if it has several.
        resume: go on from the newest complete checkpoint in output_dir, if there is one.
    """

    task: str = "classification"
    model: str | None = None
    model_size: str = "ti"
    model_config: dict[str, Any] | None = None
    num_frames: int = 8
    image_size: int = 224
    tubelet_size: int | None = 1
    data: Any = None
    eval_data: Any = None
    base_dir: str | None = None
    eval_share: float = 0.0
    num_labels: int | None = None
    class_names: str | None = None
    window_seconds: float | None = None
    window_stride: float | None = None
    teacher: str | None = None
    teacher_config: dict[str, Any] | None = None
    lora_rank: int | None = None
    lora_alpha: int = 32
    text_model: str | None = None
    text_config: dict[str, Any] | None = None
    fusion_layers: int | None = None
    projection_dim: int | None = None
    max_text_length: int | None = None
    paragraphs: bool = False
    eval_split: str = "val"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not valid: use one of {', '.join(TASKS)}")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is not valid: it must be in 0..1")
        for name in ("lora_rank", "num_labels", "num_frames", "image_size", "tubelet_size", "max_text_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not valid: it must be at least 1")
        for name in ("window_seconds", "window_stride"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} is not valid: it must be more than 0")


# Names of settings, and the least and the greatest value that makes sense.
_RANGES: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("random_erasing", "label_smoothing", "mask_ratio", "picture_mask_ratio", "mlm_probability"), 0, 1),
    (("distillation_until", "drop_path_rate"), 0, 1),
    (("layer_decay",), 1e-3, 1),
    (("randaugment_magnitude",), 0, 10),
    (("repeated_augmentation", "repeats_in_epoch", "eval_segments", "eval_crops", "align_layers"), 1, math.inf),
    (("rate_batch_size", "global_batch_size"), 1, math.inf),
    (("mixup", "cutmix", "randaugment_ops", "randaugment_std", "distillation_weight", "vtc_weight"), 0, math.inf),
    (("vtm_weight", "mlm_weight", "uta_weight", "base_learning_rate", "min_learning_rate"), 0, math.inf),
    (("warmup_learning_rate", "warmup_epochs"), 0, math.inf),
)


@dataclass
class VideoMambaTrainingConfig(TrainingArguments):
    """Settings of `VideoMambaTrainer`: those of transformers' `TrainingArguments`, and what the paper's recipes add.

    The learning rate is `base_learning_rate` times the clips of an optimizer step over `rate_batch_size`, and so are
    `min_learning_rate` and `warmup_learning_rate`; `learning_rate` set by itself is taken as it is.
    """

    remove_unused_columns: bool = _option(False, "The data set gives what the model takes.")
    bf16: bool | None = _option(None, "Autocast to bf16; unset: where there is CUDA.")  # type: ignore[assignment]
    global_batch_size: int | None = _option(
        None, "Videos of one optimizer step over all processes; sets gradient_accumulation_steps."
    )
    base_learning_rate: float | None = _option(None, "Highest rate for rate_batch_size clips a step.")
    rate_batch_size: int = _option(256, "Clips a step for which base_learning_rate is meant.")
    min_learning_rate: float = _option(0.0, "Rate at the end of the cosine, scaled as base_learning_rate is.")
    warmup_learning_rate: float = _option(0.0, "Rate at the beginning of the warm-up, scaled likewise.")
    warmup_epochs: float = _option(0.0, "Epochs of warm-up.")
    layer_decay: float = _option(1.0, "Factor of the rate from layer to layer, from the head down.")
    layer_decay_of: str = _option(
        "layers", "What layer_decay slows: layers (all), or embeddings (as the release does)."
    )
    drop_path_rate: float = _option(0.0, "Stochastic depth of the last block.")
    repeated_augmentation: int = _option(1, "Clips of a video, decoded once and augmented apart, in one batch.")
    repeats_in_epoch: int = _option(1, "Times a row is drawn in an epoch, which stays as long (pictures).")
    crop: str = _option("random", "How training clips are cropped; see Augmentation.")
    flip: bool = _option(True, "Mirror half of the training clips.")
    randaugment_ops: int = _option(0, "Operations of RandAugment a clip.")
    randaugment_magnitude: float = _option(9.0, "Their strength, 0..10.")
    randaugment_std: float = _option(0.5, "Deviation of their strength.")
    random_erasing: float = _option(0.0, "Probability that a rectangle of a clip is replaced by noise.")
    mixup: float = _option(0.0, "Parameter of mixup; 0 is none.")
    cutmix: float = _option(0.0, "Parameter of cutmix; 0 is none.")
    label_smoothing: float = _option(0.0, "Share of a label's probability that goes to all classes.")
    eval_segments: int = _option(1, "Clips of a video that are averaged in evaluation.")
    eval_crops: int = _option(1, "Crops of a clip that are averaged in evaluation.")
    distillation_weight: float = _option(1.0, "Of the alignment with the teacher.")
    distillation_until: float = _option(1.0, "Share of training after which the teacher is left out.")
    mask: str = _option("attention", "Mask of pre-training: random, tube, frame_row, clip_row or attention.")
    mask_ratio: float = _option(0.8, "Share of patches that the student does not see.")
    align_layers: int = _option(1, "The last so many layers are aligned with as many of the teacher's.")
    align_before_last_mixer: bool = _option(
        True, "Align the stream before the last mixer, as released; else after it."
    )
    vtc_weight: float = _option(1.0, "Retrieval: of the contrast of clips and texts.")
    vtm_weight: float = _option(1.0, "Retrieval: of the match of pairs, with hard negatives; 0 is none.")
    mlm_weight: float = _option(1.0, "Retrieval: of words hidden in texts; 0 is none.")
    uta_weight: float = _option(1.0, "Retrieval: of the alignment with the teacher.")
    mlm_probability: float = _option(0.5, "Share of words that are hidden.")
    picture_mask_ratio: float = _option(0.5, "mask_ratio of pictures beside clips (retrieval).")
    max_seconds: float | None = _option(
        None, "Length of training by the clock, over all resumed parts; the learning rate follows it."
    )
    stop_after: float | None = _option(None, "Seconds after which this part of a run saves and stops, to be resumed.")
    save_seconds: float | None = _option(None, "Seconds between checkpoints, beside what save_strategy asks for.")
    license: str | None = _option(None, "Licence of the result, for the model card, such as apache-2.0.")

    def __post_init__(self) -> None:
        fit_to_machine(self)
        for names, least, most in _RANGES:
            for name in names:
                if (value := getattr(self, name)) is not None and not least <= value <= most:
                    within = f"in {least:g}..{most:g}" if math.isfinite(most) else f"at least {least:g}"
                    raise ValueError(f"{name}={value} is not valid: it must be {within}")
        if self.layer_decay_of not in ("layers", "embeddings"):
            raise ValueError(f"layer_decay_of={self.layer_decay_of!r} is not valid: use layers or embeddings")
        if self.global_batch_size is not None:
            processes = ParallelDims.of_run().world
            self.gradient_accumulation_steps = accumulation_steps(self, processes, f"videos x {processes} processes")
        check_clock(self)
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.rate_scale
        if self.warmup_epochs:
            if self.warmup_epochs >= self.num_train_epochs:
                raise ValueError(f"warmup_epochs={self.warmup_epochs} must be less than num_train_epochs")
            self.warmup_steps = self.warmup_epochs / self.num_train_epochs  # a share of all steps
        self.lr_scheduler_type = "cosine_warmup_with_min_lr"
        self.lr_scheduler_kwargs = {
            "min_lr": self.min_learning_rate * self.rate_scale,
            "warmup_lr_rate": self.warmup_learning_rate * self.rate_scale / (self.learning_rate or 1.0),
        }
        super().__post_init__()
        fit_batches_to_machine(self)

    @property
    def clips_a_step(self) -> int:
        """Clips that an optimizer step learns from, over all processes."""
        together = self.per_device_train_batch_size * self.gradient_accumulation_steps * ParallelDims.of_run().world
        return together * self.repeated_augmentation

    @property
    def rate_scale(self) -> float:
        """What `base_learning_rate` is multiplied by."""
        return 1.0 if self.base_learning_rate is None else self.clips_a_step / self.rate_batch_size
