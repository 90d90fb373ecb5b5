"""A pipeline, carried out: each run begins with what the one before has made; interrupted, it goes on where it was.

In its folder each run has one of its own: the recipe's checkpoints and result, `settings.json` (what it was begun
with), `result.json` (how it went, written when the run is whole) and `evaluation/`. A run whose
settings, or whose beginning, are others than now is never mixed with new ones.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # comes with accelerate
import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import BUNDLED_CHECKPOINT
from ..conversion.released import usable_folder
from ..files.text_files import read_json
from ..modeling_video_ma2mba.parallel_dims import ParallelDims, process_group_exists
from ..modeling_video_ma2mba.state_writing import write_whole
from .parameter_groups import ORDER, part_of
from .pipeline_settings import RENDERED, Pipeline, StageRun
from .recipe import build_recipe
from .setting_names import BUNDLED
from .smoke_data import write_smoke_data
from .train_run import train_recipe

SETTINGS, RESULT, EVALUATION = "settings.json", "result.json", "evaluation.json"
START = "0_start"
"""Folder of what is measured before the first run."""
_LOGGED = (
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "gpu_peak_gb",
    "tokens_per_second",
)
Evaluate = Callable[[str, Path], dict[str, Any]]
"""Given a model and a folder, measures what the pipeline asks for."""


@dataclass(frozen=True)
class _Begin:
    """What a run starts from: a folder or Hub id (None: nothing), and by what it is known again."""

    model: str | None
    identity: str


class Runs:
    """The runs of a pipeline in its folder.

    Args:
        evaluate: called after each run, by one process, which the others wait for.
        tell: told, by one process, what is begun.
    """

    def __init__(self, pipeline: Pipeline, evaluate: Evaluate, tell: Callable[[str], None]):
        self.pipeline, self.evaluate, self.tell = pipeline, evaluate, tell
        self.out = pipeline.output_dir

    def carry_out(self, first: int = 0, anew: bool = False) -> list[dict[str, Any]]:
        """Do what is not done yet; what is known of each run, in order.

        Args:
            first: begin with this run; those before are taken as they are, and where the last of them is not there,
                this one starts from the pipeline's model.
            anew: set aside what other settings have left in the folders from there on, instead of refusing to go on.

        Raises:
            ValueError: a run was begun with other settings, which are named; see also `train_recipe`.
        """
        found: list[dict[str, Any]] = []
        begin = _Begin(_start_model(self.pipeline), f"model {self.pipeline.model}")
        if self.pipeline.evaluation.get("start") and begin.model is not None and first == 0:
            folder = self.out / START
            found.append({"title": "start", "folder": START, "evaluation": self._evaluation(begin.model, folder)})
        for place, run in enumerate(self.pipeline.runs):
            folder = self.out / run.folder
            if place < first:
                if (folder / RESULT).is_file():
                    result = read_json(folder / RESULT)
                    found.append(self._known(run, result))
                    begin = self._end(result)
                continue
            result = self._run(run, folder, begin, anew)
            begin = self._end(result)
            found.append({**self._known(run, result), "evaluation": self._evaluation(str(begin.model), folder)})
        return found

    def known(self) -> list[dict[str, Any]]:
        """What earlier runs have left behind, in order."""
        found = []
        if (self.out / START / EVALUATION).is_file():
            found.append({"title": "start", "folder": START, "evaluation": read_json(self.out / START / EVALUATION)})
        for run in self.pipeline.runs:
            if (file := self.out / run.folder / RESULT).is_file():
                found.append(self._known(run, read_json(file)))
        return found

    def _known(self, run: StageRun, result: dict[str, Any]) -> dict[str, Any]:
        file = self.out / run.folder / EVALUATION
        return {
            "title": run.title,
            "folder": run.folder,
            **result,
            "evaluation": read_json(file) if file.is_file() else {},
        }

    def _end(self, result: Mapping[str, Any]) -> _Begin:
        return _Begin(str(self.out / result["model"]), result["identity"])

    def _run(self, run: StageRun, folder: Path, begin: _Begin, anew: bool) -> dict[str, Any]:
        """One run: what it has left behind, or what is made of it now."""
        settings = {"from": begin.identity, "settings": run.content, "data": [list(pair) for pair in run.sources]}
        settings = json.loads(json.dumps(settings, default=str))
        kept = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
        _wait()  # before one process writes what another reads
        if kept is not None and kept != settings:
            if not anew:
                raise ValueError(
                    f"{folder} was begun with other settings ({_difference(kept, settings)}): give --from-stage "
                    f"{run.numbers[-1]} to set it aside and train it anew, or another output_dir"
                )
            if _first():
                folder.rename(_free(folder))
        if _first() and not (folder / SETTINGS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        _wait()
        if (folder / RESULT).is_file():
            return read_json(folder / RESULT)
        if _first():
            self.tell(f"{run.title}: {folder}")
        model, facts = (_train_world if run.world else self._train)(run, folder, begin.model)
        if _first():
            stamp = json.dumps([settings, datetime.datetime.now().isoformat()])
            facts |= {
                "max_frames": run.content.get("frames" if run.world else "max_frames"),
                "model": os.path.relpath(model, self.out),
                "identity": hashlib.sha256(stamp.encode()).hexdigest()[:16],
            }
            write_whole(folder / RESULT, json.dumps(facts, indent=1) + "\n")
            for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        _wait()
        return read_json(folder / RESULT)

    def _train(self, run: StageRun, folder: Path, model: str | None) -> tuple[Path, dict[str, Any]]:
        """Train as the run's recipe says."""
        data = [part for _, source in run.sources for part in self._data(source)]
        content = {**run.content, "train_data": data if len(data) > 1 else data[0], "resume": True}
        recipe, args = build_recipe({**content, "model": model, "output_dir": str(folder)})
        _forget_peaks()
        result, trainer = train_recipe(recipe, args)
        facts = _facts(trainer)
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result, facts

    def _data(self, source: Any) -> list[Any]:
        """What a stage names as data; kinds of rendered data are made, or found."""
        if not isinstance(source, dict):
            return source if isinstance(source, list) else [source]
        folder = self.out / "smoke_data" / source[RENDERED]
        if _first():
            write_smoke_data(folder, source[RENDERED])
        _wait()
        return [str(write_smoke_data(folder, source[RENDERED]))]

    def _evaluation(self, model: str, folder: Path) -> dict[str, Any]:
        file = folder / EVALUATION
        wanted = {name: value for name, value in self.pipeline.evaluation.items() if name != "start" and value}
        if not wanted:
            return {}
        wanted = json.loads(json.dumps(wanted))
        if _first():
            known = read_json(file) if file.is_file() else {}
            if known.get("asked") != wanted:
                folder.mkdir(parents=True, exist_ok=True)
                self.tell(f"evaluation: {folder}")
                found = {"asked": wanted, **self.evaluate(model, folder / "evaluation")}
                write_whole(file, json.dumps(found, indent=1) + "\n")
        _wait()
        return read_json(file)


def check_runs(pipeline: Pipeline, first: int) -> None:
    """Refuse settings of runs from `first` on that make no sense, before any of them begins, and likewise what is
    measured on the rendered world.

    Raises:
        ValueError: a setting, and of which stage.
    """
    from ..world.accuracy import WorldAccuracy
    from ..world.train import WorldTraining

    if wanted := pipeline.evaluation.get("world"):
        try:
            WorldAccuracy(**{**wanted, "model": "", "out": ""})
        except ValueError as error:
            raise ValueError(f"evaluation.world: {error}") from None
    for run in pipeline.runs[first:]:
        try:
            if not run.world:
                named = {"train_data": _named(run), "model": "", "output_dir": str(pipeline.output_dir)}
                build_recipe({**run.content, **named})
                continue
            made = WorldTraining(**{**run.content, "out": ""})
            if made.steps is None and made.max_seconds is None:
                raise ValueError("it would never end: give it steps or max_seconds")
        except ValueError as error:
            raise ValueError(f"stage {run.title}: {error}") from None


def _named(run: StageRun) -> Any:
    """What a run names as data; kinds of rendered data stand for themselves."""
    data = [part for _, source in run.sources for part in (source if isinstance(source, list) else [source])]
    return data if len(data) > 1 else data[0]


def check_data(pipeline: Pipeline, first: int, tell: Callable[[str], None]) -> None:
    """Read some rows of the data of every run from `first` on, as training would.

    Raises:
        ValueError, OSError: data cannot be loaded, or more than half of these rows cannot be used: says why.
    """
    from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
    from .data import load_training_data
    from .data.checking import check_row
    from .data.sample_encoding import EncodingSettings

    runs = [run for run in pipeline.runs[first:] if not run.world]
    model = _start_model(pipeline)
    if not runs or model is None:
        return
    processor = VideoMa2mbaProcessor.from_pretrained(usable_folder(model))
    seen = set()
    for run in runs:
        limits = [run.content.get(name) for name in ("max_frames", "max_length")]
        settings = EncodingSettings(run.content.get("labels", "answers"), run.content.get("fps", 1.0), None, *limits)
        options = {name: run.content[name] for name in ("base_dir", "merge_by_video") if name in run.content}
        for stage, data in run.sources:
            if (key := repr((data, settings, options))) in seen:
                continue
            seen.add(key)
            try:
                loaded = load_training_data(data, streaming=bool(run.content.get("streaming")), **options)
                rows = _some_rows(loaded, pipeline.check)
            except (ValueError, OSError) as error:
                raise ValueError(f"stage {stage}: {error}") from error
            broken = [found for row in rows if (found := check_row(processor, row, settings)).error]
            if broken:
                told = (
                    f"stage {stage}: {len(broken)} of {len(rows)} samples that were looked at cannot be used, such as "
                    f"{broken[0].id}: {broken[0].error} ({broken[0].remedy}); `video-ma2mba data check` reads all"
                )
                if 2 * len(broken) > len(rows):
                    raise ValueError(told)
                tell(told)


def _some_rows(data: Any, count: int) -> list[Any]:
    """At most `count` rows, from all parts of the data; of a stream the first."""
    if not hasattr(data, "__len__"):
        return list(itertools.islice(data, count))
    return [data[place] for place in sorted({n * len(data) // count for n in range(count)})]


def _start_model(pipeline: Pipeline) -> str | None:
    """Folder or Hub id of what the first run begins with; None where it makes a new model."""
    return str(BUNDLED_CHECKPOINT) if pipeline.model == BUNDLED else pipeline.model


def _train_world(run: StageRun, folder: Path, model: str | None) -> tuple[Path, dict[str, Any]]:
    """Train on the rendered world, whose videos are made while it goes on."""
    from ..world.train import WorldTraining, train_world

    begin = {} if model is None else {"start_from": model}
    _forget_peaks()
    trainer, _ = train_world(WorldTraining(**{**run.content, **begin, "out": str(folder), "resume": True}))
    return folder / "model", _facts(trainer)


def _facts(trainer: Any) -> dict[str, Any]:
    """How a run went, as plain data."""
    state = trainer.state
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    sizes: Counter[str] = Counter()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            sizes[part_of(name)] += parameter.numel()
    log = [
        {key: entry[key] for key in _LOGGED if key in entry}
        for entry in state.log_history
        if {"loss", "eval_loss"} & set(entry)
    ]
    cuda = torch.cuda.is_available() and not trainer.args.use_cpu
    return {
        "steps": state.global_step,
        "tokens": trainer.tokens_seen,
        "frames": trainer.frames_seen,
        "seconds": round(trainer.seconds_trained, 1),
        "max_length": trainer.args.max_length,
        "learning_rate": trainer.args.learning_rate,
        "trained": {part: sizes[part] for part in ORDER if sizes[part]},
        "trained_parameters": names,
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "host_peak_gb": _host_peak(),
        "processes": trainer.accelerator.num_processes,
        "context_parallel_size": trainer.args.context_parallel_size,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": datetime.date.today().isoformat(),
        "log": log,
    }


def _forget_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _host_peak() -> float:
    """GB of memory that this process had at most since it began; on macOS, which tells no peak, what it has now."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1]) / 1e9
    held = psutil.Process().memory_info()
    return getattr(held, "peak_wset", held.rss) / 1e9


def _first() -> bool:
    return ParallelDims.of_run().first


def _wait() -> None:
    """Until all processes are here, however long one of them evaluates."""
    if process_group_exists():
        group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)


def _difference(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, in words."""
    if kept["from"] != now["from"]:
        return "another checkpoint to start from"
    if kept["data"] != now["data"]:
        return f"its data was {json.dumps(kept['data'])}, now it is {json.dumps(now['data'])}"
    for name in {**now["settings"], **kept["settings"]}:
        before, after = kept["settings"].get(name), now["settings"].get(name)
        if before != after:
            return f"its {name} was {before}, now it is {after}"
    return "which cannot be told"


def _free(folder: Path) -> Path:
    """A name beside a folder that is not taken."""
    return next(
        found for number in range(1, 10**6) if not (found := folder.with_name(f"{folder.name}.old{number}")).exists()
    )
