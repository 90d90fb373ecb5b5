"""`VideoMambaTrainer`: transformers' `Trainer` with the rates, the augmentation of batches and the records of
VideoMamba's recipes. What a step learns is an objective: classification here, others beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback

from ...hub_cards.videomamba_card import videomamba_card
from ...modeling_video_ma2mba.modeling_videomamba import NO_DECAY, normalise
from ...modeling_video_ma2mba.state_writing import write_whole
from ...processing.video_processing_videomamba import VideoMambaVideoProcessor
from ..checkpoint_files import WholeCheckpoints
from ..training_card import run_table
from ..training_clock import ClockedTrainer
from .augmentation import mix_batch, soft_labels
from .clip_data import EpochSampler, collate_test, collate_training
from .starting_model import rate_groups
from .training_settings import VideoMambaTrainingConfig

_CARD_SETTINGS = (
    *(
        "learning_rate",
        "min_learning_rate",
        "warmup_epochs",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
    ),
    *("layer_decay", "drop_path_rate", "repeated_augmentation", "repeats_in_epoch", "crop", "flip", "randaugment_ops"),
    *("randaugment_magnitude", "random_erasing", "mixup", "cutmix", "label_smoothing", "num_train_epochs", "seed"),
)
_WAITED = 2e-3  # seconds that fetching a batch takes that lies ready


class Objective(Protocol):
    """What a training step learns from a batch."""

    def loss(self, model: nn.Module, inputs: dict[str, Any], progress: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch that is on the device, and its parts by name, for the log. progress: 0..1."""


class Classification:
    """Cross-entropy against labels that mixup, cutmix and smoothing have softened; squared error for values."""

    def __init__(self, args: VideoMambaTrainingConfig, config: Any) -> None:
        self.args, self.config = args, config

    def mixed(self, inputs: dict[str, Any], progress: float) -> tuple[Tensor, Tensor]:
        """Normalised pixels fp32 and targets fp32 (B, classes) of a batch."""
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        pixels = normalise(pixels, self.config, torch.empty(0, device=pixels.device))
        if self.config.problem_type == "regression":
            return pixels, labels.float().view(len(labels), -1)
        targets = soft_labels(labels, self.config.num_labels, self.args.label_smoothing)
        rng = np.random.default_rng(int(torch.randint(2**62, (1,))))  # of the generator that a checkpoint keeps
        return mix_batch(pixels, targets, self.args.mixup, self.args.cutmix, rng)

    def loss(self, model: nn.Module, inputs: dict[str, Any], progress: float) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        pixels, targets = self.mixed(inputs, progress)
        return self.of_logits(model(pixel_values=pixels).logits, targets), {}

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of what `mixed` gave."""
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.float(), targets)
        return F.cross_entropy(logits.float(), targets)


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """Share of clips whose class is the most probable one, and among the five most probable."""
    logits, labels = evaluated.predictions, evaluated.label_ids
    best = np.argsort(-logits, axis=-1)[:, :5]
    return {"top1": float((best[:, 0] == labels).mean()), "top5": float((best == labels[:, None]).any(1).mean())}


def squared_error(evaluated: EvalPrediction) -> dict[str, float]:
    """Mean squared error of predicted values."""
    return {"mse": float(np.mean((evaluated.predictions.reshape(-1) - evaluated.label_ids.reshape(-1)) ** 2))}


class VideoMambaTrainer(WholeCheckpoints, ClockedTrainer):
    """Trains a VideoMamba as a recipe says.

    Args:
        model: what is trained. args: its settings.
        objective: what a step learns.
        train_dataset: items as of `TrainingClips`. eval_dataset: as of `TestClips`.
        data_name: what the model card calls the data.
        export: what is saved and published in place of the model (without what only training needs).
        other: as in transformers' `Trainer`.

    The log has `clips_per_second`, `data_wait_share` (of the time, spent waiting for batches) and, on a GPU, its peak.
    """

    no_decay: tuple[str, ...] = NO_DECAY

    def __init__(
        self,
        model: nn.Module,
        args: VideoMambaTrainingConfig,
        objective: Objective,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: Any = None,
        data_name: str | None = None,
        export: Callable[[nn.Module], nn.Module] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        data_collator: Any = collate_training,
        test_collator: Any = collate_test,
        **other: Any,
    ) -> None:
        callbacks = list(callbacks or [])
        callbacks += self.clock_callbacks(args, self.schedule_settings(args))
        self.objective, self.data_name, self.test_collator = objective, data_name, test_collator
        self.export = export or (lambda trained: trained)
        self._parts: dict[str, tuple[float, int]] = {}  # of the loss: sum and number since the last log
        self._restart()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **other,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch

    def _restart(self) -> None:
        """Begin the next interval of the log."""
        self._since, self._waited, self._clips = time.monotonic(), 0.0, 0
        self._parts.clear()

    @staticmethod
    def schedule_settings(args: VideoMambaTrainingConfig) -> dict[str, float]:
        """The settings of the schedule as shares of the highest rate."""
        given = dict(args.lr_scheduler_kwargs or {})
        least = given.pop("min_lr", 0.0)
        return {**given, "min_lr_rate": least / args.learning_rate}

    # ------------------------------------------------------------------------------------------------ data
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(data), seed, self.args.repeats_in_epoch)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """transformers' loader with the collator of tests."""
        train_collator, self.data_collator = self.data_collator, self.test_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As in transformers; the time that it takes is waiting."""
        begun = time.monotonic()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += max(time.monotonic() - begun - _WAITED, 0.0)
        return found

    # ---------------------------------------------------------------------------------------------- steps
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The objective's loss; in evaluation the model's own."""
        if not model.training:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        self._clips += inputs["pixel_values"].shape[0]
        loss, parts = self.objective.loss(model, inputs, self.progress)
        for name, value in parts.items():
            total, count = self._parts.get(name, (0.0, 0))
            self._parts[name] = (total + float(value), count + 1)
        return (loss, None) if return_outputs else loss

    @property
    def progress(self) -> float:
        """How far training is, 0..1."""
        if self.clock is not None:
            return self.clock.progress(self.state.global_step)
        return self.state.global_step / max(self.state.max_steps, 1)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with a group of parameters for each rate and kind of decay."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            trained = self.model if model is None else model
            base = self.accelerator.unwrap_model(trained)
            groups = rate_groups(
                trained.named_parameters(),
                rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                layers=base.config.num_hidden_layers,
                layer_decay=self.args.layer_decay,
                of=self.args.layer_decay_of,
                no_decay=self.no_decay,
            )
            optimizer.param_groups.clear()
            for group in groups:
                optimizer.add_param_group(group)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            counted = torch.tensor([self._clips], device=self.accelerator.device)
            seconds = max(time.monotonic() - self._since, 1e-9)
            logs["clips_per_second"] = self.accelerator.reduce(counted, "sum").item() / seconds
            logs["data_wait_share"] = self._waited / seconds
            logs |= {name: total / count for name, (total, count) in self._parts.items()}
            if torch.cuda.is_available() and not self.args.use_cpu:
                logs["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if broken := getattr(getattr(self.train_dataset, "report", None), "broken", 0):
                logs["broken_samples"] = broken
            self._restart()
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------- checkpoints
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but `True` takes the newest checkpoint that is complete.

        Raises:
            ValueError: the checkpoint named is not complete, or there is none.
        """
        self._restart()
        return super().train(self.checkpoint_to_resume(resume_from_checkpoint), *args, **kwargs)

    def exported(self) -> nn.Module:
        """What is left of the model after training."""
        return self.export(self.accelerator.unwrap_model(self.model))

    def save_exported(self, folder: str | Path) -> None:
        """Write `exported`, its processor and its card, which the auto classes and `push` take."""
        if not self.is_world_process_zero():
            return
        self.exported().save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_whole(Path(folder, "README.md"), self.card(Path(folder).resolve().name))

    def push_result(self, folder: str | Path) -> None:
        """Upload what `save_exported` wrote."""
        from huggingface_hub import HfApi

        api = HfApi(token=self.args.hub_token)
        name = self.args.hub_model_id or Path(folder).resolve().name
        repo = api.create_repo(name, private=self.args.hub_private_repo, exist_ok=True).repo_id
        api.upload_folder(
            folder_path=folder, repo_id=repo, ignore_patterns=["checkpoint-*/*", "smoke_data/*", "runs/*"]
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `output_dir`/README.md."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            write_whole(Path(self.args.output_dir, "README.md"), self.card(name))

    def card(self, name: str) -> str:
        """The model card: what was trained, how, and what was measured on the held-out rows."""
        model = self.exported()
        found = [entry for entry in self.state.log_history if any(key in entry for key in ("eval_top1", "eval_mse"))]
        measured = None
        if found:
            rows = [
                f"| {key.removeprefix('eval_')} | {value:.4f} |"
                for key, value in found[-1].items()
                if key in ("eval_top1", "eval_top5", "eval_mse", "eval_loss")
            ]
            views = f"{self.args.eval_segments} clips x {self.args.eval_crops} crops"
            measured = f"{len(self.eval_dataset)} held-out rows of the data above, {views} each, after step "
            measured += f"{found[-1]['step']}:\n\n| | |\n| --- | --- |\n" + "\n".join(rows)
        return videomamba_card(
            model.config,
            sum(parameter.numel() for parameter in model.parameters()),
            classifier=hasattr(model, "head"),
            title=name,
            license=self.args.license,
            accuracy=measured,
            recipe=run_table(self.args, self.state, self.data_name, self.accelerator.num_processes, _CARD_SETTINGS),
        )


def clip_processor(config: Any, args: VideoMambaTrainingConfig, tests: bool = False) -> VideoMambaVideoProcessor:
    """The processor of a model, with `tests` one that gives all views of the recipe's evaluation."""
    return VideoMambaVideoProcessor(
        size=config.image_size,
        num_frames=config.num_frames,
        num_segments=args.eval_segments if tests else 1,
        num_crops=args.eval_crops if tests else 1,
        image_mean=config.image_mean,
        image_std=config.image_std,
    )
