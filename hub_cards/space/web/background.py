"""Runs slow work in a thread and hands its reports over as they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Stopped(Exception):
    """Raised inside the work, from its next report, once nobody listens any more or a user asked for an end."""


def latest_reports(
    work: Callable[[Callable[[T], None]], R],
    is_stopped: Callable[[], bool] = lambda: False,
    every: float = 0.1,
) -> Generator[T, None, R]:
    """Call `work(report)` in a thread; yield the latest report now and then, at last the last; return its result.

    Reports that a later one overtook are left out: each must say everything, such as the whole text so far.

    Args:
        work: calls `report(item)` as it goes on. A report may raise `Stopped`, which ends the work.
        is_stopped: asked at every report.
        every: least seconds between two items.

    Raises:
        Whatever `work` raises. `Stopped` among it.
    """
    queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    left = threading.Event()

    def report(item: T) -> None:
        if left.is_set() or is_stopped():
            raise Stopped
        queue.put(("report", item))

    def run() -> None:
        try:
            queue.put(("result", work(report)))
        except BaseException as error:  # handed over, and raised where it can be told
            queue.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            latest: list[T] = []
            while kind == "report":  # what waits behind it is newer
                latest = [value]
                try:
                    kind, value = queue.get_nowait()
                except Empty:
                    break
            yield from latest
            if kind == "error":
                raise value
            if kind == "result":
                return value
            time.sleep(every)
    finally:
        left.set()
        thread.join()
