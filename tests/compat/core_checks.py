"""What must work on every supported transformers, checked in about half a minute without pytest.

    python tests/compat/core_checks.py

Needs the package on the path, with or without an installation. A small random model answers, generates, is trained
for a step, saved, and loaded in a process that does not know the package. Prints PASS or FAIL and a word for each
check; the exit status says whether all passed. What needs an extra that is missing is skipped, and says so.
"""

# ruff: noqa: E402 (the caches are set before anything is imported)

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
HOME = tempfile.mkdtemp(prefix="core_checks_")
os.environ["HF_HOME"], os.environ["HF_MODULES_CACHE"] = HOME, os.path.join(HOME, "modules")

import torch
import transformers

import video_ma2mba
from video_ma2mba import (
    Ma2mbaTextConfig,
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
)
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

torch.set_num_threads(1)
HERE = Path(__file__).parent
ASKED = "What is shown?"


class Skipped(Exception):
    """A check that this environment cannot make."""


def small_model() -> VideoMa2mbaForConditionalGeneration:
    torch.manual_seed(0)
    text = Ma2mbaTextConfig(
        vocab_size=272, pad_token_id=1, hidden_size=16, num_hidden_layers=2, state_size=8, head_dim=8, chunk_size=8
    )
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}
    config = VideoMa2mbaConfig(text_config=text, vision_config=vision, video_token_id=2, prefill_segment_length=16)
    model = VideoMa2mbaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    model.generation_config.suppress_tokens = list(range(6))
    return model


def small_processor(model: VideoMa2mbaForConditionalGeneration) -> VideoMa2mbaProcessor:
    video_processor = VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16})
    return VideoMa2mbaProcessor(
        build_byte_tokenizer(), video_processor, tokens_per_frame=model.config.tokens_per_frame
    )


MODEL = small_model()
PROCESSOR = small_processor(MODEL)
VIDEO = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
MESSAGES = [{"role": "user", "content": [{"type": "video", "video": VIDEO.numpy()}, {"type": "text", "text": ASKED}]}]
INPUTS = dict(
    PROCESSOR.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
)


def greedy_by_hand(new: int, **inputs: Any) -> list[int]:
    """The whole sequence again for every token."""
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask", None)
    start = ids.shape[1]
    for _ in range(new):
        with torch.no_grad():
            logits = MODEL(input_ids=ids, **inputs, use_cache=False).logits[:, -1]
        logits[:, :6] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, start:].tolist()


def check_pipeline() -> None:
    folder = tempfile.mkdtemp(dir=HOME)
    MODEL.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    pipe = transformers.pipeline("video-question-answering", model=folder)
    answer = pipe(VIDEO.numpy(), ASKED, max_new_tokens=5)[0]["answer"]
    by_hand = PROCESSOR.tokenizer.decode(greedy_by_hand(5, **INPUTS), skip_special_tokens=True).strip()
    assert answer == by_hand, (answer, by_hand)
    assert pipe.ask(pipe.read(VIDEO.numpy()), ASKED, max_new_tokens=5) == answer


def check_answer() -> None:
    state = MODEL.read_video(VIDEO.numpy(), PROCESSOR)
    several = MODEL.answer(state, [ASKED, "Why?"], PROCESSOR, max_new_tokens=5)
    assert several == [MODEL.answer(state, asked, PROCESSOR, max_new_tokens=5) for asked in (ASKED, "Why?")]
    scored = MODEL.answer(state, ASKED, PROCESSOR, max_new_tokens=5, return_scores=True, num_beams=3)
    assert 0 < scored["score"] < 1
    drawn = [MODEL.answer(state, ASKED, PROCESSOR, max_new_tokens=5, do_sample=True, seed=3) for _ in range(2)]
    assert drawn[0] == drawn[1]
    MODEL.answer(state, ASKED, PROCESSOR, max_new_tokens=5, stop_strings=["e"])
    path = os.path.join(HOME, "state.safetensors")
    state.save(path)
    assert MODEL.answer(video_ma2mba.VideoState.load(path), ASKED, PROCESSOR, max_new_tokens=5) == several[0]


def check_command() -> None:
    folder = tempfile.mkdtemp(dir=HOME)
    MODEL.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    frames = os.path.join(HOME, "frame.png")
    from PIL import Image

    Image.fromarray(VIDEO[0].numpy()).save(frames)
    command = [sys.executable, "-m", "video_ma2mba", "ask", frames, ASKED, "--model", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]


def check_greedy() -> None:
    start = INPUTS["input_ids"].shape[1]
    expected = greedy_by_hand(5, **INPUTS)
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        found = MODEL.generate(**INPUTS, max_new_tokens=5, do_sample=False, **settings)
        assert found[0, start:].tolist() == expected, settings


def check_beams() -> None:
    settings = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    with_state = MODEL.generate(**INPUTS, **settings)
    assert with_state.tolist() == MODEL.generate(**INPUTS, **settings, use_cache=False).tolist()


def check_samples() -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        settings = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        found.append(MODEL.generate(**INPUTS, max_new_tokens=5, **settings).tolist())
    assert found[0] == found[1]


def check_state_in_generate() -> None:
    state = MODEL(**INPUTS).past_key_values
    question = torch.tensor([[70, 80, 90]])
    found = [
        MODEL.generate(question, **{name: state.fork()}, max_new_tokens=4).tolist()
        for name in ("past_key_values", "cache")
    ]
    assert found[0] == found[1]
    returned = MODEL.generate(**INPUTS, max_new_tokens=3, return_dict_in_generate=True)
    assert returned.past_key_values.seen_tokens == returned.sequences.shape[1] - 1


def check_save() -> None:
    folder = tempfile.mkdtemp(dir=HOME)
    MODEL.save_pretrained(folder)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is VideoMa2mbaForConditionalGeneration
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**INPUTS).logits, MODEL(**INPUTS).logits)
    again = tempfile.mkdtemp(dir=HOME)
    loaded.save_pretrained(again)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(again))


def write_classifier(folder: str | Path) -> None:
    """A small VideoMamba with two classes, "no" and "yes"."""
    from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
    from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification
    from video_ma2mba.processing.video_processing_videomamba import VideoMambaVideoProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 2}
    VideoMambaForVideoClassification(VideoMambaConfig(**sizes, id2label={0: "no", 1: "yes"})).save_pretrained(folder)
    VideoMambaVideoProcessor(size=32, num_frames=2).save_pretrained(folder)


def check_video_classification() -> None:
    folder = tempfile.mkdtemp(dir=HOME)
    write_classifier(folder)
    classes = transformers.pipeline("video-classification", model=folder)(
        str(video_ma2mba.EXAMPLE_VIDEOS / "000000.mp4")
    )
    assert sorted(each["label"] for each in classes) == ["no", "yes"]


def check_remote_code() -> None:
    folder = Path(tempfile.mkdtemp(dir=HOME), "remote")
    sys.path.insert(0, str(HERE))
    from remote_checkpoint import write_checkpoint

    write_checkpoint(folder, small_model())
    write_classifier(folder / "classifier")
    (folder / "classifier" / "clip.mp4").write_bytes((video_ma2mba.EXAMPLE_VIDEOS / "000000.mp4").read_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = str(HERE / "load_without_package.py")
    done = subprocess.run(
        [sys.executable, script, str(folder), str(folder / "classifier")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HOME,
    )
    if "the package must not be importable here" in done.stderr:
        raise Skipped("the package is installed here: no process is a stranger to it")
    assert done.returncode == 0 and "all as expected" in done.stdout, done.stderr[-3000:]


def training_rows() -> list[dict[str, Any]]:
    ids = INPUTS["input_ids"][0]
    row = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return [row | {"pixel_values_videos": INPUTS["pixel_values_videos"]} for _ in range(2)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "pixel_values_videos"}
    return batch | {"pixel_values_videos": torch.cat([row["pixel_values_videos"] for row in rows])}


def check_stock_trainer() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise Skipped("accelerate is missing")
    model = small_model()
    before = model.lm_head.weight.detach().clone()
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "report_to": [], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(dir=HOME), **settings, use_cpu=True, disable_tqdm=True, gradient_checkpointing=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=training_rows(), data_collator=collate)
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, model.lm_head.weight)


def check_own_trainer() -> None:
    if importlib.util.find_spec("trl") is None:
        raise Skipped("trl is missing")
    from datasets import Dataset

    from video_ma2mba import VideoMa2mbaTrainer, VideoMa2mbaTrainingConfig

    model = small_model()
    rows = [{"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "Red."}]}] * 2
    arguments = VideoMa2mbaTrainingConfig(
        tempfile.mkdtemp(dir=HOME), max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = VideoMa2mbaTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=PROCESSOR
    )
    assert trainer.train().training_loss > 0


CHECKS: dict[str, Callable[[], None]] = {
    "pipeline": check_pipeline,
    "answer and read": check_answer,
    "ask": check_command,
    "generate, greedy": check_greedy,
    "generate, beams": check_beams,
    "generate, sampled": check_samples,
    "generate, from a state": check_state_in_generate,
    "save and load": check_save,
    "remote code": check_remote_code,
    "pipeline, VideoMamba": check_video_classification,
    "stock Trainer": check_stock_trainer,
    "own Trainer": check_own_trainer,
}


def main() -> int:
    failed = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    for name, check in CHECKS.items():
        began = time.monotonic()
        try:
            check()
            said = "PASS"
        except Skipped as reason:
            said = f"SKIP ({reason})"
        except Exception as error:
            failed += 1
            lines = str(error).strip().splitlines()
            said = f"FAIL ({type(error).__name__}: {lines[-1] if lines else ''})"
            traceback.print_exc()
        print(f"{name}: {said} [{time.monotonic() - began:.1f} s]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
