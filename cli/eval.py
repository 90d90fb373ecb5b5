"""`video-ma2mba eval`: benchmarks in lmms-eval, scored as the paper prints them, beside its numbers."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading

from .loading import while_loading
from .options import Device, Dtype, Fps, Model, NumFrames, TrustRemoteCode
from .run_facts import command_line, require_matplotlib, run_facts
from .terminal import note, verbosity


def evaluate(
    tasks: Annotated[
        str,
        typer.Option(help="`paper`, `long`, `timed`, or names separated by commas: videomme, rendered_world, …"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for answers and report; a run continues there.")],
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    max_frames: Annotated[int | None, typer.Option(help="At most this many frames of a video.")] = None,
    subtitles: Annotated[
        str,
        typer.Option(help="auto reads those of the videos between their frames; off does not.", metavar="auto|off"),
    ] = "off",
    frames_sweep: Annotated[
        str | None,
        typer.Option(help="Once with each of these numbers of frames, such as 8,32,128,max, and a curve of them."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.", min=1)] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="For caption_score: a file of rows with video and caption.", show_default="the rendered world"
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Judge of open answers: an address such as http://localhost:8000/v1, a folder, or a Hub id."
        ),
    ] = None,
    judge_model: Annotated[
        str, typer.Option(help="The judge's name there. Its key is taken from OPENAI_API_KEY.")
    ] = "gpt-3.5-turbo-0125",
    no_judge: Annotated[bool, typer.Option("--no-judge", help="Collect open answers, score them later.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder with local copies of the data.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Score these recorded answers; no model is loaded.")] = None,
    include: Annotated[list[Path] | None, typer.Option(help="Further folder with lmms-eval task files.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep states of videos in this folder.")] = None,
    cache_gb: Annotated[float, typer.Option(help="Limit of that folder, in GB.")] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Questions about one video answered together.", min=1)] = 8,
    share_frames: Annotated[
        int, typer.Option(help="Several processes read films of so many frames together; 0: none.", min=0)
    ] = 2000,
    stop_repeat_ngram: Annotated[
        int, typer.Option(help="End an answer at a repeat of so many tokens, as the paper does; 0: never.", min=0)
    ] = 5,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Go on past videos that cannot be decoded.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer and score benchmarks with lmms-eval's own tasks, each video read once for all its questions.

    Data and judge are looked at first. Every answer is written as it comes; interrupted, the same command continues.
    With -v, lmms-eval's own log is shown.
    Several processes (torchrun -m video_ma2mba eval …) share the videos, and each long film. Writes report.md,
    report.json, chart.png and model_index.yaml, for a model card, to --out; with --frames-sweep into a folder for each
    number of frames, and sweep.md, sweep.json and sweep.png beside them.
    """
    if frames_sweep is not None:
        _sweep(frames_sweep, {name: value for name, value in locals().items() if name != "frames_sweep"})
        return
    given = {"--tasks": tasks, "--model": model, "--fps": fps, "--num-frames": num_frames, "--max-frames": max_frames}
    given |= {
        "--subtitles": None if subtitles == "off" else subtitles,
        "--limit": limit,
        "--captions": captions,
        "--judge": judge,
        "--judge-model": judge_model if judge and judge.startswith("http") else None,
    }
    given |= {"--no-judge": no_judge, "--data": data, "--replay": replay, "--skip-unreadable": skip_unreadable}
    given |= {"--stop-repeat-ngram": None if stop_repeat_ngram == 5 else stop_repeat_ngram, "--out": out}
    given |= {"--device": None if device == "auto" else device, "--dtype": None if dtype == "auto" else dtype}
    _require_packages()
    if replay is None:
        check_loading(model, device, dtype, kind="video_ma2mba")
    from video_ma2mba.eval.benchmarks import BENCHMARKS, expand, refuse_unjudged
    from video_ma2mba.eval.harness import check_tasks, prepare_environment, quiet_harness
    from video_ma2mba.loading import join_ranks

    if fps is not None and num_frames is not None:
        raise ValueError("--fps and --num-frames exclude each other: give one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if replay is not None and not replay.exists():
        raise FileNotFoundError(f"--replay {replay} does not exist")
    for folder in include or ():
        if not folder.is_dir():
            raise FileNotFoundError(f"--include {folder} is no folder")
    from video_ma2mba.eval.captions import CAPTIONS_VARIABLE, read_captions

    os.environ.pop(CAPTIONS_VARIABLE, None)
    if captions is not None:
        if "caption_score" not in expand(tasks):
            raise ValueError("--captions is for the task caption_score: add it to --tasks")
        read_captions(captions)
        os.environ[CAPTIONS_VARIABLE] = str(captions.resolve())
    if cache_dir is not None and cache_dir.exists() and not cache_dir.is_dir():
        raise ValueError(f"--cache-dir {cache_dir} is a file: name a folder")
    if not cache_gb > 0:
        raise ValueError(f"--cache-gb must be more than 0, not {cache_gb:g}")
    names, out = expand(tasks), out.resolve()
    if judge is None and not no_judge:
        refuse_unjudged([name for name in names if name in BENCHMARKS and BENCHMARKS[name].judge])
    answers = None if replay is None else replay.resolve()
    further = [str(folder.resolve()) for folder in include or ()]
    check_tasks(names, further)
    cache = None if cache_dir is None else str(cache_dir.resolve())
    source = str(Path(model).resolve()) if model is not None and Path(model).is_dir() else model
    prepare_environment(data)
    quiet_harness(verbosity() > 0)
    with while_loading():
        from video_ma2mba.eval.benchmark_run import (
            ANSWERS,
            Evaluation,
            claim_folder,
            collect_answers,
            leave_ranks,
            score_answers,
        )
    from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims

    asked = None
    if judge is not None:
        asked = _judge(judge, judge_model, out / "judge.jsonl", device, dtype, trust_remote_code)
    evaluation = Evaluation(names, out, limit, None if no_judge else asked, further)
    if asked is None and not no_judge:
        refuse_unjudged(evaluation.judged_tasks)
    join_ranks(device)
    counts = evaluation.prepare()
    first = ParallelDims.of_run().first
    if first:
        note(f"{sum(counts.values()):,} questions of {len(counts)} tasks, all videos are there")
    if answers is None:
        from video_ma2mba.eval.lmms_adapter import VideoMa2mbaChat

        adapter = VideoMa2mbaChat(
            pretrained=source or "bundled",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            fps=1.0 if fps is None else fps,
            num_frames=num_frames,
            max_frames=max_frames,
            subtitles=subtitles,
            stop_repeat_ngram=stop_repeat_ngram,
            share_frames=share_frames,
            cache_dir=cache,
            cache_gb=cache_gb,
            answers=str(out / ANSWERS),
            broken="skip" if skip_unreadable else "stop",
            trust_remote_code=trust_remote_code,
        )
        adapter.answerer.announce = note
        if first:
            claim_folder(out, adapter.settings())
        about = {"frames": adapter.store.reading.text, **run_facts(adapter.pipe.model)}
        collect_answers(evaluation, adapter)
        if not leave_ranks():
            return
        answers = out / ANSWERS
        note(adapter.summary)
    else:
        about = _of_recorded_answers()
    about |= {"command": command_line("eval", given), "limit": limit}
    about["model"] = model or ("recorded answers" if replay else "bundled checkpoint")
    about["judge"] = asked.model if asked and evaluation.judged_tasks else None
    try:
        score_answers(evaluation, answers, _print_score)
    finally:  # a judge that fails does not take the other scores along
        _report(evaluation, answers, about)
    typer.echo(f"{out / 'report.md'}")


def _sweep(text: str, options: dict) -> None:
    """Evaluate with each number of frames, and put the scores side by side."""
    from video_ma2mba.eval.frames_sweep import frame_counts, write_sweep
    from video_ma2mba.modeling_video_ma2mba.parallel_dims import ParallelDims

    counts = frame_counts(text)
    for name in ("fps", "num_frames", "max_frames", "replay"):
        if options[name] is not None:
            raise ValueError(f"--frames-sweep chooses the frames: leave --{name.replace('_', '-')} out")
    if ParallelDims.of_run().world > 1:
        raise ValueError("--frames-sweep runs in one process: give several processes one --num-frames after another")
    out = options["out"]
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    folders = {count: out / f"frames_{count}" for count in counts}
    for count, folder in folders.items():
        note(f"{count} frames")
        evaluate(**options | {"num_frames": None if count == "max" else count, "out": folder})
    typer.echo(f"{write_sweep(out, folders)}")


def _judge(judge: str, model: str, log: Path, device: str, dtype: str, trust_remote_code: bool) -> Any:
    """The judge behind an address, or a language model of a folder or the Hub that is loaded now."""
    import re

    from video_ma2mba.eval.judge import Judge, LocalJudge

    if not os.path.isdir(judge) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", judge):
        return Judge(judge, model, os.environ.get("OPENAI_API_KEY", ""), log)
    from video_ma2mba.loading import pick_device, pick_dtype, resolve_model
    from video_ma2mba.trainer.data.long_models import text_generator

    place = pick_device(device)
    generate = text_generator(resolve_model(judge), place, pick_dtype(dtype, place), trust_remote_code)
    return LocalJudge(generate, os.path.basename(judge.rstrip("/")) if os.path.isdir(judge) else judge, log)


def _require_packages() -> None:
    from importlib.util import find_spec

    require_matplotlib("the chart")
    for module in ("lmms_eval", "decord", "cv2"):
        if find_spec(module) is None:
            raise ImportError(f"evaluation needs {module}: pip install 'video-ma2mba[eval]'", name=module)


def _of_recorded_answers() -> dict[str, str]:
    import datetime

    from video_ma2mba import __version__

    date = datetime.date.today().isoformat()
    versions = f"video-ma2mba {__version__}"
    return {"frames": "recorded answers", "date": date, "device": "none", "dtype": "none", "versions": versions}


def _print_score(name: str, scores) -> None:
    from video_ma2mba.eval.benchmarks import title

    if scores is None:
        note(f"{title(name)}: answered, not scored (--no-judge)")
        return
    (headline,) = [row for row in scores.rows if row.category == scores.headline]
    note(f"{title(name)}: {headline.value:.2f} ({headline.category}, {headline.questions:,} questions)")


def _report(evaluation, answers: Path, about: dict) -> None:
    from importlib.metadata import version

    from video_ma2mba.eval.benchmark_report import write_report
    from video_ma2mba.eval.benchmark_run import reading_facts

    about["versions"] += f", lmms-eval {version('lmms-eval')}, datasets {version('datasets')}"
    facts = {name: reading_facts(answers, set(evaluation.loaded[name])) for name in evaluation.tasks}
    write_report(evaluation.out, evaluation.scores, facts, about)
