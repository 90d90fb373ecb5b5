"""The Mamba-2 stack: transformers' numbers, and results that no cut, batch mate, padding or packing changes.

Invariances are tested in fp64, where anything but rounding shows.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from video_ma2mba.modeling_video_ma2mba import stack_language_model
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState

EXACT = 1e-10
WIDTH = 16
LENGTHS = [1, 2, 3, 4, 255, 256, 257, 600]
relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_model(layers: int = 2, dtype: torch.dtype = torch.float64, **overrides) -> Ma2mbaTextModel:
    """Random weights of which none is at its initial value; in eval mode."""
    fields = {"state_size": 6, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8} | overrides
    config = Ma2mbaTextConfig(vocab_size=31, hidden_size=WIDTH, num_hidden_layers=layers, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Ma2mbaTextModel(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def random_state(model: Ma2mbaTextModel, batch: int) -> VideoState:
    state = VideoState.zeros(model.config, batch, dtype=torch.float64)
    return VideoState.from_stacked(torch.randn_like(state.conv), torch.randn_like(state.ssm), seen_tokens=5)


def row_of(state: VideoState, row: int) -> VideoState:
    return VideoState.from_stacked(state.conv[:, row : row + 1], state.ssm[:, row : row + 1], state.seen_tokens)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = EXACT, name: str = "") -> None:
    assert found.shape == expected.shape, name
    scale = expected.abs().max().clamp(min=1e-3) if expected.numel() else 1.0
    difference = (found - expected).abs().max() / scale if expected.numel() else torch.zeros(())
    assert difference <= tolerance, f"{name}: relative difference {difference:.1e}"


# ------------------------------------------------------------------------------- transformers' numbers
def transformers_pair(**overrides) -> tuple[Mamba2ForCausalLM, Ma2mbaTextModel]:
    """transformers' model with random weights, and ours built from its configuration and state dictionary."""
    fields = {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "head_dim": 16, "num_heads": 8,
        "n_groups": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    config = Mamba2Config(**(fields | overrides))
    theirs = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    whole = VideoMa2mbaConfig(text_config=config.to_dict(), video_token_id=1)
    ours = Ma2mbaTextModel(whole.text_config).eval()
    weights = {
        name.removeprefix("backbone."): value
        for name, value in theirs.state_dict().items()
        if name.startswith("backbone.")
    }
    ours.load_state_dict(weights, strict=True)
    return theirs, ours


def state_from_transformers(cache, config: Ma2mbaTextConfig) -> VideoState:
    def stacked(name: str) -> Tensor:
        states = [getattr(layer, name) for layer in cache.layers]
        return torch.stack([s[0] if isinstance(s, dict) else s for s in states])  # a dictionary in newer versions

    return VideoState.from_stacked(
        stacked("conv_states")[..., 1 - config.conv_kernel :].clone(), stacked("recurrent_states").clone()
    )


grouped_norm = pytest.mark.skipif(
    "group_size" not in modeling_mamba2.MambaRMSNormGated.__init__.__code__.co_varnames,
    reason="this transformers version norms all groups together",
)
continues_right = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13.1"), reason="transformers itself continued wrongly"
)
GROUPS = [1, pytest.param(2, marks=grouped_norm)]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_logits_of_transformers(tokens, groups):
    theirs, ours = transformers_pair(n_groups=groups)
    ids = torch.randint(0, 97, (2, tokens))
    with torch.no_grad():
        expected = theirs(ids, use_cache=True)
        hidden = theirs.backbone(ids, use_cache=False).last_hidden_state
        found = ours(ids, use_cache=True)
    assert_close(found.last_hidden_state, hidden, 1e-4, "hidden states")
    assert_close(F.linear(found.last_hidden_state, theirs.lm_head.weight), expected.logits, 1e-4, "logits")
    state = state_from_transformers(expected.cache_params, ours.config)
    assert_close(found.past_key_values.ssm, state.ssm, 1e-4, "SSM states")
    if tokens >= 3:  # shorter caches of transformers are padded in ways of their own
        assert_close(found.past_key_values.conv, state.conv, 1e-4, "convolution states")


@continues_right
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_logits_of_transformers_from_a_state(tokens, groups):
    theirs, ours = transformers_pair(n_groups=groups)
    past, ids = torch.randint(0, 97, (2, 37)), torch.randint(0, 97, (2, tokens))
    with torch.no_grad():
        cache = theirs(past, use_cache=True).cache_params
        state = state_from_transformers(cache, ours.config)
        own_state = ours(past, use_cache=True).past_key_values
        expected = theirs(ids, cache_params=cache, use_cache=True).logits
        for start in (state, own_state):
            found = ours(ids, past_key_values=start, use_cache=True).last_hidden_state
            assert_close(F.linear(found, theirs.lm_head.weight), expected, 1e-4, "logits")
    assert_close(own_state.ssm, state_from_transformers(cache, ours.config).ssm, 1e-4, "SSM states")


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_bias": True}, {"use_conv_bias": False}, {"residual_in_fp32": False}, {"chunk_size": 7},
        {"time_step_limit": (0.02, 0.05)}, {"layer_norm_epsilon": 0.1}, {"conv_kernel": 3},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_transformers(overrides):
    theirs, ours = transformers_pair(**overrides)
    plain_theirs, _ = transformers_pair()
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        found = F.linear(ours(ids, use_cache=False).last_hidden_state, theirs.lm_head.weight)
    assert_close(found, expected, 1e-4, "logits")
    for field, value in overrides.items():
        expected_value = list(value) if isinstance(value, tuple) else value
        assert getattr(ours.config, field) == expected_value
        assert getattr(plain_theirs.config, field) != value


def test_time_step_limit_holds_for_every_way_to_read():
    """Single tokens and chunks clamp alike; without the clamp the numbers differ."""
    model, free = make_model(time_step_limit=(0.3, 0.5)), make_model()
    x = random_tokens(1, 11)
    with torch.no_grad():
        whole = model(inputs_embeds=x).last_hidden_state
        state, pieces = None, []
        for part in x.split(1, dim=1):
            out = model(inputs_embeds=part, past_key_values=state)
            state = out.past_key_values
            pieces.append(out.last_hidden_state)
        assert_close(torch.cat(pieces, 1), whole)
        assert (free(inputs_embeds=x).last_hidden_state - whole).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- cutting invariance
def gradients_of(model, leaves: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss over all outputs, with respect to the leaves and every parameter that took part."""
    loss = 0.0
    for value in outputs.values():
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
        loss = loss + (value * weights).sum() + (value**2).sum()
    wanted = leaves | {n: p for n, p in model.named_parameters() if n != "embeddings.weight"}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def read(model, x: Tensor, start: VideoState | None, cuts: list[int], **kwargs) -> dict[str, Tensor]:
    """Hidden states, final states and all gradients of reading x piece by piece."""
    x = x.clone().requires_grad_()
    leaves, state = {"input": x}, None
    if start is not None:
        conv, ssm = start.conv.clone().requires_grad_(), start.ssm.clone().requires_grad_()
        leaves |= {"start conv": conv, "start ssm": ssm}
        state = VideoState.from_stacked(conv, ssm)
    pieces = []
    offset = 0
    for part in x.split(cuts, dim=1):
        piece = {name: value[:, offset : offset + part.shape[1]] for name, value in kwargs.items()}
        hidden, state = model.scan(part, state, **piece)
        pieces.append(hidden)
        offset += part.shape[1]
    hidden = torch.cat(pieces, dim=1)
    if "attention_mask" in kwargs:
        hidden = hidden * kwargs["attention_mask"].unsqueeze(-1)
    outputs = {"hidden": hidden, "conv": state.conv, "ssm": state.ssm}
    return outputs | gradients_of(model, leaves, outputs)


def draw_cuts(data, tokens: int) -> list[int]:
    borders = data.draw(st.sets(st.integers(1, tokens - 1)) if tokens > 1 else st.just(set()), label="cuts")
    edges = [0, *sorted(borders), tokens]
    return [b - a for a, b in itertools.pairwise(edges)]


@relaxed
@given(data=st.data())
def test_any_cut_equals_one_pass(data):
    tokens = data.draw(st.integers(1, 30), label="tokens")
    batch = data.draw(st.integers(1, 2), label="batch")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    model = make_model(conv_kernel=data.draw(st.sampled_from([2, 3, 4]), label="conv_kernel"))
    start = random_state(model, batch) if data.draw(st.booleans(), label="from a state") else None
    extra = {}
    if batch > 1 and data.draw(st.booleans(), label="padded"):
        extra["attention_mask"] = (torch.rand(batch, tokens) > 0.4).long()
    x = random_tokens(batch, tokens)
    whole = read(model, x, start, [tokens], **extra)
    cut = read(model, x, start, draw_cuts(data, tokens), **extra)
    for name, expected in whole.items():
        assert_close(cut[name], expected, name=name)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 23])
@pytest.mark.parametrize("from_state", [False, True])
def test_single_tokens_equal_one_pass(tokens, from_state):
    model = make_model()
    start = random_state(model, 2) if from_state else None
    x = random_tokens(2, tokens)
    whole, single = read(model, x, start, [tokens]), read(model, x, start, [1] * tokens)
    for name, expected in whole.items():
        assert_close(single[name], expected, name=name)


@pytest.mark.parametrize("segment", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_prefill_segments_change_nothing(kind, segment):
    model = make_model()
    x = random_tokens(2, 21)
    extra = {
        "plain": {},
        "padded": {"attention_mask": (torch.rand(2, 21) > 0.4).long()},
        "packed": {"seq_idx": torch.tensor([[0] * 5 + [1] + [2] * 2 + [3] * 13, [0] * 20 + [1]])},
    }[kind]
    start = random_state(model, 2)
    whole = read(model, x, start, [21], **extra)
    model.prefill_segment_length = segment
    again = read(model, x, start, [21], **extra)
    for name, expected in whole.items():
        assert_close(again[name], expected, name=name)


@pytest.mark.parametrize(("batch", "expected"), [(1, [512, 512, 76]), (3, [170] * 6 + [80]), (20, [64] * 17 + [12])])
def test_segments_on_a_cpu_are_short_and_change_nothing(monkeypatch, batch, expected):
    model, x, lengths = make_model(layers=1), random_tokens(batch, 1100), []
    start = random_state(model, batch)
    model.layers[0].mixer.in_proj.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    short = read(model, x, start, [1100])
    monkeypatch.setattr(stack_language_model, "CPU_SEGMENT", 10**6)
    whole = read(model, x, start, [1100])
    assert lengths == [*expected, 1100]
    for name, value in whole.items():
        assert_close(short[name], value, name=name)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 256])
def test_chunk_size_changes_nothing(chunk_size):
    x = random_tokens(1, 50)
    with torch.no_grad():
        expected = make_model()(inputs_embeds=x)
        found = make_model(chunk_size=chunk_size)(inputs_embeds=x)
    assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert_close(found.past_key_values.ssm, expected.past_key_values.ssm)


# ----------------------------------------------------------------------------------- batch and padding
def test_batch_mates_do_not_matter():
    model = make_model()
    x, start = random_tokens(3, 19), random_state(model, 3)
    together = read(model, x, start, [19])
    for row in range(3):
        alone = read(model, x[row : row + 1], row_of(start, row), [19])
        assert_close(together["hidden"][row : row + 1], alone["hidden"])
        assert_close(together["ssm"][:, row : row + 1], alone["ssm"])
        assert_close(together["conv"][:, row : row + 1], alone["conv"])


def masks(tokens: int) -> dict[str, Tensor]:
    places = torch.arange(tokens)
    return {
        "left": torch.stack([places >= 0, places >= 5, places >= tokens - 1]),
        "right": torch.stack([places < tokens, places < 7, places < 2]),
        "both": torch.stack([(places > 2) & (places < 11), places >= 4, places < 9]),
        "holes": torch.stack([places % 2 == 0, places % 3 != 1, (places < 3) | (places > 9)]),
        "nothing real": torch.stack([places >= 0, places < 0, places < 4]),
    }


@pytest.mark.parametrize("from_state", [False, True])
@pytest.mark.parametrize("kind", list(masks(16)))
@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
def test_padding_is_never_read(kind, filler, from_state):
    """Each row equals itself without padding, whatever the padding holds; a state that exists is left alone."""
    model = make_model()
    mask = masks(16)[kind]
    x = random_tokens(3, 16).masked_fill(~mask.unsqueeze(-1), filler)
    start = random_state(model, 3) if from_state else None
    given_mask = mask.long()
    if from_state:  # as in generate(): the mask also covers what was read before
        given_mask = torch.cat([torch.ones(3, 5, dtype=torch.long), given_mask], dim=1)
    with torch.no_grad():
        hidden, after = model.scan(x, start, given_mask)
        conv, ssm = after.stacked()
        for row in range(3):
            real = mask[row]
            own_start = None if start is None else row_of(start, row)
            if not real.any():
                expected = VideoState.zeros(model.config, 1, dtype=torch.float64) if start is None else own_start
                assert torch.equal(conv[:, row : row + 1], expected.conv)
                assert torch.equal(ssm[:, row : row + 1], expected.ssm)
                continue
            own_hidden, own_after = model.scan(x[row : row + 1, real], own_start)
            own_conv, own_ssm = own_after.stacked()
            assert_close(hidden[row : row + 1, real], own_hidden, name="hidden")
            assert_close(conv[:, row : row + 1], own_conv, name="conv")
            assert_close(ssm[:, row : row + 1], own_ssm, name="ssm")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_of_nan_gets_no_gradient(checkpointing):
    model = make_model().train()
    model.set_checkpointing(checkpointing, **({"segment_length": 5} if checkpointing else {}))
    mask = masks(16)["holes"]
    x = random_tokens(3, 16).masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    hidden, _ = model.scan(x, None, mask.long())
    (hidden[mask] ** 2).sum().backward()
    assert (x.grad[~mask] == 0).all()
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if n != "embeddings.weight")
    rows = []
    for row in range(3):
        own = x[row : row + 1, mask[row]].detach().requires_grad_()
        (model.scan(own)[0] ** 2).sum().backward()
        rows.append(own.grad[0])
    assert_close(x.grad[mask], torch.cat(rows))


def test_padding_between_two_turns():
    """Right padding of a first turn and left padding of a second one: both rows as if read alone."""
    model = make_model()
    first, second = random_tokens(2, 9), random_tokens(2, 6)
    first_mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    second_mask = torch.tensor([[0] * 4 + [1] * 2, [1] * 6])
    with torch.no_grad():
        state = model(inputs_embeds=first, attention_mask=first_mask).past_key_values
        out = model(
            inputs_embeds=second,
            attention_mask=torch.cat([first_mask, second_mask], dim=1),
            past_key_values=state,
        )
        assert out.past_key_values is state
        assert state.seen_tokens == 15
        for row in range(2):
            tokens = torch.cat([first[row, first_mask[row].bool()], second[row, second_mask[row].bool()]])[None]
            alone = model(inputs_embeds=tokens)
            real = int(second_mask[row].sum())
            assert_close(out.last_hidden_state[row, second_mask[row].bool()], alone.last_hidden_state[0, -real:])
            assert_close(state.ssm[:, row], alone.past_key_values.ssm[:, 0])
            assert_close(state.conv[:, row], alone.past_key_values.conv[:, 0])


# --------------------------------------------------------------------------------------------- packing
@relaxed
@given(data=st.data())
def test_packed_samples_equal_separate_runs(data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6), label="samples")
    padding = data.draw(st.integers(0, 4), label="padding")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    model = make_model()
    if data.draw(st.booleans(), label="segmented"):
        model.prefill_segment_length = data.draw(st.integers(1, 9), label="segment")
    tokens = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    filler = data.draw(st.sampled_from([-100, 0, len(lengths) - 1, len(lengths)]), label="number of the padding")
    ids = torch.cat([ids, ids.new_full((padding,), filler)])[None]
    mask = (torch.arange(tokens + padding) < tokens).long()[None]
    x = random_tokens(1, tokens + padding)
    start = random_state(model, 1) if data.draw(st.booleans(), label="from a state") else None
    packed = read(model, x, start, [tokens + padding], seq_idx=ids, attention_mask=mask)
    pieces, at = [], 0
    leaf = x.clone().requires_grad_()
    for number, length in enumerate(lengths):
        hidden, after = model.scan(leaf[:, at : at + length], start if number == 0 else None)
        pieces.append(hidden)
        at += length
    hidden = torch.cat([*pieces, torch.zeros(1, padding, WIDTH, dtype=torch.float64)], dim=1)
    separate = {"hidden": hidden, "conv": after.conv, "ssm": after.ssm}
    separate |= gradients_of(model, {"input": leaf}, separate)
    for name, expected in separate.items():
        assert_close(packed[name], expected, name=name)


# ------------------------------------------------------------------------------------ wanted positions
@pytest.mark.parametrize("segment", [3, 100])
@pytest.mark.parametrize("kind", ["plain", *masks(16)])
def test_output_positions_pick_rows_in_order(kind, segment):
    model = make_model()
    model.prefill_segment_length = segment
    x = random_tokens(3, 16)
    real = torch.ones(3, 16, dtype=torch.bool) if kind == "plain" else masks(16)[kind]
    wanted = (torch.rand(3, 16) > 0.5) & real
    with torch.no_grad():
        full = model(inputs_embeds=x, attention_mask=real.long())
        some = model(inputs_embeds=x, attention_mask=real.long(), output_positions=wanted)
        none = model(inputs_embeds=x, attention_mask=real.long(), output_positions=torch.zeros_like(wanted))
    assert_close(some.last_hidden_state, full.last_hidden_state[wanted])
    assert none.last_hidden_state.shape == (0, WIDTH)
    for out in (some, none):
        assert torch.equal(out.past_key_values.ssm, full.past_key_values.ssm)


# --------------------------------------------------------------------------- types, cache and mistakes
def test_ids_are_their_embeddings():
    model = make_model()
    ids = torch.randint(0, 31, (2, 7))
    with torch.no_grad():
        expected = model(inputs_embeds=model.embeddings(ids)).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)


def test_the_state_is_returned_outside_of_training_and_on_demand():
    model = make_model()
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).past_key_values.get_seq_length() == 3
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.seen_tokens == 3
    kept = model(ids, use_cache=True).past_key_values
    before = kept.fork()
    model(ids, past_key_values=kept)  # no cache wanted: the given state stays as it is
    assert torch.equal(kept.ssm, before.ssm) and kept.seen_tokens == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_of_outputs_and_states(dtype):
    model = make_model(dtype=dtype)
    with torch.no_grad():
        out = model(torch.tensor([[1, 2, 3, 4, 5]]))
    assert out.last_hidden_state.dtype == dtype
    assert out.past_key_values.conv.dtype == dtype
    assert out.past_key_values.ssm.dtype == torch.float32
    assert torch.isfinite(out.last_hidden_state).all()


def test_a_state_lies_in_memory_of_its_own():
    """No part of the sequence is kept alive by the state."""
    model = make_model()
    with torch.no_grad():
        state = model(inputs_embeds=random_tokens(1, 500)).past_key_values
    assert state.conv.untyped_storage().nbytes() == state.conv.nbytes
    assert state.ssm.untyped_storage().nbytes() == state.ssm.nbytes


def test_sixteen_bit_reading_stays_close_to_fp32():
    ids = torch.randint(0, 31, (1, 120))
    exact, model = make_model(dtype=torch.float32), make_model(dtype=torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.no_grad():
        expected, found = exact(ids).last_hidden_state, model(ids).last_hidden_state.float()
    assert (found - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, WIDTH)}, "either"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "the sequence is empty"),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 3)},
            r"attention_mask must have the shape \(batch, at least 4\), not \(2, 3\)",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 4)},
            "attention_mask must have the shape",
        ),
        (
            {"input_ids": torch.ones(3, 4, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            "attention_mask has 2 rows, the input 3",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "seq_idx": torch.tensor([[0, 1, 0]])},
            "seq_idx must not decrease",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "seq_idx": torch.tensor([[0, 1]])},
            r"seq_idx must have the shape \(batch, 3\)",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "seq_idx": torch.tensor([[0, 1, 1]])},
            "seq_idx has 1 rows, the input 2",
        ),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long), "seq_idx": torch.tensor([[0, 1, 1]]),
                "attention_mask": torch.tensor([[0, 1, 1]]),
            },
            "may only be padded on the right",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "output_positions": torch.ones(1, 2, dtype=torch.bool)},
            r"output_positions must be \(1, 3\)",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**arguments)


def test_states_that_do_not_fit_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="the state holds 2 rows, the input 1"):
        model(torch.tensor([[1]]), past_key_values=random_state(model, 2))
    with pytest.raises(ValueError, match="the state belongs to another model"):
        model(torch.tensor([[1]]), past_key_values=random_state(make_model(layers=3), 1))
