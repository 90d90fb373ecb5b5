"""A day of video through one session, in fast-forward: memory, time per frame, and answers about the last minute.

    python benchmarks/day_long_stream.py [--seconds 86400] [--remember 30] [--model DIR]

A second process renders an endless world (one frame a second, 64x64 pixels), encodes it and sends it through a pipe;
the session decodes and reads it on the CPU. Every ten minutes of video, questions about what the session remembers are
asked and compared with the truth. For comparison, half an hour is read before, into one state that never begins anew.
Writes `results/day_long_stream.csv` and `.png`.
"""

import argparse
import csv
import datetime
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from result_tables import hardware, write_rows

from video_ma2mba.loading import load_pipeline
from video_ma2mba.world.endless import EndlessWorld

TEXT = {"remember", "date", "hardware", "torch"}
OUT = Path(__file__).parent / "results" / "day_long_stream.csv"


def send(seconds: int, seed: int) -> None:
    """Write the world as an MPEG transport stream to standard output."""
    import av

    with av.open(sys.stdout.buffer, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "10", "preset": "fast"})
        stream.width = stream.height = 64
        stream.codec_context.thread_count = 1
        for chunk in EndlessWorld(seed).chunks(seconds):
            for frame in chunk:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def measure(
    pipe,
    seconds: int,
    remember: float | None,
    every: int = 600,
    questions: int = 8,
    seed: int = 0,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Watch `seconds` of video; one row for every `every` of them, also given to `on_row` as soon as it is there.

    Returns:
        Dicts: seconds of video, frames read, resident memory; milliseconds per frame since the last row without the
        answering, by the clock and of this process on the processor (other programs slow the former down only); and of
        the questions about what is remembered: asked, right, right by chance (expected).
    """
    from video_ma2mba.streaming.live_sources import LiveSource  # here: the sender does without torch
    from video_ma2mba.streaming.session import VideoSession

    world, process, rows = EndlessWorld(seed), psutil.Process(), []
    command = [sys.executable, __file__, "--send", str(seconds), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sender:
        source = LiveSource("a rendered day", "pipe", sender.stdout.fileno())
        with VideoSession(pipe.model, pipe.processor, policy="queue", waiting=128, remember=remember) as session:
            mark = [time.perf_counter(), time.process_time(), 0]

            def look(session: VideoSession) -> None:
                spent, worked = time.perf_counter() - mark[0], time.process_time() - mark[1]
                frames = session.report.frames_read - mark[2]
                now = int(session.seen.until) + 1
                # A state that never forgets is asked about the last minute as well.
                since = max(int(session.seen.since), now - 64)
                asked = world.ask(since, now, questions)
                began = time.perf_counter()
                given = [session.ask(question.text, max_new_tokens=8) for question in asked]
                rows.append(
                    {
                        "seconds": now,
                        "remember": "all" if remember is None else f"{remember:g}..{2 * remember:g} s",
                        "frames": session.report.frames_read,
                        "rss_mb": round(process.memory_info().rss / 1e6, 1),
                        "ms_per_frame": round(1e3 * spent / frames, 3),
                        "cpu_ms_per_frame": round(1e3 * worked / frames, 3),
                        "answer_ms": round(1e3 * (time.perf_counter() - began) / max(len(asked), 1), 1),
                        "asked": len(asked),
                        "right": sum(answer == question.answer for answer, question in zip(given, asked, strict=True)),
                        "by_chance": round(sum(1 / question.choices for question in asked), 2),
                    }
                )
                on_row(rows[-1])
                mark[:] = time.perf_counter(), time.process_time(), session.report.frames_read

            session.every(every, look)
            session.attach(source)
            session.wait()
            look(session)
            if session.report.frames_read != seconds:
                raise RuntimeError(f"{seconds} frames were sent, but {session.counters()}")
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Memory, time per frame and answers over the hours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for name in dict.fromkeys(row["remember"] for row in rows):
        part = [row for row in rows if row["remember"] == name]
        hours = [row["seconds"] / 3600 for row in part]
        label = "one state for all" if name == "all" else f"remembers {name}"
        axes[0].plot(hours, [row["rss_mb"] for row in part], label=label)
        axes[1].plot(hours, [row["cpu_ms_per_frame"] for row in part], label=label)
        last = [part[max(0, i - 2) : i + 1] for i in range(len(part))]  # 24 questions
        axes[2].plot(hours, [100 * sum(r["right"] for r in p) / sum(r["asked"] for r in p) for p in last], label=label)
    chance = 100 * sum(row["by_chance"] for row in rows) / sum(row["asked"] for row in rows)
    axes[2].axhline(chance, color="grey", linestyle=":", label="chance")
    for axis, text in zip(
        axes, ("resident memory, MB", "CPU ms per frame", "right answers, % (last 24)"), strict=True
    ):
        axis.set_ylabel(text)
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[2].legend()
    axes[2].set_xlabel("hours of video read")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory (default: the bundled checkpoint)")
    parser.add_argument("--seconds", type=int, default=86_400)
    parser.add_argument("--remember", type=float, default=30, help="seconds that answers reach back at least")
    parser.add_argument("--plain-seconds", type=int, default=1800, help="length read into one state, for comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", action="store_true", help="only draw what the CSV file holds")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--send", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        return send(arguments.send, arguments.seed)
    if arguments.plot:
        with arguments.out.open(newline="") as file:
            found = [{k: v if k in TEXT else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        return plot(found, arguments.out.with_suffix(".png"))
    import torch

    pipe = load_pipeline(arguments.model, device="cpu")
    setting = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        write_rows(arguments.out, [{**row, **setting} for row in rows])

    measure(pipe, arguments.plain_seconds, None, every=150, seed=arguments.seed, on_row=keep)
    measure(pipe, arguments.seconds, arguments.remember, seed=arguments.seed, on_row=keep)
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
