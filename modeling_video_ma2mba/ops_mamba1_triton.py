"""The inside of a Mamba-1 mixer, and a whole VideoMamba block, on the Triton kernels, with backward written out.

`core_forward` and `core_backward` stand between the projections of a mixer. `MixerBlock` is a block from residual
stream to residual stream: it keeps the stream, which the next block needs anyway, and the states at the chunks'
starts; normed input, projections, convolution and steps are computed again in backward. Parameters are inputs of the
autograd nodes, so that hooks of distributed training fire once.

Legend: K scans, B batch, S tokens, C model width, E inner channels, N state per channel, R step rank, W conv width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_selective_scan_triton import (
    ScanInputs,
    conv_backward,
    conv_forward,
    decay_rates,
    scan_backward,
    scan_forward,
    tl,
    triton,
)


class ScanWeights(NamedTuple):
    """Parameters of the K scans of a mixer: conv_weight (K, E, W), conv_bias, D, dt_bias (K, E), x_weight
    (K, R + 2N, E), dt_weight (K, E, R), A_log (K, E, N)."""

    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


class _Prepared(NamedTuple):
    """The same as the kernels take them: fp32, and the step's rank padded with zeros to a multiple of 8, so that rows
    of the small products are aligned."""

    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    a2: Tensor
    D: Tensor
    rank: int

    @classmethod
    def of(cls, w: ScanWeights, dtype: torch.dtype) -> "_Prepared":
        rank, padded = w.dt_weight.shape[-1], -(-w.dt_weight.shape[-1] // 8) * 8
        low, rest = w.x_weight.split([rank, w.x_weight.shape[1] - rank], dim=1)
        return cls(
            w.conv_weight.float().contiguous(),
            w.conv_bias.float(),
            torch.cat([F.pad(low, (0, 0, 0, padded - rank)), rest], dim=1).to(dtype),
            F.pad(w.dt_weight, (0, padded - rank)).to(dtype),
            w.dt_bias.float(),
            decay_rates(-torch.exp(w.A_log.float())),
            w.D.float(),
            padded,
        )


def _inputs(xz: Tensor, w: _Prepared, reverse: Sequence[bool]) -> ScanInputs:
    """From the input projection (B, S, 2E) to what the scan reads."""
    x, z = xz.chunk(2, dim=-1)
    u = conv_forward(x, w.conv_weight, w.conv_bias, reverse)
    bc = torch.matmul(u.flatten(1, 2), w.x_weight.transpose(1, 2)).unflatten(1, u.shape[1:3])
    dt = torch.matmul(bc[..., : w.rank].flatten(1, 2), w.dt_weight.transpose(1, 2)).view_as(u)
    return ScanInputs(u, dt, bc, w.rank, z, w.a2, w.D, w.dt_bias, reverse)


_ROWS = 2048  # of a part of a product over all tokens, of which both sides are narrow


def _over_rows(a: Tensor, b: Tensor) -> Tensor:
    """`a.transpose(1, 2) @ b` over rows (K, R, .) by parts, else so small a result would keep few cores busy."""
    rows = a.shape[1]
    parts = rows // _ROWS
    if parts < 2:
        return torch.matmul(a.transpose(1, 2), b)
    size = rows // parts
    whole = parts * size
    total = []
    for one, other in zip(a, b, strict=True):  # one by one: matmul would copy both sides to join the axes
        pieces = [t[:whole].unflatten(0, (parts, size)) for t in (one, other)]
        total.append(torch.bmm(pieces[0].transpose(1, 2), pieces[1]).sum(dim=0, dtype=torch.float32))
        if whole < rows:
            total[-1] += one[whole:].T @ other[whole:]
    return torch.stack(total)


def _scan_all(xz: Tensor, w: _Prepared, reverse: Sequence[bool], keep: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the gated scans (B, S, E), and with `keep` the states that backward starts from."""
    y, _, kept = scan_forward(_inputs(xz, w, reverse), None, keep)
    return (y[0] + y[1] if len(y) == 2 else y.sum(dim=0)), kept


def _scan_all_backward(
    xz: Tensor, kept: Tensor, w: _Prepared, weights: ScanWeights, reverse: Sequence[bool], dy: Tensor
) -> tuple[Tensor, Tensor, ScanWeights]:
    """Gradient of xz, the core's output again, and the gradients of the weights."""
    given = _inputs(xz, w, reverse)
    found = scan_backward(given, kept, dy.to(xz.dtype), None)
    rank, rows = weights.dt_weight.shape[-1], (1, 2)
    ddt, u = found.ddt.flatten(*rows), given.u.flatten(*rows)
    dlow = torch.matmul(ddt, w.dt_weight)
    ddt_weight = _over_rows(ddt, given.bc[..., : w.rank].flatten(*rows))[..., :rank]
    dbc = torch.cat([dlow, found.dbc.flatten(*rows).to(dlow.dtype)], dim=-1)
    du = found.du.flatten(*rows).baddbmm_(dbc, w.x_weight).view_as(given.u)
    dx_weight = _over_rows(dbc, u)
    dx_weight = torch.cat([dx_weight[:, :rank], dx_weight[:, w.rank :]], dim=1)
    dxz = torch.empty_like(xz)
    dx, dz = dxz.chunk(2, dim=-1)
    assert found.dz is not None, "mixers have a gate"
    torch.add(found.dz[0], found.dz[1], out=dz) if len(found.dz) == 2 else torch.sum(found.dz, dim=0, out=dz)
    dconv_weight, dconv_bias = conv_backward(xz.chunk(2, dim=-1)[0], w.conv_weight, w.conv_bias, du, reverse, dx)
    rates = -torch.exp(weights.A_log.float())
    gradients = ScanWeights(
        dconv_weight, dconv_bias, dx_weight, ddt_weight, found.dbias, found.dA * rates, found.dskip
    )
    gradients = ScanWeights(*(g.to(p.dtype) for g, p in zip(gradients, weights, strict=True)))
    y = found.y[0] + found.y[1] if len(found.y) == 2 else found.y.sum(dim=0)
    return dxz, y, gradients


def core_forward(
    xz: Tensor, *weights: Tensor, reverse: Sequence[bool], keep: bool
) -> tuple[tuple[Tensor], tuple[Tensor | None, ...]]:
    """`mamba1_core` for the registry of operations."""
    xz = xz.contiguous()
    y, kept = _scan_all(xz, _Prepared.of(ScanWeights(*weights), xz.dtype), reverse, keep)
    return (y,), (kept,) if keep else ()


def core_backward(
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor],
    into: Any = None,
    *,
    reverse: Sequence[bool],
    keep: bool,
) -> tuple[Tensor, ...]:
    """Gradients of xz and of the weights."""
    xz, weights = tensors[0].contiguous(), ScanWeights(*tensors[1:])
    prepared = _Prepared.of(weights, xz.dtype)
    dxz, _, found = _scan_all_backward(xz, kept[0], prepared, weights, reverse, gradients[0])
    return dxz, *found


class MixerBlock(torch.autograd.Function):
    """`residual + delta -> RMS norm -> mixer`; returns the mixer's output (B, S, C) and the new residual stream."""

    @staticmethod
    def forward(
        ctx: Any,
        delta: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
        eps: float,
        reverse: Sequence[bool],
        dtype: torch.dtype,
        keep: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if residual is None and delta.dtype == torch.float32:
            delta = delta.clone()  # it becomes the stream, which is a result
        stream, normed = add_norm_forward(delta, residual, norm_weight, eps, dtype)
        prepared = _Prepared.of(ScanWeights(*weights), dtype)
        xz = F.linear(normed, in_weight.to(dtype))
        y, kept = _scan_all(xz, prepared, reverse, keep)
        ctx.save_for_backward(stream, kept, norm_weight, in_weight, out_weight, *weights)
        ctx.eps, ctx.reverse, ctx.dtype, ctx.delta_dtype = eps, reverse, dtype, delta.dtype
        ctx.has_residual = residual is not None
        return F.linear(y, out_weight.to(dtype)), stream

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dstream: Tensor | None) -> tuple[Any, ...]:
        stream, kept, norm_weight, in_weight, out_weight, *tensors = ctx.saved_tensors
        weights, dtype = ScanWeights(*tensors), ctx.dtype
        prepared = _Prepared.of(weights, dtype)
        in_cast, out_cast = in_weight.to(dtype), out_weight.to(dtype)
        _, normed = add_norm_forward(stream, None, norm_weight, ctx.eps, dtype)
        xz = F.linear(normed, in_cast)
        dout = dout.to(dtype).contiguous()
        dxz, y, gradients = _scan_all_backward(xz, kept, prepared, weights, ctx.reverse, torch.matmul(dout, out_cast))
        dout_weight = torch.matmul(dout.flatten(0, 1).T, y.flatten(0, 1)).to(out_weight.dtype)
        del y, xz
        flat = dxz.flatten(0, 1)
        din_weight = torch.matmul(flat.T, normed.flatten(0, 1)).to(in_weight.dtype)
        dnormed = torch.matmul(dxz, in_cast)
        total, dnorm_weight = norm_backward(stream, norm_weight, ctx.eps, dnormed, dstream)
        return (
            total.to(ctx.delta_dtype),
            total if ctx.has_residual else None,
            dnorm_weight.to(norm_weight.dtype),
            din_weight,
            dout_weight,
            None,
            None,
            None,
            None,
            *gradients,
        )


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    delta_ptr, residual_ptr, weight_ptr, stream_ptr, normed_ptr, rows, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the stream, `delta` plus the residual where ADD, in fp32, and their RMS norm."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    at = r[:, None] * width + c[None, :]
    x = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0)
    tl.store(stream_ptr + at, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, (x * scale[:, None] * weight[None, :]).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    stream_ptr, weight_ptr, dnormed_ptr, dstream_ptr, total_ptr, dweight_ptr, rows, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One program: gradients of TURNS * ROWS rows of the stream, `dstream` added where ADD, and their part of the
    weight's gradient, fp32 (programs, width), which the caller sums up."""
    c = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([WIDTH], tl.float32)
    for turn in range(0, TURNS):
        r = (tl.program_id(0).to(tl.int64) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        at = r[:, None] * width + c[None, :]
        x = tl.load(stream_ptr + at, mask=inside, other=0.0)
        g = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
        unit = x * scale[:, None]
        dweight += tl.sum(g * unit, axis=0)
        g = g * weight[None, :]
        total = (g - unit * (tl.sum(g * unit, axis=1) / width)[:, None]) * scale[:, None]
        if ADD:
            total += tl.load(dstream_ptr + at, mask=inside, other=0.0)
        tl.store(total_ptr + at, total, mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * width + c, dweight, mask=c < width)


_NORM_ROWS, _NORM_TURNS = 8, 16


def add_norm_forward(
    delta: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream `residual + delta` in fp32 and its RMS norm in `dtype`; (B, S, C)."""
    delta = delta.contiguous()
    width = delta.shape[-1]
    rows = delta.numel() // width
    # Without a residual an fp32 input is the stream already (backward); it is written over by itself.
    own = residual is None and delta.dtype == torch.float32
    stream = delta if own else torch.empty_like(delta, dtype=torch.float32)
    normed = torch.empty_like(delta, dtype=dtype)
    add_norm_kernel[(triton.cdiv(rows, _NORM_ROWS),)](
        delta, stream if residual is None else residual.contiguous(), weight, stream, normed, rows, width, eps,
        ADD=residual is not None, ROWS=_NORM_ROWS, WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return stream, normed


def norm_backward(
    stream: Tensor, weight: Tensor, eps: float, dnormed: Tensor, dstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of the stream, that of later uses `dstream` added, and of the weight (both fp32)."""
    width = stream.shape[-1]
    rows = stream.numel() // width
    programs = triton.cdiv(rows, _NORM_ROWS * _NORM_TURNS)
    total = torch.empty_like(stream)
    parts = torch.empty(programs, width, dtype=torch.float32, device=stream.device)
    norm_backward_kernel[(programs,)](
        stream, weight, dnormed.contiguous(), total if dstream is None else dstream.contiguous(), total, parts, rows,
        width, eps, ADD=dstream is not None, ROWS=_NORM_ROWS, WIDTH=triton.next_power_of_2(width), TURNS=_NORM_TURNS,
        num_warps=4,
    )  # fmt: skip
    return total, parts.sum(dim=0)
