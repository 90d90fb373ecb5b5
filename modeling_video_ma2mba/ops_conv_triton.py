"""The causal convolution of `ops_conv` and its SiLU as Triton kernels, forward and backward.

A program walks a stretch of tokens for a block of channels and remembers the last three inputs, so that each number is
read once. It loads four tokens at a time, and the next four before it computes with these: behind a store, a load
would wait for it. Backward computes the convolution again as it walks and writes the gradient of an input three tokens
later, when all that it fed is known; the weights' gradients are sums over the stretches in a fixed order.
"""

from typing import Any

import torch
from torch import Tensor

from .ops_triton_parts import kernel, sigmoid, tl, triton
from .ops_triton_settings import settings_for


@triton.jit
def _tap(weight_ptr, channel, inside, back: tl.constexpr, WIDTH: tl.constexpr):
    """The weight of the input `back` tokens ago; zero beyond the convolution's width."""
    if back < WIDTH:
        return tl.load(weight_ptr + channel * WIDTH + WIDTH - 1 - back, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(channel).to(tl.float32)


@triton.jit
def _input(x_ptr, state_ptr, row, x_row, channel, inside, S, WIDTH: tl.constexpr):
    """Input of token `row`; in front of the first token what the state remembers, else zero."""
    given = tl.load(x_ptr + row * x_row + channel, mask=inside & (row >= 0) & (row < S), other=0.0).to(tl.float32)
    slot = row + WIDTH - 1
    known = inside & (row < 0) & (slot >= 0)
    return given + tl.load(state_ptr + channel * (WIDTH - 1) + slot, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _four(ptr, at, row, channel, inside, left, limit):
    """Numbers of tokens `at` to `at` + 3 of a stretch; zero behind the last token, and from `limit` on."""
    a0 = tl.load(ptr + at * row + channel, mask=inside & (at < left) & (at < limit), other=0.0)
    a1 = tl.load(ptr + (at + 1) * row + channel, mask=inside & (at + 1 < left) & (at + 1 < limit), other=0.0)
    a2 = tl.load(ptr + (at + 2) * row + channel, mask=inside & (at + 2 < left) & (at + 2 < limit), other=0.0)
    a3 = tl.load(ptr + (at + 3) * row + channel, mask=inside & (at + 3 < left) & (at + 3 < limit), other=0.0)
    return a0, a1, a2, a3


@triton.jit
def _of_four(a0, a1, a2, a3, number: tl.constexpr):
    if number == 0:
        return a0.to(tl.float32)
    elif number == 1:
        return a1.to(tl.float32)
    elif number == 2:
        return a2.to(tl.float32)
    else:
        return a3.to(tl.float32)


@triton.jit
def _same(ids_ptr, row, back: tl.constexpr, S, WIDTH: tl.constexpr):
    """1.0 where token `row` and the one `back` before it are of one sample."""
    there = (back < WIDTH) & (row < S) & (row + WIDTH - 1 - back >= 0)
    now = tl.load(ids_ptr + row + WIDTH - 1, mask=there, other=0)
    then = tl.load(ids_ptr + row + WIDTH - 1 - back, mask=there, other=-1)
    return tl.where(there & (now == then), 1.0, 0.0)


@kernel(do_not_specialize=["S", "stretch"])
def conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, out_ptr, S, stretch, x_row, x_batch, channels,
    BIAS: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A stretch of so many tokens, four at a time, of a block of CHANNELS channels of one row of the batch."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(1) * stretch
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < channels
    # 64 bits for where the stretch begins; within it 32 bits do.
    x_ptr += batch * x_batch
    row = start.to(tl.int64)
    first = x_ptr + row * x_row
    out_ptr += (batch * S + start) * channels
    state_ptr += batch * channels * (WIDTH - 1)
    ids_ptr += batch * (S + WIDTH - 1)
    w0 = _tap(weight_ptr, channel, inside, 0, WIDTH)
    w1 = _tap(weight_ptr, channel, inside, 1, WIDTH)
    w2 = _tap(weight_ptr, channel, inside, 2, WIDTH)
    w3 = _tap(weight_ptr, channel, inside, 3, WIDTH)
    bias = tl.zeros_like(w0)
    if BIAS:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x1 = _input(x_ptr, state_ptr, row - 1, x_row, channel, inside, S, WIDTH)
    x2 = _input(x_ptr, state_ptr, row - 2, x_row, channel, inside, S, WIDTH)
    x3 = _input(x_ptr, state_ptr, row - 3, x_row, channel, inside, S, WIDTH)
    left = S - start
    n0, n1, n2, n3 = _four(first, 0, x_row, channel, inside, left, stretch)
    for token in range(0, stretch, 4):
        a0, a1, a2, a3 = n0, n1, n2, n3
        n0, n1, n2, n3 = _four(first, token + 4, x_row, channel, inside, left, stretch)
        for step in tl.static_range(4):
            at = token + step
            x0 = _of_four(a0, a1, a2, a3, step)
            if PACKED:
                here = start + at
                sum1 = w1 * x1 * _same(ids_ptr, here, 1, S, WIDTH) + w2 * x2 * _same(ids_ptr, here, 2, S, WIDTH)
                value = bias + w0 * x0 + sum1 + w3 * x3 * _same(ids_ptr, here, 3, S, WIDTH)
            else:
                value = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            value *= sigmoid(value)
            tl.store(out_ptr + at * channels + channel, value.to(out_ptr.dtype.element_ty), mask=inside & (at < left))
            x3 = x2
            x2 = x1
            x1 = x0


@kernel(do_not_specialize=["S", "stretch"])
def conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, dout_ptr, dx_ptr, dstate_ptr, sums_ptr, S, stretch, x_row,
    x_batch, dout_row, dout_batch, dx_row, dx_batch, channels, BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """As forward. `sums_ptr` gets the gradients of the taps and of the bias from this stretch, (W + 1, C)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(1) * stretch
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < channels
    far = start.to(tl.int64)
    x_ptr += batch * x_batch
    dx_ptr += batch * dx_batch
    first = x_ptr + far * x_row
    dout_ptr += batch * dout_batch + far * dout_row
    dx_first = dx_ptr + far * dx_row
    state_ptr += batch * channels * (WIDTH - 1)
    dstate_ptr += batch * channels * (WIDTH - 1)
    ids_ptr += batch * (S + WIDTH - 1)
    w0 = _tap(weight_ptr, channel, inside, 0, WIDTH)
    w1 = _tap(weight_ptr, channel, inside, 1, WIDTH)
    w2 = _tap(weight_ptr, channel, inside, 2, WIDTH)
    w3 = _tap(weight_ptr, channel, inside, 3, WIDTH)
    bias = tl.zeros_like(w0)
    if BIAS:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x1 = _input(x_ptr, state_ptr, far - 1, x_row, channel, inside, S, WIDTH)
    x2 = _input(x_ptr, state_ptr, far - 2, x_row, channel, inside, S, WIDTH)
    x3 = _input(x_ptr, state_ptr, far - 3, x_row, channel, inside, S, WIDTH)
    zero = tl.zeros_like(w0)
    d1, d2, d3 = zero, zero, zero  # gradients in front of the SiLU, one to three tokens ago
    s0, s1, s2, s3, sums = zero, zero, zero, zero, zero
    left = S - start
    n0, n1, n2, n3 = _four(first, 0, x_row, channel, inside, left, stretch + 3)
    m0, m1, m2, m3 = _four(dout_ptr, 0, dout_row, channel, inside, left, stretch + 3)
    for token in range(0, stretch + 4, 4):  # the last round belongs to the next stretch: it ends our inputs
        a0, a1, a2, a3 = n0, n1, n2, n3
        b0, b1, b2, b3 = m0, m1, m2, m3
        n0, n1, n2, n3 = _four(first, token + 4, x_row, channel, inside, left, stretch + 3)
        m0, m1, m2, m3 = _four(dout_ptr, token + 4, dout_row, channel, inside, left, stretch + 3)
        for step in tl.static_range(4):
            at = token + step
            x0, dout = _of_four(a0, a1, a2, a3, step), _of_four(b0, b1, b2, b3, step)
            here = start + at
            if PACKED:
                k1 = _same(ids_ptr, here, 1, S, WIDTH)
                k2 = _same(ids_ptr, here, 2, S, WIDTH)
                k3 = _same(ids_ptr, here, 3, S, WIDTH)
                y1, y2, y3 = x1 * k1, x2 * k2, x3 * k3
            else:
                y1, y2, y3 = x1, x2, x3
            value = bias + w0 * x0 + w1 * y1 + w2 * y2 + w3 * y3
            half = sigmoid(value)
            d0 = dout * half * (1.0 + value * (1.0 - half))
            own = tl.where(at < stretch, d0, 0.0)
            s0 += own * x0
            s1 += own * y1
            s2 += own * y2
            s3 += own * y3
            sums += own
            # The input three tokens ago fed that token, this one and the two between.
            if PACKED:
                before = here - 3
                f1 = _same(ids_ptr, before + 1, 1, S, WIDTH)
                f2 = _same(ids_ptr, before + 2, 2, S, WIDTH)
                dx = w0 * d3 + w1 * d2 * f1 + w2 * d1 * f2 + w3 * d0 * k3
            else:
                dx = w0 * d3 + w1 * d2 + w2 * d1 + w3 * d0
            row = at - 3
            done = inside & (row >= 0) & (row < stretch) & (row < left)
            tl.store(dx_first + row * dx_row + channel, dx.to(dx_ptr.dtype.element_ty), mask=done)
            remembered = inside & (here - 3 < 0) & (here - 3 + WIDTH - 1 >= 0)
            slot = here - 3 + WIDTH - 1
            tl.store(dstate_ptr + channel * (WIDTH - 1) + slot, dx.to(dstate_ptr.dtype.element_ty), mask=remembered)
            x3 = x2
            x2 = x1
            x1 = x0
            d3 = d2
            d2 = d1
            d1 = d0
    sums_ptr += (batch * tl.num_programs(1) + tl.program_id(1)) * (WIDTH + 1) * channels
    tl.store(sums_ptr + (WIDTH - 1) * channels + channel, s0, mask=inside)
    tl.store(sums_ptr + (WIDTH - 2) * channels + channel, s1, mask=inside & (WIDTH > 1))
    tl.store(sums_ptr + (WIDTH - 3) * channels + channel, s2, mask=inside & (WIDTH > 2))
    tl.store(sums_ptr + (WIDTH - 4) * channels + channel, s3, mask=inside & (WIDTH > 3))
    tl.store(sums_ptr + WIDTH * channels + channel, sums, mask=inside)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, settings: tuple[int, int, int], wanted: int
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Grid, tokens of a stretch (shorter ones where programs would be fewer than wanted), and constants."""
    stretch, block, warps = settings
    batch, tokens, channels = x.shape
    blocks = triton.cdiv(channels, block)
    while stretch > 16 and batch * blocks * triton.cdiv(tokens, stretch) < wanted:
        stretch //= 2
    return (blocks, triton.cdiv(tokens, stretch), batch), stretch, {
        "BIAS": bias is not None, "PACKED": ids is not None, "WIDTH": weight.shape[1], "CHANNELS": block,
        "num_warps": warps,
    }  # fmt: skip


def _neighbours(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ids: Tensor | None
) -> tuple[tuple[Tensor], tuple[()]]:
    """`causal_conv` for the registry of operations, without the new state; ids: (B, W-1+S) int32."""
    x = _neighbours(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    use = settings_for(x.device)
    grid, stretch, options = _launch(x, weight, bias, ids, use.conv_forward, 2 * use.programs)
    ids = None if ids is None else ids.contiguous()
    conv_forward_kernel[grid](
        x, weight.contiguous(), bias, state.contiguous(), x if ids is None else ids, out, x.shape[1], stretch,
        x.stride(1), x.stride(0), x.shape[2], **options,
    )  # fmt: skip
    return (out,), ()


def conv_backward(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    kept: tuple[()],
    gradients: tuple[Tensor],
    into: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x (written to `into` if given), weight, bias and state."""
    x, weight, bias, state, ids = tensors
    x, dout = _neighbours(x), _neighbours(gradients[0])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    dstate = torch.empty_like(state, memory_format=torch.contiguous_format)
    use = settings_for(x.device)
    grid, stretch, options = _launch(x, weight, bias, ids, use.conv_backward, 2 * use.programs)
    ids = None if ids is None else ids.contiguous()
    width = weight.shape[1]
    sums = torch.empty(grid[2] * grid[1], width + 1, x.shape[2], dtype=torch.float32, device=x.device)
    conv_backward_kernel[grid](
        x, weight.contiguous(), bias, state.contiguous(), x if ids is None else ids, dout, dx, dstate, sums,
        x.shape[1], stretch, x.stride(1), x.stride(0), dout.stride(1), dout.stride(0), dx.stride(1), dx.stride(0),
        x.shape[2], **options,
    )  # fmt: skip
    total = sums.sum(dim=0).to(weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype))
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].T.to(weight.dtype), dbias, dstate, None
