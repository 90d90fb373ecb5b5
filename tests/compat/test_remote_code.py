"""A saved checkpoint works in a process that does not know this package, on the newest and the oldest transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoQuestionAnsweringPipeline
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

SCRIPT = Path(__file__).with_name("load_without_package.py")
# Path of a Python with another transformers; `make compat` installs the oldest supported one and sets it.
OTHER_PYTHON = os.environ.get("VIDEO_MA2MBA_COMPAT_PYTHON")


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


def load_elsewhere(python: str, folders: list[Path], home: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(SCRIPT), *map(str, folders)], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(make_model, tmp_path_factory) -> list[Path]:
    folders = []
    for kind in ("clip_vision_model", "siglip_vision_model"):
        folder = tmp_path_factory.mktemp("remote") / kind
        write_checkpoint(folder, make_model(vision={"model_type": kind}))
        folders.append(folder)
    return folders


def test_without_the_package(checkpoints, tmp_path):
    assert "all as expected" in load_elsewhere(sys.executable, checkpoints, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(OTHER_PYTHON is None, reason="needs VIDEO_MA2MBA_COMPAT_PYTHON (see `make compat`)")
def test_with_another_transformers(checkpoints, tmp_path):
    said = load_elsewhere(OTHER_PYTHON, checkpoints, tmp_path)
    assert "all as expected" in said
    import transformers

    assert f"transformers {transformers.__version__}" not in said, "the other Python must have another transformers"
