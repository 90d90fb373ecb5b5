"""Multi-Axis Gradient Checkpointing: exact gradients of a Mamba-2 stack, cell by cell of the (layer x time) plane.

After section 3.2 of arXiv 2411.19460: the stack is cut every `layers_per_block` layers and every `segment_length`
tokens; forward keeps only the inputs of the cells (one residual tensor, and each layer's border state), backward
recomputes one cell at a time. What differs from the paper and its reference code:

- Every block of layers is one autograd function with its parameters as inputs. Their gradients are summed over
  segments in fp32 and handed to autograd once, so hooks of DDP, ZeRO and FSDP fire once, and 16-bit sums lose nothing.
- Gradients of SSM states stay in fp32 across borders.
- Cells run in the order that the plan names (`recompute_schedule`); all orders give the same bits. Usually forward
  goes segment by segment, so nothing of full length exists but what the plan keeps, and backward block by block, so
  fp32 sums exist for one block only; the gradient at a block's input takes the place of that input.
- Kept activations may wait in pinned host memory (`recompute_store`).

- Ranks of a `SequenceGroup` may share the cells of one sample (`share`): each runs those of its own segments, in an
  order in which all can work at the same time, and border states pass between them.

How one cell runs is told in `recompute_cell`, what neighbours hand each other in `parallel_borders`.

Legend: B batch, S tokens, D width, L layers, C conv channels, W conv width, H heads, P head width, N state size.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .mixer_mamba2 import compute_dtype
from .ops_norm import mixed_sum
from .parallel_borders import LocalBorders, RankBorders
from .parallel_cut import SequenceCut
from .parallel_gradients import gradient_dtype
from .parallel_heads import HeadBorders, HeadShare
from .parallel_sequence import SequenceGroup
from .parallel_shards import ShardedLayers, is_shard
from .planner import choose_plan, describe_batch, out_of_memory_message
from .recompute_cell import CellRunner
from .recompute_graph import CellGraphs, graphs_for
from .recompute_plan import FEWEST_REPLAYED_SEGMENTS, RecomputePlan, RecomputeSettings
from .recompute_schedule import Cell, named_order
from .recompute_store import DeviceStore, HostStore, PinnedPool
from .stack_protocols import TextStack
from .stack_token_layout import TokenLayout
from .stack_weights import sent
from .state_layers import KINDS, LayerState, flatten, layer_kinds, regroup, tensor_dtype
from .state_video import VideoState

T = TypeVar("T")


class MultiAxisEngine:
    """Runs a stack with recomputation; holds what lives from step to step (settings, page-locked memory)."""

    def __init__(self) -> None:
        self.settings: RecomputeSettings | None = None
        self.last_plan: RecomputePlan | None = None
        self.last_host_bytes = 0
        self.group: SequenceGroup | None = None
        self.schedule = "round_robin"  # of batches that come without a cut
        self._pool = PinnedPool()
        self.graphs: CellGraphs | None = None
        self._given: RecomputePlan | None = None
        self._shared: _SharedPass | None = None

    def configure(self, settings: RecomputeSettings | None) -> None:
        """Set what the user asked for; None turns the engine off and gives its host memory back."""
        self.settings = settings
        if settings is None:
            self._pool.release()
            self.graphs = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MultiAxisEngine":
        copy = MultiAxisEngine()
        copy.settings = self.settings
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MultiAxisEngine.__init__(self)
        self.settings = state["settings"]

    def reserve_host_memory(self, nbytes: int) -> None:
        """Page-lock host memory ahead of the first step with offloaded activations (it costs seconds per 10 GB)."""
        self._pool.reserve(nbytes)

    def store_for(self, plan: RecomputePlan, device: torch.device) -> DeviceStore | HostStore:
        """Where the kept activations of a step go: pinned host memory if `plan` offloads on a GPU, else the device."""
        if plan.offload and device.type == "cuda":
            return HostStore(self._pool, device)
        return DeviceStore()

    def graphs_for(self, model: TextStack, x: Tensor, plan: RecomputePlan) -> CellGraphs | None:
        """CUDA graphs of a step's cells, kept from step to step, where they pay (`recompute_graph`)."""
        device = model.norm_f.weight.device
        graphs = graphs_for(self.graphs, model.layers, x, plan, model.stream_dtype, device)
        if graphs is not None or x.shape[1] >= FEWEST_REPLAYED_SEGMENTS * plan.segment_length:
            self.graphs = graphs  # else a short batch between longer ones
        return graphs

    def share(self, group: SequenceGroup | None, schedule: str = "round_robin") -> None:
        """Share the steps that follow among the ranks of `group`: all of them run the same batches, each the cells of
        its own segments, and gradients of parameters are each rank's part of a sum. None: every step alone."""
        self.group, self.schedule, self._shared = group, schedule, None

    def open(self, model: TextStack, cut: SequenceCut, rows: int, keep: Tensor | None = None) -> None:
        """Begin a shared step before its input is there: from here on `drain` lets the other ranks come to its end.

        Args:
            rows: B. keep: (B, S) bool, positions of any rank whose results are wanted; None: all.
        """
        assert self.group is not None, "share the engine first"
        own = sum(stop - start for start, stop in cut.places(self.group.rank).values())
        x = torch.empty(rows, own, 0, device=model.norm_f.weight.device, requires_grad=True)
        settings = self.settings or RecomputeSettings()
        plan = self._given or choose_plan(settings, model, x, keep, cut, self.group)
        self._shared = _SharedPass(self, model, plan, cut, rows, self.group)

    def drain(self, backward: bool) -> None:
        """After an error in a shared step: take part in what is left of the pass, so that no other rank waits for it.

        Every rank must know which pass failed, and go on to the same next step.
        """
        if self._shared is not None:
            (self._shared.borders.drain_backward if backward else self._shared.borders.drain_forward)()

    def run(
        self,
        model: TextStack,
        x: Tensor,
        state: VideoState | None,
        layout: TokenLayout,
        keep: Tensor | None,
        cut: SequenceCut | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """The stack of `model` (a `Ma2mbaTextModel`) over x (B, S, D), on any device; a backward of exact gradients.

        With a cut, ranks share the step: x holds this rank's columns (`SequenceCut.take`), `layout` and `keep` are of
        all of them, and hidden states come of its own columns. States are given to all ranks and come back on all;
        their gradients count on those of the first and of the last segment.

        Returns normed hidden states (B, S, D) or (kept, D) on x's device, and the layers' states.
        """
        sharded = ShardedLayers.of(model.layers)
        settings = self.settings or RecomputeSettings()
        keep = None if keep is None else keep.cpu()  # the step's only wait for the GPU
        shared = None
        if cut is not None:
            if self._shared is None or self._shared.begun:
                self.open(model, cut, x.shape[0], keep)
            shared = self._shared
            assert shared is not None
            shared.begun, plan = True, shared.plan
        else:
            plan = self._given or choose_plan(settings, model, x, keep)
            if sharded is not None:  # all processes gather alike: the smallest blocks
                plan = replace(plan, layers_per_block=-sharded.largest(-plan.layers_per_block)[0])
        self.last_plan = plan
        inputs: tuple[Tensor, ...] = (x,) if state is None else (x, *flatten(state.layers))
        work = _StackRun(self, model, plan, settings.detect_anomaly, layout, keep, inputs, sharded, shared)
        with torch.no_grad(), work.guarded("forward"):
            results = work.forward()
        below: tuple[Tensor | None, ...] = inputs
        for block in range(len(work.blocks)):
            out = _Block.apply(work, block, results if block == len(work.blocks) - 1 else None, *below,
                               *work.runner.parameters(block))  # fmt: skip
            below = (out,)
        work.inputs = ()  # the nodes have them
        hidden, *states = out
        return hidden, regroup(work.runner.kinds, states)

    @contextlib.contextmanager
    def planned(self, plan: RecomputePlan | None) -> Iterator[None]:
        """Steps that begin inside run under this plan, and the planner is not asked; None asks it, as usual."""
        before, self._given = self._given, plan
        try:
            yield
        finally:
            self._given = before


class _SharedPass:
    """What ranks agree on for one shared step: the plan, who runs what, and the messages between them."""

    def __init__(
        self,
        engine: MultiAxisEngine,
        model: TextStack,
        plan: RecomputePlan,
        cut: SequenceCut,
        rows: int,
        group: SequenceGroup,
    ) -> None:
        cut = replace(cut, cell=plan.segment_length)
        self.plan, self.cut, self.group = plan, cut, group
        self.begun = False  # whether its input is there
        self.blocks = plan.blocks(len(model.layers))
        self.places = cut.places(group.rank)
        self.forward, self.backward = cut.order(len(self.blocks)), cut.order(len(self.blocks), plan.band)
        self.store = engine.store_for(plan, model.norm_f.weight.device)
        dtype = compute_dtype(model.layers[0].norm.weight, model.norm_f.weight.device.type)
        sizes = []
        for name in layer_kinds(model.config):
            kind = KINDS[name]
            tensors = zip(kind._fields, kind.sizes(model.config), strict=True)
            sizes.append([((rows, *size), tensor_dtype(kind, field, dtype)) for field, size in tensors])
        like = [list(chain(*(sizes[i] for i in block))) for block in self.blocks]
        self.heads: HeadShare | None = None
        self.borders: RankBorders | HeadBorders
        if cut.schedule == "heads":
            self.heads = HeadShare(group, cut, model.layers[0].mixer.shape)
            self.places, self.borders = self.heads.places, HeadBorders(self.store, group, self.heads, like)
        else:
            self.borders = RankBorders(self.store, [[] for _ in self.blocks], group, self.forward, self.backward, like)


class _Block(torch.autograd.Function):
    """A node of the autograd graph for each block of layers. The forward pass is already done, cell by cell; the chain
    of nodes only gives backward its order: blocks from top to bottom, each handing over its parameters' gradients as
    soon as they are complete. Between nodes flows an empty tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, work: "_StackRun", block: int, results: tuple[Tensor, ...] | None, *inputs: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.work, ctx.block = work, block
        ctx.set_materialize_grads(False)
        # Cells of the first block, which any node may run, read them; autograd notices a change in place.
        ctx.save_for_backward(*work.inputs)
        if any(ctx.needs_input_grad):
            work.lowest = min(work.lowest, block)
        return work.norm.weight.new_empty(0) if results is None else results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        work, block = ctx.work, ctx.block
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3 : 3 + len(inputs) if block == 0 else 4]
        with work.guarded("backward"):
            if block == len(work.blocks) - 1:
                work.start_backward(*gradients)
            return None, None, None, *work.backward_block(block, inputs, needs)


class _StackRun:
    """One forward and backward of the stack under one plan: walks the cells in the plan's order, keeps what backward
    needs, and sums the gradients of parameters."""

    def __init__(
        self,
        engine: MultiAxisEngine,
        model: TextStack,
        plan: RecomputePlan,
        detect_anomaly: bool,
        layout: TokenLayout,
        keep: Tensor | None,
        inputs: tuple[Tensor, ...],
        sharded: ShardedLayers | None,
        shared: _SharedPass | None = None,
    ) -> None:
        self.engine, self.plan, self.shared = engine, plan, shared
        self.model, self.layers, self.norm = model, model.layers, model.norm_f
        self.sharded = sharded
        self.device = model.norm_f.weight.device
        self.inputs = inputs
        x, *start = inputs
        self.heads = None if shared is None else shared.heads
        self.segments = plan.segments(x.shape[1]) if shared is None else shared.cut.cells
        self.columns = self.segments  # of which this process has the stream
        if self.heads is not None:
            self.segments, self.columns = self.heads.segments, self.heads.columns
        # Where each segment that runs here lies in x, and in what is made of it.
        self.places = dict(enumerate(self.segments)) if shared is None else shared.places
        self.first = min(self.places, default=-1)  # the last one of a block in backward
        self.blocks = plan.blocks(len(self.layers))
        self.keep = keep
        self.kept = None if keep is None else _kept_positions(keep, self.columns, self.device)
        self.store = engine.store_for(plan, self.device) if shared is None else shared.store
        # Layers that are FSDP units are gathered here, block by block, and called past their hooks.
        around = None if sharded is None else contextlib.nullcontext
        graphs = engine.graphs_for(model, x, plan) if sharded is None and shared is None else None
        self.runner = CellRunner(
            model, self.blocks, self.segments, layout, self.kept, around, detect_anomaly, self.heads, graphs
        )
        # What autograd knows: shards, where layers are spread over processes.
        self.owners = [self.runner.parameters(block) for block in range(len(self.blocks))]
        self.held = contextlib.ExitStack()  # what is gathered for a whole pass
        self.borders: LocalBorders = LocalBorders(self.store, self.by_block(start))
        if shared is not None:
            self.borders = shared.borders
            shared.borders.start(self.by_block(start))
        self.like_input = torch.empty(*x.shape[:2], 0, device=x.device, requires_grad=x.requires_grad)
        self.spent = False
        self.lowest = len(self.blocks)  # the lowest block that has anything to differentiate
        self.input_wanted = x.requires_grad
        self.to_do: deque[Cell] = deque()  # cells of backward
        self.douts: list[Tensor | None] = []
        self.dx: Tensor | None = None
        self.handed: Tensor | None = None  # gradient for the cell that runs next: no detour through the store
        self.sums: dict[int, list[Tensor | None]] = {}  # parameters' gradients by block

    def cells(self, backward: bool) -> tuple[Cell, ...]:
        """The cells that run here, in the order of the pass."""
        if self.shared is not None and self.heads is None:
            rank = self.shared.group.rank
            return self.shared.backward.backward(rank) if backward else self.shared.forward.forward(rank)
        name = self.plan.backward_order if backward else self.plan.forward_order
        order = named_order(name, len(self.blocks), len(self.segments))
        return order.backward() if backward else order.forward()

    def by_block(self, tensors: Sequence[T]) -> list[list[T]]:
        """Tensors of all layers' states, or none at all, as the borders want them."""
        left, fields = iter(tensors), [len(KINDS[kind]._fields) for kind in self.runner.kinds]
        return [list(islice(left, sum(fields[i] for i in block))) for block in self.blocks]

    def gathered(self, block: int) -> AbstractContextManager[object]:
        """Inside, the layers of a block hold whole parameters. Ranks that share a sample run different blocks at the
        same time, and gather all of them for a whole pass instead (`gather_all`)."""
        if self.sharded is None or self.shared is not None:
            return contextlib.nullcontext()
        return self.sharded.gathered(*(self.layers[i] for i in self.blocks[block]))

    def gather_all(self) -> None:
        """From here on all layers hold whole parameters, where ranks share a sample; until `held` is closed."""
        if self.sharded is not None and self.shared is not None:
            self.held.enter_context(self.sharded.gathered(*self.layers))

    # --------------------------------------------------------------------------------------------- forward
    def forward(self) -> tuple[Tensor, ...]:
        """All cells; hidden states as `MultiAxisEngine.run` returns them, and the tensors of all layers' states."""
        x = self.inputs[0]
        out = None
        if self.places:
            longest = max(stop - start for start, stop in self.places.values())
            wide = self.model.stream_dtype.itemsize
            self.store.expect((len(self.blocks) - 1) * len(self.places), x.shape[0] * longest * x.shape[2] * wide)
        if self.keep is None:
            out = torch.empty(x.shape, dtype=self.norm.weight.dtype, device=x.device, pin_memory=_pinned(x))
        kept: list[Tensor] = []
        cells = self.cells(backward=False)
        following = iter([*cells[1:], None])
        self.gather_all()
        h: Tensor | None = None  # the stream, where the next cell goes on with it
        for block, run in groupby(cells, key=itemgetter(0)):
            with self.gathered(block):
                for cell in run:
                    (_, segment), after = cell, next(following)
                    start, stop = self.places[segment]
                    if block == 0:
                        # In two steps: a copy between devices would change the type on the CPU, and wait for it.
                        h = sent(x[:, start:stop], self.device).to(self.model.stream_dtype)
                    elif h is None:
                        h = self.store.read(("x", *cell))[0]
                    above = (block + 1, segment)
                    if after is not None and after != above:
                        self.store.prefetch(("x", *after))
                    h, states = self.runner.forward(cell, h, self.borders.state_before(*cell))
                    self.borders.state_after(*cell, states)
                    if h is not None:  # None behind the last block, where nothing of a segment is wanted
                        if not self.runner.is_last(block):
                            self.store.put(("x", *above), [h])
                        elif out is not None:
                            out[:, start:stop].copy_(h, non_blocking=h.is_cuda)
                        else:
                            kept.append(h[0])
                    if after != above:
                        h = None
        self.held.close()
        if out is None:
            width = self.norm.weight.shape[0]
            out = torch.cat(kept) if kept else torch.empty(0, width, dtype=self.norm.weight.dtype, device=self.device)
            if self.keep is not None and self.keep.shape[0] > 1:
                out = out[self.row_order(self.keep).argsort()]
        self.engine.last_host_bytes = self.store.host_bytes
        _wait_for_host_copies(out, self.device)
        return out, *chain(*self.borders.end())

    def row_order(self, keep: Tensor) -> Tensor:
        """Row-major rank of the kept positions in the order the segments produce them."""
        rank = torch.zeros(keep.shape, dtype=torch.int64)
        rank[keep] = torch.arange(int(keep.sum()))
        return sent(torch.cat([rank[:, a:b][keep[:, a:b]] for a, b in self.columns]), self.device)

    # -------------------------------------------------------------------------------------------- backward
    def start_backward(self, dout: Tensor | None, *dstates: Tensor | None) -> None:
        """Take the gradients of the stack's results."""
        if self.spent:
            raise RuntimeError("the gradients of this forward pass were already computed; what it kept is gone")
        self.spent = True
        self.douts = self.split_output_gradient(dout)
        self.borders.start_backward(self.by_block(dstates))
        self.gather_all()
        self.to_do.extend(self.cells(backward=True))
        if self.shared is not None:
            self.shared.borders.lowest = self.lowest

    def backward_block(self, block: int, inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Run cells in the plan's order up to the one that completes the block's parameter gradients.

        Args:
            inputs: the stack's x (B, S, D) and the tensors of its states.
            needs: for block 0 which of these want a gradient; for the others whether anything below does.

        Returns:
            for block 0 gradients of `inputs`, for the others an empty tensor; then of the block's parameters.
        """
        first = block == 0
        if first:
            self.input_wanted = needs[0]
        elif not needs[0]:
            self.lowest = block
        owners = self.owners[block]
        with self.gathered(block):
            while self.places and self.run_next(inputs[0]) != (block, self.first):
                pass
            sums = self.sums.pop(block, [None] * len(owners))
            # All processes reduce alike, whatever of their samples is learnt.
            if self.sharded is not None or self.shared is not None:
                whole = self.runner.parameters(block)
                sums = [torch.zeros_like(p) if g is None else g for g, p in zip(sums, whole, strict=True)]
        gradients = [self.like_its_parameter(g, p) for g, p in zip(sums, owners, strict=True)]
        if first or not needs[0]:
            self.held.close()
            self.store.finish()
            if self.shared is not None:
                self.shared.group.finish()
                self.engine._shared = None
        if not first:
            return [self.norm.weight.new_empty(0) if needs[0] else None, *gradients]
        if self.dx is None and self.input_wanted:
            self.dx = torch.zeros_like(inputs[0])  # nothing runs here
        _wait_for_host_copies(self.dx, self.device)
        dx, self.dx = self.dx, None
        states = zip(chain(*self.borders.start_gradients()), inputs[1:], needs[1:], strict=True)
        dstates = [None if not need else torch.zeros_like(s) if g is None else g.to(s) for g, s, need in states]
        return [dx, *dstates, *gradients]

    def run_next(self, x: Tensor) -> Cell:
        """Backward of the next cell."""
        self.drop_idle()
        cell = self.to_do.popleft()
        self.drop_idle()
        after = self.to_do[0] if self.to_do else None
        for coming in (cell, after):
            if coming is not None:
                for kind in ("x", "state", "dx"):
                    self.store.prefetch((kind, *coming))
        block, segment = cell
        start, stop = self.places[segment]
        h = sent(x[:, start:stop], self.device) if block == 0 else self.store.take(("x", *cell))[0]
        states = self.borders.kept_state(*cell)
        if self.runner.is_last(block):
            dout = self.douts[segment]
        elif self.handed is not None:
            dout, self.handed = self.handed, None
        else:
            dout = self.store.take(("dx", *cell))[0]
        parameters = self.runner.parameters(block)
        dh, dstates, gradients = self.runner.backward(
            cell, h, states, dout, self.borders.gradient_after(*cell), parameters
        )
        self.borders.gradient_before(*cell, dstates)
        self.sums[block] = _accumulate(self.sums.get(block), gradients)
        if block == 0 and self.input_wanted:
            if self.dx is None:
                self.dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, pin_memory=_pinned(x))
            self.dx[:, start:stop].copy_(dh.to(self.dx.dtype), non_blocking=dh.is_cuda)
        elif block > self.lowest:
            below = (block - 1, segment)
            if after == below:
                self.handed = dh
            else:
                self.store.put(("dx", *below), [dh])
        return cell

    def drop_idle(self) -> None:
        """Leave out the cells that backward would run next and that have nothing to differentiate."""
        while self.to_do and self.to_do[0][0] < self.lowest:
            self.to_do.popleft()

    def like_its_parameter(self, gradient: Tensor | None, owner: nn.Parameter) -> Tensor | None:
        """A parameter's gradient in the type that autograd keeps it in; where it is a shard of a layer's, the shard of
        the mean."""
        if gradient is None:
            return None
        if self.sharded is not None and is_shard(owner):
            return self.sharded.shard_of_mean(gradient, owner)
        return gradient.to(gradient_dtype(owner))

    def split_output_gradient(self, dout: Tensor | None) -> list[Tensor | None]:
        """The part of the output's gradient that belongs to each segment, None where nothing was kept."""
        if dout is None:
            if self.heads is None:
                return [None] * len(self.segments)
            rows = self.like_input.shape[:2] if self.keep is None else (int(self.keep.sum()),)
            dout = self.norm.weight.new_zeros(*rows, self.norm.weight.shape[0])
        if self.keep is None or self.kept is None:
            return [dout[:, slice(*self.places[n])] if n in self.places else None for n in range(len(self.segments))]
        if self.keep.shape[0] > 1:
            dout = dout[self.row_order(self.keep)]
        counts = [len(rows) for rows in self.kept]
        wanted = [n or self.heads is not None for n in counts]
        return [part.unsqueeze(0) if n else None for n, part in zip(wanted, dout.split(counts), strict=True)]

    @contextlib.contextmanager
    def guarded(self, phase: str) -> Iterator[None]:
        """Give the store's memory back on any error; say what to do about a full GPU."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.held.close()
            self.store.finish()
            with self.runner.autocast():
                job = describe_batch(self.model, self.like_input, self.keep)
            message = out_of_memory_message(self.plan, job, self.device, phase, error)
            raise torch.OutOfMemoryError(message) from error
        except BaseException:
            self.held.close()
            self.store.finish()
            raise


def _accumulate(sums: list[Tensor | None] | None, new: list[Tensor | None]) -> list[Tensor | None]:
    """Add a segment's parameter gradients, in fp32 for 16-bit parameters."""
    if sums is None:
        return new
    runs, result = _runs(new), list(sums)
    for run in runs:
        totals, gradients = [sums[i] for i in run], [new[i] for i in run]
        total, gradient = _joined(totals), _joined(gradients)
        if total is None or gradient is None:
            for i in run:
                result[i] = _added(sums[i], new[i])
            continue
        whole, at = _added(total, gradient), 0
        assert whole is not None
        for i, part in zip(run, gradients, strict=True):
            assert part is not None
            result[i] = whole[at : at + part.numel()].view(part.shape)
            at += part.numel()
    return result


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    wide = torch.promote_types(total.dtype, torch.float32)
    total = total if total.dtype == wide else total.to(wide)
    return mixed_sum(total, gradient, total)


def _runs(tensors: Sequence[Tensor | None]) -> list[list[int]]:
    """Indices by data type, in order; those of nothing by themselves."""
    found: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault(index if tensor is None else tensor.dtype, []).append(index)
    return list(found.values())


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors that lie one behind the other in memory as one, (n,), which is one launch instead of many; else None."""
    first, at = tensors[0], 0
    if first is None:
        return None
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t is None or t.dtype != first.dtype or not t.is_contiguous() or t.untyped_storage().data_ptr() != storage:
            return None
        if t.storage_offset() != start + at:
            return None
        at += t.numel()
    return first.as_strided((at,), (1,), start)


def _kept_positions(keep: Tensor, columns: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Of each range of columns of `keep` (B, S), on the host, where it is true among the range's flattened tokens."""
    found = [keep[:, a:b].flatten().nonzero()[:, 0] for a, b in columns]
    return list(sent(torch.cat(found), device).split([len(rows) for rows in found]))


def _pinned(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.cuda.is_available() and x.is_pinned()


def _wait_for_host_copies(result: Tensor | None, device: torch.device) -> None:
    """A result that lives on the host may be read by host code next, which knows nothing of CUDA streams."""
    if result is not None and result.device != device and device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
