"""Linear layers that something has replaced: results stay right, states know which weights they came from."""

import copy

import pytest
import torch
from torch import nn

from video_ma2mba import VideoState
from video_ma2mba.modeling_video_ma2mba.stack_weights import quantised_weights
from video_ma2mba.modeling_video_ma2mba.state_identity import weights_digest

VIDEO, PER_FRAME = 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*torch.ao.*", "ignore:TypedStorage")


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class WholeNumbers(nn.Module):
    """As libraries for quantised weights have them: numbers in buffers, or in a parameter that is no float."""

    def __init__(self, linear: nn.Linear, as_parameters: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach() / scale).round().to(torch.int8)
        if as_parameters:
            self.weight = nn.Parameter(numbers, requires_grad=False)
        else:
            self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)

    @property
    def restored(self):
        numbers = self.weight if hasattr(self, "weight") else self.numbers
        return numbers.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.restored.to(x.dtype), self.bias)


def replaced(model, as_parameters):
    """Two models: one with `WholeNumbers` in the place of linear layers, one with plain layers of the same values."""
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())  # no longer tied
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            new = WholeNumbers(module, as_parameters)
            ours.set_submodule(name, new)
            plain.get_submodule(name).weight.data = new.restored
    return ours.eval(), plain.eval()


@pytest.fixture
def batch(raw_pixels):
    ids = torch.tensor([[5, *[VIDEO] * 3 * PER_FRAME, 40, 41, 42, 43]])
    return {"input_ids": ids, "pixel_values_videos": raw_pixels(3)}


@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_quantisation(make_model, batch, grad):
    model = make_model()
    quantised = dynamic(model)
    assert {name.rpartition(".")[2] for name, _ in quantised_weights(quantised)} == {"weight()"}
    with torch.set_grad_enabled(grad):
        expected, found = model(**batch), quantised(**batch)
        assert ((found.logits - expected.logits).norm() / expected.logits.norm()) < 0.05
        labels = batch["input_ids"]
        loss = quantised(**batch, labels=labels).loss
        torch.testing.assert_close(loss, model(**batch, labels=labels).loss, rtol=0.05, atol=0.05)
        text = batch["input_ids"][:, -4:]
        torch.testing.assert_close(quantised(text).logits, model(text).logits, rtol=0.1, atol=0.1)
    features = quantised.get_video_features(batch["pixel_values_videos"])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, model.get_video_features(batch["pixel_values_videos"]), rtol=0.1, atol=0.1)


def test_generation_and_reading_with_dynamic_quantisation(make_model, batch):
    quantised = dynamic(make_model())
    told = quantised.generate(**batch, max_new_tokens=4, do_sample=False)
    with torch.no_grad():  # token by token, each time from the beginning
        ids = batch["input_ids"]
        for _ in range(told.shape[1] - ids.shape[1]):
            logits = quantised(input_ids=ids, pixel_values_videos=batch["pixel_values_videos"], use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert told.shape == ids.shape
    state = quantised.read(torch.tensor([[5, VIDEO]]), [[batch["pixel_values_videos"]]])
    assert isinstance(state, VideoState) and state.get_seq_length() == 1 + 3 * PER_FRAME


def test_training_it_is_refused(make_model, batch):
    quantised = dynamic(make_model()).train()
    for checkpointing in (False, True):
        if checkpointing:
            quantised.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="quantised dynamically.*train it first"):
            quantised(**batch, labels=batch["input_ids"])
    with torch.no_grad():
        assert torch.isfinite(quantised(**batch, labels=batch["input_ids"]).loss)


@pytest.mark.parametrize("as_parameters", [False, True])
def test_layers_of_other_libraries(make_model, batch, as_parameters):
    ours, plain = replaced(make_model(), as_parameters)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
        found = [model(**batch, labels=batch["input_ids"]).loss for model in (ours, plain)]
        torch.testing.assert_close(*found)
        told = [model.generate(**batch, max_new_tokens=4, do_sample=False) for model in (ours, plain)]
        assert torch.equal(*told)


@pytest.mark.parametrize("as_parameters", [False, True])
def test_adapters_on_frozen_numbers_train(make_model, batch, as_parameters):
    ours, plain = replaced(make_model(), as_parameters)
    losses = []
    for model in (ours, plain):
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        losses.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_a_state_knows_the_quantised_weights(make_model):
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.model.language_model.layers[0].mixer.in_proj.weight.mul_(-1)
    digests = [weights_digest(m) for m in (model, other)]
    for kind in (dynamic, lambda m: replaced(m, False)[0], lambda m: replaced(m, True)[0]):
        digests += [weights_digest(kind(m)) for m in (model, other)]
        assert weights_digest(kind(model)) == digests[-2]
    assert len(set(digests)) == 8
