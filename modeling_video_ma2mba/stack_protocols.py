"""What files ask of objects that others make, as types for the checker: the seams between reader, processor, stack and
recomputation. At run time any object will do that has these attributes.

Legend: B batch, S tokens, D width.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .answering_familiarity import Familiarity
from .configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from .mixer_mamba2 import Ma2mbaBlock, Ma2mbaRMSNorm


class Chunk(Protocol):
    """Frames that follow one another; see `FrameChunk` of the reader."""

    pixels: np.ndarray
    timestamps: np.ndarray


class Reader(Protocol):
    """One video, read chunk by chunk: a `FrameReader`, or whatever gives frames as it does."""

    name: str
    warnings: list[str]
    sampling: Any
    after: float | None  # time of the frame before the first, where an earlier reading is continued

    @property
    def duration(self) -> float:
        """Seconds."""

    @property
    def expected_frames(self) -> int:
        """How many frames `chunks` gives in all."""

    def chunks(
        self, n: int = 32, skip: int = 0, threads: int | None = None, turn: tuple[int, int] = (0, 1)
    ) -> Iterator[Any]:
        """`Chunk`s of n frames: of so many processes that take turns, those of this one."""

    def content_digest(self) -> str | None:
        """SHA-256 of the video's bytes, where it has any of its own."""

    def close(self) -> None:
        """End unfinished `chunks`."""


class Processor(Protocol):
    """What answering questions takes of a `VideoMa2mbaProcessor`. `tokenizer`: transformers'."""

    tokenizer: Any
    chat_template: str
    video_processor: Any
    frame_times: str
    frame_times_every: float

    def streaming_prompt(
        self, messages: Any, add_generation_prompt: bool = True, **video_settings: Any
    ) -> tuple[Tensor, Tensor, list[Reader]]:
        """(1, S) token ids up to the last video and behind it, and a reader for each video."""

    def times_question(self, question: Any, wants_times: bool = True) -> Any:
        """A question, or conversation, whose moments are written as time stamps, and that asks for a span."""

    def timed_answer(self, answer: str) -> dict[str, Any]:
        """`{"answer", "start", "end"}` of what a model answered to such a question."""


class Layers(Protocol):
    """Modules in a row: a list of them, or a `ModuleList`."""

    def __getitem__(self, index: int, /) -> nn.Module: ...

    def __iter__(self) -> Iterator[nn.Module]: ...

    def __len__(self) -> int: ...


class Blocks(Protocol):
    """The `ModuleList` of a stack, whose items `torch` does not tell."""

    def __getitem__(self, index: int, /) -> Ma2mbaBlock: ...

    def __iter__(self) -> Iterator[Ma2mbaBlock]: ...

    def __len__(self) -> int: ...

    def modules(self) -> Iterator[nn.Module]:
        """As in `nn.Module`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `nn.Module`."""


class TextStack(Protocol):
    """What recomputation, planning and decoding ask of a `Ma2mbaTextModel`."""

    config: Ma2mbaTextConfig
    embeddings: nn.Embedding
    layers: Blocks
    norm_f: Ma2mbaRMSNorm
    prefill_segment_length: int

    @property
    def stream_dtype(self) -> torch.dtype:
        """Data type of the residual stream."""

    def longest_pass(self, batch: int) -> int:
        """Tokens of each row that pass through the layers at a time."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `nn.Module`."""

    def __call__(self, **arguments: Any) -> Any:
        """See `Ma2mbaTextModel.forward`."""


class VideoModel(Protocol):
    """What reading takes of a `VideoMa2mbaModel`."""

    config: VideoMa2mbaConfig
    language_model: TextStack
    familiarity: Familiarity | None

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Tensor:
        """Frames (F, 3, h, w) to rows of the stack's input (N, D)."""
