"""`torch.export` of a forward pass: with video, with masks, of batches; the program is right for other inputs, too."""

import pytest
import torch

VIDEO, PER_FRAME = 2, 4


def batch_of(raw_pixels, rows, seed=0):
    """Rows of (words, frames, words, padding in front, padding behind)."""
    draw = torch.Generator().manual_seed(seed)
    ids, mask, frames = [], [], 0
    for before, count, after, left, right in rows:
        words = [torch.randint(10, 200, (n,), generator=draw) for n in (before, after)]
        row = torch.cat([words[0], torch.full((count * PER_FRAME,), VIDEO), words[1]])
        ids.append(torch.cat([torch.full((left,), 1), row, torch.full((right,), 1)]))
        mask.append(torch.tensor([0] * left + [1] * len(row) + [0] * right))
        frames += count
    found = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}
    return {**found, "pixel_values_videos": raw_pixels(frames, seed=seed)} if frames else found


def check(model, inputs, *others, **settings):
    program = torch.export.export(model, (), {**inputs, "use_cache": False, **settings}, strict=False).module()
    for given in (inputs, *others):
        found = program(**given, use_cache=False, **settings).logits
        expected = model(**given, use_cache=False, **settings).logits
        real = (
            given["attention_mask"].bool() if "attention_mask" in given else torch.ones_like(given["input_ids"]).bool()
        )
        if found.shape[1] == real.shape[1]:
            found, expected = found[real], expected[real]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def pixels():
    def make(count, seed=0):
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)

    return make


@torch.no_grad()
def test_one_prompt_with_video(make_model, pixels):
    model = make_model()
    one, other = (batch_of(pixels, [(before, 3, after, 0, 0)], seed) for seed, before, after in ((0, 2, 9), (1, 7, 4)))
    check(model, one, other)
    unmasked = [{name: value for name, value in given.items() if name != "attention_mask"} for given in (one, other)]
    check(model, *unmasked)
    check(model, one | {"num_frames": torch.tensor([3])})
    check(model, one, other, logits_to_keep=1)


@torch.no_grad()
def test_batches_with_padding(make_model, pixels):
    """Exported with one kind of padding, run with others: nothing of the mask may have become a constant."""
    model = make_model()
    left = batch_of(pixels, [(2, 2, 5, 0, 0), (1, 1, 3, 7, 0)])
    right = batch_of(pixels, [(1, 1, 4, 0, 6), (3, 2, 4, 0, 0)], seed=1)
    whole = batch_of(pixels, [(2, 2, 5, 0, 0), (6, 1, 5, 0, 0)], seed=2)
    assert left["input_ids"].shape == right["input_ids"].shape == whole["input_ids"].shape
    check(model, left, right, whole)
    check(model, whole, left, right)


@torch.no_grad()
def test_text(make_model, pixels):
    model = make_model()
    given = [
        batch_of(pixels, [(9, 0, 8, 3, 0), (20, 0, 0, 0, 0)]),
        batch_of(pixels, [(20, 0, 0, 0, 0), (2, 0, 2, 0, 16)], 1),
    ]
    check(model, *given)
    check(model, {"input_ids": given[0]["input_ids"][1:]}, {"input_ids": given[1]["input_ids"][:1]})


@torch.no_grad()
def test_features_and_normalised_frames(make_model, pixels):
    model = make_model()
    one = batch_of(pixels, [(2, 3, 9, 0, 0)])
    frames = one["pixel_values_videos"].float() / 255
    check(model, one | {"pixel_values_videos": frames}, one | {"pixel_values_videos": frames * 0.5})

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, frames):
            return self.model.get_video_features(frames)

    program = torch.export.export(Features(), (frames,), strict=False).module()
    torch.testing.assert_close(program(frames * 0.5), model.get_video_features(frames * 0.5), rtol=1e-4, atol=1e-5)


def test_the_saved_program(make_model, pixels, tmp_path):
    model = make_model()
    given = batch_of(pixels, [(2, 2, 5, 0, 0)]) | {"use_cache": False}
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), given, strict=False), tmp_path / "model.pt2")
        expected = model(**given).logits
    found = torch.export.load(tmp_path / "model.pt2").module()(**given)
    torch.testing.assert_close(found["logits"] if isinstance(found, dict) else found.logits, expected)
