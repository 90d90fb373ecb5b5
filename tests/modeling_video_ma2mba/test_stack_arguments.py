"""Keyword arguments of forward passes: hidden states are given, attention implementations reach the tower, names that
transformers changes are taken, and what cannot be honoured is refused in words."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from video_ma2mba import VideoState
from video_ma2mba.modeling_video_ma2mba.state_outputs import CACHE_NAME, take_state

VIDEO, PER_FRAME = 2, 4


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float64, text={"num_hidden_layers": 3})


def by_hand(language_model, embeddings) -> list[torch.Tensor]:
    """Layer after layer over the whole sequence."""
    stream, layers = embeddings, [embeddings]
    for block in language_model.layers:
        stream, delta, *_ = block(stream, None, None)
        stream = stream + delta
        layers.append(stream)
    layers[-1] = language_model.norm_f(stream, torch.zeros_like(stream), stream.dtype)[0]
    return layers


def test_hidden_states_are_those_of_a_loop_over_the_layers(model, raw_pixels):
    text = torch.randint(6, 262, (1, 30))
    ids = torch.cat([text[:, :2], torch.full((1, 2 * PER_FRAME), VIDEO), text[:, 2:]], dim=1)  # three segments
    with torch.no_grad():
        for inputs in ({"input_ids": text}, {"input_ids": ids, "pixel_values_videos": raw_pixels(2)}):
            pixels = inputs.get("pixel_values_videos")
            embeddings = (
                model.get_input_embeddings()(text) if pixels is None else model.model.embed_inputs(ids, pixels)
            )
            expected = by_hand(model.model.language_model, embeddings)
            for wholly in (model, model.model):
                found = wholly(**inputs, output_hidden_states=True)
                assert len(found.hidden_states) == 4
                for ours, theirs in zip(found.hidden_states, expected, strict=True):
                    torch.testing.assert_close(ours, theirs)
                assert wholly(**inputs).hidden_states is None
            torch.testing.assert_close(found.hidden_states[-1], found.last_hidden_state)
        model.config.output_hidden_states = True
        try:
            assert len(model(text, logits_to_keep=1).hidden_states) == 4, "the configuration asks, too"
        finally:
            model.config.output_hidden_states = False
        padded = torch.cat([torch.ones(1, 3, dtype=torch.long), text], dim=1)
        mask = (torch.arange(33) >= 3)[None].long()
        found = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
        expected = by_hand(model.model.language_model, model.get_input_embeddings()(text))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[:, 3:], theirs)


def test_hidden_states_of_generated_tokens(model, raw_pixels):
    ids = torch.cat([torch.tensor([[9, 10]]), torch.full((1, PER_FRAME), VIDEO), torch.tensor([[11, 12]])], dim=1)
    settings = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True}
    for copies in (1, 2):
        sampling = {"do_sample": True, "num_return_sequences": copies} if copies > 1 else {"do_sample": False}
        found = model.generate(ids, pixel_values_videos=raw_pixels(1), eos_token_id=None, **settings, **sampling)
        with torch.no_grad():
            whole = model(
                found.sequences[:, :-1],
                pixel_values_videos=torch.cat([raw_pixels(1)] * copies),
                output_hidden_states=True,
            ).hidden_states
        assert len(found.hidden_states) == 3 and [len(step) for step in found.hidden_states] == [4, 4, 4]
        for layer in range(4):
            joined = torch.cat([step[layer] for step in found.hidden_states], dim=1)
            torch.testing.assert_close(joined, whole[layer])


def test_checkpointing_and_hidden_states_do_not_go_together(make_model):
    model = make_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="output_hidden_states keeps what gradient checkpointing drops"):
        model(torch.tensor([[7, 8, 9]]), output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("whole", [True, False], ids=["with head", "base"])
def test_what_cannot_be_honoured_is_refused(model, whole):
    called, ids = model if whole else model.model, torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match="no attention"):
        called(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"does not know the arguments \['attention_maks'\]"):
        called(ids, attention_maks=torch.ones(1, 3))
    harmless = {"output_attentions": False, "output_router_logits": False, "cache_position": torch.arange(3)}
    with torch.no_grad():
        given = called(ids, **harmless, token_type_ids=ids * 0, position_ids=torch.arange(3)[None], unheard_of=None)
        torch.testing.assert_close(given[0], called(ids)[0])
        assert isinstance(called(ids, return_dict=False), tuple)
    with pytest.raises(ValueError, match="DynamicCache cannot be this model's memory"):
        called(ids, past_key_values=DynamicCache())


def test_positions_that_begin_again_are_samples(model):
    """Trainers that pack without padding give no mask, but position numbers that begin again."""
    ids = torch.randint(6, 262, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        alone = [model(ids[:, :5]).logits, model(ids[:, 5:]).logits]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_a_state_by_every_name(model):
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = model(ids).logits[:, 2:]
        for called in (model, model.model, model.model.language_model):
            state = called(input_ids=ids[:, :2]).past_key_values
            for name in ("past_key_values", "cache", "cache_params", CACHE_NAME):
                found = called(input_ids=ids[:, 2:], **{name: state.fork()})
                assert found.cache is found.past_key_values and found[CACHE_NAME] is found.cache
                assert found.cache.seen_tokens == 4
                if called is model:
                    torch.testing.assert_close(found.logits, expected)
        first = model.generate(ids, cache=None, max_new_tokens=2, return_dict_in_generate=True)
        assert type(first[CACHE_NAME]) is VideoState
    with pytest.raises(ValueError, match="given twice, as"):
        take_state({"cache": state, "past_key_values": state.fork()})


def test_what_generate_cannot_do_is_one_sentence(model):
    ids = torch.tensor([[7, 8, 9]])
    for settings in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not possible with this model"):
            model.generate(ids, max_new_tokens=2, **settings)
    with pytest.raises(NotImplementedError, match="generate_batch.. pages the memory of attention"):
        model.generate_batch([[7, 8, 9]])
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="DynamicCache cannot be this model's memory, which is a VideoState"):
            model.generate(ids, max_new_tokens=2, **{name: DynamicCache()})


@pytest.mark.parametrize("asked", ["sdpa", "eager", {"vision_config": "eager"}, None])
def test_attention_implementations_concern_the_tower(model, tiny_checkpoint, raw_pixels, asked):
    name = asked if asked is None or isinstance(asked, str) else asked["vision_config"]
    loaded = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation=asked)
    expected = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    assert loaded.model.vision_tower.config._attn_implementation == (name or "sdpa")
    with torch.no_grad():
        features = loaded.get_video_features(raw_pixels(2))
        torch.testing.assert_close(features, expected.get_video_features(raw_pixels(2)), rtol=1e-4, atol=1e-5)
    for other in ("eager", "sdpa"):
        loaded.set_attn_implementation(other)
        assert loaded.model.vision_tower.config._attn_implementation == other
    # what trainers do for a reference model
    again = AutoModelForImageTextToText.from_config(
        loaded.config, attn_implementation=loaded.config._attn_implementation
    )
    assert type(again) is type(loaded)
