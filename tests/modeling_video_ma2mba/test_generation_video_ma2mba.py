"""generate(): equal to recomputing from scratch in every mode, from pixels and from a state."""

import pytest
import torch

from video_ma2mba import VideoState

VIDEO, PER_FRAME, NEW = 2, 4, 6


@pytest.fixture
def model(make_model):
    made = make_model(dtype=torch.float64)
    # an untrained model would soon end or produce a placeholder
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = [VIDEO]
    return made


def prompt(frames: int, seed: int = 0) -> torch.Tensor:
    text = torch.randint(6, 262, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([[*text[:2], *[VIDEO] * (frames * PER_FRAME), *text[2:]]])


def greedy_from_scratch(model, ids, **inputs) -> list[int]:
    """The slow way: the whole sequence again for every token."""
    start = ids.shape[1]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs, use_cache=False).logits[:, -1]
        logits[:, VIDEO] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, start:].tolist()


def new_tokens(model, ids, **kwargs) -> list[list[int]]:
    found = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **kwargs)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 7}, {"use_cache": False}], ids=["cached", "chunked prefill", "uncached"]
)
def test_greedy_equals_recomputing_from_scratch(model, raw_pixels, settings):
    ids, pixels = prompt(5), raw_pixels(5)
    expected = greedy_from_scratch(model, ids, pixel_values_videos=pixels)
    assert new_tokens(model, ids, pixel_values_videos=pixels, **settings) == [expected]
    assert len(set(expected)) > 1
    text = prompt(0)
    assert new_tokens(model, text, **settings) == [greedy_from_scratch(model, text)]


def test_left_padded_batch_of_different_videos(model, raw_pixels):
    prompts, videos = [prompt(3, 1), prompt(0, 2), prompt(1, 3)], [raw_pixels(3, 1), None, raw_pixels(1, 3)]
    longest = max(p.shape[1] for p in prompts)
    ids, mask = torch.ones(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, longest - p.shape[1] :], mask[row, longest - p.shape[1] :] = p[0], 1
    pixels = torch.cat([v for v in videos if v is not None])
    expected = [
        greedy_from_scratch(model, p, **({} if v is None else {"pixel_values_videos": v}))
        for p, v in zip(prompts, videos, strict=True)
    ]
    inputs = {"attention_mask": mask, "pixel_values_videos": pixels, "num_frames": torch.tensor([3, 1])}
    assert new_tokens(model, ids, **inputs) == expected
    # beams and several samples of each row keep rows and videos together
    torch.manual_seed(0)
    together = model.generate(ids, **inputs, num_beams=3, num_return_sequences=2, max_new_tokens=NEW)
    for row, (p, v) in enumerate(zip(prompts, videos, strict=True)):
        video = {} if v is None else {"pixel_values_videos": v}
        alone = model.generate(p, **video, num_beams=3, num_return_sequences=2, max_new_tokens=NEW)
        assert together[2 * row : 2 * row + 2, longest:].tolist() == alone[:, p.shape[1] :].tolist()


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_equal_beams_without_cache(model, raw_pixels, settings):
    ids, pixels = prompt(3), raw_pixels(3)
    with_state = model.generate(ids, pixel_values_videos=pixels, max_new_tokens=NEW, **settings)
    without = model.generate(ids, pixel_values_videos=pixels, max_new_tokens=NEW, use_cache=False, **settings)
    assert with_state.tolist() == without.tolist()


def test_samples_of_one_prompt_read_its_video_once(model, raw_pixels):
    seen = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    ids = prompt(3)
    torch.manual_seed(0)
    found = model.generate(
        ids, pixel_values_videos=raw_pixels(3), do_sample=True, num_return_sequences=4, max_new_tokens=NEW
    )
    assert found.shape == (4, ids.shape[1] + NEW)
    assert len({tuple(row) for row in found.tolist()}) > 1
    assert sum(seen) == 3


def test_sampling_with_a_seed_is_repeatable(model, raw_pixels):
    draws = []
    for settings in ({}, {"use_cache": False}):
        torch.manual_seed(5)
        found = model.generate(
            prompt(2), pixel_values_videos=raw_pixels(2), do_sample=True, max_new_tokens=NEW, **settings
        )
        draws.append(found.tolist())
    assert draws[0] == draws[1]


def test_streamer_sees_every_token(model, make_recorder, raw_pixels):
    recorder, ids = make_recorder(), prompt(2)
    found = new_tokens(model, ids, pixel_values_videos=raw_pixels(2), streamer=recorder)
    assert recorder.got == [*ids[0].tolist(), *found[0], "end"]


def test_continuing_from_a_state(model, raw_pixels):
    ids, pixels = prompt(4), raw_pixels(4)
    expected = greedy_from_scratch(model, ids, pixel_values_videos=pixels)
    cut = ids.shape[1] - 3
    with torch.no_grad():
        state = model(input_ids=ids[:, :cut], pixel_values_videos=pixels).past_key_values
    question = ids[:, cut:]
    full_mask = torch.ones_like(ids)
    for inputs in (
        {"input_ids": question, "attention_mask": full_mask},  # new tokens, mask of everything
        {"input_ids": question},  # too few to be everything
        {"input_ids": ids, "attention_mask": full_mask},  # transformers' way: everything again
    ):
        found = model.generate(**inputs, past_key_values=state.fork(), max_new_tokens=NEW)
        assert found[0, -NEW:].tolist() == expected, inputs.keys()
    assert state.seen_tokens == cut, "a fork was asked, the state itself must not move"

    beams = model.generate(question, past_key_values=state.fork(), num_beams=3, max_new_tokens=NEW)
    whole = model.generate(ids, pixel_values_videos=pixels, num_beams=3, max_new_tokens=NEW)
    assert beams[0, -NEW:].tolist() == whole[0, -NEW:].tolist()


def test_a_second_turn_with_another_video(model, raw_pixels):
    first, second = prompt(2, 1), prompt(3, 2)
    videos = [raw_pixels(2, 1), raw_pixels(3, 2)]
    with torch.no_grad():
        state = model(input_ids=first, pixel_values_videos=videos[0]).past_key_values
    both = torch.cat([first, second], dim=1)
    expected = greedy_from_scratch(model, both, pixel_values_videos=torch.cat(videos))
    found = model.generate(
        second,
        attention_mask=torch.ones_like(both),
        pixel_values_videos=videos[1],
        past_key_values=state,
        max_new_tokens=NEW,
    )
    assert found[0, -NEW:].tolist() == expected


def test_the_returned_state_continues_the_conversation(model):
    ids, more = prompt(0, 1), prompt(0, 2)
    first = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    everything = torch.cat([first.sequences, more], dim=1)
    expected = greedy_from_scratch(model, everything)
    mask = torch.ones_like(everything)
    found = model.generate(everything, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=NEW)
    assert found[0, -NEW:].tolist() == expected


def test_input_embeddings_instead_of_ids(model):
    ids = prompt(0)
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert found.tolist() == [greedy_from_scratch(model, ids)]


def test_a_generated_placeholder_is_an_ordinary_token(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.get_input_embeddings().weight[VIDEO] *= 1000  # the head is tied: now it is what the model likes best
    found = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    liked = [step[0].abs().argmax().item() for step in found.logits]
    assert liked == [VIDEO] * 4


def test_what_cannot_be_is_refused(model, make_config):
    ids = prompt(0)
    state = VideoState.zeros(model.config.text_config, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, past_key_values=state, use_cache=False, max_new_tokens=2)
    other = VideoState.zeros(make_config(text={"num_hidden_layers": 3}).text_config, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="another model"):
        model.generate(ids, past_key_values=other, max_new_tokens=2)
