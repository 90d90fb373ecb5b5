"""The state-space dual (SSD) scan of Mamba-2 with carried state.

The PyTorch version is made of matrix products over chunks, in three parts that bear the field's names: what each chunk
adds to the state (`chunk_state`), the recurrence over chunks (`state_passing`), and the outputs (`chunk_scan`). Its
memory is linear in length. It starts from a state and returns the state after the last token, so a sequence may be
cut anywhere.

Legend: B batch, S tokens, H heads, P head width, N state size, G groups, Q chunk length, c chunks. Equations: Dao and
Gu, arXiv 2405.21060, sections 6 and 7.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_costs import SSD_COSTS, ssd_sizes
from .ops_mamba_ssm import SSD as _MAMBA_SSM
from .ops_registry import Backend, Call, Operation, run, triton_available

# softplus(-1e4 + bias) is exactly zero, and so is its derivative: such a token leaves the state alone.
_NO_STEP = -1e4


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float],
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan s_t = exp(dt_t a) s_{t-1} + dt_t x_t B_t^T, y_t = s_t C_t + D x_t, head by head.

    Args:
        x: (B, S, H, P). dt: (B, S, H) step sizes before their bias and softplus; dt_limit: their bounds after it.
        a: (H,) negative; D, dt_bias: (H,). b, c: (B, S, G, N), G divides H.
        state: (B, H, P, N) in fp32 (fp64 for fp64 inputs).
        lengths: (B,) int64, how many tokens of each row are real; the rest leaves the state alone. None means all.
        seq_idx: (B, S) int32 sample number of each token, not decreasing, 0 for the sample that `state` belongs to:
            the state restarts at every change. None: all is one sample.

    Returns:
        y (B, S, H, P) in x's dtype (PyTorch: fp32 or fp64), state (B, H, P, N), an independent copy.
    """
    backend = SSD.pick(
        x.device, x.dtype, x.shape[1], padded=lengths is not None, packed=seq_idx is not None,
        **ssd_sizes(x.shape[2], x.shape[3], b.shape[3], b.shape[2], chunk_size, dt_limit),
    )  # fmt: skip
    if backend.backward is None:
        return backend.forward(x, dt, a, b, c, D, dt_bias, state, chunk_size, dt_limit, lengths, seq_idx)
    dt = mask_steps(dt, lengths)
    return run(backend, x, dt, a, b, c, D, dt_bias, state, seq_idx, chunk_size=chunk_size, dt_limit=dt_limit)


def gated_ssd(*tensors: Any, chunk_size: int, dt_limit: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """On our kernels and without gradients, `ssd` and most of the norm behind it.

    Args:
        tensors: those of `ssd` with `seq_idx` last, then the gate z (B, S, E) and the norm's weight (E,).

    Returns:
        y * silu(z) * weight (B, S, H, P), the state, sums of squares of y * silu(z) (B, S, H) in fp32: the norm is the
        first by the root of the mean of those.
    """
    from .ops_ssd_triton import gated_ssd as by_kernels

    options: dict[str, Any] = {"chunk_size": chunk_size, "dt_limit": dt_limit}
    found: tuple[Tensor, Tensor, Tensor] = by_kernels(*tensors, **options)
    return found


def mask_steps(dt: Tensor, lengths: Tensor | None) -> Tensor:
    """Step sizes (B, S, H) before softplus, such that kernels that know nothing of `lengths` skip the padding."""
    if lengths is None:
        return dt
    padded = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]
    return dt.masked_fill(padded.unsqueeze(-1), _NO_STEP)


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float],
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` in plain PyTorch: any device, any floating dtype, in fp32 (fp64 for fp64 inputs)."""
    tokens, work = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(work) + dt_bias.to(work)).clamp(*dt_limit)
    if lengths is not None:
        # A step of size zero neither decays the state nor writes to it.
        dt = dt * (torch.arange(tokens, device=dt.device) < lengths[:, None]).unsqueeze(-1)
    x, b, c, state = x.to(work), b.to(work), c.to(work), state.to(work)
    if tokens == 1 and seq_idx is None:
        y, state = _single_step(x, dt, a, b, c, state)
    else:
        y, state = _chunked(x, dt, a, b, c, state, chunk_size, seq_idx)
    return y + x * D.to(work).unsqueeze(-1), state


def _single_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence (decoding). Shapes as in `_chunked` with S = 1."""
    heads_per_group = x.shape[2] // b.shape[2]
    b1 = b[:, 0].repeat_interleave(heads_per_group, dim=1)  # (B, H, N)
    c1 = c[:, 0].repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(dt[:, 0] * a)[..., None, None]
    state = state * decay + (dt[:, 0].unsqueeze(-1) * x[:, 0]).unsqueeze(-1) * b1.unsqueeze(-2)
    return (state @ c1.unsqueeze(-1)).squeeze(-1).unsqueeze(1), state


def _chunked(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_size: int, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The block decomposition of SSD: matrix products within and between chunks.

    Args:
        x: (B, S, H, P); dt: (B, S, H) after softplus; a: (H,) negative; b, c: (B, S, G, N); state: (B, H, P, N).

    Returns:
        y (B, S, H, P) without the skip through D, final state (B, H, P, N).
    """
    batch, tokens, heads, width = x.shape
    groups, size = b.shape[2:]
    chunk = min(chunk_size, tokens)
    missing = -tokens % chunk
    if missing:  # steps of size zero change nothing
        x, dt = F.pad(x, (0, 0, 0, 0, 0, missing)), F.pad(dt, (0, 0, 0, missing))
        b, c = F.pad(b, (0, 0, 0, 0, 0, missing)), F.pad(c, (0, 0, 0, 0, 0, missing))
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, missing)], dim=1)
    chunks = (tokens + missing) // chunk
    x = (x * dt.unsqueeze(-1)).view(batch, chunks, chunk, heads, width).permute(0, 3, 1, 2, 4)  # (B, H, c, Q, P)
    total = (dt * a).view(batch, chunks, chunk, heads).permute(0, 3, 1, 2).cumsum(-1)  # (B, H, c, Q)
    b = b.view(batch, chunks, chunk, groups, size).permute(0, 3, 1, 2, 4)  # (B, G, c, Q, N)
    c = c.view(batch, chunks, chunk, groups, size).permute(0, 3, 1, 2, 4)

    # Decays from every token to the end of its chunk, from the chunk's start to it, and over a whole chunk; zero
    # across borders of samples.
    to_end, from_start, carry = torch.exp(total[..., -1:] - total), torch.exp(total), torch.exp(total[..., -1])
    ids = None if seq_idx is None else seq_idx.view(batch, 1, chunks, chunk)
    if ids is not None:
        # Sample at the end of the previous chunk; 0 for the given state.
        before = F.pad(ids[..., -1], (1, 0))[..., :-1]
        to_end = to_end * (ids == ids[..., -1:])
        from_start = from_start * (ids == before.unsqueeze(-1))
        carry = carry * (ids[..., -1] == before)
    entering, state = state_passing(chunk_state(x, b, to_end), carry, state)
    y = chunk_scan(x, b, c, total, from_start, entering, ids)
    return y.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, width)[:, :tokens], state


def chunk_state(x: Tensor, b: Tensor, to_end: Tensor) -> Tensor:
    """What each chunk adds to the state: the sum over its tokens of their decay to the chunk's end times x B^T.

    Args:
        x: (B, H, c, Q, P), times the step sizes. b: (B, G, c, Q, N). to_end: (B, H, c, Q).

    Returns:
        (B, H, c, P, N).
    """
    groups, heads, width = b.shape[1], x.shape[1], x.shape[-1]
    added = (x * to_end.unsqueeze(-1)).unflatten(1, (groups, -1)).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)
    return (added @ b).unflatten(3, (heads // groups, width)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)


def state_passing(added: Tensor, carry: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks.

    Args:
        added: (B, H, c, P, N) of `chunk_state`. carry: (B, H, c) decay over each chunk. state: (B, H, P, N).

    Returns:
        the states entering the chunks (B, H, c, P, N), the state after the last chunk (B, H, P, N).
    """
    seen = []
    for i in range(added.shape[2]):
        seen.append(state)
        state = state * carry[:, :, i, None, None] + added[:, :, i]
    return torch.stack(seen, dim=2), state


def chunk_scan(
    x: Tensor, b: Tensor, c: Tensor, total: Tensor, from_start: Tensor, entering: Tensor, ids: Tensor | None = None
) -> Tensor:
    """The outputs: from within a chunk, y_i = sum over j <= i of (C_i . B_j) exp(total_i - total_j) x_j, and from the
    state that entered it.

    Args:
        x: (B, H, c, Q, P), times the step sizes. b, c: (B, G, c, Q, N). total: (B, H, c, Q) decays summed up.
        from_start: (B, H, c, Q) their exponentials. entering: (B, H, c, P, N) of `state_passing`.
        ids: (B, 1, c, Q) sample numbers, which do not see each other.

    Returns:
        (B, H, c, Q, P).
    """
    batch, heads, chunks, chunk, width = x.shape
    groups = b.shape[1]
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if ids is not None:
        keep = keep & (ids.unsqueeze(-1) == ids.unsqueeze(-2))
    mask = torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -torch.inf))  # (B, H, c, Q, Q)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(2)  # (B, G, 1, c, Q, Q)
    mask = (mask.view(batch, groups, heads // groups, chunks, chunk, chunk) * scores).flatten(1, 2)
    y = mask @ x
    entering = entering.unflatten(1, (groups, -1)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
    outer = (c @ entering.transpose(-1, -2)).unflatten(-1, (heads // groups, width))  # (B, G, c, Q, H/G, P)
    return y + outer.permute(0, 1, 4, 2, 3, 5).flatten(1, 2) * from_start.unsqueeze(-1)


def _triton_forward(*tensors: Any, **options: Any) -> Any:
    from .ops_ssd_triton import ssd_forward

    return ssd_forward(*tensors, **options)


def _triton_backward(*arguments: Any, **options: Any) -> Any:
    from .ops_ssd_triton import ssd_backward

    return ssd_backward(*arguments, **options)


def _triton_fits(call: Call) -> bool:
    """Matrix products want powers of two. A single token is a few small products; padding is told from tokens by
    steps of size zero, which a lower bound would not let stand."""
    sizes = call.sizes
    widths = sizes["head_dim"] in (16, 32, 64, 128) and sizes["state_size"] in (16, 32, 64, 128)
    return (
        widths and sizes["chunk"] in (64, 128, 256) and call.tokens > 1 and not (call.padded and sizes["dt_min"] > 0)
    )


_TRITON = Backend(
    "triton",
    _triton_forward,
    _triton_backward,
    needs=_MAMBA_SSM.needs,
    device="cuda",
    dtypes=(torch.float16, torch.bfloat16),
    available=triton_available,
    fits=_triton_fits,
    **vars(SSD_COSTS["triton"]),
)
_TORCH = Backend("torch", ssd_torch, **vars(SSD_COSTS["torch"]))
SSD = Operation("ssd", (_TRITON, _MAMBA_SSM, _TORCH))
"""Sizes: `ssd_sizes`. Kernels take (x, dt, a, b, c, D, dt_bias, state, seq_idx) and are given steps that
`mask_steps` has seen; `into`: the gradients of x, dt, b and c."""
