"""The frame processor: videos of any kind to the pixels the model takes, and the settings that decide which."""

from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .frame_fitting import check_resize
from .frame_sampling import Sampling
from .picture_sources import is_picture
from .video_reader import FrameReader, open_video

SAMPLING_NAMES = ("fps", "num_frames", "start", "end", "max_frames")


class VideoMa2mbaVideosKwargs(VideosKwargs, total=False):
    """Settings of a call besides those of transformers."""

    start: float | None
    end: float | None
    max_frames: int | None
    resize_mode: str


def split_videos(videos: Any) -> list[Any]:
    """List the videos in what a caller passes as `videos`: one, a list of them, or a list of lists (one a prompt).

    A list of pictures (PIL images or arrays of three axes) is one video; an array of five axes is a batch.
    """
    if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple):
        return [videos]
    if len(videos) > 0 and all(is_picture(frame) for frame in videos):
        return [videos]
    return [video for item in videos for video in (split_videos(item) if isinstance(item, list | tuple) else [item])]


class VideoMa2mbaVideoProcessor(BaseVideoProcessor):
    """Samples and resizes frames; rescaling and normalising is left to the model, which does it on its device.

    Args:
        size: `{"height": pixels, "width": pixels}` of the frames the vision tower takes.
        resize_mode: "squash" (scale both sides freely), "crop" (cut the middle out) or "pad" (fill with black).
        fps: frames per second to look at.
        num_frames: so many frames spread evenly, instead of `fps`.
        max_frames: upper limit on frames of a video; more are thinned out evenly.

    A value given in a call wins over the one stored here; `fps` in a call also sets a stored `num_frames` aside, and
    the other way round. Works without torchvision.
    """

    model_input_names = ["pixel_values_videos", "num_frames"]
    valid_kwargs = VideoMa2mbaVideosKwargs
    size = {"height": 336, "width": 336}
    resize_mode = "squash"
    fps = 1.0
    num_frames = None
    max_frames = None
    do_sample_frames = True

    def __init__(
        self,
        size: dict[str, int] | None = None,
        resize_mode: str = "squash",
        fps: float | None = 1.0,
        num_frames: int | None = None,
        max_frames: int | None = None,
        **kwargs: Any,
    ):
        size = dict(size) if size is not None else {"height": 336, "width": 336}
        if not {"height", "width"} <= size.keys():
            raise ValueError(f"size must be a dict with 'height' and 'width', not {size}")
        check_resize((size["height"], size["width"]), resize_mode)
        Sampling(fps=fps, num_frames=num_frames, max_frames=max_frames)
        super().__init__(**kwargs)
        self.size = {"height": int(size["height"]), "width": int(size["width"])}
        self.resize_mode = resize_mode
        self.fps = fps
        self.num_frames = num_frames
        self.max_frames = max_frames

    def to_dict(self) -> dict[str, Any]:
        """Settings that are saved: those of this class, and where its code is found."""
        everything = super().to_dict()
        own = ("size", "resize_mode", "fps", "num_frames", "max_frames", "auto_map", "processor_class")
        kept = {name: everything[name] for name in own if name in everything}
        return {**kept, "video_processor_type": type(self).__name__}

    def sampling(self, **given: Any) -> Sampling:
        """The stored sampling settings, overruled by those of a call that are not None.

        Raises:
            ValueError: both `fps` and `num_frames` are given in one call, or a value is out of range.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if "fps" in given and "num_frames" in given:
            raise ValueError("give either fps or num_frames, not both")
        settings = {"fps": self.fps, "num_frames": self.num_frames, "max_frames": self.max_frames}
        if "fps" in given:
            settings["num_frames"] = None
        return Sampling(**{**settings, **given})

    def open(
        self,
        source: Any,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        max_frames: int | None = None,
    ) -> FrameReader:
        """Open one video for streaming at the model's frame size; takes and raises what `open_video` does.

        A reader is handed back as it is (its own sampling holds), provided its frames have the model's size.
        """
        size = (self.size["height"], self.size["width"])
        if hasattr(source, "chunks") and hasattr(source, "expected_frames"):
            if source.size != size:
                raise ValueError(f"{source.name}: the reader gives frames of {source.size}, the model takes {size}")
            return source
        sampling = self.sampling(fps=fps, num_frames=num_frames, start=start, end=end, max_frames=max_frames)
        return open_video(
            source,
            **{name: getattr(sampling, name) for name in SAMPLING_NAMES},
            size=size,
            resize_mode=self.resize_mode,
        )

    def preprocess(self, videos: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Read videos completely.

        Args:
            videos: one video, a list of videos, or a list of lists; see `open_video` for what a video can be.
            return_tensors: "pt" (default) or "np".
            kwargs: `fps`, `num_frames`, `start`, `end`, `max_frames` for this call; `return_metadata=True` adds
                "video_metadata", a list of dicts with name, duration, timestamps (seconds) and warnings of each video.

        Returns:
            `pixel_values_videos` uint8 `(sum F, 3, height, width)`, the frames of all videos one after the other, and
            `num_frames` int64 `(number of videos,)`.

        Raises:
            TypeError: an unknown setting.
            ValueError: what `open_video` raises.
        """
        return_metadata = kwargs.pop("return_metadata", False)
        unknown = kwargs.keys() - set(SAMPLING_NAMES)
        if unknown:
            raise TypeError(f"unknown settings for videos: {', '.join(sorted(unknown))}")
        sources = split_videos(videos)
        if not sources:
            raise ValueError("there are no videos to process")
        pixels, counts, metadata = [], [], []
        for source in sources:
            with self.open(source, **kwargs) as reader:
                frames = reader.read()
                pixels.append(torch.from_numpy(frames.pixels).permute(0, 3, 1, 2))
                counts.append(len(frames))
                metadata.append(
                    {
                        "name": reader.name,
                        "duration": reader.duration,
                        "timestamps": frames.timestamps.tolist(),
                        "warnings": list(reader.warnings),
                    }
                )
        data = {"pixel_values_videos": torch.cat(pixels).contiguous(), "num_frames": torch.tensor(counts)}
        if return_tensors == "np":
            data = {name: value.numpy() for name, value in data.items()}
        elif return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors must be 'pt' or 'np', not {return_tensors!r}")
        if return_metadata:
            data["video_metadata"] = metadata
        return BatchFeature(data)


VideoMa2mbaVideoProcessor.register_for_auto_class("AutoVideoProcessor")
