"""The files of this folder work as remote code: loaded where the package is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import video_ma2mba.processing
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor

FOLDER = Path(video_ma2mba.processing.__file__).parent
FILES = sorted(FOLDER.glob("[!_]*.py"))
ELSEWHERE = {"byte_tokenizer.py", "video_processing_videomamba.py"}  # what no Video-Ma2mba processor is made of
ALLOWED = {"torch", "transformers", "tokenizers", "numpy", "PIL"}

LOADING_SCRIPT = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "video_ma2mba":
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
folder, video, resaved = sys.argv[1:]
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
assert type(processor.video_processor).__module__.startswith("transformers_modules")
assert "av" not in sys.modules, "the video decoder is loaded with the first video"
messages = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": "A cat."}]
batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt",
                                      return_assistant_tokens_mask=True, fps=2)
prefix, question, readers = processor.streaming_prompt(messages[:1], num_frames=3)
processor.save_pretrained(resaved)
again = AutoProcessor.from_pretrained(resaved, trust_remote_code=True)
print(json.dumps({
    "input_ids": batch["input_ids"].tolist(), "masks": batch["assistant_masks"].tolist(),
    "pixels": int(batch["pixel_values_videos"].long().sum()), "num_frames": batch["num_frames"].tolist(),
    "prompt": [prefix.tolist(), question.tolist(), [reader.expected_frames for reader in readers]],
    "prompt again": [part.tolist() for part in again.streaming_prompt(messages[:1], num_frames=3)[:2]],
}))
"""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_are_those_that_travel(file):
    """transformers copies files found by `from .name import`, and only those of the same folder."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (FOLDER / f"{node.module}.py").is_file(), ast.unparse(node)
    at_load_time = {
        name.partition(".")[0]
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    assert at_load_time - ALLOWED - set(sys.stdlib_module_names) == set()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = VideoMa2mbaProcessor(
        build_byte_tokenizer(),
        VideoMa2mbaVideoProcessor(size={"height": 16, "width": 24}, resize_mode="pad", max_frames=5),
        tokens_per_frame=6,
        system_prompt="Short answers.",
        frame_separator=" ",
    )
    processor.save_pretrained(folder)
    return folder, processor


def test_saved_files(saved):
    folder, _ = saved
    names = {path.name for path in folder.iterdir()}
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert {file.name for file in FILES} - ELSEWHERE <= names
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["auto_map"]["AutoProcessor"] == "processing_video_ma2mba.VideoMa2mbaProcessor"
    nested = settings["video_processor"]
    assert nested["auto_map"]["AutoVideoProcessor"] == "video_processing_video_ma2mba.VideoMa2mbaVideoProcessor"
    assert (nested["size"], nested["max_frames"]) == ({"height": 16, "width": 24}, 5)


def test_loads_without_the_package(saved, make_video, tmp_path):
    folder, processor = saved
    video = make_video("remote.mp4", frames=90, gop=12)
    result = subprocess.run(
        [sys.executable, "-c", LOADING_SCRIPT, str(folder), str(video), str(tmp_path / "resaved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    messages = [
        {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    sample = processor.tokenize_conversation(messages, fps=2)
    assert loaded["num_frames"] == [5]  # 6 frames at 2 a second, limited by the stored max_frames
    assert loaded["input_ids"] == [sample["input_ids"].tolist()]
    assert loaded["masks"] == [(sample["labels"] != -100).int().tolist()]
    assert loaded["pixels"] == int(sample["pixel_values_videos"].long().sum()) > 0
    prefix, question, readers = processor.streaming_prompt(messages[:1], num_frames=3)
    assert loaded["prompt"] == [prefix.tolist(), question.tolist(), [reader.expected_frames for reader in readers]]
    assert loaded["prompt again"] == loaded["prompt"][:2]
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "resaved" / name).read_text() == (folder / name).read_text()
    assert {file.name for file in FILES} - ELSEWHERE <= {path.name for path in (tmp_path / "resaved").iterdir()}
    assert np.array(loaded["masks"]).sum() == len("A cat.") + 1
