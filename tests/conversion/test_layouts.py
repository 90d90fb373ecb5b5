"""Layouts are read off names alone, wherever the parts lie."""

import pytest
import torch
from conversion_models import NESTINGS, clip_tower, language_model, official_tensors, projector

from video_ma2mba.conversion.layouts import OFFICIAL, OURS, detect_layout
from video_ma2mba.conversion.report import ConversionError


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("outer", ["", "model.", "module.base."])
def test_names_there_and_back(nesting: str, outer: str):
    with torch.device("meta"):
        names = [outer + name for name in official_tensors(language_model(), clip_tower(), projector(), nesting)]
    layout = detect_layout(names, "source")
    assert (layout.language, layout.projector) == (f"{outer}backbone.", f"{outer}mm_model.mm_projector.")
    assert layout.tower == f"{outer}mm_model.vision_tower.{nesting}"
    canonical = [layout.canonical(name) for name in names]
    assert None not in canonical
    assert len(set(canonical)) == len(names)
    assert [layout.stored(name) for name in canonical] == names
    assert detect_layout(canonical, "ours") == OURS


def test_the_default_layout_is_the_released_one():
    with torch.device("meta"):
        names = list(official_tensors(language_model(), clip_tower(), projector()))
    assert detect_layout(names, "released") == OFFICIAL


@pytest.mark.parametrize(
    ("prefix", "layers"),
    [("", "0 2"), ("model.mm_projector.", "0 2"), ("multi_modal_projector.", "linear_1 linear_2")],
)
def test_projectors_alone(prefix: str, layers: str):
    first, last = layers.split()
    names = [f"{prefix}{layer}.{kind}" for layer in (first, last) for kind in ("weight", "bias")]
    layout = detect_layout(names, "projector")
    assert layout.parts == ["projector"]
    expected = [f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    assert [layout.canonical(name) for name in names] == expected


@pytest.mark.parametrize("names", [["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"], []])
def test_other_models_are_refused(names: list[str]):
    with pytest.raises(ConversionError, match="no language model, vision tower or projector"):
        detect_layout(names, "llama")


def test_two_language_models_are_refused():
    names = [f"{place}.layers.0.mixer.A_log" for place in ("backbone", "teacher")]
    with pytest.raises(ConversionError, match=r"places of a language model: backbone\., teacher\."):
        detect_layout(names, "two")
