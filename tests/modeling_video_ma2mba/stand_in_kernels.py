"""Backends that keep the kernels' interface and compute in PyTorch: the functions around kernels run on any device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from video_ma2mba.modeling_video_ma2mba import ops_registry
from video_ma2mba.modeling_video_ma2mba.ops_registry import Backend, Operation, force_backend

NAME = "stand-in"


def pair_of(
    function: Callable[..., Any], *, into: Sequence[int] = (), keeps: Sequence[int] = (), **fields: Any
) -> Backend:
    """A backend of forward and backward from a differentiable `function` of tensors and options.

    Args:
        into: positions of the tensors whose gradients a caller may want in buffers of its own.
        keeps: positions of the tensors that backward takes from what forward kept, as a scan does with its states.
    """

    def forward(*tensors: Tensor | None, **options: Any) -> tuple[tuple[Tensor, ...], tuple]:
        results = function(*tensors, **options)
        return (results if isinstance(results, tuple) else (results,)), tuple(tensors[i] for i in keeps)

    def backward(
        tensors: tuple[Tensor | None, ...],
        kept: tuple,
        gradients: tuple[Tensor | None, ...],
        buffers: Any = None,
        **options: Any,
    ) -> tuple[Tensor | None, ...]:
        tensors = [kept[keeps.index(i)] if i in keeps else t for i, t in enumerate(tensors)]
        wanted = [None if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            results, _ = forward(*(t if w is None else w for t, w in zip(tensors, wanted, strict=True)), **options)
        outputs = [result for result, gradient in zip(results, gradients, strict=True) if gradient is not None]
        leaves = [w for w in wanted if w is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        found = torch.autograd.grad(outputs, leaves, given, materialize_grads=True)
        found = iter(found)
        result = [None if w is None else next(found) for w in wanted]
        if buffers is not None:
            for position, buffer in zip(into, [buffers] if isinstance(buffers, Tensor) else buffers, strict=True):
                buffer.copy_(result[position])
        return tuple(result)

    return Backend(NAME, forward, backward, **fields)


@contextmanager
def standing_in(backends: dict[Operation, Backend]) -> Iterator[None]:
    """Inside, the operations run on these backends."""
    before = {operation: operation.backends for operation in backends}
    ops_registry._names.add(NAME)
    try:
        for operation, backend in backends.items():
            operation.backends = (backend, *operation.backends)
        with force_backend(NAME):
            yield
    finally:
        ops_registry._names.discard(NAME)
        for operation, own in before.items():
            operation.backends = own
