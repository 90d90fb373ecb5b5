"""What an evaluation found: `report.md`, `report.json`, `chart.png`, and the lines for a model card's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .benchmark_scores import Scores
from .benchmarks import BENCHMARKS
from .needle_search import write_json
from .paper_numbers import JUDGE, PAPER_NUMBERS, SIZES

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
        name: {**table.as_dict(), "paper": PAPER_NUMBERS.get(name, {}), "reading": facts[name]}
        for name, table in scores.items()
    }
    write_json(out / "report.json", {**about, "paper_sizes": SIZES, "benchmarks": found})
    draw = bool(scores)
    (out / "report.md").write_text(_markdown(scores, facts, about, draw), encoding="utf-8")
    (out / "model_index.yaml").write_text(model_index(scores, about), encoding="utf-8")
    if draw:
        draw_chart(scores, out / "chart.png", f"{about['model']}, {about['frames']}")


def title(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def unit(name: str) -> str:
    return BENCHMARKS[name].unit if name in BENCHMARKS else ""


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
            lines += _table(name, scores[name])
        else:
            lines += ["Answered, but not scored: that takes a judge (`--judge`); run the same command again with one."]
        lines += ["", _reading(facts[name])]
        notes = scores[name].notes if name in scores else []
        if name in PAPER_NUMBERS and BENCHMARKS[name].judge:
            notes = [*notes, f"The paper's judge was {JUDGE}."]
        if name == "longvideobench_val_v":
            notes = [*notes, "The paper's groups are of the test set, its last line of the validation set."]
        lines += ["", " ".join(notes)] if notes else []
    if chart:
        lines += ["", "![Scores by category](chart.png)"]
    return "\n".join([*lines, ""])


def _table(name: str, table: Scores) -> list[str]:
    paper = PAPER_NUMBERS.get(name, {})
    header = ["", f"here ({unit(name)})" if unit(name) else "here", "questions"]
    header += [f"paper {size}" for size in SIZES] if paper else []
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in table.rows:
        digits = 2 if _is_judged_score(name, row.category) else 1
        value = f"{row.value:.{digits}f}"
        cells = [row.category, f"**{value}**" if row.category == table.headline else value, f"{row.questions:,}"]
        if paper:
            cells += [f"{number:g}" for number in paper.get(row.category, ())] or [""] * len(SIZES)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _is_judged_score(name: str, category: str) -> bool:
    """Of a scale of 0 to 5 rather than of percentages."""
    return unit(name) == "0-5" or category == "score"


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
                        dataset_type=name,
                        dataset_name=title(name),
                        dataset_config=row.category,
                        metric_type="score" if _is_judged_score(name, row.category) else "accuracy",
                        metric_name=f"{row.category} ({how}" + (f"; judge {about['judge']})" if judged else ")"),
                        metric_value=round(row.value, 4),
                    )
                )
    if not entries:
        return ""
    return ModelCardData(model_name=about["model"], eval_results=entries).to_yaml().strip() + "\n"


def draw_chart(scores: Mapping[str, Scores], path: Path, subject: str) -> None:
    """One panel for each benchmark: a bar for each category, the paper's sizes as marks beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [max(1.2, 0.28 * len(table.rows) + 0.7) for table in scores.values()]
    figure, axes = plt.subplots(
        len(scores), 1, figsize=(8, sum(heights) + 0.6), dpi=110, height_ratios=heights, squeeze=False
    )
    for ax, (name, table) in zip(axes[:, 0], scores.items(), strict=True):
        paper, places = PAPER_NUMBERS.get(name, {}), range(len(table.rows))
        full = {row.category: 5 if _is_judged_score(name, row.category) else 100 for row in table.rows}
        shares = [row.value / full[row.category] for row in table.rows]
        colours = ["#2b6cb0" if row.category == table.headline else "#90b4d8" for row in table.rows]
        ax.barh(places, shares, color=colours)
        for place, row in enumerate(table.rows):
            digits = 2 if full[row.category] == 5 else 1
            ax.text(shares[place] + 0.01, place, f"{row.value:.{digits}f}", va="center", fontsize=8)
            for marker, number in zip("^sD", paper.get(row.category, ()), strict=False):
                ax.plot(number / full[row.category], place, marker, color="#c05621", markersize=5, clip_on=False)
        ax.set_yticks(places, [row.category for row in table.rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.08)
        ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title(name), fontsize=10, loc="left")
    if any(name in PAPER_NUMBERS for name in scores):
        marks = [
            plt.Line2D([], [], marker=m, color="#c05621", linestyle="", label=f"paper {s}")
            for m, s in zip("^sD", SIZES, strict=True)
        ]
        figure.legend(handles=marks, loc="lower right", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(subject, fontsize=10)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path)
    plt.close(figure)
