"""The benchmarks that `video-ma2mba eval` knows: their tasks in lmms-eval, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `name` is that of its task, or group of tasks, in lmms-eval, and how `--tasks` calls it.

    Args:
        folder: of its tasks, below lmms-eval's (`own`: below ours).
        dataset: its data set on the Hub.
        judge: whether a language model scores the answers.
        unit: what its scores are, "%" or "0-5".
    """

    name: str
    title: str
    folder: str
    dataset: str
    judge: bool = False
    unit: str = "%"


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("videomme", "Video-MME", "videomme", "lmms-eval/Video-MME"),
        Benchmark("videomme_w_subtitle", "Video-MME with subtitles", "videomme", "lmms-eval/Video-MME"),
        Benchmark(
            "longvideobench_val_v", "LongVideoBench, validation", "longvideobench", "longvideobench/LongVideoBench"
        ),
        Benchmark(
            "longvideobench_val_i",
            "LongVideoBench, validation, frames and subtitles",
            "longvideobench",
            "longvideobench/LongVideoBench",
        ),
        Benchmark("mvbench", "MVBench", "mvbench", "OpenGVLab/MVBench"),
        Benchmark("activitynetqa", "ActivityNet-QA", "activitynetqa", "lmms-eval/ActivityNetQA", judge=True),
        Benchmark(
            "videochatgpt", "Video-ChatGPT (VCG)", "videochatgpt", "lmms-eval/VideoChatGPT", judge=True, unit="0-5"
        ),
        Benchmark("lvbench", "LVBench", "lvbench", "lmms-eval/LVBench"),
        Benchmark("mlvu_dev", "MLVU, dev", "mlvu", "sy1998/MLVU_dev"),
        Benchmark("longtimescope", "LongTimeScope", "longtimescope", "Apollo-LMMs/LongTimeScope2"),
        Benchmark("videomme_v2", "Video-MME-v2", "videomme_v2", "MME-Benchmarks/Video-MME-v2"),
        Benchmark(
            "extremewhenbench", "ExtremeWhenBench", "extremewhenbench", "min1321/extreme-when-bench", unit="0-1"
        ),
        Benchmark("ovobench", "OVO-Bench", "ovobench", "kcz358/OVOBench"),
        Benchmark("timelens", "TimeLens", "timelens", "kcz358/timelens"),
        Benchmark("caption_score", "Captions", "own", "a file of yours (--captions)", judge=True, unit="0-5"),
        Benchmark("rendered_world", "Rendered world", "own", "video-ma2mba-world"),
    )
}
PAPER = ("videomme", "longvideobench_val_v", "mvbench", "activitynetqa", "videochatgpt")
LONG = ("lvbench", "mlvu_dev", "longtimescope", "videomme_v2")
TIMED = ("extremewhenbench", "timelens", "ovobench")
SETS = {"paper": PAPER, "long": LONG, "timed": TIMED}


def expand(text: str) -> list[str]:
    """Task names of `--tasks`: separated by commas, `paper`, `long` and `timed` standing for sets.

    Raises:
        ValueError: no name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"--tasks {text!r} names no task: give paper, long, timed, {', '.join(BENCHMARKS)}, or others"
        )
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def refuse_unjudged(tasks: Sequence[str]) -> None:
    """ValueError where there are tasks whose answers a language model scores, and none was named."""
    if tasks:
        raise ValueError(
            f"{', '.join(tasks)}: a language model scores these answers. Name one with --judge and --judge-model, or "
            "give --no-judge to collect the answers now and score them later"
        )


def folders_of(tasks: Sequence[str]) -> list[str]:
    """Folders of those tasks that are known here, below lmms-eval's."""
    return sorted({BENCHMARKS[task].folder for task in tasks if task in BENCHMARKS} - {"own"})


def title(name: str) -> str:
    """Of a benchmark; the name itself where it is not known here."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def unit(name: str) -> str:
    """Of a benchmark's scores; empty where it is not known here."""
    return BENCHMARKS[name].unit if name in BENCHMARKS else ""


def is_five_point_scale(name: str, category: str) -> bool:
    """Whether a score is on a scale of 0 to 5 rather than a percentage."""
    return unit(name) == "0-5" or (name == "activitynetqa" and category == "score")
