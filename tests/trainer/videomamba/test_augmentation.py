"""Augmentation: frames of a clip share random numbers, operations do what they are named, batches mix by shares."""

import numpy as np
import pytest
import torch
from PIL import Image

from video_ma2mba.trainer.videomamba.augmentation import (
    CROPS,
    OPERATIONS,
    Augmentation,
    draw_erasing,
    draw_randaugment,
    mix_batch,
    operations,
    soft_labels,
)

PICTURE = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)


def test_frames_of_a_clip_share_their_random_numbers():
    changed = 0
    for seed in range(12):
        whole = Augmentation(24, randaugment_ops=4)([PICTURE] * 3, np.random.default_rng(seed))
        assert whole.shape == (3, 24, 24, 3) and whole.dtype == np.uint8
        assert (whole == whole[:1]).all(), "the same picture stays the same picture"
        again = Augmentation(24, randaugment_ops=4)([PICTURE], np.random.default_rng(seed))
        assert (again[0] == whole[0]).all(), "a clip's length does not matter"
        changed += int((whole[0] != Augmentation(24)([PICTURE], np.random.default_rng(seed))[0]).any())
    assert changed > 6


def test_erasing_covers_one_rectangle_in_all_frames():
    boxes = [draw_erasing(np.random.default_rng(seed), 32) for seed in range(50)]
    for top, left, tall, wide in boxes:
        assert 0 <= top <= 32 - tall and 0 <= left <= 32 - wide
        assert 0.01 < tall * wide / 32**2 < 0.36
    plain = Augmentation(32, "none", flip=False)
    erased = Augmentation(32, "none", flip=False, erase=1.0)
    clip = plain([PICTURE] * 2, np.random.default_rng(1))
    found = erased([PICTURE] * 2, np.random.default_rng(1)) != clip
    rows, columns = np.nonzero(found.any((0, 3)).any(1))[0], np.nonzero(found.any((0, 3)).any(0))[0]
    inside = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert inside.mean() > 0.95 and found.sum() == inside.sum()
    assert not Augmentation(32, erase=0.0).erase
    shares = [(erased.__class__(32, "none", False, erase=0.25)([PICTURE], np.random.default_rng(s)) != clip[0]).any()
              for s in range(200)]  # fmt: skip
    assert 0.15 < np.mean(shares) < 0.35


def test_crops_lie_within_the_picture_and_flips_are_half():
    for name, crop in CROPS.items():
        for seed in range(40):
            left, top, right, bottom = crop(40, 60, np.random.default_rng(seed))
            assert -1e-9 <= left < right <= 60 + 1e-9 and -1e-9 <= top < bottom <= 40 + 1e-9, name
            area = (right - left) * (bottom - top)
            least = {"random": 0.08, "gentle": 0.5, "scales": 0.66**2 * 2 / 3, "none": 2 / 3}[name]
            assert area >= least * 2400 - 1e-6
            if name == "scales":
                sides = {round((right - left) / 40, 3), round((bottom - top) / 40, 3)}
                assert sides <= {1.0, 0.875, 0.75, 0.66}
    plain = Image.fromarray(PICTURE).resize((20, 20), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    flips = 0
    for seed in range(100):
        found = Augmentation(20, "none")([PICTURE], np.random.default_rng(seed))[0]
        mirrored = (found == np.asarray(plain)[:, ::-1]).all()
        assert mirrored or (found == np.asarray(plain)).all()
        flips += int(mirrored)
        same = Augmentation(20, "none", flip=False)([PICTURE], np.random.default_rng(seed))[0]
        assert (same == np.asarray(plain)).all()
    assert 35 < flips < 65
    with pytest.raises(ValueError, match="crop='x' is not valid"):
        Augmentation(8, "x")
    with pytest.raises(ValueError, match="erase=2 is not valid"):
        Augmentation(8, erase=2)


def test_randaugment_draws_all_operations_with_half_their_number():
    grey = Image.fromarray(PICTURE[:32, :32])
    counts = [len(draw_randaugment(np.random.default_rng(seed), 4, 9, 0.5, 32)) for seed in range(400)]
    assert 1.8 < np.mean(counts) < 2.2 and max(counts) == 4
    known = operations(32)
    assert tuple(known) == OPERATIONS and len(known) == 15
    results = {name: np.asarray(known[name](0.9)(grey)) for name in known}
    assert len({result.tobytes() for result in results.values()}) == 15, "each does something of its own"
    plain = np.asarray(grey)
    assert (results["invert"] == 255 - plain).all() and (results["posterize"] == plain & 0x80).all()
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "color", "contrast", "brightness"):
        assert (np.asarray(known[name](0.0)(grey)) == plain).all(), f"{name} by nothing changes nothing"
    half = known["translate_x"](0.5 / 0.45)(grey)
    assert (np.asarray(half)[:, :15] == plain[:, 16:31]).all()
    assert (np.asarray(known["solarize"](-1.0)(grey)) == 255 - plain).all()
    for seed in range(60):
        for change in draw_randaugment(np.random.default_rng(seed), 4, 9, 0.5, 32):
            result = change(grey)
            assert result.size == grey.size and result.mode == "RGB"


def test_soft_labels_and_mixing():
    soft = soft_labels(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(soft, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    pixels = torch.rand(4, 2, 3, 16, 16)
    targets = torch.eye(4)
    kinds = set()
    for seed in range(20):
        mixed, labels = mix_batch(pixels, targets, 0.8, 1.0, np.random.default_rng(seed))
        share = float(labels[0, 0])
        torch.testing.assert_close(labels, share * targets + (1 - share) * targets.flip(0))
        blended = share * pixels + (1 - share) * pixels.flip(0)
        if torch.allclose(mixed, blended, atol=1e-6):
            kinds.add("mixup")
        else:
            kept = (mixed == pixels).all(2)  # (B, T, H, W)
            assert (kept == kept[:1, :1]).all(), "one rectangle for all clips and frames"
            assert ((mixed == pixels.flip(0)).all(2) | kept).all()
            assert float(kept[0, 0].float().mean()) == pytest.approx(share, abs=1e-6)
            kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}
    same = mix_batch(pixels, targets, 0.0, 0.0, np.random.default_rng(0))
    assert same[0] is pixels and same[1] is targets
