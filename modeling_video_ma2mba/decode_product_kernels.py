"""Matrix-vector products of a decoding step for a batch of one, with the work around them, in Triton.

Reading every weight once is nearly all of such a step. Norms are applied behind the product, of which their 1/rms is
only a factor, so no kernel waits for a norm. `decode_reference` documents the functions.
"""

from typing import Any

from torch import Tensor

from .decode_kernel_parts import conv_inputs, convolve, launch_options, release, tl, triton, wait
from .ops_costs import MixerShape

PRODUCT = {"BLOCK_N": 4, "BLOCK_K": 256, "AHEAD": 5, "num_warps": 2}
"""Rows and columns of a program's tile, and how many of its tiles are fetched before the first is used. BLOCK_N is at
least 4: buffers for partial sums have room for a quarter of the rows."""


@triton.jit
def _tile(weight_ptrs, cols, index: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    ptrs = weight_ptrs + index * BLOCK_K
    if (index + 1) * BLOCK_K <= K:
        tile = tl.load(ptrs, eviction_policy="evict_first")
    else:
        tile = tl.load(ptrs, mask=(index * BLOCK_K + cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _normed_products(
    x_ptr, squares_ptr, weight_ptr, rows, eps, K: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,) fp32: weight[rows] @ x / rms, the weights being fetched AHEAD blocks ahead; rms from COUNT sums."""
    cols = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    # The vector is loaded once per row, from the cache: as a matrix it needs no exchange between threads.
    x_ptrs = x_ptr + rows[:, None] * 0 + cols[None, :]
    tiles = ()
    for i in tl.static_range(AHEAD):
        if i * BLOCK_K < K:
            tiles = tiles + (_tile(weight_ptrs, cols, i, K, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005 (Triton's tuples grow)
    wait(PDL)
    parts = tl.arange(0, PARTS)
    squares = tl.load(squares_ptr + parts, mask=parts < COUNT, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        if (i + AHEAD) * BLOCK_K < K:
            tiles = tiles + (_tile(weight_ptrs, cols, i + AHEAD, K, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005
        if (i + 1) * BLOCK_K <= K:
            x = tl.load(x_ptrs + i * BLOCK_K)
        else:
            x = tl.load(x_ptrs + i * BLOCK_K, mask=(i * BLOCK_K + cols < K)[None, :], other=0.0)
        total += tiles[i].to(tl.float32) * x.to(tl.float32)
    return tl.sum(total, 1) / tl.sqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def _norm_linear_kernel(
    x_ptr, squares_ptr, weight_ptr, out_ptr, N, eps, K: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, N - 1)
    out = _normed_products(x_ptr, squares_ptr, weight_ptr, inside, eps, K, COUNT, PARTS, BLOCK_N, BLOCK_K, AHEAD, PDL)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < N)


def _product_options(weight: Tensor, squares: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel over `weight`'s rows."""
    count = len(squares)
    sizes = {"K": weight.shape[1], "COUNT": count, "PARTS": triton.next_power_of_2(count)}
    return (triton.cdiv(weight.shape[0], PRODUCT["BLOCK_N"]),), {**sizes, **PRODUCT, **launch_options(weight)}


def norm_linear(scaled: Tensor, squares: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `decode_reference.norm_linear`."""
    grid, options = _product_options(weight, squares)
    _norm_linear_kernel[grid](scaled, squares, weight, out, weight.shape[0], eps, **options)


@triton.jit
def _norm_linear_conv_kernel(
    x_ptr, squares_ptr, weight_ptr, out_ptr, state_ptr, taps_ptr, bias_ptr, xbc_ptr, slot_ptr, N, INNER, CHANNELS,
    eps, WIDTH: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels, existing = rows - INNER, tl.minimum(rows, N - 1)
    inside = (channels >= 0) & (channels < CHANNELS)
    slot = tl.load(slot_ptr)
    inputs = conv_inputs(channels, inside, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
    out = _normed_products(
        x_ptr, squares_ptr, weight_ptr, existing, eps, K, COUNT, PARTS, BLOCK_N, BLOCK_K, AHEAD, PDL
    )
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows, out, mask=(rows < N) & (inside == 0))
    xbc = convolve(out, inputs, channels, inside, state_ptr, WIDTH)
    tl.store(xbc_ptr + slot * CHANNELS + channels, xbc.to(xbc_ptr.dtype.element_ty), mask=inside)


def norm_linear_conv(
    scaled: Tensor, squares: Tensor, weight: Tensor, eps: float, out: Tensor, conv_state: Tensor,
    conv_weight: Tensor, conv_bias: Tensor | None, xbc: Tensor, slot: Tensor, shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.norm_linear_conv`."""
    grid, options = _product_options(weight, squares)
    _norm_linear_conv_kernel[grid](
        scaled, squares, weight, out, conv_state, conv_weight, conv_bias, xbc, slot, weight.shape[0], shape.inner,
        shape.conv_dim, eps, WIDTH=shape.conv_kernel, BIAS=conv_bias is not None, **options,
    )  # fmt: skip


@triton.jit
def _gated_linear_add_kernel(
    x_ptr, squares_ptr, weight_ptr, residual_ptr, scale_ptr, scaled_ptr, out_squares_ptr, N, eps,
    K: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, existing = rows < N, tl.minimum(rows, N - 1)
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    out = _normed_products(
        x_ptr, squares_ptr, weight_ptr, existing, eps, K, COUNT, PARTS, BLOCK_N, BLOCK_K, AHEAD, PDL
    )
    out = out.to(weight_ptr.dtype.element_ty).to(tl.float32)
    out += tl.load(residual_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    out = out.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + rows, out, mask=inside)
    out = tl.where(inside, out.to(tl.float32), 0.0)
    tl.store(scaled_ptr + rows, (out * scale).to(scaled_ptr.dtype.element_ty), mask=inside)
    tl.store(out_squares_ptr + tl.program_id(0), tl.sum(out * out, 0))


def gated_linear_add(
    gated: Tensor, squares: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor, scaled: Tensor,
    out_squares: Tensor,
) -> None:  # fmt: skip
    """See `decode_reference.gated_linear_add`."""
    grid, options = _product_options(weight, squares)
    _gated_linear_add_kernel[grid](
        gated, squares, weight, residual, scale, scaled, out_squares, weight.shape[0], eps, **options
    )
