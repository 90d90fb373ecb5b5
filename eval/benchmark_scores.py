"""From the harness's samples to the numbers that papers print: scores by category, each answer counted.

The harness writes most categories to its log only, leaves empty answers of MVBench out, and guesses at random where a
LongVideoBench answer names no option. Here every question counts and an answer that says nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..world import KINDS
from .captions import DIMENSIONS

Samples = Mapping[str, Sequence[dict[str, Any]]]  # by task

VCG_DIMENSIONS = {  # metric of the harness: name of the paper
    "gpt_eval_score_correctness": "correctness",
    "gpt_eval_score_detailed_orientation": "detail",
    "gpt_eval_score_context": "context",
    "gpt_eval_score_temporal": "temporal",
    "gpt_eval_score_consistency": "consistency",
}
_LVB_GROUPS = {15: "8-15 s", 60: "15-60 s", 600: "180-600 s", 3600: "900-3600 s"}


@dataclass
class Score:
    """One line of a table: `value` in the benchmark's unit over `questions`."""

    category: str
    value: float
    questions: int


@dataclass
class Scores:
    """A benchmark's table; the line of its `headline` is the one that papers compare.

    `harness` are the numbers of the harness itself, `empty` the answers without a word, `notes` what a reader must
    know.
    """

    rows: list[Score]
    headline: str = "all"
    empty: int = 0
    notes: list[str] = field(default_factory=list)
    harness: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain data for `report.json`."""
        return asdict(self)


def score(benchmark: str, samples: Samples, results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Scores of one benchmark.

    Args:
        samples: of its tasks, as `simple_evaluate` returns them. results: its "results".
    """
    table = _TABLES.get(benchmark, _any_task)(samples, results)
    table.empty = sum(not answer_of(sample) for rows in samples.values() for sample in rows)
    if table.empty:
        table.notes.append(f"Empty answers, which count as wrong: {table.empty}.")
    table.harness = {f"{task}/{name}": value for task, name, value in _metrics(results)}
    return table


def answer_of(sample: Mapping[str, Any]) -> str:
    """What the model said."""
    said = sample["filtered_resps"][0]
    return (said[0] if isinstance(said, list | tuple) else said).strip()


def _shares(pairs: Iterable[tuple[str, bool]], order: Sequence[str] = ()) -> list[Score]:
    """Percentages by category, those of `order` first, and over all."""
    counts: dict[str, list[int]] = {name: [0, 0] for name in order}
    for category, right in pairs:
        for name in dict.fromkeys((category, "all")):
            right_and_asked = counts.setdefault(name, [0, 0])
            right_and_asked[0] += bool(right)
            right_and_asked[1] += 1
    counts["all"] = counts.pop("all", [0, 0])  # comes last
    return [Score(name, 100 * right / asked, asked) for name, (right, asked) in counts.items() if asked]


def _videomme(samples: Samples, results: Any) -> Scores:
    found = [sample["videomme_perception_score"] for rows in samples.values() for sample in rows]
    rows = _shares(((row["duration"], row["score"] > 0) for row in found), ("short", "medium", "long"))
    return Scores(rows, notes=_unclear(sum(not row["pred_answer"] for row in found)))


def _longvideobench(samples: Samples, results: Any) -> Scores:
    from lmms_eval.tasks.longvideobench.utils import parse_multi_choice_response

    pairs, unclear = [], 0
    for sample in (sample for rows in samples.values() for sample in rows):
        row = sample["lvb_acc"]
        said = parse_multi_choice_response(answer_of(sample), ["?"], {})  # "?" is what it would draw at random
        unclear += said == "?"
        pairs.append((_LVB_GROUPS.get(int(row["duration_group"]), str(row["duration_group"])), said == row["answer"]))
    notes = _unclear(unclear, " (lmms-eval draws an option for them)")
    return Scores(_shares(pairs, tuple(_LVB_GROUPS.values())), notes=notes)


def _mvbench(samples: Samples, results: Any) -> Scores:
    rows = []
    for task, members in samples.items():
        right = sum(sample["mvbench_accuracy"]["score"] for sample in members)
        rows.append(Score(task.removeprefix("mvbench_"), 100 * right / len(members), len(members)))
    rows.sort(key=lambda row: row.category)
    mean = sum(row.value for row in rows) / len(rows)
    return Scores([*rows, Score("all", mean, sum(row.questions for row in rows))], notes=["all: mean of the tasks."])


def _activitynet(samples: Samples, results: Any) -> Scores:
    found = [sample["gpt_eval_accuracy"] for rows in samples.values() for sample in rows]
    count = len(found)
    accuracy = Score("accuracy", 100 * sum(row["Correctness"] == "yes" for row in found) / count, count)
    return Scores([accuracy, Score("score", sum(row["score"] for row in found) / count, count)], headline="accuracy")


def _videochatgpt(samples: Samples, results: Mapping[str, Mapping[str, Any]]) -> Scores:
    rows = []
    for task, name, value in _metrics(results):
        metric = name.split(",")[0]
        if metric in VCG_DIMENSIONS:
            asked = len(samples[task]) // (2 if metric.endswith("consistency") else 1)
            rows.append(Score(VCG_DIMENSIONS[metric], value, asked))
    rows.sort(key=lambda row: list(VCG_DIMENSIONS.values()).index(row.category))
    mean = sum(row.value for row in rows) / len(rows)
    asked = sum(row.questions for row in rows)
    return Scores([*rows, Score("all", mean, asked)], notes=["all: mean of the five dimensions."])


def _captions(samples: Samples, results: Any) -> Scores:
    found = [sample for rows in samples.values() for sample in rows]
    rows = [
        Score(name, sum(sample[f"caption_{name}"] for sample in found) / len(found), len(found)) for name in DIMENSIONS
    ]
    mean = sum(row.value for row in rows) / len(rows)
    return Scores([*rows, Score("all", mean, len(found))], notes=["all: mean of the three dimensions."])


def _lvbench(samples: Samples, results: Any) -> Scores:
    from lmms_eval.tasks.lvbench.utils import extract_characters_regex

    found = [sample for rows in samples.values() for sample in rows]
    rows = _shares(("all", bool(sample["lvbench_score"])) for sample in found)
    return Scores(rows, notes=_unclear(sum(not extract_characters_regex(answer_of(sample)) for sample in found)))


def _mlvu(samples: Samples, results: Any) -> Scores:
    found = [sample["mlvu_percetion_score"] for rows in samples.values() for sample in rows]
    *rows, total = _shares((row["task_type"], row["pred_answer"] == row["answer"]) for row in found)
    rows.sort(key=lambda row: row.category)
    mean = sum(row.value for row in rows) / len(rows)
    notes = ["all: mean of the kinds of task (M-Avg).", *_unclear(sum(not row["pred_answer"] for row in found))]
    return Scores([*rows, Score("all", mean, total.questions)], notes=notes)


def _longtimescope(samples: Samples, results: Any) -> Scores:
    found = [sample["timescope_perception_score"] for rows in samples.values() for sample in rows]
    lengths = sorted({row["length"] for row in found}, key=lambda length: float(length))
    pairs = ((f"{row['length']} s", row["pred_answer"].lower() == row["answer"].lower()) for row in found)
    rows = _shares(pairs, [f"{length} s" for length in lengths])
    return Scores(rows, notes=_unclear(sum(not row["pred_answer"] for row in found)))


def _videomme_v2(samples: Samples, results: Mapping[str, Mapping[str, Any]]) -> Scores:
    count = sum(len(rows) for rows in samples.values())
    rows = []
    for _, name, value in _metrics(results):
        rows.append(Score(name.split(",")[0].removeprefix("videomme_v2_").replace("_", " "), value, count))
    return Scores(rows, headline="overall score")


def _world(samples: Samples, results: Any) -> Scores:
    found = [sample["world_accuracy"] for rows in samples.values() for sample in rows]
    lengths = sorted({row["frames"] for row in found})
    by_length = _shares(((f"{row['frames']} frames", row["right"]) for row in found), [f"{n} frames" for n in lengths])
    by_kind = _shares(((row["kind"], row["right"]) for row in found), KINDS)
    chance = sum(row["chance"] for row in found) / len(found)
    note = f"Guessing blindly among the answers that the wording leaves open gives {100 * chance:.1f} %."
    return Scores([*by_length[:-1], *by_kind], notes=[note])


def _any_task(samples: Samples, results: Mapping[str, Mapping[str, Any]]) -> Scores:
    rows = [
        Score(f"{task} {name.split(',')[0]}", value, len(samples.get(task, ())))
        for task, name, value in _metrics(results)
    ]
    return Scores(rows, headline=rows[0].category if rows else "all")


_TABLES: dict[str, Callable[[Samples, Any], Scores]] = {
    "videomme": _videomme,
    "videomme_w_subtitle": _videomme,
    "longvideobench_val_v": _longvideobench,
    "longvideobench_val_i": _longvideobench,
    "mvbench": _mvbench,
    "activitynetqa": _activitynet,
    "videochatgpt": _videochatgpt,
    "lvbench": _lvbench,
    "mlvu_dev": _mlvu,
    "longtimescope": _longtimescope,
    "videomme_v2": _videomme_v2,
    "caption_score": _captions,
    "rendered_world": _world,
}


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Task, metric and value of every number that the harness reports, without errors of estimate."""
    found = []
    for task, numbers in results.items():
        for name, value in numbers.items():
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and "_stderr" not in name
                and "," in name
            ):
                found.append((task, name, float(value)))
    return found


def _unclear(count: int, more: str = "") -> list[str]:
    return [f"Answers that name no option and count as wrong: {count}{more}."] if count else []
