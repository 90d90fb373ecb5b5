"""One decoding step in Triton: norms and the convolution for batches, and the table of all operations.

`decode_reference` holds the same functions in PyTorch, and their documentation. Reading one token is bound by memory
traffic: every weight once, every state once. For a batch of one, three kernels a layer do nothing else: norm, in_proj
and convolution in one; scan step and gate; gated norm, out_proj and the residual addition. Larger batches leave the
products to cuBLAS and take the small kernels in between.
"""

from types import SimpleNamespace

from torch import Tensor

from .decode_kernel_parts import conv_inputs, convolve, launch_options, release, tl, triton, wait
from .decode_product_kernels import gated_linear_add, norm_linear, norm_linear_conv
from .decode_scan_kernels import fold_history, scan_step
from .ssd_scan import MixerShape


@triton.jit
def _conv_kernel(
    proj_ptr, state_ptr, taps_ptr, bias_ptr, xbc_ptr, slot_ptr, N, INNER, CHANNELS, SLOTS,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    state_ptr += row * CHANNELS * (WIDTH - 1)
    place = (row * SLOTS + tl.load(slot_ptr)) * CHANNELS
    inputs = conv_inputs(channels, inside, state_ptr, taps_ptr, bias_ptr, WIDTH, BIAS)
    wait(PDL)
    raw = tl.load(proj_ptr + row * N + INNER + channels, mask=inside, other=0.0)
    xbc = convolve(raw, inputs, channels, inside, state_ptr, WIDTH)
    tl.store(xbc_ptr + place + channels, xbc.to(xbc_ptr.dtype.element_ty), mask=inside)


def conv_step(
    proj: Tensor, conv_state: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, xbc: Tensor, slot: Tensor,
    shape: MixerShape,
) -> None:  # fmt: skip
    """See `decode_reference.conv_step`."""
    grid = (triton.cdiv(shape.conv_dim, 256), proj.shape[0])
    _conv_kernel[grid](
        proj, conv_state, conv_weight, conv_bias, xbc, slot, proj.shape[1], shape.inner, shape.conv_dim, xbc.shape[1],
        WIDTH=shape.conv_kernel, BIAS=conv_bias is not None, BLOCK=256, num_warps=4, **launch_options(proj),
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, scale_ptr, out_ptr, SIZE, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    release(PDL)
    wait(PDL)
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
        num_warps=8, **launch_options(residual),
    )  # fmt: skip


def group_norm(gated: Tensor, scale: Tensor, eps: float, groups: int, out: Tensor) -> None:
    """See `decode_reference.group_norm`."""
    batch, size = gated.shape[0], gated.shape[1] // groups
    _norm_kernel[(batch, groups)](
        gated, None, scale, out, size, eps, ADD=False, BLOCK=triton.next_power_of_2(size), num_warps=8,
        **launch_options(gated),
    )  # fmt: skip


OPERATIONS = SimpleNamespace(
    add_norm=add_norm,
    norm_linear=norm_linear,
    norm_linear_conv=norm_linear_conv,
    conv_step=conv_step,
    scan_step=scan_step,
    fold_history=fold_history,
    gated_linear_add=gated_linear_add,
    group_norm=group_norm,
)
"""What `decode_step.token_step` is made of."""
