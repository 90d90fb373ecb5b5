"""Writes a checkpoint beside what the installed package computes with it, for `load_without_package.py`."""

import shutil
from pathlib import Path

import torch

from video_ma2mba import (
    BUNDLED_CHECKPOINT,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
    VideoQuestionAnsweringPipeline,
)
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer


def write_checkpoint(folder: Path, model) -> None:
    """A checkpoint beside what the installed package computes with it."""
    side = model.config.vision_config.image_size
    video_processor = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
    processor = VideoMa2mbaProcessor(
        build_byte_tokenizer(), video_processor, tokens_per_frame=model.config.tokens_per_frame
    )
    model.generation_config.suppress_tokens = list(range(6))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_expected(folder, model, processor)


def copy_bundled(folder: Path) -> None:
    """The checkpoint that ships with the package, likewise."""
    shutil.copytree(BUNDLED_CHECKPOINT, folder)  # links become the files that they stand for
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(folder).eval()
    write_expected(folder, model, VideoMa2mbaProcessor.from_pretrained(folder))


def write_expected(folder: Path, model, processor) -> None:
    """What the installed package computes with a checkpoint, for `load_without_package.py`."""
    video = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8)
    text = {"type": "text", "text": "What is shown?"}
    messages = [{"role": "user", "content": [{"type": "video", "video": video.numpy()}, text]}]
    inputs = dict(
        processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    settings = {
        "greedy": {"max_new_tokens": 5},
        "beams": {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
        "chunked": {"max_new_tokens": 5, "prefill_chunk_size": 7},
    }
    with torch.no_grad():
        expected = {
            "inputs": inputs,
            "video": video,
            "text": text,
            "features": model.get_video_features(inputs["pixel_values_videos"]),
            "logits": model(**inputs).logits,
            "hidden": model.model(**inputs).last_hidden_state,
            "settings": settings,
            "answer": pipe(video, text["text"], max_new_tokens=5),
        }
    for name, chosen in settings.items():
        torch.manual_seed(0)
        expected[name] = model.generate(**inputs, **chosen).tolist()
    torch.save(expected, folder / "expected.pt")
