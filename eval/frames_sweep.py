"""The same benchmarks by the number of frames that a model looks at: a table and a curve, from one report for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.state_writing import whole_file, write_whole
from .benchmarks import title, unit

MAX = "max"
"""All frames that are read otherwise: one a second."""


def frame_counts(text: str) -> list[int | str]:
    """The numbers of frames in `8,32,max`, ascending, `MAX` last.

    Raises:
        ValueError: something else, or nothing.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part == MAX or (part.isdecimal() and int(part) > 0) for part in parts):
        raise ValueError(f"--frames-sweep {text}: write numbers of frames such as 8,32,128,{MAX}")
    numbers: list[int | str] = [*sorted({int(part) for part in parts if part != MAX})]
    return numbers + [MAX] * (MAX in parts)


def write_sweep(out: Path, folders: Mapping[int | str, Path]) -> Path:
    """Write `sweep.md`, `sweep.json` and `sweep.png` from the `report.json` in each folder.

    Returns:
        The path of `sweep.md`.
    """
    from .needle_search import write_json  # needs torch, which a mistyped option need not wait for

    reports = {
        count: json.loads((folder / "report.json").read_text(encoding="utf-8")) for count, folder in folders.items()
    }
    names = list(dict.fromkeys(name for report in reports.values() for name in report["benchmarks"]))
    found = {
        name: {
            str(count): _headline(report["benchmarks"][name])
            for count, report in reports.items()
            if name in report["benchmarks"]
        }
        for name in names
    }
    write_json(out / "sweep.json", {"frames": list(map(str, folders)), "benchmarks": found})
    first = next(iter(reports.values()))
    lines = [f"# Frames at inference: {first['model']}", "", "| benchmark | " + " | ".join(map(str, folders)) + " |"]
    lines += ["| --- |" + " --- |" * len(folders)]
    for name in names:
        cells = [found[name].get(str(count)) for count in folders]
        shown = ["–" if cell is None else f"{cell['value']:.2f}" for cell in cells]
        lines.append(f"| {title(name)}{f', {unit(name)}' if unit(name) else ''} | " + " | ".join(shown) + " |")
    lines += ["", f"Reports: {', '.join(f'[{count}]({folder.name}/report.md)' for count, folder in folders.items())}."]
    lines += [f"{first['date']}, {first['device']}, {first['versions']}."]
    if first.get("limit"):
        lines.append(f"**Only the first {first['limit']} documents of each task.**")
    if names:
        _draw(out / "sweep.png", found, list(map(str, folders)), first["model"])
        lines += ["", "![Scores by frames](sweep.png)"]
    write_whole(out / "sweep.md", "\n".join(lines) + "\n")
    return out / "sweep.md"


def _headline(scores: Mapping[str, Any]) -> dict[str, Any]:
    (row,) = [row for row in scores["rows"] if row["category"] == scores["headline"]]
    return {"value": row["value"], "questions": row["questions"]}


def _draw(path: Path, found: Mapping[str, Mapping[str, Any]], counts: list[str], model: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    for name, values in found.items():
        places = [place for place, count in enumerate(counts) if count in values]
        label = f"{title(name)}{f' ({unit(name)})' if unit(name) else ''}"
        ax.plot(places, [values[counts[place]]["value"] for place in places], marker="o", label=label)
    ax.set_xticks(range(len(counts)), counts)
    ax.set_xlabel("frames of a video")
    ax.set_ylabel("score")
    ax.set_title(f"Frames at inference: {model}", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=150, format="png")
