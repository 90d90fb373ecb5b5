"""Self-distillation: a smaller frozen VideoMamba guides all tokens of a larger one, which overfits without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from ...modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, VideoMambaRMSNorm
from .clip_trainer import Classification
from .training_settings import VideoMambaTrainingConfig


def cosine_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean of `2 - 2 cos` between vectors of (..., C), in fp32: the squared distance of what has length 1."""
    found, wanted = (F.normalize(each.float(), dim=-1) for each in (found, wanted))
    return (2 - 2 * (found * wanted).sum(-1)).mean()


class DistilledClassifier(nn.Module):
    """A classifier with a head that maps its tokens to the teacher's width; the head is left out when it is saved.

    Raises:
        ValueError: the teacher sees other tokens than the student.
    """

    def __init__(self, student: VideoMambaForVideoClassification, teacher_config: Any) -> None:
        super().__init__()
        self.config = student.config
        if student.config.grid != teacher_config.grid:
            raise ValueError(
                f"the teacher has {teacher_config.grid} tokens (frames, patches), the student {student.config.grid}: "
                "choose image_size, num_frames and patch_size alike"
            )
        self.student = student
        self.distill_norm = VideoMambaRMSNorm(student.config.hidden_size, student.config.layer_norm_eps)
        self.distill_head = nn.Linear(student.config.hidden_size, teacher_config.hidden_size)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, align: bool = False) -> Any:
        """As the student; with `align` logits (B, classes) and mapped tokens (B, S, teacher's C)."""
        if not align:
            return self.student(pixel_values=pixel_values, labels=labels)
        encoded = self.student.videomamba(pixel_values)
        dropped = F.dropout(encoded.pooler_output, self.config.classifier_dropout, self.training)
        logits = self.student.head(dropped)
        return ImageClassifierOutput(logits=logits), self.distill_head(self.distill_norm(encoded.last_hidden_state))


class Distillation(Classification):
    """Cross-entropy plus the alignment of all tokens with a frozen teacher, which sees the same mixed clips; after a
    share `args.distillation_until` of training the cross-entropy alone."""

    def __init__(self, args: VideoMambaTrainingConfig, config: Any, teacher: nn.Module) -> None:
        super().__init__(args, config)
        self.teacher = teacher

    def loss(self, model: nn.Module, inputs: dict[str, Any], progress: float) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        pixels, targets = self.mixed(inputs, progress)
        outputs, tokens = model(pixel_values=pixels, align=True)
        loss = self.of_logits(outputs.logits, targets)
        if progress >= self.args.distillation_until:
            return loss + 0 * tokens.sum(), {"alignment_loss": 0.0}  # under DDP every parameter takes part
        with torch.no_grad():
            wanted = self.teacher.to(pixels.device)(pixels).last_hidden_state
        aligned = cosine_distance(tokens, wanted)
        return loss + self.args.distillation_weight * aligned, {"alignment_loss": aligned.item()}
