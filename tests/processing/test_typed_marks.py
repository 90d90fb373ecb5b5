"""What somebody writes is text, even where it looks like a placeholder, an end of text or a role; and other spellings
of a message's parts mean what they mean elsewhere."""

import io
from base64 import b64encode

import numpy as np
import pytest
import torch
from PIL import Image

from video_ma2mba.processing.byte_tokenizer import add_video_tokens
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor

MARKS = ("<video>", "<image>", "<pad>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
CLIP = np.full((2, 8, 8, 3), 7, np.uint8)
PNG = io.BytesIO()
Image.fromarray(CLIP[0]).save(PNG, "png")
DATA = "data:image/png;base64," + b64encode(PNG.getvalue()).decode()


@pytest.fixture(params=["bytes", "neox"])
def any_processor(request, processor, neox_like, video_processor):
    if request.param == "bytes":
        return processor
    add_video_tokens(neox_like)
    return VideoMa2mbaProcessor(neox_like, video_processor, tokens_per_frame=4)


def chat(question, *media, answer=None):
    content = [*media, {"type": "text", "text": question}]
    answered = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": content}, *answered]


def encoded(processor, messages, **options):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"][0]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("place", ["question", "answer", "system", "default system", "string"])
def test_words_that_look_like_special_tokens(any_processor, mark, place):
    processor = any_processor
    special = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.added_tokens_decoder)
    words, plain = f"a {mark}{mark} b", "a  b"

    def messages(said):
        found = chat(said if place == "question" else "Q", {"type": "video", "video": CLIP})
        found.append({"role": "assistant", "content": said if place == "answer" else "A"})
        if place == "system":
            found.insert(0, {"role": "system", "content": said})
        if place == "string":
            found.append({"role": "user", "content": said})
        return found

    options = {"system_prompt": words} if place == "default system" else {}
    ids = encoded(processor, messages(words), **options)
    options = {"system_prompt": plain} if place == "default system" else {}
    expected = encoded(processor, messages(plain), **options)
    assert [i for i in ids if i in special] == [i for i in expected if i in special]
    assert processor.decode(ids).count(mark) == processor.decode(expected).count(mark) + 2
    shown = processor.apply_chat_template(messages(words), **({"system_prompt": words} if options else {}))
    assert shown.count(mark) == processor.apply_chat_template(messages(plain), **options).count(mark) + 2


@pytest.mark.parametrize("mark", MARKS)
def test_every_way_in_gives_the_same_tokens(any_processor, mark):
    processor = any_processor
    messages = chat(f"What is {mark} good for?", {"type": "video", "video": CLIP})
    whole = encoded(processor, messages, add_generation_prompt=True)
    prefix, question, readers = processor.streaming_prompt(messages)
    assert len(readers) == 1
    assert whole == [*prefix[0, :-1].tolist(), *[processor.video_token_id] * 8, *question[0].tolist()]
    answered = [*messages, {"role": "assistant", "content": f"{mark} is {mark}"}]
    sample = processor.tokenize_conversation(answered)
    learned = sample["labels"] != -100
    assert processor.decode(sample["input_ids"][learned]) == f"{mark} is {mark}<|endoftext|>"
    assert (sample["labels"][learned] == processor.tokenizer.eos_token_id).sum() == 1
    tokens, written = processor.conversation_tokens(answered)
    assert torch.tensor(tokens)[torch.tensor(written) == 1].tolist() == sample["input_ids"][learned].tolist()


def test_the_private_characters_may_be_typed_too(processor):
    words = "\U000f0000<video>\U000f0001"
    ids = encoded(processor, chat(words))
    assert words in processor.decode(ids) and processor.video_token_id not in ids


def test_a_tokenizer_without_split_special_tokens(processor, monkeypatch):
    tokenizer = type(processor.tokenizer)
    call = tokenizer.__call__

    def forgetful(self, text, split_special_tokens=False, **options):
        return call(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", forgetful)
    ids = encoded(processor, chat("a <video> b <pad>"))
    assert processor.video_token_id not in ids and processor.tokenizer.pad_token_id not in ids
    assert "a <video> b <pad>" in processor.decode(ids)


IMAGES = {
    "image": {"type": "image", "image": Image.fromarray(CLIP[0])},
    "data": {"type": "image", "url": DATA},
    "image_url": {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}},
    "image_url as a string": {"type": "image_url", "image_url": DATA},
    "input_image": {"type": "input_image", "image_url": DATA},
    "broken into lines": {"type": "image_url", "image_url": {"url": DATA[:60] + "\n" + DATA[60:]}},
    "percent": {"type": "image_url", "image_url": "data:image/png," + "".join(f"%{b:02x}" for b in PNG.getvalue())},
}


@pytest.mark.parametrize("part", IMAGES.values(), ids=IMAGES)
def test_spellings_of_an_image(processor, part):
    batch = processor.apply_chat_template(chat("Q", part), tokenize=True, return_dict=True)
    assert batch["num_frames"].tolist() == [1] and (batch["pixel_values_videos"] == 7).all()


def test_spellings_of_a_video(processor, make_video):
    path = make_video("clip.mp4", frames=60)
    data = "data:video/mp4;base64," + b64encode(path.read_bytes()).decode()
    found = [
        processor.apply_chat_template(chat("Q", part), tokenize=True, return_dict=True)["pixel_values_videos"]
        for part in (
            {"type": "video", "video": str(path)},
            {"type": "video_url", "video_url": {"url": str(path)}},
            {"type": "video_url", "video_url": path.as_uri()},
            {"type": "video_url", "video_url": {"url": data}},
            {"type": "video", "url": data},
            {"type": "input_video", "video_url": data},
        )
    ]
    assert len(found[0]) == 2 and all(torch.equal(pixels, found[0]) for pixels in found)


def test_spellings_of_text_and_nothing(processor):
    plain = processor.apply_chat_template(chat("What?", answer="That"))
    for kind, key in (("input_text", "text"), ("output_text", "text"), ("text", "text"), ("refusal", "refusal")):
        part = {"type": kind, key: "What?"}
        spelled = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "That"}]
        assert processor.apply_chat_template(spelled) == plain
    nothing = [*chat("Q"), {"role": "assistant", "content": None}, *chat("R")]
    empty = [*chat("Q"), {"role": "assistant", "content": ""}, *chat("R")]
    assert processor.apply_chat_template(nothing) == processor.apply_chat_template(empty)
    assert encoded(processor, nothing) == encoded(processor, empty)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "video, image or text"),
        ({"type": "text"}, "video, image or text"),
        ({"type": "text", "text": 3}, "video, image or text"),
        ({"type": "file", "file": {"file_id": "x"}}, "video, image or text"),
        ({"type": "image_url", "image_url": "data:image/png;base64,%%"}, "base64"),
        ({"type": "image_url", "image_url": "data:nothing"}, "holds no data"),
        ({"type": "video_url", "video_url": "data:video/mp4;base64,%%"}, "base64"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "."),
    ],
)
def test_parts_that_mean_nothing_here(processor, part, reason):
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template(chat("Q", part), tokenize=True)
