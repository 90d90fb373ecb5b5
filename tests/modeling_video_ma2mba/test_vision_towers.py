"""The kinds of towers, and how frames are dealt out to towers that look at several together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel

from video_ma2mba.modeling_video_ma2mba.reading_prompt import WholeClips
from video_ma2mba.modeling_video_ma2mba.vision_features import whole_clips
from video_ma2mba.modeling_video_ma2mba.vision_towers import TOWERS, tower_adapter


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'vit'.*use one of clip_vision_model, siglip_vision_model"):
        tower_adapter("vit")


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_facts_that_adapters_state_are_those_of_the_towers(make_config, kind: str):
    config = make_config(vision={"model_type": kind})
    tower = AutoModel.from_config(config.vision_config)
    adapter = TOWERS[kind]
    named = dict(tower.named_modules())
    classes = {type(module).__name__ for module in named.values()}
    assert set(adapter.no_split_modules) <= classes
    leaves = {name.rpartition(".")[2] for name, module in named.items() if isinstance(module, torch.nn.Linear)}
    assert set(adapter.lora_targets) <= leaves
    parameters = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    assert set(adapter.no_decay) <= parameters
    rows = tower.embeddings.position_embedding.weight.shape[0]
    assert adapter.cost(config).rows == rows == config.patches_per_side**2 + adapter.leading_rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 30))
def test_no_chunk_cuts_a_clip(frames, clip, most):
    chunks = whole_clips(frames, clip, most)
    lengths = [length for chunk in chunks for length in chunk]
    assert all(sum(chunk) <= max(most, clip) for chunk in chunks)
    for count in frames:  # each video is whole clips from its own beginning, and perhaps a shorter last one
        own = lengths[: -(-count // clip)]
        del lengths[: len(own)]
        assert sum(own) == count
        assert all(length == clip for length in own[:-1])
    assert lengths == []


@given(st.lists(st.integers(0, 17), max_size=8), st.integers(1, 7), st.integers(1, 3))
def test_clips_do_not_depend_on_how_frames_arrive(arriving, clip, pieces):
    frames = torch.arange(sum(arriving)).view(-1, 1, 1, 1)
    clips = WholeClips(clip, clip * pieces)
    found = [piece for part in frames.split(arriving) for piece in clips.add(part)] if len(frames) else []
    assert all(0 < len(piece) <= clip * pieces and len(piece) % clip == 0 for piece in found)
    found += clips.rest()
    assert torch.equal(torch.cat(found) if found else frames, frames)
    assert len(frames) == 0 or len(found[-1]) % clip == len(frames) % clip
    assert clips.rest() == []
