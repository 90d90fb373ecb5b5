"""Small videos whose frames carry their own number, so that tests know exactly which frame came back."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor

BITS = 10
BAR = 8  # pixels a bit takes


def numbered_picture(number: int, height: int = 48, width: int = BITS * BAR) -> np.ndarray:
    """A picture uint8 `(height, width, 3)` that shows `number` as vertical bars, one a bit."""
    picture = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            picture[:, bit * BAR : (bit + 1) * BAR] = 255
    return picture


def numbers_in(pixels: np.ndarray) -> list[int]:
    """Read the numbers back from frames uint8 `(n, h, w, 3)` of the height `numbered_picture` gives them."""
    bars = [pixels[:, 4:28, bit * BAR + 2 : (bit + 1) * BAR - 2].mean(axis=(1, 2, 3)) > 128 for bit in range(BITS)]
    return [sum(int(bar[i]) << bit for bit, bar in enumerate(bars)) for i in range(len(pixels))]


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return numbers_in


@pytest.fixture(scope="session")
def picture_of() -> Callable[..., np.ndarray]:
    return numbered_picture


def write_video(
    path: Path,
    frames: int = 90,
    gop: int = 12,
    b_frames: int = 0,
    codec: str = "libx264",
    height: int = 48,
    width: int = BITS * BAR,
    pix_fmt: str = "yuv420p",
    times_ms: Iterable[int] | None = None,
    container_options: dict[str, str] | None = None,
    file_format: str | None = None,
    noisy: bool = False,
    **codec_options: str,
) -> None:
    """Write a numbered video: 30 frames a second unless `times_ms` gives the time of every frame."""
    options = {"g": str(gop), "bf": str(b_frames), "sc_threshold": "0", **codec_options}
    if codec == "libx265":
        settings = f"keyint={gop}:bframes={b_frames}:log-level=none:pools=none:frame-threads=1"
        options = {"x265-params": settings, **codec_options}
    times = list(times_ms) if times_ms is not None else None
    with av.open(str(path), "w", format=file_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1  # by default one a core: the file must not depend on the machine
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            picture = numbered_picture(number, height, width)
            if noisy:  # below the bars; makes the frames, not the index, the bulk of the file
                noise = np.random.default_rng(number).integers(0, 256, (height - 32, width, 3))
                picture[32:] = noise
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_video(name, ...)` is the path of a video that `write_video` wrote, once for the same arguments."""
    written: dict[str, Path] = {}

    def make(name: str, **settings: Any) -> Path:
        # By everything: a test that gives a name to another video must not change what the next test gets.
        key = repr((name, sorted(settings.items())))
        if key not in written:
            path = tmp_path_factory.mktemp("video") / name
            write_video(path, **settings)
            written[key] = path
        return written[key]

    return make


@pytest.fixture
def video_processor() -> VideoMa2mbaVideoProcessor:
    return VideoMa2mbaVideoProcessor(size={"height": 32, "width": 32})


@pytest.fixture
def processor(video_processor: VideoMa2mbaVideoProcessor) -> VideoMa2mbaProcessor:
    return VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor, tokens_per_frame=4)


@pytest.fixture
def neox_like() -> PreTrainedTokenizerFast:
    """A small tokenizer made like GPT-NeoX's: byte-level BPE, NFC, and `<|endoftext|>` for everything special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["what is the colour of the moving shape? <|user|> <|assistant|>(A) red"] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[AddedToken("<|endoftext|>", special=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
