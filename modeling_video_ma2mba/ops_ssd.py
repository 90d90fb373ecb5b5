"""The state-space dual (SSD) scan of Mamba-2 with carried state, in plain PyTorch, and the choice of backend.

One function, `mixer_core`, is the inside of a Mamba-2 mixer between its two projections: causal convolution, scan,
gated norm. It starts from a state and returns the state after the last token, so a sequence may be cut anywhere.
Here is the readable version, made of matrix products over chunks, memory linear in length; `ops_ssd_mamba_ssm` holds
the same function on the Triton and CUDA kernels of mamba-ssm and causal-conv1d.

Legend: B batch, S tokens, H heads, P head width, N state size, G groups, E = H * P, C = E + 2 * G * N conv channels,
W conv width, Q chunk length. Equations: Dao and Gu, arXiv 2405.21060, sections 6 and 7.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_forced_backend: str | None = None


@dataclass(frozen=True)
class MixerShape:
    """The sizes of one mixer that its tensors do not tell by themselves."""

    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    eps: float
    time_step_limit: tuple[float, float]

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def fits_kernels(self) -> bool:
        """The convolution kernel reads 8 channels at a time, from 16-byte aligned addresses."""
        return self.conv_dim % 8 == 0 and self.inner % 8 == 0


@contextlib.contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Run everything inside with the backend `name` ("torch" or "kernels"); for tests and benchmarks."""
    global _forced_backend
    if name not in (None, "torch", "kernels"):
        raise ValueError(f"backend={name!r} is not valid: use 'torch' or 'kernels'")
    previous, _forced_backend = _forced_backend, name
    try:
        yield
    finally:
        _forced_backend = previous


def backend_for(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend for work on `tensor` in `dtype` (default: its own): "kernels" on CUDA in 16 bits where the packages
    import, else "torch". fp32 stays in PyTorch because the Triton kernels would round its matrix products to TF32.
    """
    if _forced_backend is not None:
        return _forced_backend
    if not tensor.is_cuda or (dtype or tensor.dtype) not in (torch.bfloat16, torch.float16):
        return "torch"
    from .ops_ssd_mamba_ssm import kernels_available

    return "kernels" if kernels_available() else "torch"


def mixer_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    shape: MixerShape,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, SSD scan and gated norm of one mixer.

    Args:
        zxbcdt: (B, S, 2E + 2GN + H) output of in_proj: gate z, then x, B and C, then the step size before its bias.
        conv_weight: (C, 1, W); conv_bias: (C,) or None; dt_bias, A_log, D: (H,); norm_weight: (E,).
        conv_state: (B, C, W-1) the last raw inputs of the convolution, None for the start of a sequence.
        ssm_state: (B, H, P, N), fp32 (fp64 for fp64 inputs), None for zeros.
        lengths: (B,) int64, how many of the S tokens of each row are real; the rest is padding on the right, which
            leaves the states alone. None means all.
        seq_idx: (B, W-1+S) int32 sample number of each row of conv_state and of each token of a packed sequence, not
            decreasing, 0 for the sample that the given ssm_state belongs to. State and convolution restart at every
            change; padding has the number of the last real token.

    Returns:
        y (B, S, E) ready for out_proj, conv_state (B, C, W-1), ssm_state (B, H, P, N), both independent copies.
    """
    arguments = (zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_state, ssm_state, shape)
    # A single token is a few small products: the chunk kernels would round the state to 16 bits for nothing.
    if zxbcdt.shape[1] > 1 and shape.fits_kernels and backend_for(zxbcdt) == "kernels":
        from .ops_ssd_mamba_ssm import mixer_core_kernels

        return mixer_core_kernels(*arguments, lengths, seq_idx)
    return mixer_core_torch(*arguments, lengths, seq_idx)


def mixer_core_torch(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    shape: MixerShape,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixer_core` in plain PyTorch: any device, any floating dtype, scan in fp32 (fp64 for fp64 inputs)."""
    batch, tokens, _ = zxbcdt.shape
    z, xbc_raw, dt_raw = zxbcdt.split([shape.inner, shape.conv_dim, shape.num_heads], dim=-1)
    work = torch.promote_types(zxbcdt.dtype, torch.float32)
    if conv_state is None:
        conv_state = zxbcdt.new_zeros(batch, shape.conv_dim, shape.conv_kernel - 1)
    if ssm_state is None:
        ssm_state = zxbcdt.new_zeros(batch, shape.num_heads, shape.head_dim, shape.state_size, dtype=work)

    extended = torch.cat([conv_state.transpose(1, 2).to(xbc_raw.dtype), xbc_raw], dim=1)  # (B, W-1+S, C)
    xbc = F.silu(_causal_conv(extended, conv_weight, conv_bias, tokens, seq_idx))
    new_conv_state = last_rows(extended, shape.conv_kernel - 1, tokens, lengths)

    dt = F.softplus(dt_raw.to(work) + dt_bias.to(work)).clamp(*shape.time_step_limit)
    if lengths is not None:
        # A step of size zero neither decays the state nor writes to it.
        dt = dt * (torch.arange(tokens, device=dt.device) < lengths[:, None]).unsqueeze(-1)
    groups, state = shape.n_groups, shape.state_size
    x, b, c = xbc.split([shape.inner, groups * state, groups * state], dim=-1)
    x = x.view(batch, tokens, shape.num_heads, shape.head_dim).to(work)
    b = b.view(batch, tokens, groups, state).to(work)
    c = c.view(batch, tokens, groups, state).to(work)
    a = -torch.exp(A_log.to(work))
    ids = None if seq_idx is None else seq_idx[:, shape.conv_kernel - 1 :]
    if tokens == 1 and ids is None:
        y, new_ssm_state = _single_step(x, dt, a, b, c, ssm_state.to(work))
    else:
        y, new_ssm_state = _chunked_scan(x, dt, a, b, c, ssm_state.to(work), shape.chunk_size, ids)
    y = y + x * D.to(work).unsqueeze(-1)
    y = gated_rms_norm(y.reshape(batch, tokens, shape.inner).to(zxbcdt.dtype), z, norm_weight, shape.eps, groups)
    return y, new_conv_state, new_ssm_state


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMS norm of y * silu(z) within each of `groups` groups of channels, computed in fp32. Shapes (B, S, E)."""
    work = torch.promote_types(y.dtype, torch.float32)
    gated = (y.to(work) * F.silu(z.to(work))).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(work)).to(y.dtype)


def last_rows(extended: Tensor, count: int, tokens: int, lengths: Tensor | None) -> Tensor:
    """The last `count` real rows of `extended` (B, count + S, C), as the next convolution state (B, C, count).

    The result owns its memory: a view would keep the whole segment alive.
    """
    if lengths is None:
        rows = extended[:, tokens:]
    else:
        where = lengths.clamp(max=tokens)[:, None] + torch.arange(count, device=extended.device)
        rows = extended.gather(1, where.unsqueeze(-1).expand(-1, -1, extended.shape[-1]))
    return rows.transpose(1, 2).contiguous()


def _causal_conv(extended: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, seq_idx: Tensor | None) -> Tensor:
    """Depthwise causal convolution as W shifted products: exact in every dtype and quick on CPU. -> (B, S, C)"""
    width = weight.shape[-1]
    taps = weight.to(extended.dtype).squeeze(1)  # (C, W)
    out = None
    for k in range(width):
        term = extended[:, k : k + tokens] * taps[:, k]
        back = width - 1 - k  # how many tokens before the current one this tap reads
        if seq_idx is not None and back:
            term = term * (seq_idx[:, k : k + tokens] == seq_idx[:, width - 1 :]).unsqueeze(-1)
        out = term if out is None else out + term
    return out if bias is None else out + bias.to(extended.dtype)


def _single_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence (decoding). Shapes as in `_chunked_scan` with S = 1."""
    heads_per_group = x.shape[2] // b.shape[2]
    b1 = b[:, 0].repeat_interleave(heads_per_group, dim=1)  # (B, H, N)
    c1 = c[:, 0].repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(dt[:, 0] * a)[..., None, None]
    state = state * decay + (dt[:, 0].unsqueeze(-1) * x[:, 0]).unsqueeze(-1) * b1.unsqueeze(-2)
    return (state @ c1.unsqueeze(-1)).squeeze(-1).unsqueeze(1), state


def _chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_size: int, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The block decomposition of SSD (arXiv 2405.21060, section 6): matrix products within and between chunks.

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
    x = (x * dt.unsqueeze(-1)).view(batch, chunks, chunk, heads, width)
    decay = (dt * a).view(batch, chunks, chunk, heads).permute(0, 3, 1, 2)  # (B, H, c, Q)
    total = decay.cumsum(-1)
    b = b.view(batch, chunks, chunk, groups, size).permute(0, 3, 1, 2, 4)  # (B, G, c, Q, N)
    c = c.view(batch, chunks, chunk, groups, size).permute(0, 3, 1, 2, 4)

    # Within a chunk: y_i = sum over j <= i of (C_i . B_j) exp(total_i - total_j) dt_j x_j.
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    to_end, from_start, carry = torch.exp(total[..., -1:] - total), torch.exp(total), torch.exp(total[..., -1])
    if seq_idx is not None:
        ids = seq_idx.view(batch, 1, chunks, chunk)
        keep = keep & (ids.unsqueeze(-1) == ids.unsqueeze(-2))
        before = F.pad(ids[..., -1], (1, 0))[
            ..., :-1
        ]  # sample at the end of the previous chunk; 0 for the given state
        to_end = to_end * (ids == ids[..., -1:])
        from_start = from_start * (ids == before.unsqueeze(-1))
        carry = carry * (ids[..., -1] == before)
    mask = torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -torch.inf))  # (B, H, c, Q, Q)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(2)  # (B, G, 1, c, Q, Q)
    mask = (mask.view(batch, groups, heads // groups, chunks, chunk, chunk) * scores).flatten(1, 2)
    x = x.permute(0, 3, 1, 2, 4)  # (B, H, c, Q, P)
    y = mask @ x

    # Between chunks: what each chunk adds to the state, then the recurrence over chunks, then what it sees of it.
    added = (x * to_end.unsqueeze(-1)).unflatten(1, (groups, -1)).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)
    added = (added @ b).unflatten(3, (heads // groups, width)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)  # (B,H,c,P,N)
    seen = []
    for i in range(chunks):
        seen.append(state)
        state = state * carry[:, :, i, None, None] + added[:, :, i]
    entering = torch.stack(seen, dim=2).unflatten(1, (groups, -1)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
    outer = (c @ entering.transpose(-1, -2)).unflatten(-1, (heads // groups, width))  # (B, G, c, Q, H/G, P)
    outer = outer.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    y = y + outer * from_start.unsqueeze(-1)
    return y.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, width)[:, :tokens], state
