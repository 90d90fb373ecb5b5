"""Frames that wait to be read: bounded, with a stated policy for when reading falls behind."""

import threading
import time
from collections import deque
from typing import Any

POLICIES = ("auto", "drop", "queue")


class FrameQueue:
    """Hands frames from the thread that receives them to the thread that reads them.

    Args:
        policy: what happens when `bound` frames wait already. "drop": the oldest is given up, so that reading keeps up
            with what is newest. "queue": nothing is given up, the source has to wait. "auto": as "queue", until the
            owner, who knows whether the source is live, decides.
        bound: most frames that may wait.

    Attributes:
        dropped: frames given up so far.
        waited: seconds for which the source had to wait.
    """

    def __init__(self, policy: str, bound: int):
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        if bound < 1:
            raise ValueError(f"at least 1 frame must be allowed to wait, not {bound}")
        self.policy = policy
        self.bound = bound
        self.dropped = 0
        self.waited = 0.0
        self._frames: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._in_hand = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: Any) -> Any:
        """Add a frame; returns the one that was given up for it, or None. Does nothing once closed."""
        with self._changed:
            if self.policy != "drop" and len(self._frames) >= self.bound:
                began = time.monotonic()
                self._changed.wait_for(lambda: self._closed or len(self._frames) < self.bound)
                self.waited += time.monotonic() - began
            if self._closed:
                return None
            lost = None
            if len(self._frames) >= self.bound:
                lost = self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify_all()
            return lost

    def take(self, most: int) -> list[Any]:
        """Up to `most` frames, as soon as there is one; none at the end."""
        with self._changed:
            self._in_hand = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._frames or self._ended or self._closed)
            if self._closed:
                return []
            frames = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._in_hand = len(frames)
            self._changed.notify_all()
            return frames

    def wait_until_read(self, timeout: float | None = None) -> bool:
        """Wait until every frame that was put has been taken, and the taker has come back; False on a timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or (not self._frames and not self._in_hand), timeout)

    def end(self) -> None:
        """No more frames will come; those that wait are still read."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up at once: whoever waits comes back."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()
