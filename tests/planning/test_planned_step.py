"""Configurations read, and parameters counted, without torch, held against transformers and PyTorch's models."""

import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, Mamba2Config, SiglipVisionConfig

from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.configuration_sizes import read_sizes
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.vision_towers import TOWERS
from video_ma2mba.planning.planned_step import counts_and_config, counts_of_model
from video_ma2mba.trainer.parameter_groups import set_trainable

TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 480}
TOWER = {"hidden_size": 48, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
ENCODER = {**TOWER, "intermediate_size": 80, "num_attention_heads": 4}
CONFIGS = {
    "clip": {"vision_config": {"model_type": "clip_vision_model", **ENCODER}},
    "clip's lowest layer": {"vision_config": {"model_type": "clip_vision_model", **ENCODER},
                            "vision_feature_layer": 1},
    "siglip": {"vision_config": {"model_type": "siglip_vision_model", **ENCODER}, "vision_feature_layer": -1},
    "siglip without a head": {"vision_config": {"model_type": "siglip_vision_model", **ENCODER,
                                                "vision_use_head": False}},
    "untied": {"vision_config": {"model_type": "siglip_vision_model", **ENCODER}, "tie_word_embeddings": False,
               "text_config": {**TEXT, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False}},
    "groups": {"text_config": {**TEXT, "n_groups": 2, "conv_kernel": 3, "head_dim": 32, "state_size": 16}},
    "videomamba": {"vision_config": {"model_type": "videomamba", **TOWER}, "vision_feature_layer": -1},
    "four scans": {"vision_config": {"model_type": "videomamba", **TOWER, "scan_order": "spatiotemporal_v2",
                                     "share_scan_weights": False, "num_frames": 4, "tubelet_size": 2}},
    "pictures": {"vision_config": {"model_type": "videomamba", **TOWER, "tubelet_size": None},
                 "vision_feature_layer": 2},
}  # fmt: skip
PARTS = [part for n in range(1, 4) for part in itertools.combinations(("lm", "projector", "vision"), n)]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_in_the_model(name: str):
    config = VideoMa2mbaConfig(**{"text_config": TEXT, **CONFIGS[name], "video_token_id": 7})
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(config)
    for parts in PARTS:
        set_trainable(model, parts)
        assert counts_and_config(config, parts)[0] == counts_of_model(model, config), parts


def test_parameters_of_a_language_model_alone():
    config = Ma2mbaTextConfig(**TEXT)
    with torch.device("meta"):
        model = Ma2mbaTextModel(config)
    assert counts_and_config(config, None)[0] == counts_and_config(model, None)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_configuration_is_read_as_transformers_reads_it(tmp_path: Path, name: str):
    changes = {"video_token_id": 7, "vision_chunk_frames": 5, "frame_times": "text"}
    VideoMa2mbaConfig(**CONFIGS[name], **changes).save_pretrained(tmp_path)
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_sizes(tmp_path)
    for whole, part in ((theirs, ours), (theirs.text_config, ours.text_config)):
        own = inspect.signature(type(part)).parameters.keys() - {"kwargs", "text_config", "vision_config"}
        assert {key: getattr(whole, key) for key in own} == {key: getattr(part, key) for key in own} and len(own) > 10
    for key in {"model_type", *TOWERS[ours.vision_config.model_type].defaults, *TOWER}:
        assert getattr(ours.vision_config, key) == getattr(theirs.vision_config, key)
    for key in ("tokens_per_frame", "clip_frames", "read_chunk_frames", "patches_per_side"):
        assert getattr(ours, key) == getattr(theirs, key)


def test_defaults_are_transformers_own():
    for kind, made in (("clip_vision_model", CLIPVisionConfig()), ("siglip_vision_model", SiglipVisionConfig())):
        ours = vars(TOWERS[kind].make_sizes())
        assert ours == {key: getattr(made, key) for key in ours} and {*TOWERS[kind].defaults} < {*ours}
        deciding = {key for key in vars(made) if key.endswith(("_size", "_layers", "_heads", "_channels", "_head"))}
        assert deciding - {"chunk_size_feed_forward", "_name_or_path"} <= {*ours}


def test_a_mamba2_of_transformers_is_read(tmp_path: Path):
    Mamba2Config(hidden_size=128, num_heads=4, num_hidden_layers=2, n_groups=1).save_pretrained(tmp_path)
    read, (_, made) = read_sizes(tmp_path), counts_and_config(AutoConfig.from_pretrained(tmp_path), None)
    assert (read.inner_size, read.vocab_size) == (made.inner_size, made.vocab_size) == (256, 32768)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"model_type": "bert"}', "{}", '{"model_type": []}', '{"model_type": "video_ma2mba", "x": NaN'],
)
def test_what_is_unusual_is_left_to_transformers(tmp_path: Path, text: str):
    assert read_sizes(tmp_path) is None
    (tmp_path / "config.json").write_text(text)
    assert read_sizes(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"vision_config": {"image_size": "336"}},
        {"vision_config": {"image_size": [336, 336]}},
        {"vision_config": {"num_attention_heads": 5}},
        {"vision_config": {"model_type": "vit"}},
        {"vision_config": {"model_type": "videomamba", "patch_size": 5}},
        {"text_config": {"num_heads": 3}},
        {"vision_feature_layer": 99},
        {"vision_chunk_frames": 0},
        {"text_config": 3},
    ],
)
def test_wrong_values_are_left_to_transformers(tmp_path: Path, wrong: dict):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "video_ma2mba", **wrong}))
    assert read_sizes(tmp_path) is None
