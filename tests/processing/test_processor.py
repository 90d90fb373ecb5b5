"""Text and videos together: placeholders match frames exactly, or it is an error."""

import io
from base64 import b64encode

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from video_ma2mba.processing.byte_tokenizer import add_video_tokens, build_byte_tokenizer
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor

VIDEO, PAD, USER, ASSISTANT = 2, 1, 4, 5


def clip(frames: int, value: int = 0) -> np.ndarray:
    return np.full((frames, 8, 8, 3), value, np.uint8)


def ask(question, *media, answer=None):
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def video(source):
    return {"type": "video", "video": source}


def image(source):
    return {"type": "image", "image": source}


def test_chat_schema_of_the_paper(processor):
    messages = [*ask("Who?", video(clip(2)), answer="A cat."), *ask("Why?", answer="It is hungry.")]
    assert processor.apply_chat_template(messages) == (
        "<|system|>You are a helpful assistant.<|endoftext|>"
        "<|user|><video>\nWho?<|endoftext|><|assistant|>A cat.<|endoftext|>"
        "<|user|>Why?<|endoftext|><|assistant|>It is hungry.<|endoftext|>"
    )
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt.endswith("<|user|><video>\nWho?<|endoftext|><|assistant|>")
    own = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    assert processor.apply_chat_template(own).startswith("<|system|>Be brief.<|endoftext|><|user|>")
    late = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, video(clip(1)), image(clip(1)[0])]}]
    assert "<|user|><video><image>\nWho?<|endoftext|>" in processor.apply_chat_template(late)
    half = [*messages[:1], {"role": "assistant", "content": "A c"}]
    assert processor.apply_chat_template(half, continue_final_message=True).endswith("<|assistant|>A c")


def test_system_prompt_and_separator_are_settings(video_processor):
    processor = VideoMa2mbaProcessor(
        build_byte_tokenizer(), video_processor, tokens_per_frame=4, system_prompt="", frame_separator=" "
    )
    assert processor.apply_chat_template(ask("Who?", video(clip(1)))) == "<|user|><video> Who?<|endoftext|>"
    assert processor.apply_chat_template(ask("Who?"), system_prompt="Hm.").startswith("<|system|>Hm.")


def test_placeholders_match_frames(processor):
    batch = processor("a<video>b<video>", videos=[clip(3, 10), clip(1, 20)], return_tensors="pt")
    assert batch["input_ids"].tolist() == [[6 + ord("a"), *[VIDEO] * 12, 6 + ord("b"), *[VIDEO] * 4]]
    assert batch["num_frames"].tolist() == [3, 1]
    assert batch["pixel_values_videos"][:, 0, 0, 0].tolist() == [10, 10, 10, 20]


def test_batches_are_padded_on_the_left(processor):
    texts = ["<video>long question", "<video>q", "no video"]
    batch = processor(texts, videos=[clip(1), clip(3)], return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4 + 13)
    alone = [processor(texts[0], videos=clip(1)), processor(texts[1], videos=clip(3)), processor(texts[2])]
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        length = len(single["input_ids"][0])
        assert row[-length:].tolist() == single["input_ids"][0]
        assert mask.tolist() == [0] * (17 - length) + [1] * length
        assert (row[:-length] == PAD).all()
    right = processor(texts, videos=[clip(1), clip(3)], return_tensors="pt", padding=True, padding_side="right")
    assert right["input_ids"][2].tolist() == [*alone[2]["input_ids"][0], *[PAD] * 9]
    assert "pixel_values_videos" not in alone[2]


def test_padding_and_truncation_settings(processor):
    assert processor(["abc", "d"], padding="max_length", max_length=5, return_tensors="pt")["input_ids"].shape == (
        2,
        5,
    )
    assert processor(["abc"], padding=True, pad_to_multiple_of=8, return_tensors="np")["input_ids"].shape == (1, 8)
    cut = processor("<video>abcdef", videos=clip(1), truncation=True, max_length=6)
    assert cut["input_ids"] == [[*[VIDEO] * 4, 6 + ord("a"), 6 + ord("b")]]
    for options, reason in [
        ({"text": "<video>", "videos": clip(2), "truncation": True, "max_length": 7}, "would cut a video off"),
        ({"text": ["a", "bc"], "padding": False, "return_tensors": "pt"}, "padding=True"),
        ({"text": "a", "truncation": True}, "max_length"),
        ({"text": "a", "padding": "max_length"}, "max_length"),
        ({"text": "a", "padding": "most"}, "padding must be"),
        ({"text": "a", "padding_side": "top"}, "padding_side"),
        ({"text": "a", "return_tensors": "jax"}, "return_tensors"),
    ]:
        with pytest.raises(ValueError, match=reason):
            processor(**options)


def test_mismatches_are_errors(processor):
    for text, media, reason in [
        ("<video><video>", {"videos": [clip(1)]}, "2 <video> placeholders for 1 videos"),
        ("none", {"videos": [clip(1)]}, "0 <video> placeholders for 1 videos"),
        ("<video>", {}, "1 <video> placeholders for 0 videos"),
        ("<image>", {}, "1 <image> placeholders for 0 images"),
        ("<video>", {"videos": clip(1), "images": clip(1)[0]}, "0 <image> placeholders for 1 images"),
        (["<video>", "<video>"], {"videos": [[clip(1), clip(1)], []]}, "1 <video> placeholders for 2 videos"),
        (["<video>", "<video>"], {"videos": [[clip(1)], [clip(1)], [clip(1)]]}, "3 prompts, but there are 2"),
    ]:
        with pytest.raises(ValueError, match=reason):
            processor(text, **media)
    with pytest.raises(TypeError, match="unknown settings: nun_frames"):
        processor("<video>", videos=clip(1), nun_frames=3)
    with pytest.raises(ValueError, match="images need a text"):
        processor(images=clip(1)[0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(["video", "image", "text"]), max_size=4), min_size=1, max_size=3), st.data())
def test_every_medium_lands_at_its_own_place(processor, layout, data):
    """Any mixture over a batch: each placeholder run is as long as its own medium, in the order of the pixels."""
    texts, videos, images, expected = [], [], [], []
    for prompt in layout:
        text = ""
        for kind in prompt:
            frames, value = (data.draw(st.integers(1, 3)), len(expected) + 1)
            if kind == "video":
                videos.append(clip(frames, value))
                expected.append((frames, value))
            elif kind == "image":
                images.append(clip(1, value)[0])
                expected.append((1, value))
            text += {"video": "<video>", "image": "<image>", "text": "x"}[kind] + "|"
        texts.append(text)
    batch = processor(texts, videos=videos or None, images=images or None)
    runs = []
    for ids in batch["input_ids"]:
        text = "".join("v" if token == VIDEO else "." for token in ids)
        runs += [len(run) for run in text.split(".") if run]
    assert runs == [4 * frames for frames, _ in expected]
    if expected:
        assert batch["num_frames"].tolist() == [frames for frames, _ in expected]
        pixels = batch["pixel_values_videos"][:, 0, 0, 0].tolist()
        assert pixels == [value for frames, value in expected for _ in range(frames)]


def test_images_are_videos_of_one_frame(processor, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(buffer.getvalue())
    data = b64encode(buffer.getvalue()).decode()
    expected = processor("<image>", images=picture)["pixel_values_videos"]
    parts = [
        image(picture),
        image(np.asarray(picture)),
        {"type": "image", "path": str(path)},
        {"type": "image", "url": f"data:image/png;base64,{data}"},
        {"type": "image", "base64": data},
    ]
    for part in parts:
        batch = processor.apply_chat_template(ask("What?", part), tokenize=True, return_dict=True, fps=7)
        assert batch["num_frames"].tolist() == [1] and batch["input_ids"][0].count(VIDEO) == 4
        assert torch.equal(batch["pixel_values_videos"], expected)
    several = processor("<image><image>", images=[picture, picture])
    assert several["num_frames"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="base64"):
        processor.apply_chat_template(ask("What?", {"type": "image", "base64": "%%"}), tokenize=True)


def test_settings_of_videos_in_chats(processor, make_video):
    messages = ask("Who?", video(make_video("clip.mp4", frames=90, gop=12, b_frames=2)))

    def count(**options):
        batch = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        assert (
            (batch["input_ids"] == VIDEO).sum()
            == 4 * batch["num_frames"].sum()
            == 4 * len(batch["pixel_values_videos"])
        )
        return int(batch["num_frames"])

    assert count() == 3
    assert count(num_frames=2) == 2 and count(processor_kwargs={"num_frames": 2}) == 2
    assert count(fps=2) == 6 and count(processor_kwargs={"videos_kwargs": {"fps": 2.0}}) == 6
    assert count(fps=10, start=1, end=2) == 10 and count(fps=30, max_frames=9) == 9


def test_batches_of_chats(processor):
    chats = [ask("Who?", video(clip(2))), ask("Hello"), ask("And?", video(clip(1)), image(clip(1)[0]))]
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert batch["num_frames"].tolist() == [2, 1, 1]
    assert (batch["input_ids"] == VIDEO).sum(1).tolist() == [8, 0, 8]
    assert batch["input_ids"][:, -1].tolist() == [ASSISTANT] * 3
    assert len(processor.apply_chat_template(chats)) == 3
    assert processor.apply_chat_template(chats[1], tokenize=True) == [
        processor.tokenizer(processor.apply_chat_template(chats[1]))["input_ids"]
    ]


def answers_in(processor, ids, mask):
    """The texts of the runs of tokens that `mask` marks."""
    runs, run = [], []
    for token, marked in zip([*ids, 0], [*mask, 0], strict=True):
        if marked:
            run.append(token)
        elif run:
            runs.append(processor.decode(run))
            run = []
    return runs


def test_mask_of_what_the_assistant_wrote(processor):
    messages = [
        *ask("Who?", video(clip(3)), answer="A cat ☃."),
        *ask("And?", video(clip(1)), answer="<|assistant|> or so"),
    ]
    batch = processor.apply_chat_template(
        [messages, messages[:2]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    expected = ["A cat ☃.<|endoftext|>", "<|assistant|> or so<|endoftext|>"]
    found = [answers_in(processor, *rows) for rows in zip(batch["input_ids"], batch["assistant_masks"], strict=True)]
    assert found == [expected, expected[:1]]


def test_conversations_for_training(processor):
    messages = [*ask("Who?", video(clip(3, 9)), answer="A cat."), *ask("Why?", answer="Milk.")]
    sample = processor.tokenize_conversation(messages)
    assert sorted(sample) == ["input_ids", "labels", "num_frames", "pixel_values_videos"]
    assert sample["input_ids"].shape == sample["labels"].shape and sample["labels"].dtype == torch.int64
    learned = sample["labels"] != -100
    assert torch.equal(sample["labels"][learned], sample["input_ids"][learned])
    assert answers_in(processor, sample["input_ids"].tolist(), learned.tolist()) == [
        "A cat.<|endoftext|>",
        "Milk.<|endoftext|>",
    ]
    assert (sample["input_ids"] == VIDEO).sum() == 12 and sample["num_frames"].tolist() == [3]
    empty = [*ask("", {"type": "video"}, {"type": "image"}, answer="A cat.")]  # captions need no question
    filled = processor.tokenize_conversation(empty, videos=clip(3, 9), images=clip(1)[0])
    assert filled["num_frames"].tolist() == [3, 1]
    assert sorted(processor.tokenize_conversation(ask("Hi", answer="Ho"))) == ["input_ids", "labels"]
    with pytest.raises(ValueError, match="1 placeholders for 0 videos"):
        processor.tokenize_conversation(ask("", {"type": "video"}, answer="A cat."))
    with pytest.raises(ValueError, match="0 placeholders for 1 videos"):
        processor.tokenize_conversation(messages, videos=clip(1))
    with pytest.raises(ValueError, match="no answer of the assistant"):
        processor.tokenize_conversation(ask("Who?"))
    assert len(processor.tokenize_conversation(messages, num_frames=1)["pixel_values_videos"]) == 1


def test_streaming_prompt_equals_the_batch(processor, make_video):
    path = make_video("clip.mp4", frames=90, gop=12, b_frames=2)
    messages = [*ask("Who?", video(path), image(clip(1)[0]), answer="A cat."), *ask("Why?")]
    prefix, question, readers = processor.streaming_prompt(messages, fps=2)
    assert prefix.shape[0] == question.shape[0] == 1 and prefix.dtype == question.dtype == torch.int64
    assert prefix[0, -2:].tolist() == [VIDEO, VIDEO] and VIDEO not in question
    assert [reader.expected_frames for reader in readers] == [6, 1]
    whole = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, fps=2
    )
    expanded = [*prefix[0, :-2].tolist(), *[VIDEO] * 28, *question[0].tolist()]
    assert whole["input_ids"][0].tolist() == expanded
    pixels = np.concatenate([chunk.pixels for reader in readers for chunk in reader.chunks(4)])
    np.testing.assert_array_equal(whole["pixel_values_videos"].permute(0, 2, 3, 1).numpy(), pixels)
    prefix, question, readers = processor.streaming_prompt(ask("Hello"))
    assert prefix.shape == (1, 0) and readers == [] and question[0, -1] == ASSISTANT


def test_training_and_generation_see_the_same_tokens(neox_like, video_processor):
    """Role tags that are ordinary text must not merge with the text behind them, as `|>` and `(` would in a BPE."""
    add_video_tokens(neox_like)
    assert neox_like("<|assistant|>(A) red")["input_ids"] != (
        neox_like("<|assistant|>")["input_ids"] + neox_like("(A) red")["input_ids"]
    )
    processor = VideoMa2mbaProcessor(neox_like, video_processor, tokens_per_frame=4)
    question = ask("(what?", video(clip(2)))
    sample = processor.tokenize_conversation([*question, {"role": "assistant", "content": "(A) red"}])
    learned = (sample["labels"] != -100).tolist()
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)[0]
    assert sample["input_ids"].tolist() == prompt + neox_like("(A) red<|endoftext|>")["input_ids"]
    assert learned == [False] * len(prompt) + [True] * (len(learned) - len(prompt))
    rendered = processor.apply_chat_template(question, add_generation_prompt=True)
    assert processor(rendered, videos=clip(2))["input_ids"] == [prompt]


def test_bad_conversations_are_refused(processor):
    for messages, reason in [
        (ask(" ", video(clip(1))), "question is empty"),
        ([{"role": "user", "content": ""}], "question is empty"),
        ([], "conversation is empty"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "tool", "content": "x"}], "the role tool is not supported"),
        (ask("Who?", {"type": "audio", "audio": "a.wav"}), "must be of the type video, image or text"),
        (ask("Who?", {"type": "video"}), "has no source"),
    ]:
        with pytest.raises(ValueError, match=reason):
            processor.streaming_prompt(messages)
        if messages:
            with pytest.raises(ValueError, match=reason):
                processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    with pytest.raises(FileNotFoundError):
        processor.streaming_prompt(ask("Who?", video("missing.mp4")))


def test_construction_is_checked(video_processor):
    with pytest.raises(ValueError, match="the tokenizer has no token '<clip>'"):
        VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor, video_token="<clip>")
    with pytest.raises(ValueError, match="tokens_per_frame"):
        VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor, tokens_per_frame=0)
    with pytest.raises(TypeError, match="video_processor must be"):
        VideoMa2mbaProcessor(build_byte_tokenizer(), build_byte_tokenizer())


def test_saved_and_loaded(video_processor, tmp_path):
    processor = VideoMa2mbaProcessor(
        build_byte_tokenizer(),
        video_processor,
        chat_template="{{ system_prompt }}{% for m in messages %}{{ m['content'][0]['type'] }}{% endfor %}",
        tokens_per_frame=9,
        system_prompt="Sys",
        frame_separator=" | ",
    )
    processor.save_pretrained(tmp_path)
    loaded = VideoMa2mbaProcessor.from_pretrained(tmp_path)
    for name in ("chat_template", "tokens_per_frame", "video_token", "video_token_id", "system_prompt"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert loaded.frame_separator == " | "
    assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
    assert loaded.apply_chat_template(ask("x")) == "Systext"
    assert loaded.model_input_names == ["input_ids", "attention_mask", "pixel_values_videos", "num_frames"]
