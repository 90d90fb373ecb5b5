"""What goes into the trainer where the caller gives no more than names: the model, the collator, sample lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from ..conversion.released import usable_folder
from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from .training_config import VideoMa2mbaTrainingConfig

BROKEN_SAMPLES = "broken_samples.jsonl"
BROKEN_EVAL_SAMPLES = "broken_eval_samples.jsonl"


def load_for_training(source: str, args: VideoMa2mbaTrainingConfig) -> VideoMa2mbaForConditionalGeneration:
    """Load a model from a directory or the Hub, in fp32 unless `args.model_init_kwargs` says otherwise."""
    options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    return VideoMa2mbaForConditionalGeneration.from_pretrained(
        usable_folder(source, options.get("revision")), **options
    )


def default_collator(processor: Any, args: VideoMa2mbaTrainingConfig, train_dataset: Any, clip_frames: int = 1) -> Any:
    """The collator of chats about videos that `args` describe; broken samples are listed in
    output_dir/broken_samples.jsonl, and others of `train_dataset` take the place of a batch of nothing else. A tower
    may look at `clip_frames` frames together."""
    from .data import BrokenSamples, VideoChatCollator
    from .data.collator import SequenceShare

    dims, share = args.dims, None
    if dims.sequence > 1:
        given = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None) or {}
        share = SequenceShare(
            dims.sequence_rank, dims.sequence, given.get("segment_length"), clip_frames, args.context_parallel_schedule
        )
    return VideoChatCollator(
        processor,
        labels=args.labels,
        fps=args.fps,
        max_frames=args.max_frames,
        max_length=args.max_length,
        report=BrokenSamples(Path(args.output_dir, BROKEN_SAMPLES)),
        replacements=train_dataset if has_length(train_dataset) else None,
        share=share,
    )


def checked_rows(data: Any) -> Any:
    """A data set that the default collator is to read, its videos and images left undecoded until then.

    Raises:
        ValueError: its columns are of no form that is understood.
    """
    from datasets import Dataset, IterableDataset

    from .data.row_formats import UnknownFormError, detect_format

    if isinstance(data, dict):
        return {name: checked_rows(part) for name, part in data.items()}
    if not isinstance(data, Dataset | IterableDataset):
        return data
    if data.column_names and not {"messages", "problem"} <= set(data.column_names):
        try:
            detect_format(data.column_names, "the data set")
        except UnknownFormError as error:
            raise ValueError(f"{error}, or give the trainer a data_collator that understands them") from error
    return undecoded_rows(data)


def undecoded_rows(data: Any) -> Any:
    """A data set (or a dictionary of several) whose videos and images are left as path and bytes."""
    from datasets import Dataset, IterableDataset

    from .data.dataset_rows import undecoded

    if isinstance(data, dict):
        return {name: undecoded_rows(part) for name, part in data.items()}
    return undecoded(data) if isinstance(data, Dataset | IterableDataset) else data


def evaluation_collator(collator: Any, args: VideoMa2mbaTrainingConfig) -> Any:
    """The collator for evaluation: ours without replacements, listing in output_dir/broken_eval_samples.jsonl; any
    other as it is."""
    from .data import BrokenSamples

    if not hasattr(collator, "for_evaluation"):
        return collator
    return collator.for_evaluation(BrokenSamples(Path(args.output_dir, BROKEN_EVAL_SAMPLES)))


def sample_lengths(dataset: Any, processor: Any, args: VideoMa2mbaTrainingConfig) -> list[int]:
    """Tokens of every sample, about, from the videos' headers; kept in output_dir for the next start."""
    from .data import estimated_lengths

    with args.main_process_first(desc="lengths"):
        return estimated_lengths(
            dataset,
            processor,
            labels=args.labels,
            fps=args.fps,
            max_frames=args.max_frames,
            max_length=args.max_length,
            cache=Path(args.output_dir, "video_lengths.jsonl"),
        )


def packed_rows(data: Any, processor: Any, args: VideoMa2mbaTrainingConfig) -> Any:
    """Rows that are read, some whole ones in each of `max_length` tokens (`packing=True`).

    Raises:
        ValueError: they are not rows of `datasets`.
    """
    from datasets import Dataset, IterableDataset

    from .data.lengths import TimingCache, estimated_length
    from .data.packing import PackedRows, PackedStream, cut_texts
    from .data.sample_encoding import EncodingSettings

    assert args.max_length is not None  # the arguments were checked
    if isinstance(data, Dataset | IterableDataset) and "messages" in (data.column_names or ["messages"]):
        with args.main_process_first(desc="texts"):
            data = cut_texts(data, processor.tokenizer, args.max_length)
    if isinstance(data, Dataset):
        return PackedRows(data, sample_lengths(data, processor, args), args.max_length)
    if not isinstance(data, IterableDataset):
        raise ValueError(f"packing=True needs a data set of `datasets`, not {type(data).__name__}")
    settings = EncodingSettings(args.labels, args.fps, None, args.max_frames, args.max_length)
    length = partial(estimated_length, processor=processor, settings=settings, timings=TimingCache())
    return PackedStream(data, length, args.max_length)


def keep_on_host(loader: DataLoader) -> DataLoader:
    """Keep batches on the host: `get_batch_samples` fetches all of an optimizer step before the first one is used,
    and an hour of frames is a gigabyte."""
    if hasattr(loader, "device"):
        loader.device = None
    return loader


@contextlib.contextmanager
def batches_for_groups(accelerator: Any, dims: ParallelDims) -> Iterator[None]:
    """Inside, data loaders that `accelerator` prepares give the same batches to all processes that share samples."""
    plain = accelerator.prepare_data_loader
    if dims.sequence == 1:
        yield
        return

    def prepare(loader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=dims.batches,
            process_index=dims.batch_rank,
            put_on_device=False,
            rng_types=list(accelerator.rng_types or []),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
        )

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        accelerator.prepare_data_loader = plain


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' length-grouped order, drawn from seed and epoch alone: every process and every resumed run agree.

    Args:
        lengths: tokens of each sample, about. batch_size: samples of one optimizer step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return super().__iter__()
