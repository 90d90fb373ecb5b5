"""Small real checkpoints in the layout of the released ones, made of transformers' own Mamba-2 and CLIP models."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Mamba2Config, Mamba2ForCausalLM

from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
WIDTH, LAYERS, ROWS = 16, 3, 272
CONFIG = {
    "model_type": "llava_mamba",
    "d_model": WIDTH,
    "n_layer": LAYERS,
    "vocab_size": 262,
    "ssm_cfg": {"layer": "Mamba2", "chunk_size": 8},
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 2},
}
NESTINGS = ["vision_tower.vision_model.", "vision_tower.", "vision_model.", ""]


def language_model(tie: bool = True) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        state_size=8,
        head_dim=8,
        num_heads=4,
        n_groups=1,
        chunk_size=8,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Mamba2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():  # no two layers alike: swapped tensors must show
        if name.endswith(("norm.weight", "norm_f.weight", ".D", "bias")):
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def clip_tower() -> CLIPVisionModel:
    torch.manual_seed(1)
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower


def projector(vision_width: int = TOWER["hidden_size"], width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))


def official_tensors(
    language: nn.Module, tower: nn.Module, mlp: nn.Module, nesting: str = NESTINGS[0]
) -> dict[str, Tensor]:
    """Tensors under the names of the released checkpoints, the output layer stored beside the embedding."""
    tensors = {
        key.replace("backbone.embeddings.", "backbone.embedding."): value.detach().clone()
        for key, value in language.state_dict().items()
    }
    tensors |= {f"mm_model.vision_tower.{nesting}{key}": value for key, value in tower.state_dict().items()}
    return tensors | {f"mm_model.mm_projector.{key}": value for key, value in mlp.state_dict().items()}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, shards: int = 1) -> Path:
    """A folder as the Hub gives it: weights (with an index from two files on), config.json, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    build_byte_tokenizer().save_pretrained(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    keys = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in keys[number::shards]}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(keys[number::shards], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
