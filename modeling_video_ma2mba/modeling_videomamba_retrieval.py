"""Retrieval by VideoMamba: a dual encoder of clips and texts, and fusion layers that compare the two closely.

Parameters are named as in the released models. Shapes: B batch, T frames, P patches of a frame, C width of clips,
K tokens of a text, W width of texts, D width of the space they share.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_videomamba_retrieval import VideoMambaRetrievalConfig
from .modeling_videomamba import (
    VideoMambaModel,
    add_to_residual,
    check_clip,
    drop_path,
    drop_path_rates,
    temporal_order,
)


class ClipFeatures(NamedTuple):
    """What is known of clips: `embeds` (B, D), the mean of one unit vector a frame, which a text is compared with;
    `tokens` (B, patches, C), which fusion layers look at; `streams`, the residual streams asked for."""

    embeds: Tensor
    tokens: Tensor
    streams: tuple[Tensor, ...] = ()


@dataclass
class RetrievalOutput(ModelOutput):
    """`logits_per_text` (texts, clips), similarities over the temperature; `text_embeds`, `video_embeds` (B, D)."""

    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    video_embeds: Tensor | None = None


class VideoMambaForRetrieval(PreTrainedModel):
    """Texts that find clips, and clips that find texts.

    `encode_clips` and `encode_texts` place both in one space, where dot products rank thousands at once; `match` says
    of few pairs, more exactly, how probably they belong together.
    """

    config: VideoMambaRetrievalConfig
    config_class = VideoMambaRetrievalConfig
    base_model_prefix = "retrieval"
    main_input_name = "pixel_values"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["VideoMambaBlock", "BertLayer"]
    _supports_sdpa = True

    def __init__(self, config: VideoMambaRetrievalConfig) -> None:
        from transformers.models.bert.modeling_bert import BertForMaskedLM  # not with every import of the package

        super().__init__(config)
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_encoder = VideoMambaModel(config.vision_config)
        self.pool_norm = nn.LayerNorm(width)
        self.text_encoder = BertForMaskedLM(config.text_config)
        self._add_fusion_layers(width)
        self.vision_proj = nn.Linear(width, config.projection_dim)
        self.text_proj = nn.Linear(text_width, config.projection_dim)
        self.temp = nn.Parameter(torch.tensor(float(config.initial_temperature)))
        self.itm_head = nn.Linear(text_width, 2)
        self.post_init()

    def _add_fusion_layers(self, width: int) -> None:
        """BERT's last layers with cross-attention to tokens of `width`. BERT's own class has it for decoders only."""
        from transformers.models.bert.modeling_bert import BertLayer

        layers = self.text_encoder.bert.encoder.layer
        settings = copy.deepcopy(self.text_encoder.config)
        settings.is_decoder = settings.add_cross_attention = True
        for number in range(len(layers) - self.config.fusion_layers, len(layers)):
            layer = BertLayer(settings, layer_idx=number)
            layer.attention.self.is_causal = False  # a text is read as a whole here
            attention = layer.crossattention.self
            for name in ("key", "value"):
                setattr(attention, name, nn.Linear(width, attention.all_head_size))
            layers[number] = layer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif hasattr(module, "itm_head"):
            init.constant_(module.temp, self.config.initial_temperature)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` also says which class of the travelling code it is."""
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": "modeling_videomamba_retrieval.VideoMambaForRetrieval",
        }
        super().save_pretrained(save_directory, **kwargs)

    @property
    def temperature(self) -> Tensor:
        """The learnt temperature within `config.temperature_range`."""
        low, high = self.config.temperature_range
        return self.temp.clamp(low, high)

    # ------------------------------------------------------------------------------------------------ clips
    def encode_clips(self, pixel_values: Tensor, visible: Tensor | None = None, streams: int = 0) -> ClipFeatures:
        """Encode clips, or pictures.

        Args:
            pixel_values: (B, T, 3, H, W) with T `num_frames` or 1, a picture, which has no temporal position; uint8
                is raw RGB, floating point is already normalised.
            visible: int64 (B, V), increasing: patches `t P + p` that are computed, the others are hidden.
            streams: give the residual stream (B, 1 + V, C) before the mixer of the last so many blocks, and after the
                last one.

        Raises:
            ValueError: another number of frames, frames of another size, or hidden patches in another order of tokens
                than frame after frame.
        """
        encoder, config = self.vision_encoder, self.vision_encoder.config
        picture = pixel_values.ndim == 5 and pixel_values.shape[1] == 1
        if not picture or config.num_frames == 1:
            pixel_values = check_clip(pixel_values, config)
        frames = pixel_values.shape[1]
        delta, residual = encoder.embed(pixel_values, temporal=not picture), None
        temporal = spatial = None
        if encoder.temporal and visible is None:
            temporal, spatial = temporal_order(frames, config.grid[1], delta.device)
        elif encoder.temporal:
            raise ValueError(f"hidden patches need scan_order=spatial_first, not {config.scan_order}")
        if visible is not None:
            chosen = F.pad(visible + 1, (1, 0))[..., None]  # the class token is always there
            delta = delta.gather(1, chosen.expand(-1, -1, delta.shape[-1]))
        kept: list[Tensor] = []
        for number, block in enumerate(encoder.layers):
            delta, residual = block(delta, residual, temporal, spatial)
            if number >= len(encoder.layers) - streams:
                kept.append(residual)
        delta = drop_path(delta, drop_path_rates(config)[-1], self.training)
        residual = add_to_residual(residual, delta, config)
        hidden = encoder.norm_f(residual)
        first, tokens = hidden[:, :1], hidden[:, 1:]
        groups = frames if visible is None else 1  # masked frames differ in what they show: their mean is the clip's
        pooled = self.pool_norm(first + tokens.unflatten(1, (groups, -1)).mean(2))
        embeds = F.normalize(self.vision_proj(pooled).float(), dim=-1).mean(1)
        return ClipFeatures(embeds=embeds, tokens=tokens, streams=(*kept, residual) if streams else ())

    # ------------------------------------------------------------------------------------------------ texts
    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode texts (B, K) of token numbers, with ones in `attention_mask` where they are.

        Returns:
            Unit vectors (B, D); hidden states (B, K, W), which `fuse` and `match` take.
        """
        bert = self.text_encoder.bert
        hidden = bert.embeddings(input_ids=input_ids)
        mask = attention_bias(attention_mask, hidden)
        for layer in bert.encoder.layer[: -self.config.fusion_layers]:
            hidden = layer(hidden, mask)
        return F.normalize(self.text_proj(hidden[:, 0]).float(), dim=-1), hidden

    def fuse(self, hidden: Tensor, attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
        """Hidden states (B, K, W) of texts after they looked at the tokens (B, patches, C) of clips."""
        mask = attention_bias(attention_mask, hidden)
        for layer in self.text_encoder.bert.encoder.layer[-self.config.fusion_layers :]:
            hidden = layer(hidden, mask, tokens)
        return hidden

    def match(self, hidden: Tensor, attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
        """Logits (B, 2) of pairs of texts and clips: no match, match."""
        return self.itm_head(self.fuse(hidden, attention_mask, tokens)[:, 0])

    def predict_words(self, hidden: Tensor) -> Tensor:
        """Logits (B, K, vocabulary) of the words that were at the places of `fuse`'s result."""
        return self.text_encoder.cls(hidden)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> RetrievalOutput:
        """Compare texts (texts, K) with clips (clips, T, 3, H, W)."""
        clips = self.encode_clips(pixel_values)
        texts, _ = self.encode_texts(input_ids, attention_mask)
        logits = texts @ clips.embeds.T / self.temperature.float()
        return RetrievalOutput(logits_per_text=logits, text_embeds=texts, video_embeds=clips.embeds)


def attention_bias(attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
    """(B, 1, K, K), added to the scores of attention among the tokens (B, K, W) of texts: none looks at padding."""
    batch, length = hidden.shape[:2]
    bias = hidden.new_zeros(batch, 1, length, length)
    if attention_mask is None:
        return bias
    return bias.masked_fill(attention_mask[:, None, None] == 0, torch.finfo(torch.float16).min)


VideoMambaForRetrieval.register_for_auto_class("AutoModel")
