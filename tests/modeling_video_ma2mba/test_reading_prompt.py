"""Streaming read: the same state as one pass over everything, in bounded memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

VIDEO, PER_FRAME = 2, 4


def expanded(ids: list[int], frames: list[int]) -> torch.Tensor:
    counts = iter(frames)
    return torch.tensor(
        [[t for token in ids for t in ([VIDEO] * (next(counts) * PER_FRAME) if token == VIDEO else [token])]]
    )


def assert_same_state(found, expected):
    torch.testing.assert_close(found.ssm, expected.ssm, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.conv, expected.conv, rtol=1e-10, atol=1e-12)
    assert found.seen_tokens == expected.seen_tokens


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [2, 7], [5, 4], [3, 0, 6]])
@pytest.mark.parametrize("layout", ["frames first", "channels first", "normalised"])
def test_any_chunks_give_the_state_of_one_pass(make_model, raw_pixels, pieces, layout):
    model = make_model(dtype=torch.float64)
    pixels = raw_pixels(9)
    ids = [7, 8, VIDEO, 9]
    with torch.no_grad():
        expected = model(input_ids=expanded(ids, [9]), pixel_values_videos=pixels).past_key_values
    chunks = pixels.split(pieces)
    if layout == "frames first":
        chunks = [chunk.permute(0, 2, 3, 1).numpy() for chunk in chunks]
    if layout == "normalised":
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.image_mean, model.config.image_std))
        chunks = [(chunk.float() / 255 - mean) / std for chunk in chunks]
    seen = []
    state = model.read(torch.tensor([ids]), [iter(chunks)], on_frames=seen.append)
    assert_same_state(state, expected)
    assert seen == np.cumsum(pieces).tolist()
    assert state.metadata["frames"] == "9"


def test_several_videos_and_continuing(make_model, raw_pixels):
    model = make_model(dtype=torch.float64)
    first, second, third = raw_pixels(3, 1), raw_pixels(2, 2), raw_pixels(4, 3)
    ids = [VIDEO, 7, VIDEO, 8, VIDEO]
    with torch.no_grad():
        everything = torch.cat([first, second, third])
        expected = model(input_ids=expanded(ids, [3, 2, 4]), pixel_values_videos=everything).past_key_values

    def chunk(pixels, start):
        return SimpleNamespace(pixels=pixels.permute(0, 2, 3, 1).numpy(), timestamps=np.arange(len(pixels)) + start)

    state = model.read(torch.tensor([ids[:3]]), [[chunk(first, 0)], [chunk(second, 0)]])
    before = state.ssm.clone()
    whole = model.read(torch.tensor([ids[3:]]), [[chunk(third[:1], 0), chunk(third[1:], 1)]], state=state)
    assert_same_state(whole, expected)
    assert torch.equal(state.ssm, before), "the state that was continued must not change"
    assert (state.metadata["frames"], state.metadata["seconds"]) == ("5", "3.0")
    assert (whole.metadata["frames"], whole.metadata["seconds"]) == ("9", "6.0")


def test_rows_read_on_from_where_they_are(make_model, raw_pixels):
    model = make_model(dtype=torch.float64)
    states = [model.read(torch.tensor([[7, VIDEO]]), [[raw_pixels(n, n)]]) for n in (3, 1)]
    both = type(states[0]).from_stacked(
        torch.cat([s.conv for s in states], 1), torch.cat([s.ssm for s in states], 1), 5
    )
    found = model.read(torch.tensor([[VIDEO, 9]]), [[raw_pixels(6, 6)]], state=both)
    for row, state in enumerate(states):
        alone = model.read(torch.tensor([[VIDEO, 9]]), [[raw_pixels(6, 6)]], state=state)
        torch.testing.assert_close(found.ssm[:, row : row + 1], alone.ssm, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.conv[:, row : row + 1], alone.conv, rtol=1e-10, atol=1e-12)
    assert found.seen_tokens == 5 + 6 * PER_FRAME + 1


def test_nothing_is_asked_for_before_it_is_needed(make_model, raw_pixels):
    model = make_model()
    alive, most = 0, 0

    def chunks():
        nonlocal alive, most
        for _ in range(40):
            alive += 1
            most = max(most, alive)
            yield raw_pixels(4)
            alive -= 1

    state = model.read(torch.tensor([[7, VIDEO]]), [chunks()])
    assert most == 1
    assert state.metadata["frames"] == "160"
    assert state.nbytes == model.read(torch.tensor([[7]])).nbytes


def test_text_only(make_model):
    model = make_model(dtype=torch.float64)
    ids = torch.arange(10, 50)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).past_key_values
    assert_same_state(model.read(ids), expected)


def test_bad_input(make_model, raw_pixels):
    model = make_model()
    one = torch.tensor([[7, VIDEO]])
    with pytest.raises(ValueError, match="1 video placeholders, but 0 videos"):
        model.read(one)
    with pytest.raises(ValueError, match="1 video placeholders, but 2 videos"):
        model.read(one, [[raw_pixels(1)], [raw_pixels(1)]])
    with pytest.raises(ValueError, match="video 0 of the prompt has no frames"):
        model.read(one, [[]])
    with pytest.raises(ValueError, match="one prompt"):
        model.read(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        model.read(one, [[torch.full((1, 3, 16, 16), float("nan"))]])
