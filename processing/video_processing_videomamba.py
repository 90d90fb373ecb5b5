"""VideoMamba's frame processor: sparse sampling of clips (TSN), and several views of a video for testing."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .frame_fitting import fit_frame
from .frame_sampling import Sampling
from .picture_sources import split_videos
from .video_reader import open_video


class VideoMambaVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict of transformers, which is not followed
    """Settings of a call besides those of transformers."""

    num_segments: int | None
    num_crops: int | None
    seed: int | None
    start: float | None
    end: float | None


def sparse_frames(frames: int, count: int, segments: int = 1, rng: np.random.Generator | None = None) -> np.ndarray:
    """Which of a video's `frames` frames make up each of `segments` clips of `count` frames.

    The video is cut in `count` parts of `(frames - 1) / count` frames. In testing clip k of S takes from part i the
    frame `round(part i) + int(part / (S + 1) * (k + 1))`; with `rng`, for training, one at random.

    Returns:
        int64 (segments, count), non-decreasing in each clip. A video shorter than a clip gives frames again.
    """
    part = (frames - 1) / count
    starts = np.round(part * np.arange(count + 1)).astype(np.int64)
    if rng is not None:
        return rng.integers(starts[:-1], starts[1:], size=(segments, count), endpoint=True)
    offsets = [int(part / (segments + 1) * (k + 1)) for k in range(segments)]
    return np.minimum(starts[:-1] + np.array(offsets)[:, None], frames - 1)


def crop_boxes(height: int, width: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Top left corners of `crops` squares of `side` pixels, spread along the longer side of a picture; one is the
    middle."""
    where = [0.5] if crops == 1 else [k / (crops - 1) for k in range(crops)]
    return [
        (
            round((height - side) * (at if height > width else 0.5)),
            round((width - side) * (at if width >= height else 0.5)),
        )
        for at in where
    ]


@dataclass(frozen=True)
class _TheseFrames(Sampling):
    """Chooses the frames of all clips, of `count` frames each, and leaves them in `clips`."""

    count: int = 1
    segments: int = 1
    rng: np.random.Generator | None = None
    clips: list[np.ndarray] = field(default_factory=list)

    def choose(self, times: np.ndarray, duration: float, name: str) -> np.ndarray:
        shown = times - times[0]
        first, last = np.searchsorted(shown, [self.start or 0.0, np.inf if self.end is None else self.end])
        if first == last:
            until = "on" if self.end is None else f"to {self.end} s"
            raise ValueError(
                f"{name}: there is no frame from {self.start or 0} s {until}, the last is at {shown[-1]:.1f} s"
            )
        self.clips[:] = [first + sparse_frames(int(last - first), self.count, self.segments, self.rng)]
        return np.unique(self.clips[0])


def read_clips(
    source: Any,
    num_frames: int,
    num_segments: int = 1,
    *,
    fit: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator | None = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames of the clips of a video (see `sparse_frames`), each decoded once.

    Args:
        source: whatever `open_video` takes.
        fit: what is kept of a decoded frame, uint8 (height, width, 3).
        rng: sample at random, as in training.
        start, end: part of the video in seconds.

    Returns:
        What `fit` gave of every frame that is needed, and which of them make up the clips: int64 (segments, frames).

    Raises:
        ValueError: there is no frame in that part; and what `open_video` raises.
    """
    clips: list[np.ndarray] = []
    with open_video(source) as reader:
        reader.sampling = _TheseFrames(
            start=start, end=end, count=num_frames, segments=num_segments, rng=rng, clips=clips
        )
        frames = [fit(chunk.pixels[0]) for chunk in reader.chunks(1)]
    # A damaged video may end before its last frame: what came last stands for it.
    return frames, np.searchsorted(np.unique(clips[0]), clips[0]).clip(max=len(frames) - 1)


class VideoMambaVideoProcessor(BaseVideoProcessor):
    """Samples, resizes and crops clips; normalising is left to the model, which does it on its device.

    Args:
        size: side of the square frames that the model takes, in pixels.
        num_frames: frames of a clip.
        num_segments, num_crops: views of a video are every combination of so many clips and so many crops along the
            longer side (the shorter is resized to `size`). The model averages the probabilities of the views.
        image_mean, image_std: with which the model normalises; kept for other tools.

    A value given in a call wins over the one stored here. Works without torchvision.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = VideoMambaVideosKwargs

    def __init__(
        self,
        size: int | dict[str, int] = 224,
        num_frames: int = 8,
        num_segments: int = 1,
        num_crops: int = 1,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        self.num_frames = num_frames
        self.num_segments = num_segments
        self.num_crops = num_crops
        self.image_mean, self.image_std = image_mean, image_std
        for name in ("num_frames", "num_segments", "num_crops"):
            _whole(name, getattr(self, name))
        if self.size.get("height", 0) != self.size.get("width") or self.size["height"] < 1:
            raise ValueError(f"size must be a side in pixels, the same for height and width, not {size}")

    def to_dict(self) -> dict[str, Any]:
        """Settings that are saved: those of this class, and where its code is found."""
        everything = super().to_dict()
        own = ("size", "num_frames", "num_segments", "num_crops", "image_mean", "image_std", "auto_map")
        kept = {name: everything[name] for name in own if everything.get(name) is not None}
        return {**kept, "video_processor_type": type(self).__name__}

    def to_json_file(self, json_file_path: Any) -> None:
        """Write the settings, and beside them those of `VideoMambaImageProcessor`."""
        super().to_json_file(json_file_path)
        kind = VideoMambaImageProcessor
        pictures = {
            "image_processor_type": kind.__name__,
            "auto_map": {"AutoImageProcessor": f"video_processing_videomamba.{kind.__name__}"},
            "size": self.size,
            "num_frames": self.num_frames,
        }
        Path(json_file_path).with_name("preprocessor_config.json").write_text(
            json.dumps(pictures, indent=2) + "\n", encoding="utf-8"
        )

    def preprocess(self, videos: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Read clips of videos.

        Args:
            videos: one video or a list of them: whatever `open_video` takes.
            kwargs: `num_frames`, `num_segments`, `num_crops` for this call; `seed`: sample at random as in training;
                `start`, `end`: the part of the videos to look at, in seconds.

        Returns:
            `pixel_values` uint8 (videos, frames, 3, size, size), with several views (videos, views, frames, 3, size,
            size), the crops of a clip next to each other.

        Raises:
            TypeError: an unknown setting. ValueError: what `open_video` raises.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        kwargs.pop("do_sample_frames", None)  # transformers' pipeline says that it wants what always happens
        seed = kwargs.pop("seed", None)
        part = {"start": kwargs.pop("start", None), "end": kwargs.pop("end", None)}
        chosen = {
            name: _whole(name, kwargs.pop(name, getattr(self, name)))
            for name in ("num_frames", "num_segments", "num_crops")
        }
        if kwargs:
            raise TypeError(f"unknown settings for videos: {', '.join(sorted(kwargs))}")
        sources = split_videos(videos)
        if not sources:
            raise ValueError("there are no videos to process")
        rng = None if seed is None else np.random.default_rng(seed)
        views = torch.stack([self._views(source, rng, **chosen, **part) for source in sources])
        if views.shape[1] == 1:
            views = views[:, 0]
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors must be 'pt' or 'np', not {return_tensors!r}")
        return BatchFeature({"pixel_values": views.numpy() if return_tensors == "np" else views})

    def _views(
        self,
        source: Any,
        rng: np.random.Generator | None,
        num_frames: int,
        num_segments: int,
        num_crops: int,
        start: float | None,
        end: float | None,
    ) -> torch.Tensor:
        """uint8 (views, frames, 3, size, size) of one video, which is decoded once."""
        side = self.size["height"]

        def crops(frame: np.ndarray) -> np.ndarray:
            height, width = frame.shape[:2]
            scale = side / min(height, width)
            size = (max(side, round(height * scale)), max(side, round(width * scale)))
            picture = fit_frame(frame, size)
            boxes = crop_boxes(*size, side, num_crops)
            return np.stack([picture[top : top + side, left : left + side] for top, left in boxes])

        cropped, places = read_clips(source, num_frames, num_segments, fit=crops, rng=rng, start=start, end=end)
        pictures = torch.from_numpy(np.stack(cropped))  # (read, crops, side, side, 3)
        views = pictures[torch.from_numpy(places)].permute(0, 2, 1, 5, 3, 4)  # (segments, crops, frames, 3, h, w)
        return views.flatten(0, 1).contiguous()


class VideoMambaImageProcessor(BaseImageProcessor):
    """Pictures for models of pictures, and clips of frames that somebody else has read: what
    `pipeline("video-classification")` asks for in transformers before 5.23, which knows no video processors there and
    takes the first frames of a video.

    Args:
        size: side of the square frames that the model takes, in pixels. num_frames: frames of a clip; 1: of pictures.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int | dict[str, int] = 224, num_frames: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        self.size, self.num_frames = size, num_frames

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Pictures, as PIL has them or uint8 (height, width, 3), one or several, for the model.

        Returns:
            `pixel_values` uint8 (clips, frames, 3, size, size): every picture is a clip of its own where clips have
            one frame; else all are one clip, sampled as the frames of a video are, so that too few are given again.

        Raises:
            TypeError: an unknown setting.
        """
        single = hasattr(images, "convert") or getattr(images, "ndim", 4) == 3
        given = [images] if single else list(images)
        pictures = [np.asarray(each.convert("RGB") if hasattr(each, "convert") else each) for each in given]
        clips = [each[None] for each in pictures] if self.num_frames == 1 else np.stack(pictures)
        return VideoMambaVideoProcessor(self.size, self.num_frames).preprocess(clips, return_tensors, **kwargs)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool | str) or int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


VideoMambaVideoProcessor.register_for_auto_class("AutoVideoProcessor")
