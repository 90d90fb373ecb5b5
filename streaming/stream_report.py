"""What happened to a stream: counters, and a timeline of everything out of the ordinary."""

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any

LONGEST_TIMELINE = 1000
"""Entries kept, the latest ones: a session that runs for days stays small."""


@dataclass(frozen=True)
class Mark:
    """Something that happened: `seconds` of the stream, `event`, and more about it."""

    seconds: float
    event: str
    detail: str = ""


@dataclass
class StreamReport:
    """Counters of a session.

    Attributes:
        frames_seen: frames that came from the source.
        frames_chosen: of these, frames for the model (a picture that stands still is chosen again).
        frames_read: of these, read by the model.
        frames_dropped: of these, given up to keep up.
        frames_damaged: pictures that could not be decoded, or came damaged.
        breaks: times the source broke off; reconnects: times it came back; gap_seconds: time lost with that.
        waited_seconds: time the source had to wait for the reading.
        questions: answered.
        seconds: how far the stream has come; seconds_read: how far it was read.
        marks: made so far; timeline: the latest `LONGEST_TIMELINE` of them.
    """

    frames_seen: int = 0
    frames_chosen: int = 0
    frames_read: int = 0
    frames_dropped: int = 0
    frames_damaged: int = 0
    breaks: int = 0
    reconnects: int = 0
    gap_seconds: float = 0.0
    waited_seconds: float = 0.0
    questions: int = 0
    seconds: float = 0.0
    seconds_read: float = 0.0
    marks: int = 0
    timeline: deque[Mark] = field(default_factory=lambda: deque(maxlen=LONGEST_TIMELINE))

    def mark(self, event: str, detail: str = "") -> None:
        """Note something at the place that the stream has come to."""
        self.marks += 1
        self.timeline.append(Mark(round(self.seconds, 3), event, detail))

    def mark_dropped(self, frames: int) -> None:
        """Note that so many frames were given up; a run of losses is one mark."""
        last = self.timeline[-1] if self.timeline else None
        if last is not None and last.event == "dropped frames":
            self.timeline[-1] = Mark(last.seconds, last.event, str(int(last.detail) + frames))
        else:
            self.mark("dropped frames", str(frames))

    def counters(self) -> dict[str, Any]:
        """All but the timeline, as plain numbers; seconds to the millisecond."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "timeline"}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
