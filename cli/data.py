"""`video-ma2mba data check`: read training data as training would, before the GPU is paid for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading

from .loading import while_loading
from .make_long import make_long
from .options import (
    Fps,
    Model,
    NumFrames,
    check_frames,
    check_out_file,
    check_path_or_id,
    check_training_data,
    chosen_frames,
)
from .terminal import echo_json, note

app = typer.Typer(
    help="Training data: what can be used, and what training on it will take.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_LISTED = 20  # entries of a list that are printed; --json has all


app.command("make-long")(make_long)


@app.callback()
def data() -> None:
    """Training data: what can be used, and what training on it will take."""


_CLIP_LABELS = ("classes", "values", "pairs")  # of VideoMamba's trainings


@app.command()
def check(
    path: Annotated[
        str,
        typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a folder, or a Hub id.", show_default=False),
    ],
    model: Model = None,
    base_dir: Annotated[
        Path | None, typer.Option(help="Folder where the videos' paths begin.", show_default="the file's")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a folder or data set that has several.")] = "train",
    labels: Annotated[
        str,
        typer.Option(help="What is learnt: answers, captions; for VideoMamba: classes, values, or pairs (captions)."),
    ] = "answers",
    merge_by_video: Annotated[
        bool, typer.Option("--merge-by-video", help="Questions about one video as one sample, as in stage 2.")
    ] = False,
    fps: Fps = None,
    num_frames: NumFrames = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames of one sample.", show_default="no limit")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of one sample.", show_default="no limit")] = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of the GPU to plan for.")] = "80GB",
    train: Annotated[str, typer.Option(help="Parts that train: lm, projector, vision.")] = "lm,projector,vision",
    workers: Annotated[int, typer.Option(help="Processes that read; 0 reads in this one.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as one JSON object.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--json-file", help="Write everything found to FILE; interrupted, go on from FILE.partial."),
    ] = None,
    show: Annotated[
        int | None, typer.Option(help="Show this sample as it is learnt, counted from 0, instead.", min=0)
    ] = None,
) -> None:
    """Read every sample: broken videos, lengths, answers that do not fit, duplicates, and the memory plan.

    Ends with exit code 1 where a sample is broken or the longest one does not fit on the GPU.
    """
    check_out_file("--json-file", out)
    check_path_or_id(path, f"{path}: no such file or folder (and it is no data set id such as owner/name)")
    kinds = ("answers", "captions", *_CLIP_LABELS)
    if labels not in kinds:
        raise ValueError(f"--labels {labels}: use one of {', '.join(kinds)}")
    if labels in _CLIP_LABELS:
        others = {
            "--model": model,
            "--fps": fps,
            "--max-frames": max_frames,
            "--max-length": max_length,
            "--show": show,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} is for answers and captions, not for --labels {labels}: leave it out")
        check_frames(chosen_frames(None, num_frames, None, None))
        check_clip_list(path, base_dir, split, labels, num_frames or 8, workers, as_json, out)
        return
    check_training_data(path)
    check_loading(model)
    chosen = chosen_frames(fps, num_frames, None, None)
    check_frames(chosen if max_frames is None else {**chosen, "max_frames": max_frames})
    from video_ma2mba.modeling_video_ma2mba.recompute_plan import parse_bytes

    parse_bytes(gpu_memory, "--gpu-memory")
    parts = _parts(train)
    with while_loading():
        import datasets
        from transformers import AutoConfig, AutoProcessor
    from transformers.utils import logging

    from video_ma2mba.loading import resolve_model
    from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole
    from video_ma2mba.trainer.data import load_training_data
    from video_ma2mba.trainer.data.checking import check_rows
    from video_ma2mba.trainer.data.sample_encoding import EncodingSettings

    settings = EncodingSettings(labels, fps, num_frames, max_frames, max_length)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    source = resolve_model(model)
    config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    if not hasattr(processor, "conversation_tokens"):
        raise ValueError(f"--model {source} has no Video-Ma2mba processor")
    rows = load_training_data(path, base_dir=base_dir, split=split, merge_by_video=merge_by_video)
    if show is not None:
        if show >= len(rows):
            raise ValueError(f"--show {show}: there are {len(rows)} samples, counted from 0")
        show_sample(processor, rows[show], settings)
        return
    report = run_check(
        lambda partial: check_rows(rows, processor, settings, workers=workers, partial=partial), len(rows), out
    )
    plans = memory_plans(report, config, gpu_memory, parts)
    whole = {**report.to_dict(), "plans": plans}
    if as_json:
        echo_json(whole)
    else:
        print_report(report, plans, gpu_memory)
    if out is not None:
        write_whole(out, json.dumps(whole, indent=1) + "\n")
        partial_file(out).unlink(missing_ok=True)
        note(f"{out}")
    if report.broken or any("error" in plan for plan in plans.values()):
        raise typer.Exit(1)


def partial_file(out: Path) -> Path:
    """Where the samples checked so far are kept until the report `out` is written: `out` with `.partial` added."""
    return out.with_name(f"{out.name}.partial")


def check_clip_list(
    path: str,
    base_dir: Path | None,
    split: str,
    labels: str,
    num_frames: int,
    workers: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Check a list of labelled clips, or of videos with captions, as VideoMamba is trained on: broken videos, classes,
    duplicates."""
    from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole
    from video_ma2mba.trainer.videomamba.clip_checking import check_clips, label_counts
    from video_ma2mba.trainer.videomamba.clip_rows import load_clip_rows

    captions = 0
    if labels == "pairs":
        from video_ma2mba.trainer.videomamba.caption_rows import as_clip_rows, load_caption_rows

        pairs = load_caption_rows(path, base_dir=base_dir, split=split)
        rows, captions = as_clip_rows(pairs), sum(len(pair.captions) for pair in pairs)
    else:
        rows = load_clip_rows(path, base_dir=base_dir, split=split, regression=labels == "values")
    counts = label_counts(rows)

    def checks(partial: Path | None) -> Any:
        return check_clips(rows, num_frames, workers=workers, partial=partial)

    report = run_check(checks, len(rows), out)
    whole = {**report.to_dict(), "classes": counts} | ({"captions": captions} if captions else {})
    if as_json:
        echo_json(whole)
    else:
        if captions:
            typer.echo(f"{len(rows)} videos or pictures with {captions} captions")
        if counts:
            least, most = min(counts.values()), max(counts.values())
            typer.echo(f"{len(counts)} classes with {least} to {most} rows each")
        print_report(report, {}, "")
    if out is not None:
        write_whole(out, json.dumps(whole, indent=1) + "\n")
        partial_file(out).unlink(missing_ok=True)
        note(f"{out}")
    if report.broken:
        raise typer.Exit(1)


def run_check(check: Callable[[Path | None], Any], count: int, out: Path | None) -> Any:
    """Check `count` rows with a progress bar; `check` is given the file in which an interrupted check goes on."""
    from video_ma2mba.files.progress import progress
    from video_ma2mba.trainer.data.checking import CheckReport

    found: dict[int, Any] = {}
    partial = None if out is None else partial_file(out)
    try:
        with progress("checking", "samples", count) as tell:
            broken = 0
            for place, sample in check(partial):
                found[place] = sample
                broken += sample.error is not None
                tell(len(found), remark=f"{broken} broken" if broken else "")
    except KeyboardInterrupt:
        if partial is not None:
            note(f"interrupted: the same command continues from {partial}")
        raise
    return CheckReport([found[place] for place in sorted(found)])


def _parts(train: str) -> tuple[str, ...]:
    """What trains, from a list separated by commas. ValueError: there is no such part."""
    from video_ma2mba.planning.planned_step import PARTS

    parts = tuple(part.strip() for part in train.split(",") if part.strip())
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--train {train}: there is no part {part!r}, use some of {', '.join(PARTS)}")
    return parts


def memory_plans(report: Any, config: Any, gpu_memory: str, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The plan of a training step on the longest and on the median sample, or why there is none."""
    from video_ma2mba import plan

    plans = {}
    for label in ("longest", "median"):
        sample = report.of_length(label)
        if sample is None:
            continue
        plans[label] = {"id": sample.id, "tokens": sample.tokens, "frames": sample.frames}
        text = sample.tokens - sample.frames * config.tokens_per_frame
        try:
            found = plan(
                config,
                tokens=sample.tokens,
                gpu_memory=gpu_memory,
                train=parts,
                text_tokens=text,
                labels=sample.learnt,
                dtype="mixed",
            )
            plans[label] |= {"plan": str(found.plan or "no checkpointing needed"), **found.to_dict()}
        except ValueError as error:
            plans[label]["error"] = str(error)
    return plans


def print_report(report: Any, plans: dict[str, dict[str, Any]], gpu_memory: str) -> None:
    """The report for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    usable, broken = len(report.usable), len(report.broken)
    console.print(f"[bold]{len(report.samples)} samples[/bold]: {usable} can be used, {broken} are broken")
    table = Table("per sample", *(label for label in report.distribution("tokens")))
    for name, attribute in (("tokens", "tokens"), ("of these learnt", "learnt"), ("frames", "frames")):
        if attribute != "frames" and not any(report.distribution("tokens").values()):
            continue  # of clips with a label
        table.add_row(name, *(f"{value:,}" for value in report.distribution(attribute).values()))
    if usable:
        console.print(table)
    lists = {
        "broken, left out in training": [
            f"{s.error} -> {s.remedy}" if s.error.startswith(f"{s.id}: ") else f"{s.id}: {s.error} -> {s.remedy}"
            for s in report.broken
        ],
        "damaged, used as far as they can be read": [f"{s.id}: {'; '.join(s.notes)}" for s in report.damaged],
        "shortened, their last turns do not fit into --max-length": [
            f"{s.id}: {s.dropped_turns} answers left out -> raise --max-length" for s in report.shortened
        ],
        "the same row more than once": [", ".join(ids) for ids in report.duplicates("row_key")],
        "the same video under several names": [", ".join(names) for names in report.duplicates("video_key")],
    }
    for title, lines in lists.items():
        if lines:
            console.print(f"[bold]{title}: {len(lines)}[/bold]")
            for line in lines[:_LISTED]:
                console.print(f"  {escape(line)}")
            if len(lines) > _LISTED:
                console.print(f"  ... and {len(lines) - _LISTED} more (--json and --json-file have all)")
    if report.thinned:
        console.print(f"looked at in fewer frames, to keep within the limits: {len(report.thinned)}")
    for label, found in plans.items():
        console.print(f"[bold]{label} sample[/bold]: {found['tokens']:,} tokens, on a GPU with {gpu_memory}:")
        if "error" in found:
            console.print(f"  does not fit: {escape(found['error'])}")
        else:
            peak, seconds = found["gpu_peak_bytes"] / 1e9, found["step_seconds"]
            console.print(f"  {found['plan']}; {peak:.1f} GB, {seconds:.1f} s forward and backward (predicted)")


def show_sample(processor: Any, row: dict[str, Any], settings: Any) -> None:
    """Print one sample as the model reads it, what is learnt between « and »."""
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    from video_ma2mba.trainer.data.sample_encoding import encode_row

    sample = encode_row(processor, row, settings, keep_pixels=False)
    frames, unread = iter(sample.frames), 0  # of the video that is being shown
    text = Text()
    tokens = list(zip(sample.input_ids.tolist(), (sample.labels >= 0).tolist(), strict=True))
    is_video = processor.video_token_id

    for (learnt, video), run in groupby(tokens, key=lambda token: (token[1], token[0] == is_video)):
        ids = [token for token, _ in run]
        if video:  # videos that follow one another are one run
            left = len(ids) // processor.tokens_per_frame
            while left > 0:
                unread = unread or next(frames)
                count = min(left, unread)
                text.append(f"[{count} frames, {count * processor.tokens_per_frame} tokens]", "dim")
                left, unread = left - count, unread - count
        elif learnt:
            text.append(f"«{processor.tokenizer.decode(ids)}»", "bold green")
        else:
            text.append(processor.tokenizer.decode(ids))
    console = Console(soft_wrap=True)
    console.print(text)
    learnt = sum(learnt for _, learnt in tokens)
    console.print(f"{row.get('id', '')}: {len(tokens):,} tokens, {learnt:,} of them learnt (between « and »)")
