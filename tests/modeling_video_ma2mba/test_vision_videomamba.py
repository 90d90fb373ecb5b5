"""VideoMamba as vision tower: rows of clips, streamed in any grouping, exact gradients, a model of its own."""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from video_ma2mba.conversion.compose import compose
from video_ma2mba.conversion.convert_checkpoint import convert_checkpoint
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification
from video_ma2mba.modeling_video_ma2mba.reading_prompt import WholeClips
from video_ma2mba.modeling_video_ma2mba.state_identity import model_facts
from video_ma2mba.modeling_video_ma2mba.vision_features import encode_frames
from video_ma2mba.modeling_video_ma2mba.vision_towers import tower_adapter
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

TOWER = {
    "model_type": "videomamba",
    **{"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "image_size": 32, "patch_size": 8, "num_frames": 4},
}


def make_model(layer: int = -1, **tower) -> VideoMa2mbaForConditionalGeneration:
    torch.manual_seed(0)
    config = VideoMa2mbaConfig(
        text_config={"hidden_size": 12, "num_hidden_layers": 1, "head_dim": 6, "state_size": 4, "vocab_size": 20},
        vision_config=TOWER | tower,
        video_token_id=3,
        vision_feature_layer=layer,
        vision_chunk_frames=8,
    )
    model = VideoMa2mbaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def frames(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tubelet", [1, 2, None])
def test_rows_are_the_towers_own_patches_of_whole_clips(tubelet):
    model = make_model(tubelet_size=tubelet)
    config, tower = model.config, model.model.vision_tower
    clip = config.clip_frames
    assert clip == (1 if tubelet is None else 4)
    pixels = frames(2 * clip)
    config.spatial_pool_stride = 1
    with torch.no_grad():
        found = encode_frames(tower, config, pixels, [clip, clip])
        tokens = tower(pixels.unflatten(0, (2, clip))).last_hidden_state[:, 1:]
    expected = tokens.unflatten(1, (clip // (tubelet or 1), -1)).repeat_interleave(tubelet or 1, 1).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouping", [[1] * 11, [3, 5, 3], [11], [4, 4, 3], [7, 1, 1, 1, 1]])
def test_frames_in_any_grouping_give_the_same_rows(grouping):
    model = make_model()
    video = frames(11)  # two clips and a short one
    with torch.no_grad():
        expected = model.model.get_video_features(video)
        clips, rows = WholeClips(model.config.clip_frames, 8), []
        for piece in video.split(grouping):
            rows += [model.model.get_video_features(whole) for whole in clips.add(piece)]
        rows += [model.model.get_video_features(rest) for rest in clips.rest()]
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)


def test_a_short_clip_takes_the_first_positions_and_completes_a_tubelet():
    model = make_model(tubelet_size=2)
    video = frames(3)
    with torch.no_grad():
        rows = model.model.get_video_features(video)
        filled = model.model.get_video_features(torch.cat([video, video[-1:]]))
    assert len(rows) == 3 * model.config.tokens_per_frame
    torch.testing.assert_close(rows, filled[: len(rows)])


def test_clips_of_different_videos_do_not_mix():
    model = make_model()
    one, other = frames(6), frames(5)
    with torch.no_grad():
        both = model.model.get_video_features(torch.cat([one, other]), num_frames=torch.tensor([6, 5]))
        alone = torch.cat([model.model.get_video_features(video) for video in (one, other)])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-5)


def test_recomputation_in_chunks_of_clips_keeps_the_gradients():
    model = make_model()
    video, gradients = frames(11), []
    for recompute in (False, True):
        model.zero_grad()
        model.train()
        model.model.recompute_vision = recompute
        model.model.get_video_features(video).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {"model.vision_tower.cls_token", "model.vision_tower.temporal_pos_embedding"} <= gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_above_the_feature_layer_are_frozen_and_the_norm_is_not():
    model = make_model(layer=1)
    trains = {n: p.requires_grad for n, p in model.model.vision_tower.named_parameters()}
    assert trains["norm_f.weight"] and trains["cls_token"] and trains["layers.0.mixer.A_log"]
    assert not any(value for name, value in trains.items() if name.startswith("layers.1."))


def test_a_state_of_another_clip_length_is_of_another_model():
    assert model_facts(make_model().config) != model_facts(make_model(num_frames=8).config)
    assert "num_frames" in tower_adapter("videomamba").identity_fields


def test_a_saved_model_comes_back_with_its_tower(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path).eval()
    video = frames(5)
    with torch.no_grad():
        torch.testing.assert_close(again.model.get_video_features(video), model.model.get_video_features(video))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    copied = {path.name for path in tmp_path.glob("*.py")}
    assert {"modeling_videomamba.py", "configuration_videomamba.py", "vision_videomamba.py"} <= copied


def test_init_composes_a_model_with_a_fresh_videomamba(tmp_path):
    compose(None, "videomamba-ti", "370m", tmp_path, config_only=True)
    config = VideoMa2mbaConfig.from_pretrained(tmp_path)
    assert config.vision_config.model_type == "videomamba" and config.vision_config.hidden_size == 192
    assert config.vision_feature_layer == -1 and config.tokens_per_frame == 49 and config.clip_frames == 8
    with pytest.raises(ValueError, match="there is no VideoMamba of the size 'xl'"):
        compose(None, "videomamba-xl", "370m", tmp_path / "other", config_only=True)


def test_init_takes_the_encoder_out_of_a_saved_classifier(tmp_path):
    torch.manual_seed(0)
    fields = {key: value for key, value in TOWER.items() if key != "model_type"}
    classifier = VideoMambaForVideoClassification(VideoMambaConfig(**fields, num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=16, n_groups=1)
    text = Mamba2Config(**sizes, state_size=4, vocab_size=300)
    Mamba2ForCausalLM(text).save_pretrained(tmp_path / "language")
    build_byte_tokenizer().save_pretrained(tmp_path / "language")
    compose(str(tmp_path / "language"), str(tmp_path / "classifier"), None, tmp_path / "out", dtype=torch.float32)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, value in classifier.videomamba.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    for to in ("official", "ours"):  # its tensors are named as a language model's
        with pytest.raises(ValueError, match="has a VideoMamba tower, for which there is no other layout"):
            convert_checkpoint([str(tmp_path / "out")], tmp_path / "converted", to=to)


def test_clips_of_one_length_take_one_call_wherever_they_stand(monkeypatch):
    """Videos that end in short clips would else cost a call for every video of a batch."""
    model = make_model()
    config, tower = model.config, model.model.vision_tower
    adapter = tower_adapter(config.vision_config)
    clips = [4, 3, 4, 1, 4, 3]
    pixels = torch.randn(sum(clips), 3, *2 * (config.vision_config.image_size,))
    calls = []
    whole = type(adapter)._encode_clips
    monkeypatch.setattr(
        type(adapter),
        "_encode_clips",
        lambda self, *given: (calls.append(given[-1].shape[:2]), whole(self, *given))[1],
    )
    with torch.no_grad():
        together = adapter.encode(tower, config, pixels, clips)
        assert [tuple(each) for each in calls] == [(3, 4), (2, 3), (1, 1)]
        alone = torch.cat([adapter.encode(tower, config, piece, [len(piece)]) for piece in pixels.split(clips)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
