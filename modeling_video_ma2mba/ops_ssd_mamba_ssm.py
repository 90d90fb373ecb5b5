"""`mixer_core` on the kernels of mamba-ssm (Triton) and causal-conv1d (CUDA); add-and-norm: `ops_norm_mamba_ssm`.

The packages' own fused functions are not called: they take no convolution state, round the gradient of the starting
state to 16 bits, and read the projection weights past any adapter. Their kernels are, in one autograd function that
keeps the state's gradient in fp32, writes every input gradient in place into one buffer, and copies border states
out of the tensors they are views of. Tested with mamba-ssm 2.3 and causal-conv1d 1.7 (the `cuda` extra).
"""

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_ssd import MixerShape, last_rows

# softplus(-1e4 + bias) is exactly zero, and so is its derivative: such a token leaves the state alone.
_NO_STEP = -1e4


@functools.cache
def kernels_available() -> bool:
    """Whether the kernel packages import. A broken or unknown version warns once and leaves PyTorch in charge."""
    try:
        import causal_conv1d.cpp_functions  # noqa: F401
        import mamba_ssm.ops.triton.layer_norm
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except ModuleNotFoundError:
        return False
    except Exception as error:  # a wheel built for another torch fails in many ways
        warnings.warn(
            f"mamba-ssm or causal-conv1d is installed but does not load ({error}); using PyTorch instead", stacklevel=2
        )
        return False
    return True


def kernels_of(module: str, *names: str) -> list[Any]:
    """Functions of a kernel package. Not `from … import`: transformers refuses to load code from the Hub that imports,
    in whatever function, a package that is not installed."""
    loaded = importlib.import_module(module)
    return [getattr(loaded, name) for name in names]


def mixer_core_kernels(
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
    """Same arguments and results as `ops_ssd.mixer_core`, on CUDA in bf16 or fp16."""
    batch, tokens, _ = zxbcdt.shape
    dtype = zxbcdt.dtype
    if conv_state is None:
        conv_state = zxbcdt.new_zeros(batch, shape.conv_dim, shape.conv_kernel - 1)
    if ssm_state is None:
        ssm_state = zxbcdt.new_zeros(batch, shape.num_heads, shape.head_dim, shape.state_size, dtype=torch.float32)
    if lengths is not None:
        padded = torch.arange(tokens, device=zxbcdt.device) >= lengths[:, None]
        z_xbc, dt = zxbcdt.split([shape.inner + shape.conv_dim, shape.num_heads], dim=-1)
        zxbcdt = torch.cat([z_xbc, dt.masked_fill(padded.unsqueeze(-1), _NO_STEP)], dim=-1)
    weights = (
        conv_weight.squeeze(1).to(dtype),
        None if conv_bias is None else conv_bias.to(dtype),
        dt_bias.float(),
        A_log.float(),
        D.float(),
        norm_weight.to(dtype),
    )
    return _MixerCore.apply(
        zxbcdt.contiguous(), *weights, conv_state.to(dtype), ssm_state.float(), shape, lengths, seq_idx
    )


class _MixerCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        shape: MixerShape,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (_layer_norm_fwd,) = kernels_of("mamba_ssm.ops.triton.layernorm_gated", "_layer_norm_fwd")
        (_mamba_chunk_scan_combined_fwd,) = kernels_of(
            "mamba_ssm.ops.triton.ssd_combined", "_mamba_chunk_scan_combined_fwd"
        )

        batch, tokens, _ = zxbcdt.shape
        z, xbc_raw, dt = zxbcdt.split([shape.inner, shape.conv_dim, shape.num_heads], dim=-1)
        a = -torch.exp(A_log)
        halo_ids = _contiguous(seq_idx)
        ids = None if seq_idx is None else _contiguous(seq_idx[:, shape.conv_kernel - 1 :])
        xbc = _conv_forward(xbc_raw, conv_weight, conv_bias, conv_state, halo_ids)
        x, b, c = _heads(xbc, shape)
        scanned, _, steps, total, states, new_ssm_state = _mamba_chunk_scan_combined_fwd(
            x, dt, a, b, c, chunk_size=shape.chunk_size, D=D, dt_bias=dt_bias, initial_states=ssm_state,
            seq_idx=ids, dt_softplus=True, dt_limit=shape.time_step_limit,
        )  # fmt: skip
        y, _, rstd = _layer_norm_fwd(
            scanned.view(-1, shape.inner), norm_weight, None, shape.eps, z.view(-1, shape.inner),
            group_size=shape.inner // shape.n_groups, norm_before_gate=False, is_rms_norm=True,
        )  # fmt: skip
        new_conv_state = _last_raw_rows(xbc_raw, conv_state, lengths)
        ctx.save_for_backward(
            zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_state,
            lengths, halo_ids, ids, scanned, rstd, steps, total, states,
        )  # fmt: skip
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return y.view(batch, tokens, shape.inner), new_conv_state, new_ssm_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dconv_out: Tensor | None, dssm_out: Tensor | None) -> tuple[Tensor | None, ...]:
        (_layer_norm_bwd,) = kernels_of("mamba_ssm.ops.triton.layernorm_gated", "_layer_norm_bwd")

        shape: MixerShape = ctx.shape
        (zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_state, lengths, halo_ids, ids, scanned,
         rstd, steps, total, states) = ctx.saved_tensors  # fmt: skip
        batch, tokens, _ = zxbcdt.shape
        if dy is None:  # only a state was used
            dy = zxbcdt.new_zeros(batch, tokens, shape.inner)
        sizes = [shape.inner, shape.conv_dim, shape.num_heads]
        z, xbc_raw, dt = zxbcdt.split(sizes, dim=-1)
        grad = torch.empty_like(zxbcdt)
        dz, dxbc_raw, ddt = grad.split(sizes, dim=-1)
        # The convolution is recomputed: cheaper than keeping its output.
        xbc = _conv_forward(xbc_raw, conv_weight, conv_bias, conv_state, halo_ids)
        x, b, c = _heads(xbc, shape)
        a = -torch.exp(A_log)

        dscanned, dnorm, _, _ = _layer_norm_bwd(
            dy.reshape(-1, shape.inner).contiguous(), scanned.view(-1, shape.inner), norm_weight, None, shape.eps,
            None, rstd, z.view(-1, shape.inner), group_size=shape.inner // shape.n_groups, norm_before_gate=False,
            is_rms_norm=True, dz=dz.view(-1, shape.inner),
        )  # fmt: skip
        dxbc = torch.empty_like(xbc)
        dx, db, dc = _heads(dxbc, shape)
        da, dD, ddt_bias, dssm_in = _scan_backward(
            dscanned.view(scanned.shape), x, dt, a, b, c, D, dt_bias, steps, total, states, dssm_out, ids, shape,
            dx, db, dc, ddt,
        )  # fmt: skip
        dconv_weight, dconv_bias, dconv_in = _conv_backward(
            xbc_raw, conv_weight, conv_bias, conv_state, halo_ids, dxbc, dxbc_raw
        )
        if dconv_out is not None:
            _add_tail_gradient(dconv_out, dxbc_raw, dconv_in, lengths)
        # d(-exp(A_log)) = a, because a is its own derivative.
        return grad, dconv_weight, dconv_bias, ddt_bias, da * a, dD, dnorm, dconv_in, dssm_in, None, None, None


def _contiguous(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def _heads(xbc: Tensor, shape: MixerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Views x (B, S, H, P), B and C (B, S, G, N) of the convolution's output (B, S, C)."""
    group = shape.n_groups * shape.state_size
    x, b, c = xbc.split([shape.inner, group, group], dim=-1)
    return (
        x.unflatten(-1, (shape.num_heads, shape.head_dim)),
        b.unflatten(-1, (shape.n_groups, shape.state_size)),
        c.unflatten(-1, (shape.n_groups, shape.state_size)),
    )


def _channels_last(x: Tensor) -> Tensor:
    """(B, S, C) as the (B, C, S) view the convolution wants; copied when a stride is not a multiple of 8."""
    if x.stride(0) % 8 or x.stride(1) % 8 or x.stride(2) != 1:
        # Not `contiguous()`: for a single token it returns x with the strides it has.
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x.transpose(1, 2)


def _conv_forward(xbc: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ids: Tensor | None) -> Tensor:
    (causal_conv1d_fwd_function,) = kernels_of("causal_conv1d.cpp_functions", "causal_conv1d_fwd_function")

    state = state.transpose(1, 2).contiguous().transpose(1, 2)
    if ids is None:
        return causal_conv1d_fwd_function(_channels_last(xbc), weight, bias, None, state, None, True).transpose(1, 2)
    # With sample numbers the kernel takes no state: put the state's rows in front of the tokens.
    x = torch.cat([state.transpose(1, 2), xbc], dim=1)
    out = causal_conv1d_fwd_function(_channels_last(x), weight, bias, _non_negative(ids), None, None, True)
    return out.transpose(1, 2)[:, state.shape[-1] :]


def _non_negative(ids: Tensor) -> Tensor:
    """Samples before the current one only have to differ from it; the kernel skips tokens with negative numbers."""
    return ids.clamp(min=-1) + 1


def _conv_backward(
    xbc: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ids: Tensor | None, dout: Tensor, dxbc: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fills `dxbc` (B, S, C) and returns the gradients of weight, bias and state (B, C, W-1)."""
    (causal_conv1d_bwd_function,) = kernels_of("causal_conv1d.cpp_functions", "causal_conv1d_bwd_function")

    state = state.transpose(1, 2).contiguous().transpose(1, 2)
    if ids is None:
        inplace = dxbc.stride(0) % 8 == 0 and dxbc.stride(1) % 8 == 0
        dx, dweight, dbias, dstate = causal_conv1d_bwd_function(
            _channels_last(xbc), weight, bias, _channels_last(dout), None, state, None,
            dxbc.transpose(1, 2) if inplace else None, True, True,
        )  # fmt: skip
        if not inplace:
            dxbc.copy_(dx.transpose(1, 2))
        return dweight, dbias, dstate
    halo = state.shape[-1]
    x = torch.cat([state.transpose(1, 2), xbc], dim=1)
    dout = torch.cat([dout.new_zeros(dout.shape[0], halo, dout.shape[2]), dout], dim=1)
    dx, dweight, dbias, _ = causal_conv1d_bwd_function(
        _channels_last(x), weight, bias, _channels_last(dout), _non_negative(ids), None, None, None, False, True
    )
    dx = dx.transpose(1, 2)
    dxbc.copy_(dx[:, halo:])
    return dweight, dbias, dx[:, :halo].transpose(1, 2)


def _last_raw_rows(xbc: Tensor, conv_state: Tensor, lengths: Tensor | None) -> Tensor:
    """New convolution state (B, C, W-1) after the raw rows `xbc` (B, S, C); the old one matters to short rows only."""
    count, tokens = conv_state.shape[-1], xbc.shape[1]
    if lengths is None and tokens >= count:
        return xbc[:, tokens - count :].transpose(1, 2).contiguous()
    return last_rows(torch.cat([conv_state.transpose(1, 2), xbc], dim=1), count, tokens, lengths)


def _add_tail_gradient(dstate: Tensor, dxbc: Tensor, dconv_in: Tensor, lengths: Tensor | None) -> None:
    """Send the gradient of the new convolution state (B, C, W-1) to the rows it was copied from."""
    rows = dstate.transpose(1, 2).to(dxbc.dtype)  # (B, W-1, C)
    count, tokens = rows.shape[1], dxbc.shape[1]
    if lengths is None and tokens >= count:
        dxbc[:, tokens - count :] += rows
        return
    ends = torch.full((dxbc.shape[0],), tokens, device=dxbc.device) if lengths is None else lengths.clamp(max=tokens)
    where = (ends[:, None] + torch.arange(count, device=dxbc.device)).unsqueeze(-1).expand_as(rows)
    from_state = (where < count).to(rows.dtype)
    width = rows.shape[-1]
    spread = rows.new_zeros(rows.shape[0], count, width).scatter_add_(1, where.clamp(max=count - 1), rows * from_state)
    dconv_in += spread.transpose(1, 2)
    later = torch.zeros_like(dxbc).scatter_add_(1, (where - count).clamp(min=0), rows * (1 - from_state))
    dxbc += later


def _scan_backward(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    steps: Tensor,
    total: Tensor,
    states: Tensor,
    dssm_out: Tensor | None,
    ids: Tensor | None,
    shape: MixerShape,
    dx: Tensor,
    db: Tensor,
    dc: Tensor,
    ddt: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of the chunked scan; fills dx, db, dc, ddt; returns da, dD, d(dt_bias), d(ssm_state) in fp32.

    `steps` and `total` (B, H, chunks, Q) are the step sizes and their decays summed within each chunk, `states`
    (B, chunks, H, P, N) the states entering the chunks, all from the forward pass. The order of the kernels is that
    of mamba-ssm's own backward; the differences are that it recomputes these three, and that here the gradients of
    the chunk states, and with them that of the starting state, stay in fp32.
    """
    _bmm_chunk_bwd, _bmm_chunk_fwd = kernels_of("mamba_ssm.ops.triton.ssd_bmm", "_bmm_chunk_bwd", "_bmm_chunk_fwd")
    _chunk_scan_bwd_dC, _chunk_scan_bwd_dcb, _chunk_scan_bwd_ddAcs_stable, _chunk_scan_bwd_dstates = kernels_of(
        "mamba_ssm.ops.triton.ssd_chunk_scan",
        "_chunk_scan_bwd_dC",
        "_chunk_scan_bwd_dcb",
        "_chunk_scan_bwd_ddAcs_stable",
        "_chunk_scan_bwd_dstates",
    )
    _chunk_cumsum_bwd, _chunk_state_bwd_db = kernels_of(
        "mamba_ssm.ops.triton.ssd_chunk_state", "_chunk_cumsum_bwd", "_chunk_state_bwd_db"
    )
    (_chunk_scan_chunk_state_bwd_dx,) = kernels_of(
        "mamba_ssm.ops.triton.ssd_combined", "_chunk_scan_chunk_state_bwd_dx"
    )
    (_state_passing_bwd,) = kernels_of("mamba_ssm.ops.triton.ssd_state_passing", "_state_passing_bwd")

    groups, size, chunk = shape.n_groups, shape.state_size, shape.chunk_size
    limit = shape.time_step_limit
    scores = _bmm_chunk_fwd(c, b, chunk, seq_idx=ids, output_dtype=torch.float32)
    dstates = _chunk_scan_bwd_dstates(c, total, dout, seq_idx=ids, dtype=torch.float32)
    dstates, dcarry, dssm_in = _state_passing_bwd(
        states.flatten(3), total[:, :, :, -1], dstates.flatten(3),
        dfinal_states=None if dssm_out is None else dssm_out.float().contiguous().flatten(2),
        seq_idx=ids, has_initial_states=True, dstates_dtype=torch.float32, chunk_size=chunk,
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
        dtotal, dsteps, dt, a, dt_bias=dt_bias, dt_softplus=True, dt_limit=limit, ddt=ddt
    )
    return da, dD, ddt_bias, dssm_in.unflatten(-1, (-1, size))
