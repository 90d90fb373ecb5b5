"""Training for retrieval: contrast, matching with hard negatives, hidden words and alignment with a frozen CLIP.

Shapes: B pairs of a clip and a text, T frames, V visible patches of a clip, K tokens of a text, E the teacher's width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction
from transformers.utils import ModelOutput

from ...modeling_video_ma2mba.modeling_videomamba import normalise
from ...modeling_video_ma2mba.modeling_videomamba_retrieval import ClipFeatures, VideoMambaForRetrieval
from ...retrieval.recall import recall_both_ways
from .masked_pretraining import ClipTeacher, sine_positions, visible_patches
from .retrieval_losses import (
    contrastive_loss,
    gathered,
    hard_negatives,
    hide_words,
    same_pairs,
    similarities,
    word_loss,
)
from .self_distillation import cosine_distance
from .training_settings import VideoMambaTrainingConfig

_BERT = "retrieval.text_encoder"
_TIED = {
    f"{_BERT}.cls.predictions.decoder.weight": f"{_BERT}.bert.embeddings.word_embeddings.weight",
    f"{_BERT}.cls.predictions.decoder.bias": f"{_BERT}.cls.predictions.bias",
}


class RetrievalStudent(nn.Module):
    """A retrieval model with what only training needs: a head a layer that is aligned with the teacher's.

    Args:
        model: what is trained. args: weights of the losses, aligned layers.
        teacher_width: E, of the teacher's features; None where nothing is aligned.
    """

    def __init__(
        self, model: VideoMambaForRetrieval, args: VideoMambaTrainingConfig, teacher_width: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.retrieval, self.args = model.config, model, args
        vision = model.config.vision_config
        layers = 0 if teacher_width is None else args.align_layers
        if not 0 <= layers <= vision.num_hidden_layers:
            raise ValueError(f"align_layers={layers} is not valid: there are {vision.num_hidden_layers} layers")
        heads = (nn.Linear(vision.hidden_size, teacher_width or 1) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Sequential(head, nn.LayerNorm(teacher_width or 1)) for head in heads)
        for frames in (1, vision.num_frames):
            table = sine_positions(1 + frames * vision.grid[1], vision.hidden_size)
            self.register_buffer(f"positions_{frames}", table, persistent=False)
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)
        if not args.mlm_weight:  # what only hidden words need: under DDP every parameter takes part
            model.text_encoder.cls.predictions.transform.requires_grad_(False)
            model.text_encoder.cls.predictions.bias.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        keys: Tensor,
        visible: Tensor | None = None,
        hidden_ids: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Any:
        """In training the losses by name, and features (layers, B, 1 + V, E) to align, or None; in evaluation `loss`
        (of the contrast), `video` and `text` (B, D).

        Args:
            keys: (B, N), see `same_pairs`. visible: (B, V), of the clips. hidden_ids, asked: (B, K), see `hide_words`.
        """
        model = self.retrieval
        if not self.training:
            clips, (texts, _) = model.encode_clips(pixel_values), model.encode_texts(input_ids, attention_mask)
            logits = similarities(clips.embeds, texts, model.temperature)
            loss = contrastive_loss(logits, same_pairs(keys, keys))
            return ModelOutput(loss=loss, video=clips.embeds, text=texts)
        with torch.no_grad():
            model.temp.clamp_(*model.config.temperature_range)
        aligned = len(self.heads) if visible is not None else 0
        clips = model.encode_clips(pixel_values, visible, streams=aligned)
        texts, hidden = model.encode_texts(input_ids, attention_mask)
        losses = {"vtc": self._contrast(clips, texts, keys)}
        if self.args.vtm_weight:
            losses["vtm"] = self._matching(clips, texts, hidden, attention_mask, keys)
        if hidden_ids is not None and asked is not None:
            _, states = model.encode_texts(hidden_ids, attention_mask)
            states = model.fuse(states, attention_mask, clips.tokens)
            chosen = asked != -100  # logits of a vocabulary are large: those asked for only
            losses["mlm"] = word_loss(model.predict_words(states[chosen]), asked[chosen])
        if pixel_values.shape[1] == 1 and model.vision_encoder.temporal_pos_embedding is not None:
            losses["vtc"] = losses["vtc"] + 0 * model.vision_encoder.temporal_pos_embedding.sum()
        if not aligned:
            unused = sum((parameter.sum() for parameter in self.heads.parameters()), texts.new_zeros(()))
            losses["vtc"] = losses["vtc"] + 0 * unused
            return losses, None
        return losses, self._features(clips, visible, pixel_values.shape[1])

    def _contrast(self, clips: ClipFeatures, texts: Tensor, keys: Tensor) -> Tensor:
        everywhere = gathered(keys)
        logits = similarities(gathered(clips.embeds), gathered(texts), self.retrieval.temperature)
        return contrastive_loss(logits, same_pairs(everywhere, everywhere))

    def _matching(
        self, clips: ClipFeatures, texts: Tensor, hidden: Tensor, attention_mask: Tensor, keys: Tensor
    ) -> Tensor:
        """Cross-entropy of the match of all pairs, of every text with a wrong clip, and of every clip with a wrong
        text."""
        same = same_pairs(keys, keys)
        logits = similarities(clips.embeds, texts, self.retrieval.temperature)
        text_rows, wrong_clips = hard_negatives(logits.T, same.T)
        clip_rows, wrong_texts = hard_negatives(logits, same)
        own = torch.arange(len(keys), device=keys.device)
        text, clip = torch.cat([own, text_rows, wrong_texts]), torch.cat([own, wrong_clips, clip_rows])
        found = self.retrieval.match(hidden[text], attention_mask[text], clips.tokens[clip])
        wanted = torch.arange(len(text), device=keys.device) < len(own)
        return F.cross_entropy(found.float(), wanted.long())

    def _features(self, clips: ClipFeatures, visible: Tensor, frames: int) -> Tensor:
        positions = getattr(self, f"positions_{frames}")[F.pad(visible + 1, (1, 0))]
        *before, last = clips.streams
        streams = before
        if not self.args.align_before_last_mixer:
            norm = self.retrieval.vision_encoder.norm_f
            streams = [norm(stream) for stream in (*before[1:], last)]
        return torch.stack([head(each + positions) for head, each in zip(self.heads, streams, strict=True)])


def _without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out of a checkpoint what BERT has under two names: files of weights hold every tensor once."""
    for name in _TIED:
        state.pop(f"{prefix}{name}", None)


def _with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What `_without_tied` left out."""
    for name, other in _TIED.items():
        if f"{prefix}{other}" in state:
            state.setdefault(f"{prefix}{name}", state[f"{prefix}{other}"])


class RetrievalObjective:
    """The weighted sum of the losses of `RetrievalStudent`, and of the alignment with a teacher.

    Args:
        teacher: a frozen CLIP; None aligns nothing, and hides patches, if any, without it. special: numbers of the
            tokens that are never hidden. mask_id: of the token that stands for a hidden word.
    """

    def __init__(
        self,
        args: VideoMambaTrainingConfig,
        config: Any,
        teacher: ClipTeacher | None,
        special: list[int],
        mask_id: int,
    ) -> None:
        self.args, self.config, self.teacher = args, config, teacher
        self.special, self.mask_id = special, mask_id
        if teacher is not None:
            teacher.check(config.vision_config)

    def loss(self, model: nn.Module, inputs: dict[str, Any], progress: float) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        inputs = dict(inputs)
        vision = self.config.vision_config
        pixels = inputs["pixel_values"]
        pixels = inputs["pixel_values"] = normalise(pixels, vision, torch.empty(0, device=pixels.device))
        wanted = attention = visible = None
        if self.teacher is not None:
            wanted, attention = self.teacher.to(pixels.device)(pixels)
        if self.args.mask_ratio:
            frames = pixels.shape[1]
            ratio = self.args.picture_mask_ratio if frames == 1 else self.args.mask_ratio
            visible = inputs["visible"] = visible_patches(
                *(self.args.mask, len(pixels), frames, vision.patches_per_side, ratio),
                attention=attention,
                device=pixels.device,
            )
        if self.args.mlm_weight:
            ids = inputs["input_ids"]
            kept = torch.isin(ids, torch.tensor(self.special, device=ids.device)) | (inputs["attention_mask"] == 0)
            inputs["hidden_ids"], inputs["asked"] = hide_words(
                ids,
                kept,
                share=self.args.mlm_probability,
                mask_id=self.mask_id,
                words=self.config.text_config.vocab_size,
            )
        losses, features = model(**inputs)
        if features is not None and wanted is not None and visible is not None:
            chosen = F.pad(visible + 1, (1, 0))[None, ..., None].expand(len(wanted), -1, -1, wanted.shape[-1])
            losses["uta"] = cosine_distance(features, wanted.gather(2, chosen))
        total = sum(getattr(self.args, f"{name}_weight") * value for name, value in losses.items())
        return total, {f"{name}_loss": value.item() for name, value in losses.items()}  # type: ignore[return-value]


def pair_recall(evaluated: EvalPrediction) -> dict[str, float]:
    """Recall both ways among the held-out pairs, by the dual encoder alone."""
    video, text = (torch.from_numpy(np.asarray(each)).float() for each in evaluated.predictions)
    keys = torch.from_numpy(np.asarray(evaluated.label_ids))
    return recall_both_ways(text @ video.T, same_pairs(keys, keys))
