"""Batches of samples of like length, in an order that a resumed run draws again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


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
