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
from .ops_norm import mixed_sum
from .parallel_borders import Gradients, States
from .parallel_heads import HeadShare
from .recompute_graph import BlockGraphs, CellGraphs
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
        kept: of each segment, positions in its flattened (B, s) tokens whose result is wanted, int64 on the model's
            device; None for all.
        around: as in `run_blocks`. detect_anomaly: stop at the first value that is not finite.
        heads: where ranks share heads, of whose columns x is this rank's part.
        graphs: of full-length cells (`recompute_graph`), where they serve this step.
    """

    def __init__(
        self,
        model: TextStack,
        blocks: Sequence[range],
        segments: Sequence[tuple[int, int]],
        layout: TokenLayout,
        kept: Sequence[Tensor] | None,
        around: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
        detect_anomaly: bool = False,
        heads: HeadShare | None = None,
        graphs: CellGraphs | None = None,
    ) -> None:
        self.heads = heads
        self.layers, self.norm, self.stream_dtype = model.layers, model.norm_f, model.stream_dtype
        self.blocks, self.segments, self.layout, self.kept = blocks, segments, layout, kept
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
        self.graphs = None if self.random or detect_anomaly or around is not None else graphs

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
        graphs = self._graphs(cell, backward=False)
        if graphs is not None:
            y, delta, states = graphs.forward(x, states)
        else:
            with self._same_randomness(cell, replay=False):
                y, delta, states = self._run(cell, x, states)
        if not self.is_last(cell[0]):
            return mixed_sum(y, delta), states
        return self._finish(cell, y, delta), states

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
        graphs = self._graphs(cell, backward=True)
        if graphs is not None and dout is not None:
            return self._replay(graphs, cell, x, states, dout, dstates, parameters)
        x = x.detach().to(self.stream_dtype).requires_grad_()
        states = [s.detach().requires_grad_() for s in states]
        with torch.enable_grad(), self.autocast(), self._same_randomness(cell, replay=True):
            y, delta, ends = self._run(cell, x, states, again=True)
            results = [self._finish(cell, y, delta)] if self.is_last(cell[0]) else [y, delta]
        outputs, gradients = [], []
        dstates = dstates or [None] * len(ends)
        douts = [dout] * len(results)
        for value, gradient in zip([*results, *ends], [*douts, *dstates], strict=True):
            if value is not None and gradient is not None:
                outputs.append(value)
                gradients.append(sent(gradient, value.device).to(value.dtype))
        wanted = [x, *states, *parameters]
        found: Gradients = [None] * len(wanted)
        if outputs:
            found = list(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        dx = found.pop(0)
        dx = torch.zeros_like(x) if dx is None else dx
        return dx, found[: len(states)], found[len(states) :]

    def _graphs(self, cell: Cell, backward: bool) -> BlockGraphs | None:
        """Those of a cell's block, if this cell can be replayed."""
        block, segment = cell
        start, stop = self.segments[segment]
        if self.graphs is None or stop - start != self.segments[0][1] - self.segments[0][0]:
            return None
        if any(borders is not None for borders in self.layout.segment(start, stop, self.halo)):
            return None
        return self.graphs.of(block, [self.kinds[i] for i in self.blocks[block]], backward)

    def _replay(
        self,
        graphs: BlockGraphs,
        cell: Cell,
        x: Tensor,
        states: States,
        dout: Tensor,
        dstates: Gradients,
        parameters: Sequence[nn.Parameter],
    ) -> tuple[Tensor, Gradients, Gradients]:
        """`backward` by graphs; the final norm and the choice of positions are between recomputation and backward."""
        y, delta = graphs.recompute(x, states)
        dy = ddelta = sent(dout, x.device)
        of_norm: dict[int, Tensor | None] = {}
        if self.is_last(cell[0]):
            leaves = [y.detach().requires_grad_(), delta.detach().requires_grad_()]
            own = [p for p in self.norm.parameters() if p.requires_grad]
            with torch.enable_grad(), self.autocast():
                out = self._finish(cell, *leaves)
            assert out is not None  # it has a gradient
            dy, ddelta, *found = torch.autograd.grad(out, [*leaves, *own], dy.to(out.dtype))
            of_norm = {id(p): gradient for p, gradient in zip(own, found, strict=True)}
        dx, before, of_layers = graphs.backward(dy, ddelta, dstates)
        left = iter(of_layers)
        gradients = [of_norm[id(p)] if id(p) in of_norm else next(left) for p in parameters]
        return dx, before if states else [], gradients

    def _run(self, cell: Cell, x: Tensor, states: States, again: bool = False) -> tuple[Tensor, Tensor, States]:
        """Residual and delta, whose sum is the stream after the block's layers; the states."""
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
        if self.graphs is not None and stop - start == self.segments[0][1] - self.segments[0][0]:
            self.graphs.ran(delta, flatten(ends), again)
        return y, delta, flatten(ends)

    def _finish(self, cell: Cell, y: Tensor, delta: Tensor) -> Tensor | None:
        """Behind the last block: normed results, (B, s, D) or the kept positions as (1, kept, D), None without any."""
        if self.kept is not None:
            rows = self.kept[cell[1]]
            y, delta = (t.flatten(0, 1).index_select(0, rows).unsqueeze(0) for t in (y, delta))
            if y.shape[1] == 0 and self.heads is None:  # ranks that share heads go through all layers together
                return None
        return self.norm(y, delta, self.norm.weight.dtype)[0]

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
