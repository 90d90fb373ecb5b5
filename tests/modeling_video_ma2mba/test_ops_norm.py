"""The norms beside PyTorch's own."""

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.ops_norm import add_rms_norm, gated_rms_norm


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(groups):
    y, z, weight = torch.randn(2, 4, 12), torch.randn(2, 4, 12), torch.randn(12)
    found = gated_rms_norm(y, z, weight, 1e-5, groups)
    gated = (y * z * torch.sigmoid(z)).view(2, 4, groups, -1)
    expected = torch.nn.functional.rms_norm(gated, gated.shape[-1:], eps=1e-5).view(2, 4, 12) * weight
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("with_delta", [True, False])
def test_residual_sum_and_norm(with_delta):
    residual, weight = torch.randn(2, 4, 12), torch.randn(12)
    delta = torch.randn(2, 4, 12).bfloat16() if with_delta else None
    normed, total = add_rms_norm(residual, delta, weight, 1e-5, torch.bfloat16)
    expected = residual if delta is None else residual + delta.float()
    assert torch.equal(total, expected)
    assert normed.dtype == torch.bfloat16
    expected = torch.nn.functional.rms_norm(expected, (12,), weight, eps=1e-5)
    assert torch.allclose(normed.float(), expected, atol=1e-2, rtol=1e-2)
