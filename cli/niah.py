"""`video-ma2mba niah`: needle in a haystack, one frame to be found in a video of many, depth against length."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading, shared_run

from .ask import reading_progress
from .errors import masked
from .loading import load_pipeline
from .options import Device, Dtype, Model, TrustRemoteCode, check_video
from .run_facts import command_line, require_matplotlib, run_facts
from .terminal import note

_MOST_NUMBERS = 10_000  # of one list


def niah(
    out: Annotated[Path, typer.Option(help="Folder for cells and report; a run continues there.", show_default=False)],
    frames: Annotated[
        str, typer.Option(help="Lengths: 64,128 or first..last (10 of them) or first..last:step.")
    ] = "100..6000",
    depths: Annotated[str, typer.Option(help="Depths within 0..1, written likewise (a range: 5 of them).")] = "0..1",
    needles: Annotated[int, typer.Option(help="Needles in each cell, each in a video of its own.")] = 5,
    forms: Annotated[str, typer.Option(help="Forms of question: open, choice or open,choice.")] = "open",
    haystack: Annotated[str, typer.Option(help="`synthetic`, or a video, folder of images or URL.")] = "synthetic",
    fps: Annotated[float, typer.Option(help="Frames per second taken from a haystack video.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed gives other needles and rendered haystacks.")] = 0,
    distractors: Annotated[
        int, typer.Option(help="So many of a video's frames look like needles, without a sign.", min=0)
    ] = 0,
    share_frames: Annotated[
        int, typer.Option(help="Several processes read videos of so many frames together; 0: none.", min=0)
    ] = 2000,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Insert one frame with a sign into long videos and ask for the sign: how often is it found?

    Every haystack is read once; its states are shared by all needles and questions. Writes cells.json, summary.md and
    heatmap.png to --out. Interrupted, the same command continues; with more lengths or depths it extends the grid.
    Several processes (torchrun -m video_ma2mba niah …) share the lengths, and each long video.
    """
    grid = needle_grid(frames, depths, needles, forms, haystack, fps, seed, distractors)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    require_matplotlib("the heat map")
    if haystack != "synthetic":
        check_video(haystack, {})
    check_loading(model, device, dtype, kind="video_ma2mba")
    from video_ma2mba.eval.needle_haystack import open_haystack
    from video_ma2mba.eval.needle_report import mean, write_report
    from video_ma2mba.eval.needle_search import measure

    def tell(cell: dict) -> None:
        found = f"{round(cell['greedy'] * cell['questions'])} of {cell['questions']}"
        note(f"{cell['frames']} frames, depth {cell['depth']:g}: {found} ({cell['seconds']:.1f} s)")

    with shared_run(device) as (own, group, first):
        pipe = load_pipeline(model, device=own, dtype=dtype, trust_remote_code=trust_remote_code)
        source = open_haystack(haystack, pipe.processor, fps=fps, seed=seed)
        with reading_progress("frames read") if first else nullcontext() as on_frames:
            cells = measure(pipe, source, grid, out, tell, on_frames, group, share_frames, note)
    if not first:
        return
    given = {"--model": model, "--haystack": haystack, "--frames": frames, "--depths": depths, "--needles": needles}
    given |= {"--forms": forms, "--seed": seed, "--out": out}
    if distractors:
        given["--distractors"] = distractors
    if haystack != "synthetic":
        given["--fps"] = fps
    given |= {"--device": None if device == "auto" else device, "--dtype": None if dtype == "auto" else dtype}
    about = {
        "command": command_line("niah", given),
        "model": model or "bundled checkpoint",
        "haystack": ("rendered world" if haystack == "synthetic" else masked(haystack))
        + (f" with {distractors} distractors" if distractors else ""),
        "needles": needles,
        **run_facts(pipe.model),
    }
    write_report(out, cells, about)
    typer.echo(f"{mean(cells, 'greedy'):.1%} found (chance {mean(cells, 'chance'):.1%}): {out / 'summary.md'}")


def needle_grid(
    frames: str = "100..6000",
    depths: str = "0..1",
    needles: int = 5,
    forms: str = "open",
    haystack: str = "synthetic",
    fps: float = 1.0,
    seed: int = 0,
    distractors: int = 0,
) -> Any:
    """The `NeedleGrid` that these options of `niah` ask for.

    Raises:
        ValueError, FileNotFoundError: an option that makes no sense, which is named.
    """
    from video_ma2mba.eval.needle_grid import NeedleGrid, check_haystack

    lengths, places = parse_lengths(frames), parse_depths(depths)
    if not fps > 0:
        raise ValueError(f"--fps must be more than 0, not {fps:g}")
    check_haystack(haystack)
    return NeedleGrid(lengths, places, needles, tuple(form.strip() for form in forms.split(",")), seed, distractors)


def parse_numbers(text: str, option: str, points: int) -> list[float]:
    """The numbers that `text` stands for, ascending, without repeats.

    Parts are separated by commas; each is a number or a range `first..last`, with `:step` behind it or spread evenly
    over `points` numbers. Both ends of a range always belong to it.

    Raises:
        ValueError: something else, naming `option`.
    """
    found: set[float] = set()
    for part in text.split(","):
        found |= set(_part(part.strip(), text, option, points))
    return sorted(found)


def parse_lengths(text: str, option: str = "--frames") -> list[int]:
    """Whole numbers of at least 1; a range without a step gives 10 of them."""
    numbers = parse_numbers(text, option, 10)
    whole = sorted({round(number) for number in numbers})
    ranged = ".." in text
    if whole[0] < 1 or (not ranged and whole != numbers):
        raise ValueError(f"{option} {text}: lengths are whole numbers of frames, at least 1")
    return whole


def parse_depths(text: str, option: str = "--depths") -> list[float]:
    """Fractions within 0..1; a range without a step gives 5 of them."""
    numbers = parse_numbers(text, option, 5)
    if numbers[0] < 0 or numbers[-1] > 1:
        raise ValueError(f"{option} {text}: depths lie between 0 (before the first frame) and 1 (behind the last)")
    return numbers


def _part(part: str, text: str, option: str, points: int) -> list[float]:
    span, colon, step_text = part.partition(":")
    low_text, dots, high_text = span.partition("..")
    try:
        low = float(low_text)
        high = float(high_text) if dots else low
        step = float(step_text) if colon else (high - low) / (points - 1)
        if not all(map(math.isfinite, (low, high, step))) or (colon and not dots):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{option} {text}: write numbers such as 64,128 or a range such as first..last or first..last:step"
        ) from None
    if low == high and not colon:
        return [low]
    if low >= high or step <= 0:
        raise ValueError(f"{option} {text}: a range ascends, by a step of more than 0")
    count = math.floor((high - low) / step + 1e-9)
    if count > _MOST_NUMBERS:
        raise ValueError(f"{option} {text}: these are more than {_MOST_NUMBERS} numbers; use a larger step")
    # Multiples of the step, not sums, so that 0.1 + 0.2 stays 0.3.
    return [*(round(low + number * step, 6) for number in range(count + 1)), high]
