"""The causal depthwise convolution of the Mamba mixers, with carried inputs, and its SiLU.

Legend: B batch, S tokens, C channels, W convolution width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_costs import CONV_COSTS
from .ops_mamba_ssm import CAUSAL_CONV as _MAMBA_SSM
from .ops_registry import Backend, Operation, run, triton_available


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal depthwise convolution of x (B, S, C) that goes on from `state`, and the state after it.

    Args:
        weight: (C, W) in x's dtype; bias: (C,) or None.
        state: (B, C, W-1) the last inputs before x, in x's dtype; zeros for the start of a sequence.
        lengths: (B,) int64, how many tokens of each row count for the new state. None means all.
        seq_idx: (B, W-1+S) int32 sample number of each row of `state` and x, not decreasing: a token sees nothing of
            other samples. None: all is one sample.

    Returns:
        (B, S, C) in x's dtype, and the new state, which owns its memory.
    """
    packed = seq_idx is not None
    call = (x.device, x.dtype, x.shape[1])
    backend = CAUSAL_CONV.pick(
        *call, packed=packed, channels=x.shape[2], offset=int(x.storage_offset()), width=weight.shape[-1]
    )
    if backend.backward is None:
        return backend.forward(x, weight, bias, state, lengths, seq_idx)
    return run(backend, x, weight, bias, state, seq_idx), last_inputs(x, state, lengths)


def causal_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv` as W shifted products: exact in every dtype and quick on CPU."""
    tokens, width = x.shape[1], weight.shape[-1]
    extended = torch.cat([state.transpose(1, 2), x], dim=1)  # (B, W-1+S, C)

    def tap(k: int) -> Tensor:
        term = extended[:, k : k + tokens] * weight[:, k]
        back = width - 1 - k  # how many tokens before the current one this tap reads
        if seq_idx is None or not back:
            return term
        return term * (seq_idx[:, k : k + tokens] == seq_idx[:, width - 1 :]).unsqueeze(-1)

    out = tap(0)
    for k in range(1, width):
        out = out + tap(k)
    out = F.silu(out if bias is None else out + bias)
    return out, _last_rows(extended, width - 1, lengths)


def last_inputs(x: Tensor, state: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The state after x alone, as `causal_conv` returns it; the old one matters to short rows only."""
    count, tokens = state.shape[-1], x.shape[1]
    if lengths is None and tokens >= count:
        return x[:, tokens - count :].transpose(1, 2).contiguous()
    return _last_rows(torch.cat([state.transpose(1, 2), x], dim=1), count, lengths)


def _last_rows(extended: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` real rows of `extended` (B, count + S, C) as (B, C, count), a copy: a view would keep the whole
    segment alive."""
    tokens = extended.shape[1] - count
    if lengths is None:
        rows = extended[:, tokens:]
    else:
        where = lengths.clamp(max=tokens)[:, None] + torch.arange(count, device=extended.device)
        rows = extended.gather(1, where.unsqueeze(-1).expand(-1, -1, extended.shape[-1]))
    return rows.transpose(1, 2).contiguous()


def add_last_inputs_gradient(dnew: Tensor, dx: Tensor, dstate: Tensor, lengths: Tensor | None) -> None:
    """Backward of `last_inputs`: add the new state's gradient (B, C, W-1) to those of x (B, S, C) and of `state`."""
    rows = dnew.transpose(1, 2).to(dx.dtype)  # (B, W-1, C)
    count, tokens = rows.shape[1], dx.shape[1]
    if lengths is None and tokens >= count:
        dx[:, tokens - count :] += rows
        return
    ends = torch.full((dx.shape[0],), tokens, device=dx.device) if lengths is None else lengths.clamp(max=tokens)
    where = (ends[:, None] + torch.arange(count, device=dx.device)).unsqueeze(-1).expand_as(rows)
    from_state = (where < count).to(rows.dtype)
    width = rows.shape[-1]
    spread = rows.new_zeros(rows.shape[0], count, width).scatter_add_(1, where.clamp(max=count - 1), rows * from_state)
    dstate += spread.transpose(1, 2)
    later = torch.zeros_like(dx).scatter_add_(1, (where - count).clamp(min=0), rows * (1 - from_state))
    dx += later


def _triton_forward(*tensors: Tensor, **options: Any) -> Any:
    from .ops_conv_triton import conv_forward

    return conv_forward(*tensors, **options)


def _triton_backward(*arguments: Any, **options: Any) -> Any:
    from .ops_conv_triton import conv_backward

    return conv_backward(*arguments, **options)


_TRITON = Backend(
    "triton",
    _triton_forward,
    _triton_backward,
    device="cuda",
    dtypes=(torch.float16, torch.bfloat16),
    available=triton_available,
    fits=lambda call: call.tokens > 0 and call.sizes["width"] in (2, 3, 4),
    **vars(CONV_COSTS["triton"]),
)
_TORCH = Backend("torch", causal_conv_torch, **vars(CONV_COSTS["torch"]))
CAUSAL_CONV = Operation("causal_conv", (_TRITON, _MAMBA_SSM, _TORCH))
"""Sizes: channels; offset, numbers in memory before the first channel; width, of the convolution. Kernels take (x,
weight, bias, state, seq_idx) and return the convolution without the state; `into`: the gradient of x."""
