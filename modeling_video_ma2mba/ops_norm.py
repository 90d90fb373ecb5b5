"""RMS norms: of the residual sum in front of a mixer, and of the gated output behind a scan.

Legend: B batch, S tokens, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_costs import ADD_NORM_COSTS, GATED_NORM_COSTS
from .ops_mamba_ssm import ADD_RMS_NORM as _ADD_MAMBA_SSM
from .ops_mamba_ssm import GATED_RMS_NORM as _GATED_MAMBA_SSM
from .ops_registry import Backend, Operation, run, triton_available


class PendingDelta(NamedTuple):
    """What a mixer adds to the stream but for the factor of its gated norm, which can wait until behind the
    projection: whoever adds it up applies the factor as well. Only kernels make such, where nothing is differentiated.

    value: (B, S, D); squares: (B, S, parts) fp32, sums of squares of the `inner` numbers in front of the projection.
    """

    value: Tensor
    squares: Tensor
    inner: int
    eps: float

    def settled(self) -> Tensor:
        """The delta, (B, S, D) in the type of `value`."""
        factor = torch.rsqrt(self.squares.sum(-1, keepdim=True) / self.inner + self.eps)
        return (self.value * factor).to(self.value.dtype)


def add_rms_norm(
    residual: Tensor, delta: "Tensor | PendingDelta | None", weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual + delta` and its RMS norm.

    Args:
        residual: (B, S, D) in any type; delta: (B, S, D), pending or None; weight: (D,).

    Returns:
        normed (B, S, D) in `dtype`, the sum in residual's dtype.
    """
    if isinstance(delta, tuple):
        from .ops_norm_triton import add_pending_norm

        return add_pending_norm(residual, *delta, weight, eps, dtype)
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


def mixed_sum(wide: Tensor, narrow: Tensor, out: Tensor | None = None) -> Tensor:
    """`wide + narrow`, into `out` if given. PyTorch adds 16 bits to fp32 at half the memory's speed, our kernel at all
    of it; the numbers are the same."""
    dense = wide.is_cuda and wide.is_contiguous() and narrow.is_contiguous() and wide.shape == narrow.shape
    narrow_type = narrow.dtype in (torch.float16, torch.bfloat16)
    if not (dense and wide.dtype == torch.float32 and narrow_type and wide.numel() and triton_available()):
        return torch.add(wide, narrow, out=out)
    from .ops_norm_triton import mixed_sum as by_kernel

    out = torch.empty_like(wide) if out is None else out
    by_kernel(wide, narrow, out)
    return out


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


def _triton_add_forward(*tensors: Tensor, **options: Any) -> Any:
    from .ops_norm_triton import add_norm_forward

    return add_norm_forward(*tensors, **options)


def _triton_add_backward(*arguments: Any, **options: Any) -> Any:
    from .ops_norm_triton import add_norm_backward

    return add_norm_backward(*arguments, **options)


def _triton_gated_forward(*tensors: Tensor, **options: Any) -> Any:
    from .ops_norm_triton import gated_norm_forward

    return gated_norm_forward(*tensors, **options)


def _triton_gated_backward(*arguments: Any, **options: Any) -> Any:
    from .ops_norm_triton import gated_norm_backward

    return gated_norm_backward(*arguments, **options)


def _triton(forward: Any, backward: Any, **fields: Any) -> Backend:
    fields = fields | {"device": "cuda", "dtypes": (torch.float16, torch.bfloat16), "available": triton_available}
    return Backend("triton", forward, backward, fits=lambda call: call.sizes["width"] <= 16384, **fields)


_ADD_TRITON = _triton(
    _triton_add_forward,
    _triton_add_backward,
    needs=_ADD_MAMBA_SSM.needs,
    **vars(ADD_NORM_COSTS["triton"]),
)
_ADD_TORCH = Backend("torch", add_rms_norm_torch, **vars(ADD_NORM_COSTS["torch"]))
ADD_RMS_NORM = Operation("add_rms_norm", (_ADD_TRITON, _ADD_MAMBA_SSM, _ADD_TORCH))
"""Sizes: width; kept bytes are of the residual's type."""

_GATED_TRITON = _triton(_triton_gated_forward, _triton_gated_backward, **vars(GATED_NORM_COSTS["triton"]))
_GATED_TORCH = Backend("torch", gated_rms_norm_torch, **vars(GATED_NORM_COSTS["torch"]))
GATED_RMS_NORM = Operation("gated_rms_norm", (_GATED_TRITON, _GATED_MAMBA_SSM, _GATED_TORCH))
"""Sizes: width, groups. `into`: the gradient of z."""
