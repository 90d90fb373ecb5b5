"""The recurrence of a decoding step for a batch, in Triton.

Reading the states is most of such a step, so nothing but that is left to the kernel that does it: `prepare_step`
runs the convolution and sums up what each head needs to know, `batch_scan_step` streams the states past it.
`decode_reference` documents the functions and what slots are.
"""

from torch import Tensor

from .decode_kernel_parts import conv_inputs, convolve, launch_options, release, silu, softplus, tl, triton, wait
from .ops_costs import MixerShape

SCAN_FEW = {"BLOCK_P": 16, "num_warps": 4}
"""Tile of one program, where there are few: all of the GPU should have work."""
SCAN_MANY = {"BLOCK_P": 64, "num_warps": 2}
"""Tile of one program in a large batch, of states in 16 bits."""
FOLD_MANY = {"BLOCK_P": 32, "num_warps": 4}
"""The same where the history is folded."""
FULL_MANY = {"BLOCK_P": 32, "num_warps": 2}
"""Tile of one program in a large batch, of states in 32 bits."""
MANY = 2048
"""Heads of all rows together that count as many."""


@triton.jit
def _prepare_kernel(
    proj_ptr, state_ptr, taps_ptr, bias_ptr, dt_bias_ptr, A_log_ptr, D_ptr, xbc_ptr, steps_ptr, totals_ptr, slot_ptr,
    weights_ptr, decay_ptr, low, high, WIDTH_IN, CHANNELS, H, GROUPS, SIZE, INNER, X_BLOCKS, SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first GROUPS programs of a row take B, C and the heads of a group each, the others x. Those of all rows come
    first: they have most to do, and not all fit beside the kernel in front."""
    release(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr)
    proj_ptr += row * WIDTH_IN + INNER
    state_ptr += row * CHANNELS * (WIDTH - 1)
    xbc_ptr += row * SLOTS * CHANNELS
    here = xbc_ptr + slot * CHANNELS
    dtype = xbc_ptr.dtype.element_ty
    if block >= GROUPS:
        channels = (block - GROUPS) * BLOCK + tl.arange(0, BLOCK)
        inside = channels < INNER
        inputs = conv_inputs(channels, inside, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
        wait(PDL)
        raw = tl.load(proj_ptr + channels, mask=inside, other=0.0)
        x = convolve(raw, inputs, channels, inside, state_ptr, WIDTH)
        tl.store(here + channels, x.to(dtype), mask=inside)
    else:
        n, j, i = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
        real, past, per_group = n < SIZE, j < slot, H // GROUPS
        some, heads = i < per_group, block * per_group + i
        b_at = INNER + block * SIZE + n
        c_at = b_at + GROUPS * SIZE
        b_inputs = conv_inputs(b_at, real, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
        c_inputs = conv_inputs(c_at, real, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
        a = -tl.exp(tl.load(A_log_ptr + heads, mask=some, other=0.0).to(tl.float32))
        skip = tl.load(D_ptr + heads, mask=some, other=0.0).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + heads, mask=some, other=0.0).to(tl.float32)
        here_h = row * SLOTS * H + slot * H + heads
        total = tl.load(totals_ptr + here_h - H, mask=some & (slot > 0), other=0.0)
        known = some[:, None] & past[None, :]
        old = row * SLOTS * H + j[None, :] * H + heads[:, None]
        weights = tl.load(steps_ptr + old, mask=known, other=0.0)
        totals = tl.load(totals_ptr + old, mask=known, other=0.0)
        bs_ptrs = xbc_ptr + j[:, None] * CHANNELS + b_at[None, :]
        bs = tl.load(bs_ptrs, mask=past[:, None] & real[None, :], other=0.0).to(tl.float32)
        wait(PDL)
        dt = tl.load(proj_ptr + CHANNELS + heads, mask=some, other=0.0).to(tl.float32)
        raw_b = tl.load(proj_ptr + b_at, mask=real, other=0.0)
        raw_c = tl.load(proj_ptr + c_at, mask=real, other=0.0)
        dt = tl.minimum(tl.maximum(softplus(dt + dt_bias), low), high)
        total += dt * a
        tl.store(steps_ptr + here_h, dt, mask=some)
        tl.store(totals_ptr + here_h, total, mask=some)
        tl.store(decay_ptr + row * H + heads, tl.exp(total), mask=some)
        b = convolve(raw_b, b_inputs, b_at, real, state_ptr, WIDTH).to(dtype)
        c = convolve(raw_c, c_inputs, c_at, real, state_ptr, WIDTH).to(dtype)
        tl.store(here + b_at, b, mask=real)
        tl.store(here + c_at, c, mask=real)
        b, c = tl.where(real, b.to(tl.float32), 0.0), tl.where(real, c.to(tl.float32), 0.0)
        scores = tl.sum(bs * c[None, :], 1)  # zero where nothing was loaded
        weights *= tl.exp(tl.where(known, total[:, None] - totals, 0.0)) * scores[None, :]
        now = dt * tl.sum(b * c, 0) + skip
        weights = tl.where((j == slot)[None, :], now[:, None], weights)
        out = (row * H + heads)[:, None] * SLOTS + j[None, :]
        tl.store(weights_ptr + out, weights, mask=some[:, None] & (j < SLOTS)[None, :])


def prepare_step(
    proj: Tensor, conv_state: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, xbc: Tensor, steps: Tensor, totals: Tensor, slot: Tensor, weights: Tensor, decay: Tensor,
    shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.prepare_step`."""
    blocks, slots = triton.cdiv(shape.inner, 256), xbc.shape[1]
    low, high = shape.time_step_limit
    _prepare_kernel[proj.shape[0], blocks + shape.n_groups](
        proj, conv_state, conv_weight, conv_bias, dt_bias, A_log, D, xbc, steps, totals, slot, weights, decay,
        float(low), float(high), proj.shape[1], shape.conv_dim, shape.num_heads, shape.n_groups, shape.state_size,
        shape.inner, blocks, SLOTS=slots, BLOCK_S=triton.next_power_of_2(slots),
        BLOCK_N=triton.next_power_of_2(shape.state_size),
        BLOCK_H=triton.next_power_of_2(shape.num_heads // shape.n_groups), WIDTH=shape.conv_kernel,
        BIAS=conv_bias is not None, BLOCK=256, num_warps=4, **launch_options(proj),
    )  # fmt: skip


@triton.jit
def _batch_scan_kernel(
    proj_ptr, xbc_ptr, base_ptr, weights_ptr, decay_ptr, steps_ptr, totals_ptr, slot_ptr, gated_ptr, scale_ptr,
    squares_ptr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sizes are constants, because instructions are dear here: reading a tile takes about as long as issuing them."""
    release(PDL)
    row = tl.program_id(1)
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    width, n, j = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    channel, at = head * P + width, row * H + head
    # A constant mask costs nothing, a computed one does.
    some = tl.full((BLOCK_P,), True, tl.int1) if P % BLOCK_P == 0 else width < P
    real = tl.full((BLOCK_N,), True, tl.int1) if N == BLOCK_N else n < N
    stored = some[:, None] & real[None, :]
    base_ptrs = base_ptr + at.to(tl.int64) * (P * N) + (width[:, None] * N + n[None, :])
    base = tl.load(base_ptrs, mask=stored, other=0.0, eviction_policy="evict_first")  # earlier steps': need not wait
    slot = tl.load(slot_ptr)
    xbc_ptr += row.to(tl.int64) * (SLOTS * CHANNELS)
    proj_ptr += row.to(tl.int64) * WIDTH
    b_ptr = xbc_ptr + H * P + (head // PER_GROUP) * N
    upto = j <= slot
    if SCALE:
        scale = tl.load(scale_ptr + channel, mask=some, other=0.0).to(tl.float32)
    wait(PDL)
    c = tl.load(b_ptr + slot * CHANNELS + (H // PER_GROUP) * N + n, mask=real, other=0.0).to(tl.float32)
    decay = tl.load(decay_ptr + at)
    weights = tl.load(weights_ptr + at * SLOTS + j, mask=upto, other=0.0)
    xs_ptrs = xbc_ptr + j[:, None] * CHANNELS + channel[None, :]
    xs = tl.load(xs_ptrs, mask=upto[:, None] & some[None, :], other=0.0).to(tl.float32)
    z = tl.load(proj_ptr + channel, mask=some, other=0.0).to(tl.float32)
    base = base.to(tl.float32)
    y = decay * tl.sum(base * c[None, :], 1) + tl.sum(xs * weights[:, None], 0)
    # Rounded where the model's other paths round.
    gated = y.to(proj_ptr.dtype.element_ty).to(tl.float32) * silu(z)
    if SCALE:
        parts: tl.constexpr = (P + 15) // 16
        part = tile * (BLOCK_P // 16) + tl.arange(0, BLOCK_P // 16)
        squares = tl.sum(tl.reshape(gated * gated, (BLOCK_P // 16, 16)), 1)
        tl.store(squares_ptr + at * parts + part, squares, mask=part < parts)
        gated *= scale
    tl.store(gated_ptr + row * (H * P) + channel, gated.to(gated_ptr.dtype.element_ty), mask=some)
    if FOLD:
        steps_ptr += row * (SLOTS * H) + head
        totals_ptr += row * (SLOTS * H) + head
        total = tl.load(totals_ptr + (SLOTS - 1) * H)
        held = j < SLOTS
        counts = tl.load(steps_ptr + j * H, mask=held, other=0.0)
        counts *= tl.exp(total - tl.load(totals_ptr + j * H, mask=held, other=0.0))
        b = tl.load(b_ptr + j[:, None] * CHANNELS + n[None, :], mask=held[:, None] & real[None, :], other=0.0)
        # The three products of what 19 bits hold are as exact as one of fp32, and tensor cores make them.
        base = tl.dot(tl.trans(xs * counts[:, None]), b.to(tl.float32), base * decay, input_precision="tf32x3")
        tl.store(base_ptrs, base.to(base_ptr.dtype.element_ty), mask=stored)


def batch_scan_step(
    proj: Tensor, xbc: Tensor, base: Tensor, weights: Tensor, decay: Tensor, steps: Tensor, totals: Tensor,
    slot: Tensor, fold: bool, gated: Tensor, scale: Tensor | None, squares: Tensor | None, shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.batch_scan_step`."""
    batch, slots = xbc.shape[:2]
    tile = FULL_MANY if base.element_size() == 4 else FOLD_MANY if fold else SCAN_MANY
    if batch * shape.num_heads < MANY:
        tile = SCAN_FEW
    block = min(tile["BLOCK_P"], max(16, triton.next_power_of_2(shape.head_dim)))
    _batch_scan_kernel[shape.num_heads * triton.cdiv(shape.head_dim, block), batch](
        proj, xbc, base, weights, decay, steps, totals, slot, gated, scale, squares, H=shape.num_heads,
        P=shape.head_dim, N=shape.state_size, PER_GROUP=shape.num_heads // shape.n_groups, WIDTH=proj.shape[1],
        CHANNELS=shape.conv_dim, SLOTS=slots, BLOCK_S=max(16, triton.next_power_of_2(slots)), FOLD=fold,
        SCALE=scale is not None, BLOCK_P=block, BLOCK_N=triton.next_power_of_2(shape.state_size),
        num_warps=tile["num_warps"], **launch_options(proj),
    )  # fmt: skip
