"""The frame processor: shapes, settings, and which of two settings wins."""

import numpy as np
import pytest
import torch
from PIL import Image

from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor, split_videos
from video_ma2mba.processing.video_reader import open_video


@pytest.fixture
def clip(make_video):
    return make_video("clip.mp4", frames=90, gop=12, b_frames=2)


def test_output(video_processor, clip):
    frames = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
    output = video_processor([clip, frames])
    assert output["pixel_values_videos"].shape == (5, 3, 32, 32)
    assert output["pixel_values_videos"].dtype == torch.uint8 and output["pixel_values_videos"].is_contiguous()
    assert output["num_frames"].tolist() == [3, 2] and output["num_frames"].dtype == torch.int64
    streamed = np.concatenate([chunk.pixels for chunk in video_processor.open(clip).chunks(2)])
    np.testing.assert_array_equal(output["pixel_values_videos"][:3].permute(0, 2, 3, 1).numpy(), streamed)
    arrays = video_processor(frames, return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values_videos"], output["pixel_values_videos"][3:].numpy())
    with pytest.raises(ValueError, match="return_tensors"):
        video_processor(frames, return_tensors="tf")


def test_settings_of_a_call_win(clip):
    processor = VideoMa2mbaVideoProcessor(size={"height": 8, "width": 16}, fps=2, max_frames=50)

    def count(**settings):
        output = processor(clip, **settings)
        assert output["pixel_values_videos"].shape[1:] == (3, 8, 16)
        return int(output["num_frames"])

    assert count() == 6
    assert count(fps=4) == 12
    assert count(num_frames=5) == 5
    assert count(fps=30) == 50
    assert count(fps=30, max_frames=7) == 7
    assert count(start=1, end=2.5) == 3
    assert count(fps=None) == 6
    counted = VideoMa2mbaVideoProcessor(size={"height": 8, "width": 16}, num_frames=4)
    assert int(counted(clip)["num_frames"]) == 4
    assert int(counted(clip, fps=1)["num_frames"]) == 3
    assert int(counted(clip, num_frames=7)["num_frames"]) == 7


def test_wrong_settings_are_refused(video_processor, clip):
    for settings, error, reason in [
        ({"fps": 0}, ValueError, "fps must be more than 0"),
        ({"fps": 1, "num_frames": 3}, ValueError, "not both"),
        ({"num_frames": -1}, ValueError, "num_frames"),
        ({"frames": 3}, TypeError, "unknown settings for videos: frames"),
    ]:
        with pytest.raises(error, match=reason):
            video_processor(clip, **settings)
    with pytest.raises(ValueError, match="no videos"):
        video_processor([])
    for settings, reason in [
        ({"fps": -1}, "fps"),
        ({"fps": None}, "either fps or num_frames"),
        ({"size": {"shortest_edge": 3}}, "'height' and 'width'"),
        ({"size": {"height": 0, "width": 3}}, "at least 1 pixel"),
        ({"resize_mode": "zoom"}, "resize_mode"),
    ]:
        with pytest.raises(ValueError, match=reason):
            VideoMa2mbaVideoProcessor(**settings)


def test_readers_are_taken_as_they_are(video_processor, clip):
    reader = open_video(clip, fps=10, size=(32, 32))
    assert int(video_processor([reader], fps=1)["num_frames"]) == 30
    with pytest.raises(ValueError, match=r"the model takes \(32, 32\)"):
        video_processor([open_video(clip)])


def test_metadata(video_processor, clip):
    (metadata,) = video_processor(clip, return_metadata=True)["video_metadata"]
    assert metadata["name"] == str(clip) and metadata["duration"] == pytest.approx(3, abs=0.01)
    assert metadata["timestamps"] == pytest.approx([0, 1, 2]) and metadata["warnings"] == []


def test_splitting_of_what_is_passed_as_videos():
    image, array = Image.new("RGB", (4, 4)), np.zeros((2, 4, 4, 3))
    assert split_videos("a.mp4") == ["a.mp4"]
    assert split_videos(["a.mp4", "b.mp4"]) == ["a.mp4", "b.mp4"]
    assert split_videos([["a.mp4"], ["b.mp4", "c.mp4"]]) == ["a.mp4", "b.mp4", "c.mp4"]
    assert split_videos([image, image]) == [[image, image]]
    assert split_videos([[image, image], [image]]) == [[image, image], [image]]
    assert len(split_videos(array)) == 1
    assert len(split_videos([array, array])) == 2
    assert len(split_videos(list(array))) == 1
    assert len(split_videos(np.zeros((3, 2, 4, 4, 3)))) == 3
    assert len(split_videos(torch.zeros(3, 2, 3, 4, 4))) == 3
    assert split_videos({"path": "a.mp4"}) == [{"path": "a.mp4"}]


def test_saved_and_loaded(tmp_path):
    processor = VideoMa2mbaVideoProcessor(
        size={"height": 24, "width": 40}, resize_mode="crop", fps=0.5, num_frames=9, max_frames=11
    )
    processor.save_pretrained(tmp_path)
    loaded = VideoMa2mbaVideoProcessor.from_pretrained(tmp_path)
    for name in ("size", "resize_mode", "fps", "num_frames", "max_frames"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert loaded.to_dict() == processor.to_dict()
    assert VideoMa2mbaVideoProcessor.from_pretrained(tmp_path, fps=3.0).fps == 3.0
