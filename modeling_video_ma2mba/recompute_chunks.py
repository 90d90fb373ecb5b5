"""Run a function over chunks of its input, keep no activations, run each chunk again in backward.

One autograd function serves the vision tower (chunks of frames) and the loss (chunks of positions). Parameters are
inputs of the node: their gradients are summed over chunks in at least fp32 and handed to autograd once per backward,
so that the gradient hooks of DDP, ZeRO and FSDP fire once. Inner `.backward()` calls would fire them once per chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .parallel_gradients import gradient_dtype
from .recompute_random import RandomState, random_state_kept


@dataclass
class RowLayout:
    """Where computed and text rows go in an output of `total_rows` rows; positions are int64 on the CPU.

    `computed_rows=None`: the computed rows fill the whole output in order.
    """

    total_rows: int
    device: torch.device
    computed_rows: Tensor | None = None
    text_rows: Tensor | None = None

    def target(self, first: int, last: int) -> slice | Tensor:
        """Output rows of computed rows `first..last`: a slice where they are consecutive, which is nearly always."""
        if self.computed_rows is None:
            return slice(first, last)
        rows = self.computed_rows[first:last]
        if len(rows) and bool((rows[1:] - rows[:-1] == 1).all()):
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows.to(self.device)


@dataclass
class ChunkJob:
    """What to run and where its rows go.

    Args:
        run: `(piece, first) -> rows`: maps the piece that begins at item `first` of the source to
            `(len(piece) * rows_per_item, width)`.
        chunk: items a piece, or the length of every piece.
        devices: every device that `run` computes on; the random state of each is replayed.
    """

    run: Callable[[Tensor, int], Tensor]
    chunk: int | list[int]
    rows_per_item: int
    width: int
    dtype: torch.dtype
    layout: RowLayout
    devices: list[torch.device]

    @property
    def device_type(self) -> str:
        """ "cuda", "mps" or "cpu": of the device that the chunks run on, for autocast."""
        return self.devices[0].type

    def pieces(self, source: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The pieces of `source`, each with the number of its first item."""
        first = 0
        for piece in source.split(self.chunk) if len(source) else ():
            yield first, piece
            first += len(piece)


def fill_rows(
    job: ChunkJob, source: Tensor, text: Tensor | None = None, before_chunk: Callable[[], None] | None = None
) -> Tensor:
    """Run all chunks as the surrounding grad mode says and collect their rows: `(total_rows, width)`.

    Rows for a CUDA model that are to stay on the host are put in pinned memory, from where copies overlap compute.
    """
    out = torch.empty(
        job.layout.total_rows,
        job.width,
        dtype=job.dtype,
        device=job.layout.device,
        pin_memory=job.layout.device.type == "cpu" and job.device_type == "cuda",
    )
    if text is not None and job.layout.text_rows is not None:
        out[job.layout.text_rows.to(out.device)] = text.to(out.device, out.dtype)
    for first, piece in job.pieces(source):
        if before_chunk is not None:
            before_chunk()
        rows = job.run(piece, first)
        target = job.layout.target(first * job.rows_per_item, first * job.rows_per_item + len(rows))
        out[target] = rows.to(out.device, out.dtype)
    return out


class ChunkedRows(torch.autograd.Function):
    """`ChunkedRows.apply(job, source, text, *parameters)` is `fill_rows(job, source, text)` with gradients.

    Gradients flow to `source` (the items), `text` and `parameters` (every tensor with a gradient that `job.run` uses).
    Each chunk is recomputed under the autocast setting and the random state it had in forward.
    """

    @staticmethod
    def forward(ctx: Any, job: ChunkJob, source: Tensor, text: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.autocast = {
            "device_type": job.device_type,
            "enabled": torch.is_autocast_enabled(job.device_type),
            "dtype": torch.get_autocast_dtype(job.device_type),
            # A weight cast here, without a graph, must not be found in the cache by code that wants its gradient.
            "cache_enabled": False,
        }
        ctx.random_states = []

        def keep_random_state() -> None:
            ctx.random_states.append(RandomState(*job.devices))

        with torch.autocast(**ctx.autocast):
            out = fill_rows(job, source, text, keep_random_state)
        ctx.job, ctx.parameters, ctx.text_like = job, parameters, None if text is None else text[:0]
        ctx.save_for_backward(source)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        job, parameters = ctx.job, ctx.parameters
        (source,) = ctx.saved_tensors
        grad_text = None
        if ctx.needs_input_grad[2]:
            rows = job.layout.text_rows.to(grad.device)
            grad_text = grad[rows].to(ctx.text_like.device, ctx.text_like.dtype)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        grad_source = torch.empty_like(source) if ctx.needs_input_grad[1] else None
        if not wanted and grad_source is None:
            return (None, None, grad_text, *(None for _ in parameters))

        sums: list[Tensor | None] = [None] * len(parameters)
        with random_state_kept(*job.devices):
            for index, (first, part) in enumerate(job.pieces(source)):
                ctx.random_states[index].put_back()
                piece = part.detach().requires_grad_(grad_source is not None)
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    rows = job.run(piece, first)
                target = job.layout.target(first * job.rows_per_item, first * job.rows_per_item + len(rows))
                asked = [parameters[i] for i in wanted] + ([piece] if grad_source is not None else [])
                found = torch.autograd.grad(rows, asked, grad[target].to(rows.device, rows.dtype), allow_unused=True)
                for i, gradient in zip(wanted, found, strict=False):
                    if gradient is not None:
                        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                        before = sums[i]
                        sums[i] = wide if before is None else before.add_(wide)
                if grad_source is not None:
                    grad_source[first : first + len(part)] = found[-1]
        grads = [None if s is None else s.to(gradient_dtype(p)) for s, p in zip(sums, parameters, strict=True)]
        return (None, grad_source, grad_text, *grads)
