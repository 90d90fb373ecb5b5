"""The recurrence of a decoding step in Triton: the scan over one token, and folding a history into its state.

`decode_reference` documents the functions and what slots are.
"""

import math

from torch import Tensor

from .decode_kernel_parts import launch_options, release, silu, softplus, tl, triton, wait
from .ssd_scan import MixerShape

SCAN_SMALL = {"BLOCK_P": 16, "HEADS": 1, "num_warps": 4}
"""Of one program, where there are few rows: all of the GPU should have work."""
SCAN_LARGE = {"BLOCK_P": 32, "HEADS": 20, "num_warps": 4}
"""Of one program in a large batch: heads one after the other share what they have in common."""


@triton.jit
def _scan_kernel(
    proj_ptr, xbc_ptr, base_ptr, steps_ptr, totals_ptr, A_log_ptr, D_ptr, dt_bias_ptr, slot_ptr, gated_ptr,
    scale_ptr, squares_ptr, low, high, H, P, N, GROUPS, WIDTH, CHANNELS, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
    SCALE: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one group, one after the other, the next one's state being fetched meanwhile."""
    release(PDL)
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    width, n, j = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    some, inner = width < P, H * P
    stored = some[:, None] & (n < N)[None, :]
    base_ptrs = base_ptr + ((row * H + first) * P + width)[:, None] * N + n[None, :]
    following = tl.load(base_ptrs, mask=stored, other=0.0)  # written by earlier steps only: no need to wait
    slot = tl.load(slot_ptr)
    xbc_ptr += row * SLOTS * CHANNELS
    totals_ptr += row * SLOTS * H
    steps_ptr += row * SLOTS * H
    b_at = inner + (first // (H // GROUPS)) * N + n
    here, past = xbc_ptr + slot * CHANNELS, j < slot
    if SLOTS > 1:
        bs_ptrs = xbc_ptr + j[:, None] * CHANNELS + b_at[None, :]
        bs = tl.load(bs_ptrs, mask=past[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    wait(PDL)
    b = tl.load(here + b_at, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(here + GROUPS * N + b_at, mask=n < N, other=0.0).to(tl.float32)
    now = tl.sum(b * c, 0)
    if SLOTS > 1:
        scores = tl.sum(bs * c[None, :], 1)
    for i in range(HEADS):
        head = first + i
        base = following.to(tl.float32)
        if i + 1 < HEADS:
            following = tl.load(base_ptrs + P * N, mask=stored, other=0.0)
        channel = head * P + width
        x = tl.load(here + channel, mask=some, other=0.0).to(tl.float32)
        z = tl.load(proj_ptr + row * WIDTH + channel, mask=some, other=0.0).to(tl.float32)
        dt = tl.load(proj_ptr + row * WIDTH + inner + CHANNELS + head).to(tl.float32)
        dt = softplus(dt + tl.load(dt_bias_ptr + head).to(tl.float32))
        dt = tl.minimum(tl.maximum(dt, low), high)
        a = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
        skip = tl.load(D_ptr + head).to(tl.float32)
        total = tl.load(totals_ptr + (slot - 1) * H + head, mask=slot > 0, other=0.0) + dt * a
        y = tl.exp(total) * tl.sum(base * c[None, :], 1) + (dt * now + skip) * x
        if SLOTS > 1:
            weights = tl.load(steps_ptr + j * H + head, mask=past, other=0.0)
            weights *= tl.exp(total - tl.load(totals_ptr + j * H + head, mask=past, other=0.0))
            xs_ptrs = xbc_ptr + j[:, None] * CHANNELS + channel[None, :]
            xs = tl.load(xs_ptrs, mask=past[:, None] & some[None, :], other=0.0).to(tl.float32)
            y += tl.sum(xs * (scores * weights)[:, None], 0)
            if tl.program_id(2) == 0:
                tl.store(totals_ptr + slot * H + head, total)
                tl.store(steps_ptr + slot * H + head, dt)
        else:
            base = base * tl.exp(total) + (dt * x)[:, None] * b[None, :]
            tl.store(base_ptrs, base.to(base_ptr.dtype.element_ty), mask=stored)
        # Rounded where the model's other paths round.
        gated = y.to(proj_ptr.dtype.element_ty).to(tl.float32) * silu(z)
        if SCALE:
            place = (row * H + head) * tl.num_programs(2) + tl.program_id(2)
            tl.store(squares_ptr + place, tl.sum(gated * gated, 0))
            gated *= tl.load(scale_ptr + channel, mask=some, other=0.0).to(tl.float32)
        tl.store(gated_ptr + row * inner + channel, gated.to(gated_ptr.dtype.element_ty), mask=some)
        base_ptrs += P * N


def scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    slot: Tensor, gated: Tensor, shape: MixerShape, scale: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """See `decode_reference.scan_step`."""
    batch, slots = xbc.shape[:2]
    options = SCAN_LARGE if batch * shape.num_heads >= 2048 else SCAN_SMALL
    block = min(options["BLOCK_P"], max(16, triton.next_power_of_2(shape.head_dim)))
    heads = math.gcd(shape.num_heads // shape.n_groups, options["HEADS"])
    low, high = shape.time_step_limit
    _scan_kernel[batch, shape.num_heads // heads, triton.cdiv(shape.head_dim, block)](
        proj, xbc, base, steps, totals, A_log, D, dt_bias, slot, gated, scale, squares, float(low), float(high),
        shape.num_heads, shape.head_dim, shape.state_size, shape.n_groups, proj.shape[1], shape.conv_dim,
        SLOTS=slots, BLOCK_S=triton.next_power_of_2(slots), SCALE=scale is not None, HEADS=heads, BLOCK_P=block,
        BLOCK_N=triton.next_power_of_2(shape.state_size), num_warps=options["num_warps"], **launch_options(proj),
    )  # fmt: skip


@triton.jit
def _fold_kernel(
    xbc_ptr, base_ptr, steps_ptr, totals_ptr, slot_ptr, tiles, H, P, N, GROUPS, CHANNELS, SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if tl.load(slot_ptr) == SLOTS - 1:
        j, n = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
        per_head = tl.cdiv(P, BLOCK_P)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, head = (tile // (per_head * H)).to(tl.int64), tile // per_head % H  # a row of a layer
            width = tile % per_head * BLOCK_P + tl.arange(0, BLOCK_P)
            some, real = width < P, j < SLOTS
            stored = some[:, None] & (n < N)[None, :]
            base_ptrs = base_ptr + ((row * H + head) * P + width)[:, None] * N + n[None, :]
            base = tl.load(base_ptrs, mask=stored, other=0.0).to(tl.float32)
            at = (row * SLOTS + j) * H + head
            total = tl.load(totals_ptr + (row * SLOTS + SLOTS - 1) * H + head)
            weights = tl.load(steps_ptr + at, mask=real, other=0.0)
            weights *= tl.exp(total - tl.load(totals_ptr + at, mask=real, other=0.0))
            history = xbc_ptr + (row * SLOTS + j)[:, None] * CHANNELS
            xs = tl.load(history + head * P + width[None, :], mask=real[:, None] & some[None, :], other=0.0)
            b_at = H * P + (head // (H // GROUPS)) * N + n
            bs = tl.load(history + b_at[None, :], mask=real[:, None] & (n < N)[None, :], other=0.0)
            weighted = tl.trans(xs.to(tl.float32) * weights[:, None])
            base = base * tl.exp(total) + tl.dot(weighted, bs.to(tl.float32), input_precision="ieee")
            tl.store(base_ptrs, base.to(base_ptr.dtype.element_ty), mask=stored)


def fold_history(xbc: Tensor, base: Tensor, steps: Tensor, totals: Tensor, slot: Tensor, shape: MixerShape) -> None:
    """See `decode_reference.fold_history`."""
    slots, block = xbc.shape[2], 16
    tiles = base.shape[0] * base.shape[1] * shape.num_heads * triton.cdiv(shape.head_dim, block)
    # As many programs as run at once: in most steps there is nothing to do.
    _fold_kernel[(min(tiles, 2048),)](
        xbc, base, steps, totals, slot, tiles, shape.num_heads, shape.head_dim, shape.state_size, shape.n_groups,
        shape.conv_dim, SLOTS=slots, BLOCK_S=max(16, triton.next_power_of_2(slots)), BLOCK_P=block,
        BLOCK_N=max(16, triton.next_power_of_2(shape.state_size)), num_warps=4,
    )  # fmt: skip
