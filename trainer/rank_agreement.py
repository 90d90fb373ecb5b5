"""Lets data-parallel processes give up a micro-batch together when one of them runs out of memory.

DistributedDataParallel sums gradients up while a backward pass runs: a process that fails in the middle leaves the
others waiting for ever, and what was summed cannot be taken back. Here every process works for itself until all have
come through forward, and again until all have come through backward; gradients are averaged once, after the last
micro-batch of a step. The price is that the averaging no longer hides behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..modeling_video_ma2mba.parallel_dims import ParallelDims

_BUCKET = 64 << 20  # bytes that are averaged at once


class OtherProcessShortage(torch.OutOfMemoryError):
    """Another process ran out of memory."""


class RankAgreement:
    """The processes of one DistributedDataParallel run. All of them must call the same methods in the same order.

    Args:
        accelerator: accelerate's, whose `gather_for_metrics` is the first thing collective after a forward pass.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.device = accelerator, accelerator.device

    def all(self, fine: bool) -> bool:
        """Whether all processes say so."""
        flag = torch.tensor([int(fine)], dtype=torch.int32, device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
        return bool(flag)

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """A forward and backward pass that synchronises nothing but metrics.

        Raises:
            torch.OutOfMemoryError: here; the others raise OtherProcessShortage at the same time.
        """
        gather, forward_agreed = self.accelerator.gather_for_metrics, False

        def gather_once_all_are_here(*args: Any, **kwargs: Any) -> Any:
            nonlocal forward_agreed
            if not forward_agreed:
                self._agree()
                forward_agreed = True
            return gather(*args, **kwargs)

        self.accelerator.gather_for_metrics = gather_once_all_are_here
        try:
            loss = step()
        except OtherProcessShortage:
            raise
        except torch.OutOfMemoryError:
            self.all(False)
            raise
        finally:
            del self.accelerator.gather_for_metrics  # the class's own comes back
        self._agree()
        return loss

    def _agree(self) -> None:
        if not self.all(True):
            raise OtherProcessShortage("another process ran out of memory: its own message says more")

    @staticmethod
    def average_gradients(model: nn.Module) -> None:
        """Replace every gradient by the mean over all processes; where there is none, it counts as 0."""
        batches = ParallelDims.of_run().batches
        for parameters in _buckets(p for p in model.parameters() if p.requires_grad):
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            distributed.all_reduce(flat)
            flat /= batches
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type, about `_BUCKET` bytes at a time."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or sum(p.nbytes for p in bucket) >= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
