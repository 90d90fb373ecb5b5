"""Accuracy on unseen rendered videos, per kind of question, beside chance.

    python -m video_ma2mba.world.accuracy --model bundled --per-kind 1000 --frames 8..64 256 1024 --out a.csv

Videos come from the test split. Every answer is kept in `a.answers.jsonl` next to the table; the same command
goes on where it stopped.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..files.append_log import AppendLog, read_log
from ..files.progress import progress
from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.state_writing import whole_file
from ..processing.frame_times import parse_span
from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
from . import FORMS, KINDS, Question, WorldDataset, parse_frames
from .chance import chance_levels
from .endless import ENDLESS_KINDS
from .questions import check_kinds
from .scoring import generate_answers, score_forced

FIELDS = ("frames", "kind", "form", "questions", "right", "accuracy", "chance", "iou")
"""`iou`: median overlap of the spans that were answered with the right ones, over their union; of kinds with spans."""
_FRUITLESS = 1024  # videos after which a kind of which there was no question is given up
_BLOCK, _BLOCK_FRAMES = 64, 32768  # between two saves: videos, fewer where they have more frames than this together


@dataclasses.dataclass
class WorldAccuracy:
    """What is measured, and how."""

    model: str = dataclasses.field(metadata={"help": "folder of a model trained on the rendered world"})
    out: str = dataclasses.field(metadata={"help": "CSV file to write"})
    per_kind: int = dataclasses.field(default=1000, metadata={"help": "at least so many questions of each kind"})
    frames: list[str] = dataclasses.field(
        default_factory=lambda: ["8..64"], metadata={"help": "lengths, each a number or a range such as 8..64"}
    )
    method: str = dataclasses.field(
        default="generate", metadata={"help": "generate (greedy decoding) or forced (given the right answer; faster)"}
    )
    device: str = dataclasses.field(default="", metadata={"help": "cuda or cpu; by default what there is"})
    dtype: str = dataclasses.field(default="", metadata={"help": "by default bfloat16 on a GPU, float32 on a CPU"})
    frames_at_once: int = dataclasses.field(default=0, metadata={"help": "frames of one batch"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of the test videos"})
    kinds: str = dataclasses.field(default=",".join(KINDS), metadata={"help": "of question, separated by commas"})
    begins: int = dataclasses.field(default=0, metadata={"help": "seconds at which videos may begin"})
    streams: bool = dataclasses.field(
        default=False, metadata={"help": "streams without end, asked about the last minute, instead of whole videos"}
    )

    def __post_init__(self) -> None:
        if self.method not in ("generate", "forced"):
            raise ValueError(f"method={self.method!r}: must be generate or forced.")
        if self.per_kind < 1:
            raise ValueError(f"per_kind={self.per_kind}: must be at least 1.")
        self.kind_names = check_kinds(self.kinds.split(","))
        if self.streams:
            self.kind_names = tuple(kind for kind in self.kind_names if kind in ENDLESS_KINDS)
        cuda = torch.cuda.is_available()
        self.device = self.device or ("cuda" if cuda else "cpu")
        self.dtype = self.dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")
        self.frames_at_once = self.frames_at_once or (4096 if self.device.startswith("cuda") else 128)


class Answers:
    """A file of answers, one JSON object a line, that survives interruption: only finished blocks count."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.blocks: set[tuple[str, int]] = set()
        self._log = AppendLog(path)
        if not path.exists():
            self._log.add(about)
        elif len(kept := self._read(about)) < len(list(read_log(path))):
            self._log.replace(kept)  # drops what an interrupted block left behind

    def _read(self, about: dict[str, Any]) -> list[bytes]:
        lines = list(read_log(self.path))
        if not lines or lines[0][1] != about:
            raise ValueError(f"{self.path} holds answers of another model or other settings: choose another --out.")
        kept, pending = [lines[0][0]], []
        for line, entry in lines[1:]:
            pending.append((line, entry))
            if "block" in entry:
                kept += [text for text, _ in pending]
                self.rows += [row for _, row in pending[:-1]]
                self.blocks.add((entry["frames"], entry["block"]))
                pending = []
        return kept

    def add(self, frames: str, block: int, rows: list[dict[str, Any]]) -> None:
        """Append a finished block."""
        self._log.add(*rows, {"frames": frames, "block": block})
        self.rows += rows
        self.blocks.add((frames, block))


def measure(settings: WorldAccuracy) -> list[dict[str, Any]]:
    """Ask until every kind has `per_kind` questions at every length; returns and writes the table."""
    out = Path(settings.out)
    folder = Path(settings.model)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no model.safetensors in it.")
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    model = model.to(settings.device).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "method": settings.method,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }
    if (asked := (settings.kind_names, settings.begins)) != (
        KINDS,
        0,
    ):  # answers of before there were others stay valid
        about |= {"kinds": list(asked[0]), "begins": asked[1]}
    if settings.streams:
        about |= {"streams": True}
    answers = Answers(out.with_suffix(".answers.jsonl"), about)
    for frames in settings.frames:
        _ask(model, processor, settings, frames, answers)
    table = [row for frames in settings.frames for row in summary(answers.rows, frames, settings.kind_names)]
    _write(out, table)
    return table


def _ask(model: Any, processor: Any, settings: WorldAccuracy, frames: str, answers: Answers) -> None:
    # Not every video settles every kind, so there is no telling beforehand how many videos it takes.
    kinds, settled = settings.kind_names, {"kinds": settings.kind_names, "begins": settings.begins}
    settled["streams"] = float(settings.streams)
    settled["resolution"] = model.config.vision_config.image_size
    data = WorldDataset(
        "test", 10**9, frames=parse_frames(frames), questions=len(kinds), seed=settings.seed, **settled
    )
    asked = Counter(row["kind"] for row in answers.rows if row["frames"] == frames)
    with progress(f"videos of {frames} frames", "questions a kind", settings.per_kind) as tell:
        block, videos = 0, max(min(_BLOCK, _BLOCK_FRAMES // parse_frames(frames)[1]), 1)
        while min(asked[kind] for kind in kinds) < settings.per_kind:
            if (frames, block) not in answers.blocks:
                rows = []
                for indices in _batches(data, range(block * videos, (block + 1) * videos), settings.frames_at_once):
                    for question, given in _answer(model, processor, data, indices, settings.method):
                        rows.append(_row(frames, question, given))
                answers.add(frames, block, rows)
                asked.update(row["kind"] for row in rows)
            block += 1
            if block * videos >= _FRUITLESS and (never := [kind for kind in kinds if not asked[kind]]):
                raise ValueError(
                    f"not one of {block * videos} videos of {frames} frames settles {', '.join(never)}: ask for "
                    "longer videos, or leave it out of --kinds"
                )
            tell(min(min(asked.values(), default=0), settings.per_kind))


def _batches(data: WorldDataset, videos: range, frames_at_once: int) -> Iterator[list[int]]:
    """Videos of one length each, about `frames_at_once` frames together."""
    groups: dict[int, list[int]] = {}
    for index in videos:
        groups.setdefault(data.length(index), []).append(index)
    for length, members in sorted(groups.items()):
        share = max(frames_at_once // length, 1)
        for first in range(0, len(members), share):
            yield members[first : first + share]


def _answer(
    model: Any, processor: Any, data: WorldDataset, indices: list[int], method: str
) -> list[tuple[Question, str | bool]]:
    samples = [data.sample(index) for index in indices]
    return (generate_answers if method == "generate" else score_forced)(model, processor, samples)


def _row(frames: str, question: Question, given: str | bool) -> dict[str, Any]:
    right = given if isinstance(given, bool) else given == question.answer
    row = {"frames": frames, **dataclasses.asdict(question), "right": right}
    if not isinstance(given, bool) and parse_span(question.answer) is not None:
        row["iou"] = span_overlap(given, question.answer)
    return row if isinstance(given, bool) else row | {"given": given}


def span_overlap(given: str, right: str) -> float:
    """Overlap over union, 0..1, of the spans in which two answers end; 0 where one ends in none."""
    spans = [parse_span(given), parse_span(right)]
    if None in spans:
        return 0.0
    (_, a, b), (_, c, d) = spans
    union = max(b, d) - min(a, c)
    return max(min(b, d) - max(a, c), 0.0) / union if union > 0 else float((a, b) == (c, d))


def summary(rows: list[dict[str, Any]], frames: str, kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """The table of one length: per kind, per kind and form, and all together."""
    names = [field.name for field in dataclasses.fields(Question)]
    table = []
    for kind in (*kinds, "all"):
        for form in ("all", *FORMS):
            members = [
                row
                for row in rows
                if row["frames"] == frames and kind in (row["kind"], "all") and form in (row["form"], "all")
            ]
            if not members:
                continue
            questions = [Question(**{name: row[name] for name in names}) for row in members]
            right = sum(row["right"] for row in members)
            overlaps = [row["iou"] for row in members if "iou" in row]
            table.append(
                {
                    "frames": frames,
                    "kind": kind,
                    "form": form,
                    "questions": len(members),
                    "right": right,
                    "accuracy": round(right / len(members), 4),
                    "chance": round(chance_levels(questions)["all"], 4),
                    "iou": round(statistics.median(overlaps), 4) if overlaps else None,
                }
            )
    return table


def _write(path: Path, table: list[dict[str, Any]]) -> None:
    with whole_file(path) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    (chosen,) = HfArgumentParser(WorldAccuracy).parse_args_into_dataclasses()
    for line in measure(chosen):
        if line["form"] == "all":
            print(
                "{frames:>8} {kind:>10}  {accuracy:.3f}  (chance {chance:.3f}, {questions} questions)".format(**line),
                "" if line["iou"] is None else f"median overlap {line['iou']:.3f}",
            )
