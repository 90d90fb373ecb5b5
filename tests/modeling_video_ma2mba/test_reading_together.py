"""Several videos in one batch: the state of each is what reading it alone gives."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from video_ma2mba import VideoQuestionAnsweringPipeline
from video_ma2mba.modeling_video_ma2mba.answering_questions import video_prefix


@pytest.fixture(scope="module")
def pipe(make_model, tiny_checkpoint):
    from transformers import AutoProcessor

    model = make_model(dtype=torch.float64)
    model.generation_config.max_new_tokens = 4
    return VideoQuestionAnsweringPipeline(
        model=model, processor=AutoProcessor.from_pretrained(tiny_checkpoint), device="cpu"
    )


def frames(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 11), min_size=1, max_size=6), size=st.integers(1, 9))
def test_states_are_those_of_reading_alone(pipe, lengths, size):
    prefix, model = video_prefix(pipe.processor), pipe.model
    videos = [frames(count, seed) for seed, count in enumerate(lengths)]
    together = model.read_together(prefix, [video.split(size) for video in videos])
    for video, state in zip(videos, together, strict=True):
        alone = model.read(prefix, [video.split(size)])
        torch.testing.assert_close(state.ssm, alone.ssm, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state.conv, alone.conv, rtol=1e-9, atol=1e-12)
        assert state.seen_tokens == alone.seen_tokens and state.metadata == alone.metadata


def test_a_video_that_fails_does_not_disturb_the_others(pipe):
    def breaks():
        yield frames(3, 1)
        raise OSError("the cable was pulled")

    prefix, good = video_prefix(pipe.processor), frames(9, 0)
    states = pipe.model.read_together(prefix, [good.split(4), breaks(), [], [good[:5]]])
    torch.testing.assert_close(states[0].ssm, pipe.model.read(prefix, [good.split(4)]).ssm)
    assert isinstance(states[1], OSError)
    assert isinstance(states[2], ValueError) and "no frames" in str(states[2])
    torch.testing.assert_close(states[3].ssm, pipe.model.read(prefix, [[good[:5]]]).ssm)


def test_memory_is_that_of_one_video(pipe):
    seen = []
    hook = pipe.model.model.vision_tower.embeddings.register_forward_hook(lambda _, i, __: seen.append(len(i[0])))
    pipe.model.read_together(video_prefix(pipe.processor), [frames(20, 0).split(8), frames(3, 1).split(8)])
    hook.remove()
    assert sum(seen) == 23
    assert max(seen) <= pipe.model.config.vision_chunk_frames == 4


def test_only_prompts_that_end_in_their_video(pipe):
    prefix = video_prefix(pipe.processor)
    with pytest.raises(ValueError, match="ends in a video"):
        pipe.model.read_together(torch.cat([prefix, prefix], dim=1), [[frames(1, 0)]])


def test_the_pipeline_reads_a_batch_together(pipe, tiny_video):
    videos = [frames(count, count).permute(0, 2, 3, 1) for count in (2, 9, 5)] + [str(tiny_video)]
    questions = ["What is shown?", ["Why?", "Who is it?"], "Where?", "When?"]
    alone = [pipe(v, q, return_scores=True) for v, q in zip(videos, questions, strict=True)]
    calls = []
    read = pipe.model.read_together
    pipe.model.read_together = lambda *arguments: calls.append(1) or read(*arguments)
    together = pipe(videos, questions, batch_size=4, return_scores=True)
    del pipe.model.read_together
    assert calls == [1]
    flat = [
        answer for item in together for group in item for answer in (group if isinstance(group, list) else [group])
    ]
    expected = [a for item in alone for group in item for a in (group if isinstance(group, list) else [group])]
    assert [a["answer"] for a in flat] == [a["answer"] for a in expected]
    assert [a["score"] for a in flat] == pytest.approx([a["score"] for a in expected], rel=1e-6)
    with pytest.raises(FileNotFoundError, match="absent"):
        pipe([videos[0], "absent.mp4"], "Why?", batch_size=2)


def test_many_questions_of_one_state(pipe):
    state = pipe.read(frames(5, 3).permute(0, 2, 3, 1))
    questions = ["What is shown?", "Why?", "How many squares are there in all?"]
    assert pipe.ask(state, questions) == [pipe.ask(state, question) for question in questions]
    chats = [[{"role": "user", "content": question}] for question in questions]
    assert pipe.ask(state, chats) == pipe.ask(state, questions)
    assert pipe.ask(state, []) == []
    with pytest.raises(ValueError, match="question is empty"):
        pipe.ask(state, ["What?", " "])
