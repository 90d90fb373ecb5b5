"""What an evaluation found: `report.md`, `report.json`, `chart.png`, and the lines for a model card's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.state_writing import whole_file, write_whole
from .benchmark_scores import Scores
from .benchmarks import BENCHMARKS, is_five_point_scale, title, unit
from .needle_search import write_json

# What the paper (arXiv 2411.19460v1, tables 1a, 1b and 2) reports for its three sizes.
SIZES = ("0.7B", "1.8B", "3.1B")
JUDGE = "gpt-3.5-turbo-0125"  # that scored the answers of two of the benchmarks

PAPER_NUMBERS: dict[str, dict[str, tuple[float, float, float]]] = {
    "videomme": {
        "short": (37.4, 49.4, 57.6),
        "medium": (35.0, 39.2, 42.7),
        "long": (26.8, 31.9, 35.4),
        "all": (33.1, 40.3, 45.2),
    },
    # The paper's groups are of the test set, whose answers are not public; its "all" of the validation set is.
    "longvideobench_val_v": {
        "8-15 s": (43.3, 48.4, 55.4),
        "15-60 s": (45.4, 49.5, 55.6),
        "180-600 s": (33.3, 39.6, 42.4),
        "900-3600 s": (28.5, 34.1, 38.5),
        "all": (34.0, 38.0, 43.0),
    },
    "mvbench": {"all": (41.1, 44.4, 48.3)},
    "activitynetqa": {"accuracy": (43.8, 50.0, 51.7), "score": (3.2, 3.1, 3.4)},
    "videochatgpt": {"all": (2.69, 2.76, 3.03)},
}
"""Benchmark -> category -> the value for each of `SIZES`."""

FRAMES_ABLATION: dict[str, dict[str, tuple[float]]] = {
    "8 frames": {"short": (53.3,), "medium": (39.3,), "long": (32.2,), "all": (41.6,)},
    "16 frames": {"short": (55.9,), "medium": (41.3,), "long": (33.9,), "all": (43.7,)},
    "32 frames": {"short": (57.9,), "medium": (41.9,), "long": (33.9,), "all": (44.6,)},
}
"""Table 4: the 3.1B model on Video-MME by frames at inference (trained at 1 fps, with stage 1.5)."""

_MARKERS = dict(zip(SIZES, "^sD", strict=True))
_PAPER_COLOUR = "#c05621"
_TASK = ("video-text-to-text", "Video question answering")


def write_report(
    out: Path, scores: Mapping[str, Scores], facts: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write the four files.

    Args:
        scores: of each benchmark, from `score_answers`.
        facts: of each benchmark, from `reading_facts`; also of those that wait for a judge.
        about: "command", "model", "frames", "judge", "limit", "date", "device", "dtype", "versions".
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {
        name: {**table.as_dict(), **_paper(name, about["frames"]), "reading": facts[name]}
        for name, table in scores.items()
    }
    write_json(out / "report.json", {**about, "benchmarks": found})
    draw = bool(scores)
    write_whole(out / "report.md", _markdown(scores, facts, about, draw))
    write_whole(out / "model_index.yaml", model_index(scores, about))
    if draw:
        draw_chart(scores, out / "chart.png", about["model"], about["frames"])


def _markdown(scores: Mapping[str, Scores], facts: Mapping[str, Any], about: Mapping[str, Any], chart: bool) -> str:
    limited = f" **Only the first {about['limit']} documents of each task.**" if about.get("limit") else ""
    lines = [
        f"# Evaluation: {about['model']}",
        "",
        "```bash",
        about["command"],
        "```",
        "",
        f"Frames: {about['frames']}. Judge: {about['judge'] or 'none'}. {about['date']}, {about['device']}, "
        f"{about['dtype']}; {about['versions']}. Answered and scored by lmms-eval's own tasks.{limited}",
    ]
    for name in facts:
        lines += ["", f"## {title(name)}", ""]
        if name in scores:
            lines += _table(name, scores[name], about["frames"])
        else:
            lines += ["Answered, but not scored yet: run the same command again, with a judge if it needs one."]
        lines += ["", _reading(facts[name])]
        notes = list(scores[name].notes) if name in scores else []
        if about["frames"] != "1 fps" and paper_columns(name, about["frames"])[1] is PAPER_NUMBERS.get(name):
            notes.append("The paper read 1 frame a second.")
        if name in PAPER_NUMBERS and BENCHMARKS[name].judge:
            notes = [*notes, f"The paper's judge was {JUDGE}."]
        if name == "longvideobench_val_v":
            notes = [*notes, "The paper's groups are of the test set, its last line of the validation set."]
        lines += ["", " ".join(notes)] if notes else []
    if chart:
        lines += ["", "![Scores by category](chart.png)"]
    return "\n".join([*lines, ""])


def _paper(name: str, frames: str) -> dict[str, Any]:
    headings, values = paper_columns(name, frames)
    return {"paper_columns": headings, "paper": values}


def _table(name: str, table: Scores, frames: str) -> list[str]:
    headings, paper = paper_columns(name, frames)
    header = ["", f"here ({unit(name)})" if unit(name) else "here", "questions"]
    header += headings
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in table.rows:
        digits = 2 if is_five_point_scale(name, row.category) else 1
        value = f"{row.value:.{digits}f}"
        cells = [row.category, f"**{value}**" if row.category == table.headline else value, f"{row.questions:,}"]
        if paper:
            told = [f"{number:g}" if digits == 2 else f"{number:.1f}" for number in paper.get(row.category, ())]
            cells += told or [""] * len(headings)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _reading(facts: Mapping[str, Any]) -> str:
    if "videos" not in facts:
        return f"{facts['questions']:,} questions."
    frames = facts["frames_per_video"]
    broken = (
        f" **{facts['unreadable']} questions are about videos that cannot be read.**" if facts["unreadable"] else ""
    )
    return (
        f"{facts['questions']:,} questions about {facts['videos']:,} videos, each read once: {frames['mean']:.1f} "
        f"frames a video ({frames['least']} to {frames['most']}), {facts['seconds_per_video']:.2f} s a video with its "
        f"answers ({facts['reading_seconds_per_video']:.2f} s reading, "
        f"{facts['answering_seconds_per_question']:.3f} s a question).{broken}"
    )


def model_index(scores: Mapping[str, Scores], about: Mapping[str, Any]) -> str:
    """The `model-index` block for a card's metadata, as the Hub reads it; empty without scores."""
    from huggingface_hub import EvalResult, ModelCardData

    entries = []
    for name, table in scores.items():
        for row in table.rows:
            if row.category == table.headline or name in PAPER_NUMBERS:
                how = f"{about['frames']}" + (f", first {about['limit']} documents" if about.get("limit") else "")
                judged = name in BENCHMARKS and BENCHMARKS[name].judge
                entries.append(
                    EvalResult(
                        task_type=_TASK[0],
                        task_name=_TASK[1],
                        dataset_type=BENCHMARKS[name].dataset if name in BENCHMARKS else name,
                        dataset_name=title(name),
                        dataset_config=row.category,
                        metric_type="score" if is_five_point_scale(name, row.category) else "accuracy",
                        metric_name=f"{row.category} ({how}" + (f"; judge {about['judge']})" if judged else ")"),
                        metric_value=round(row.value, 4),
                    )
                )
    if not entries:
        return ""
    return ModelCardData(model_name=about["model"], eval_results=entries).to_yaml().strip() + "\n"


def draw_chart(scores: Mapping[str, Scores], path: Path, model: str, frames: str) -> None:
    """Write a PNG. A bar is a category's share of the best possible, labelled with its score."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [0.26 * len(table.rows) + 0.75 for table in scores.values()]
    figure, axes = plt.subplots(
        len(scores), 1, figsize=(8, sum(heights) + 0.7), dpi=110, height_ratios=heights, squeeze=False
    )
    named: dict[str, str] = {}
    for ax, (name, table) in zip(axes[:, 0], scores.items(), strict=True):
        headings, paper = paper_columns(name, frames)
        named |= {heading: next(mark for size, mark in _MARKERS.items() if size in heading) for heading in headings}
        places = range(len(table.rows))
        full = [5 if is_five_point_scale(name, row.category) else 100 for row in table.rows]
        colours = ["#2b6cb0" if row.category == table.headline else "#90b4d8" for row in table.rows]
        ax.barh(places, [row.value / most for row, most in zip(table.rows, full, strict=True)], color=colours)
        for place, (row, most) in enumerate(zip(table.rows, full, strict=True)):
            text = f"{row.value:.2f}" if most == 5 else f"{row.value:.1f}"
            ax.text(1.03, place, text, va="center", ha="left", fontsize=8)
            for heading, number in zip(headings, paper.get(row.category, ()), strict=False):
                ax.plot(number / most, place, named[heading], color=_PAPER_COLOUR, markersize=5, clip_on=False)
        ax.set_yticks(places, [row.category for row in table.rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.02)
        ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title(name), fontsize=10, loc="left")
    marks = [
        plt.Line2D([], [], marker=marker, color=_PAPER_COLOUR, linestyle="", label=heading)
        for heading, marker in named.items()
    ]
    if marks:
        figure.legend(handles=marks, loc="lower right", ncols=len(marks), fontsize=8, frameon=False)
    figure.suptitle(f"{model}, {frames}", fontsize=10)
    inch = 1 / figure.get_figheight()
    figure.tight_layout(rect=(0, 0.25 * inch, 1, 1 - 0.1 * inch))
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")
    plt.close(figure)


def paper_columns(benchmark: str, frames: str) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Headings, and values by category, that belong beside a result; `frames` as `Reading.text` has it."""
    if benchmark == "videomme" and frames in FRAMES_ABLATION:
        return (f"paper 3.1B, {frames}",), FRAMES_ABLATION[frames]
    values = PAPER_NUMBERS.get(benchmark, {})
    return tuple(f"paper {size}" for size in SIZES) if values else (), values
