"""The residual sum with its RMS norm on the Triton kernel of mamba-ssm, and its gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .ops_ssd_mamba_ssm import kernels_of


def add_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fused `residual + delta` and its RMS norm: (B, S, D) -> normed in `dtype`, the sum in residual's dtype."""
    return _AddNorm.apply(residual, delta, weight, eps, dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        (_layer_norm_fwd,) = kernels_of("mamba_ssm.ops.triton.layer_norm", "_layer_norm_fwd")

        size = residual.shape[-1]
        rows = residual.reshape(-1, size)
        if delta is None:
            normed, _, _, rstd, total, *_ = _layer_norm_fwd(
                rows, weight, None, eps, out_dtype=dtype, residual_dtype=rows.dtype, is_rms_norm=True
            )
        else:
            normed, _, _, rstd, total, *_ = _layer_norm_fwd(
                delta.reshape(-1, size), weight, None, eps, residual=rows, out_dtype=dtype, is_rms_norm=True
            )
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps, ctx.delta_dtype = eps, None if delta is None else delta.dtype
        ctx.normed_dtype, ctx.shape = dtype, residual.shape
        ctx.set_materialize_grads(False)
        return normed.view(residual.shape), total.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        (_layer_norm_bwd,) = kernels_of("mamba_ssm.ops.triton.layer_norm", "_layer_norm_bwd")

        total, weight, rstd = ctx.saved_tensors
        size = total.shape[-1]
        if dnormed is None:  # only the sum was used
            dnormed = torch.zeros_like(total, dtype=ctx.normed_dtype)
        out = _layer_norm_bwd(
            dnormed.reshape(-1, size).contiguous(), total, weight, None, ctx.eps, None, rstd,
            dresidual=None if dtotal is None else dtotal.reshape(-1, size).contiguous(),
            has_residual=ctx.delta_dtype is not None, is_rms_norm=True, x_dtype=ctx.delta_dtype or total.dtype,
        )  # fmt: skip
        dx, dweight, dresidual = out[0], out[1], out[3]
        if ctx.delta_dtype is None:
            return dx.view(ctx.shape), None, dweight, None, None
        return dresidual.view(ctx.shape), dx.view(ctx.shape), dweight, None, None
