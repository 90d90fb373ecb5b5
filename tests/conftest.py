"""Shared by all tests: no network, few threads, tiny models, and the `gpu` and `bundled` markers."""

import atexit
import contextlib
import gc
import json
import os
import shutil
import tempfile

# Before anything imports huggingface_hub: a test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Remote code and prepared data sets are kept in this folder: one per test worker, gone afterwards. The user's own is
# neither read nor written, and need not be writable.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_HOME"], "modules")
for _name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

WORKER_BYTES = 3e9  # of a worker and the processes that its tests start

torch.set_num_threads(1)  # tiny tensors: more threads only fight the other test workers


def limit_of(*files: str) -> float:
    """The smallest number that a control group sets in one of `files`, or infinity."""
    found = [float("inf")]
    for file in files:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            first, *period = Path("/sys/fs/cgroup", file).read_text(encoding="utf-8").split()
            found.append(float(first) / float(period[0]) if period else float(first))
    return min(found)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker a processor that this container may use, as far as memory goes; xdist counts those of the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = limit_of("memory.max", "memory/memory.limit_in_bytes")
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = min(memory, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(1, int(min(usable, limit_of("cpu.max"), memory / WORKER_BYTES)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What importing leaves is never garbage: searching it again and again takes a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if not (Path(__file__).parents[1] / "bundled" / "config.json").is_file():
        skips["bundled"] = pytest.mark.skip(reason="needs the bundled checkpoint, which this checkout lacks")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """The command, beside which ffprobe is; a test whose right values are theirs is skipped where it is not there."""
    found = shutil.which("ffmpeg")
    if found is None or shutil.which("ffprobe") is None:
        pytest.skip("needs the commands ffmpeg and ffprobe")
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_text_config() -> Callable:
    """Factory of language model configurations small enough for fp64 and exhaustive tests (4 heads of width 8)."""
    from video_ma2mba import Ma2mbaTextConfig

    def make(**overrides) -> Ma2mbaTextConfig:
        fields = {
            "vocab_size": 272,  # the byte tokenizer's 262, rounded up
            "pad_token_id": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 8,
            "head_dim": 8,
            "chunk_size": 8,
        }
        return Ma2mbaTextConfig(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def make_config(make_text_config) -> Callable:
    """Factory of whole configurations: 16x16 pixels, 4x4 patches, pooled to 4 tokens a frame."""
    from video_ma2mba import VideoMa2mbaConfig

    def make(text: dict | None = None, vision: dict | None = None, **overrides) -> VideoMa2mbaConfig:
        vision_config = {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 16,
        } | (vision or {})
        fields = {"video_token_id": 2, "vision_chunk_frames": 4, "prefill_segment_length": 16}
        return VideoMa2mbaConfig(
            text_config=make_text_config(**(text or {})), vision_config=vision_config, **(fields | overrides)
        )

    return make


@pytest.fixture(scope="session")
def make_model(make_config) -> Callable:
    """Factory of random models in eval mode: the same seed gives the same weights."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> VideoMa2mbaForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return VideoMa2mbaForConditionalGeneration(make_config(**overrides)).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved random model with its byte-level processor, as `bundled/` is one of a trained model."""
    from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
    from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model = make_model()
    side = model.config.vision_config.image_size
    video_processor = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
    processor = VideoMa2mbaProcessor(
        build_byte_tokenizer(), video_processor, tokens_per_frame=model.config.tokens_per_frame
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_timed_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Makes of the tiny checkpoint one that reads a time stamp every so many seconds."""

    def make(every: float) -> Path:
        folder = tmp_path_factory.mktemp("timed") / "checkpoint"
        shutil.copytree(tiny_checkpoint, folder)
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(settings | {"frame_times": "text", "frame_times_every": every}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mp4 of 6 seconds at 4 frames a second, 32x32 pixels, that grows brighter."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("video") / "brighter.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        for level in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level * 10, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def raw_video() -> Callable:
    """Factory of raw videos `(F, 20, 30, 3)` uint8 with colours of their own for each seed."""

    def make(frames: int, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        tint = random.integers(0, 2, (1, 2, 3, 3)).repeat(10, axis=1).repeat(10, axis=2) * 155
        return (tint + random.integers(0, 100, (frames, 20, 30, 3))).astype(np.uint8)

    return make
