"""Settings of `VideoMa2mbaTrainer`: those of TRL's `SFTConfig`, and what video and Mamba-2 add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from ..modeling_video_ma2mba.recompute_schedule import SCHEDULES
from .run_settings import accumulation_steps, check_clock, fit_batches_to_machine, fit_to_machine

LABELS = ("answers", "captions")
CARRIED = ("through", "cut")
"""What may become of the state's gradient between windows."""

_NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class VideoMa2mbaTrainingConfig(SFTConfig):
    """Everything that decides a run, beyond the model and the data.

    Differs from `SFTConfig` where video needs it: no `max_length` by default; columns are never removed; bf16 is on
    where there is CUDA and off elsewhere; batches stay on the host until they are used.
    """

    max_length: int | None = _option(
        None,
        "Tokens of the longest sample, and of a pack; frames are dropped evenly to meet it, text is never cut.",
    )
    packing: bool = _option(
        False, "Put several whole samples into one row of max_length tokens; the state restarts at each."
    )
    remove_unused_columns: bool = _option(False, "The collator reads every column.")
    train_parts: str | None = _option(
        None, "Parts that train, of lm, projector and vision, separated by commas; unset: as the model comes."
    )
    vision_learning_rate: float | None = _option(None, "Of the vision tower; unset: learning_rate.")
    projector_learning_rate: float | None = _option(None, "Of the projector; unset: learning_rate.")
    global_batch_size: int | None = _option(
        None, "Samples of one optimizer step over all processes; sets gradient_accumulation_steps."
    )
    adaptive_plan: bool = _option(
        True, "Choose per batch: no recomputation where that fits, else the fastest multi-axis plan that fits."
    )
    oom_retry: bool = _option(True, "Repeat a step that ran out of memory once, under the next smaller plan.")
    context_parallel_size: int = _option(
        1, "Processes that share every sample, each with segments of its video; the others are replicas."
    )
    context_parallel_schedule: str = _option(
        "round_robin",
        "How these share it: round_robin, stretches, or heads (all-to-all, the number must divide heads).",
    )
    carry_state: str | None = _option(
        None,
        "Read samples in windows of carry_window tokens, the state passing on: its gradient goes through the borders "
        "(through: as in one window) or not (cut: truncated backpropagation through time).",
    )
    carry_window: int | None = _option(None, "Tokens of such a window.")
    labels: str = _option("answers", "What is learned: answers (of the assistant) or captions (all text).")
    fps: float = _option(1.0, "Frames read per second of video.")
    max_frames: int | None = _option(None, "Longer videos are read with this many frames, evenly spread.")
    frame_times: str | None = _option(
        None, "How times of frames are read from now on: none, text or learned; unset: as the model does."
    )
    frame_times_every: float | None = _option(None, "Seconds between two of them; unset: as the model does.")
    early_stopping_patience: int | None = _option(
        None, "Stop after this many evaluations without improvement (needs eval_strategy)."
    )
    max_seconds: float | None = _option(
        None, "Length of training by the clock, over all resumed parts; the learning rate follows it."
    )
    stop_after: float | None = _option(None, "Seconds after which this part of a run saves and stops, to be resumed.")
    save_seconds: float | None = _option(None, "Seconds between checkpoints, beside what save_strategy asks for.")
    base_model: str | None = _option(None, "Hub id of the model that training starts from, for the model card.")
    license: str | None = _option(None, "Licence of the result, for the model card, such as apache-2.0.")

    def __post_init__(self) -> None:
        fit_to_machine(self)
        if self.padding_free:
            raise ValueError("padding_free=True does not work with video: set packing=True, which needs no padding")
        if self.packing:
            self._check_packing()
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r} is not valid: use one of {', '.join(LABELS)}")
        if self.assistant_only_loss and self.labels != "answers":
            raise ValueError("assistant_only_loss=True means labels='answers': set one of them only")
        self.assistant_only_loss = False  # our collator writes the labels
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every rank touches every part in every step
        self.dims  # noqa: B018  # checks context_parallel_size
        if self.context_parallel_schedule not in SCHEDULES:
            raise ValueError(
                f"context_parallel_schedule={self.context_parallel_schedule!r} is not valid: use one of "
                f"{', '.join(SCHEDULES)}"
            )
        self._check_windows()
        if self.global_batch_size is not None:
            groups = self.dims.batches
            name = "processes" if self.context_parallel_size == 1 else "groups of processes"
            self.gradient_accumulation_steps = accumulation_steps(self, groups, f"samples x {groups} {name}")
        if self.early_stopping_patience is not None:
            if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
                raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to steps or epoch")
            self.load_best_model_at_end = True
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if self.frame_times is None and self.frame_times_every is not None:
            raise ValueError("frame_times_every needs frame_times: text or learned")
        check_clock(self)
        for old, new in _NEW_NAMES.items():  # of transformers 5.23, which warns about the old ones, TRL's default too
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        fit_batches_to_machine(self)

    def _check_packing(self) -> None:
        if self.max_length is None:
            raise ValueError("packing=True needs max_length: the tokens of a pack")
        if self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} cuts samples, and no video can be cut: leave it at bfd"
            )
        if self.eval_packing:
            raise ValueError(
                "eval_packing=True changes nothing: evaluation losses are means over tokens, leave it out"
            )
        if self.train_sampling_strategy == "group_by_length":
            self.train_sampling_strategy = "random"  # packs are of one length

    def _check_windows(self) -> None:
        if self.carry_state not in (None, *CARRIED):
            raise ValueError(f"carry_state={self.carry_state!r} is not valid: use {' or '.join(CARRIED)}")
        if (self.carry_state is None) != (self.carry_window is None):
            raise ValueError("carry_state and carry_window (tokens of a window) belong together: give both, or none")
        if self.carry_state is not None and self.context_parallel_size > 1:
            raise ValueError(
                "carry_state reads one window after the other, which processes cannot share: leave it out, or "
                "context_parallel_size=1"
            )

    @property
    def dims(self) -> ParallelDims:
        """How the processes of this run share the work.

        Raises:
            ValueError: `context_parallel_size` does not divide their number.
        """
        size = self.context_parallel_size
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"context_parallel_size={size} is not valid: it must be a whole number of at least 1")
        processes = ParallelDims.of_run().world
        if processes % size:
            raise ValueError(
                f"context_parallel_size={size} does not go into {processes} process{'es' if processes > 1 else ''}: "
                f"start a multiple of {size}, as with torchrun --nproc_per_node {size} -m video_ma2mba train …"
            )
        return ParallelDims.of_run(sequence=size)

    @property
    def parts(self) -> tuple[str, ...] | None:
        """`train_parts` as names, None for "as the model comes"."""
        if self.train_parts is None:
            return None
        return tuple(part.strip() for part in self.train_parts.split(",") if part.strip())
