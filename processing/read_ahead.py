"""Runs iterators ahead of their consumer, in threads, and gives what they yield in order.

Decoding a video is work for the CPU while the model computes, and parts of a long file can be decoded side by side.
How far ahead is bounded: memory does not grow when the consumer is the slower one.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
Channel = queue.Queue[Any]
"""Pairs of an item and None, or of None and an error; None where a part has ended."""
Tasks = queue.SimpleQueue[Any]
"""Pairs of a part and its channel; None ends a thread."""
_POLL_SECONDS = 0.05  # how soon a thread that waits for room notices that nobody reads on


def in_order(
    parts: Iterable[Callable[[], Generator[T, None, None]]], threads: int, outstanding: int, room: int
) -> Generator[T, None, None]:
    """Yield the items of all parts, part after part, while `threads` threads run the parts.

    Args:
        parts: each makes, in a thread, a generator of items.
        threads: parts run at a time; 0 runs them here, with nothing ahead.
        outstanding: parts begun and not yet consumed, at most.
        room: items of one part waiting to be consumed, at most.

    Raises:
        Whatever a part raises, at its place in the order. No thread is left when the iterator ends or is closed.
    """
    if threads < 1:
        for part in parts:
            yield from part()
        return
    parts = iter(parts)
    stop = threading.Event()
    tasks: Tasks = queue.SimpleQueue()
    waiting: deque[Channel] = deque()

    def begin(count: int) -> None:
        for part in islice(parts, count):
            waiting.append(queue.Queue(room))
            tasks.put((part, waiting[-1]))

    workers = [
        threading.Thread(target=_work, args=(tasks, stop), name="read-ahead", daemon=True) for _ in range(threads)
    ]
    try:
        begin(outstanding)
        for worker in workers[: len(waiting)]:
            worker.start()
        while waiting:
            channel = waiting[0]
            while (found := channel.get()) is not None:
                item, error = found
                if error is not None:
                    raise error
                yield item
            waiting.popleft()
            begin(1)
    finally:
        stop.set()
        for _ in workers:
            tasks.put(None)
        for worker in workers:
            if worker.ident is not None:
                worker.join()


def _work(tasks: Tasks, stop: threading.Event) -> None:
    """Run parts until told to stop; every part's channel ends with None or an error."""

    def give(channel: Channel, item: Any) -> bool:
        while not stop.is_set():
            try:
                channel.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    while (task := tasks.get()) is not None and not stop.is_set():
        part, channel = task
        try:
            with closing(part()) as items:
                for item in items:
                    if not give(channel, (item, None)):
                        return
            give(channel, None)
        except BaseException as error:  # whatever it is, the consumer must hear of it instead of waiting
            give(channel, (None, error))
