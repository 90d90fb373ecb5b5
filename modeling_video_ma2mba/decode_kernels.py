"""Triton kernels of one decoding step. `decode_reference` holds the same functions in PyTorch, documented there.

Reading one token is bound by memory traffic: every weight once, every state once. For a batch of one, three kernels a
layer do nothing else: norm, in_proj and convolution in one; scan step and gate; gated norm, out_proj and the residual
addition. Norms are applied behind the matrix-vector product, of which their 1/rms is only a factor. Larger batches
leave the products to cuBLAS and take the small kernels in between.

With `PDL` (Hopper and later, programmatic dependent launch) a kernel starts while the one before it ends, and waits
only before it touches what that one wrote; its first weights are then already on their way.
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from .ssd_scan import MixerShape

try:  # this file is imported where Triton is; the guard keeps transformers from demanding it of every checkpoint
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("decode_kernels needs triton, which comes with PyTorch's CUDA builds") from error

_PRODUCT = {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4}
_SCAN_WIDTHS = (16, 64)  # of a head, per program: for few rows, so that all of the GPU has work, and for many


@functools.cache
def _early_start(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _options(tensor: Tensor) -> dict[str, bool]:
    return {"PDL": True, "launch_pdl": True} if _early_start(tensor.device) else {"PDL": False}


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    u = tl.exp(x)
    w = 1.0 + u
    # log(1 + u) without losing the small u (Kahan); the second `where` only avoids 0 / 0.
    small = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _release(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _normed_products(
    x_ptr,
    scale_ptr,
    weight_ptr,
    rows,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """(BLOCK_N,) fp32: weight[rows] @ (x / rms(x) * scale), the next weights being fetched one block ahead."""
    cols = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    weight = tl.load(weight_ptrs, mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        here, ahead = start + cols, start + BLOCK_K + cols
        following = tl.load(
            weight_ptrs + start + BLOCK_K, mask=(ahead < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(scale_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :]
        weight = following
    return tl.sum(total, 1) / tl.sqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def _convolve(raw, channels, inside, state_ptr, weight_ptr, bias_ptr, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """Advance the states (C, W-1) of `channels` by their `raw` inputs; returns silu(convolution) in fp32."""
    taps = tl.arange(0, 4)[None, :]
    held = inside[:, None] & (taps < WIDTH - 1)
    state_ptrs = state_ptr + channels[:, None] * (WIDTH - 1) + taps
    old = tl.load(state_ptrs, mask=held, other=0.0)
    weight = tl.load(weight_ptr + channels[:, None] * WIDTH + taps, mask=held, other=0.0)
    last = tl.load(weight_ptr + channels * WIDTH + WIDTH - 1, mask=inside, other=0.0)
    out = tl.sum(old.to(tl.float32) * weight.to(tl.float32), 1) + raw.to(tl.float32) * last.to(tl.float32)
    if BIAS:
        out += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # no thread may still have to read what the next lines overwrite
    tl.store(state_ptrs - 1, old, mask=held & (taps > 0))
    tl.store(state_ptr + channels * (WIDTH - 1) + WIDTH - 2, raw.to(state_ptr.dtype.element_ty), mask=inside)
    return _silu(out)


@triton.jit
def _norm_linear_kernel(
    x_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    N,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    _release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = _normed_products(x_ptr, scale_ptr, weight_ptr, tl.minimum(rows, N - 1), eps, K, BLOCK_N, BLOCK_K, PDL)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < N)


def norm_linear(x: Tensor, scale: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `decode_reference.norm_linear`."""
    n, k = weight.shape
    grid = (triton.cdiv(n, _PRODUCT["BLOCK_N"]),)
    _norm_linear_kernel[grid](x, scale, weight, out, n, eps, k, **_PRODUCT, **_options(x))


@triton.jit
def _norm_linear_conv_kernel(
    x_ptr, scale_ptr, weight_ptr, out_ptr, state_ptr, taps_ptr, bias_ptr, xbc_ptr, slot_ptr, N, INNER, CHANNELS, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = _normed_products(x_ptr, scale_ptr, weight_ptr, tl.minimum(rows, N - 1), eps, K, BLOCK_N, BLOCK_K, PDL)
    out = out.to(out_ptr.dtype.element_ty)
    channels = rows - INNER
    inside = (channels >= 0) & (channels < CHANNELS)
    tl.store(out_ptr + rows, out, mask=(rows < N) & (inside == 0))
    xbc = _convolve(out, channels, inside, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
    slot = tl.load(slot_ptr)
    tl.store(xbc_ptr + slot * CHANNELS + channels, xbc.to(xbc_ptr.dtype.element_ty), mask=inside)


def norm_linear_conv(
    x: Tensor, scale: Tensor, weight: Tensor, eps: float, out: Tensor, conv_state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, xbc: Tensor, slot: Tensor, shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.norm_linear_conv`."""
    n, k = weight.shape
    grid = (triton.cdiv(n, _PRODUCT["BLOCK_N"]),)
    _norm_linear_conv_kernel[grid](
        x, scale, weight, out, conv_state, conv_weight, conv_bias, xbc, slot, n, shape.inner, shape.conv_dim, eps,
        K=k, WIDTH=shape.conv_kernel, BIAS=conv_bias is not None, **_PRODUCT, **_options(x),
    )  # fmt: skip


@triton.jit
def _conv_kernel(
    proj_ptr, state_ptr, taps_ptr, bias_ptr, xbc_ptr, slot_ptr, N, INNER, CHANNELS, SLOTS,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    raw = tl.load(proj_ptr + row * N + INNER + channels, mask=inside, other=0.0)
    state_ptr += row * CHANNELS * (WIDTH - 1)
    xbc = _convolve(raw, channels, inside, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
    place = (row * SLOTS + tl.load(slot_ptr)) * CHANNELS
    tl.store(xbc_ptr + place + channels, xbc.to(xbc_ptr.dtype.element_ty), mask=inside)


def conv_step(
    proj: Tensor, conv_state: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, xbc: Tensor, slot: Tensor,
    shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.conv_step`."""
    grid = (triton.cdiv(shape.conv_dim, 256), proj.shape[0])
    _conv_kernel[grid](
        proj, conv_state, conv_weight, conv_bias, xbc, slot, proj.shape[1], shape.inner, shape.conv_dim, xbc.shape[1],
        WIDTH=shape.conv_kernel, BIAS=conv_bias is not None, BLOCK=256, num_warps=4, **_options(proj),
    )  # fmt: skip


@triton.jit
def _scan_kernel(
    proj_ptr, xbc_ptr, base_ptr, steps_ptr, totals_ptr, A_log_ptr, D_ptr, dt_bias_ptr, slot_ptr, gated_ptr, low, high,
    H, P, N, GROUPS, WIDTH, CHANNELS, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    width, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    some, inner = width < P, H * P
    base_ptrs = base_ptr + ((row * H + head) * P + width)[:, None] * N + n[None, :]
    base = tl.load(base_ptrs, mask=some[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)  # not of this step
    a = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    skip = tl.load(D_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    _wait(PDL)
    slot = tl.load(slot_ptr)
    dt = _softplus(tl.load(proj_ptr + row * WIDTH + inner + CHANNELS + head).to(tl.float32) + dt_bias)
    dt = tl.minimum(tl.maximum(dt, low), high)
    xbc_ptr += row * SLOTS * CHANNELS
    totals_ptr += row * SLOTS * H + head
    steps_ptr += row * SLOTS * H + head
    b_at = inner + (head // (H // GROUPS)) * N + n
    here = xbc_ptr + slot * CHANNELS
    x = tl.load(here + head * P + width, mask=some, other=0.0).to(tl.float32)
    b = tl.load(here + b_at, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(here + GROUPS * N + b_at, mask=n < N, other=0.0).to(tl.float32)
    total = tl.load(totals_ptr + (slot - 1) * H, mask=slot > 0, other=0.0) + dt * a
    y = tl.exp(total) * tl.sum(base * c[None, :], 1) + (dt * tl.sum(b * c, 0)) * x
    if SLOTS > 1:
        j = tl.arange(0, BLOCK_S)
        past = j < slot
        weights = tl.load(steps_ptr + j * H, mask=past, other=0.0)
        weights *= tl.exp(total - tl.load(totals_ptr + j * H, mask=past, other=0.0))
        xs_ptrs = xbc_ptr + j[:, None] * CHANNELS + (head * P + width)[None, :]
        bs_ptrs = xbc_ptr + j[:, None] * CHANNELS + b_at[None, :]
        xs = tl.load(xs_ptrs, mask=past[:, None] & some[None, :], other=0.0).to(tl.float32)
        bs = tl.load(bs_ptrs, mask=past[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        y += tl.sum(xs * (tl.sum(bs * c[None, :], 1) * weights)[:, None], 0)
        if tl.program_id(1) == 0:
            tl.store(totals_ptr + slot * H, total)
            tl.store(steps_ptr + slot * H, dt)
    if slot == SLOTS - 1:  # time to write down what the state has become
        base = base * tl.exp(total) + (dt * x)[:, None] * b[None, :]
        for i in range(SLOTS - 1):
            weight = tl.load(steps_ptr + i * H) * tl.exp(total - tl.load(totals_ptr + i * H))
            xi = tl.load(xbc_ptr + i * CHANNELS + head * P + width, mask=some, other=0.0).to(tl.float32)
            bi = tl.load(xbc_ptr + i * CHANNELS + b_at, mask=n < N, other=0.0).to(tl.float32)
            base += (weight * xi)[:, None] * bi[None, :]
        tl.store(base_ptrs, base.to(base_ptr.dtype.element_ty), mask=some[:, None] & (n < N)[None, :])
    # Rounded where the model's other paths round.
    y = (y + skip * x).to(proj_ptr.dtype.element_ty).to(tl.float32)
    z = tl.load(proj_ptr + row * WIDTH + head * P + width, mask=some, other=0.0).to(tl.float32)
    tl.store(gated_ptr + row * inner + head * P + width, y * _silu(z), mask=some)


def scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    slot: Tensor, gated: Tensor, shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.scan_step`."""
    batch, slots = xbc.shape[:2]
    width = triton.next_power_of_2(shape.head_dim)
    block = min(width, _SCAN_WIDTHS[batch * shape.num_heads >= 1024])
    grid = (batch * shape.num_heads, triton.cdiv(shape.head_dim, block))
    low, high = shape.time_step_limit
    _scan_kernel[grid](
        proj, xbc, base, steps, totals, A_log, D, dt_bias, slot, gated, float(low), float(high),
        shape.num_heads, shape.head_dim, shape.state_size, shape.n_groups, proj.shape[1], shape.conv_dim,
        SLOTS=slots, BLOCK_S=triton.next_power_of_2(slots), BLOCK_P=block,
        BLOCK_N=triton.next_power_of_2(shape.state_size), num_warps=4, **_options(proj),
    )  # fmt: skip


@triton.jit
def _gated_linear_add_kernel(
    gated_ptr, scale_ptr, weight_ptr, residual_ptr, N, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = _normed_products(gated_ptr, scale_ptr, weight_ptr, tl.minimum(rows, N - 1), eps, K, BLOCK_N, BLOCK_K, PDL)
    out = out.to(weight_ptr.dtype.element_ty).to(tl.float32)
    out += tl.load(residual_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(residual_ptr + rows, out.to(residual_ptr.dtype.element_ty), mask=rows < N)


def gated_linear_add(gated: Tensor, scale: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    """See `decode_reference.gated_linear_add`."""
    n, k = weight.shape
    grid = (triton.cdiv(n, _PRODUCT["BLOCK_N"]),)
    _gated_linear_add_kernel[grid](gated, scale, weight, residual, n, eps, k, **_PRODUCT, **_options(gated))


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, scale_ptr, out_ptr, SIZE, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _release(PDL)
    _wait(PDL)
    start = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * SIZE
    cols = tl.arange(0, BLOCK)
    inside = cols < SIZE
    x = tl.load(x_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + start + cols, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.load(scale_ptr + tl.program_id(1) * SIZE + cols, mask=inside, other=0.0).to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, 0) / SIZE + eps) * scale
    tl.store(out_ptr + start + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(residual: Tensor, delta: Tensor | None, scale: Tensor, eps: float, out: Tensor) -> None:
    """See `decode_reference.add_norm`."""
    batch, size = residual.shape
    _norm_kernel[(batch, 1)](
        residual, delta, scale, out, size, eps, ADD=delta is not None, BLOCK=triton.next_power_of_2(size),
        num_warps=8, **_options(residual),
    )  # fmt: skip


def group_norm(gated: Tensor, scale: Tensor, eps: float, groups: int, out: Tensor) -> None:
    """See `decode_reference.group_norm`."""
    batch, size = gated.shape[0], gated.shape[1] // groups
    _norm_kernel[(batch, groups)](
        gated, None, scale, out, size, eps, ADD=False, BLOCK=triton.next_power_of_2(size), num_warps=8,
        **_options(gated),
    )  # fmt: skip


OPERATIONS = SimpleNamespace(
    add_norm=add_norm,
    norm_linear=norm_linear,
    norm_linear_conv=norm_linear_conv,
    conv_step=conv_step,
    scan_step=scan_step,
    gated_linear_add=gated_linear_add,
    group_norm=group_norm,
)
"""What `decode_step.token_step` is made of."""
