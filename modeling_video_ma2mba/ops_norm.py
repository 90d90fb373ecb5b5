"""RMS norms: of the residual sum in front of a mixer, and of the gated output behind a scan.

Legend: B batch, S tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_mamba_ssm import ADD_RMS_NORM as _ADD_MAMBA_SSM
from .ops_mamba_ssm import GATED_RMS_NORM as _GATED_MAMBA_SSM
from .ops_registry import Backend, Operation, run


def add_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual + delta` and its RMS norm.

    Args:
        residual: (B, S, D) in any type; delta: (B, S, D) or None; weight: (D,).

    Returns:
        normed (B, S, D) in `dtype`, the sum in residual's dtype.
    """
    backend = ADD_RMS_NORM.pick(residual.device, dtype, residual.shape[1], width=residual.shape[2])
    return run(backend, residual, delta, weight, eps=eps, dtype=dtype)


def add_rms_norm_torch(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch: in fp32, fp64 for fp64 inputs."""
    if delta is not None:
        residual = residual + delta.to(residual.dtype)
    work = torch.promote_types(residual.dtype, torch.float32)
    x = residual.to(work)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(work)).to(dtype), residual


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMS norm of y * silu(z) within each of `groups` groups of channels. y, z: (B, S, D); weight: (D,)."""
    backend = GATED_RMS_NORM.pick(y.device, y.dtype, y.shape[1], width=y.shape[2], groups=groups)
    return run(backend, y, z, weight, eps=eps, groups=groups)


def gated_rms_norm_torch(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`gated_rms_norm` in plain PyTorch: in fp32, fp64 for fp64 inputs."""
    work = torch.promote_types(y.dtype, torch.float32)
    gated = (y.to(work) * F.silu(z.to(work))).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(work)).to(y.dtype)


_ADD_TORCH = Backend("torch", add_rms_norm_torch, kept_bytes=lambda itemsize, width: 2 * itemsize * width)
ADD_RMS_NORM = Operation("add_rms_norm", (_ADD_MAMBA_SSM, _ADD_TORCH))
"""Sizes: width; kept bytes are of the residual's type."""

_GATED_TORCH = Backend(
    "torch", gated_rms_norm_torch, kept_bytes=lambda itemsize, width, groups: 3 * itemsize * width
)  # fmt: skip
GATED_RMS_NORM = Operation("gated_rms_norm", (_GATED_MAMBA_SSM, _GATED_TORCH))
"""Sizes: width, groups. `into`: the gradient of z."""
