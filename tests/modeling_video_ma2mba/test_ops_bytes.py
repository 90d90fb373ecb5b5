"""What backends say that they keep, against what autograd records. Of kernels, the memory of whole steps tells."""

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.ops_conv import CAUSAL_CONV, causal_conv_torch
from video_ma2mba.modeling_video_ma2mba.ops_norm import (
    ADD_RMS_NORM,
    GATED_RMS_NORM,
    add_rms_norm_torch,
    gated_rms_norm_torch,
)
from video_ma2mba.modeling_video_ma2mba.ops_ssd import SSD, ssd_sizes, ssd_torch

TOKENS, NO_LIMIT = 1024, (0.0, float("inf"))


def kept_per_token(function, *inputs: torch.Tensor) -> float:
    """Bytes that autograd keeps beside the inputs and the first result."""
    kept, inputs = {}, [tensor.requires_grad_() for tensor in inputs]

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    result = result[0] if isinstance(result, tuple) else result
    for tensor in (*inputs, result):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_and_norms(dtype):
    def randn(*sizes):
        return torch.randn(*sizes, dtype=dtype)

    size, channels = dtype.itemsize, 64
    x, state = randn(1, TOKENS, channels), randn(1, channels, 3)
    conv = kept_per_token(causal_conv_torch, x, randn(channels, 4), randn(channels), state)
    assert conv == pytest.approx(CAUSAL_CONV.named("torch").kept_bytes(itemsize=size, channels=channels), rel=0.02)
    norm = kept_per_token(
        lambda r, d, w: add_rms_norm_torch(r, d, w, 1e-5, dtype), x, randn(1, TOKENS, channels), randn(channels)
    )
    # The sum is a result as well, and kept all the same.
    assert norm == pytest.approx(ADD_RMS_NORM.named("torch").kept_bytes(itemsize=size, width=channels), rel=0.02)
    for groups in (1, 4):
        gated = kept_per_token(
            lambda y, z, w, groups=groups: gated_rms_norm_torch(y, z, w, 1e-5, groups), x,
            randn(1, TOKENS, channels), randn(channels),
        )  # fmt: skip
        expected = GATED_RMS_NORM.named("torch").kept_bytes(itemsize=size, width=channels, groups=groups)
        assert gated == pytest.approx(expected, rel=0.05)


# With several groups B and C are copied as well, which is little where heads are many, and not counted.
@pytest.mark.parametrize(
    ("heads", "head_dim", "state_size", "chunk", "groups"),
    [(8, 16, 16, 32, 1), (4, 8, 32, 64, 1), (8, 16, 16, 32, 2)],
)
def test_scan(heads, head_dim, state_size, chunk, groups):
    shapes = ((heads, head_dim), (heads,), (groups, state_size), (groups, state_size))
    x, dt, b, c = (torch.randn(1, TOKENS, *sizes) for sizes in shapes)
    kept = kept_per_token(
        lambda *tensors: ssd_torch(*tensors, chunk, NO_LIMIT), x, dt, -torch.rand(heads), b, c, torch.randn(heads),
        torch.randn(heads), torch.zeros(1, heads, head_dim, state_size),
    )  # fmt: skip
    sizes = ssd_sizes(heads, head_dim, state_size, groups, chunk, NO_LIMIT)
    assert kept == pytest.approx(SSD.named("torch").kept_bytes(itemsize=4, **sizes), rel=0.02)
