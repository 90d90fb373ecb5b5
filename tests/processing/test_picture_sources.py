"""Frames that are pictures already, in all their forms, give the same pixels."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from video_ma2mba.processing.video_reader import open_video
from video_ma2mba.processing.video_source_names import list_directory


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)


def encoded(frame: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, file_format)
    return buffer.getvalue()


def test_every_form_gives_the_same_frames(frames):
    tensor = torch.from_numpy(frames)
    forms = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "whole numbers": frames.astype(np.int64),
        "fractions": frames / 255,
        "float32": (frames / 255).astype(np.float32),
        "tensor": tensor,
        "tensor (F,3,H,W)": tensor.permute(0, 3, 1, 2),
        "half tensor": (tensor / 255).half(),
        "bfloat tensor with gradient": (tensor / 255).requires_grad_(),
        "PIL images": [Image.fromarray(frame) for frame in frames],
        "arrays": list(frames),
        "tensors (3,H,W)": list(tensor.permute(0, 3, 1, 2)),
        "tuple": tuple(frames),
        "encoded": [encoded(frame) for frame in frames],
    }
    for name, form in forms.items():
        chunk = open_video(form, fps=2).read()
        np.testing.assert_array_equal(chunk.pixels, frames, err_msg=name)
        assert chunk.timestamps.tolist() == [0, 0.5, 1, 1.5, 2], name


def test_one_picture_is_a_video_of_one_frame(frames, tmp_path):
    path = tmp_path / "picture.PNG"
    path.write_bytes(encoded(frames[0]))
    for form in (
        frames[0],
        torch.from_numpy(frames[0]),
        Image.fromarray(frames[0]),
        path,
        str(path),
        path.read_bytes(),
    ):
        reader = open_video(form)
        np.testing.assert_array_equal(reader.read().pixels, frames[:1])
        assert reader.expected_frames == 1 and reader.duration == 1.0


def test_all_pictures_are_taken_unless_told_otherwise(frames):
    assert len(open_video(frames, fps=25).read()) == 5
    assert open_video(frames, num_frames=2).read().timestamps.tolist() == [0, 4]
    assert open_video(frames, max_frames=3).read().timestamps.tolist() == [0, 2, 4]
    assert open_video(frames, fps=1, start=1, end=3).read().timestamps.tolist() == [1, 2]


def test_pictures_of_other_modes(frames):
    grey = Image.fromarray(frames[0]).convert("L")
    np.testing.assert_array_equal(open_video(grey).read().pixels[0], np.asarray(grey.convert("RGB")))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)
    np.testing.assert_array_equal(open_video(deep).read().pixels[0], np.asarray(grey.convert("RGB")))
    clear = Image.fromarray(frames[0]).convert("RGBA")
    np.testing.assert_array_equal(open_video(clear).read().pixels[0], frames[0])


def test_exif_orientation_is_honoured(frames):
    image, buffer = Image.fromarray(frames[0]), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(open_video(buffer.getvalue()).read().pixels[0], np.rot90(frames[0], -1))


def test_pictures_of_different_sizes(frames):
    mixed = [Image.fromarray(frames[0]), Image.fromarray(frames[1]).resize((20, 20))]
    assert open_video(mixed).read().pixels.shape == (2, 6, 8, 3)
    assert open_video(mixed, size=(4, 4)).read().pixels.shape == (2, 4, 4, 3)


def test_bad_pictures_are_refused(frames):
    for bad, reason in [
        (np.full((2, 4, 4, 3), np.nan), "NaN or infinite"),
        (torch.full((2, 3, 4, 4), float("inf")), "NaN or infinite"),
        (frames.astype(np.float32), "between 0 and 1"),
        (frames.astype(np.int32) * 2, "between 0 and 255"),
        (frames.astype(np.int32) - 300, "between 0 and 255"),
        (np.zeros((2, 4, 4, 3), bool), "type bool"),
        (np.zeros((2, 4, 4, 3), complex), "type complex128"),
        ([Image.fromarray(frames[0]), b"\x89PNG\r\n\x1a\nbroken"], "not a readable image"),
    ]:
        with pytest.raises(ValueError, match=reason):
            open_video(bad).read()
    for bad, reason in [
        (np.zeros((2, 4, 4)), r"shape"),
        (np.zeros((2, 4, 4, 4)), r"not \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3)), "holds no frames"),
        (np.zeros((2, 2, 4, 4, 3)), "shape"),
        ([frames[0], 3], "must be an image, not int"),
    ]:
        with pytest.raises(ValueError, match=reason):
            open_video(bad).read()


def test_animated_pictures_are_refused(frames):
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(buffer, "WEBP", save_all=True, append_images=rest)
    with pytest.raises(ValueError, match="animated"):
        open_video(buffer.getvalue()).read()


def test_gif_is_a_video(tmp_path, picture_of, read_numbers):
    path = tmp_path / "moving.gif"
    first, *rest = [Image.fromarray(picture_of(number)) for number in range(8)]
    first.save(path, save_all=True, append_images=rest, duration=500)
    assert read_numbers(open_video(path, fps=1).read().pixels) == [0, 2, 4, 6]


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=20))
def test_directories_are_sorted_by_number(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("frames")
    for number in numbers:
        (folder / f"clip2_frame{number}.jpg").touch()
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    (folder / "folder.png").mkdir()
    assert [path.name for path in list_directory(folder)] == [f"clip2_frame{number}.jpg" for number in sorted(numbers)]
