"""What an evaluation found: `report.md`, `report.json`, `chart.png`, and the lines for a model card's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.state_writing import write_whole
from .benchmark_chart import draw_chart
from .benchmark_scores import Scores
from .benchmarks import BENCHMARKS, is_five_point_scale, title, unit
from .needle_search import write_json
from .paper_numbers import JUDGE, PAPER_NUMBERS, paper_columns

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
