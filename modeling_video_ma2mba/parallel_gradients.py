"""Gradients of processes that work on one sample: each has a part, and parts are added up before they are rounded.

Autograd keeps a gradient in its parameter's type. A part that is rounded to 16 bits before the others are added costs
precision that one process keeps, so 16-bit parameters have gradients in fp32 while a step is shared.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

_BUCKET = 1 << 22  # numbers that are added up at once; larger gradients by themselves
_MOST_UNDER_WAY = 4  # sums, before the first of them is waited for


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which autograd keeps a parameter's gradient."""
    kept: torch.dtype | None = parameter.grad_dtype if parameter.is_leaf else None
    return kept or parameter.dtype


def gradient_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter's gradient."""
    return parameter.numel() * gradient_dtype(parameter).itemsize


def keep_wide(parameters: Iterable[nn.Parameter]) -> None:
    """Keep gradients of 16-bit parameters in fp32, until `add_up`; to be called before the forward pass."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            _keep(parameter, torch.float32, parameter.grad)


def add_up(parameters: Iterable[nn.Parameter], group: Any = None, divisor: int = 1) -> None:
    """Replace every gradient by the sum over the processes of a group, divided by `divisor`, in its parameter's type.

    Where a process has no gradient, it counts as zero; sums are made in at least fp32. All processes call this.

    Args:
        group: a process group; None: all processes.
    """
    under_way: deque[tuple[list[nn.Parameter], Tensor, Any]] = deque()
    for bucket in _buckets(parameter for parameter in parameters if parameter.requires_grad):
        flat = _flat(bucket)
        under_way.append((bucket, flat, distributed.all_reduce(flat, group=group, async_op=True)))
        if len(under_way) > _MOST_UNDER_WAY:
            _hand_out(*under_way.popleft(), divisor)
    while under_way:
        _hand_out(*under_way.popleft(), divisor)


def _flat(bucket: list[nn.Parameter]) -> Tensor:
    """Gradients one behind the other, in at least fp32; a large one that is so already stays where it is."""
    wide = torch.promote_types(bucket[0].dtype, torch.float32)
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
    return parts[0].to(wide) if len(parts) == 1 else torch.cat([part.to(wide) for part in parts])


def _hand_out(bucket: list[nn.Parameter], flat: Tensor, work: Any, divisor: int) -> None:
    work.wait()
    if divisor != 1:
        flat /= divisor
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        total = part.view_as(parameter)
        if parameter.grad is None or parameter.grad.dtype != parameter.dtype:
            _keep(parameter, parameter.dtype, total)
        elif parameter.grad.data_ptr() != total.data_ptr():
            parameter.grad.copy_(total)


def _keep(parameter: nn.Parameter, dtype: torch.dtype, gradient: Tensor | None) -> None:
    if gradient is not None:
        gradient = gradient.to(dtype, copy=gradient is not parameter.grad)
    parameter.grad = None  # the type of a gradient that is there cannot be changed
    parameter.grad_dtype = dtype
    parameter.grad = gradient


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type and device, at most `_BUCKET` numbers or one parameter at a time."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        numbers = sum(p.numel() for p in bucket) + parameter.numel()
        like = [(p.dtype, p.device) for p in (*bucket[:1], parameter)]
        if bucket and (like[0] != like[1] or numbers > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
