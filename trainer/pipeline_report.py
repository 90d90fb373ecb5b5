"""What came of a pipeline: one page that needs no other file, and the same as JSON and CSV."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.state_writing import whole_file, write_whole

REPORT = "report.html"
_FIELDS = (
    *("run", "trained", "learning_rate", "max_length", "max_frames", "steps", "tokens", "frames", "hours"),
    *("first_loss", "last_loss", "eval_loss", "gpu_peak_gb", "host_peak_gb", "processes", "device", "date"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
"""


def write_report(out: Path, name: str, runs: Sequence[Mapping[str, Any]], command: str) -> Path:
    """Write `report.html`, `report.json` and `report.csv` about the runs that are known.

    Args:
        runs: from `pipeline_run.Runs`. command: with which the pipeline was started.

    Returns:
        The path of the page.
    """
    rows = [_row(run) for run in runs if "steps" in run]
    brief = [{key: value for key, value in run.items() if key != "trained_parameters"} for run in runs]
    write_whole(
        out / "report.json", json.dumps({"pipeline": name, "command": command, "runs": brief}, indent=1) + "\n"
    )
    with whole_file(out / "report.csv") as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(name)}</title><style>{_STYLE}</style>",
        f"<h1>Pipeline {html.escape(name)}</h1><pre>{html.escape(command)}</pre>",
        "<h2>Runs</h2>",
        _table(_FIELDS, [[_cell(row[field]) for field in _FIELDS] for row in rows]),
    ]
    if any(run.get("log") for run in runs):
        parts.append("<h2>Loss</h2>" + _picture(lambda figure: _draw_losses(figure, runs), "Loss by tokens, each run"))
    parts += _evaluations(runs)
    versions = sorted({str(run["versions"]) for run in runs if run.get("versions")})
    parts.append(f"<p>{html.escape('; '.join(versions))}. The same figures: report.json, report.csv.</p></html>\n")
    write_whole(out / REPORT, "\n".join(parts))
    return out / REPORT


def _row(run: Mapping[str, Any]) -> dict[str, Any]:
    losses, held_out = ([entry[name] for entry in run["log"] if name in entry] for name in ("loss", "eval_loss"))
    trained = ", ".join(f"{part} {count:,}" for part, count in run["trained"].items())
    row = {field: run.get(field) for field in _FIELDS}
    return row | {
        "run": run["title"],
        "trained": trained,
        "hours": round(run["seconds"] / 3600, 4),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_loss": held_out[-1] if held_out else None,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "".join(lines) + "</table>"


def _picture(draw: Callable[[Any], None], words: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    draw(figure)
    held = io.BytesIO()
    figure.savefig(held, dpi=110, format="png")
    data = base64.b64encode(held.getvalue()).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def _draw_losses(figure: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    ax = figure.subplots()
    before = 0.0
    for run in runs:
        if not run.get("log"):
            continue
        log = [entry for entry in run["log"] if "loss" in entry]
        tokens = [before + entry.get("num_tokens", 0) for entry in log]
        ax.plot(tokens, [entry["loss"] for entry in log], label=run["title"], lw=1.2, marker=".", ms=4)
        before = max(tokens, default=before)
    ax.set_xlabel("tokens")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _evaluations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured after each run, kind by kind."""
    parts = []
    for kind, title, key in (
        ("world", "Accuracy on the rendered world", "frames"),
        ("benchmarks", "Benchmarks", "frames"),
    ):
        curves = {run["title"]: run["evaluation"][kind] for run in runs if (run.get("evaluation") or {}).get(kind)}
        if not curves:
            continue
        names = list(dict.fromkeys((row["name"], row[key]) for curve in curves.values() for row in curve))
        head = ["after", *(f"{name}, {frames} frames" if name else f"{frames} frames" for name, frames in names)]
        rows = []
        for after, curve in curves.items():
            found = {(row["name"], row[key]): row for row in curve}
            cells = [found.get(place) for place in names]
            rows.append([after, *("–" if cell is None else f"{cell['value']:.1f}" for cell in cells)])
        parts += [f"<h2>{title}</h2>", _table(head, rows)]
        parts.append(_picture(lambda figure, curves=curves: _draw_curves(figure, curves), f"{title} by frames"))
    maps = {run["title"]: run["evaluation"]["needles"] for run in runs if (run.get("evaluation") or {}).get("needles")}
    if maps:
        parts.append("<h2>Needles: found of those hidden, by frames and depth</h2>")
        places = sorted({(cell["frames"], cell["depth"]) for cells in maps.values() for cell in cells})
        rows = []
        for after, cells in maps.items():
            found = {(cell["frames"], cell["depth"]): cell for cell in cells}
            shown = [found.get(place) for place in places]
            rows.append(
                [after, *("–" if cell is None else f"{cell['found']} of {cell['questions']}" for cell in shown)]
            )
        parts.append(_table(["after", *(f"{frames:,} at {depth:g}" for frames, depth in places)], rows))
    return parts


def _draw_curves(figure: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    ax = figure.subplots()
    counts = list(dict.fromkeys(str(row["frames"]) for curve in curves.values() for row in curve))
    for after, curve in curves.items():
        for name in dict.fromkeys(row["name"] for row in curve):
            own = [row for row in curve if row["name"] == name]
            label = f"{after}: {name}" if name else after
            ax.plot(
                [counts.index(str(row["frames"])) for row in own], [row["value"] for row in own], "o-", label=label
            )
    ax.set_xticks(range(len(counts)), counts)
    ax.set_xlabel("frames of a video")
    ax.set_ylabel("score")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
