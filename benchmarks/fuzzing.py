"""Damage to files, and a judge that runs where a crash, a hang or a flood of memory harms nobody."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

EXTREMES = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\0\0\0\0",
    b"\0\0\0\1",
    b"\xff\xff\xff\x7f",
)


def mutate(data: bytes, other: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """One of ten kinds of damage, half of them near the beginning, where the headers are; `other` lends bytes.

    Returns its name and the damaged file.
    """
    kind = KINDS[int(random.integers(len(KINDS)))]
    reach = len(data) if random.random() < 0.5 else min(len(data), 4096)
    place = int(random.integers(reach))
    length = int(min(random.integers(1, 1 + min(len(data), 2000)), len(data) - place))
    found = bytearray(data)
    if kind == "one bit":
        found[place] ^= 1 << int(random.integers(8))
    elif kind == "many bits":
        for at in random.integers(0, reach, int(random.integers(2, 200))):
            found[at] ^= 1 << int(random.integers(8))
    elif kind == "cut off":
        del found[place:]
    elif kind == "piece missing":
        del found[place : place + length]
    elif kind == "piece twice":
        found[place:place] = data[place : place + length]
    elif kind == "zeros":
        found[place : place + length] = bytes(length)
    elif kind == "noise":
        found[place : place + length] = random.bytes(length)
    elif kind == "extreme number":
        found[place : place + 4] = EXTREMES[int(random.integers(len(EXTREMES)))]
    elif kind == "other file's piece":
        found[place : place + length] = other[place : place + length]
    else:  # "grown"
        found += random.bytes(length)
    return kind, bytes(found)


KINDS = (
    *("one bit", "many bits", "cut off", "piece missing", "piece twice", "zeros", "noise", "extreme number"),
    *("other file's piece", "grown"),
)


@dataclass
class Outcome:
    verdict: str
    seconds: float
    peak_mb: float
    """Memory that the process had at its highest, above what it had before the file."""


def watched(judge: Callable, cases: Iterable, limit_seconds: float) -> Iterator[Outcome]:
    """Run `judge(case)`, which returns a verdict, in a process of its own that is replaced when it dies or hangs."""
    context = multiprocessing.get_context("spawn")
    process = ours = None
    for case in cases:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, judge), daemon=True)
            process.start()
            theirs.close()
            ours.recv()  # imports are done
        begin = time.perf_counter()
        ours.send(case)
        try:
            if ours.poll(limit_seconds):
                yield Outcome(*ours.recv())
                continue
            verdict = "HANG"
        except (EOFError, ConnectionError):
            verdict = "CRASH"
        process.kill()
        process.join()
        verdict += f" (exit code {process.exitcode})" if verdict == "CRASH" else ""
        process = None
        yield Outcome(verdict, time.perf_counter() - begin, float("nan"))
    if process is not None:
        process.kill()
        process.join()


def _serve(pipe: Connection, judge: Callable) -> None:
    judge(None)  # imports and first use
    pipe.send("ready")
    while True:
        case = pipe.recv()
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # forget the peak
        before, begin = _memory("VmRSS"), time.perf_counter()
        try:
            verdict = judge(case)
        except Exception as error:  # the caller promised a verdict: this is what must not happen
            verdict = f"UNEXPECTED {type(error).__name__}: {str(error)[:120]}"
        pipe.send((verdict, time.perf_counter() - begin, (_memory("VmHWM") - before) / 1e6))


def _memory(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
