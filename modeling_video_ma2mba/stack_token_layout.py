"""Padding, packing and kept positions of a batch, brought into the one form that the blocks understand.

A recurrent model must not read padding. Whatever the mask looks like, the real tokens of each row are moved to its
front, keeping their order; blocks then only need the number of real tokens per row. Results move back afterwards.
Legend: B batch, S tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether `torch.export` looks on: what tensors hold must not decide what is computed."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


@dataclass(frozen=True)
class TokenLayout:
    """Where the real tokens of a batch are.

    Attributes:
        order: (B, S) int64, original position of each token after the move; None when nothing moved.
        lengths: (B,) int64 real tokens per row on the tokens' device; None when every token is real.
        host_lengths: the same as a list, for decisions that must not wait for the GPU; None where nothing is known.
        seq_idx: (B, S) int32 sample numbers of packed samples (never together with a move), or None.
    """

    order: Tensor | None = None
    lengths: Tensor | None = None
    host_lengths: tuple[int, ...] | None = None
    seq_idx: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor | None, tokens: int, seq_idx: Tensor | None = None) -> "TokenLayout":
        """Layout of the last `tokens` columns of `attention_mask` (B, >= tokens), which is 1 on real tokens."""
        if seq_idx is not None:
            seq_idx = seq_idx.to(torch.int32)
            if seq_idx.ndim != 2 or seq_idx.shape[1] != tokens:
                raise ValueError(f"seq_idx must have the shape (batch, {tokens}), not {tuple(seq_idx.shape)}")
        if attention_mask is None or (attention_mask.shape[0] == 1 and tokens == 1):
            return cls(seq_idx=_checked_samples(seq_idx))
        if attention_mask.ndim != 2 or attention_mask.shape[1] < tokens:
            raise ValueError(
                f"attention_mask must have the shape (batch, at least {tokens}), not {tuple(attention_mask.shape)}"
            )
        real = attention_mask[:, -tokens:].bool()
        lengths = real.sum(dim=1)
        order: Tensor | None
        if exporting():  # the mask must not decide what is computed
            order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
            if seq_idx is not None:
                raise ValueError("packed samples (seq_idx) with padding cannot be exported: leave the mask out")
            return cls(order, lengths)
        packed_right = real == (torch.arange(tokens, device=real.device) < lengths[:, None])
        *host, in_order = torch.cat([lengths, packed_right.all()[None].to(lengths.dtype)]).tolist()  # one wait
        if all(n == tokens for n in host):
            return cls(seq_idx=_checked_samples(seq_idx))
        if seq_idx is not None:
            if not in_order:
                raise ValueError("packed samples (seq_idx) may only be padded on the right")
            # Padding may carry any number; with that of the last real token it does not restart the state.
            last = seq_idx.gather(1, (lengths - 1).clamp(min=0)[:, None])
            seq_idx = _checked_samples(torch.where(real, seq_idx, last))
        order = None if in_order else torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        return cls(order, lengths, tuple(host), seq_idx)

    def arrange(self, tokens: Tensor) -> Tensor:
        """Move the real tokens of (B, S, …) to the front and blank the rest (padding may hold anything, even NaN)."""
        if self.order is not None:
            index = self.order.to(tokens.device)
            index = index.view(*index.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
            tokens = tokens.gather(1, index)
        if self.lengths is None:
            return tokens
        real = torch.arange(tokens.shape[1], device=tokens.device) < self.lengths.to(tokens.device)[:, None]
        return tokens.masked_fill(~real.view(*real.shape, *(1,) * (tokens.ndim - 2)), 0)

    def restore(self, tokens: Tensor) -> Tensor:
        """Undo `arrange` on results (B, S, …)."""
        if self.order is None:
            return tokens
        index = self.order.argsort(dim=1).view(*self.order.shape, *(1,) * (tokens.ndim - 2))
        return tokens.gather(1, index.expand(-1, -1, *tokens.shape[2:]))

    def segment(self, start: int, stop: int, halo: int) -> tuple[Tensor | None, Tensor | None]:
        """lengths (B,) and seq_idx (B, halo + stop - start) of one segment, as `mixer_core` wants them.

        `halo` is the number of rows of the convolution state, W - 1.
        """
        lengths = seq_idx = None
        if self.lengths is not None and (self.host_lengths is None or min(self.host_lengths) < stop):
            lengths = (self.lengths - start).clamp(0, stop - start)
        if self.seq_idx is not None:
            # Sample 0 of a segment is the one the state belongs to: the sample of the token before.
            before = self.seq_idx[:, max(start - 1, 0)].unsqueeze(1)
            seq_idx = self.seq_idx[:, max(start - halo, 0) : stop] - before
            missing = halo + stop - start - seq_idx.shape[1]
            # Rows of the state given to the whole sequence belong to its first sample.
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, missing), seq_idx], dim=1) if missing else seq_idx
        return lengths, seq_idx

    def window(self, start: int, stop: int) -> "TokenLayout":
        """The layout of some columns of arranged tokens, by themselves."""
        if self.lengths is None:
            lengths = host = None
        else:
            lengths = (self.lengths - start).clamp(0, stop - start)
            host = self.host_lengths and tuple(min(max(n - start, 0), stop - start) for n in self.host_lengths)
        return TokenLayout(None, lengths, host, None if self.seq_idx is None else self.seq_idx[:, start:stop])

    def continues(self, start: int) -> Tensor | None:
        """Whether column `start` belongs to the sample of the column before, (B,) bool; None where all do."""
        if self.seq_idx is None:
            return None
        return self.seq_idx[:, start] == self.seq_idx[:, start - 1]

    def other_samples(self, halo: int) -> Tensor | None:
        """Which of the last `halo` tokens of each row come from packed samples before the last one, (B, halo) bool;
        None where none can: whoever continues from the state continues the last sample alone."""
        if self.seq_idx is None:
            return None
        tokens = self.seq_idx.shape[1]
        samples = torch.cat([self.seq_idx[:, :1].expand(-1, halo), self.seq_idx], dim=1)
        ends = samples.new_full((len(samples),), tokens) if self.lengths is None else self.lengths
        samples = samples.gather(1, ends[:, None].long() + torch.arange(halo, device=samples.device))
        return samples != samples[:, -1:]


def _checked_samples(seq_idx: Tensor | None) -> Tensor | None:
    if seq_idx is not None and not exporting() and bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
        raise ValueError("seq_idx must not decrease along the sequence: number packed samples 0, 1, 2, …")
    return seq_idx


def kept_rows(keep: Tensor | None, layout: TokenLayout) -> Tensor | None:
    """The kept positions (B, S) of the original batch, moved as the layout moves tokens."""
    if keep is None or layout.order is None:
        return keep
    return keep.gather(1, layout.order)


def original_order(keep: Tensor, layout: TokenLayout) -> Tensor | None:
    """How to sort rows picked by `kept_rows` (row-major) back into the row-major order of `keep`; None if sorted."""
    if layout.order is None:
        return None
    flat = layout.order + torch.arange(keep.shape[0], device=keep.device)[:, None] * keep.shape[1]
    return flat[kept_rows(keep, layout)].argsort()
