"""The state on disk and in memory: bit-exact or a clear error, and never shared by accident."""

import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState

METADATA = {"fps": "1.0", "frames": "3600", "video": "Katze auf dem Dach 🐈.mp4"}


def text_config(**overrides) -> Ma2mbaTextConfig:
    fields = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 6, "head_dim": 8}
    return Ma2mbaTextConfig(**(fields | overrides))


def random_state(batch: int = 1, dtype: torch.dtype = torch.float32) -> VideoState:
    state = VideoState.zeros(text_config(), batch, dtype=dtype)
    return VideoState.from_stacked(torch.randn_like(state.conv), torch.randn_like(state.ssm), 518_400, METADATA)


def assert_identical(a: VideoState, b: VideoState) -> None:
    assert (a.conv.dtype, a.ssm.dtype) == (b.conv.dtype, b.ssm.dtype)
    assert torch.equal(a.conv, b.conv) and torch.equal(a.ssm, b.ssm)
    assert a.seen_tokens == b.seen_tokens and a.metadata == b.metadata


# ------------------------------------------------------------------------------------------------------------- on disk
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_saved_and_loaded_bit_for_bit(tmp_path, dtype, batch):
    state = random_state(batch, dtype)
    path = tmp_path / "night.safetensors"
    state.save(path)
    assert os.listdir(tmp_path) == ["night.safetensors"]
    assert_identical(VideoState.load(path), state)
    VideoState.load(str(path)).save(str(path))  # over the file it came from
    assert_identical(VideoState.load(path), state)
    assert path.stat().st_size < state.nbytes + 1024


def test_a_loaded_state_continues_as_if_never_saved(tmp_path):
    model = Ma2mbaTextModel(text_config()).eval()
    with torch.no_grad():
        state = model(torch.randint(0, 31, (1, 40))).past_key_values
        state.save(tmp_path / "state")
        ids = torch.randint(0, 31, (1, 5))
        loaded = model(ids, past_key_values=VideoState.load(tmp_path / "state")).last_hidden_state
        assert torch.equal(loaded, model(ids, past_key_values=state).last_hidden_state)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"a\.state: the state cannot be written: .*No space left"):
        random_state().save(tmp_path / "a.state")
    assert not list(tmp_path.iterdir())


def test_views_and_gradients_are_saved_by_value(tmp_path):
    whole = random_state(3)
    view = VideoState.from_stacked(whole.conv[:, 1:2].requires_grad_(), whole.ssm[:, 1:2])
    view.save(tmp_path / "row")
    loaded = VideoState.load(tmp_path / "row")
    assert torch.equal(loaded.conv, whole.conv[:, 1:2]) and not loaded.conv.requires_grad
    assert (tmp_path / "row").stat().st_size < view.nbytes + 1024


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no state file .*gone"):
        VideoState.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="there is no state file"):
        VideoState.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        random_state().save(tmp_path / "nowhere" / "state")


def fails_clearly(path) -> str:
    with pytest.raises(ValueError) as caught:
        VideoState.load(path)
    text = str(caught.value)
    assert str(path) in text, text
    assert "\n" not in text
    return text


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "state"
    random_state().save(path)
    whole = path.read_bytes()
    for size in {0, 1, 7, 8, 9, 50, 200, len(whole) // 2, len(whole) - 1} | set(range(0, len(whole), 97)):
        path.write_bytes(whole[:size])
        fails_clearly(path)
    path.write_bytes(whole + b"more")
    fails_clearly(path)


def test_200_damaged_files_fail_clearly(tmp_path):
    """Bytes changed, removed, doubled or overwritten anywhere: never another state than the one saved."""
    path = tmp_path / "state"
    state = random_state()
    state.save(path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0] + 8
    dice = random.Random(4)
    refused = 0
    for attempt in range(200):
        damaged = bytearray(whole)
        # Half of the damage hits the header, which is a small part of the file.
        at = dice.randrange(header if attempt % 2 else len(whole))
        kind = dice.choice(["flip", "delete", "double", "noise"])
        length = dice.randint(1, 40)
        if kind == "flip":
            damaged[at] ^= 1 << dice.randrange(8)
        elif kind == "delete":
            del damaged[at : at + length]
        elif kind == "double":
            damaged[at:at] = damaged[at : at + length]
        else:
            damaged[at : at + length] = dice.randbytes(len(damaged[at : at + length]))
        path.write_bytes(damaged)
        if bytes(damaged) == whole:
            continue
        fails_clearly(path)
        refused += 1
    assert refused >= 195


def foreign(tmp_path, tensors, facts):
    path = tmp_path / "foreign"
    save_file(tensors, path, metadata=facts)
    return fails_clearly(path)


def test_foreign_files_are_refused(tmp_path):
    good = random_state()
    good.save(tmp_path / "good")
    with safetensors.safe_open(tmp_path / "good", framework="pt") as file:
        facts = file.metadata()
    tensors = {"mamba2.conv": good.conv, "mamba2.ssm": good.ssm}
    (tmp_path / "text").write_text("not a tensor in sight")
    assert "is not a readable state file" in fails_clearly(tmp_path / "text")
    assert "is not a video state" in foreign(tmp_path, {"model.weight": torch.ones(3)}, None)
    assert "is not a video state" in foreign(tmp_path, tensors | {"more": torch.ones(1)}, facts)
    assert "format version" in foreign(tmp_path, tensors, facts | {"format_version": "99"})
    assert "damaged header" in foreign(tmp_path, tensors, facts | {"seen_tokens": "many"})
    assert "damaged header" in foreign(tmp_path, tensors, facts | {"seen_tokens": "-1"})
    assert "damaged header" in foreign(tmp_path, tensors, facts | {"metadata": "{"})
    assert "damaged header" in foreign(tmp_path, tensors, facts | {"metadata": json.dumps([1, 2])})
    assert "not all text" in foreign(tmp_path, tensors, facts | {"metadata": json.dumps({"frames": 3})})
    assert "damaged header" in foreign(tmp_path, tensors, {k: v for k, v in facts.items() if k != "metadata"})
    assert "damaged" in foreign(tmp_path, tensors | {"mamba2.ssm": good.ssm + 1}, facts)


def test_states_of_impossible_shape_or_type_are_refused(tmp_path):
    state = random_state()
    for conv, ssm in [
        (state.conv[0], state.ssm),
        (state.conv, state.ssm[0]),
        (state.conv[:1], state.ssm),
        (state.conv.long(), state.ssm),
        (state.conv, state.ssm.to(torch.complex64)),
    ]:
        with pytest.raises(ValueError, match="a state needs"):
            VideoState.from_stacked(conv, ssm)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["conv", "ssm"])
def test_values_that_are_not_finite_are_refused_and_named(tmp_path, which, value):
    state = random_state()
    getattr(state, which).view(-1)[7] = value
    state.save(tmp_path / "state")
    assert f"not finite in '{which}'" in fails_clearly(tmp_path / "state")


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    first = random_state()
    first.save(path)

    def half_written(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="No space left on device"):
        random_state().save(path)
    assert os.listdir(tmp_path) == ["state"]
    assert_identical(VideoState.load(path), first)
    with pytest.raises(OSError, match="No space left on device"):
        random_state().save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize(
    "overrides",
    [{"num_hidden_layers": 3}, {"state_size": 8}, {"head_dim": 4}, {"conv_kernel": 3}, {"hidden_size": 32}],
    ids=str,
)
def test_a_state_of_another_model_is_refused(overrides):
    state = VideoState.zeros(text_config(**overrides))
    with pytest.raises(ValueError, match="the state belongs to another model: its sizes are"):
        state.check_fits(text_config())
    with pytest.raises(ValueError, match="the state belongs to another model"):
        Ma2mbaTextModel(text_config())(torch.tensor([[1]]), past_key_values=state)
    state.check_fits(text_config(**overrides))


# ----------------------------------------------------------------------------------------------------------- in memory
def test_forks_are_independent():
    model = Ma2mbaTextModel(text_config()).eval()
    with torch.no_grad():
        state = model(torch.randint(0, 31, (1, 9))).past_key_values
        state.metadata["fps"] = "1"
        before, fork = state.fork(), state.fork()
        model(torch.tensor([[3, 4]]), past_key_values=fork)
    fork.conv.zero_()
    fork.metadata["fps"] = "2"
    assert fork.seen_tokens == 11
    assert_identical(state, before)


def test_the_size_does_not_depend_on_what_was_read():
    model = Ma2mbaTextModel(text_config()).eval()
    with torch.no_grad():
        short, long = (model(torch.randint(0, 31, (1, n))).past_key_values for n in (1, 300))
    assert short.nbytes == long.nbytes == VideoState.zeros(text_config()).nbytes
    assert (short.get_seq_length(), long.get_seq_length()) == (1, 300)


def test_zeros_are_the_beginning():
    model = Ma2mbaTextModel(text_config()).eval()
    ids = torch.randint(0, 31, (2, 6))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert torch.equal(model(ids, past_key_values=VideoState.zeros(model.config, 2)).last_hidden_state, expected)


def test_rows_follow_beams():
    state = random_state(3)
    conv, ssm = state.conv.clone(), state.ssm.clone()
    state.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(state.conv, conv[:, [2, 0, 0]]) and torch.equal(state.ssm, ssm[:, [2, 0, 0]])
    state.conv[:, 1] = 7.0  # rows that came from the same beam are copies
    assert torch.equal(state.conv[:, 2], conv[:, 0])


def test_rows_are_repeated_and_selected():
    state = random_state(2)
    conv, ssm = state.conv.clone(), state.ssm.clone()
    state.batch_repeat_interleave(3)
    assert state.batch_size == 6
    assert torch.equal(state.conv, conv[:, [0, 0, 0, 1, 1, 1]]) and torch.equal(state.ssm, ssm[:, [0, 0, 0, 1, 1, 1]])
    state.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(state.conv, conv[:, [1, 0]]) and torch.equal(state.ssm, ssm[:, [1, 0]])


def test_to_a_device_keeps_everything():
    state = random_state()
    moved = state.to("meta")
    assert (moved.conv.device.type, moved.ssm.device.type) == ("meta", "meta")
    assert (moved.seen_tokens, moved.metadata) == (state.seen_tokens, METADATA)
    assert state.conv.device.type == "cpu"


def test_stacking_happens_once_and_layers_are_views():
    """What a batch's decoder reads is not copied again and again, and what is written into the one is in the other."""
    layers = [Mamba2State(torch.randn(2, 3, 3), torch.randn(2, 2, 4, 5)) for _ in range(3)]
    state = VideoState(layers)
    stacked = state.stacked()
    assert state.stacked() is stacked and state.fork().stacked() is not stacked
    assert torch.equal(stacked.ssm, torch.stack([layer.ssm for layer in layers]))
    assert all(layer.ssm.data_ptr() == stacked.ssm[i].data_ptr() for i, layer in enumerate(state.layers))
    state.layers[1].ssm.zero_()
    assert not stacked.ssm[1].any()
    state.update(layers, 4)
    assert torch.equal(state.ssm[1], layers[1].ssm) and state.seen_tokens == 4


@pytest.mark.parametrize("already", [False, True])
def test_written_into_buffers(already):
    state = VideoState([Mamba2State(torch.randn(2, 3, 3), torch.randn(2, 2, 4, 5)) for _ in range(3)])
    if already:
        state.stacked()
    buffers = Mamba2State(torch.zeros(3, 2, 3, 3), torch.zeros(3, 2, 2, 4, 5, dtype=torch.bfloat16))
    before = [tensor.data_ptr() for tensor in buffers]
    state.copy_into(buffers)
    assert torch.equal(buffers.conv, state.conv) and torch.equal(buffers.ssm, state.ssm.bfloat16())
    assert [tensor.data_ptr() for tensor in buffers] == before


def test_stacking_loses_no_gradient_and_makes_no_inference_tensors():
    """A state that is asked without gradients can still be differentiated, and trained on, afterwards."""
    leaf = torch.randn(2, 3, 3, requires_grad=True)
    state = VideoState([Mamba2State(leaf * 2, torch.randn(2, 2, 4, 5))])
    with torch.inference_mode():
        fork = state.fork()
    assert fork.conv.is_inference() and not state.conv.is_inference()
    (gradient,) = torch.autograd.grad(state.layers[0].conv.sum(), leaf)
    assert torch.equal(gradient, torch.full_like(leaf, 2))
    assert not state.detach().conv.requires_grad


def test_rows_are_views_or_copies():
    state = random_state(3)
    row = state.select(slice(1, 2))
    assert torch.equal(row.conv, state.conv[:, 1:2]) and torch.equal(row.ssm, state.ssm[:, 1:2])
    assert row.layers[0].ssm.data_ptr() != state.layers[0].ssm.data_ptr()  # stacked: a copy of its own by now
    assert state.select(slice(1, 2)).layers[0].ssm.data_ptr() == state.layers[0].ssm[1:2].data_ptr()
    state.select(torch.tensor([0, 2])).conv.zero_()
    assert state.conv.any()
    both = VideoState.concatenate([row, state.to("cpu", torch.float64)])
    assert both.batch_size == 4 and both.conv.dtype == torch.float32 and both.seen_tokens == 518_400
    assert torch.equal(both.ssm, torch.cat([row.ssm, state.ssm], 1))


def test_to_the_same_place_is_no_copy():
    state = VideoState([Mamba2State(torch.randn(2, 3, 3), torch.randn(2, 2, 4, 5)) for _ in range(2)])
    same = state.to("cpu", torch.float32)
    assert all(a is b for x, y in zip(same.layers, state.layers, strict=True) for a, b in zip(x, y, strict=True))
    assert state.to("cpu", torch.float64).ssm.dtype == torch.float64
    assert state.to("cpu", torch.bfloat16).ssm.dtype == torch.float32


def test_a_state_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        VideoState([])
