"""Account for every tensor of the sources: which place in the model it takes, and what does not fit."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba.vision_towers import TOWERS

from .config_from_tensors import missing_parts, model_config, text_config_from_tensors, vision_fields_from_tensors
from .layouts import OURS, Layout, detect_layout, unused
from .report import ConversionError, ConversionReport, TensorRow
from .tensor_store import DTYPES, TensorSpec, TensorStore

_EMBEDDING = f"{OURS.language}{OURS.embedding}.weight"
_POSITIONS = f"{OURS.tower}embeddings.position_ids"

Place = tuple[int, str]
"""Number of the source, and the tensor's name there."""


class CheckpointSource:
    """One checkpoint: its tensors, the fields of its config.json (may be empty), its folder (None: a single file).

    Attributes:
        layout: recognised from the tensors' names.
    """

    def __init__(self, name: str, store: TensorStore, fields: dict[str, Any], folder: Path | None) -> None:
        self.name, self.store, self.fields, self.folder = name, store, fields, folder
        tower = fields.get("vision_config")
        if isinstance(tower, dict) and tower.get("model_type") == "videomamba":
            raise ValueError(f"{name} has a VideoMamba tower, for which there is no other layout: it stays as it is")
        self.layout: Layout = detect_layout(store.specs, name)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> data type and shape of every tensor of the checkpoint, without reading any."""
        return self.store.specs


@dataclass
class TensorPlan:
    """A whole model, tensor by tensor.

    Attributes:
        config: of the model; its `video_token_id` is provisional until the tokenizer is known.
        tensors: canonical name -> where it is stored, in the order of the sources.
        positions: number of the source -> name of stored position numbers, which the model derives itself.
        language_source: number of the source that holds the language model.
        head_stored: the source has an output layer of its own, equal to the embedding or not.
        report: what became of every tensor.
    """

    config: VideoMa2mbaConfig
    tensors: dict[str, Place]
    positions: dict[int, str]
    language_source: int
    head_stored: bool
    report: ConversionReport


@dataclass
class _Found:
    """Tensors of all sources by canonical name, and those that have none."""

    places: dict[str, Place] = field(default_factory=dict)
    positions: dict[int, str] = field(default_factory=dict)
    left_over: list[Place] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def plan_tensors(
    sources: Sequence[CheckpointSource],
    head_is_embedding: Callable[[Place, Place], bool],
    *,
    config: VideoMa2mbaConfig | None = None,
    vision_config: dict[str, Any] | None = None,
    statistics: Mapping[str, list[float]] | None = None,
    leave_out: Sequence[str] = (),
) -> TensorPlan:
    """Give every tensor its place, or refuse.

    Args:
        sources: checkpoints that together hold a language model, a vision tower and a projector.
        head_is_embedding: whether the tensors of two places (output layer, embedding) are the same, bit for bit.
        config: of the model; None derives it from shapes and config.json.
        vision_config: of the tower, where the source's config.json has none.
        statistics: mean and deviation of pixels, where known.
        leave_out: patterns of names that may stay without a place.

    Raises:
        ConversionError: missing, unknown or mis-shaped tensors; all of them.
    """
    name = " + ".join(source.name for source in sources)
    found = _collect(sources, leave_out)
    specs = {canonical: sources[i].specs[stored] for canonical, (i, stored) in found.places.items()}
    if absent := missing_parts(specs):
        raise ConversionError(
            name, {"missing": [f"the whole {part}" for part in absent]}, "name further sources that hold them"
        )
    language = next(i for i, source in enumerate(sources) if source.layout.language is not None)
    head_stored = OURS.head in found.places
    tie = _declared_tie(sources[language].fields)
    if head_stored and _EMBEDDING in found.places:
        tie = head_is_embedding(found.places[OURS.head], found.places[_EMBEDDING])
    if config is None:
        config = _derive_config(sources, specs, language, vision_config, statistics or {}, tie)
    else:
        config.tie_word_embeddings = tie
    wanted = _wanted(config, tie)
    tied = found.places.pop(OURS.head) if tie and head_stored else None
    _refuse(name, sources, found, wanted)

    actions: dict[Place, tuple[str, str | None]] = {place: ("left over", None) for place in found.left_over}
    actions |= {place: ("recomputed", None) for place in found.positions.items()}
    for canonical, place in found.places.items():
        actions[place] = ("kept" if place[1] == canonical else "renamed", canonical)
    if tied is not None:
        actions[tied] = ("tied", _EMBEDDING)
    report = ConversionReport([source.name for source in sources], [str(source.layout) for source in sources])
    for index, source in enumerate(sources):
        for stored, spec in source.specs.items():
            action, became = actions[index, stored]
            report.rows.append(TensorRow(stored, action, became, spec.dtype, spec.shape))
    kept = [sources[i].specs[stored] for i, stored in found.places.values()]
    report.parameters, report.nbytes = sum(s.numel for s in kept), sum(s.nbytes for s in kept)
    return TensorPlan(config, found.places, found.positions, language, head_stored, report)


def _collect(sources: Sequence[CheckpointSource], leave_out: Sequence[str]) -> _Found:
    found = _Found()
    for index, source in enumerate(sources):
        for stored in source.specs:
            canonical = source.layout.canonical(stored)
            if any(fnmatch.fnmatchcase(stored, pattern) for pattern in leave_out) or unused(stored):
                found.left_over.append((index, stored))
            elif canonical == _POSITIONS:
                found.positions[index] = stored
            elif canonical is None:
                found.unknown.append(stored)
            elif canonical in found.places:
                other = sources[found.places[canonical][0]].name
                raise ConversionError(
                    source.name, {f"tensors that {other} holds as well": [stored]}, "name one source for each part"
                )
            else:
                found.places[canonical] = (index, stored)
    return found


def _refuse(name: str, sources: Sequence[CheckpointSource], found: _Found, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise with everything that keeps the tensors from filling the model."""
    layout = _combined([source.layout for source in sources])
    missing = [layout.stored(canonical) for canonical in wanted if canonical not in found.places]
    unknown = [*found.unknown, *(place[1] for canonical, place in found.places.items() if canonical not in wanted)]
    misshaped = [
        f"{stored} is {list(sources[i].specs[stored].shape)} instead of {list(wanted[canonical])}"
        for canonical, (i, stored) in found.places.items()
        if canonical in wanted and sources[i].specs[stored].shape != wanted[canonical]
    ]
    mistyped = [
        f"{stored} is {sources[i].specs[stored].dtype}, not floating point"
        for i, stored in found.places.values()
        if not DTYPES[sources[i].specs[stored].dtype].is_floating_point
    ]
    problems = {"missing": missing, "unknown": unknown, "mis-shaped": misshaped, "mistyped": mistyped}
    if any(problems.values()):
        only_unknown = not (missing or misshaped or mistyped)
        remedy = "leave_out= names unknown tensors that may be dropped" if only_unknown else ""
        raise ConversionError(name, problems, remedy)


def _combined(layouts: Sequence[Layout]) -> Layout:
    """For names in messages: every part as in the layout that has it."""
    fields = {"language": None, "tower": None, "projector": None}
    for layout in layouts:
        for part in layout.parts:
            fields[part] = getattr(layout, part)
            if part == "language":
                fields |= {"embedding": layout.embedding, "head": layout.head}
            if part == "projector":
                fields["projector_layers"] = layout.projector_layers
    return Layout(**fields)


def _wanted(config: VideoMa2mbaConfig, tie: bool) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of a model of that configuration; no memory is taken."""
    with torch.device("meta"):
        whole = VideoMa2mbaForConditionalGeneration(config)
    shapes = {key: tuple(value.shape) for key, value in whole.state_dict().items()}
    if tie:
        shapes.pop(OURS.head)
    return shapes


def _declared_tie(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("tie_word_embeddings", fields.get("tie_embeddings", True)))


def _derive_config(
    sources: Sequence[CheckpointSource],
    specs: dict[str, TensorSpec],
    language: int,
    vision_config: dict[str, Any] | None,
    statistics: Mapping[str, list[float]],
    tie: bool,
) -> VideoMa2mbaConfig:
    text_fields = sources[language].fields
    text_config = text_config_from_tensors(specs, text_fields.get("text_config", text_fields), sources[language].name)
    text_config.tie_word_embeddings = tie
    # Training settings of the vision part lie beside whatever part they were saved with.
    settings = {k: v for source in sources for k, v in source.fields.items() if k.startswith("mm_")}
    tower = next(source for source in sources if source.layout.tower is not None)
    declared = vision_config
    if declared is None:
        declared = tower.fields if tower.fields.get("model_type") in TOWERS else None
        declared = declared or tower.fields.get("vision_config") or {}
    vision_fields = vision_fields_from_tensors(specs, declared, settings.get("mm_vision_tower"), tower.name)
    return model_config(text_config, vision_fields, settings, statistics, tie)
