"""Backends on the kernels of mamba-ssm (Triton) and causal-conv1d (CUDA), for CUDA in bf16 and fp16.

Everything here that is private to those packages is in this file, and may be another thing in another version: only
the versions in `TESTED` run. The packages' own fused functions are not called: they take no convolution state, round
the gradient of the starting state to 16 bits, and read the projection weights past any adapter. Their kernels are, as
forward and backward functions that keep the state's gradient in fp32 and write input gradients into given buffers.
"""

import functools
import importlib
import importlib.metadata
import warnings
from typing import Any

import torch
from torch import Tensor

from .ops_costs import ADD_NORM_COSTS, CONV_COSTS, GATED_NORM_COSTS, SSD_COSTS, CallCost
from .ops_registry import Backend, Call

TESTED = {"mamba-ssm": "2.3", "causal-conv1d": "1.7"}
"""Package -> the minor version that these calls were tested with (the `cuda` extra)."""
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@functools.cache
def kernels_available() -> bool:
    """Whether the kernel packages import, in versions we know. A broken or unknown version warns once and leaves
    PyTorch in charge."""
    try:
        importlib.import_module("causal_conv1d.cpp_functions")
        importlib.import_module("mamba_ssm.ops.triton.layer_norm")
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ModuleNotFoundError:
        return False
    except Exception as error:  # a wheel built for another torch fails in many ways
        warnings.warn(
            f"mamba-ssm or causal-conv1d is installed but does not load ({error}); using PyTorch instead", stacklevel=2
        )
        return False
    for package, tested in TESTED.items():
        found = _version(package)
        if found.split(".")[:2] != tested.split("."):
            warnings.warn(
                f"{package} {found} is installed, and its kernels were tested in version {tested} only; using PyTorch "
                f"instead: pip install '{package}=={tested}.*'",
                stacklevel=2,
            )
            return False
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        return getattr(importlib.import_module(package.replace("-", "_")), "__version__", "of unknown version")


def _kernels_of(module: str, *names: str) -> list[Any]:
    """Functions of a kernel package. Not `from … import`: transformers refuses to load code from the Hub that imports,
    in whatever function, a package that is not installed."""
    loaded = importlib.import_module(module)
    return [getattr(loaded, name) for name in names]


def _backend(cost: CallCost, **fields: Any) -> Backend:
    return Backend(
        "mamba_ssm",
        device="cuda",
        dtypes=_SIXTEEN_BITS,
        available=kernels_available,
        **vars(cost),
        **fields,
    )


# ---------------------------------------------------------------------------------------------- causal convolution
def _conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ids: Tensor | None
) -> tuple[tuple[Tensor], tuple[()]]:
    (causal_conv1d_fwd_function,) = _kernels_of("causal_conv1d.cpp_functions", "causal_conv1d_fwd_function")

    state = state.transpose(1, 2).contiguous().transpose(1, 2)
    if ids is None:
        out = causal_conv1d_fwd_function(_channels_last(x), weight, bias, None, state, None, True).transpose(1, 2)
        return (out,), ()
    # With sample numbers the kernel takes no state: put the state's rows in front of the tokens.
    x = torch.cat([state.transpose(1, 2), x], dim=1)
    out = causal_conv1d_fwd_function(_channels_last(x), weight, bias, _non_negative(ids), None, None, True)
    return (out.transpose(1, 2)[:, state.shape[-1] :],), ()


def _conv_backward(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    kept: tuple[()],
    gradients: tuple[Tensor],
    into: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    (causal_conv1d_bwd_function,) = _kernels_of("causal_conv1d.cpp_functions", "causal_conv1d_bwd_function")

    x, weight, bias, state, ids = tensors
    (dout,) = gradients
    dx_out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    state = state.transpose(1, 2).contiguous().transpose(1, 2)
    if ids is None:
        inplace = dx_out.stride(0) % 8 == 0 and dx_out.stride(1) % 8 == 0
        dx, dweight, dbias, dstate = causal_conv1d_bwd_function(
            _channels_last(x), weight, bias, _channels_last(dout), None, state, None,
            dx_out.transpose(1, 2) if inplace else None, True, True,
        )  # fmt: skip
        if not inplace:
            dx_out.copy_(dx.transpose(1, 2))
        return dx_out, dweight, dbias, dstate, None
    halo = state.shape[-1]
    x = torch.cat([state.transpose(1, 2), x], dim=1)
    dout = torch.cat([dout.new_zeros(dout.shape[0], halo, dout.shape[2]), dout], dim=1)
    dx, dweight, dbias, _ = causal_conv1d_bwd_function(
        _channels_last(x), weight, bias, _channels_last(dout), _non_negative(ids), None, None, None, False, True
    )
    dx = dx.transpose(1, 2)
    dx_out.copy_(dx[:, halo:])
    return dx_out, dweight, dbias, dx[:, :halo].transpose(1, 2), None


def _channels_last(x: Tensor) -> Tensor:
    """(B, S, C) as the (B, C, S) view the convolution wants; copied when a stride is not a multiple of 8."""
    if x.stride(0) % 8 or x.stride(1) % 8 or x.stride(2) != 1:
        # Not `contiguous()`: for a single token it returns x with the strides it has.
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x.transpose(1, 2)


def _non_negative(ids: Tensor) -> Tensor:
    """Samples before the current one only have to differ from it; the kernel skips tokens with negative numbers."""
    return ids.clamp(min=-1) + 1


def _conv_fits(call: Call) -> bool:
    """The kernel reads 8 channels at a time, from 16-byte aligned addresses."""
    return call.sizes["channels"] % 8 == 0 and call.sizes["offset"] % 8 == 0


CAUSAL_CONV = _backend(CONV_COSTS["mamba_ssm"], forward=_conv_forward, backward=_conv_backward, fits=_conv_fits)


# -------------------------------------------------------------------------------------------------------- SSD scan
def _ssd_forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    ids: Tensor | None, chunk_size: int, dt_limit: tuple[float, float],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Keeps step sizes and their decays summed within each chunk, both (B, H, chunks, Q), and the states entering the
    chunks, (B, chunks, H, P, N)."""
    (_mamba_chunk_scan_combined_fwd,) = _kernels_of(
        "mamba_ssm.ops.triton.ssd_combined", "_mamba_chunk_scan_combined_fwd"
    )
    y, _, steps, total, states, new_state = _mamba_chunk_scan_combined_fwd(
        x, dt, a, b, c, chunk_size=chunk_size, D=D, dt_bias=dt_bias, initial_states=state,
        seq_idx=ids, dt_softplus=True, dt_limit=dt_limit,
    )  # fmt: skip
    return (y, new_state), (steps, total, states)


def _ssd_backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None, Tensor | None],
    kept: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    chunk_size: int,
    dt_limit: tuple[float, float],
) -> tuple[Tensor | None, ...]:
    """The order of the kernels is that of mamba-ssm's own backward; the differences are that it recomputes what is
    kept, and that here the gradients of the chunk states, and with them that of the starting state, stay in fp32."""
    _bmm_chunk_bwd, _bmm_chunk_fwd = _kernels_of("mamba_ssm.ops.triton.ssd_bmm", "_bmm_chunk_bwd", "_bmm_chunk_fwd")
    _chunk_scan_bwd_dC, _chunk_scan_bwd_dcb, _chunk_scan_bwd_ddAcs_stable, _chunk_scan_bwd_dstates = _kernels_of(
        "mamba_ssm.ops.triton.ssd_chunk_scan",
        "_chunk_scan_bwd_dC",
        "_chunk_scan_bwd_dcb",
        "_chunk_scan_bwd_ddAcs_stable",
        "_chunk_scan_bwd_dstates",
    )
    _chunk_cumsum_bwd, _chunk_state_bwd_db = _kernels_of(
        "mamba_ssm.ops.triton.ssd_chunk_state", "_chunk_cumsum_bwd", "_chunk_state_bwd_db"
    )
    (_chunk_scan_chunk_state_bwd_dx,) = _kernels_of(
        "mamba_ssm.ops.triton.ssd_combined", "_chunk_scan_chunk_state_bwd_dx"
    )
    (_state_passing_bwd,) = _kernels_of("mamba_ssm.ops.triton.ssd_state_passing", "_state_passing_bwd")

    x, dt, a, b, c, D, dt_bias, _, ids = tensors
    steps, total, states = kept
    dout, dnew_state = gradients
    if dout is None:  # only the state was used
        dout = torch.zeros_like(x)
    dx, ddt, db, dc = (torch.empty_like(t) for t in (x, dt, b, c)) if into is None else into
    groups, size = b.shape[2:]
    scores = _bmm_chunk_fwd(c, b, chunk_size, seq_idx=ids, output_dtype=torch.float32)
    dstates = _chunk_scan_bwd_dstates(c, total, dout, seq_idx=ids, dtype=torch.float32)
    dstates, dcarry, dstate = _state_passing_bwd(
        states.flatten(3), total[:, :, :, -1], dstates.flatten(3),
        dfinal_states=None if dnew_state is None else dnew_state.float().contiguous().flatten(2),
        seq_idx=ids, has_initial_states=True, dstates_dtype=torch.float32, chunk_size=chunk_size,
    )  # fmt: skip
    dstates = dstates.unflatten(-1, (-1, size))
    dx, dsteps, dD = _chunk_scan_chunk_state_bwd_dx(x, steps, total, b, scores, dout, dstates, D=D, seq_idx=ids, dx=dx)
    db_states, dtotal_next = _chunk_state_bwd_db(x, steps, total, dstates, seq_idx=ids, B=b, ngroups=groups)
    dc_states, dtotal_prev = _chunk_scan_bwd_dC(states, total, dout, seq_idx=ids, C=c, ngroups=groups)
    dscores = _chunk_scan_bwd_dcb(x, steps, total, dout, seq_idx=ids, ngroups=groups).to(scores.dtype)
    _bmm_chunk_bwd(c, dscores, residual=db_states, out=db)
    _bmm_chunk_bwd(b, dscores.transpose(-1, -2), residual=dc_states, out=dc)
    dtotal_prev[..., -1] += dcarry
    dtotal = _chunk_scan_bwd_ddAcs_stable(x, steps, total, dout, scores)
    dtotal += dtotal_next
    dtotal += dtotal_prev.flip([-1]).cumsum(dim=-1).flip([-1])
    _, da, ddt_bias = _chunk_cumsum_bwd(
        dtotal, dsteps, dt, a, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit, ddt=ddt
    )
    return dx, ddt, da, db, dc, dD, ddt_bias, dstate.unflatten(-1, (-1, size)), None


def _ssd_fits(call: Call) -> bool:
    """A single token is a few small products: the chunk kernels would round the state to 16 bits for nothing. Padding
    is told from tokens by steps of size zero, which a lower bound would not let stand."""
    return call.tokens > 1 and not (call.padded and call.sizes["dt_min"] > 0)


# Backward reads the states that entered the chunks, not the one that was given.
SSD = _backend(
    SSD_COSTS["mamba_ssm"],
    forward=_ssd_forward,
    backward=_ssd_backward,
    needs=(0, 1, 2, 3, 4, 5, 6, 8),
    fits=_ssd_fits,
)


# ----------------------------------------------------------------------------------------------------------- norms
def _add_norm_forward(
    residual: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Keeps the sum, 1 / rms, and an empty tensor of delta's type."""
    (_layer_norm_fwd,) = _kernels_of("mamba_ssm.ops.triton.layer_norm", "_layer_norm_fwd")

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
    kept = (total, rstd) if delta is None else (total, rstd, delta.new_empty(0))
    return (normed.view(residual.shape), total.view(residual.shape)), kept


def _add_norm_backward(
    tensors: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, Tensor | None],
    into: None = None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    (_layer_norm_bwd,) = _kernels_of("mamba_ssm.ops.triton.layer_norm", "_layer_norm_bwd")

    weight, (total, rstd, *like_delta) = tensors[2], kept
    dnormed, dtotal = gradients
    shape = next(g.shape for g in gradients if g is not None)
    size = total.shape[-1]
    if dnormed is None:  # only the sum was used
        dnormed = torch.zeros_like(total, dtype=dtype)
    out = _layer_norm_bwd(
        dnormed.reshape(-1, size).contiguous(), total, weight, None, eps, None, rstd,
        dresidual=None if dtotal is None else dtotal.reshape(-1, size).contiguous(),
        has_residual=bool(like_delta), is_rms_norm=True, x_dtype=like_delta[0].dtype if like_delta else total.dtype,
    )  # fmt: skip
    dx, dweight, dresidual = out[0], out[1], out[3]
    if not like_delta:
        return dx.view(shape), None, dweight
    return dresidual.view(shape), dx.view(shape), dweight


ADD_RMS_NORM = _backend(
    ADD_NORM_COSTS["mamba_ssm"],
    forward=_add_norm_forward,
    backward=_add_norm_backward,
    needs=(2,),
)


def _gated_norm_forward(
    y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Keeps 1 / rms."""
    (_layer_norm_fwd,) = _kernels_of("mamba_ssm.ops.triton.layernorm_gated", "_layer_norm_fwd")

    inner = y.shape[-1]
    out, _, rstd = _layer_norm_fwd(
        y.view(-1, inner), weight, None, eps, z.view(-1, inner),
        group_size=inner // groups, norm_before_gate=False, is_rms_norm=True,
    )  # fmt: skip
    return (out.view(y.shape),), (rstd,)


def _gated_norm_backward(
    tensors: tuple[Tensor, Tensor, Tensor],
    kept: tuple[Tensor],
    gradients: tuple[Tensor],
    into: Tensor | None = None,
    *,
    eps: float,
    groups: int,
) -> tuple[Tensor | None, ...]:
    (_layer_norm_bwd,) = _kernels_of("mamba_ssm.ops.triton.layernorm_gated", "_layer_norm_bwd")

    y, z, weight = tensors
    inner = y.shape[-1]
    dz = torch.empty_like(z) if into is None else into
    dy, dweight, _, _ = _layer_norm_bwd(
        gradients[0].reshape(-1, inner).contiguous(), y.view(-1, inner), weight, None, eps,
        None, kept[0], z.view(-1, inner), group_size=inner // groups, norm_before_gate=False,
        is_rms_norm=True, dz=dz.view(-1, inner),
    )  # fmt: skip
    return dy.view(y.shape), dz, dweight


GATED_RMS_NORM = _backend(
    GATED_NORM_COSTS["mamba_ssm"],
    forward=_gated_norm_forward,
    backward=_gated_norm_backward,
)
