"""`VideoMa2mbaTrainer`: TRL's `SFTTrainer` for videos of any length.

What differs from `SFTTrainer`: data may be anything that our collator (or the caller's) understands; frames stay on
the host until the vision tower wants them; logits and hidden states exist at labelled positions only; every batch
runs under its own checkpointing plan; parameters learn at the rates of their parts; and only complete checkpoints are
resumed from. `compute_loss`, and with it gradient accumulation, metrics and distributed averaging, is TRL's own.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.parallel_sequence import SequenceGroup
from ..modeling_video_ma2mba.state_writing import write_whole
from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
from .answer_scores import AnswerScores, EvaluationLosses, install_answer_scores
from .checkpoint_files import WholeCheckpoints
from .data.collator import SEQUENCE_CUT, SEQUENCE_FAILED
from .lost_processes import step_told
from .memory_retry import MemoryRetry
from .parameter_groups import decays, set_trainable, split_by_part
from .throughput import Throughput, TrainingProgress
from .training_card import write_training_card
from .training_clock import ClockedTrainer
from .training_config import VideoMa2mbaTrainingConfig
from .training_inputs import (
    BROKEN_SAMPLES,
    EpochLengthSampler,
    batches_for_groups,
    checked_rows,
    default_collator,
    evaluation_collator,
    keep_on_host,
    load_for_training,
    packed_rows,
    sample_lengths,
)

_log = logging.getLogger(__name__)
_PIXELS = "pixel_values_videos"
_TOTALS = "video_totals.json"


class VideoMa2mbaTrainer(WholeCheckpoints, ClockedTrainer, SFTTrainer):
    """Trains a Video-Ma2mba model with Multi-Axis Gradient Checkpointing.

    Args:
        model: a model, a PEFT model, or a directory or Hub id to load.
        args: see `VideoMa2mbaTrainingConfig`.
        train_dataset, eval_dataset: rows of any form that `video_ma2mba.trainer.data` knows, TRL's among them, or any
            torch data set whose items the given `data_collator` understands. For evaluation also a dictionary.
        data_collator: rows to model inputs; default: `VideoChatCollator` as `args` says.
        processing_class: default: the processor saved beside the model.
        data_name: what the model card calls the data.
        other: as in `SFTTrainer` (`peft_config`, `callbacks`, `optimizers`, `compute_metrics`, …).

    Raises:
        ValueError: an argument makes no sense, in one sentence; in `train`, nothing was learnt at all.
    """

    _tag_names = ["trl", "sft", "video-ma2mba"]
    _name = "Video-Ma2mba SFT"

    def __init__(
        self,
        model: str | nn.Module,
        args: VideoMa2mbaTrainingConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        data_name: str | None = None,
        **other: Any,
    ) -> None:
        args = VideoMa2mbaTrainingConfig("video-ma2mba-sft") if args is None else args
        if not isinstance(args, VideoMa2mbaTrainingConfig):
            raise ValueError(f"args must be a VideoMa2mbaTrainingConfig, not {type(args).__name__}")
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        if not has_length(train_dataset) and args.max_steps <= 0:
            raise ValueError("this data set has no length: set max_steps")
        if isinstance(model, str):
            model = load_for_training(model, args)
            args.model_init_kwargs = None  # used up; TRL would warn that it ignores them
        if processing_class is None:
            processing_class = VideoMa2mbaProcessor.from_pretrained(model.config.name_or_path)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if args.frame_times is not None:
            if args.frame_times == "learned" and (base is not model or other.get("peft_config") is not None):
                raise ValueError(
                    "frame_times=learned adds embeddings, which adapters do not train: use frame_times=text"
                )
            base.set_frame_times(processing_class, args.frame_times, args.frame_times_every)
        if args.parts is not None:
            set_trainable(model, args.parts)
        base.model.familiarity = None  # what a model is familiar with is another thing after training
        if data_collator is None:
            train_dataset, eval_dataset = checked_rows(train_dataset), checked_rows(eval_dataset)
            clip_frames = getattr(model.config, "clip_frames", 1)
            data_collator = default_collator(processing_class, args, train_dataset, clip_frames)
            if args.packing:
                train_dataset = packed_rows(train_dataset, processing_class, args)
        elif args.packing:
            raise ValueError("packing=True packs the rows of the trainer's own collator: leave data_collator out")
        self._eval_collator = evaluation_collator(data_collator, args)
        self._evaluation: EvaluationLosses | None = None
        callbacks = list(callbacks or [])
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        callbacks += self.clock_callbacks(args, args.lr_scheduler_kwargs)
        self.throughput = Throughput()
        self.data_name = data_name
        self._bars: TrainingProgress | None = None
        self._retry: MemoryRetry | None = None
        self._total_frames = 0
        self._seconds_before, self._begun = 0.0, time.monotonic()
        self._labelled = self._unlabelled = 0  # micro-batches of a training run
        packing, args.packing = args.packing, False  # TRL's own packs no videos
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=Dataset.from_dict({"messages": [[]]}),  # TRL looks at the first row: ours may be a download
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **other,
        )
        args.packing, self.train_dataset = packing, train_dataset
        self.video_model.model.freeze_unused_parameters()  # adapters may have come into layers that never run
        install_answer_scores(self.video_model, self._note_scores)
        self.video_model.model.language_model.carry_state(args.carry_window, args.carry_state != "cut")
        self.group: SequenceGroup | None = None
        if args.context_parallel_size > 1:
            self.group = SequenceGroup.of_run(args.context_parallel_size, self.accelerator.device.type)
            self.video_model.model.language_model.share_sequence(self.group, args.context_parallel_schedule)
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            by_clock = self.clock if self.clock is not None and self.clock.seconds else None
            self._bars = TrainingProgress(self.throughput, None if by_clock is None else by_clock.progress)
            self.add_callback(self._bars)

    @property
    def video_model(self) -> VideoMa2mbaForConditionalGeneration:
        """The Video-Ma2mba model itself, inside whatever wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def tokens_seen(self) -> int:
        """Tokens that all processes have learnt from or read to, over all resumed parts of the run."""
        return self._total_train_tokens

    @property
    def frames_seen(self) -> int:
        """The same of frames, at the last log."""
        return self._total_frames

    @property
    def seconds_trained(self) -> float:
        """Length of training so far, over all resumed parts of the run."""
        return self._seconds_before + time.monotonic() - self._begun

    # ------------------------------------------------------------------------------------------------ data
    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [
                "messages",
                "id",
                "input_ids",
                "labels",
                "attention_mask",
                _PIXELS,
                "num_frames",
            ]

    def get_train_dataloader(self) -> DataLoader:
        """transformers' loader, whose batches stay on the host until their step begins."""
        with batches_for_groups(self.accelerator, self.args.dims):
            return keep_on_host(super().get_train_dataloader())

    def get_cp_size(self) -> int:
        """Processes that get the same batches: transformers counts batches and labels by it."""
        return self.args.context_parallel_size

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As in transformers; processes that share samples first agree on what they have got, and count it once:
        transformers 5.17 divides by the size of its own parallelism only, 5.23 by `get_cp_size`.

        Nothing where the run was at its end when it was interrupted: transformers would do one more step."""
        step, clock = self.state.global_step, self.clock
        if step >= self.state.max_steps or (clock is not None and clock.progress(step) >= 1.0):
            self.control.should_training_stop = True
            return [], None
        batches = epoch_iterator if self.group is None else map(self._agreed, epoch_iterator)
        samples, count = super().get_batch_samples(batches, num_batches, device)
        if self.group is not None and count is not None:
            labels = [row["shift_labels"] if "shift_labels" in row else row["labels"][:, 1:] for row in samples]
            count = torch.stack([(row != -100).sum() for row in labels]).sum().to(device)
            if self.args.average_tokens_across_devices:
                count = self.accelerator.gather(count).sum()
            count = count / self.args.context_parallel_size
        return samples, count

    def _agreed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same batch on all processes of a group; nothing of it is learnt where one could not decode its frames.

        Raises:
            ValueError: they were given different batches.
        """
        assert self.group is not None
        ids, failed = batch["input_ids"].cpu(), bool(batch.pop(SEQUENCE_FAILED, False))
        if batch.get(SEQUENCE_CUT) is None:
            batch[SEQUENCE_CUT] = self.video_model.model.cut(ids, batch.get("num_frames"))
        told = (*ids.shape, zlib.crc32(ids.numpy().tobytes()), hash(batch[SEQUENCE_CUT].borders) % 2**31)
        least = self.group.smallest(*told, *(-value for value in told), 0.0 if failed else 1.0)
        if [-value for value in least[len(told) : -1]] != least[: len(told)]:
            raise ValueError(
                "processes that share a sample got different batches: do they read the same data, in the same order?"
            )
        if least[-1] == 0.0:
            _log.warning("a process could not decode its part of a sample: nothing is learnt from this batch")
            for name in ("labels", "shift_labels"):
                if name in batch:
                    batch[name] = torch.full_like(batch[name], -100)
        cut = batch[SEQUENCE_CUT]
        if cut.active < cut.ranks and self.is_world_process_zero():
            _log.warning("%d tokens are too few for %d processes: %d share them", cut.tokens, cut.ranks, cut.active)
        return batch

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """transformers' loader with the evaluation's collator; batches stay on the host until their step begins."""
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return keep_on_host(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator = train_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length" and has_length(data)
        if not grouped or not isinstance(data, Dataset) or "messages" not in data.column_names:
            return super()._get_train_sampler(train_dataset)
        lengths = sample_lengths(data, self.processing_class, self.args)
        together = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.dims.batches
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(lengths, together, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        one_process = self.args.world_size <= 1 and has_length(eval_dataset)
        return SequentialSampler(eval_dataset) if one_process else None  # never by length: nothing is to be gained

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """To the device, but for the frames, which the vision tower fetches chunk by chunk."""
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name != _PIXELS})
        if inputs.get(_PIXELS) is not None:
            prepared[_PIXELS] = inputs[_PIXELS]
        if "attention_mask" not in prepared and "input_ids" in prepared:
            prepared["attention_mask"] = torch.ones_like(prepared["input_ids"])  # TRL counts tokens with it
        return prepared

    # ---------------------------------------------------------------------------------------------- steps
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch under a plan of its own; out of memory, the whole optimizer step once more under a smaller
        one (alone or under DDP: where parameters are spread over processes, others would wait for ever)."""
        self.throughput.count(inputs, inputs.get(SEQUENCE_CUT), self.args.dims.sequence_rank)
        labels = inputs["labels"][:, 1:] if "labels" in inputs else inputs.get("shift_labels")
        if labels is not None and bool((labels != -100).any()):
            self._labelled += 1
        else:
            self._unlabelled += 1
        if self._retry is None:
            self._retry = MemoryRetry(self, super().training_step, model)
        return self._retry.run(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; tokens that several processes share are counted once."""
        before = self._total_train_tokens
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self._total_train_tokens = before + (self._total_train_tokens - before) // self.args.context_parallel_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return result

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and self._evaluation is not None:
            self._evaluation.add(loss)
        return loss, logits, labels

    def _note_scores(self, scores: AnswerScores) -> None:
        if self._evaluation is not None:
            self._evaluation.scores = scores

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in transformers, but loss and scores are means over labelled tokens, whatever the batch size."""
        self._evaluation = EvaluationLosses(self, getattr(self._eval_collator, "report", None))
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            self._evaluation.correct(output.metrics, metric_key_prefix)
        finally:
            self._evaluation = None
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, then one group of parameters for each part and kind of decay."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            args = self.args
            rates = {
                "lm": args.learning_rate,
                "projector": args.projector_learning_rate,
                "vision": args.vision_learning_rate,
            }
            rates = {part: args.learning_rate if rate is None else rate for part, rate in rates.items()}
            named = (self.model if model is None else model).named_parameters()
            optimizer.param_groups = split_by_part(optimizer.param_groups, named, rates)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            counted = torch.tensor([self.throughput.tokens, self.throughput.frames], device=self.accelerator.device)
            tokens, frames = self.accelerator.reduce(counted, "sum").tolist()
            self._total_frames += frames
            logs["tokens_per_second"] = tokens / self.throughput.seconds
            logs["frames_per_second"] = frames / self.throughput.seconds
            logs["num_frames"] = self._total_frames
            logs |= self.throughput.peaks()
            if self.throughput.oom_retries:
                logs["oom_retries"] = self.throughput.oom_retries
            if broken := getattr(getattr(self.data_collator, "report", None), "broken", 0):
                logs["broken_samples"] = broken
            self.throughput.restart()
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------- checkpoints
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but `True` takes the newest checkpoint that is complete.

        Raises:
            ValueError: the checkpoint named is not complete, or there is none; or not one batch had anything to learn.
            ConnectionError: another process of the run has ended.
        """
        resume_from_checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if resume_from_checkpoint:
            totals = Path(resume_from_checkpoint, _TOTALS)
            if totals.is_file():
                found = json.loads(totals.read_text(encoding="utf-8"))
                self._total_train_tokens, self._total_frames = found["num_tokens"], found["num_frames"]
                self._seconds_before = found.get("seconds", 0.0)
        self._retry = None  # settings of checkpointing may have changed
        self._begun = time.monotonic()
        self.throughput.restart()
        self._labelled = self._unlabelled = 0
        try:
            with step_told(lambda: self.state.global_step):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._bars is not None:  # an error or Ctrl-C has a line of its own
                self._bars.close()
        counts = torch.tensor([self._labelled, self._unlabelled], device=self.accelerator.device)
        labelled, unlabelled = self.accelerator.reduce(counts, "sum").tolist()
        if unlabelled and not labelled:
            raise ValueError(
                f"nothing was learnt: not one of {unlabelled} batches held a label. Look at the samples with "
                f"`video-ma2mba data check`; broken ones are listed in {Path(self.args.output_dir, BROKEN_SAMPLES)}"
            )
        return output

    def write_beside(self, folder: Path) -> None:
        """Tokens, frames and seconds so far."""
        totals = {"num_tokens": self.tokens_seen, "num_frames": self.frames_seen, "seconds": self.seconds_trained}
        write_whole(folder / _TOTALS, json.dumps(totals) + "\n")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `output_dir`/README.md: sizes, use, and how the model was trained."""
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        adapter = next(iter(model.peft_config.values())).to_dict() if hasattr(model, "peft_config") else None
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        self.write_card(
            self.args.output_dir, model if adapter else self.video_model, adapter, model_name, dataset_name, tags
        )

    def write_card(
        self,
        folder: str | Path,
        model: nn.Module,
        adapter: dict[str, Any] | None = None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Write `folder`/README.md about a model that came out of this run: `create_model_card`, or a merged one."""
        write_training_card(
            Path(folder, "README.md"),
            model,
            self.args,
            self.state,
            name=self.args.hub_model_id or model_name or Path(self.args.output_dir).name,
            adapter=adapter,
            data=dataset_name or self.data_name,
            processes=self.accelerator.num_processes,
            tags=[*self._tag_names, *tags],
        )
