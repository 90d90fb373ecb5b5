"""The pipeline: every kind of input, several questions, batches, scores, streaming."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TextStreamer, pipeline
from transformers.utils.chat_template_utils import Chat

from video_ma2mba import VideoQuestionAnsweringPipeline

ASKED = "What is shown?"


@pytest.fixture
def pipe(make_model, make_processor):
    model = make_model(dtype=torch.float64)
    made = VideoQuestionAnsweringPipeline(model=model, processor=make_processor(model.config), device="cpu")
    letters = [6 + byte for byte in b"abcdefghijklmnopqrstuvwxyz"]
    made.model.generation_config.suppress_tokens = sorted(set(range(272)) - set(letters))
    with torch.no_grad():  # let an untrained model see its video
        made.model.model.multi_modal_projector.linear_2.weight *= 300
    made.model.generation_config.max_new_tokens = 5
    return made


def conversation(video, question=ASKED):
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]


def whole(pipe, messages, **settings) -> str:
    """The answer by the ordinary road: processor, whole prompt, generate()."""
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = pipe.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return pipe.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_streaming_gives_the_answer_of_the_whole_prompt(pipe, raw_video):
    video = raw_video(9)
    expected = whole(pipe, conversation(video))
    assert pipe(video, ASKED) == [{"answer": expected}]
    scored = pipe(video, ASKED, return_scores=True)
    assert pipe(raw_video(9, 1), ASKED, return_scores=True) != scored, "the video must matter"
    assert pipe(video, "Why?", return_scores=True) != scored, "the question must matter"


def test_every_kind_of_video(pipe, raw_video, tiny_video):
    def ask(*args, **kwargs):
        (answer,) = pipe(*args, return_scores=True, **kwargs)
        return answer["answer"], round(answer["score"], 9)

    frames = raw_video(7)
    pictures = [Image.fromarray(frame) for frame in frames]
    expected = ask(frames, ASKED)
    for video in (torch.from_numpy(frames), pictures, list(frames)):
        assert ask(video, ASKED) == expected
    assert ask({"video": frames, "question": ASKED}) == expected
    assert ask(video=frames, question=ASKED) == expected
    assert ask(conversation(frames)) == expected
    assert ask(Chat(conversation(frames))) == expected

    from_path = ask(str(tiny_video), ASKED)
    assert ask(tiny_video, ASKED) == from_path
    assert ask(tiny_video.read_bytes(), ASKED) == from_path
    assert from_path != expected


def test_an_image_and_no_video_at_all(pipe, raw_video):
    picture = Image.fromarray(raw_video(1)[0])
    as_image = pipe({"image": picture, "question": ASKED})
    assert as_image == pipe(raw_video(1), ASKED) == pipe(picture, ASKED)
    messages = [{"role": "user", "content": ASKED}]
    assert pipe(messages) == pipe({"question": ASKED}) == [{"answer": whole(pipe, messages)}]


def test_several_questions_read_the_video_once(pipe, raw_video):
    seen = []
    pipe.model.model.vision_tower.embeddings.register_forward_hook(lambda _, i, __: seen.append(len(i[0])))
    questions = [ASKED, "How many things are there in it?", "Why?"]
    together = pipe(raw_video(6), questions)
    assert sum(seen) == 6
    assert together == [pipe(raw_video(6), question) for question in questions]
    assert pipe(raw_video(6), [ASKED]) == [pipe(raw_video(6), ASKED)]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches(pipe, raw_video, batch_size):
    videos = [raw_video(n, n) for n in (3, 1, 6)]
    alone = [pipe(video, ASKED) for video in videos]
    assert pipe(videos, ASKED, batch_size=batch_size) == alone
    assert pipe([conversation(v) for v in videos], batch_size=batch_size) == alone
    inputs = [{"video": v, "question": ASKED} for v in videos]
    assert pipe(inputs, batch_size=batch_size) == alone
    stream = pipe((item for item in inputs), batch_size=batch_size)
    assert next(iter(stream)) == alone[0]
    assert list(stream) == alone[1:]
    each = [ASKED, ["Why?", "Who?"], "Where?"]
    assert pipe(videos, each, batch_size=batch_size) == [pipe(v, q) for v, q in zip(videos, each, strict=True)]
    assert pipe([]) == []


def test_generation_settings(pipe, raw_video):
    video = raw_video(3)
    messages = conversation(video)
    assert pipe(video, ASKED, num_beams=3, max_new_tokens=4) == [
        {"answer": whole(pipe, messages, num_beams=3, max_new_tokens=4)}
    ]
    assert pipe(video, ASKED, generate_kwargs={"max_new_tokens": 2})[0]["answer"] == whole(
        pipe, messages, max_new_tokens=2
    )
    several = pipe(video, ASKED, num_beams=3, num_return_sequences=3)
    assert len({answer["answer"] for answer in several}) == 3
    made_with = VideoQuestionAnsweringPipeline(
        model=pipe.model, processor=pipe.processor, device="cpu", max_new_tokens=2, fps=1
    )
    assert made_with(video, ASKED)[0]["answer"] == whole(pipe, messages, max_new_tokens=2)


def test_frames_are_chosen_as_asked(pipe, raw_video, tiny_video):
    counts = []
    record = {"on_frames": lambda read, expected: counts.append((read, expected))}
    pipe(tiny_video, ASKED, fps=2, **record)
    pipe(tiny_video, ASKED, num_frames=3, **record)
    pipe(tiny_video, ASKED, fps=4, start=1, end=3, **record)
    pipe(tiny_video, ASKED, fps=4, max_frames=5, **record)
    assert [c for c in counts if c[0] == c[1]] == [(12, 12), (3, 3), (8, 8), (5, 5)]
    assert all(read <= expected for read, expected in counts)
    assert len(counts) > 4, "progress is reported while reading, not only at the end"


def test_scores_are_mean_token_probabilities(pipe, raw_video):
    video = raw_video(2)
    inputs = pipe.processor.apply_chat_template(
        conversation(video), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = pipe.model.generate(**inputs)
    with torch.no_grad():
        logits = pipe.model(input_ids=ids, pixel_values_videos=inputs["pixel_values_videos"]).logits
    start = inputs["input_ids"].shape[1]
    probabilities = logits[0, start - 1 : -1].softmax(-1)
    expected = probabilities.gather(1, ids[0, start:, None]).mean().item()
    found = pipe(video, [ASKED, "Why?"], return_scores=True)
    assert found[0][0]["score"] == pytest.approx(expected, rel=1e-4)
    beams = pipe(video, ASKED, return_scores=True, num_beams=2, num_return_sequences=2)
    assert all(0 < answer["score"] < 1 for answer in beams)


def test_scores_stop_at_the_end_of_each_answer(pipe, raw_video):
    alone = pipe(raw_video(2), ASKED, return_scores=True)
    ids = pipe.tokenizer(alone[0]["answer"], add_special_tokens=False)["input_ids"]
    other = pipe(raw_video(3, 4), "Why?", return_scores=True)
    assert len(ids) > 2
    pipe.model.generation_config.eos_token_id = ids[1]  # the first answer now ends after its second token
    short = pipe(raw_video(2), ASKED, return_scores=True)
    both = pipe([raw_video(2), raw_video(3, 4)], [ASKED, "Why?"], batch_size=2, return_scores=True)
    assert both[0][0]["score"] == pytest.approx(short[0]["score"], rel=1e-6)
    assert both[1][0]["score"] == pytest.approx(other[0]["score"], rel=1e-6)
    assert short[0]["score"] != alone[0]["score"]


def test_read_and_ask(pipe, raw_video, tiny_video):
    video = raw_video(9)
    progress = []
    state = pipe.read(video, on_frames=lambda read, expected: progress.append((read, expected)))
    assert progress == [(4, 9), (8, 9), (9, 9)]
    assert state.metadata["frames"] == "9"
    kept = state.ssm.clone()
    for question in (ASKED, "Why?"):
        assert pipe.ask(state, question) == pipe(video, question)[0]["answer"]
    assert torch.equal(state.ssm, kept)

    turns = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    messages = [*conversation(video), *turns[1:]]
    assert pipe.ask(state, turns) == whole(pipe, messages)
    scored = pipe.ask(state, ASKED, return_scores=True)
    assert scored == pipe(video, ASKED, return_scores=True)[0]

    more = pipe.read(tiny_video, state=state, fps=1)
    assert more.metadata["frames"] == "15"
    assert more.seen_tokens == state.seen_tokens + 6 * pipe.model.config.tokens_per_frame
    assert more.nbytes == state.nbytes


def test_text_streamer(pipe, raw_video, capsys):
    answer = pipe(raw_video(2), ASKED)[0]["answer"]
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    pipe.ask(pipe.read(raw_video(2)), ASKED, streamer=streamer)
    assert capsys.readouterr().out.strip() == answer
    several = pipe(raw_video(2), [ASKED, ASKED], streamer=streamer)
    assert [a["answer"] for (a,) in several] == [answer, answer]
    assert capsys.readouterr().out.count(answer) == 2


def test_bad_input(pipe, raw_video, tmp_path):
    video = raw_video(2)
    for call, message in [
        (lambda: pipe(video, ""), "question is empty"),
        (lambda: pipe(video, [ASKED, "  "]), "question is empty"),
        (lambda: pipe(video, []), "list of questions is empty"),
        (lambda: pipe(video), "no question"),
        (lambda: pipe(), "nothing to answer"),
        (lambda: pipe(conversation(video), ASKED), "do not pass another"),
        (lambda: pipe({"clip": video, "question": ASKED}), "'clip'"),
        (lambda: pipe([video, video], ["a", "b", "c"]), "3 questions were given for 2 inputs"),
        (lambda: pipe(video, ASKED, fps=0), "fps"),
        (lambda: pipe(video, ASKED, max_tokens=3), "max_tokens"),
        (lambda: pipe.read(video, speed=3), "speed"),
        (lambda: pipe.ask(pipe.read(video), " "), "question is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4"):
        pipe("absent.mp4", ASKED)


def test_by_task_name_and_saved(pipe, raw_video, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = pipe(raw_video(3), ASKED)
    by_object = pipeline("video-question-answering", model=pipe.model, processor=pipe.processor, device="cpu")
    assert by_object(raw_video(3), ASKED) == expected
    loaded = pipeline(model=str(tmp_path), trust_remote_code=True, dtype=torch.float64, device="cpu")
    assert loaded.task == "video-question-answering"
    found = loaded(raw_video(3), ASKED)
    assert found == expected
    assert np.isfinite(loaded(raw_video(3), ASKED, return_scores=True)[0]["score"])


def test_an_open_file_is_a_video(pipe, tiny_video):
    expected = pipe(str(tiny_video), ASKED)
    with open(tiny_video, "rb") as file:
        assert pipe(file, ASKED) == expected
    with open(tiny_video, "rb") as file:
        assert pipe({"video": file, "question": ASKED}) == expected
    with pytest.raises(ValueError, match="opened as text"), open(__file__, encoding="utf-8") as file:
        pipe(file, ASKED)


def test_device_also_counts_among_several_processes(make_model, make_processor):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for device in ("meta", torch.device("meta")):  # another one than the CPU that every machine has
            model = make_model()
            processor = make_processor(model.config)
            made = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=device)
            assert made.device.type == made.model.device.type == "meta"
        model = make_model()
        for device in (None, -1, "cpu"):
            made = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=device)
            assert made.device.type == made.model.device.type == "cpu"
    finally:
        torch.distributed.destroy_process_group()
