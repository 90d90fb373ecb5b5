"""What transformers' own pipelines and servers do with a checkpoint, with the package imported and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, pipeline

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoQuestionAnsweringPipeline

ROOT = Path(__file__).parents[2]
TASK = "video-question-answering"


@pytest.mark.parametrize("trusts", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_a_checkpoint_needs_no_trust_where_the_package_is_imported(tiny_checkpoint, raw_video, trusts):
    pipe = pipeline(TASK, model=str(tiny_checkpoint), **trusts)
    assert type(pipe) is VideoQuestionAnsweringPipeline
    assert type(pipe.model) is VideoMa2mbaForConditionalGeneration
    assert "answer" in pipe(raw_video(2), "What?", max_new_tokens=2)[0]
    if trusts.get("trust_remote_code") is not False:  # the checkpoint names its task
        assert type(pipeline(model=str(tiny_checkpoint), **trusts)) is VideoQuestionAnsweringPipeline


def test_the_task_is_written_for_those_without_the_package(tiny_checkpoint, tmp_path):
    pipe = pipeline(TASK, model=str(tiny_checkpoint))
    pipe.save_pretrained(tmp_path)
    for folder in (tiny_checkpoint, tmp_path):
        written = json.loads((folder / "config.json").read_text())["custom_pipelines"]
        assert written[TASK]["impl"] == "pipeline_video_ma2mba.VideoQuestionAnsweringPipeline"


def test_stop_strings_end_an_answer(tiny_checkpoint, raw_video):
    pipe = pipeline(TASK, model=str(tiny_checkpoint))
    pipe.model.generation_config.eos_token_id = None
    letters = pipe.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    pipe.model.generation_config.suppress_tokens = sorted(set(range(272)) - set(letters))
    video, settings = raw_video(2), {"max_new_tokens": 12}
    whole = pipe(video, "What?", **settings)[0]["answer"]
    stop = whole[2:4]
    assert pipe(video, "What?", **settings, stop_strings=[stop])[0]["answer"] == whole[: whole.index(stop) + 2]
    assert pipe(video, "What?", **settings, stop_strings=stop, num_beams=2)[0]["answer"].count(stop) <= 1
    both = pipe.ask(pipe.read(video), ["What?", "Why is that?"], stop_strings=[stop], **settings)
    assert both[0] == whole[: whole.index(stop) + 2] and both[1].count(stop) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.bfloat16, "auto", None])
def test_a_pipeline_of_a_data_type_is_saved_and_loaded(tiny_checkpoint, tmp_path, raw_video, dtype):
    pipe = pipeline(TASK, model=str(tiny_checkpoint), **({} if dtype is None else {"dtype": dtype}))
    pipe.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path))
    assert again.model.dtype == pipe.model.dtype
    settings = {"max_new_tokens": 3}
    assert again(raw_video(2), "What?", **settings) == pipe(raw_video(2), "What?", **settings)
    assert "dtype" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, dtype=torch.float16, device_map="cpu")
    processor.save_pretrained(tmp_path / "processor")


def test_servers_find_the_architecture(tiny_checkpoint):
    """`transformers serve` looks the architecture up by its name and asks the same tables what it can read."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import Modality

    manager = ModelManager(device="cpu")
    model, processor = manager.load_model_and_processor(f"{tiny_checkpoint}@main")
    for loaded in manager.loaded_models.values():
        loaded._timer.cancel()
    assert type(model) is VideoMa2mbaForConditionalGeneration
    assert ModelManager.get_model_modality(model, processor=processor) is Modality.VLM
    assert sys.modules["transformers"].VideoMa2mbaForConditionalGeneration is VideoMa2mbaForConditionalGeneration


SERVE = """
import importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
assert importlib.util.find_spec("video_ma2mba") is None
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", trust_remote_code=True)
model, processor = manager.load_model_and_processor(sys.argv[1] + "@main")
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
    tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
)
# as the server calls it: the tokenizer among the model's own arguments
found = model.generate(**inputs, max_new_tokens=3, tokenizer=processor.tokenizer, disable_compile=True)
print(type(model).__module__, manager.get_model_modality(model, processor=processor).name, found.shape[0])
for loaded in manager.loaded_models.values():
    loaded._timer.cancel()
"""


def alone(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=kept | environment, cwd="/"
    )


def test_servers_find_the_architecture_of_remote_code(tiny_checkpoint):
    done = alone(SERVE, str(tiny_checkpoint))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("transformers_modules.") and done.stdout.split()[1:] == ["VLM", "1"]


def test_the_end_of_a_process_is_silent(tiny_checkpoint):
    """Objects of modules that are gone already must not complain: a model that a global holds, in either order."""
    for first, second in (("video_ma2mba", "transformers"), ("transformers", "video_ma2mba")):
        code = (
            f"import {first}, {second}, sys\n"
            "model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
            "model.gradient_checkpointing_enable()\n"
        )
        paths = os.pathsep.join(path for path in (os.environ.get("PYTHONPATH"), str(ROOT.parent)) if path)
        done = alone(code, str(tiny_checkpoint), PYTHONPATH=os.environ.get("PYTHONPATH", paths))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr
