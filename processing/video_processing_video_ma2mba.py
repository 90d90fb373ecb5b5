"""The frame processor: videos of any kind to the pixels the model takes, and the settings that decide which."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .frame_fitting import check_resize
from .frame_sampling import MAX_SAMPLES, Sampling
from .picture_sources import split_videos
from .video_reader import FrameReader, open_video

SAMPLING_NAMES = ("fps", "num_frames", "start", "end", "max_frames")

_FITTED = "frames are always fitted to the size that the model takes; resize_mode of the processor says how"
_BY_MODEL = "pixels stay uint8 0..255 here, and the model scales and normalises them"
_READER = "videos are decoded by this package's own reader"
FIXED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_resize": ((True,), _FITTED),
    "do_center_crop": ((False,), _FITTED),
    "do_pad": ((False,), _FITTED),
    "crop_size": ((), _FITTED),
    "size": ((), _FITTED),
    "resample": ((), _FITTED),
    "size_divisor": ((), _FITTED),
    "do_rescale": ((True,), _BY_MODEL),
    "rescale_factor": ((1 / 255,), _BY_MODEL),
    "do_normalize": ((True,), _BY_MODEL),
    "image_mean": ((), _BY_MODEL),
    "image_std": ((), _BY_MODEL),
    "do_convert_rgb": ((True,), "frames are always made RGB"),
    "data_format": (("channels_first", "FIRST"), "pixels come as (frames, 3, height, width)"),
    "input_data_format": ((), "where the channels are is told by the frames' shape"),
    "video_load_backend": (("pyav",), _READER),
    "load_audio_from_video": ((False,), "the model hears nothing"),
    "sample_indices_fn": ((), "frames are chosen by fps, num_frames, start, end and max_frames"),
    "audio": ((), "the model hears nothing"),
}
"""Settings of transformers' processors that have one value here: what is accepted besides None, why nothing else."""


def drop_fixed_settings(given: dict[str, Any], size: dict[str, int]) -> dict[str, Any]:
    """`given` without the settings that say what is done anyway.

    Raises:
        ValueError: one of them says something else.
    """
    for name in [name for name in given if name in FIXED_SETTINGS]:
        accepted, reason = FIXED_SETTINGS[name]
        value = given[name]
        same_size = name == "size" and value is not None and dict(value) == {**dict(value), **size}
        if value is not None and value not in accepted and not same_size:
            raise ValueError(f"{name}={value!r:.60} is not possible here: {reason}")
    return {name: value for name, value in given.items() if name not in FIXED_SETTINGS}


def list_rates(metadata: Any, videos: int) -> Iterator[Any]:
    """The entries of `video_metadata`, one for each of so many videos: None, one, a list, or lists of each prompt.

    Raises:
        ValueError: as many as there are videos are not given.
    """
    rates = list(metadata) if isinstance(metadata, list | tuple) else [metadata] * videos
    rates = [rate for group in rates for rate in (group if isinstance(group, list | tuple) else [group])]
    if len(rates) != videos:
        raise ValueError(f"video_metadata is given for {len(rates)} videos, but there are {videos}")
    return iter(rates)


def at_rate(source: Any, metadata: Any, sampling: Sampling) -> Any:
    """Frames given as pictures, of which `metadata` (a dict or object with `fps`) tells the rate, sampled anew."""
    rate = metadata.get("fps") if isinstance(metadata, dict) else getattr(metadata, "fps", None)
    frames = source
    if isinstance(source, np.ndarray | torch.Tensor):
        frames = list(source) if source.ndim == 4 else None
    if rate is None or not isinstance(frames, list | tuple) or len(frames) < 2:
        return source
    chosen = sampling.choose(np.arange(len(frames)) / rate, len(frames) / rate, "video_metadata")
    return [frames[place] for place in chosen]


class VideoMa2mbaVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict of transformers, which is not followed
    """Settings of a call besides those of transformers."""

    start: float | None
    end: float | None
    max_frames: int | None
    resize_mode: str


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
    fps: float | None = 1.0
    num_frames: int | None = None
    max_frames: int | None = None
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
        if given.pop("do_sample_frames", True) is False:
            if "fps" in given or "num_frames" in given:
                raise ValueError("do_sample_frames=False takes every frame: leave fps and num_frames out")
            given["num_frames"] = MAX_SAMPLES
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
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
    ) -> FrameReader:
        """Open one video for streaming at the model's frame size; takes and raises what `open_video` does.

        `do_sample_frames=False` takes every frame. `video_metadata`, a dict or object with `fps`, is the rate of
        frames that are given as pictures; without it they count as sampled already.

        A reader is handed back as it is (its own sampling holds), provided its frames have the model's size.
        """
        size = (self.size["height"], self.size["width"])
        if hasattr(source, "chunks") and hasattr(source, "expected_frames"):
            if source.size != size:
                raise ValueError(f"{source.name}: the reader gives frames of {source.size}, the model takes {size}")
            return source
        chosen = {"fps": fps, "num_frames": num_frames, "start": start, "end": end, "max_frames": max_frames}
        sampling = self.sampling(**chosen, do_sample_frames=do_sample_frames)
        if video_metadata is not None and do_sample_frames is not False:
            source = at_rate(source, video_metadata, sampling)
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
            kwargs: `fps`, `num_frames`, `start`, `end`, `max_frames`, `do_sample_frames` for this call;
                `video_metadata` (one for each video, see `open`); `device` for the result; settings of transformers'
                processors that say what is done anyway (`FIXED_SETTINGS`); `return_metadata=True` adds
                "video_metadata", a list of dicts with name, duration, timestamps (seconds) and warnings of each video.

        Returns:
            `pixel_values_videos` uint8 `(sum F, 3, height, width)`, the frames of all videos one after the other, and
            `num_frames` int64 `(number of videos,)`.

        Raises:
            TypeError: an unknown setting.
            ValueError: a setting that is not possible, and what `open_video` raises.
        """
        return_metadata = kwargs.pop("return_metadata", False)
        device = kwargs.pop("device", None)
        metadata = kwargs.pop("video_metadata", None)
        kwargs = drop_fixed_settings(kwargs, self.size)
        unknown = kwargs.keys() - {*SAMPLING_NAMES, "do_sample_frames"}
        if unknown:
            raise TypeError(f"unknown settings for videos: {', '.join(sorted(unknown))}")
        sources = split_videos(videos)
        if not sources:
            raise ValueError("there are no videos to process")
        rates = list_rates(metadata, len(sources))
        pixels, counts, metadata = [], [], []
        for source, rate in zip(sources, rates, strict=True):
            with self.open(source, video_metadata=rate, **kwargs) as reader:
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
        tensors = {"pixel_values_videos": torch.cat(pixels).contiguous(), "num_frames": torch.tensor(counts)}
        if device is not None:
            tensors = {name: value.to(device) for name, value in tensors.items()}
        data: dict[str, Any] = dict(tensors)
        if return_tensors == "np":
            data = {name: value.numpy() for name, value in tensors.items()}
        elif return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors must be 'pt' or 'np', not {return_tensors!r}")
        if return_metadata:
            data["video_metadata"] = metadata
        return BatchFeature(data)


VideoMa2mbaVideoProcessor.register_for_auto_class("AutoVideoProcessor")
