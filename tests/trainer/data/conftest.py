"""Small videos whose frames tell their own number by their brightness, and a processor of 4 tokens a frame."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor
from video_ma2mba.world.video_files import write_video

STEP = 8  # levels of brightness from one frame to the next


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """What `datasets` caches goes into a folder of this run."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def processor() -> VideoMa2mbaProcessor:
    video_processor = VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16})
    return VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor, tokens_per_frame=4)


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4 of 6 frames, b.mp4 of 3, long.mp4 of 30, a frame a second; cut.mp4, which is no video; dot.png."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 6), ("b", 3), ("long", 30)):
        levels = np.arange(frames, dtype=np.uint8) * STEP
        write_video(folder / f"{name}.mp4", [np.broadcast_to(levels[:, None, None, None], (frames, 16, 16, 3))])
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:100])
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "dot.png")
    return folder


@pytest.fixture(scope="session")
def frame_numbers() -> Callable:
    """Numbers of frames, from their brightness."""

    def read(pixels) -> list[int]:
        return [round(float(frame.float().mean()) / STEP) for frame in pixels]

    return read


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def say(question: str, answer: str, **media) -> list[dict]:
    """One turn in canonical form."""
    parts = [{"type": kind, kind: source} for kind, source in media.items()]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture(scope="session")
def turn() -> Callable[..., list[dict]]:
    return say
