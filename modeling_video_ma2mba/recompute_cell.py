"""One cell of Multi-Axis Gradient Checkpointing: a block of layers over a segment of tokens.

The runner computes a cell, or computes it again and differentiates it. In which order cells run, where inputs wait
meanwhile and who else takes part is for others to know (`recompute_schedule`, `recompute_store`, `parallel_borders`).

Legend: B batch, S tokens, s tokens of a segment, D width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .mixer_mamba2 import run_blocks
from .parallel_borders import Gradients, States
from .parallel_heads import HeadShare
from .recompute_random import RandomState, random_state_kept
from .recompute_schedule import Cell
from .stack_protocols import TextStack
from .stack_token_layout import TokenLayout
from .stack_weights import sent
from .state_layers import LayerState, flatten, layer_kinds, regroup


class CellRunner:
    """Runs the cells of one step.

    Args:
        model: a `Ma2mbaTextModel`: `layers`, the final norm `norm_f`, `stream_dtype`.
        blocks: layer indices of each block. segments: first and past-the-last token of each segment.
        keep: (B, S) bool on the model's device, positions whose result is wanted; None for all.
        around: as in `run_blocks`. detect_anomaly: stop at the first value that is not finite.
        heads: where ranks share heads, of whose columns x is this rank's part.
    """

    def __init__(
        self,
        model: TextStack,
        blocks: Sequence[range],
        segments: Sequence[tuple[int, int]],
        layout: TokenLayout,
        keep: Tensor | None,
        around: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
        detect_anomaly: bool = False,
        heads: HeadShare | None = None,
    ) -> None:
        self.heads = heads
        self.columns = segments if heads is None else heads.columns
        self.layers, self.norm, self.stream_dtype = model.layers, model.norm_f, model.stream_dtype
        self.blocks, self.segments, self.layout, self.keep = blocks, segments, layout, keep
        self.around, self.detect_anomaly = around, detect_anomaly
        self.halo, self.kinds = model.config.conv_kernel - 1, layer_kinds(model.config)
        self.device = model.norm_f.weight.device
        kind = self.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.autocast = functools.partial(torch.autocast, kind, dtype, enabled)
        self.random = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in self.layers.modules()
        )
        self.random_states: dict[Cell, RandomState] = {}

    def is_last(self, block: int) -> bool:
        """Whether a block ends the stack; the final norm belongs to it."""
        return block == len(self.blocks) - 1

    def parameters(self, block: int) -> list[nn.Parameter]:
        """Trainable parameters of a block, in a fixed order."""
        modules: list[nn.Module] = [self.layers[i] for i in self.blocks[block]]
        if self.is_last(block):
            modules.append(self.norm)
        return list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())

    def forward(self, cell: Cell, x: Tensor, states: States) -> tuple[Tensor | None, States]:
        """One cell, for the first time.

        Args:
            x: stream (B, s, D) at the block's input. states: where it starts, see `parallel_borders`.

        Returns:
            the stream after the block; after the last one the normed result, (B, s, D) or the kept positions as
            (1, kept, D), None without any; then the states at the segment's end.
        """
        with self._same_randomness(cell, replay=False):
            y, delta, states = self._run(cell, x, states)
        return y if y is None or delta is None else y + delta, states

    def backward(
        self,
        cell: Cell,
        x: Tensor,
        states: States,
        dout: Tensor | None,
        dstates: Gradients,
        parameters: Sequence[nn.Parameter],
    ) -> tuple[Tensor, Gradients, Gradients]:
        """Compute one cell again and differentiate it.

        Args:
            x, states: as in `forward`. dout, dstates: gradients of its two results, None where there is none.

        Returns:
            gradients of x, of the states and of the given parameters.
        """
        x = x.detach().to(self.stream_dtype).requires_grad_()
        states = [s.detach().requires_grad_() for s in states]
        with torch.enable_grad(), self.autocast(), self._same_randomness(cell, replay=True):
            y, delta, ends = self._run(cell, x, states, again=True)
        outputs, gradients = [], []
        dstates = dstates or [None] * len(ends)
        for value, gradient in zip([y, delta, *ends], [dout, dout, *dstates], strict=True):
            if value is not None and gradient is not None:
                outputs.append(value)
                gradients.append(sent(gradient, value.device).to(value.dtype))
        wanted = [x, *states, *parameters]
        results: Gradients = [None] * len(wanted)
        if outputs:
            results = list(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        dx = results.pop(0)
        dx = torch.zeros_like(x) if dx is None else dx
        return dx, results[: len(states)], results[len(states) :]

    def _run(
        self, cell: Cell, x: Tensor, states: States, again: bool = False
    ) -> tuple[Tensor | None, Tensor | None, States]:
        """Residual and delta, whose sum is the stream; after the last block the normed result and None; the states."""
        block, segment = cell
        start, stop = self.segments[segment]
        lengths, seq_idx = self.layout.segment(start, stop, self.halo)
        last = self.is_last(block)
        layers = [self.layers[i] for i in self.blocks[block]]
        starts: Sequence[LayerState | None] = (
            regroup((self.kinds[i] for i in self.blocks[block]), states) if states else [None] * len(layers)
        )
        # In recomputation nobody looks at the stream after the block, only its gradient comes in.
        with contextlib.nullcontext() if self.heads is None else self.heads.within(layers, segment):
            y, delta, ends = run_blocks(layers, x, starts, lengths, seq_idx, again and not last, self.around)
        if self.detect_anomaly and not again and not bool(torch.isfinite(y + delta).all()):
            raise FloatingPointError(self._name_bad_layer(cell, x, ends))
        if not last:
            return y, delta, flatten(ends)
        if self.keep is not None:
            rows = self.keep[:, slice(*self.columns[segment])]
            y, delta = y[rows].unsqueeze(0), delta[rows].unsqueeze(0)
            if y.shape[1] == 0 and self.heads is None:  # ranks that share heads go through all layers together
                return None, None, flatten(ends)
        return self.norm(y, delta, self.norm.weight.dtype)[0], None, flatten(ends)

    def _name_bad_layer(self, cell: Cell, x: Tensor, states: Sequence[LayerState]) -> str:
        layers, (start, stop) = self.blocks[cell[0]], self.segments[cell[1]]
        where = f"tokens {start} to {stop - 1} (segment {cell[1]})"
        if not bool(torch.isfinite(x).all()):
            return f"values that are not finite enter layer {layers[0]} at {where}"
        for layer, state in zip(layers, states, strict=True):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in state):
                return f"layer {layer} produces values that are not finite at {where}"
        return f"layer {layers[-1]} produces values that are not finite at {where}"

    @contextlib.contextmanager
    def _same_randomness(self, cell: Cell, replay: bool) -> Iterator[None]:
        """Remember the random state of a cell's first run; put it back for its recomputation. Off without dropout."""
        if not self.random:
            yield
            return
        if not replay:
            self.random_states[cell] = RandomState(self.device)
            yield
            return
        with random_state_kept(self.device):
            self.random_states[cell].put_back()
            yield
