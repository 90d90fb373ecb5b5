"""How often the peak of a relevance curve is where the answer stood: rendered videos, where the second is known.

    python benchmarks/relevance_accuracy.py measure --split test --frames 64 --questions 100 --out runs/a.jsonl
    python benchmarks/relevance_accuracy.py table runs/*.jsonl

`measure` explains the right answers of so many questions of each kind ("needle": which sign did the card show; "time":
in which quarter did X appear), `--shard 1/4` a quarter of them; an interrupted run goes on. `table` writes
benchmarks/results/relevance_accuracy.csv. A hit is a peak within one second of the card's or the thing's first second;
"in view" is a peak while it is shown. Chance is what a second drawn at random would reach.
"""

import argparse
import datetime
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from result_tables import write_rows
from transformers import AutoTokenizer

from video_ma2mba import BUNDLED_CHECKPOINT, VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.explain import occlusion
from video_ma2mba.explain.attribution import VideoReading, as_function, frame_sums, integrated_gradients
from video_ma2mba.explain.read_features import read_features
from video_ma2mba.world import Question, World, WorldDataset, render

RESULT = Path(__file__).parent / "results" / "relevance_accuracy.csv"
KINDS = ("needle", "time")
FIELDS = ["hardware", "date", "split", "frames", "kind", "method", "questions", "within_1s", "chance_within_1s",
          "in_view", "chance_in_view"]  # fmt: skip


def truth(world: World, question: Question) -> tuple[int, int]:
    """First second, and second after the last, in which what the question asks about is shown."""
    things = [thing for thing in world.things if thing.name in question.text]
    if question.kind == "needle" or not things:
        return world.card.start, world.card.start + 1
    return things[0].start, things[0].end


def questions(split: str, frames: int, count: int) -> Iterator[tuple[str, World, Question]]:
    """`count` open questions of each kind, kinds in turn, one a video; the identifier names video and question."""

    def of(kind: str) -> Iterator[tuple[str, World, Question]]:
        data = WorldDataset(
            split, 10**9, frames=(frames, frames), questions=1, kinds=(kind,), forms=("open",), seed=11
        )
        for index in range(len(data)):
            world, asked = data.asked(index)
            if asked:
                yield f"{split} {frames} {index} {kind}", world, asked[0]

    for group in islice(zip(*map(of, KINDS), strict=True), count):
        yield from group


def curves(model, processor, world: World, question: Question, steps: list[int], rows: int) -> dict[str, np.ndarray]:
    """Every method's curve, (F,), for the right answer."""
    ids = processor.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    answer = torch.tensor([*ids, processor.tokenizer.eos_token_id])
    prompt = read_features(model, processor, render(world), question.text)
    found = {}
    with as_function(model):
        reading = VideoReading(model, prompt, prompt.features)
        gradient = reading.gradient(reading.log_probability(answer).sum())
        found["gradient_x_input"] = frame_sums(gradient, prompt.features)
        found["gradient_x_input, absolute"] = found["gradient_x_input"].abs()
        found["gradient_x_change_from_mean"] = frame_sums(gradient, prompt.features - prompt.features.mean(dim=0))
        found["gradient_norm"] = gradient.flatten(1).norm(dim=1)
        for count in steps:
            shares = integrated_gradients(model, prompt, answer, count)
            found[f"integrated_gradients, {count} steps"] = torch.stack(list(shares)).sum(dim=0)
        if rows:
            found["occlusion, 1 frame"] = occlusion(model, prompt, answer, 1, rows)
    return {name: curve.numpy() for name, curve in found.items()}


def measure(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).to(device)
    processor = VideoMa2mbaProcessor.from_pretrained(args.model, tokenizer=AutoTokenizer.from_pretrained(args.model))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = {row["id"] for row in _rows([args.out])} if args.out.exists() else set()
    part, parts = map(int, args.shard.split("/"))
    for number, (name, world, question) in enumerate(questions(args.split, args.frames, args.questions)):
        if name in known or number % parts != part - 1:
            continue
        found = curves(model, processor, world, question, args.steps, args.rows)
        start, end = truth(world, question)
        row = {"id": name, "hardware": hardware, "date": datetime.date.today().isoformat(), "split": args.split}
        row |= {"frames": args.frames, "kind": question.kind, "start": start, "end": end}
        row["peaks"] = {method: int(np.argmax(curve)) for method, curve in found.items()}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _rows(paths: list[Path]) -> list[dict]:
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True))
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(args: argparse.Namespace) -> None:
    groups: dict[tuple, list[tuple[dict, int]]] = {}
    for row in {row["id"]: row for row in _rows(args.files)}.values():
        for method, peak in row["peaks"].items():
            key = (row["hardware"], row["date"], row["split"], row["frames"], row["kind"], method)
            groups.setdefault(key, []).append((row, peak))
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: (item[0][2:5], item[0][5])):
        frames = key[3]
        near = [abs(peak - row["start"]) <= 1 for row, peak in members]
        near_chance = [
            (min(row["start"] + 1, frames - 1) - max(row["start"] - 1, 0) + 1) / frames for row, _ in members
        ]
        view = [row["start"] <= peak < row["end"] for row, peak in members]
        view_chance = [(row["end"] - row["start"]) / frames for row, _ in members]
        means = [round(float(np.mean(values)), 3) for values in (near, near_chance, view, view_chance)]
        rows.append(dict(zip(FIELDS, [*key, len(members), *means], strict=True)))
    write_rows(args.out, rows, FIELDS)
    print(args.out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("measure")
    verb.set_defaults(run=measure)
    verb.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    verb.add_argument("--split", choices=("validation", "test"), default="test")
    verb.add_argument("--frames", type=int, default=64)
    verb.add_argument("--questions", type=int, default=100, help="of each kind")
    verb.add_argument("--steps", type=int, nargs="*", default=[8], help="of integrated gradients")
    verb.add_argument("--rows", type=int, default=8, help="videos read together by occlusion; 0 leaves it out")
    verb.add_argument("--shard", default="1/1")
    verb.add_argument("--out", type=Path, required=True)
    verb = verbs.add_parser("table")
    verb.set_defaults(run=table)
    verb.add_argument("files", type=Path, nargs="+")
    verb.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
