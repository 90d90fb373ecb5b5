"""The recurrence of a decoding step for a single row, in Triton: one token of the scan, and the gate.

`decode_reference` documents the function and what slots are.
"""

from torch import Tensor

from .decode_kernel_parts import launch_options, release, silu, softplus, tl, triton, wait
from .ops_costs import MixerShape

BLOCK = 16
"""Channels of a head for one program: few, so that all of the GPU has work."""


@triton.jit
def _scan_kernel(
    proj_ptr, xbc_ptr, base_ptr, steps_ptr, totals_ptr, A_log_ptr, D_ptr, dt_bias_ptr, slot_ptr, gated_ptr,
    scale_ptr, squares_ptr, low, high, H, P, N, CHANNELS, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    head = tl.program_id(1)
    width, n, j = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    some, inner, channel = width < P, H * P, head * P + width
    stored = some[:, None] & (n < N)[None, :]
    base_ptrs = base_ptr + channel[:, None] * N + n[None, :]
    base = tl.load(base_ptrs, mask=stored, other=0.0)  # written by earlier steps only: no need to wait
    slot = tl.load(slot_ptr)
    a = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    skip = tl.load(D_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=some, other=0.0).to(tl.float32)
    total = tl.load(totals_ptr + (slot - 1) * H + head, mask=slot > 0, other=0.0)
    here, past = xbc_ptr + slot * CHANNELS, j < slot
    if SLOTS > 1:
        bs_ptrs = xbc_ptr + j[:, None] * CHANNELS + inner + n[None, :]
        bs = tl.load(bs_ptrs, mask=past[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        xs_ptrs = xbc_ptr + j[:, None] * CHANNELS + channel[None, :]
        xs = tl.load(xs_ptrs, mask=past[:, None] & some[None, :], other=0.0).to(tl.float32)
        weights = tl.load(steps_ptr + j * H + head, mask=past, other=0.0)
        totals = tl.load(totals_ptr + j * H + head, mask=past, other=0.0)
    wait(PDL)
    b = tl.load(here + inner + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(here + inner + N + n, mask=n < N, other=0.0).to(tl.float32)
    dt = tl.load(proj_ptr + inner + CHANNELS + head).to(tl.float32)
    x = tl.load(here + channel, mask=some, other=0.0).to(tl.float32)
    z = tl.load(proj_ptr + channel, mask=some, other=0.0).to(tl.float32)
    dt = tl.minimum(tl.maximum(softplus(dt + dt_bias), low), high)
    total += dt * a
    base = base.to(tl.float32)
    y = tl.exp(total) * tl.sum(base * c[None, :], 1) + (dt * tl.sum(b * c, 0) + skip) * x
    if SLOTS > 1:
        weights *= tl.exp(tl.where(past, total - totals, 0.0))
        y += tl.sum(xs * (tl.sum(bs * c[None, :], 1) * weights)[:, None], 0)
        if tl.program_id(0) == 0:
            tl.store(totals_ptr + slot * H + head, total)
            tl.store(steps_ptr + slot * H + head, dt)
    if FOLD:
        base = base * tl.exp(total) + (dt * x)[:, None] * b[None, :]
        if SLOTS > 1:
            base += tl.dot(tl.trans(xs * weights[:, None]), bs, input_precision="ieee")
        tl.store(base_ptrs, base.to(base_ptr.dtype.element_ty), mask=stored)
    # Rounded where the model's other paths round.
    gated = y.to(proj_ptr.dtype.element_ty).to(tl.float32) * silu(z)
    tl.store(squares_ptr + head * tl.num_programs(0) + tl.program_id(0), tl.sum(gated * gated, 0))
    tl.store(gated_ptr + channel, (gated * scale).to(gated_ptr.dtype.element_ty), mask=some)


def scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    slot: Tensor, fold: bool, gated: Tensor, shape: MixerShape, scale: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """See `decode_reference.scan_step`."""
    slots = xbc.shape[1]
    low, high = shape.time_step_limit
    _scan_kernel[triton.cdiv(shape.head_dim, BLOCK), shape.num_heads](
        proj, xbc, base, steps, totals, A_log, D, dt_bias, slot, gated, scale, squares, float(low), float(high),
        shape.num_heads, shape.head_dim, shape.state_size, shape.conv_dim, SLOTS=slots,
        BLOCK_S=max(16, triton.next_power_of_2(slots)), FOLD=fold, BLOCK_P=BLOCK,
        BLOCK_N=max(16, triton.next_power_of_2(shape.state_size)), num_warps=4, **launch_options(proj),
    )  # fmt: skip
