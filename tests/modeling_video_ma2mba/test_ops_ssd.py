"""The three parts of the scan beside the sums that they stand for. `test_mixer_mamba2` holds the whole to account."""

import math

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.ops_ssd import (
    SSD,
    chunk_scan,
    chunk_state,
    mask_steps,
    ssd,
    ssd_torch,
    state_passing,
)

from .stand_in_kernels import pair_of, standing_in

BATCH, HEADS, GROUPS, CHUNKS, CHUNK, WIDTH, SIZE = 2, 4, 2, 3, 5, 3, 6


def randn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def test_chunk_state():
    x, b, to_end = (
        randn(BATCH, HEADS, CHUNKS, CHUNK, WIDTH),
        randn(BATCH, GROUPS, CHUNKS, CHUNK, SIZE),
        randn(BATCH, HEADS, CHUNKS, CHUNK),
    )
    every_head = b.repeat_interleave(HEADS // GROUPS, dim=1)
    expected = torch.einsum("bhcq,bhcqp,bhcqn->bhcpn", to_end, x, every_head)
    assert torch.allclose(chunk_state(x, b, to_end), expected, atol=1e-12)


def test_state_passing():
    added, carry, state = (
        randn(BATCH, HEADS, CHUNKS, WIDTH, SIZE),
        randn(BATCH, HEADS, CHUNKS),
        randn(BATCH, HEADS, WIDTH, SIZE),
    )
    entering, last = state_passing(added, carry, state)
    for i in range(CHUNKS):
        assert torch.equal(entering[:, :, i], state)
        state = carry[:, :, i, None, None] * state + added[:, :, i]
    assert torch.equal(last, state)


@pytest.mark.parametrize("packed", [False, True])
def test_chunk_scan(packed):
    x, entering = randn(BATCH, HEADS, CHUNKS, CHUNK, WIDTH), randn(BATCH, HEADS, CHUNKS, WIDTH, SIZE)
    b, c = randn(BATCH, GROUPS, CHUNKS, CHUNK, SIZE), randn(BATCH, GROUPS, CHUNKS, CHUNK, SIZE)
    total, from_start = -randn(BATCH, HEADS, CHUNKS, CHUNK).abs().cumsum(-1), randn(BATCH, HEADS, CHUNKS, CHUNK)
    ids = torch.randint(0, 2, (BATCH, 1, CHUNKS, CHUNK)) if packed else None
    found = chunk_scan(x, b, c, total, from_start, entering, ids)
    b, c = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (b, c))
    for i in range(CHUNK):
        expected = from_start[..., i, None] * torch.einsum("bhcn,bhcpn->bhcp", c[..., i, :], entering)
        for j in range(i + 1):
            seen = (c[..., i, :] * b[..., j, :]).sum(-1) * torch.exp(total[..., i] - total[..., j])
            if packed:
                seen = seen * (ids[..., i] == ids[..., j])
            expected = expected + seen.unsqueeze(-1) * x[..., j, :]
        assert torch.allclose(found[..., i, :], expected, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_on_kernels_the_scan_is_the_same(packed, padded):
    """The way to and from kernels: padding told by step sizes, states and gradients back to where they belong."""
    tokens, shapes = 7, ((HEADS, WIDTH), (HEADS,), (GROUPS, SIZE), (GROUPS, SIZE))
    x, dt, b, c = (randn(BATCH, tokens, *sizes).requires_grad_() for sizes in shapes)
    D, dt_bias, a = randn(HEADS).requires_grad_(), randn(HEADS).requires_grad_(), -randn(HEADS).exp()
    state = randn(BATCH, HEADS, WIDTH, SIZE).requires_grad_()
    lengths = torch.tensor([3, tokens]) if padded else None
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2]]) if packed else None
    arguments = (x, dt, a, b, c, D, dt_bias, state, 4, (0.0, math.inf), lengths, ids)

    def kernel(x, dt, a, b, c, D, dt_bias, state, ids, chunk_size, dt_limit):
        return ssd_torch(x, dt, a, b, c, D, dt_bias, state, chunk_size, dt_limit, None, ids)

    results = []
    for backends in ({}, {SSD: pair_of(kernel)}):
        with standing_in(backends):
            y, new = ssd(*arguments)
            y = y if lengths is None else y * (torch.arange(tokens) < lengths[:, None])[..., None, None]
            loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + (new * new.detach().sign()).sum()
            results.append([y, new, *torch.autograd.grad(loss, [x, dt, b, c, D, dt_bias, state])])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_masked_steps_are_exactly_zero():
    dt = mask_steps(torch.full((2, 3, 1), 4.0), torch.tensor([1, 3]))
    steps = torch.nn.functional.softplus(dt + 20.0)
    assert torch.equal(steps[..., 0] > 0, torch.tensor([[True, False, False], [True, True, True]]))
    assert not steps[0, 1:].any()
