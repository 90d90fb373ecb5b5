"""The engine's gradients against plain autograd in fp64, at sizes that fit nothing evenly."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack_gradients import gradients, make_model, random_state

from video_ma2mba.modeling_video_ma2mba.recompute_graph import graphs_on_any_device
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputeSettings

TOLERANCE = 1e-10


def assert_same(model, x, plan: dict, **kwargs) -> None:
    model.set_checkpointing(False)
    loss, expected = gradients(model, x, **kwargs)
    model.set_checkpointing(True, offload=False, **plan)
    engine_loss, found = gradients(model, x, **kwargs)
    assert torch.allclose(loss, engine_loss, rtol=TOLERANCE)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        error = ((found[name] - value).abs().max() / scale).item()
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 29])
@pytest.mark.parametrize("plan", [(1, 1), (1, 2), (2, 5), (3, 8), (2, 13), (3, 100), (1, 100)])
def test_every_gradient_equals_autograd(tokens, plan):
    model = make_model()
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    assert_same(model, x, {"layers_per_block": plan[0], "segment_length": plan[1]})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_property_any_plan_any_batch(data):
    tokens = data.draw(st.integers(1, 40), label="tokens")
    batch = data.draw(st.integers(1, 3), label="batch")
    layers = data.draw(st.integers(1, 4), label="layers")
    plan = {
        "layers_per_block": data.draw(st.integers(1, layers), label="layers_per_block"),
        "segment_length": data.draw(st.integers(1, tokens + 2), label="segment_length"),
    }
    model = make_model(layers)
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    x = torch.randn(batch, tokens, 16, dtype=torch.float64)
    extra = {}
    kind = data.draw(st.sampled_from(["plain", "padded", "packed"]), label="kind")
    if kind == "padded":
        mask = torch.rand(batch, tokens) > 0.3
        mask[:, 0] = True
        extra["attention_mask"] = mask.long()
    elif kind == "packed":
        extra["seq_idx"] = (torch.rand(batch, tokens) > 0.7).long().cumsum(1)
    if data.draw(st.booleans(), label="keep"):
        keep = torch.rand(batch, tokens) > 0.5
        if kind == "padded":
            keep &= mask
        keep[0, 0] = True
        extra["keep"] = keep
    if data.draw(st.booleans(), label="from a state"):
        extra["state"] = random_state(model, batch)
    if data.draw(st.booleans(), label="to a state"):
        extra["final_state_weight"] = 0.7
    assert_same(model, x, plan, **extra)


def replayed_and_not(model, *steps: dict) -> list[tuple[dict, dict]]:
    """Gradients of steps whose cells are replayed as graphs are, and of the same steps without."""
    found = []
    for around in (graphs_on_any_device, contextlib.nullcontext):
        model.set_checkpointing(False)
        model.set_checkpointing(True, layers_per_block=2, segment_length=5, offload=False)
        with around():
            found.append([gradients(model, **step)[1] for step in steps])
            assert (model.engine.graphs is None) == (around is contextlib.nullcontext)
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("layers", [3, 4])
def test_replayed_cells_give_the_same_bits(layers):
    """Step after step, in any mixture: from states and to states, at wanted positions, none of them in some segments;
    a segment that is shorter, samples that end within one, and weights that no longer train."""
    model = make_model(layers)
    x, other = torch.randn(2, 2, 33, 16, dtype=torch.float64)
    keep = torch.rand(2, 33) > 0.8
    keep[:, 10:15] = False
    last = torch.zeros(2, 33, dtype=torch.bool)
    last[0, -1] = True
    packed = (torch.arange(33) > 6).long().expand(2, -1)
    state = random_state(model, 2)
    steps = [{"x": x}, {"x": other, "state": state, "final_state_weight": 0.7}, {"x": x, "keep": keep},
             {"x": x, "keep": last}, {"x": other, "seq_idx": packed}, {"x": x[:1]}]  # fmt: skip
    for replayed, plain in replayed_and_not(model, *steps):
        assert replayed.keys() == plain.keys()
        assert all(torch.equal(value, replayed[name]) for name, value in plain.items())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("in_proj" in name)
    [(replayed, plain)] = replayed_and_not(model, {"x": x})
    assert all(torch.equal(value, replayed[name]) for name, value in plain.items())
    calls = []
    model.layers[1].register_forward_hook(lambda *_: calls.append(1))  # a hook wants to be called every time
    with graphs_on_any_device():
        gradients(model, x)
    assert len(calls) == 14  # seven segments, and again


def test_replayed_cells_under_autocast():
    model = make_model(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        [(replayed, plain)] = replayed_and_not(model, {"x": torch.randn(1, 40, 16)})
    assert all(torch.equal(value, replayed[name]) for name, value in plain.items())


@pytest.mark.parametrize("method", ["per_layer", "sqrt"])
def test_classical_plans(method):
    assert_same(make_model(4), torch.randn(1, 21, 16, dtype=torch.float64), {"method": method})


def test_frozen_parameters_get_nothing_and_cost_nothing():
    model = make_model(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.2.mixer.in_proj"))
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    assert_same(model, x, {"layers_per_block": 1, "segment_length": 7})
    visited = []
    original = torch.autograd.grad
    try:
        torch.autograd.grad = lambda *args, **kwargs: visited.append(args) or original(*args, **kwargs)
        model.set_checkpointing(True, layers_per_block=1, segment_length=7, offload=False)
        model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    finally:
        torch.autograd.grad = original
    # Input without gradient: only layers 2 and 3 are visited, three segments each.
    assert len(visited) == 6


def test_gradients_are_handed_over_once():
    model = make_model()
    calls: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model.set_checkpointing(True, layers_per_block=2, segment_length=3, offload=False)
    model(input_ids=torch.arange(20)[None] % 31, use_cache=False).last_hidden_state.sum().backward()
    assert set(calls.values()) == {1}
    assert len(calls) == len(list(model.parameters()))


def test_gradient_accumulation_over_two_steps():
    model = make_model()
    x = torch.randn(2, 2, 11, 16, dtype=torch.float64)
    expected = [gradients(model, part)[1] for part in x]
    model.set_checkpointing(True, layers_per_block=2, segment_length=4, offload=False)
    model.zero_grad(set_to_none=True)
    for part in x:
        hidden = model(inputs_embeds=part, use_cache=False).last_hidden_state
        weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
        ((hidden * weights).sum() + (hidden**2).sum()).backward()
    for name, parameter in model.named_parameters():
        if name != "embeddings.weight":
            assert torch.allclose(parameter.grad, expected[0][name] + expected[1][name], rtol=1e-9, atol=1e-12)


def test_dropout_is_replayed():
    model = make_model()
    for layer in model.layers:
        layer.mixer.out_proj = torch.nn.Sequential(layer.mixer.out_proj, torch.nn.Dropout(0.4))
    model.set_checkpointing(True, layers_per_block=2, segment_length=5, offload=False)
    x = torch.randn(1, 14, 16, dtype=torch.float64, requires_grad=True)

    def loss(inputs):
        torch.manual_seed(5)
        return (model(inputs_embeds=inputs, use_cache=False).last_hidden_state ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn_like(x)
    step = 1e-6
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(), slope.detach(), rtol=1e-5)


def test_bf16_parameter_gradients_are_summed_in_fp32():
    """Many segments must not cost accuracy: the error of 64 cells stays close to that of one."""
    model = make_model(2, torch.float32)
    x = torch.randn(1, 256, 16)
    _, reference = gradients(model, x)
    model.to(torch.bfloat16)

    def error(segment):
        model.set_checkpointing(True, layers_per_block=1, segment_length=segment, offload=False)
        _, found = gradients(model, x.bfloat16())
        names = [n for n in reference if n != "input"]
        difference = sum((found[n].float() - reference[n]).pow(2).sum() for n in names)
        return (difference / sum(reference[n].pow(2).sum() for n in names)).sqrt().item()

    whole = error(256)
    assert error(4) <= 1.25 * whole, (error(4), whole)


def test_autocast_is_repeated_in_backward():
    model = make_model(2, torch.float32)
    x = torch.randn(1, 24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = gradients(model, x)
    model.set_checkpointing(True, layers_per_block=1, segment_length=8, offload=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model, x)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() <= 0.02 * value.norm() + 1e-4, name


def test_cache_is_refused_with_a_clear_message():
    model = make_model()
    model.set_checkpointing(True)
    with pytest.raises(ValueError, match="use_cache=True cannot be combined with gradient checkpointing"):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=True)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"segment_length": 0}, "segment_length=0"),
        ({"layers_per_block": -1}, "layers_per_block=-1"),
        ({"method": "magic"}, "method='magic'"),
        ({"memory_budget": "lots"}, "memory_budget='lots'"),
        ({"host_memory_budget": -3}, "host_memory_budget=-3"),
    ],
)
def test_wrong_settings_name_the_field(settings_, message):
    with pytest.raises(ValueError, match=message):
        RecomputeSettings(**settings_)


def test_second_backward_is_refused():
    model = make_model()
    model.set_checkpointing(True, layers_per_block=1, segment_length=4, offload=False)
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already computed"):
        loss.backward()


def test_anomaly_names_segment_and_layer():
    model = make_model()
    model.set_checkpointing(True, layers_per_block=2, segment_length=4, offload=False, detect_anomaly=True)
    with torch.no_grad():
        model.layers[1].mixer.D[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layer 1 produces .* tokens 0 to 3"):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), use_cache=False)
