"""Which part of the model a stored tensor belongs to, told from the tensors' names themselves.

A layout is where a checkpoint keeps the three parts. The released checkpoints (`model_type: llava_mamba`) came without
code: the names of their language model are those of mamba-ssm, the prefix of their vision part is inferred, so nothing
here relies on it. Canonical names are those of `VideoMa2mbaForConditionalGeneration`.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .report import ConversionError

_LANGUAGE = re.compile(r"^((?:.*?\.)?)(?:layers\.\d+\.(?:mixer|norm)\.|norm_f\.)")
_LANGUAGE_REST = re.compile(r"^(?:embeddings?\.weight|layers\.\d+\.|norm_f\.)")
_TOWER_NAMES = (
    r"embeddings\.(?:class_embedding|patch_embedding|position_embedding|position_ids)|encoder\.layers\.\d+\."
    r"|pre_layrnorm\.|post_layernorm\."
)
_TOWER = re.compile(rf"^((?:.*?\.)?)(?:{_TOWER_NAMES})")
_TOWER_REST = re.compile(rf"^(?:{_TOWER_NAMES}|head\.)")
_PROJECTOR = re.compile(r"^(.*?(?:mm_projector|multi_modal_projector)\.)[\w.]+$")
# A CLIP or SigLIP checkpoint may be whole; its text half is not part of this model.
_UNUSED = re.compile(r"^(?:.*\.)?(?:text_model\.|(?:text|visual)_projection\.|logit_(?:scale|bias)$)")
PARTS = {"language": "language model", "tower": "vision tower", "projector": "projector"}


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint: a prefix per part (None: it lacks the part), and what differs below the prefix."""

    language: str | None = "model.language_model."
    embedding: str = "embeddings"
    head: str = "lm_head.weight"
    tower: str | None = "model.vision_tower."
    projector: str | None = "model.multi_modal_projector."
    projector_layers: tuple[str, str] = ("linear_1", "linear_2")

    def canonical(self, name: str) -> str | None:
        """Canonical name of a stored tensor; None when it belongs to no part."""
        if name == self.head:
            return OURS.head
        if self.projector is not None and name.startswith(self.projector):
            layer, _, rest = name.removeprefix(self.projector).partition(".")
            if layer in self.projector_layers:
                return f"{OURS.projector}{OURS.projector_layers[self.projector_layers.index(layer)]}.{rest}"
            return None
        if self.tower is not None and name.startswith(self.tower):
            rest = name.removeprefix(self.tower)
            if _TOWER_REST.match(rest):
                return OURS.tower + rest
        if self.language is not None and name.startswith(self.language):
            rest = name.removeprefix(self.language)
            if _LANGUAGE_REST.match(rest):
                return OURS.language + re.sub(r"^embeddings?\.", f"{OURS.embedding}.", rest)
        return None

    def stored(self, canonical: str) -> str:
        """Name under which this layout stores a tensor. Inverse of `canonical`.

        A part that the layout lacks is named as in the released checkpoints.
        """
        if canonical == OURS.head:
            return self.head
        if canonical.startswith(OURS.language):
            rest = canonical.removeprefix(OURS.language)
            prefix = self.language if self.language is not None else OFFICIAL.language
            return prefix + re.sub(r"^embeddings\.", f"{self.embedding}.", rest)
        if canonical.startswith(OURS.tower):
            prefix = self.tower if self.tower is not None else OFFICIAL.tower
            return prefix + canonical.removeprefix(OURS.tower)
        layer, _, rest = canonical.removeprefix(OURS.projector).partition(".")
        own = self if self.projector is not None else OFFICIAL
        return f"{own.projector}{own.projector_layers[OURS.projector_layers.index(layer)]}.{rest}"

    @property
    def parts(self) -> list[str]:
        """The parts that this layout has a place for."""
        return [part for part in PARTS if getattr(self, part) is not None]

    def __str__(self) -> str:
        places = (f"{PARTS[part]} under '{getattr(self, part)}'" for part in self.parts)
        return ", ".join(places)

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain data for a conversion's record; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Layout":
        """The layout that `to_dict` has written, also after a round trip through JSON."""
        return cls(**{**fields, "projector_layers": tuple(fields["projector_layers"])})


OURS = Layout()
# Inferred from the same author's later code (interlive-team/ReFoCUS), whose tower is LLaVA's wrapper of transformers'
# 4.x CLIPVisionModel: each adds a level.
OFFICIAL = Layout(
    "backbone.",
    "embedding",
    "lm_head.weight",
    "mm_model.vision_tower.vision_tower.vision_model.",
    "mm_model.mm_projector.",
    ("0", "2"),
)


def detect_layout(names: Iterable[str], source: str) -> Layout:
    """Where a checkpoint keeps which part.

    Args:
        names: of its tensors.
        source: for messages.

    Raises:
        ConversionError: no part of this model among them, or a part in several places.
    """
    names = list(names)
    used = [name for name in names if not unused(name)]
    projector = _one_prefix(_PROJECTOR, used, "projector", source)
    bare = not any(_LANGUAGE.match(name) or _TOWER.match(name) for name in used)
    if projector is None and used and bare and all(re.match(r"^[02]\.(?:weight|bias)$", name) for name in used):
        projector = ""  # the state of a bare nn.Sequential
    rest = [name for name in used if projector is None or not name.startswith(projector)]
    tower = _one_prefix(_TOWER, rest, "vision tower", source)
    language = _one_prefix(_LANGUAGE, rest, "language model", source)
    if language is None and tower is None and projector is None:
        raise ConversionError(source, {"unknown": names}, "no language model, vision tower or projector among them")
    heads = [name for name in rest if re.search(r"(?:^|\.)lm_head\.weight$", name)]
    embedding = "embedding" if f"{language or ''}embedding.weight" in rest else "embeddings"
    numbered = projector is not None and any(re.match(r"\d", name.removeprefix(projector)) for name in used)
    return Layout(
        language=language,
        embedding=embedding,
        head=heads[0] if heads else OURS.head,
        tower=tower,
        projector=projector,
        projector_layers=OFFICIAL.projector_layers if numbered else OURS.projector_layers,
    )


def unused(name: str) -> bool:
    """Whether a tensor is of a known part that this model has no use for: the text half of a CLIP or SigLIP model."""
    return bool(_UNUSED.match(name))


def _one_prefix(pattern: re.Pattern[str], names: list[str], part: str, source: str) -> str | None:
    prefixes = sorted({match[1] for name in names if (match := pattern.match(name))})
    if len(prefixes) > 1:
        raise ConversionError(source, {f"places of a {part}": [prefix or "(no prefix)" for prefix in prefixes]})
    return prefixes[0] if prefixes else None
