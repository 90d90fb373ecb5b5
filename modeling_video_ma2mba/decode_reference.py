"""The parts of one decoding step in PyTorch: what `decode_kernels` computes, readable, on any device.

All work in place on buffers of fixed addresses (a CUDA graph replays addresses). B batch, D width, E inner width,
C conv channels, W conv width, H heads, P head width, N state size, G groups, K slots.

The SSM state is not rewritten at every token. `base` (B, H, P, N) is the state some tokens ago; the tokens since lie
in `slots` of a short history, and count through products of vectors: with s_j the step sizes and T_t the summed
log-decays, y_t = exp(T_t) C_t.base + sum over j <= t of exp(T_t - T_j) s_j (C_t.B_j) x_j. The last slot folds the
history into `base`. For K = 1 this is the usual update; for K = 16 it writes a sixteenth of it, which matters where a
batch's states are most of the memory traffic. The result is the same but for the order of additions.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .ssd_scan import MixerShape


def add_norm(residual: Tensor, delta: Tensor | None, scale: Tensor, eps: float, out: Tensor) -> None:
    """residual (B, D) += delta (B, D); out (B, D) = RMS norm of the sum, in out's dtype."""
    if delta is not None:
        residual += delta.to(residual.dtype)
    out.copy_(_normed(residual, scale, eps))


def norm_linear(scaled: Tensor, squares: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out (1, M) = weight (M, D) times an RMS norm, given as `scaled` (1, D), the vector times the norm's weight, and
    `squares` (any number), which add up to the vector's square."""
    out.copy_(_product(scaled, squares, weight, eps))


def norm_linear_conv(
    scaled: Tensor, squares: Tensor, weight: Tensor, eps: float, out: Tensor, conv_state: Tensor,
    conv_weight: Tensor, conv_bias: Tensor | None, xbc: Tensor, slot: Tensor, shape: MixerShape,
) -> None:  # fmt: skip
    """`norm_linear` into out (1, 2E + 2GN + H), and `conv_step` with it."""
    norm_linear(scaled, squares, weight, eps, out)
    conv_step(out, conv_state, conv_weight, conv_bias, xbc, slot, shape)


def conv_step(
    proj: Tensor, conv_state: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, xbc: Tensor, slot: Tensor,
    shape: MixerShape,
) -> None:  # fmt: skip
    """Advance the convolution by one token.

    Args:
        proj: (B, 2E + 2GN + H), output of in_proj. conv_state: (B, C, W-1), changed. conv_weight: (C, 1, W).
        xbc: (B, K, C), whose row `slot` (int32 tensor, one value) gets silu(convolution).
    """
    raw = proj[:, shape.inner : shape.inner + shape.conv_dim, None]
    window = torch.cat([conv_state, raw], dim=-1)
    out = (window.float() * conv_weight.squeeze(1).float()).sum(-1)
    if conv_bias is not None:
        out = out + conv_bias.float()
    conv_state.copy_(window[..., 1:])
    xbc.index_copy_(1, slot.long().view(1), F.silu(out).to(xbc.dtype).unsqueeze(1))


def scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    slot: Tensor, gated: Tensor, shape: MixerShape, scale: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """One token of the recurrence, and the gate.

    Args:
        proj: (B, 2E + 2GN + H) with gate and step size. xbc: (B, K, C), this token's in row `slot`.
        base: (B, H, P, N), changed here for K = 1 only. steps, totals: (B, K, H) fp32, of this history.
        gated: (B, E), gets y * silu(z) before its norm. scale, squares: for a batch of one, the norm's weight, which
            `gated` is multiplied by, and the place for parts of its square; see `norm_linear`.
    """
    slots = xbc.shape[1]
    heads, groups = shape.num_heads, shape.n_groups
    at = slot.long().view(1)
    dt = F.softplus(proj[:, -heads:].float() + dt_bias.float()).clamp(*shape.time_step_limit)  # (B, H)
    now = torch.arange(slots, device=xbc.device) == at  # (K,)
    past = (torch.arange(slots, device=xbc.device) < at)[:, None]
    total = (totals * (now.roll(-1)[:, None] & past)).sum(1) - dt * torch.exp(A_log.float())
    totals.index_copy_(1, at, total.unsqueeze(1))
    steps.index_copy_(1, at, dt.unsqueeze(1))
    x, b, c = xbc.float().split([shape.inner, groups * shape.state_size, groups * shape.state_size], dim=-1)
    x = x.unflatten(-1, (heads, -1))  # (B, K, H, P)
    b = b.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2)  # (B, K, H, N)
    c = c.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2).index_select(1, at)[:, 0]
    # `where`, because slots not yet written may hold anything.
    weights = torch.where(past | now[:, None], steps * torch.exp(total.unsqueeze(1) - totals), 0.0)
    x = torch.where((past | now[:, None])[..., None], x, 0.0)
    b = torch.where((past | now[:, None])[..., None], b, 0.0)
    y = torch.exp(total)[..., None] * torch.einsum("bhpn,bhn->bhp", base.float(), c)
    y = y + torch.einsum("bkh,bkhp->bhp", weights * torch.einsum("bkhn,bhn->bkh", b, c), x)
    if slots == 1:
        base.copy_(torch.exp(total)[..., None, None] * base + torch.einsum("bkh,bkhp,bkhn->bhpn", weights, x, b))
    y = y + D.float()[:, None] * x.index_select(1, at)[:, 0]
    out = y.flatten(1).to(proj.dtype).float() * F.silu(proj[:, : shape.inner].float())
    if scale is not None:
        _put_square(out, squares)
        out = out * scale.float()
    gated.copy_(out)


def fold_history(xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, slot: Tensor, shape: MixerShape) -> None:
    """In the last slot, make the history part of `base`. All with a leading layer axis: (L, B, K, C), …"""
    groups, heads = shape.n_groups, shape.num_heads
    full = slot == xbc.shape[2] - 1
    for layer in range(len(base)):
        x, b, _ = xbc[layer].float().split([shape.inner, groups * shape.state_size, groups * shape.state_size], -1)
        b = b.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2)
        total = totals[layer, :, -1]  # (B, H)
        weights = steps[layer] * torch.exp(total.unsqueeze(1) - totals[layer])
        folded = torch.exp(total)[..., None, None] * base[layer]
        folded = folded + torch.einsum("bkh,bkhp,bkhn->bhpn", weights, x.unflatten(-1, (heads, -1)), b)
        base[layer].copy_(torch.where(full, folded.to(base.dtype), base[layer]))


def gated_linear_add(
    gated: Tensor, squares: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor, scaled: Tensor,
    out_squares: Tensor,
) -> None:  # fmt: skip
    """residual (1, D) += weight (D, E) times the RMS norm given by `gated` and `squares`, rounded to weight's dtype.

    `scaled` (1, D) and `out_squares` get the new residual as the next norm, of weight `scale`, wants it.
    """
    residual += _product(gated, squares, weight, eps).to(weight.dtype).to(residual.dtype)
    scale_residual(residual, scale, scaled, out_squares)


def scale_residual(residual: Tensor, scale: Tensor, scaled: Tensor, squares: Tensor) -> None:
    """residual (1, D) as `norm_linear` wants it: times the norm's weight, and its square."""
    _put_square(residual.float(), squares)
    scaled.copy_(residual.float() * scale.float())


def group_norm(gated: Tensor, scale: Tensor, eps: float, groups: int, out: Tensor) -> None:
    """out (B, E) = RMS norm of gated (B, E) within each group of channels."""
    out.copy_((_normed(gated.unflatten(-1, (groups, -1)), scale.view(groups, -1), eps)).flatten(-2))


def _product(scaled: Tensor, squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.linear(scaled.float(), weight.float()) * torch.rsqrt(squares.sum() / scaled.shape[-1] + eps)


def _put_square(x: Tensor, squares: Tensor) -> None:
    squares.zero_()
    squares[0] = x.pow(2).sum()


def _normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale.float()


OPERATIONS = SimpleNamespace(
    add_norm=add_norm,
    norm_linear=norm_linear,
    norm_linear_conv=norm_linear_conv,
    conv_step=conv_step,
    scan_step=scan_step,
    fold_history=fold_history,
    gated_linear_add=gated_linear_add,
    group_norm=group_norm,
)
"""What `decode_step.token_step` is made of."""
