"""Resizing equals Pillow's bicubic filter, CLIP's own, and keeps what each mode promises."""

import numpy as np
import pytest
from PIL import Image

from video_ma2mba.processing.frame_fitting import fit_frame


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(24, 24), (200, 150), (1, 1), (61, 99)])
def test_squash_is_pillow_bicubic(picture, size):
    expected = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit_frame(picture, size), np.asarray(expected))


def test_same_size_is_left_alone(picture):
    assert fit_frame(picture, (60, 100)) is picture
    assert fit_frame(picture, None) is picture


def test_crop_takes_the_middle():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200  # the middle square
    fitted = fit_frame(picture, (20, 20), "crop")
    assert fitted.shape == (20, 20, 3)
    assert (fitted[:, 2:-2] == 200).all()
    np.testing.assert_array_equal(fit_frame(picture.transpose(1, 0, 2), (20, 20), "crop")[2:-2], 200)


def test_pad_keeps_everything():
    picture = np.full((40, 100, 3), 200, np.uint8)
    fitted = fit_frame(picture, (20, 20), "pad")
    assert (fitted[6:14] == 200).all() and (fitted[:6] == 0).all() and (fitted[14:] == 0).all()
    thin = fit_frame(np.full((1, 1000, 3), 200, np.uint8), (20, 20), "pad")
    assert thin.shape == (20, 20, 3) and (thin == 200).any()
