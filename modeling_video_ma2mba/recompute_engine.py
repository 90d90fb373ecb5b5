"""Multi-Axis Gradient Checkpointing: exact gradients of a Mamba-2 stack, cell by cell of the (layer x time) plane.

After section 3.2 of arXiv 2411.19460: the stack is cut every `layers_per_block` layers and every `segment_length`
tokens; forward keeps only the inputs of the cells (one residual tensor, and each layer's border state), backward
recomputes one cell at a time. What differs from the paper and its reference code:

- Every block of layers is one autograd function with its parameters as inputs. Their gradients are summed over
  segments in fp32 and handed to autograd once, so hooks of DDP, ZeRO and FSDP fire once, while the blocks below still
  compute, and 16-bit sums lose nothing.
- Gradients of SSM states stay in fp32 across borders.
- Forward runs segment by segment, so nothing of full length exists but what the plan stores. Backward runs block by
  block, so fp32 sums exist for one block only; the gradient at a block's input takes the place of that input.
- Kept activations may wait in pinned host memory (`recompute_store`).

Legend: B batch, S tokens, D width, L layers, C conv channels, W conv width, H heads, P head width, N state size.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .mixer_mamba2 import run_blocks
from .parallel_shards import ShardedLayers
from .planner import choose_plan, out_of_memory_message
from .recompute_plan import RecomputePlan, RecomputeSettings
from .recompute_store import DeviceStore, HostStore, PinnedPool
from .stack_token_layout import TokenLayout


class MultiAxisEngine:
    """Runs a stack with recomputation; holds what lives from step to step (settings, page-locked memory)."""

    def __init__(self) -> None:
        self.settings: RecomputeSettings | None = None
        self.last_plan: RecomputePlan | None = None
        self.last_host_bytes = 0
        self._pool = PinnedPool()

    def configure(self, settings: RecomputeSettings | None) -> None:
        """Set what the user asked for; None turns the engine off and gives its host memory back."""
        self.settings = settings
        if settings is None:
            self._pool.release()

    def __deepcopy__(self, memo: dict) -> "MultiAxisEngine":
        copy = MultiAxisEngine()
        copy.settings = self.settings
        return copy

    def __getstate__(self) -> dict:
        return {"settings": self.settings}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self.settings = state["settings"]

    def reserve_host_memory(self, nbytes: int) -> None:
        """Page-lock host memory ahead of the first step with offloaded activations (it costs seconds per 10 GB)."""
        self._pool.reserve(nbytes)

    def store_for(self, plan: RecomputePlan, device: torch.device) -> DeviceStore | HostStore:
        if plan.offload and device.type == "cuda":
            return HostStore(self._pool, device)
        return DeviceStore()

    def run(
        self, model: nn.Module, x: Tensor, state: Any, layout: TokenLayout, keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stack of `model` (a `Ma2mbaTextModel`) over x (B, S, D), on any device; a backward of exact gradients.

        Returns normed hidden states (B, S, D) or (kept, D) on x's device, conv (L, B, C, W-1), ssm (L, B, H, P, N).
        """
        sharded = ShardedLayers.of(model.layers)
        plan = choose_plan(self.settings, model, x, keep)
        rounds = len(plan.segments(x.shape[1]))
        if sharded is not None:  # all processes gather alike: the smallest blocks, the most segments
            smallest, rounds = sharded.largest(-plan.layers_per_block, rounds)
            plan = replace(plan, layers_per_block=-smallest)
        self.last_plan = plan
        conv = None if state is None else state.conv
        ssm = None if state is None else state.ssm
        work = _StackRun(self, model, plan, layout, keep, x, sharded, rounds)
        with torch.no_grad(), work.guarded("forward"):
            results = work.forward(x, conv, ssm)
        below: tuple[Tensor | None, ...] = (x, conv, ssm)
        for block in range(len(work.blocks)):
            out = _Block.apply(work, block, results if block == len(work.blocks) - 1 else None, *below,
                               *work.parameters(block))  # fmt: skip
            below = (out,)
        return out


class _Block(torch.autograd.Function):
    """A node of the autograd graph for each block of layers. The forward pass is already done, segment by segment;
    the chain of nodes only gives backward its order: blocks from top to bottom, each handing over its parameters'
    gradients as soon as they are complete. Between nodes flows an empty tensor.
    """

    @staticmethod
    def forward(ctx: Any, work: "_StackRun", block: int, results: tuple[Tensor, ...] | None, *inputs: Tensor | None):
        ctx.work, ctx.block = work, block
        ctx.set_materialize_grads(False)
        if block == 0:
            ctx.save_for_backward(*inputs[:3])  # so that autograd notices a change in place
        return work.norm.weight.new_empty(0) if results is None else results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        work, block = ctx.work, ctx.block
        inputs = ctx.saved_tensors if block == 0 else ()
        needs = ctx.needs_input_grad[3 : 6 if block == 0 else 4]
        with work.guarded("backward"):
            if block == len(work.blocks) - 1:
                work.start_backward(*gradients)
            return None, None, None, *work.backward_block(block, inputs, needs)


class _StackRun:
    """One forward and backward of the stack under one plan."""

    def __init__(
        self,
        engine: MultiAxisEngine,
        model: nn.Module,
        plan: RecomputePlan,
        layout: TokenLayout,
        keep: Tensor | None,
        x: Tensor,
        sharded: ShardedLayers | None,
        rounds: int,
    ) -> None:
        self.engine, self.model, self.plan, self.layout = engine, model, plan, layout
        self.layers = model.layers
        self.norm = model.norm_f
        self.sharded, self.rounds = sharded, rounds
        self.device = model.norm_f.weight.device
        self.segments = plan.segments(x.shape[1])
        self.blocks = plan.blocks(len(self.layers))
        self.keep = None if keep is None else keep.to(self.device)
        self.store = engine.store_for(plan, self.device)
        self.spent = False
        self.start: tuple[Tensor | None, Tensor | None] = (None, None)  # conv and ssm before the first token
        self.douts: list[Tensor | None] = []
        self.dconvs: list[Tensor | None] = []
        self.dssms: list[Tensor | None] = []
        self.between: Tensor | None = None  # gradient between two blocks when there is one segment
        kind = self.device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.random = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in self.layers.modules()
        )
        self.random_states: dict[tuple[int, int], Any] = {}

    # ----------------------------------------------------------------------------------------------- cells
    def parameters(self, block: int) -> list[nn.Parameter]:
        """Trainable parameters of a block, in a fixed order; the final norm belongs to the last block."""
        modules = [self.layers[i] for i in self.blocks[block]]
        if block == len(self.blocks) - 1:
            modules.append(self.norm)
        return list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())

    def run_cell(
        self,
        block: int,
        segment: int,
        x: Tensor,
        conv: list[Tensor | None],
        ssm: list[Tensor | None],
        unread: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor]]:
        """One cell, from the stream (B, s, D) and the block's states.

        Returns residual and delta, whose sum is the stream; for the last block the normed output of the kept
        positions (or None) and None; then the states.
        """
        start, stop = self.segments[segment]
        lengths, seq_idx = self.layout.segment(start, stop, self.model.config.conv_kernel - 1)
        last = block == len(self.blocks) - 1
        layers = [self.layers[i] for i in self.blocks[block]]
        around = None
        if self.sharded is not None:  # in backward the whole block is gathered already
            around = contextlib.nullcontext if unread else self.sharded.gathered
        y, delta, conv, ssm = run_blocks(layers, x, conv, ssm, lengths, seq_idx, unread and not last, around)
        if self.engine.settings.detect_anomaly and not unread and not bool(torch.isfinite(y + delta).all()):
            raise FloatingPointError(self.name_bad_layer(block, segment, x, conv, ssm))
        if not last:
            return y, delta, conv, ssm
        if self.keep is not None:
            rows = self.keep[:, start:stop]
            y, delta = y[rows].unsqueeze(0), delta[rows].unsqueeze(0)
            if y.shape[1] == 0:
                return None, None, conv, ssm
        return self.norm(y, delta, self.norm.weight.dtype)[0], None, conv, ssm

    def name_bad_layer(self, block: int, segment: int, x: Tensor, conv: list, ssm: list) -> str:
        start, stop = self.segments[segment]
        where = f"tokens {start} to {stop - 1} (segment {segment})"
        if not bool(torch.isfinite(x).all()):
            return f"values that are not finite enter layer {self.blocks[block][0]} at {where}"
        for offset, (c, s) in enumerate(zip(conv, ssm, strict=True)):
            if not bool(torch.isfinite(c).all() and torch.isfinite(s).all()):
                return f"layer {self.blocks[block][offset]} produces values that are not finite at {where}"
        return f"layer {self.blocks[block][-1]} produces values that are not finite at {where}"

    @contextlib.contextmanager
    def same_randomness(self, cell: tuple[int, int], replay: bool) -> Iterator[None]:
        """Remember the random state of a cell's first run; put it back for its recomputation. Off without dropout."""
        if not self.random:
            yield
            return
        cuda = self.device.type == "cuda"
        if not replay:
            gpu = torch.cuda.get_rng_state(self.device) if cuda else None
            self.random_states[cell] = (torch.get_rng_state(), gpu)
            yield
            return
        with torch.random.fork_rng([self.device] if cuda else []):
            cpu, gpu = self.random_states[cell]
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state(gpu, self.device)
            yield

    # --------------------------------------------------------------------------------------------- forward
    def forward(self, x: Tensor, conv: Tensor | None, ssm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self.start = (conv, ssm)
        layers = len(self.layers)
        convs: list[Tensor | None] = [None] * layers if conv is None else list(conv)
        ssms: list[Tensor | None] = [None] * layers if ssm is None else list(ssm)
        out = None
        if self.keep is None:
            out = torch.empty(x.shape, dtype=self.norm.weight.dtype, device=x.device, pin_memory=_pinned(x))
        kept: list[Tensor] = []
        for i, (start, stop) in enumerate(self.segments):
            # In two steps: a copy between devices would change the type on the CPU, and wait for it.
            h = x[:, start:stop].to(self.device, non_blocking=True).to(self.model.stream_dtype)
            for j, block in enumerate(self.blocks):
                if j > 0:
                    self.store.put(("x", j, i), [h])
                own_conv, own_ssm = [convs[n] for n in block], [ssms[n] for n in block]
                if i > 0:
                    self.store.put(("state", j, i), own_conv + own_ssm)
                with self.same_randomness((j, i), replay=False):
                    h, delta, own_conv, own_ssm = self.run_cell(j, i, h, own_conv, own_ssm)
                if delta is not None:
                    h = h + delta
                for n, c, s in zip(block, own_conv, own_ssm, strict=True):
                    convs[n], ssms[n] = c, s
            if self.keep is None:
                out[:, start:stop].copy_(h, non_blocking=True)
            elif h is not None:
                kept.append(h[0])
        if self.sharded is not None:
            self.sharded.idle_rounds(self.layers, self.rounds - len(self.segments))
        if self.keep is not None:
            width = self.norm.weight.shape[0]
            out = torch.cat(kept) if kept else torch.empty(0, width, dtype=self.norm.weight.dtype, device=self.device)
            out = out[self.row_order().argsort()] if self.keep.shape[0] > 1 else out
        self.engine.last_host_bytes = self.store.host_bytes
        _wait_for_host_copies(out, self.device)
        return out, torch.stack(convs), torch.stack(ssms)

    def row_order(self) -> Tensor:
        """Row-major rank of the kept positions in the order the segments produce them."""
        rank = torch.zeros(self.keep.shape, dtype=torch.int64, device=self.device)
        rank[self.keep] = torch.arange(int(self.keep.sum()), device=self.device)
        return torch.cat([rank[:, a:b][self.keep[:, a:b]] for a, b in self.segments])

    # -------------------------------------------------------------------------------------------- backward
    def start_backward(self, dout: Tensor | None, dconv: Tensor | None, dssm: Tensor | None) -> None:
        """Take the gradients of the stack's three results."""
        if self.spent:
            raise RuntimeError("the gradients of this forward pass were already computed; what it kept is gone")
        self.spent = True
        self.douts = self.split_output_gradient(dout)
        self.dconvs = [None] * len(self.layers) if dconv is None else list(dconv)
        self.dssms = [None] * len(self.layers) if dssm is None else list(dssm)

    def backward_block(
        self, j: int, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Backward of one block over all segments, last to first.

        Args:
            inputs: for block 0 the stack's x (B, S, D), conv and ssm; empty for the others.
            needs: for block 0 which of these want a gradient; for the others whether anything below does.

        Returns:
            gradients of `inputs` (an empty tensor for the block below), then of the block's parameters.
        """
        owners = self.parameters(j)  # what autograd knows: shards, where layers are spread over processes
        layers = [self.layers[i] for i in self.blocks[j]]
        with contextlib.nullcontext() if self.sharded is None else self.sharded.gathered(*layers):
            results, sums = self.backward_whole_block(j, inputs, needs)
        gradients = [self.as_owned(g, p) for g, p in zip(sums, owners, strict=True)]
        return [*results, *gradients]

    def as_owned(self, gradient: Tensor | None, owner: nn.Parameter) -> Tensor | None:
        """A parameter's gradient in its own type, and where it is a shard of a layer's, the shard of the mean."""
        if self.sharded is not None and hasattr(owner, "device_mesh"):
            return self.sharded.shard_of_mean(gradient, owner)
        return None if gradient is None else gradient.to(owner.dtype)

    def backward_whole_block(
        self, j: int, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """`backward_block` with the block's parameters whole: gradients of `inputs`, sums for the parameters."""
        block, parameters, first = self.blocks[j], self.parameters(j), j == 0
        x, conv, ssm = inputs if first else (None, None, None)
        dx = None
        if first and needs[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, pin_memory=_pinned(x))
        sums: list[Tensor | None] | None = None
        single = len(self.segments) == 1
        for i in reversed(range(len(self.segments))):
            self.prefetch(j, i)
            if i > 0:
                self.prefetch(j, i - 1)
            elif not first and needs[0]:
                self.prefetch(j - 1, len(self.segments) - 1)
            start, stop = self.segments[i]
            h = x[:, start:stop].to(self.device, non_blocking=True) if first else self.store.take(("x", j, i))[0]
            if i > 0:
                states = self.store.take(("state", j, i))
            else:
                states = [None if t is None else t[n] for t in self.start for n in block]
            if j == len(self.blocks) - 1:
                dh = self.douts[i]
            else:
                dh = self.between if single else self.store.take(("dx", j, i))[0]
            dstates = [self.dconvs[n] for n in block] + [self.dssms[n] for n in block]
            dh, dstates, gradients = self.backward_cell(j, i, h, states, dh, dstates, parameters)
            for k, n in enumerate(block):
                self.dconvs[n], self.dssms[n] = dstates[k], dstates[k + len(block)]
            sums = _accumulate(sums, gradients)
            del gradients  # or they would live on through the next cell
            if dx is not None:
                dx[:, start:stop].copy_(dh.to(dx.dtype), non_blocking=True)
            elif not first and needs[0]:
                if single:
                    self.between = dh  # used at once: no detour through the store
                else:
                    self.store.put(("dx", j - 1, i), [dh])
        if first or not needs[0]:
            self.store.finish()
        if self.sharded is not None:  # all processes reduce alike, whatever of their samples is learnt
            sums = [torch.zeros_like(p) if g is None else g for g, p in zip(sums, parameters, strict=True)]
        if not first:
            return [self.norm.weight.new_empty(0) if needs[0] else None], sums
        _wait_for_host_copies(dx, self.device)
        dconv = _stack_or_zeros(self.dconvs, conv) if needs[1] else None
        dssm = _stack_or_zeros(self.dssms, ssm) if needs[2] else None
        return [dx, dconv, dssm], sums

    def prefetch(self, j: int, i: int) -> None:
        for kind in ("x", "state", "dx"):
            self.store.prefetch((kind, j, i))

    def split_output_gradient(self, dout: Tensor | None) -> list[Tensor | None]:
        """The part of the output's gradient that belongs to each segment, None where nothing was kept."""
        if dout is None:
            return [None] * len(self.segments)
        if self.keep is None:
            return [dout[:, a:b] for a, b in self.segments]
        if self.keep.shape[0] > 1:
            dout = dout[self.row_order()]
        counts = [int(self.keep[:, a:b].sum()) for a, b in self.segments]
        return [part.unsqueeze(0) if n else None for n, part in zip(counts, dout.split(counts), strict=True)]

    def backward_cell(
        self,
        j: int,
        i: int,
        h: Tensor,
        states: list[Tensor | None],
        dout: Tensor | None,
        dstates: list[Tensor | None],
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Recompute one cell and run its backward: gradients of stream, states and trainable parameters."""
        half = len(states) // 2
        h = h.detach().to(self.model.stream_dtype).requires_grad_()
        states = [None if s is None else s.detach().requires_grad_() for s in states]
        kind = self.device.type
        with (
            torch.enable_grad(),
            torch.autocast(kind, enabled=self.autocast[0], dtype=self.autocast[1]),
            self.same_randomness((j, i), replay=True),
        ):
            y, delta, conv, ssm = self.run_cell(j, i, h, states[:half], states[half:], unread=True)
        outputs, gradients = [], []
        for value, gradient in zip([y, delta, *conv, *ssm], [dout, dout, *dstates], strict=True):
            if value is not None and gradient is not None:
                outputs.append(value)
                gradients.append(gradient.to(value.device, value.dtype, non_blocking=True))
        wanted = [h, *(s for s in states if s is not None), *parameters]
        if outputs:
            results = list(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        else:
            results = [None] * len(wanted)
        dh = results.pop(0)
        dh = torch.zeros_like(h) if dh is None else dh
        return dh, [None if s is None else results.pop(0) for s in states], results

    @contextlib.contextmanager
    def guarded(self, phase: str) -> Iterator[None]:
        """Give the store's memory back on any error; say what to do about a full GPU."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.store.finish()
            tokens = self.segments[-1][1]
            message = out_of_memory_message(self.plan, self.model, tokens, phase, error)
            raise torch.OutOfMemoryError(message) from error
        except BaseException:
            self.store.finish()
            raise


def _accumulate(sums: list[Tensor | None] | None, new: list[Tensor | None]) -> list[Tensor | None]:
    """Add a segment's parameter gradients, in fp32 for 16-bit parameters."""
    if sums is None:
        return new
    result = []
    for total, gradient in zip(sums, new, strict=True):
        if total is None or gradient is None:
            result.append(gradient if total is None else total)
            continue
        wide = torch.promote_types(total.dtype, torch.float32)
        total = total if total.dtype == wide else total.to(wide)
        result.append(total.add_(gradient))
    return result


def _stack_or_zeros(gradients: list[Tensor | None], like: Tensor) -> Tensor:
    shape = like.shape[1:]
    filled = [torch.zeros(shape, dtype=like.dtype, device=like.device) if g is None else g for g in gradients]
    return torch.stack([g.to(like.device, like.dtype) for g in filled])


def _pinned(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.cuda.is_available() and x.is_pinned()


def _wait_for_host_copies(result: Tensor | None, device: torch.device) -> None:
    """A result that lives on the host may be read by host code next, which knows nothing of CUDA streams."""
    if result is not None and result.device != device and device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
