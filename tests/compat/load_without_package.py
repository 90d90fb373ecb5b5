"""Loads checkpoints by their own code, in an interpreter of its own, and compares with what the package computed.

Run as `python load_without_package.py FOLDER...`; every folder holds a checkpoint and `expected.pt`, written by
`test_remote_code.py`, or a VideoMamba and `clip.mp4`. Works with any transformers from 5.10 on; prints "all as
expected" at the end.
"""

# ruff: noqa: E402 (the search path is cleaned before anything is imported)

import importlib.util
import sys
from pathlib import Path

# An editable installation would make the package visible: these finders are how setuptools does it.
sys.meta_path = [
    finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
]
assert importlib.util.find_spec("video_ma2mba") is None, "the package must not be importable here"

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

REMOTE = {"trust_remote_code": True}


def close(found, expected, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")


def check(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    inputs, pixels = expected["inputs"], expected["inputs"]["pixel_values_videos"]
    config = AutoConfig.from_pretrained(folder, **REMOTE)
    assert config.model_type == "video_ma2mba"

    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, **REMOTE).eval()
        assert type(model).__module__.startswith("transformers_modules."), "not the checkpoint's code"
        with torch.no_grad():
            close(model.get_video_features(pixels), expected["features"], "video features")
            close(model(**inputs).logits, expected["logits"], "logits")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == config.tie_word_embeddings
    with torch.no_grad():
        base = AutoModel.from_pretrained(folder, **REMOTE).eval()
        close(base(**inputs).last_hidden_state, expected["hidden"], "hidden states")
    for name, settings in expected["settings"].items():
        torch.manual_seed(0)
        assert model.generate(**inputs, **settings).tolist() == expected[name], name

    processor = AutoProcessor.from_pretrained(folder, **REMOTE)
    messages = [{"role": "user", "content": [{"type": "video", "video": expected["video"].numpy()}, expected["text"]]}]
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert made.keys() == inputs.keys()
    for key, value in inputs.items():
        assert torch.equal(made[key], value), key

    # transformers loads a pipeline's parts by itself; both ways of naming the task
    for task in ({"task": "video-question-answering"}, {}):
        pipe = pipeline(**task, model=str(folder), device="cpu", **REMOTE)
        assert pipe(expected["video"].numpy(), expected["text"]["text"], max_new_tokens=5) == expected["answer"], task
    state = pipe.read(expected["video"].numpy())
    assert pipe.ask(state, expected["text"]["text"], max_new_tokens=5) == expected["answer"][0]["answer"]


def check_classifier(folder: Path) -> None:
    pipe = pipeline("video-classification", model=str(folder), **REMOTE)
    assert type(pipe.model).__module__.startswith("transformers_modules."), "not the checkpoint's code"
    assert sorted(each["label"] for each in pipe(str(folder / "clip.mp4"))) == ["no", "yes"]


def main(folders: list[Path]) -> None:
    for folder in folders:
        if (folder / "clip.mp4").exists():
            check_classifier(folder)
            continue
        check(folder)
        # what was loaded by remote code must be complete when it is saved again
        again = folder.with_name(folder.name + "-again")
        AutoModelForImageTextToText.from_pretrained(folder, **REMOTE).save_pretrained(again)
        AutoProcessor.from_pretrained(folder, **REMOTE).save_pretrained(again)
        (again / "expected.pt").write_bytes((folder / "expected.pt").read_bytes())
        check(again)
    assert "torchvision" not in sys.modules, "torchvision must never be needed"
    print(f"all as expected with transformers {transformers.__version__}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
