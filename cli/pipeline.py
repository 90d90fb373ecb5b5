"""`video-ma2mba pipeline`: several training stages in turn, each measured, and a page about all of them."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading

from .loading import while_loading
from .options import check_path_or_id
from .run_facts import command_line, require_matplotlib
from .terminal import note
from .train import NEEDS_TRL, quiet_libraries

_TEXT_TOKENS = 512  # beside the frames of a sample, about
_OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"),
)


def pipeline(
    config: Annotated[str, typer.Option(help="Pipeline: longvila, or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that replace the pipeline's: model=DIR, STAGE.train_data=FILE, STAGE.learning_rate=1e-5, …",
            show_default=False,
        ),
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option(help="Begin with this stage, by number or name.", show_default=False)
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A minute on a CPU: the smoke sections, on rendered videos.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Show what each stage would do, and train nothing.")] = False,
) -> None:
    """Train stage after stage, each from the checkpoint of the one before; the same under torchrun.

    Interrupted, the same command goes on. --from-stage takes what was made before that stage (or model=, where nothing
    was), and sets aside what other settings have left behind from there on. A stage's settings are its recipe's, given
    as STAGE.key=value, or as key=value for all stages. Writes report.html, report.json and report.csv.
    """
    from video_ma2mba.trainer.pipeline_settings import first_run, read_pipeline

    plan = read_pipeline(config, overrides or [], smoke)
    first = 0 if from_stage is None else first_run(plan, from_stage)
    if plan.output_dir.exists() and not plan.output_dir.is_dir():
        raise ValueError(f"output_dir={plan.output_dir} is a file: name a folder")
    _check_paths(plan)
    _check_evaluation(plan.evaluation)
    if show:
        _show(plan)
        return
    if find_spec("trl") is None:
        raise ImportError(NEEDS_TRL, name="trl")
    require_matplotlib("the report")
    given = {"--config": config, "--from-stage": from_stage, "--smoke": smoke}
    command = " ".join([command_line("pipeline", given), *(overrides or [])])
    with while_loading():
        from video_ma2mba.loading import join_ranks
        from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims
        from video_ma2mba.trainer.pipeline_report import write_report
        from video_ma2mba.trainer.pipeline_run import Runs, check_data, check_runs
    quiet_libraries()
    join_ranks()
    check_runs(plan, first)
    first_process = ParallelDims.of_run().first
    runs = Runs(plan, lambda model, out: _evaluate(plan.evaluation, model, out), note)
    if plan.check and not plan.smoke:
        check_data(plan, first, note)
    try:
        runs.carry_out(first, from_stage is not None)
    finally:  # what is known so far, also where a stage fails
        if first_process and (known := runs.known()):
            page = write_report(plan.output_dir, plan.name, known, command)
    if first_process:
        typer.echo(f"{page}")
        note(f'ask it: video-ma2mba ask VIDEO "QUESTION" --model {plan.output_dir / known[-1]["model"]}')


def _check_paths(plan: Any) -> None:
    """Refuse a model or data that are not there, before anything is loaded."""
    from video_ma2mba.trainer.setting_names import BUNDLED

    if plan.model not in (None, BUNDLED):
        check_loading(plan.model)
    for run in plan.runs:
        for stage, data in run.sources:
            for source in data if isinstance(data, list) else [data]:
                if not isinstance(source, dict):
                    missing = "no such file or folder (and it is no data set id such as owner/name)"
                    check_path_or_id(str(source), f"stage {stage}: {source}: {missing}")


def _check_evaluation(wanted: dict[str, Any]) -> None:
    """Refuse what cannot be measured before anything trains, as far as that can be told."""
    from video_ma2mba.trainer.pipeline_settings import settings_of
    from video_ma2mba.trainer.setting_names import check_settings

    from .eval import evaluate
    from .niah import needle_grid, niah

    known: dict[str, dict[str, Any]] = {"world": settings_of("accuracy.py", "WorldAccuracy", ("model", "out"))}
    for kind, command in (("needles", niah), ("benchmarks", evaluate)):
        own = [one for one in inspect.signature(command).parameters.values() if one.name not in ("model", "out")]
        known[kind] = {one.name: one.annotation.__origin__ for one in own}
    for kind, options in known.items():
        given = dict(wanted.get(kind) or {})
        try:
            given = check_settings(_written(given) if kind != "world" else given, options)
            check_loading(None, str(given.get("device") or "auto"), str(given.get("dtype") or "auto"))
            if kind == "needles" and given:
                of_grid = inspect.signature(needle_grid).parameters
                needle_grid(**{name: value for name, value in given.items() if name in of_grid})
            if kind == "world" and given:
                from video_ma2mba.world.dataset import parse_frames

                for frames in _listed(given.get("frames", "8..64")):
                    parse_frames(frames)
            if kind == "benchmarks" and given:
                from video_ma2mba.eval.benchmarks import expand
                from video_ma2mba.eval.frames_sweep import frame_counts
                from video_ma2mba.eval.harness import check_tasks

                check_tasks(expand(given.get("tasks") or ""), given.get("include") or [])
                frame_counts(given.get("frames_sweep") or "max")
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"evaluation.{kind}: {error}") from None


def _written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a command line has them: lists, and what may be one, are texts with commas; folders are not."""
    texts = [name for name, value in options.items() if isinstance(value, list) and name != "include"]
    texts += [name for name in ("frames", "depths", "frames_sweep") if name in options]
    return {name: ",".join(_listed(value)) if name in texts else value for name, value in options.items()}


def _listed(value: Any) -> list[str]:
    """A list, or what stands for one of it, as texts."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _show(plan: Any) -> None:
    """What each run would do: data, what trains, lengths, and the predicted memory of a step on one GPU."""
    from .plan import resolve_config

    known = None if plan.model is None else resolve_config(None if plan.model == "bundled" else plan.model, None)
    typer.echo(f"{plan.name}: {len(plan.runs)} runs in {plan.output_dir}, from {plan.model or 'nothing'}")
    for place, run in enumerate(plan.runs, 1):
        typer.echo(f"{place}. {run.title}")
        told = _world_words(run.content) if run.world else _recipe_words(run, known)
        for line in told:
            typer.echo(f"   {line}")


def _world_words(content: dict[str, Any]) -> list[str]:
    return ["on the rendered world: " + ", ".join(f"{key}={value}" for key, value in content.items())]


def _recipe_words(run: Any, config: Any) -> list[str]:
    """A run in a few lines. config: of the model, where it is known."""
    content = run.content
    rank, parts = content.get("lora_rank"), content.get("train_parts") or "lm,projector,vision"
    trains = f"adapters of rank {rank}, and {content.get('lora_also', 'projector')} whole" if rank else parts
    data = "; ".join(f"{name}: {json.dumps(source)}" for name, source in run.sources)
    steps, epochs = content.get("max_steps", -1), content.get("num_train_epochs", 3)
    told = [f"{steps} steps" if steps > 0 else f"{epochs:g} epochs"]
    longest, frames = content.get("max_length"), content.get("max_frames")
    if longest:
        told.append(f"up to {longest:,} tokens{', packed' if content.get('packing') else ''}")
    if frames:
        told.append(f"up to {frames:,} frames, {content.get('fps', 1):g} a second")
    lines = [f"trains {trains} at {content.get('learning_rate')} ({', '.join(told)})", f"on {data}"]
    if config is None or not (longest or frames):
        return lines
    from video_ma2mba import plan as make_plan

    tokens = min(filter(None, (longest, frames and frames * config.tokens_per_frame + _TEXT_TOKENS)))
    chosen: dict[str, Any] = {"lora_rank": rank} if rank else {"train": tuple(parts.split(","))}
    try:
        found = make_plan(config, tokens=tokens, gpus=content.get("context_parallel_size", 1), **chosen).prediction
    except ValueError as error:
        return [*lines, f"a step of {tokens:,} tokens: {error}"]
    memory = f"{found.gpu_peak / 1e9:.1f} GB of a GPU, {found.host_peak / 1e9:.1f} GB of its host"
    return [*lines, f"predicted, a step of {tokens:,} tokens on an H200: {memory}, {found.step_seconds:.2g} s"]


def _evaluate(wanted: dict[str, Any], model: str, out: Path) -> dict[str, Any]:
    """Measure a model: accuracy on the rendered world, needles, benchmarks, whichever are asked for."""
    found: dict[str, Any] = {}
    if wanted.get("world"):
        from video_ma2mba.world.accuracy import WorldAccuracy, measure

        given = {**wanted["world"], "frames": _listed(wanted["world"].get("frames", "8..64"))}
        out.mkdir(parents=True, exist_ok=True)
        table = measure(WorldAccuracy(**{**given, "model": model, "out": str(out / "world.csv")}))
        found["world"] = [
            _score("", row["frames"], 100 * row["accuracy"], row["questions"])
            for row in table
            if row["kind"] == row["form"] == "all"
        ]
    if wanted.get("needles"):
        _command("niah", {**wanted["needles"], "model": model, "out": out / "needles"})
        cells = json.loads((out / "needles" / "cells.json").read_text(encoding="utf-8"))["cells"]
        names = ("frames", "depth", "questions", "chance")
        found["needles"] = [
            {**{name: cell[name] for name in names}, "found": round(cell["greedy"] * cell["questions"])}
            for cell in cells
        ]
    if wanted.get("benchmarks"):
        options = {"frames_sweep": "max", **wanted["benchmarks"]}
        _command("eval", {**options, "model": model, "out": out / "benchmarks"})
        sweep = json.loads((out / "benchmarks" / "sweep.json").read_text(encoding="utf-8"))
        found["benchmarks"] = [
            _score(name, frames, cell["value"], cell["questions"])
            for name, cells in sweep["benchmarks"].items()
            for frames, cell in cells.items()
        ]
    return found


def _score(name: str, frames: Any, value: float, questions: int) -> dict[str, Any]:
    return {"name": name, "frames": frames, "value": value, "questions": questions}


def _command(verb: str, options: dict[str, Any]) -> None:
    """Another command of ours. Where several processes train, or where it changes what is around it, in a process of
    its own, alone: the others wait for it.

    Raises:
        RuntimeError: it failed; its own words are above.
    """
    if verb == "niah" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from .niah import niah

        niah(**_written(options))
        return
    words = [sys.executable, "-m", "video_ma2mba", verb]
    for name, value in _written(options).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [word for one in _listed(value) for word in (option, one)]
    alone = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    if (code := subprocess.run(words, env=alone, stdout=sys.stderr).returncode) != 0:
        raise RuntimeError(f"`video-ma2mba {verb}` ended with exit code {code}; its own messages are above")
