"""Windows that pass their state on: with its gradient they are one window, in fp64; without it, none goes back."""

from collections.abc import Callable

import pytest
import torch

CELLS = {"method": "multi_axis", "segment_length": 5, "layers_per_block": 1}
TOKENS, WINDOW = 41, 13


def batch(case: str) -> dict[str, torch.Tensor]:
    """Two rows of tokens with labels here and there: plain, padded on either side, or packed."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, TOKENS), generator=draw)
    labels = torch.where(torch.rand(2, TOKENS, generator=draw) < 0.4, ids, -100)
    given = {"input_ids": ids, "labels": labels}
    if case in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 17) if case == "left" else slice(24, None)] = 0
        given |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    if case == "packed":  # a sample ends at a window's border, one shortly before one
        given["seq_idx"] = torch.stack([torch.arange(TOKENS) // WINDOW, (torch.arange(TOKENS) > WINDOW - 2).long()])
        first = torch.nn.functional.pad(given["seq_idx"].diff(dim=1) > 0, (1, 0))
        given["labels"] = labels.masked_fill(first, -100)
    return given


def learn(model, window: int | None, gradient: bool, given: dict) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    model.model.language_model.carry_state(window, gradient)
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cells", [None, CELLS], ids=["plain", "multi-axis checkpointing"])
@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
def test_carried_gradients_are_those_of_one_window(case: str, cells: dict | None, make_model: Callable):
    model = make_model(dtype=torch.float64).train()
    if cells:
        model.gradient_checkpointing_enable(cells)
    given = batch(case)
    loss, gradients = learn(model, None, True, given)
    for window in (WINDOW, 1 if cells is None else 7, TOKENS):
        other, others = learn(model, window, True, given)
        assert abs(other - loss) < 1e-12, window
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-14, (window, name)
    other, others = learn(model, WINDOW, False, given)
    assert abs(other - loss) < 1e-12, "what is read is the same"
    far = [name for name, gradient in gradients.items() if (others[name] - gradient).norm() > 1e-6 * gradient.norm()]
    assert far, "nothing was cut"


@pytest.mark.parametrize("cells", [None, CELLS], ids=["plain", "multi-axis checkpointing"])
def test_a_cut_gradient_stays_in_its_window(cells: dict | None, make_model: Callable):
    """The state brings what was read before; the loss of a window changes nothing about how that was read."""
    model = make_model(dtype=torch.float64).train()
    if cells:
        model.gradient_checkpointing_enable(cells)
    text = model.model.language_model
    x = torch.randn(1, TOKENS, model.config.text_config.hidden_size, dtype=torch.float64, requires_grad=True)
    for gradient in (True, False):
        text.carry_state(WINDOW, gradient)
        hidden, state = text.scan(x)
        (first,) = torch.autograd.grad(hidden[:, 2 * WINDOW :].square().sum(), x)
        assert bool((first[:, : 2 * WINDOW] != 0).any()) == gradient and bool((first[:, 2 * WINDOW :] != 0).any())
        assert state.seen_tokens == TOKENS
    changed = x.detach().clone()
    changed[:, 3] += 1
    assert not text.scan(changed)[0][:, 2 * WINDOW :].equal(text.scan(x)[0][:, 2 * WINDOW :]), "the state passes on"


def test_reading_and_wrong_windows(make_model: Callable):
    model = make_model()
    text = model.model.language_model
    text.carry_state(4, False)
    with torch.no_grad():
        state = model(**{"input_ids": batch("plain")["input_ids"]}, use_cache=True).past_key_values
    assert state.seen_tokens == TOKENS, "windows are about training"
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        text.carry_state(0)
    with pytest.raises(ValueError, match="give no output_hidden_states"):
        model.train()(**batch("plain"), output_hidden_states=True)
