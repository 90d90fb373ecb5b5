"""What the Triton kernels of a decoding step share: launching, activations, one token of the convolution.

With `PDL` (Hopper and later, programmatic dependent launch) a kernel starts while the one before it ends, and waits
only before it touches what that one wrote; its first weights are then already on their way.
"""

import functools

import torch
from torch import Tensor

from .ops_triton_parts import tl, triton  # the other files of kernels take both from here


@functools.cache
def early_start(device: torch.device) -> bool:
    """Whether kernels may start before their predecessor ends (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(tensor: Tensor) -> dict[str, bool]:
    """Keyword arguments of a launch on the device of `tensor`: kernels start early where the device can."""
    return {"PDL": True, "launch_pdl": True} if early_start(tensor.device) else {"PDL": False}


@triton.jit
def silu(x):
    """x * sigmoid(x), fp32, of any shape."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), fp32, of any shape; x itself above 20, as PyTorch has it."""
    u = tl.exp(x)
    w = 1.0 + u
    # log(1 + u) without losing the small u (Kahan); the second `where` only avoids 0 / 0.
    small = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(x > 20.0, x, small)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the results of the kernel launched before; nothing read above this line may come from it."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start, up to its own `wait`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def conv_inputs(channels, inside, state_ptr, weight_ptr, bias_ptr, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """The states (C, W-1) of `channels`, all but their last weights, the last weights, and the biases."""
    taps = tl.arange(0, 4)[None, :]
    held = inside[:, None] & (taps < WIDTH - 1)
    old = tl.load(state_ptr + channels[:, None] * (WIDTH - 1) + taps, mask=held, other=0.0)
    weight = tl.load(weight_ptr + channels[:, None] * WIDTH + taps, mask=held, other=0.0)
    last = tl.load(weight_ptr + channels * WIDTH + WIDTH - 1, mask=inside, other=0.0)
    bias = tl.zeros(last.shape, tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    return old, weight, last, bias


@triton.jit
def convolve(raw, inputs, channels, inside, state_ptr, WIDTH: tl.constexpr):
    """Advance the states of `channels` by their `raw` inputs; returns silu(convolution) in fp32."""
    old, weight, last, bias = inputs
    out = tl.sum(old.to(tl.float32) * weight.to(tl.float32), 1) + raw.to(tl.float32) * last.to(tl.float32) + bias
    taps = tl.arange(0, 4)[None, :]
    moved = inside[:, None] & (taps < WIDTH - 1) & (taps > 0)
    tl.debug_barrier()  # no thread may still have to read what the next lines overwrite
    tl.store(state_ptr + channels[:, None] * (WIDTH - 1) + taps - 1, old, mask=moved)
    tl.store(state_ptr + channels * (WIDTH - 1) + WIDTH - 2, raw.to(state_ptr.dtype.element_ty), mask=inside)
    return silu(out)
