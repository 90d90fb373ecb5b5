"""`video-ma2mba plan`: what training on a video will take, before anything is downloaded or allocated."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba import BUNDLED_CHECKPOINT
from video_ma2mba.loading import check_loading

from .loading import while_loading
from .options import check_out_file, check_video


def plan(
    model: Annotated[
        str | None, typer.Option(help="Model directory or Hub id (its config.json is enough).", show_default=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The paper's sizes with CLIP-L/14-336 instead: 370m, 1.3b or 2.7b.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of one video.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of one sample.", show_default=False)] = None,
    video: Annotated[
        str | None, typer.Option(help="A video whose frames are counted, read at --fps.", show_default=False)
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames read per second of video.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Samples per step on one GPU.")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that share every video (sequence parallelism).", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in one machine, which share its memory.", min=1)] = 8,
    reading: Annotated[
        bool, typer.Option("--reading", help="Plan reading the video into a state instead of training on it.")
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU, such as 24GB.", show_default="this machine's GPU; without one 80GB"),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the host; 85 % of it may be pinned.", show_default="this machine's; without a GPU 128GB"
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Parts that train: lm, projector, vision.", show_default="lm,projector,vision"),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(help="Rank of adapters: they and the projector train, as in recipe lora.", show_default=False),
    ] = None,
    qlora: Annotated[
        int | None,
        typer.Option(help="The same beside weights in 4 bits, as with four_bit=true.", show_default=False),
    ] = None,
    lora_vision: Annotated[bool, typer.Option("--lora-vision", help="Adapters in the vision tower, too.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, adafactor, sgd_momentum, sgd or none.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or mixed (fp32 weights under bf16).")] = "bf16",
    launch_us: Annotated[
        str | None,
        typer.Option(
            help="Microseconds that the host needs to launch an operation, or `here`: measured on this machine's GPU.",
            show_default="those of the machine that was measured",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory against length for every method, as PNG.", show_default=False)
    ] = None,
) -> None:
    """Plan a training step: the fastest way that fits, what it takes, and the longest video that would fit.

    With --gpus also how they share the video, what they wait for each other, and the step of one beside it.

    Works from a configuration alone: no weights, no GPU. Predictions, not measurements.
    """
    if lora is not None and qlora is not None:
        raise ValueError("give either --lora or --qlora")
    if lora_vision and lora is None and qlora is None:
        raise ValueError("--lora-vision is about adapters: give --lora or --qlora, too")
    given = {"--frames": frames, "--tokens": tokens, "--video": video}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"say how long the video is with exactly one of {', '.join(given)}")
    check_out_file("--plot", plot)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {plot}: name a .png file")
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    options = {
        "batch": batch,
        "gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "gpu_memory": gpu_memory,
        "host_memory": host_memory,
        "train": train and tuple(part.strip() for part in train.split(",") if part.strip()),
        "lora_rank": lora if qlora is None else qlora,
        "lora_vision": lora_vision,
        "four_bit": qlora is not None,
        "optimizer": optimizer,
        "dtype": names.get(dtype, dtype),
        "fps": fps,
        "launch_us": launch_us if launch_us in (None, "here") else _microseconds(launch_us),
    }
    _check(model, preset, video, frames, tokens, options)
    from video_ma2mba import plan as make_plan
    from video_ma2mba.planning.sequence_plan import plan_reading

    config = resolve_config(model, preset)
    if video is not None:
        frames = count_frames(video, fps)
    if reading:
        found = plan_reading(config, frames=frames, tokens=tokens, gpus=gpus, dtype=options["dtype"])
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            show_reading(found)
        return
    with while_loading() if launch_us == "here" else nullcontext():
        report = make_plan(config, frames=frames, tokens=tokens, **options)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show(report)
    if plot is not None:
        from video_ma2mba.planning.plan_plot import draw_memory

        draw_memory(config, plot, report)
        typer.echo(f"{plot}", err=as_json)


def _check(
    model: str | None, preset: str | None, video: str | None, frames: int | None, tokens: int | None, options: dict
) -> None:
    """Refuse what is wrong by itself, before anything is imported that takes seconds."""
    from video_ma2mba.conversion.presets import check_preset
    from video_ma2mba.modeling_video_ma2mba.recompute_plan import parse_bytes
    from video_ma2mba.planning.plan_options import check_options, check_parts, chosen_adapters

    if model is not None and preset is not None:
        raise ValueError("give either --model or --preset")
    if preset is not None:
        check_preset(preset, "--preset {} is unknown")
    else:
        check_loading(model)
    if video is not None:
        check_video(video, {})
    for name in ("gpu_memory", "host_memory"):
        parse_bytes(options[name], f"--{name.replace('_', '-')}")
    check_parts(options["train"] or ())
    chosen_adapters(options["lora_rank"], options["lora_vision"], options["four_bit"], options["train"])
    check_options(frames, tokens, *(options[name] for name in ("batch", "fps", "optimizer", "dtype")))


def _microseconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--launch-us {text}: give a number of microseconds, or `here`") from None


def resolve_config(model: str | None, preset: str | None):
    """The configuration of a directory or Hub id, of a preset, or (neither) of the bundled checkpoint."""
    from video_ma2mba.modeling_video_ma2mba.configuration_sizes import VideoMa2mbaSizes, read_sizes

    if preset is not None:
        from video_ma2mba.conversion.presets import PRESETS

        width, layers = PRESETS[preset]
        return VideoMa2mbaSizes(text_config={"hidden_size": width, "num_hidden_layers": layers})
    found = read_sizes(BUNDLED_CHECKPOINT if model is None else config_folder(model))
    if found is not None:
        return found
    with while_loading():
        from transformers import AutoConfig

        from video_ma2mba.loading import resolve_model

        return AutoConfig.from_pretrained(resolve_model(model))


def config_folder(model: str) -> Path:
    """The directory that holds a model's config.json: itself, or that in the cache of a Hub id (after a download)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    with while_loading():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(hf_hub_download(model, "config.json")).parent
        except (OSError, HfHubHTTPError, HFValidationError):  # said in full by what loads it next
            return path


def count_frames(video: str, fps: float) -> int:
    """Frames that would be read from a video.

    Raises:
        ValueError: the container does not say how long the video is.
    """
    with while_loading():
        from video_ma2mba import open_video

        expected = open_video(video, fps=fps).expected_frames
    if not expected:
        raise ValueError(f"--video {video} does not say how long it is: count its frames and pass --frames")
    return expected


def show(report) -> None:
    """Print a report for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    prediction = report.prediction
    length = f"{report.tokens:,} tokens" + (f" ({report.frames:,} frames)" if report.frames else "")
    rows = "" if report.batch == 1 else f", {report.batch} samples a step"
    console.print(f"[bold]{length}{rows}[/bold], {_memory(report)}", soft_wrap=True)
    if report.adapters is not None:
        kind = "QLoRA, 4-bit weights" if report.adapters.four_bit else "LoRA"
        console.print(f"trains: adapters of rank {report.adapters.rank} ({kind}) and the projector")
    console.print(f"plan: {prediction.plan or 'no checkpointing needed'}")
    if report.checkpointing_arguments is not None:
        console.print(f"      model.gradient_checkpointing_enable({report.checkpointing_arguments})", soft_wrap=True)

    if report.shared is not None:
        console.print(sharing_text(report), soft_wrap=True)
        console.print(f"      train … context_parallel_size={report.shared.sequence}", soft_wrap=True)
    if prediction.vision_chunk is not None:
        console.print(f"      model.config.vision_chunk_frames = {prediction.vision_chunk}", soft_wrap=True)
    console.print(f"GPU memory at the worst moment ({prediction.phase}):")
    table = Table()
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, value in prediction.gpu.items():
        if value >= 5e6:
            table.add_row(name, f"{value / 1e9:.2f}")
    table.add_section()
    table.add_row("in all", f"{prediction.gpu_peak / 1e9:.2f}")
    console.print(table)
    per_node = ""
    if report.shared is not None:
        nodes = "" if report.shared.nodes == 1 else f" of {report.shared.nodes}"
        per_node = f" by each GPU, {report.shared.host_per_node / 1e9:.1f} GB on one machine{nodes}"
    console.print(f"host memory: {prediction.host_peak / 1e9:.1f} GB pinned{per_node}")
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in prediction.seconds.items())
    console.print(f"forward and backward: {prediction.step_seconds:.1f} s ({parts})")
    known = report.launch_from + ("; --launch-us here measures it" if report.launch_from == "assumed" else "")
    if report.core_share < 0.95:
        known += f"; others use its core, of which a process gets {report.core_share:.0%}"
    pace = f"constants of {report.hardware}; {report.launch_us:.1f} µs a launch ({known})"
    locking = f", and host memory is page-locked, about {report.page_lock_seconds:.0f} s"
    locking = locking if report.page_lock_seconds >= 0.5 else ""
    console.print(f"  with {pace}", soft_wrap=True)
    console.print(f"  the first step takes longer: kernels are tuned{locking}", soft_wrap=True)
    if report.shared is not None:
        alone = report.shared.one_gpu_seconds
        console.print("the same on one GPU: " + ("fits no plan" if alone is None else f"{alone:.1f} s"))
    longest = f"longest sample that fits: {report.longest_tokens:,} tokens"
    if report.longest_frames is not None:
        longest += f" = {report.longest_frames:,} frames = {report.longest_video} of video"
    console.print(longest, soft_wrap=True)

    console.print("plans considered:")
    table = Table()
    for heading in ("method", "layers x tokens", "GPU GB", "host GB", "seconds", "fits"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in report.considered:
        p = row.prediction
        cell = "-" if p.plan is None else f"{p.plan.layers_per_block} x {min(p.plan.segment_length, report.tokens)}"
        fits = "yes" if row.fits else "no"
        table.add_row(
            row.method, cell, f"{p.gpu_peak / 1e9:.1f}", f"{p.host_peak / 1e9:.1f}", f"{p.step_seconds:.1f}", fits
        )
    console.print(table)


def sharing_text(report) -> str:
    """One sentence on how several GPUs share a step."""
    shared = report.shared
    each = -(-shared.segments // shared.sequence)
    text = f"sharing: {shared.segments} segments dealt to {shared.sequence} GPUs, {each} each"
    if shared.copies > 1:
        text += f", {shared.copies} such groups with samples of their own"
    return f"{text}; they wait for each other {shared.idle_share:.1%} of the step"


def show_reading(report) -> None:
    """Print what reading takes."""
    length = f"{report.tokens:,} tokens" + (f" ({report.frames:,} frames)" if report.frames else "")
    typer.echo(f"reading {length} on {report.gpus} GPU{'s' if report.gpus > 1 else ''}")
    if report.gpus > 1:
        typer.echo(
            f"sharing: {report.segments} segments dealt to {report.gpus} GPUs, {report.blocks} blocks of layers; "
            f"they wait for each other {report.idle_share:.1%} of the time"
        )
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    typer.echo(
        f"seconds without decoding: {report.total_seconds:.1f} ({parts}; constants of {report.hardware}), "
        f"{report.tokens / report.total_seconds:,.0f} tokens/s"
    )
    if report.gpus > 1:
        typer.echo(f"the same on one GPU: {report.one_gpu_seconds:.1f} s")
    from video_ma2mba.planning.plan_options import gigabytes

    parts = ", ".join(f"{name} {gigabytes(value)}" for name, value in report.gpu.items())
    typer.echo(f"GPU memory, whatever the length: {gigabytes(sum(report.gpu.values()))} ({parts})")
    typer.echo(f"state: {report.state_bytes / 1e6:.0f} MB")


def _memory(report) -> str:
    """What there is, and where that is known from."""
    from video_ma2mba.planning.plan_options import gigabytes

    said = {"as asked": "", "assumed": " (assumed: --host-memory)"}
    gpu = "" if report.gpu == "as asked" else f" ({report.gpu}" + ("; --gpu-memory)" if ":" in report.gpu else ")")
    host = said.get(report.host, f" ({report.host})")
    where, each = ("a GPU", "") if report.shared is None else (f"{report.shared.gpus} GPUs", " each")
    machine = "a host" if report.shared is None or report.shared.nodes == 1 else f"{report.shared.nodes} hosts"
    return (
        f"on {where} with {gigabytes(report.gpu_memory)}{each}{gpu} and {machine} with "
        f"{gigabytes(report.host_memory)}{host}"
    )
