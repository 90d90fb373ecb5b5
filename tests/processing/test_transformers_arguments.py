"""Arguments that processors of transformers' own video models take: each has its meaning here, or a sentence why not.

The list was made by calling those of transformers 5.23 and this one with the same arguments.
"""

import numpy as np
import pytest
import torch
from PIL import Image

FRAMES = np.stack([np.full((16, 16, 3), 10 * n, np.uint8) for n in range(4)])
PICTURES = [Image.fromarray(frame) for frame in FRAMES]
TENSOR = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
TEXT, WORDS = "<video>hi", 2

SHAPES_OF_VIDEOS = {
    "pictures": PICTURES,
    "one in a list": [PICTURES],
    "one of one prompt": [[PICTURES]],
    "array": FRAMES,
    "list of arrays": list(FRAMES),
    "array in a list": [FRAMES],
    "tensor": TENSOR,
    "list of tensors": list(TENSOR),
    "batch": TENSOR[None],
    "fractions": TENSOR.float() / 255,
    "channels last": torch.from_numpy(FRAMES),
}

# settings, number of frames that come of four, further keys
ACCEPTED = [
    ({"padding": True}, 4),
    ({"padding": "longest", "truncation": False}, 4),
    ({"do_sample_frames": True}, 4),
    ({"do_sample_frames": False}, 4),
    ({"num_frames": 2}, 2),
    ({"fps": 2}, 4),
    ({"video_metadata": [{"fps": 2, "total_num_frames": 4}]}, 2),
    ({"video_metadata": {"fps": 4}, "fps": 2}, 2),
    ({"video_metadata": [[{"fps": 2}]]}, 2),
    ({"video_metadata": [{"fps": 2}], "do_sample_frames": False}, 4),
    ({"video_metadata": None}, 4),
    ({"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}, 4),
    ({"do_center_crop": False, "do_pad": False, "crop_size": None, "resample": None, "image_mean": None}, 4),
    ({"data_format": "channels_first", "input_data_format": None}, 4),
    ({"return_attention_mask": True, "return_token_type_ids": False, "return_length": False, "verbose": False}, 4),
    ({"images": None, "audio": None, "stride": 0, "is_split_into_words": False}, 4),
    ({"device": "cpu"}, 4),
    ({"videos_kwargs": {"num_frames": 3}, "text_kwargs": {"padding": True}, "images_kwargs": {}}, 3),
    ({"common_kwargs": {"return_tensors": "pt"}, "videos_kwargs": None}, 4),
    ({"tools": None, "documents": None}, 4),
]

REFUSED = [
    ({"do_resize": False}, "fitted to the size"),
    ({"size": {"height": 3, "width": 3}}, "fitted to the size"),
    ({"do_center_crop": True}, "fitted to the size"),
    ({"do_rescale": False}, "the model scales"),
    ({"do_normalize": False}, "the model scales"),
    ({"image_mean": [0.5, 0.5, 0.5]}, "the model scales"),
    ({"data_format": "channels_last"}, r"\(frames, 3, height, width\)"),
    ({"video_load_backend": "decord"}, "own reader"),
    ({"load_audio_from_video": True}, "hears nothing"),
    ({"num_frames": 2, "fps": 2}, "either fps or num_frames"),
    ({"do_sample_frames": False, "fps": 2}, "leave fps and num_frames out"),
    ({"video_metadata": [{"fps": 2}] * 2}, "given for 2 videos, but there are 1"),
    ({"return_offsets_mapping": True}, "not supported"),
    ({"return_tensors": "tf"}, "return_tensors"),
]  # fmt: skip


def chat(source=FRAMES):
    return [{"role": "user", "content": [{"type": "video", "video": source}, {"type": "text", "text": "hi"}]}]


@pytest.mark.parametrize("videos", SHAPES_OF_VIDEOS.values(), ids=SHAPES_OF_VIDEOS)
def test_ways_to_pass_a_video(processor, videos):
    for text in (TEXT, [TEXT]):
        batch = processor(text=text, videos=videos, return_tensors="pt")
        assert batch["num_frames"].tolist() == [4]
        assert batch["pixel_values_videos"][:, 0, 0, 0].tolist() == [0, 10, 20, 30]
        assert batch["input_ids"].shape == (1, 4 * processor.tokens_per_frame + WORDS)


@pytest.mark.parametrize(("settings", "frames"), ACCEPTED, ids=lambda value: str(value)[:50])
def test_accepted(processor, settings, frames):
    found = [
        processor(text=TEXT, videos=[FRAMES], **{"return_tensors": "pt", **settings}),
        processor.apply_chat_template(
            chat(), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=settings
        )
        if "images" not in settings
        else None,
    ]
    if not {"images", "videos_kwargs", "common_kwargs"} & settings.keys():
        found.append(
            processor.apply_chat_template(chat(), tokenize=True, return_dict=True, return_tensors="pt", **settings)
        )
    for batch in filter(None, found):
        assert batch["num_frames"].tolist() == [frames] and len(batch["pixel_values_videos"]) == frames
        assert torch.is_tensor(batch["input_ids"])
        assert (batch["input_ids"] == processor.video_token_id).sum() == frames * processor.tokens_per_frame


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_in_words(processor, settings, reason):
    with pytest.raises(ValueError, match=reason):
        processor(text=TEXT, videos=[FRAMES], **settings)
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template(chat(), tokenize=True, return_dict=True, **settings)


def test_what_nobody_knows_is_no_variable_of_the_template(processor):
    for settings in ({"video_fps": 2}, {"sampel_frames": True}, {"enable_thinking": True}, {"tools": [{"a": 1}]}):
        with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
            processor.apply_chat_template(chat(), tokenize=True, **settings)
    with pytest.raises(ValueError, match="tools=.*not supported"):
        processor.apply_chat_template(chat(), tools=[{"type": "function", "function": {"name": "f"}}])
    assert processor.apply_chat_template(chat(), enable_thinking=False) == processor.apply_chat_template(chat())
    own = "{{ mood }}{% for m in messages %}{{ m['role'] }}{{ tools }}{% endfor %}"
    assert processor.apply_chat_template(chat(), chat_template=own, mood="glad") == "gladuserNone"


def test_token_types_and_masks(processor):
    parts = [
        {"type": "image", "image": PICTURES[0]},
        {"type": "video", "video": FRAMES},
        {"type": "text", "text": "hi"},
    ]
    messages = [{"role": "user", "content": parts}]
    batch = processor.apply_chat_template(
        [messages, chat()], tokenize=True, return_dict=True, return_tensors="pt", return_mm_token_type_ids=True
    )
    types, ids = batch["mm_token_type_ids"], batch["input_ids"]
    assert types.shape == ids.shape and ((types > 0) == (ids == processor.video_token_id)).all()
    per = processor.tokens_per_frame
    assert (types == 1).sum(1).tolist() == [per, 0] and (types == 2).sum(1).tolist() == [4 * per, 4 * per]
    assert types[0][types[0] > 0].tolist() == [1] * per + [2] * 4 * per
    assert "attention_mask" not in processor(text=TEXT, videos=FRAMES, return_attention_mask=False)


def test_nothing_and_the_order_of_arguments(processor):
    with pytest.raises(ValueError, match="nothing to process"):
        processor()
    with pytest.raises(ValueError, match="processor\\(text="):
        processor(None, None, PICTURES[0])
    same = [processor(text="<image>a", images=image)["num_frames"].tolist() for image in (PICTURES[0], [PICTURES[0]])]
    assert same == [[1], [1]]
    nested = processor(text=["<image>a", "<image>b"], images=[[PICTURES[0]], [PICTURES[1]]], padding=True)
    assert nested["num_frames"].tolist() == [1, 1]


def test_the_video_processor_alone(processor):
    video_processor = processor.video_processor
    found = video_processor(videos=[FRAMES, FRAMES], video_metadata=[{"fps": 2}, None], do_resize=True, device="cpu")
    assert found["num_frames"].tolist() == [2, 4]
    with pytest.raises(ValueError, match="fitted to the size"):
        video_processor(videos=[FRAMES], do_resize=False)
    with pytest.raises(TypeError, match="unknown settings"):
        video_processor(videos=[FRAMES], do_resise=True)
