"""All-to-all by heads (Megatron's context parallelism, DeepSpeed-Ulysses): another way to share a sample.

Every rank holds its part of each segment's columns outside the scans, and all columns of the segment for its part of
the heads inside them: two exchanges a layer and pass, of what in_proj writes and of what the scan returns. States stay
with the ranks of their heads, and all ranks run all cells in the order of one process. B and C are needed by every
head of their group, so the raw ones go to all ranks that have some of these.

Legend: B batch, S tokens of a segment, s of them here, W ranks, H heads, P head width, G groups, N state size.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .mixer_mamba2 import CoreWeights
from .ops_conv import causal_conv
from .ops_costs import MixerShape
from .ops_norm import gated_rms_norm
from .ops_ssd import ssd
from .parallel_borders import Gradients, LocalBorders, States
from .parallel_cut import SequenceCut
from .parallel_sequence import Like, SequenceGroup
from .state_layers import Mamba2State


class HeadShare:
    """The heads of one rank, the columns of all, and the exchange between them.

    Args:
        cut: its segments are dealt out like cards; one of every rank together make a segment of the scans.

    Attributes:
        segments: first and past-the-last column of what is scanned together.
        columns: the same of this rank's part of each. places: where that lies in what `SequenceCut.take` makes.

    Raises:
        ValueError: heads or groups of B and C cannot be dealt out evenly.
    """

    def __init__(self, group: SequenceGroup, cut: SequenceCut, shape: MixerShape) -> None:
        ranks, rank = group.size, group.rank
        if shape.num_heads % ranks or (shape.n_groups % ranks and ranks % shape.n_groups):
            groups = f" in {shape.n_groups} groups" if shape.n_groups > 1 else ""
            raise ValueError(
                f"{shape.num_heads} heads{groups} cannot be dealt out evenly to {ranks} ranks: use a number of ranks "
                "that divides them, or another schedule (round_robin takes any)"
            )
        self._group, self._shape = group, shape
        parts = [cut.segments[at : at + ranks] for at in range(0, len(cut.segments), ranks)]
        self.segments = [(part[0][0], part[-1][1]) for part in parts]
        self.columns = [part[rank] if rank < len(part) else (part[-1][1],) * 2 for part in parts]
        self._sizes = [[stop - start for start, stop in part] + [0] * (ranks - len(part)) for part in parts]
        edges = list(accumulate((sizes[rank] for sizes in self._sizes), initial=0))
        self.places = {n: (edges[n], edges[n + 1]) for n in range(len(parts))}
        heads = shape.num_heads // ranks
        self._heads = slice(rank * heads, (rank + 1) * heads)
        self._groups = max(1, shape.n_groups // ranks)
        self._channels = [self._channels_of(other) for other in range(ranks)]
        # Channels of B and C that several ranks have count on the first of these.
        shares = max(1, ranks // shape.n_groups)
        inner = heads * shape.head_dim
        self._once = self._channels[rank] if rank % shares == 0 else self._channels[rank][:inner]

    def _channels_of(self, rank: int) -> Tensor:
        """Numbers of the convolution's channels that a rank needs: x of its heads, then B and C of their groups."""
        shape, ranks = self._shape, self._group.size
        x = torch.arange(shape.inner).view(ranks, -1)[rank]
        groups = torch.arange(shape.n_groups * shape.state_size).view(shape.n_groups, -1)
        first = rank * shape.n_groups // ranks
        b = shape.inner + groups[first : first + self._groups].flatten()
        return torch.cat([x, b, b + shape.n_groups * shape.state_size]).to(self._group.device)

    # ----------------------------------------------------------------------------------------- inside a layer
    @contextlib.contextmanager
    def within(self, layers: Sequence[nn.Module], segment: int) -> Iterator[None]:
        """Inside, the mixers of `layers` take this rank's columns of a segment, and states of its heads."""
        mixers: list[Any] = [layer.mixer for layer in layers]
        for mixer in mixers:
            mixer.core = functools.partial(self._core, self._sizes[segment])
        try:
            yield
        finally:
            for mixer in mixers:
                del mixer.core

    def _core(
        self,
        sizes: list[int],
        zxbcdt: Tensor,
        weights: CoreWeights,
        state: Mamba2State | None,
        shape: MixerShape,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        soon: bool = False,
    ) -> tuple[Tensor, Mamba2State]:
        """`mixer_core` of this rank's columns (B, s, …); `lengths` and `seq_idx` are of all S. Autograd keeps what it
        needs, `soon` or not."""
        own, channels = self._heads, self._channels[self._group.rank]
        z, xbc, dt = zxbcdt.split(shape.parts, dim=-1)
        to_each = [
            torch.cat([xbc[..., c], d], dim=-1)
            for c, d in zip(self._channels, dt.chunk(self._group.size, -1), strict=True)
        ]
        together = _Exchange.apply(self._group, sizes, False, torch.stack(to_each))
        xbc, dt = together.split([len(channels), own.stop - own.start], dim=-1)
        work = torch.promote_types(zxbcdt.dtype, torch.float32)
        if state is None:
            heads = (own.stop - own.start, shape.head_dim, shape.state_size)
            conv = xbc.new_zeros(len(xbc), len(channels), shape.conv_kernel - 1)
            state = Mamba2State(conv, xbc.new_zeros(len(xbc), *heads, dtype=work))
        taps = weights.conv.squeeze(1)[channels].to(xbc.dtype)
        bias = None if weights.conv_bias is None else weights.conv_bias[channels].to(xbc.dtype)
        xbc, conv = causal_conv(xbc.contiguous(), taps, bias, state.conv.to(xbc.dtype), lengths, seq_idx)
        ids = None if seq_idx is None else seq_idx[:, shape.conv_kernel - 1 :].contiguous()
        width = self._groups * shape.state_size
        x, b, c = xbc.split([xbc.shape[-1] - 2 * width, width, width], dim=-1)
        x, b, c = x.unflatten(-1, (-1, shape.head_dim)), *(t.unflatten(-1, (self._groups, -1)) for t in (b, c))
        a, D, dt_bias = (t[own].to(work) for t in (-torch.exp(weights.A_log.to(work)), weights.D, weights.dt_bias))
        options = (shape.chunk_size, shape.time_step_limit, lengths, ids)
        y, ssm = ssd(x, dt.contiguous(), a, b, c, D, dt_bias, state.ssm.to(work), *options)
        y = _Exchange.apply(self._group, sizes, True, y.flatten(2).to(zxbcdt.dtype))
        y = y.permute(1, 2, 0, 3).flatten(2)
        return gated_rms_norm(y, z.contiguous(), weights.norm.to(y.dtype), shape.eps, shape.n_groups), Mamba2State(
            conv, ssm
        )

    # --------------------------------------------------------------------------------------------- states
    def part(self, tensors: Sequence[Tensor | None], once: bool = False) -> list[Any]:
        """This rank's part of whole states, or of their gradients: `once`, each of these on one rank only."""
        found: list[Tensor | None] = []
        for tensor in tensors:
            if tensor is None or tensor.ndim == 4:
                found.append(None if tensor is None else tensor[:, self._heads])
                continue
            channels = self._channels[self._group.rank]
            own = tensor[:, channels]
            counted = torch.isin(channels, self._once) if once else None
            found.append(own if counted is None else own * counted[:, None].to(own.dtype))
        return found

    def whole(self, tensors: Sequence[Tensor | None], like: Like, once: bool = False) -> list[Tensor]:
        """Parts of states in their places among zeros: the ranks' sum is the whole (`once`), or whole gradients."""
        found = []
        channels = self._channels[self._group.rank]
        for tensor, (shape, dtype) in zip(tensors, like, strict=True):
            full = torch.zeros(shape, dtype=dtype, device=self._group.device)
            if tensor is not None and tensor.ndim == 4:
                full[:, self._heads] = tensor.to(dtype)
            elif tensor is not None:
                full[:, self._once if once else channels] = tensor[:, : len(self._once) if once else None].to(dtype)
            found.append(full)
        return found


class HeadBorders(LocalBorders):
    """The borders of cells that all ranks run together: states stay here, whole ones only at the ends.

    Args:
        store: as in `LocalBorders`. group, share: the ranks and what each has. like: as in `RankBorders`.
    """

    def __init__(self, store: Any, group: SequenceGroup, share: HeadShare, like: Sequence[Like]) -> None:
        super().__init__(store, [[] for _ in like])
        self._group, self._share, self._like = group, share, like
        self.lowest = 0

    def start(self, states: Sequence[States]) -> None:
        """Take the states before the first token, by block; all ranks are given the whole ones."""
        self._start = [self._share.part(block) for block in states]
        self._states = list(self._start)

    def end(self) -> list[States]:
        """The states after the last token, by block, on all ranks."""
        ends = zip(super().end(), self._like, strict=True)
        return [[self._group.sum(t) for t in self._share.whole(own, like, once=True)] for own, like in ends]

    def start_backward(self, gradients: Sequence[Gradients]) -> None:
        """Take the gradients of the states after the last token, by block: of each state where it is."""
        whole = [g or [None] * len(like) for g, like in zip(gradients, self._like, strict=True)]
        super().start_backward([self._share.part(block, once=True) for block in whole])

    def start_gradients(self) -> list[Gradients]:
        """Gradients of the states before the first token, by block: each rank's part of a sum."""
        found: list[Gradients] = []
        for own, start, like in zip(super().start_gradients(), self._start, self._like, strict=True):
            given: Gradients = [None] * len(start)
            if start and own:
                given[:] = self._share.whole(own, like)
            found.append(given)
        return found

    def drain_forward(self) -> None:
        """Not possible: in every layer all ranks wait for each other.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ranks that share heads cannot go on after an error of one of them: use schedule=round_robin"
        )

    drain_backward = drain_forward


class _Exchange(torch.autograd.Function):
    """Columns for heads and back; each is the gradient of the other.

    (W, B, s, c), one for each rank, to (B, S, c); with `back` the other way.
    """

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, sizes: list[int], back: bool, tensor: Tensor) -> Tensor:
        ctx.arguments = group, sizes, back
        return _exchanged(group, sizes, back, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group, sizes, back = ctx.arguments
        return None, None, None, _exchanged(group, sizes, not back, gradient)


def _exchanged(group: SequenceGroup, sizes: list[int], back: bool, tensor: Tensor) -> Tensor:
    own, last = sizes[group.rank], tensor.shape[-1]
    if back:
        rows = tensor.shape[0]
        parts = [part.contiguous() for part in tensor.split(sizes, dim=1)]
        found = tensor.new_empty(group.size, rows, own, last)
        group.exchange(parts, list(found.unbind(0)))
        return found
    rows = tensor.shape[1]
    arrived = [tensor.new_empty(rows, size, last) for size in sizes]
    group.exchange(list(tensor.contiguous().unbind(0)), arrived)
    return torch.cat(arrived, dim=1)
