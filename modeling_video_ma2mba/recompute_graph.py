"""Cells as replayed CUDA graphs, for segments so short that the host could not launch their kernels fast enough.

A block's full-length cells are the same list of kernels, segment after segment and step after step. Each is captured
the first time it runs after another block's has (compiling cannot be captured): forward, recomputation and backward of
its layers, from buffers to buffers that all blocks share. What surrounds the layers (the final norm at wanted
positions, stores, borders, sums of gradients) runs as ever, so orders of cells and kept activations know nothing of
it. The graphs' memory is one cell's, and the buffers'.

Legend: B batch, s tokens of a segment, D width.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .mixer_mamba2 import run_blocks
from .recompute_plan import RecomputePlan
from .stack_protocols import Blocks
from .state_layers import KINDS, flatten, regroup

_on_any_device = False


class CellGraphs:
    """The graphs of cells of one shape, over weights in one place; kept from step to step.

    Args:
        key: of `graphs_for`. blocks: layers by block. shape: (B, s, D). around: a context to compute within.
    """

    def __init__(
        self,
        key: Any,
        blocks: Sequence[Sequence[nn.Module]],
        shape: tuple[int, int, int],
        stream_dtype: torch.dtype,
        device: torch.device,
        around: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.key, self.failed = key, False
        self._buffers = _Buffers(shape, stream_dtype, device, blocks)
        self._layers, self._around = blocks, around
        # One stream for all captures: the allocator gives memory that was freed on one to no other.
        cuda = device.type == "cuda"
        self._place = (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if cuda else None
        self._blocks: dict[int, BlockGraphs] = {}
        self._warm: set[bool] = set()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(len(block.runs) for block in self._blocks.values())

    def ran(self, delta: Tensor, states: Sequence[Tensor], backward: bool) -> None:
        """A full-length cell has run as it does without graphs: its kernels are compiled, its types known."""
        self._buffers.like(delta, states)
        self._warm.add(backward)

    def of(self, block: int, kinds: Sequence[str], backward: bool) -> "BlockGraphs | None":
        """The graphs of a block, captured now if they are not there; None before a cell `ran`, or if that fails.

        Args:
            kinds: of its layers' states.
        """
        if self.failed or backward not in self._warm:
            return None
        try:
            if block not in self._blocks:
                last = block == len(self._layers) - 1
                layers = self._layers[block]
                self._blocks[block] = BlockGraphs(self._buffers, layers, kinds, last, self._around, self._place)
            self._blocks[block].capture(backward)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of CUDA, or of Triton's compiler, which has errors of its own
            self.failed, self._blocks = True, {}
            warnings.warn(f"cells could not be captured ({error}); they run without CUDA graphs", stacklevel=2)
            return None
        return self._blocks[block]


def graphs_for(
    before: CellGraphs | None,
    layers: Blocks,
    x: Tensor,
    plan: RecomputePlan,
    stream_dtype: torch.dtype,
    device: torch.device,
) -> CellGraphs | None:
    """The graphs of a step's full-length cells: those of the step before if they serve. None where cells are better
    off without: large, few, or of layers whose calls are more than kernels.

    Args:
        x: (B, S, D) the stack's input.
    """
    rows, tokens, width = x.shape
    if before is not None and before.failed:
        return before
    usual = device.type == "cuda" and plan.replayed(rows, tokens, width)
    if not (usual or _on_any_device) or not _plain(layers):
        return None
    mixed, kind = torch.is_autocast_enabled(device.type), device.type
    dtype = torch.get_autocast_dtype(kind)
    weights = tuple((p.data_ptr(), p.requires_grad) for p in layers.parameters())
    key = (plan.layers_per_block, plan.segment_length, rows, stream_dtype, device, mixed, dtype, weights)
    if before is not None and before.key == key:
        return before
    # The cache of autocast would outlive a replay, or begin before it.
    around = functools.partial(torch.autocast, kind, dtype, mixed, cache_enabled=False)
    blocks = [[layers[i] for i in block] for block in plan.blocks(len(layers))]
    return CellGraphs(key, blocks, (rows, plan.segment_length, width), stream_dtype, device, around)


@contextlib.contextmanager
def graphs_on_any_device() -> Iterator[None]:
    """For tests: inside, cells of any size on any device; on a CPU a replay calls the same functions again."""
    global _on_any_device
    before, _on_any_device = _on_any_device, True
    try:
        yield
    finally:
        _on_any_device = before


class _Buffers:
    """Where graphs read and write; all blocks use the same, one after the other."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        stream_dtype: torch.dtype,
        device: torch.device,
        blocks: Sequence[Sequence[nn.Module]],
    ) -> None:
        # Not views of one tensor: autograd would take a write to one for a write to all.
        self.x, self.y, self.dx, self.dy = (torch.empty(shape, dtype=stream_dtype, device=device) for _ in range(4))
        self.delta = self.ddelta = self.x
        self.states: list[Tensor] = []
        self.ends: list[Tensor] = []
        sizes: dict[torch.dtype, int] = {}
        for layers in blocks:
            for dtype, numbers in _numbers(_trainable(layers)).items():
                sizes[dtype] = max(sizes.get(dtype, 0), numbers)
        self.gradients = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}

    def like(self, delta: Tensor, states: Sequence[Tensor]) -> None:
        """Make those buffers whose types only a cell tells, for blocks of as many layers."""
        if self.delta is self.x:
            self.delta, self.ddelta = torch.empty_like(delta), torch.empty_like(delta)
        for state in states[len(self.states) :]:
            self.states.append(torch.empty_like(state))
            self.ends.append(torch.empty_like(state))


class BlockGraphs:
    """Forward, recomputation and backward of one block's layers over one full-length segment."""

    def __init__(
        self,
        buffers: _Buffers,
        layers: Sequence[nn.Module],
        kinds: Sequence[str],
        last: bool,
        around: Callable[[], AbstractContextManager[object]],
        place: tuple[Any, torch.cuda.Stream] | None,
    ) -> None:
        self._buffers, self._kinds, self._last, self._around, self._place = buffers, kinds, last, around, place
        self._states = sum(len(KINDS[kind]._fields) for kind in kinds)
        # Parameters under other names, whose gradients autograd takes on the capturing stream and nowhere else.
        aliases: dict[int, Any] = {}
        for p in nn.ModuleList(layers).parameters():
            aliases[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        self._layers = [copy.deepcopy(layer, aliases) for layer in layers]
        self._parameters = _trainable(self._layers)
        self._open: tuple[list[Tensor], list[Tensor]] | None = None  # leaves and results of a recomputation
        self._reached: list[bool] = []
        self.runs: dict[str, Callable[[], object]] = {}

    def capture(self, backward: bool) -> None:
        """Capture what is not there."""
        for name in ("recompute", "backward") if backward else ("forward",):
            if name not in self.runs:
                self.runs[name] = self._recorded(getattr(self, f"_{name}"))

    def _recorded(self, run: Callable[[], None]) -> Callable[[], object]:
        if self._place is None:
            return run
        (pool, stream), graph = self._place, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _load(self, x: Tensor, states: Sequence[Tensor]) -> None:
        self._buffers.x.copy_(x)
        _fill(self._buffers.states[: self._states], states)

    # --------------------------------------------------------------------------------- from outside
    def forward(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `run_blocks` without gradients: (B, s, D) residual and delta, which the next replay overwrites, and the
        states, which it does not. No `states` is the start of a sequence."""
        self._load(x, states)
        self.runs["forward"]()
        return self._buffers.y, self._buffers.delta, _copies(self._buffers.ends[: self._states])

    def recompute(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward`, and get ready for `backward`. The results only count of the stack's last block."""
        self._load(x, states)
        self.runs["recompute"]()
        return self._buffers.y, self._buffers.delta

    def backward(
        self, dy: Tensor, ddelta: Tensor, dstates: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """Gradients of x, of the states and of the trainable parameters, from those of the results (None: zero)."""
        buffers = self._buffers
        buffers.dy.copy_(dy)
        buffers.ddelta.copy_(ddelta)
        _fill(buffers.ends[: self._states], dstates)
        self.runs["backward"]()
        whole = {dtype: flat.clone() for dtype, flat in self._flat().items()}
        gradients: list[Tensor | None] = []
        for view, reached in zip(_views(whole, self._parameters), self._reached, strict=True):
            gradients.append(view if reached else None)
        return buffers.dx.clone(), [*_copies(buffers.states[: self._states])], gradients

    # ------------------------------------------------------------------------------ what is captured
    def _forward(self) -> None:
        buffers = self._buffers
        with torch.no_grad(), self._around():
            states = regroup(self._kinds, buffers.states)
            y, delta, ends = run_blocks(self._layers, buffers.x, states)
        buffers.y.copy_(y)
        buffers.delta.copy_(delta)
        _fill(buffers.ends[: self._states], flatten(ends))

    def _recompute(self) -> None:
        buffers = self._buffers
        x, *states = leaves = [t.detach().requires_grad_() for t in (buffers.x, *buffers.states[: self._states])]
        with torch.enable_grad(), self._around():
            y, delta, ends = run_blocks(self._layers, x, regroup(self._kinds, states), unread=not self._last)
        if self._last:
            buffers.y.copy_(y.detach())
            buffers.delta.copy_(delta.detach())
        self._open = leaves, [y, delta, *flatten(ends)]

    def _backward(self) -> None:
        assert self._open is not None
        buffers, (leaves, results) = self._buffers, self._open
        self._open = None
        given = [buffers.dy, buffers.ddelta, *buffers.ends[: self._states]]
        wanted = [*leaves, *self._parameters]
        dx, *found = torch.autograd.grad(results, wanted, given, allow_unused=True)
        dstates, gradients = found[: self._states], found[self._states :]
        _fill([buffers.dx, *buffers.states[: self._states]], [dx, *dstates])
        self._reached = [gradient is not None for gradient in gradients]
        _fill(_views(self._flat(), self._parameters), gradients)

    def _flat(self) -> dict[torch.dtype, Tensor]:
        numbers = _numbers(self._parameters)
        return {dtype: self._buffers.gradients[dtype][:count] for dtype, count in numbers.items()}


def _plain(layers: Blocks) -> bool:
    """Whether calling the layers is launching kernels and nothing else: no hooks, no weights of a type of their own,
    no forward put in the place of a class's."""
    for part in layers.modules():
        attributes = vars(part)
        if "forward" in attributes:
            return False
        if any(hooks for name, hooks in attributes.items() if name.endswith("hooks") and "state_dict" not in name):
            return False
        if any(True for _ in part.buffers(recurse=False)):
            return False
    return all(type(p) is nn.Parameter for p in layers.parameters())


def _trainable(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    return list({id(p): p for layer in layers for p in layer.parameters() if p.requires_grad}.values())


def _numbers(parameters: Iterable[Tensor]) -> dict[torch.dtype, int]:
    counts: dict[torch.dtype, int] = {}
    for p in parameters:
        counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return counts


def _views(flat: dict[torch.dtype, Tensor], parameters: Iterable[Tensor]) -> list[Tensor]:
    """Pieces of one tensor for each type, in the parameters' shapes."""
    taken = dict.fromkeys(flat, 0)
    views = []
    for p in parameters:
        start = taken[p.dtype]
        taken[p.dtype] += p.numel()
        views.append(flat[p.dtype][start : taken[p.dtype]].view(p.shape))
    return views


def _fill(buffers: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copy values into buffers, in few launches; no value, or none at all, is zero."""
    given = dict(enumerate(values))
    empty = [buffer for index, buffer in enumerate(buffers) if given.get(index) is None]
    if empty:
        torch._foreach_zero_(empty)
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for buffer, value in zip(buffers, values, strict=False):
        if value is not None:
            into, source = by_type.setdefault(buffer.dtype, ([], []))
            into.append(buffer)
            source.append(value)
    for into, source in by_type.values():
        torch._foreach_copy_(into, source)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    _fill(copies, tensors)
    return copies
