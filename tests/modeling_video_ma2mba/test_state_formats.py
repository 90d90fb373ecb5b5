"""State files of every format: the first release's load as it saved them, newer ones are refused in words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ma2mba.modeling_video_ma2mba import state_files, state_layers
from video_ma2mba.modeling_video_ma2mba.state_files import checksum
from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState

DATA = Path(__file__).with_name("data")  # written by the release that knew format 1 only


def first_release() -> tuple[torch.Tensor, torch.Tensor]:
    """The values it was given."""
    torch.manual_seed(17)
    return torch.randn(2, 1, 12, 3), torch.randn(2, 1, 2, 4, 2)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_state_of_the_first_release_loads_as_it_was_saved(tmp_path):
    conv, ssm = first_release()
    assert header(DATA / "format_1.state")["format_version"] == "1"
    found = VideoState.load(DATA / "format_1.state")
    assert torch.equal(found.conv, conv.bfloat16()) and torch.equal(found.ssm, ssm)
    assert (found.seen_tokens, found.format_version) == (1033, 1)
    assert found.metadata == {"model": "tiny", "frames": "64", "video": "Katze auf dem Dach 🐈.mp4"}
    assert found.kinds == ["mamba2", "mamba2"]
    found.save(tmp_path / "again")
    again = VideoState.load(tmp_path / "again")
    assert torch.equal(again.conv, found.conv) and torch.equal(again.ssm, found.ssm)
    assert (again.seen_tokens, again.metadata, again.format_version) == (1033, found.metadata, 2)


def test_a_rounded_state_of_the_first_release_says_so():
    _, ssm = first_release()
    found = VideoState.load(DATA / "format_1_rounded.state")
    assert torch.equal(found.ssm, ssm.bfloat16().float())
    assert found.metadata == {"model": "tiny", "rounded_to": "bfloat16"}


def test_a_file_names_the_kind_and_version_of_every_layer(tmp_path):
    VideoState.from_stacked(*first_release()).save(tmp_path / "state")
    facts = header(tmp_path / "state")
    assert facts["format_version"] == "2"
    assert json.loads(facts["layers"]) == ["mamba2", "mamba2"]
    assert json.loads(facts["kinds"]) == {"mamba2": 1}
    assert load_file(tmp_path / "state").keys() == {"mamba2.conv", "mamba2.ssm"}


def resealed(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changed: str) -> str:
    """The error on a state whose header says something else, with a checksum that is right."""
    VideoState.from_stacked(*first_release()).save(path)
    tensors = tensors or load_file(path)
    facts = {**header(path), **changed}
    facts["checksum"] = checksum(tensors, facts)
    save_file(tensors, path, metadata=facts)
    with pytest.raises(ValueError) as caught:
        VideoState.load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def test_newer_files_are_refused_in_words(tmp_path):
    path = tmp_path / "state"
    assert "has format version 3, and this version of the package reads up to 2: upgrade video-ma2mba" in resealed(
        path, format_version="3"
    )
    attention = {"layers": '["mamba2", "attention"]', "kinds": '{"mamba2": 1, "attention": 4}'}
    assert (
        "layers of kind 'attention' in version 4, of which this version of the package knows none: upgrade"
        in resealed(path, {"mamba2.conv": torch.ones(1, 1, 2, 3), "attention.key": torch.ones(1, 1, 2)}, **attention)
    )
    assert "kind 'mamba2' in version 2, of which this version of the package knows up to 1: upgrade" in resealed(
        path, kinds='{"mamba2": 2}'
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": "[]"}, {"layers": "null"}, {"layers": "{"}, {"layers": '["mamba2"]'}, {"layers": "[[]]"},
        {"layers": '["mamba2", "mamba2", "mamba2"]'}, {"layers": '["mamba2", "other"]'}, {"kinds": "[]"},
        {"kinds": '{"mamba2": "1"}'}, {"kinds": '{"mamba2": true}'}, {"kinds": '{"mamba2": 1, "other": 1}'},
        {"format_version": "0"}, {"format_version": "-1"}, {"format_version": "two"}, {"format_version": "²"},
        {"format_version": "1"}, {"format_version": "9" * 5000}, {"kinds": "[" * 100_000},
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves_are_refused(tmp_path, changed):
    resealed(tmp_path / "state", **changed)


def test_a_first_format_without_dimensions_is_refused(tmp_path):
    tensors = {"conv": torch.tensor(1.0), "ssm": torch.tensor(1.0)}
    facts = {"format_version": "1", "seen_tokens": "1", "metadata": "{}"}
    save_file(tensors, tmp_path / "state", metadata={**facts, "checksum": checksum(tensors, facts)})
    with pytest.raises(ValueError, match="is not a video state: a state needs"):
        VideoState.load(tmp_path / "state")


# ------------------------------------------------------------------------------------------------- several kinds
class Remembered(Mamba2State):
    """Another kind of layer, as a hybrid model will have: other sizes, another name."""

    kind = "remembered"
    version = 3


@pytest.fixture
def hybrid(monkeypatch) -> VideoState:
    monkeypatch.setitem(state_layers.KINDS, "remembered", Remembered)
    assert state_files.KINDS is state_layers.KINDS
    layers = [
        kind(torch.randn(2, channels, 3), torch.randn(2, heads, 4, 5))
        for kind, channels, heads in [(Mamba2State, 6, 2), (Remembered, 7, 3), (Mamba2State, 6, 2)]
    ]
    return VideoState(layers, 9, {"a": "b"})


def assert_equal(found: VideoState, expected: list) -> None:
    assert found.kinds == ["mamba2", "remembered", "mamba2"]
    for layer, own in zip(found.layers, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, own, strict=True))


def test_layers_of_several_kinds_keep_their_order(hybrid, tmp_path):
    layers = [layer._make(tensor.clone() for tensor in layer) for layer in hybrid.layers]
    hybrid.save(tmp_path / "state")
    assert json.loads(header(tmp_path / "state")["kinds"]) == {"mamba2": 1, "remembered": 3}
    for copy in (VideoState.load(tmp_path / "state"), hybrid.fork(), hybrid.to("cpu", torch.float32), hybrid):
        assert_equal(copy, layers)
    both = VideoState.concatenate([hybrid, hybrid.select(slice(1, 2))])
    assert_equal(both, [layer._make(torch.cat([t, t[1:]]) for t in layer) for layer in layers])
    assert_equal(both.select(torch.tensor([0, 2])), layers)
    hybrid.reorder_cache(torch.tensor([1, 0]))
    assert_equal(hybrid, [layer._make(t[[1, 0]] for t in layer) for layer in layers])
    with pytest.raises(ValueError, match="layers of different kinds"):
        VideoState.concatenate([hybrid, VideoState(hybrid.layers[::2])])
