"""What a process of a run of several says when it ends because another one did."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import distributed

_PATIENCE = 3.0  # seconds for the launcher to notice the first process, or its report would name this one
_LOST = ("closed by peer", "reset by peer", "Broken pipe")


@contextlib.contextmanager
def step_told(step: Callable[[], int]) -> Iterator[None]:
    """Inside, the step is named when this process has to end with another one of its run: the launcher says which was
    the first (torchrun: "Root Cause"), and ends the others by SIGTERM where they do not notice themselves.

    Args:
        step: finished optimizer steps.

    Raises:
        ConnectionError: the connection to another process is lost.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2 or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def told() -> str:
        return (
            f"rank {os.environ.get('RANK', '?')} of {world} ends in step {step() + 1}, because another process has "
            "ended (the launcher's report names it); with checkpoints, resume=true goes on from the last"
        )

    def end(number: int, _: Any) -> None:
        if os.getpid() == own:  # not one forked by this
            print(f"error: {told()}", file=sys.stderr, flush=True)
        signal.signal(number, before if callable(before) else signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    lost = False
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or any(words in str(error) for words in _LOST)
        if lost:
            time.sleep(_PATIENCE)
            raise ConnectionError(told()) from error
        raise
    finally:
        if not lost:  # or the launcher ends this process before it has told of the error
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
