"""The released multi-modal VideoMambas: what of their tensors is a retrieval model, and of which sizes."""

import re
from typing import Any

import torch
from torch import Tensor

from ..modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ..modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig

_WORDS = "text_encoder.bert.embeddings.word_embeddings.weight"
_OWN = re.compile(
    r"pool_norm\.\w+|(?:vision_proj|text_proj|itm_head)\.\w+|temp|"
    r"text_encoder\.(?:bert\.embeddings\.(?!position_ids)|bert\.encoder\.|cls\.)[\w.]+"
)
# BERT's predictions of words share these with its embeddings; files of ours hold them once.
_TIED = {
    "text_encoder.cls.predictions.decoder.weight": _WORDS,
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}
_HEAD_WIDTH = 64  # of every published BERT


def retrieval_names(beside: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the tensors beside an encoder those of a retrieval model.

    Returns:
        Stored name -> ours, none where there is no text encoder; stored name -> stored name of the same values.
    """
    ours = {name: name.removeprefix("module.").removeprefix("vision_encoder.") for name in beside}
    stored = {own: name for name, own in ours.items()}
    if _WORDS not in stored:
        return {}, {}
    names = {name: own for name, own in ours.items() if _OWN.fullmatch(own)}
    copies = {}
    for tied, other in _TIED.items():
        if tied not in stored or other not in stored:
            continue
        names.pop(stored[tied])
        if torch.equal(beside[stored[tied]], beside[stored[other]]):
            copies[stored[tied]] = stored[other]
    return names, copies


def retrieval_config(vision: VideoMambaConfig, tensors: dict[str, Tensor]) -> VideoMambaRetrievalConfig:
    """What the shapes of tensors, named as ours, say of a model beside an encoder with the configuration `vision`."""
    words, layer = tensors[_WORDS], "text_encoder.bert.encoder.layer."

    def numbers(part: str) -> set[int]:
        return {int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(layer)}(\d+)\.{part}", name))}

    def rows(name: str, least: int) -> int:
        return len(tensors[name]) if name in tensors else least

    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "num_hidden_layers": max(numbers("attention"), default=0) + 1,
        "num_attention_heads": max(1, words.shape[1] // _HEAD_WIDTH),
        "intermediate_size": rows(f"{layer}0.intermediate.dense.weight", 4 * words.shape[1]),
        "max_position_embeddings": rows("text_encoder.bert.embeddings.position_embeddings.weight", 512),
        "type_vocab_size": rows("text_encoder.bert.embeddings.token_type_embeddings.weight", 2),
    }
    return VideoMambaRetrievalConfig(
        vision,
        text,
        fusion_layers=len(numbers("crossattention")) or 1,
        projection_dim=rows("vision_proj.weight", 512),
        max_text_length=min(32, text["max_position_embeddings"]),
    )
