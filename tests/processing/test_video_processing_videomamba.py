"""VideoMamba's clips: sparse sampling by its formulas, views, and what pipelines make of them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification
from video_ma2mba.processing.video_processing_videomamba import (
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
    crop_boxes,
    sparse_frames,
)


def test_testing_takes_the_frames_of_the_formula():
    for frames, count, segments in ((90, 8, 1), (90, 8, 4), (300, 16, 3), (5, 8, 2), (1, 4, 1)):
        part = (frames - 1) / count
        expected = [
            [min(int(np.round(part * i)) + int(part / (segments + 1) * (k + 1)), frames - 1) for i in range(count)]
            for k in range(segments)
        ]
        assert sparse_frames(frames, count, segments).tolist() == expected
    assert sparse_frames(90, 8).tolist() == [[5, 16, 27, 38, 49, 61, 72, 83]]


def test_training_takes_a_frame_of_every_part_at_random():
    drawn = sparse_frames(90, 8, 500, np.random.default_rng(0))
    part = 89 / 8
    for i in range(8):
        low, high = round(part * i), round(part * (i + 1))
        assert set(drawn[:, i]) == set(range(low, high + 1))
    assert (np.diff(drawn) >= 0).all() and drawn.max() <= 89


def test_crops_are_spread_along_the_longer_side():
    assert crop_boxes(224, 398, 224, 3) == [(0, 0), (0, 87), (0, 174)]
    assert crop_boxes(398, 224, 224, 3) == [(0, 0), (87, 0), (174, 0)]
    assert crop_boxes(224, 398, 224, 1) == [(0, 87)]
    assert crop_boxes(224, 224, 224, 3) == [(0, 0)] * 3


def pictures(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose brightness is their number; the left half is darker by one."""
    video = np.repeat(np.arange(count, dtype=np.uint8)[:, None, None, None] * 2, height, 1)
    video = np.repeat(np.repeat(video, width, 2), 3, 3)
    video[:, :, : width // 2] += 100
    return video


def test_a_clip_shows_the_frames_it_should():
    clip = VideoMambaVideoProcessor(size=32, num_frames=4)(pictures(41), return_tensors="pt")["pixel_values"]
    assert clip.shape == (1, 4, 3, 32, 32) and clip.dtype == torch.uint8
    assert (clip[0, :, 0, 0, -1] // 2).tolist() == sparse_frames(41, 4)[0].tolist()


def test_views_are_clips_times_crops():
    processor = VideoMambaVideoProcessor(size=32, num_frames=4, num_segments=2, num_crops=3)
    views = processor(pictures(41), return_tensors="pt")["pixel_values"]
    assert views.shape == (1, 6, 4, 3, 32, 32)
    for view, clip in zip(views[0].unflatten(0, (2, 3)), sparse_frames(41, 4, 2), strict=True):
        left, middle, right = view
        assert (right[:, 0, 0, -1] // 2).tolist() == clip.tolist()
        assert (left[:, 0, 0, 0] - 100 == right[:, 0, 0, -1]).all()
        assert (middle[:, 0, 0, 0] > middle[:, 0, 0, -1]).all()
    single = processor(pictures(41), num_segments=1, num_crops=1, return_tensors="pt")["pixel_values"]
    assert single.shape == (1, 4, 3, 32, 32)


def test_seeds_decide_on_training_clips_and_bad_settings_are_refused():
    processor = VideoMambaVideoProcessor(size=32, num_frames=4)
    one, same, other = (processor(pictures(41), seed=s)["pixel_values"] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="num_frames must be a whole number of at least 1, not 0"):
        VideoMambaVideoProcessor(num_frames=0)
    with pytest.raises(ValueError, match="num_segments must be a whole number of at least 1, not '2'"):
        processor(pictures(4), num_segments="2")
    with pytest.raises(ValueError, match=r"there is no frame from 99 s on, the last is at \d"):
        processor(pictures(4), start=99)
    with pytest.raises(TypeError):
        processor(pictures(4), colour="red")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = VideoMambaConfig(
        **dict(hidden_size=16, num_hidden_layers=1, state_size=4, image_size=32, num_frames=4),
        id2label={i: f"thing {i}" for i in range(7)},
    )
    VideoMambaForVideoClassification(config).eval().save_pretrained(folder)
    VideoMambaVideoProcessor(size=32, num_frames=4).save_pretrained(folder)
    return folder


@pytest.fixture
def video_file(make_video, tmp_path):
    return str(make_video(tmp_path / "some.mp4"))


def expected_classes(folder, video: str, **views) -> dict[str, float]:
    model = VideoMambaForVideoClassification.from_pretrained(folder).eval()
    pixels = AutoVideoProcessor.from_pretrained(folder)(video, return_tensors="pt", **views)["pixel_values"]
    with torch.no_grad():
        scores = model(pixels).logits.softmax(-1)[0]
    return {f"thing {i}": float(score) for i, score in enumerate(scores)}


def test_transformers_own_pipeline_answers_with_labels(classifier, video_file):
    pipe = pipeline("video-classification", model=str(classifier), device="cpu")
    answers = pipe(video_file, top_k=3)
    expected = expected_classes(classifier, video_file)
    assert [a["label"] for a in answers] == sorted(expected, key=expected.get, reverse=True)[:3]
    assert [a["score"] for a in answers] == pytest.approx([expected[a["label"]] for a in answers], rel=1e-4)


def test_pipelines_that_read_frames_themselves_find_a_processor_of_pictures(classifier):
    """As those of transformers before 5.23 do (`tests/compat/core_checks.py` runs them)."""
    frames = list(np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8))
    found = AutoImageProcessor.from_pretrained(str(classifier))
    assert type(found) is VideoMambaImageProcessor
    for given in (frames, frames[:3]):  # fewer than a clip: some again
        pixels = found(given, return_tensors="pt")["pixel_values"]
        video = AutoVideoProcessor.from_pretrained(str(classifier))(np.stack(given), return_tensors="pt")
        assert pixels.shape == (1, 4, 3, 32, 32) and torch.equal(pixels, video["pixel_values"])


def test_models_of_pictures_answer_in_transformers_own_pipeline(tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, state_size=4, image_size=32, tubelet_size=None)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**sizes, id2label={0: "cat", 1: "dog"})).eval()
    model.save_pretrained(tmp_path)
    VideoMambaVideoProcessor(size=32, num_frames=1).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), np.uint8)
    images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1]).convert("RGBA")]
    found = pipeline("image-classification", model=str(tmp_path))(images, top_k=2)
    clips = VideoMambaVideoProcessor(size=32, num_frames=1)([each[None] for each in pixels])["pixel_values"]
    for entries, shares in zip(found, model(clips).logits.softmax(-1).tolist(), strict=True):
        assert {entry["label"]: entry["score"] for entry in entries} == pytest.approx(
            dict(zip(("cat", "dog"), shares, strict=True)), rel=1e-4
        )
    processor = AutoImageProcessor.from_pretrained(str(tmp_path))
    for given in (list(pixels), pixels, [Image.fromarray(each) for each in pixels]):
        assert torch.equal(processor(given)["pixel_values"], clips)
    assert torch.equal(processor(pixels[0])["pixel_values"], clips[:1])


def test_the_command_names_classes(classifier, video_file):
    result = CliRunner().invoke(app, ["classify", video_file, "--model", str(classifier), "--top", "2", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    expected = expected_classes(classifier, video_file)
    assert record["video"] == video_file and len(record["classes"]) == 2
    for entry in record["classes"]:
        assert entry["score"] == pytest.approx(expected[entry["label"]], rel=1e-4)
    views = ["--segments", "2", "--crops", "3"]
    shown = CliRunner().invoke(app, ["classify", video_file, "--model", str(classifier), *views]).stdout.splitlines()
    averaged = expected_classes(classifier, video_file, num_segments=2, num_crops=3)
    assert len(shown) == 5 and shown[0].split("  ")[1] == max(averaged, key=averaged.get)


def test_one_broken_video_does_not_stop_the_others(classifier, video_file, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    words = ["classify", str(broken), video_file, str(tmp_path / "none.mp4"), "--model", str(classifier), "--json"]
    result = CliRunner().invoke(app, words)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1 and ["error" in line for line in lines] == [True, False, True]
    assert result.stderr.endswith("1 of 3 videos classified, 2 failed\n") and "none.mp4: no such file" in result.stderr


def test_a_model_that_gives_no_numbers_is_told(classifier, video_file, tmp_path):
    model = VideoMambaForVideoClassification.from_pretrained(classifier)
    model.head.bias.data[3] = float("nan")
    for saved in (model, VideoMambaVideoProcessor(size=32, num_frames=4)):
        saved.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["classify", video_file, "--model", str(tmp_path), "--json"])
    assert result.exit_code == 2 and "does not answer with numbers" in result.stderr and not result.stdout


def test_other_models_are_refused_in_one_line(tmp_path, video_file):
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, image_size=32)
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["classify", video_file, "--model", str(tmp_path)])
    assert result.exit_code == 2 and "without a classifier" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


REMOTE = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import importlib.util
assert importlib.util.find_spec("video_ma2mba") is None
import torch
from transformers import AutoModel, AutoModelForVideoClassification, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
folder, video = sys.argv[1:]
remote = {"trust_remote_code": True}
model = AutoModelForVideoClassification.from_pretrained(folder, **remote).eval()
pixels = AutoVideoProcessor.from_pretrained(folder, **remote)(video, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    print(model(pixels).logits.softmax(-1)[0].tolist())
assert AutoModel.from_pretrained(folder, **remote).config.model_type == "videomamba"
assert "torchvision" not in sys.modules
"""


def test_a_saved_folder_works_without_the_package_and_holds_no_more_than_it_needs(classifier, video_file, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(classifier), video_file],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    expected = expected_classes(classifier, video_file)
    assert json.loads(run.stdout.splitlines()[-1]) == pytest.approx(list(expected.values()), rel=1e-4)
    files = {path.stem for path in classifier.glob("*.py")}
    assert {"modeling_videomamba", "video_processing_videomamba", "ops_selective_scan"} <= files
    assert not any("ma2mba" in name or name.startswith(("decode_", "state_", "recompute_")) for name in files)
