"""The convolution beside PyTorch's own, in pieces, and its carried inputs."""

import pytest
import torch
import torch.nn.functional as F

from video_ma2mba.modeling_video_ma2mba.ops_conv import (
    CAUSAL_CONV,
    add_last_inputs_gradient,
    causal_conv,
    causal_conv_torch,
    last_inputs,
)

from .stand_in_kernels import pair_of, standing_in


def conv_alone(x, weight, bias, state, seq_idx):
    """As the kernels: without the state."""
    return causal_conv_torch(x, weight, bias, state, None, seq_idx)[0]


def inputs(tokens: int, width: int = 4) -> list[torch.Tensor]:
    sizes = ((2, tokens, 6), (6, width), (6,), (2, 6, width - 1))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_the_convolution_is_pytorchs(tokens, width, kernels):
    x, weight, bias, state = inputs(tokens, width)
    whole = torch.cat([state, x.transpose(1, 2)], dim=2)
    expected = F.silu(F.conv1d(whole, weight[:, None], bias, groups=6)).transpose(1, 2)
    with standing_in({CAUSAL_CONV: pair_of(conv_alone)} if kernels else {}):
        found, new = causal_conv(x, weight, bias, state)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.equal(new, whole[:, :, tokens:])
        assert new.untyped_storage().nbytes() == new.nbytes
        scale = torch.linspace(-1, 1, new.numel(), dtype=torch.float64).view(new.shape)
        leaves = [x, weight, bias, state]
        ours = torch.autograd.grad(found.sum() + (new * scale).sum(), leaves)
    theirs = torch.autograd.grad(expected.sum() + (whole[:, :, tokens:] * scale).sum(), leaves)
    for own, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(own, reference, atol=1e-12)


@pytest.mark.parametrize("kernels", [False, True])
def test_pieces_are_the_whole(kernels):
    x, weight, bias, state = inputs(11)
    with standing_in({CAUSAL_CONV: pair_of(conv_alone)} if kernels else {}):
        whole, last = causal_conv(x, weight, bias, state)
        pieces = []
        for part in x.split([1, 2, 3, 5], dim=1):
            out, state = causal_conv(part, weight, bias, state)
            pieces.append(out)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-12)
    assert torch.equal(state, last)


@pytest.mark.parametrize("lengths", [None, (0, 1), (2, 5), (5, 3)])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_the_gradient_of_the_last_inputs(tokens, lengths):
    """Written by hand for kernels that fill buffers: what autograd finds."""
    x, _, _, state = inputs(tokens)
    lengths = None if lengths is None else torch.tensor(lengths).clamp(max=tokens)
    new = last_inputs(x, state, lengths)
    gradient = torch.randn_like(new)
    expected = torch.autograd.grad(new, [x, state], gradient, allow_unused=True)
    dx, dstate = torch.zeros_like(x), torch.zeros_like(state)
    add_last_inputs_gradient(gradient, dx, dstate, lengths)
    for found, reference in zip((dx, dstate), expected, strict=True):
        assert torch.equal(found, torch.zeros_like(found) if reference is None else reference)
