"""State files of half the size: what is rounded, by how much, and that it is said."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ma2mba import VideoState


@pytest.fixture
def state() -> VideoState:
    conv, ssm = torch.randn(2, 3, 96, 3), torch.randn(2, 3, 4, 16, 64) * 10
    return VideoState.from_stacked(conv, ssm, 7, {"model": "tiny"})


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_half_the_file_and_one_rounding(state, tmp_path, dtype, bits):
    whole, half = tmp_path / "whole.state", tmp_path / "half.state"
    state.save(whole)
    state.save(half, dtype)
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    found = VideoState.load(half)
    assert found.ssm.dtype == torch.float32, "arithmetic goes on in fp32"
    assert ((found.ssm - state.ssm).abs() <= state.ssm.abs() * 2.0**-bits).all()
    assert not torch.equal(found.ssm, state.ssm)
    assert found.seen_tokens == 7 and found.metadata == {"model": "tiny", "rounded_to": str(dtype).split(".")[1]}
    assert state.metadata == {"model": "tiny"}, "the state in memory is not rounded"
    found.save(whole)  # exactly this time, and still known to have been rounded
    assert torch.equal(VideoState.load(whole).ssm, found.ssm)
    assert VideoState.load(whole).metadata == found.metadata


def test_as_it_is_by_default(state, tmp_path):
    for dtype in (None, torch.float32):
        state.save(tmp_path / "film.state", dtype)
        found = VideoState.load(tmp_path / "film.state")
        assert torch.equal(found.ssm, state.ssm) and torch.equal(found.conv, state.conv)
        assert "rounded_to" not in found.metadata


def test_what_cannot_be_stored_is_refused(state, tmp_path):
    with pytest.raises(ValueError, match="bfloat16, float16 or as it is, not in torch.int8"):
        state.save(tmp_path / "film.state", torch.int8)
    state.ssm[0, 0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="too large for torch.float16: save it in bfloat16"):
        state.save(tmp_path / "film.state", torch.float16)
    assert not list(tmp_path.iterdir())
    state.save(tmp_path / "film.state", torch.bfloat16)
    assert VideoState.load(tmp_path / "film.state").ssm.isfinite().all()


def test_types_that_are_never_written_are_not_read(state, tmp_path):
    file = tmp_path / "film.state"
    state.save(file)
    tensors = load_file(file)
    tensors["mamba2.ssm"] = tensors["mamba2.ssm"].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format_version": "1", "seen_tokens": "7", "metadata": "{}"})
    with pytest.raises(ValueError, match="is not a video state"):
        VideoState.load(file)


def test_a_rounded_state_answers(make_model, state, tmp_path):
    model = make_model()
    with torch.no_grad():
        read = model(input_ids=torch.arange(10, 40)[None]).past_key_values
        read.save(tmp_path / "film.state", torch.bfloat16)
        question = torch.tensor([[50, 51]])
        exact = model(input_ids=question, past_key_values=read.fork()).logits
        rounded = model(input_ids=question, past_key_values=VideoState.load(tmp_path / "film.state")).logits
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.02
