"""Products of a decoding step for a batch, in Triton: a few rows times a large matrix, which is read once.

`decode_reference` documents the functions.
"""

import functools

import torch
from torch import Tensor

from .decode_kernel_parts import launch_options, release, tl, triton, wait
from .decode_reference import LARGEST_PRODUCT

WHOLE = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5, "EARLY": 512}
"""Tile of one program where it sums over all columns: many rows of the matrix."""
PARTS = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5, "EARLY": 0}
"""Tile of one program where several share the columns."""


@triton.jit
def _fetch_to_cache(ptrs):
    """Ask for the 128 bytes at each of `ptrs` without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, B, N, K: tl.constexpr, PART: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """EARLY: columns of the matrix that are on their way before x is there, 0 or 64 times a power of two."""
    release(PDL)
    rows, b, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * PART
    existing, some = tl.minimum(rows, N - 1).to(tl.int64), tl.minimum(b, B - 1)
    weight_ptrs = weight_ptr + existing[None, :] * K + first + k[:, None]
    x_ptrs = x_ptr + some[:, None] * K + first + k[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if PDL and EARLY > 0:
        lines = tl.arange(0, EARLY // 64) * 64
        _fetch_to_cache(weight_ptr + existing[:, None] * K + first + lines[None, :])
    wait(PDL)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        total = tl.dot(tl.load(x_ptrs + start), tl.load(weight_ptrs + start, eviction_policy="evict_first"), total)
    out_ptrs = out_ptr + (tl.program_id(1) * B + b)[:, None] * N + rows[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(b < B)[:, None] & (rows < N)[None, :])


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; plenty where Triton interprets."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)


def _multiply(x: Tensor, weight: Tensor, out: Tensor, splits: int, tile: dict[str, int]) -> None:
    batch, (rows, columns), early = len(x), weight.shape, tile["EARLY"]
    while early > columns // splits:  # nothing beyond a program's own columns
        early //= 2
    block = max(16, triton.next_power_of_2(batch))
    stage = (block + tile["BLOCK_N"]) * tile["BLOCK_K"] * weight.element_size()
    stages = max(1, min(tile["num_stages"], _shared_memory(x.device) // stage))
    _product_kernel[triton.cdiv(rows, tile["BLOCK_N"]), splits](
        x, weight, out, batch, rows, K=columns, PART=columns // splits,
        BLOCK_B=block, BLOCK_N=tile["BLOCK_N"], BLOCK_K=tile["BLOCK_K"],
        STAGES=stages, EARLY=early, num_warps=tile["num_warps"], **launch_options(x),
    )  # fmt: skip


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See `decode_reference.product`."""
    if len(x) <= LARGEST_PRODUCT and weight.dtype != torch.float32 and weight.shape[1] % WHOLE["BLOCK_K"] == 0:
        _multiply(x, weight, out, 1, WHOLE)
    else:
        torch.mm(x, weight.T, out=out)


def partial_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See `decode_reference.partial_product`."""
    if out.dtype != weight.dtype:
        _multiply(x, weight, out, len(out), PARTS)
    else:
        torch.mm(x, weight.T, out=out[0])


@triton.jit
def _norm_kernel(
    x_ptr, partial_ptr, squares_ptr, scale_ptr, out_ptr, SIZE, INNER, eps, B, SPLITS: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = cols < SIZE
    at = (row * tl.num_programs(1) + tl.program_id(1)) * SIZE + cols
    scale = tl.load(scale_ptr + tl.program_id(1) * SIZE + cols, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        delta = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(SPLITS):
            delta += tl.load(partial_ptr + (i * B + row) * SIZE + cols, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 0:
            parts = tl.arange(0, PARTS)
            squares = tl.load(squares_ptr + row * COUNT + parts, mask=parts < COUNT, other=0.0)
            delta /= tl.sqrt(tl.sum(squares, 0) / INNER + eps)
        x = (x + delta).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, 0) / SIZE + eps) * scale
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(
    residual: Tensor,
    partial: Tensor | None,
    squares: Tensor | None,
    inner: int,
    scale: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """See `decode_reference.add_norm`."""
    batch, size = residual.shape
    count = 0 if squares is None else squares.shape[1]
    _norm_kernel[(batch, 1)](
        residual, partial, squares, scale, out, size, inner, eps, batch,
        SPLITS=0 if partial is None else len(partial), COUNT=count, PARTS=triton.next_power_of_2(max(count, 1)),
        BLOCK=triton.next_power_of_2(size), num_warps=8, **launch_options(residual),
    )  # fmt: skip


def group_norm(gated: Tensor, scale: Tensor, eps: float, groups: int, out: Tensor) -> None:
    """See `decode_reference.group_norm`."""
    batch, size = gated.shape[0], gated.shape[1] // groups
    _norm_kernel[(batch, groups)](
        gated, None, None, scale, out, size, size, eps, batch, SPLITS=0, COUNT=0, PARTS=1,
        BLOCK=triton.next_power_of_2(size), num_warps=8, **launch_options(gated),
    )  # fmt: skip
