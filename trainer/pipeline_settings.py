"""Pipelines: several training runs, one after the other, as one file says them; read, overridden, checked.

Needs neither torch nor TRL. A pipeline has stages; `order` says which run, and in which order; a stage with `parts` is
several runs, one for each part's settings.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipe_files import SMOKE, laid_over, parse_overrides, read_yaml, shipped_in
from .setting_names import check_recipe, check_settings, fields_of

PIPELINES = Path(__file__).with_name("pipelines")
RENDERED = "rendered"
"""In the place of data: rendered data of this kind, of a smoke run."""
_BASE = "base"  # of a file of one's own: the pipeline that it changes
_KEYS = ("output_dir", "model", "order", "stages", "settings", "evaluation", "check", _BASE, SMOKE)
_IN_FILES = ("stages", "settings", _BASE, SMOKE)
_STAGE_KEYS = ("recipe", "world", "parts", "mixed_with")
_EVALUATIONS = ("start", "world", "needles", "benchmarks")
_ODD = re.compile(r"[^\w.=-]+")
_CHECKED = 32  # rows of each stage's data that are read before anything trains


@dataclass(frozen=True)
class StageRun:
    """One training run of a pipeline.

    Attributes:
        stages: whose data it learns from, by name; its settings are those of the last. numbers: theirs, from 1.
        part: which of the stage's parts this is, in a word; empty where it has none.
        content: settings of the recipe, or of `world.train` where `world` is true; `sources`: its data, where each
            is from: the stage, and what it says.
    """

    stages: tuple[str, ...]
    numbers: tuple[int, ...]
    part: str
    content: dict[str, Any]
    world: bool = False
    sources: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """What people call it."""
        return " and ".join(self.stages) + (f", {self.part}" if self.part else "")

    @property
    def folder(self) -> str:
        """Where it is kept, below the pipeline's folder."""
        name = "+".join(map(str, self.numbers)) + "_" + "+".join(self.stages)
        return f"{name}/{_ODD.sub('_', self.part)}" if self.part else name


@dataclass(frozen=True)
class Pipeline:
    """What `read_pipeline` makes of a file: runs in their order, and what is done around them.

    Attributes:
        model: what the first run starts from; None where it makes a new one. evaluation: what is measured after each
            run, by kind. check: rows of each run's data that are read before anything trains.
    """

    name: str
    output_dir: Path
    model: str | None
    runs: tuple[StageRun, ...]
    evaluation: dict[str, Any]
    check: int
    smoke: bool


def read_pipeline(source: str | os.PathLike[str], overrides: Sequence[str] = (), smoke: bool = False) -> Pipeline:
    """Read a pipeline file, or the shipped one of that name, and lay overrides over it.

    Args:
        overrides: `key=value` texts: keys of the pipeline, `STAGE.key` for a setting of one stage (by name or
            number), `evaluation.kind.key`, or a setting of a recipe, which is then every stage's.
        smoke: take the smoke sections, of the pipeline and of its recipes.

    Raises:
        FileNotFoundError: no such file. ValueError: something that is unknown or makes no sense, in one sentence.
    """
    content = _content(source)
    short = content.pop(SMOKE, None)
    if smoke:
        if not isinstance(short, dict):
            raise ValueError(f"{source} has no section {SMOKE!r}: leave --smoke away")
        content = _merged(content, short)
    _known(content, _KEYS, f"{source}")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError(f"{source} names no stages: `stages: {{NAME: {{recipe: ...}}}}`")
    own = _own(parse_overrides(overrides), list(stages))
    content |= own.pipeline
    content["evaluation"] = evaluation = _evaluation(content.get("evaluation"), own.evaluation)
    check = content.get("check", _CHECKED)
    if isinstance(check, bool) or not isinstance(check, int) or check < 0:
        raise ValueError(f"check={check} is not valid: it must be a number of rows, 0 for none")
    order = _order(content.get("order"), list(stages))
    runs = [run for group in order for run in _runs(group, stages, content.get("settings") or {}, own, smoke)]
    model = content.get("model")
    if model is None and not runs[0].world:
        raise ValueError(
            "the pipeline names no model: add model=DIR, such as one that `video-ma2mba init` has composed"
        )
    name = Path(source).stem
    out = Path(str(content.get("output_dir") or f"runs/{name}"))
    return Pipeline(name, out, None if model is None else str(model), tuple(runs), evaluation, check, smoke)


def first_run(pipeline: Pipeline, stage: str) -> int:
    """The place in `pipeline.runs` of the first run of a stage, given by name or number.

    Raises:
        ValueError: no run of the pipeline is of such a stage.
    """
    for place, run in enumerate(pipeline.runs):
        if stage in run.stages or stage in map(str, run.numbers):
            return place
    known = ", ".join(
        dict.fromkeys(
            f"{n} ({name})" for run in pipeline.runs for n, name in zip(run.numbers, run.stages, strict=True)
        )
    )
    raise ValueError(f"--from-stage {stage}: the stages of this pipeline are {known}")


@dataclass(frozen=True)
class _Own:
    """Overrides, by what they are about."""

    pipeline: dict[str, Any]
    evaluation: dict[str, Any]
    settings: dict[str, Any]
    stages: dict[str, dict[str, Any]]


def _own(given: Mapping[str, Any], names: list[str]) -> _Own:
    own = _Own({}, {}, {}, {name: {} for name in names})
    for key, value in given.items():
        head, dot, rest = key.partition(".")
        if not dot:
            if key in _IN_FILES:
                raise ValueError(f"{key}=... belongs into a file: give STAGE.key=value, or key=value for all stages")
            (own.pipeline if key in _KEYS else own.settings)[key] = value
        elif head == "evaluation":
            place = own.evaluation
            *path, last = rest.split(".")
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        else:
            own.stages[_stage(head, names)][rest] = value
    return own


def _content(source: str | os.PathLike[str]) -> dict[str, Any]:
    content = read_yaml(source, PIPELINES, "pipeline")
    if (base := content.pop(_BASE, None)) is None:
        return content
    if base not in shipped_in(PIPELINES):
        raise ValueError(f"{source}: base: {base} is none of {', '.join(shipped_in(PIPELINES))}")
    return _merged(_content(base), content)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries one over the other, those in them likewise."""
    result = copy.deepcopy(dict(under))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            raise ValueError(f"{where}: {key!r} is unknown" + (f": do you mean {close[0]!r}?" if close else ""))


def _stage(name: str, names: list[str]) -> str:
    """The stage called so, or of that number."""
    if name in names:
        return name
    if name.isdecimal() and 0 < int(name) <= len(names):
        return names[int(name) - 1]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"do you mean {close[0]!r}?" if close else f"they are {', '.join(names)}, or 1 to {len(names)}"
    raise ValueError(f"{name!r} is no stage of this pipeline: {hint}")


def _order(given: Any, names: list[str]) -> list[list[str]]:
    """Stages in their order, those of one run together: `1-2-4-(3&5)`, or a list.

    Raises:
        ValueError: no such stage, or one twice.
    """
    if given is None:
        return [[name] for name in names]
    parts = [str(part) for part in given] if isinstance(given, list) else str(given).split("-")
    order = [[_stage(word.strip(), names) for word in part.strip(" ()").split("&")] for part in parts]
    flat = [name for group in order for name in group]
    twice = [name for name in names if flat.count(name) > 1]
    if twice:
        raise ValueError(f"order={given}: {twice[0]} comes twice")
    return order


def _evaluation(given: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured, by kind."""
    if not isinstance(given or {}, Mapping):
        raise ValueError(f"evaluation={given}: give kinds of it, evaluation.KIND.OPTION=...")
    evaluation = _merged(given or {}, own)
    _known(evaluation, _EVALUATIONS, "evaluation")
    start, *kinds = _EVALUATIONS
    if evaluation.get(start) not in (None, True, False):
        raise ValueError(f"evaluation.{start}={evaluation[start]} is not valid: it must be true or false")
    for kind in kinds:
        if evaluation.get(kind) and not isinstance(evaluation[kind], Mapping):
            raise ValueError(f"evaluation.{kind}={evaluation[kind]}: give its options, evaluation.{kind}.OPTION=...")
    return evaluation


def _runs(
    group: list[str], stages: Mapping[str, Any], common: Mapping[str, Any], own: _Own, smoke: bool
) -> list[StageRun]:
    """The runs of the stages that learn together."""
    stage = _merged(stages[group[-1]], own.stages[group[-1]])
    if ("recipe" in stage) == ("world" in stage):
        raise ValueError(f"stage {group[-1]} needs either `recipe: NAME` or `world: {{...}}`")
    numbers = tuple(list(stages).index(name) + 1 for name in group)
    if "world" in stage:
        settings = {key: value for key, value in stage.items() if key not in _STAGE_KEYS}
        content = {**common, **stage["world"], **settings, **own.settings, **own.stages[group[-1]]}
        known = _world_settings()
        _known(content, list(known), f"stage {group[-1]}")
        try:
            content = check_settings(content, known)
        except ValueError as error:
            raise ValueError(f"stage {group[-1]}: {error}") from None
        if len(group) > 1:
            raise ValueError(f"{'&'.join(group)}: stages of the rendered world are not mixed; give them other kinds")
        return [StageRun(tuple(group), numbers, "", content, True)]
    mixed = stage.get("mixed_with") or []
    mixed = [_stage(str(name), list(stages)) for name in ([mixed] if isinstance(mixed, str | int) else mixed)]
    others = list(dict.fromkeys([*group[:-1], *mixed]))
    runs, parts = [], stage.get("parts") or [{}]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"stage {group[-1]}: parts={parts}: give a list of settings, such as [{{length: 64k}}]")
    for part in parts:
        given = _settings(stage, part, common, own, group[-1])
        if "resume" in given:
            raise ValueError(f"stage {group[-1]}: resume is always on: the same command goes on where it was")
        for key in ("output_dir", "model"):
            if key in given:
                raise ValueError(f"stage {group[-1]}: {key} is the pipeline's to decide: give {key}=... for the whole")
        content = laid_over(stage["recipe"], given, smoke)
        if content.get("lora_rank") and content.get("merge_adapter") is False:
            raise ValueError(f"stage {group[-1]}: merge_adapter=false leaves no model that the next stage could train")
        sources = [(name, _data(stages, common, own, name, smoke)) for name in others]
        sources.append((group[-1], _named_data(content, smoke)))
        for key in ("output_dir", "resume", "model", "train_data", "smoke_data"):
            content.pop(key, None)
        for name, data in sources:
            if data is None:
                raise ValueError(f"stage {name} names no data: add {name}.train_data=...")
        word = next((f"{value}" for value in part.values()), "")
        check_recipe({**content, "train_data": "given", "model": "given", "output_dir": "given"})
        runs.append(StageRun(tuple(group), numbers, word, content, sources=tuple(sources)))
    if len(parts) > 1 and (same := {key for part in parts for key in part} & set(own.stages[group[-1]])):
        name, key = group[-1], min(same)
        raise ValueError(f"stage {name}: its parts differ in {key}: give {name}.parts='[{{{key}: …}}]'")
    return runs


def _world_settings() -> dict[str, str]:
    """The settings of `world.train` with their types, without importing it."""
    return settings_of("train.py", "WorldTraining", ("out", "resume", "start_from"))


def settings_of(file: str, name: str, without: Sequence[str]) -> dict[str, str]:
    """Fields of a data class in a file of `world`, with their types, without importing it."""
    found = fields_of(Path(__file__).parents[1] / "world" / file, name, []) or {}
    return {key: kind for key, kind in found.items() if key not in without}


def _data(stages: Mapping[str, Any], common: Mapping[str, Any], own: _Own, name: str, smoke: bool) -> Any:
    """What another stage learns from."""
    stage = _merged(stages[name], own.stages[name])
    if "recipe" not in stage:
        raise ValueError(f"stage {name} has no data of its own that could be mixed in")
    return _named_data(laid_over(stage["recipe"], _settings(stage, {}, common, own, name), smoke), smoke)


def _settings(
    stage: Mapping[str, Any], part: Mapping[str, Any], common: Mapping[str, Any], own: _Own, name: str
) -> dict[str, Any]:
    """What is laid over the recipe of a stage, or of a part of it."""
    given = {**common, **stage, **part, **own.settings, **own.stages[name]}
    return {key: value for key, value in given.items() if key not in _STAGE_KEYS}


def _named_data(content: Mapping[str, Any], smoke: bool) -> Any:
    if content.get("train_data") or not smoke:
        return content.get("train_data")
    return {RENDERED: content.get("smoke_data", "questions")}
