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

from .ops_costs import MixerShape

LARGEST_PRODUCT = 64
"""Rows of the largest batch whose products are split into sums; PyTorch does larger ones."""
SPLITS = 5
"""Sums of a product with out_proj, at most."""


def square_parts(shape: MixerShape) -> int:
    """Sums into which a row's squares are split before the gated norm: one for up to 16 channels of a head."""
    return shape.num_heads * -(-shape.head_dim // 16)


def partial_sums(batch: int, weight: Tensor) -> tuple[int, torch.dtype]:
    """How many sums `partial_product` by `weight` (D, E) writes, and in which dtype."""
    blocks, rest = divmod(weight.shape[1], 128)
    if rest or batch > LARGEST_PRODUCT or weight.dtype == torch.float32:
        return 1, weight.dtype
    return max(count for count in range(1, SPLITS + 1) if blocks % count == 0), torch.float32


def add_norm(
    residual: Tensor, partial: Tensor | None, squares: Tensor | None, inner: int, scale: Tensor, eps: float,
    out: Tensor,
) -> None:  # fmt: skip
    """residual (B, D) += the sum of partial (S, B, D), times 1 / rms; out (B, D) = RMS norm of that, in out's dtype.

    Args:
        squares: (B, any number), which add up to the square of the vector of `inner` values that was multiplied
            before it was normalised; None where it had been.
    """
    if partial is not None:
        delta = partial.float().sum(0)
        if squares is not None:
            delta = delta * torch.rsqrt(squares.sum(-1, keepdim=True) / inner + eps)
        residual += delta.to(residual.dtype)
    out.copy_(_normed(residual, scale, eps))


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (B, M) = x (B, D) times weight (M, D)."""
    torch.mm(x, weight.T, out=out)


def partial_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (S, B, D), whose sum is x (B, E) times weight (D, E)."""
    parts = zip(x.chunk(len(out), -1), weight.chunk(len(out), -1), out, strict=True)
    for x_part, weight_part, sums in parts:
        sums.copy_(F.linear(x_part.to(out.dtype), weight_part.to(out.dtype)))


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


def prepare_step(
    proj: Tensor, conv_state: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, xbc: Tensor, steps: Tensor, totals: Tensor, slot: Tensor, weights: Tensor, decay: Tensor,
    shape: MixerShape,
) -> None:  # fmt: skip
    """`conv_step`, and what a head of a row needs to know for this token.

    Args:
        steps, totals: (B, K, H) fp32, of this history; get this token's in row `slot`.
        weights: (B, H, K) fp32, gets how much each x of the history counts for y, 0 for those to come.
        decay: (B, H) fp32, gets how much the state does.
    """
    conv_step(proj, conv_state, conv_weight, conv_bias, xbc, slot, shape)
    _weigh(proj, dt_bias, A_log, D, xbc, steps, totals, slot, weights, decay, shape)


def _weigh(
    proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, xbc: Tensor, steps: Tensor, totals: Tensor,
    slot: Tensor, weights: Tensor, decay: Tensor, shape: MixerShape,
) -> None:  # fmt: skip
    slots, heads, groups = xbc.shape[1], shape.num_heads, shape.n_groups
    at = slot.long().view(1)
    dt = F.softplus(proj[:, -heads:].float() + dt_bias.float()).clamp(*shape.time_step_limit)  # (B, H)
    now = torch.arange(slots, device=xbc.device) == at  # (K,)
    past = (torch.arange(slots, device=xbc.device) < at)[:, None]
    total = (totals * (now.roll(-1)[:, None] & past)).sum(1) - dt * torch.exp(A_log.float())
    totals.index_copy_(1, at, total.unsqueeze(1))
    steps.index_copy_(1, at, dt.unsqueeze(1))
    b, c = xbc[..., shape.inner :].float().unflatten(-1, (2, groups, -1)).unbind(2)  # (B, K, G, N)
    scores = torch.einsum("bkgn,bgn->bkg", b, c.index_select(1, at)[:, 0]).repeat_interleave(heads // groups, -1)
    counts = steps * torch.exp(total.unsqueeze(1) - totals) * scores + now[:, None] * D.float()
    # `where`, because slots not yet written may hold anything.
    weights.copy_(torch.where(past | now[:, None], counts, 0.0).transpose(1, 2))
    decay.copy_(torch.exp(total))


def batch_scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, weights: Tensor, decay: Tensor, steps: Tensor, totals: Tensor,
    slot: Tensor, fold: bool, gated: Tensor, scale: Tensor | None, squares: Tensor | None, shape: MixerShape,
) -> None:  # fmt: skip
    """One token of the recurrence, and the gate.

    Args:
        proj: (B, 2E + 2GN + H) with the gate. xbc: (B, K, C), steps, totals, weights, decay: after `prepare_step`.
        base: (B, H, P, N), which the history becomes a part of where `fold` says so.
        gated: (B, E), gets y * silu(z) before its norm. scale, squares (B, any number): the norm's weight, which
            `gated` is multiplied by, and the place for parts of its square; or None.
    """
    heads, groups, at = shape.num_heads, shape.n_groups, slot.long().view(1)
    x, b, c = xbc.float().split([shape.inner, groups * shape.state_size, groups * shape.state_size], dim=-1)
    x = x.unflatten(-1, (heads, -1))  # (B, K, H, P)
    b = b.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2)  # (B, K, H, N)
    c = c.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2).index_select(1, at)[:, 0]
    y = decay[..., None] * torch.einsum("bhpn,bhn->bhp", base.float(), c)
    y = y + torch.einsum("bhk,bkhp->bhp", weights, torch.where((weights != 0).transpose(1, 2)[..., None], x, 0.0))
    if fold:
        counts = steps * torch.exp(totals[:, -1:] - totals)
        base.copy_(decay[..., None, None] * base + torch.einsum("bkh,bkhp,bkhn->bhpn", counts, x, b))
    out = y.flatten(1).to(proj.dtype).float() * F.silu(proj[:, : shape.inner].float())
    if scale is not None and squares is not None:
        _put_square(out, squares)
        out = out * scale.float()
    gated.copy_(out)


def scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    slot: Tensor, fold: bool, gated: Tensor, shape: MixerShape, scale: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """`prepare_step` but for the convolution, and `batch_scan_step`, for a single row; squares (any number,)."""
    weights = steps.new_empty(1, shape.num_heads, xbc.shape[1])
    decay = steps.new_empty(1, shape.num_heads)
    _weigh(proj, dt_bias, A_log, D, xbc, steps, totals, slot, weights, decay, shape)
    batch_scan_step(proj, xbc, base, weights, decay, steps, totals, slot, fold, gated, scale, squares[None], shape)


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
    squares[..., 0] = x.pow(2).sum(-1)


def _normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale.float()


OPERATIONS = SimpleNamespace(
    add_norm=add_norm,
    norm_linear=norm_linear,
    norm_linear_conv=norm_linear_conv,
    scan_step=scan_step,
    product=product,
    prepare_step=prepare_step,
    batch_scan_step=batch_scan_step,
    partial_product=partial_product,
    gated_linear_add=gated_linear_add,
    group_norm=group_norm,
)
"""What `decode_step.token_step` is made of."""
