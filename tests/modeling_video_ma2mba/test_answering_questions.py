"""Videos and questions through the model's own methods: the same states and answers as the pipeline's."""

import copy

import pytest
import torch

from video_ma2mba import VideoQuestionAnsweringPipeline, VideoState
from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids

ASKED = "What is shown?"


@pytest.fixture(scope="module")
def both(make_model, make_processor):
    model = make_model()
    model.generation_config.max_new_tokens = 5
    return model, make_processor(model.config)


def test_the_pipeline_is_these_methods(both, tiny_video):
    model, processor = both
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu", fps=2, max_new_tokens=3)
    seen = []
    state = model.read_video(tiny_video, processor, fps=2, on_frames=lambda read, expected: seen.append(expected))
    other = pipe.read(tiny_video)
    assert torch.equal(state.ssm, other.ssm) and torch.equal(state.conv, other.conv)
    assert state.metadata == other.metadata and state.metadata["frames"] == "12" and set(seen) == {12}
    assert model.answer(state, ASKED, processor, max_new_tokens=3) == pipe.ask(state, ASKED)
    assert pipe.ask(state, ASKED, max_new_tokens=5) == model.answer(state, ASKED, processor)  # a call's settings win
    assert pipe.read(tiny_video, fps=1).metadata["frames"] == "6"


def test_fork_save_load_and_read_on(both, tiny_video, tmp_path):
    model, processor = both
    state = model.read_video(tiny_video, processor, end=4)
    answer = model.answer(state, ASKED, processor, return_scores=True)
    longer = model.read_video(tiny_video, processor, state=state.fork(), start=4)
    longer.save(tmp_path / "longer.state")
    assert longer.metadata["frames"] == "6" and state.metadata["frames"] == "4"
    again = VideoState.load(tmp_path / "longer.state")
    assert model.answer(again, ASKED, processor) == model.answer(longer, ASKED, processor)
    assert model.answer(state, ASKED, processor, return_scores=True) == answer


def test_as_past_key_values_of_generate(both, tiny_video):
    """The tokens behind the video alone, the state in place of all that was before them."""
    model, processor = both
    state = model.read_video(tiny_video, processor)
    messages = [{"role": "user", "content": [{"type": "video", "video": tiny_video}, {"type": "text", "text": ASKED}]}]
    _, ids, _ = processor.streaming_prompt(messages)
    made = model.generate(input_ids=ids, past_key_values=state.fork(), do_sample=False)
    answer = processor.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answer == model.answer(state, ASKED, processor)
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    whole = model.generate(**prompt, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    assert torch.equal(whole, made[:, ids.shape[1] :])


def test_bad_input(both, make_model, make_processor, tiny_video):
    model, processor = both
    state = model.read_video(tiny_video, processor)
    with pytest.raises(ValueError, match="unknown settings for reading a video: .'speed'."):
        model.read_video(tiny_video, processor, speed=2)
    with pytest.raises(ValueError, match="question is empty|empty question"):
        model.answer(state, " ", processor)
    with pytest.raises(ValueError, match="the state belongs to another model"):
        make_model(1).answer(state, ASKED, processor)
    other = copy.deepcopy(processor)
    other.system_prompt = "Be brief."
    with pytest.raises(ValueError, match="the state belongs to another processor"):
        model.answer(state, ASKED, other)


def test_a_copy_of_a_model_is_looked_at_again(both, tiny_video):
    """Digests are kept on the model; neither a copy's changes nor a change in place are missed."""
    model, processor = both
    state = model.read_video(tiny_video, processor)
    twin = copy.deepcopy(model)
    twin.check_state(state, processor)
    with torch.no_grad():
        twin.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="another model"):
        twin.check_state(state, processor)
    model.check_state(state, processor)


@pytest.mark.parametrize(
    "typed", ["What  is\u00a0shown? \n", "\u200b What is\tshown?", "\ufeffWhat is\u2003shown?\u3000"]
)
def test_spaces_of_any_kind_make_no_other_question(both, typed: str):
    processor, said = both[1], "What is shown?"
    usual = question_ids(processor, said)
    parts = [{"role": "user", "content": [{"type": "text", "text": typed}]}]
    for asked in (typed, [{"role": "user", "content": typed}], parts):
        assert question_ids(processor, asked).equal(usual)
    lines = [{"role": "user", "content": "Look:\n  (A)  one"}]
    assert not question_ids(processor, lines).equal(question_ids(processor, "Look: (A) one"))
