"""PEFT adapters on the language model, with multi-axis checkpointing: exact gradients, honest dropout, clean merge."""

import pytest
import torch
from torch import Tensor, nn

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel

peft = pytest.importorskip("peft")

EXACT = 1e-10
PLANS = [(1, 4), (2, 5), (3, 100), (1, 1)]  # layers per block, segment length


def adapted(
    targets: tuple[str, ...] = ("in_proj", "out_proj"), dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A random model with adapters that are not zero any more, in training."""
    torch.manual_seed(0)
    config = Ma2mbaTextConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, state_size=6, head_dim=8, n_groups=2, chunk_size=8
    )
    lora = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=list(targets))
    model = peft.get_peft_model(Ma2mbaTextModel(config).to(dtype), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    if dtype == torch.float64:
        model.to(dtype)
    return model.train()


def checkpointed(model: nn.Module, plan: tuple[int, int] | None) -> nn.Module:
    settings = {} if plan is None else {"layers_per_block": plan[0], "segment_length": plan[1], "offload": False}
    model.base_model.model.set_checkpointing(plan is not None, **settings)
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, use_cache=False).last_hidden_state


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    hidden = run(model, x)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        assert error <= EXACT, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("targets", [("in_proj",), ("out_proj",), ("in_proj", "out_proj")], ids="+".join)
def test_adapters_alone_get_exact_gradients(targets, plan):
    model = adapted(targets)
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    expected = gradients(checkpointed(model, None), x)
    found = gradients(checkpointed(model, plan), x)
    assert_same(found, expected)
    assert len(found) == 3 * 2 * len(targets)  # layers x (A, B) x targets
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in found.items())


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_each_adapter_takes_part_in_the_output(target):
    model = adapted((target,)).eval()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        with_adapter = run(model, x)
        with model.disable_adapter():
            without = run(model, x)
    assert (with_adapter - without).abs().max() > 1e-2


@pytest.mark.parametrize("plan", [(1, 4), (2, 5), (3, 100)], ids=str)
def test_dropout_is_repeated_in_the_recomputation(plan):
    """The gradient is the slope of the loss along a direction of all adapters, with the same seed."""
    model = checkpointed(adapted(dropout=0.4), plan)
    x = torch.randn(1, 14, 16, dtype=torch.float64)
    found = gradients(model, x)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for _, p in trained]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for (_, parameter), direction in zip(trained, directions, strict=True):
                parameter.add_(direction, alpha=step)
        torch.manual_seed(3)
        hidden = run(model, x).detach()  # with gradients on, as in training: the same cells run
        with torch.no_grad():
            for (_, parameter), direction in zip(trained, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)).sum()

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    along = sum((found[name] * d).sum() for (name, _), d in zip(trained, directions, strict=True))
    assert torch.allclose(along, slope, rtol=1e-5)
    other_seed = gradients(model, x, seed=4)
    assert any((other_seed[name] - found[name]).abs().max() > 1e-3 for name in found)


def test_dropout_in_one_cell_is_that_of_plain_autograd():
    """One block, one segment: the same random numbers in the same order."""
    model = adapted(dropout=0.4)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    assert_same(gradients(checkpointed(model, (3, 100)), x), gradients(checkpointed(model, None), x))


def test_recomputation_leaves_the_random_state_as_it_found_it():
    """What the next step draws must not depend on the backward pass."""
    model = checkpointed(adapted(dropout=0.4), (1, 4))
    hidden = run(model, torch.randn(1, 14, 16, dtype=torch.float64))
    before = torch.get_rng_state()
    hidden.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_merged_weights_give_the_same_outputs_and_states():
    model = adapted().eval()
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(inputs_embeds=x, use_cache=True)
        merged = model.merge_and_unload()
        found = merged(inputs_embeds=x, use_cache=True)
    assert isinstance(merged, Ma2mbaTextModel)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, rtol=EXACT, atol=EXACT)
    assert torch.allclose(found.past_key_values.ssm, expected.past_key_values.ssm, rtol=EXACT, atol=EXACT)


def test_adapters_in_fp32_on_a_model_in_bf16():
    """What PEFT makes of a 16-bit model: fp32 adapters get fp32 gradients, as good as without checkpointing."""
    model, exact = adapted(dtype=torch.bfloat16), adapted(dtype=torch.float32)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(1, 40, 16).bfloat16()
    expected = gradients(checkpointed(exact, None), x.float())

    def error(plan):
        found = gradients(checkpointed(model, plan), x)
        assert found.keys() == expected.keys()
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        difference = sum((found[name] - value).pow(2).sum() for name, value in expected.items())
        return (difference / sum(value.pow(2).sum() for value in expected.values())).sqrt()

    plain = error(None)
    assert 0 < plain < 0.2
    assert error((1, 8)) <= 1.25 * plain


def test_adapters_survive_saving(tmp_path):
    model = adapted().eval()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    base = model.unload()
    base.to(torch.float64)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).to(torch.float64).eval()
    with torch.no_grad():
        assert torch.allclose(run(loaded, x), run(adapted().eval(), x), rtol=EXACT, atol=EXACT)


# ----------------------------------------------------------------------- the switches of a whole model
TARGETS = r".*language_model.*\.(in_proj|out_proj)"


@pytest.mark.parametrize("spelling", ["gradient_checkpointing", "activation_checkpointing"])
def test_the_usual_switch_reaches_the_engine_through_peft(make_model, spelling):
    model = make_model(dtype=torch.float64)
    if not hasattr(model, f"{spelling}_enable"):
        pytest.skip("not a name of this transformers version")
    lora = peft.LoraConfig(r=2, target_modules=TARGETS)
    wrapped = peft.get_peft_model(model, lora).to(torch.float64).train()
    assert not any("vision_tower" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.randint(0, 250, (2, 19))

    def step() -> dict[str, Tensor]:
        wrapped.zero_grad(set_to_none=True)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}

    expected = step()
    language_model = model.model.language_model
    assert language_model.engine.last_plan is None
    arguments = {"method": "multi_axis", "segment_length": 6, "layers_per_block": 1, "offload": False}
    getattr(wrapped, f"{spelling}_enable")(arguments)
    assert_same(step(), expected)
    plan = language_model.engine.last_plan
    assert (plan.layers_per_block, plan.segment_length, plan.offload) == (1, 6, False)
    getattr(wrapped, f"{spelling}_disable")()
    assert not language_model.recomputes
    assert_same(step(), expected)


def test_training_arguments_turn_it_on_and_reach_the_engine(make_model, tmp_path):
    """As a user writes it: TrainingArguments with checkpointing keywords, a PEFT model, one step of the Trainer."""
    from transformers import Trainer, TrainingArguments

    model = make_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS))
    ids = torch.randint(0, 250, (2, 19))
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"method": "multi_axis", "segment_length": 7, "layers_per_block": 2},
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=wrapped, args=arguments, train_dataset=rows).train()
    plan = model.model.language_model.engine.last_plan
    assert (plan.layers_per_block, plan.segment_length) == (2, 7)
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
