"""The picture of a relevance: the frames that matter most with their times, above the curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling_video_ma2mba.state_writing import whole_file
from ..processing.video_reader import open_video
from .relevance import Relevance

_NAMES = {"gradient_x_input": "gradient × input", "integrated_gradients": "integrated gradients"}
_INK, _GREY, _FOR, _AGAINST, _DECAY = "#1f2933", "#7b8794", "#2f6f9f", "#b23a48", "#d98c3f"


def save_filmstrip(found: Relevance, video: Any, path: str | Path, frames: int = 6, sampling: Any = None) -> None:
    """Write a PNG of 1320 x 720 pixels (fewer frames do not make it smaller).

    Args:
        video: the source that `found` was computed from; opened again, a few frames of it are decoded at full size.
        frames: pictures to show, those of the highest values; neighbours of a shown frame are passed over.
        sampling: the `processing.frame_sampling.Sampling` of the reading; None: one frame a second.

    Raises:
        ImportError: matplotlib is missing. ValueError: `frames` is not 1 to 12.
    """
    if not 1 <= frames <= 12:
        raise ValueError(f"frames={frames}: a strip has 1 to 12 pictures")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = peaks(found.attribution, frames)
    pictures = frames_at(video, chosen, sampling)
    figure = plt.figure(figsize=(11, 6), dpi=120, facecolor="white")
    grid = figure.add_gridspec(3, len(chosen), height_ratios=(2.0, 2.3, 0.9), left=0.07, right=0.985, top=0.86,
                               bottom=0.085, hspace=0.36, wspace=0.06)  # fmt: skip
    curve = figure.add_subplot(grid[1, :])
    below = figure.add_subplot(grid[2, :], sharex=curve)
    _heading(figure, found)
    _draw_curve(curve, found)
    _draw_decay(below, found)
    best = int(np.argmax(found.attribution))
    for column, (index, picture) in enumerate(zip(chosen, pictures, strict=True)):
        shown = figure.add_subplot(grid[0, column])
        shown.imshow(picture, interpolation="nearest" if max(picture.shape) < 200 else "antialiased")
        shown.set(xticks=[], yticks=[])
        edge = _FOR if index == best else "#cbd2d9"
        shown.spines[:].set(color=edge, linewidth=2.4 if index == best else 1.0)
        shown.set_title(clock(found.times[index]), fontsize=10, color=_FOR if index == best else _INK, pad=4,
                        fontweight="bold" if index == best else "normal")  # fmt: skip
        _connect(figure, shown, curve, found, index, edge)
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", pil_kwargs={"optimize": True})
    plt.close(figure)


def peaks(curve: np.ndarray, count: int) -> list[int]:
    """Up to `count` indices of the highest values, in order of time, no two within 1/40 of the length of another."""
    apart = max(1, len(curve) // 40)
    chosen: list[int] = []
    for index in np.argsort(-curve, kind="stable").tolist():
        if all(abs(index - other) > apart for other in chosen) or len(curve) <= count:
            chosen.append(index)
        if len(chosen) == count:
            break
    return sorted(chosen)


def frames_at(video: Any, indices: list[int], sampling: Any = None) -> list[np.ndarray]:
    """The sampled frames with these indices, uint8 (h, w, 3) each in its own size, at most 320 pixels wide or high."""
    settings = {} if sampling is None else vars(sampling)
    reader = video if hasattr(video, "chunks") else open_video(video, **settings)
    try:
        return [_smaller(next(reader.chunks(1, skip=index)).pixels[0]) for index in indices]
    finally:
        reader.close()


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`; tenths where they matter."""
    whole, tenth = divmod(round(float(seconds) * 10), 10)
    hours, rest = divmod(whole, 3600)
    text = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{text}.{tenth}" if tenth else text


def _smaller(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((320, 320))
    return np.asarray(image)


def _heading(figure: Any, found: Relevance) -> None:
    question = textwrap.shorten(found.question, 100, placeholder=" …").replace("$", r"\$")
    answer = textwrap.shorten(found.answer, 80, placeholder=" …").replace("$", r"\$")
    figure.text(0.07, 0.955, question, fontsize=13, fontweight="bold", color=_INK)
    share = float(np.exp(found.log_probability))
    figure.text(0.07, 0.915, f"{answer}   (probability {share:.2g})", fontsize=11, color=_FOR)


def _draw_curve(axes: Any, found: Relevance) -> None:
    values, steps = found.attribution, _edges(found.times)
    for sign, colour in ((1, _FOR), (-1, _AGAINST)):
        axes.stairs(np.clip(values * sign, 0, None) * sign, steps, fill=True, color=colour, alpha=0.85, linewidth=0)
    axes.axhline(0, color=_GREY, linewidth=0.6)
    axes.set_ylabel("evidence (nats)", fontsize=9, color=_INK)
    _title(axes, f"attribution by {_NAMES[found.method]}: above 0 speaks for the answer")
    axes.margins(y=0.08)
    axes.tick_params(labelbottom=False)
    _plain(axes)


def _draw_decay(axes: Any, found: Relevance) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges = _edges(found.times)
    axes.stairs(found.decay, edges, color=_DECAY, linewidth=1.6, baseline=None)
    axes.set_ylim(0, 1.05)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("share left", fontsize=9, color=_INK)
    _title(axes, "decay of the state: what is left of each frame when the answer begins (not what was used)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 1.5, 2, 3, 5, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(max(value, 0))))
    _plain(axes)


def _title(axes: Any, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # over the lines from the pictures
    axes.set_title(text, fontsize=9, color=_INK, loc="left", bbox=box)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.tick_params(labelsize=8, color="#cbd2d9", labelcolor=_GREY)
    axes.patch.set_visible(False)
    axes.grid(True, axis="y", linewidth=0.4, alpha=0.5)


def _connect(figure: Any, shown: Any, curve: Any, found: Relevance, index: int, colour: str) -> None:
    """A line from the bottom of a picture to its place on the curve."""
    from matplotlib.patches import ConnectionPatch

    edges = _edges(found.times)
    place = ((edges[index] + edges[index + 1]) / 2, max(float(found.attribution[index]), 0.0))
    line = ConnectionPatch(
        (0.5, 0),
        place,
        "axes fraction",
        "data",
        axesA=shown,
        axesB=curve,
        color=colour,
        linewidth=0.9,
        linestyle=(0, (3, 2)),
        zorder=-1,
    )
    figure.add_artist(line)


def _edges(times: np.ndarray) -> np.ndarray:
    """Where the bar of each frame begins, and where the last one ends: (F + 1,), strictly increasing."""
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    step = step if step > 0 else 1.0
    edges = np.append(times, times[-1] + step)
    return np.maximum.accumulate(edges + np.arange(len(edges)) * 1e-9)  # frames shown twice keep a place of their own
