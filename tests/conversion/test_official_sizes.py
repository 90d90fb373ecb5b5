"""The released checkpoints at their true sizes, as names and shapes: nothing is downloaded and no memory is taken."""

from collections.abc import Callable

import pytest
import torch
from conversion_models import official_tensors, projector
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from video_ma2mba.conversion.report import ConversionError
from video_ma2mba.conversion.tensor_plan import CheckpointSource, plan_tensors
from video_ma2mba.conversion.tensor_store import TensorSpec

# Width, layers, heads; tensors; billions of parameters as the Hub's pages count them (the output layer included).
SIZES = {
    "0.7b": (1024, 48, 32, 48 * 9 + 3 + 391 + 4, 0.725),
    "1.8b": (2048, 48, 64, 48 * 9 + 3 + 391 + 4, 1.757),
    "3.1b": (2560, 64, 80, 974, 3.144),
}
LARGE = {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}


class Listed:
    """Names and shapes without values."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self.specs = specs


def language_model(size: str) -> Mamba2ForCausalLM:
    width, layers, heads, *_ = SIZES[size]
    config = Mamba2Config(
        vocab_size=50288,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=heads,
        head_dim=64,
        state_size=128,
        n_groups=1,
        tie_word_embeddings=False,
    )
    return Mamba2ForCausalLM(config)


def clip_tower() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**LARGE, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24))


def cut_siglip_tower() -> SiglipVisionModel:
    """SigLIP-so400m at 384 pixels as LLaVA keeps it: without its last layer and its pooling head."""
    sizes = LARGE | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "image_size": 384}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))


def listed(size: str, nesting: str, make_tower: Callable = clip_tower) -> dict[str, TensorSpec]:
    """Every tensor of a released checkpoint, from transformers' own models on the meta device."""
    with torch.device("meta"):
        tower = make_tower()
        mlp = projector(tower.config.hidden_size, SIZES[size][0])
        tensors = official_tensors(language_model(size), tower, mlp, nesting)
    return {key: TensorSpec("BF16", tuple(value.shape)) for key, value in tensors.items()}


@pytest.mark.parametrize("nesting", ["vision_tower.vision_model.", "vision_model.", ""])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("says", ["nothing", "the sizes"])
def test_every_tensor_finds_its_place(size: str, nesting: str, says: str):
    width, layers, heads, count, billions = SIZES[size]
    specs = listed(size, nesting)
    assert len(specs) == count
    assert sum(spec.numel for spec in specs.values()) / 1e9 == pytest.approx(billions, abs=5e-4)
    fields = {"model_type": "llava_mamba"}
    if says == "the sizes":
        fields |= {"d_model": width, "n_layer": layers, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    source = CheckpointSource(size, Listed(specs), fields, None)
    plan = plan_tensors([source], head_is_embedding=lambda head, embedding: False)
    assert plan.report.counts() == {"renamed": count - 1, "kept": 1}  # lm_head.weight has the same name in both
    assert plan.report.parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    text, vision = plan.config.text_config, plan.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_heads) == (width, layers, heads)
    assert (text.head_dim, text.state_size, text.n_groups, text.vocab_size) == (64, 128, 1, 50288)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (336, 14, 16)
    assert plan.config.tokens_per_frame == 144
    assert plan.config.vision_feature_layer == -2

    tied = plan_tensors([source], head_is_embedding=lambda head, embedding: True)
    assert tied.report.counts() == {"renamed": count - 1, "tied": 1}


@pytest.mark.parametrize(
    "lost", ["mm_model.vision_tower.vision_tower.vision_model.encoder.layers.23.", "backbone.layers.63."]
)
def test_a_lost_last_layer_is_noticed(lost: str):
    specs = {k: v for k, v in listed("3.1b", "vision_tower.vision_model.").items() if not k.startswith(lost)}
    fields = {"n_layer": 64, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    with pytest.raises(ConversionError, match="num_hidden_layers is (23|63) by the tensors"):
        plan_tensors([CheckpointSource("3.1b", Listed(specs), fields, None)], lambda head, embedding: True)


@pytest.mark.parametrize("tower_name", ["google/siglip-so400m-patch14-384", "/data/siglip-so400m-patch14-384/"])
def test_siglip_without_its_last_layer(tower_name: str):
    """What is left of the tower ends where the paper's features are taken, on pictures of 384 pixels."""
    specs = listed("0.7b", "vision_tower.vision_model.", cut_siglip_tower)
    fields = {"mm_vision_tower": tower_name, "mm_vision_select_layer": -2}
    plan = plan_tensors([CheckpointSource("siglip", Listed(specs), fields, None)], lambda head, embedding: True)
    assert plan.config.vision_feature_layer == -1
    assert plan.config.image_mean == [0.5] * 3
    vision = plan.config.vision_config
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (384, 16, 26)
    assert plan.config.tokens_per_frame == 14 * 14
