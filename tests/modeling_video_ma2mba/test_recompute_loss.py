"""The chunked loss against transformers' own, value and gradients."""

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from video_ma2mba.modeling_video_ma2mba.recompute_loss import (
    IGNORE_INDEX,
    chunked_causal_lm_loss,
    shift_labels_left,
)

VOCABULARY, WIDTH = 11, 6


def batch(dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype)
    hidden = torch.randn(3, 8, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 8))
    labels[torch.rand(3, 8) < 0.4] = IGNORE_INDEX
    labels[:, 0] = 5  # nothing predicts the first token: it must not count
    return head, hidden, labels


def ours(head, hidden, labels, **kwargs):
    shifted = shift_labels_left(labels)
    at = shifted != IGNORE_INDEX
    return chunked_causal_lm_loss(head, hidden[at], shifted[at], **kwargs)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000, None])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(13)])
def test_equals_the_loss_of_transformers(chunk, items):
    head, hidden, labels = batch()
    expected = ForCausalLMLoss(head(hidden), labels, VOCABULARY, num_items_in_batch=items)
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])
    loss = ours(head, hidden, labels, num_items_in_batch=items, chunk=chunk)
    grads = torch.autograd.grad(loss, [hidden, head.weight])
    assert loss.dtype == torch.float64
    # transformers computes the value in fp32
    torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-6, atol=1e-6)
    for ours_grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_chunking_is_exact():
    head, hidden, labels = batch()
    results = []
    for chunk in (1, 3, 1000):
        loss = ours(head, hidden, labels, chunk=chunk)
        results.append((loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_half_precision_loss_is_fp32():
    head, hidden, labels = batch(torch.bfloat16)
    expected = ForCausalLMLoss(head(hidden), labels, VOCABULARY)
    loss = ours(head, hidden, labels, chunk=2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_frozen_head_still_passes_the_gradient_on():
    head, hidden, labels = batch()
    head.requires_grad_(False)
    ours(head, hidden, labels, chunk=2).backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_labels_the_loss_is_zero_and_reaches_every_parameter():
    head, hidden, labels = batch()
    labels[:] = IGNORE_INDEX
    for items in (None, 4):
        loss = ours(head, hidden, labels, num_items_in_batch=items)
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [hidden, head.weight])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
