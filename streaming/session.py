"""A stream that is read while it runs, and asked at any moment."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..modeling_video_ma2mba.answering_familiarity import STRANGE_FRAMES
from ..modeling_video_ma2mba.state_identity import identity_facts, record_source
from ..modeling_video_ma2mba.state_video import VideoState
from ..processing.frame_fitting import fit_frame
from ..processing.video_subtitles import stream_subtitles
from .frame_clock import FrameClock
from .frame_queue import FrameQueue
from .live_frames import LiveFrames, Patience, frames_in
from .live_sources import find_source
from .rolling_memory import Remembered, RollingMemory
from .stream_report import StreamReport
from .turns import Turns


class VideoSession:
    """Reads a stream in memory that stays constant for days; questions do not disturb the reading.

        with VideoSession(model, processor) as session:
            session.attach("rtsp://camera/stream")
            ...
            session.ask("What is shown?")        # from what was read so far

        session = VideoSession(model, processor, policy="queue")
        for frame in frames:
            session.push(frame)
        session.finish()

    One thread receives frames, one reads them; the model is used by one question or one chunk of frames at a time.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`. processor: its `VideoMa2mbaProcessor`.
        fps: frames to read per second; default: the processor's.
        policy: what happens when `waiting` frames wait to be read: "drop" gives up the oldest, "queue" makes the
            source wait; "auto" drops where the source is live (a camera, an address without an end, `realtime`).
        waiting: frames that may wait.
        remember: seconds that answers reach back at least; None: to the beginning. See `RollingMemory`.
        state: continue this state; it stays as it is.
        subtitles: a file of them, or cues, in seconds of the stream; see `video_subtitles`.

    Attributes:
        report: counters and timeline, see `StreamReport`.

    Raises:
        ValueError: a setting is out of range, or the state belongs to another model or processor.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float | None = None,
        policy: str = "auto",
        waiting: int = 32,
        remember: float | None = None,
        state: VideoState | None = None,
        subtitles: Any = None,
    ):
        if state is not None:
            model.check_state(state, processor)
        self.model = model
        self.processor = processor
        self.report = StreamReport()
        self._clock = FrameClock((processor.video_processor.fps or 1.0) if fps is None else fps)
        self._queue = FrameQueue(policy, waiting)
        told = None if subtitles is None else stream_subtitles(subtitles)
        self._subtitles = None if told is None else {"name": told.name, "sha256": told.digest, "cues": len(told.cues)}
        self._memory = RollingMemory(model, processor, remember, state, () if told is None else told.cues)
        size = processor.video_processor.size
        self._size = size["height"], size["width"]
        self._resize_mode = processor.video_processor.resize_mode
        self._fitted: tuple[Any, np.ndarray | None] = (None, None)
        self._name = "<frames>"
        self._pushed = 0
        self._every: list[list[Any]] = []  # seconds, callback, when next
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._turn = Turns().turn
        self._source_thread: threading.Thread | None = None
        self._reader = threading.Thread(target=self._read_all, name="video-session-reader", daemon=True)
        self._reader.start()

    def __enter__(self) -> "VideoSession":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def fps(self) -> float:
        """Frames read per second of the stream."""
        return self._clock.fps

    @property
    def seen(self) -> Remembered | None:
        """What answers come from at this moment; None before the first frame has been read."""
        if not self._memory.waits:
            return self._memory.newest
        with self._turn():
            return self._memory.newest

    def counters(self) -> dict[str, Any]:
        """The report's counters, with the number of frames that wait now."""
        return {**self.report.counters(), "frames_waiting": len(self._queue)}

    def attach(
        self, source: Any, *, realtime: bool = False, follow: bool = False, patience: Patience | None = None
    ) -> None:
        """Read a source in the background; returns once its first frame has come, or it has ended without one.

        Args:
            source: a camera's number, an address, a path, "-", or an iterable of frames; see `find_source`.
            realtime: read a file no faster than it plays.
            follow: the file is still being written: wait for more at its end.
            patience: timeouts and retries.

        Raises:
            OSError, ValueError: there is no such source, or it cannot be opened.
        """
        self._refuse_closed()
        if self._source_thread is not None and self._source_thread.is_alive():
            raise ValueError("the session reads a source already: wait for its end, or open another session")
        found = find_source(source, follow)
        self._name = found.name
        frames = LiveFrames(found, self._clock, self.report, self._stop, patience or Patience(), realtime)
        opened = threading.Event()
        self._source_thread = threading.Thread(
            target=self._receive, args=(frames, opened), name="video-session-source", daemon=True
        )
        self._source_thread.start()
        opened.wait()
        self._raise_error()

    def push(self, frame: Any, seconds: float | None = None) -> None:
        """Give frames by hand: an image, an array `(H, W, 3)` or `(n, H, W, 3)`, or a `FrameChunk`.

        Args:
            seconds: when the frame is shown, from any zero; of such frames `fps` a second are chosen. Without it,
                frames count as chosen already.

        Raises:
            ValueError: frames out of order, or no frame; and what reading raised.
        """
        self._refuse_closed()
        for picture, own in frames_in(frame if seconds is None else (frame, seconds)):
            moment = self._pushed / self.fps if own is None else own
            self._pushed += 1
            self.report.frames_seen += 1
            self.report.seconds = max(self.report.seconds, moment)
            for chosen in self._clock.add(picture, moment):
                self._put(*chosen)
        self._raise_error()

    def finish(self) -> None:
        """No more frames are pushed: waits until all are read."""
        for chosen in self._clock.finish():
            self._put(*chosen)
        if self.wait():
            self._end()

    def every(self, seconds: float, call: Callable[["VideoSession"], None]) -> None:
        """Call `call(session)` whenever the stream has advanced by so many seconds and was read up to there.

        The reading waits meanwhile. What `call` raises ends the session.
        """
        if not seconds > 0:
            raise ValueError(f"the interval must be more than 0 seconds, not {seconds}")
        self._every.append([seconds, call, seconds])

    def ask(self, question: Any, **settings: Any) -> Any:
        """Answer from what has been read up to now; takes and returns what `model.answer` does.

        Raises:
            ValueError: no frame has been read yet; and what reading raised.
        """
        self._raise_error()
        seen = self.seen
        if seen is None:
            raise ValueError("no frame has been read yet: wait for the first one")
        with self._turn():
            answer = self.model.answer(seen.state, question, self.processor, **settings)
        several = isinstance(question, list | tuple) and not (question and isinstance(question[0], dict))
        self.report.questions += len(question) if several else 1
        return answer

    def fork(self) -> VideoState:
        """An independent copy of the state with its metadata, to be saved, asked or read on from.

        Raises:
            ValueError: no frame has been read yet.
        """
        seen = self.seen
        if seen is None:
            raise ValueError("no frame has been read yet: there is no state")
        state = seen.state.fork()
        state.metadata = {**seen.before, **identity_facts(self.model, self.processor)}
        state.metadata["frames"] = str(int(seen.before.get("frames", 0)) + seen.frames)
        counted = int(seen.before.get(STRANGE_FRAMES, 0))
        state.metadata.pop(STRANGE_FRAMES, None)
        if STRANGE_FRAMES in seen.state.metadata and (STRANGE_FRAMES in seen.before or not seen.before):
            state.metadata[STRANGE_FRAMES] = str(counted + int(seen.state.metadata[STRANGE_FRAMES]))
        nothing = dict.fromkeys(("sha256", "num_frames", "end", "max_frames"))
        lost = {"dropped": self.report.frames_dropped or None, "breaks": self.report.breaks or None}
        source = {"name": self._name, "fps": self.fps, "start": seen.since or None, **nothing, **lost}
        source |= {} if self._subtitles is None else {"subtitles": self._subtitles}
        state.metadata["frame_time"] = str(seen.until)
        record_source(state.metadata, seen.before, source, seen.until + 1 / self.fps)
        return state

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the source has ended and everything is read; False after `timeout` seconds."""
        if self._source_thread is not None:
            self._source_thread.join(timeout)
            if self._source_thread.is_alive():
                return False
        done = self._queue.wait_until_read(timeout)
        self._raise_error()
        if done and self._source_thread is not None:
            self._end()
        return done

    def close(self, timeout: float = 2.0) -> None:
        """Stop at once; frames that wait are not read. Waits so long for the threads, which end by themselves.

        A source that does not answer keeps its thread until its own timeout; it disturbs nobody.
        """
        self._stop.set()
        self._queue.close()
        for thread in (self._source_thread, self._reader):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout)

    def _end(self) -> None:
        with self._turn():
            self._memory.end()

    def _put(self, picture: Any, seconds: float) -> None:
        if self._fitted[0] is not picture:  # a picture that stands still is fitted once
            self._fitted = picture, fit_frame(picture(), self._size, self._resize_mode)
        self.report.frames_chosen += 1
        if self._queue.put((self._fitted[1], seconds)) is not None:
            self.report.frames_dropped = self._queue.dropped
            self.report.mark_dropped(1)
        self.report.waited_seconds = self._queue.waited

    def _receive(self, frames: LiveFrames, opened: threading.Event) -> None:
        """Of the source's thread."""
        try:
            for chosen in frames:
                if self._queue.policy == "auto" and frames.is_live:
                    self._queue.policy = "drop"
                self._put(*chosen)
                opened.set()
        except BaseException as error:
            self._fail(error)
        finally:
            opened.set()

    def _read_all(self) -> None:
        """Of the reader's thread."""
        try:
            while frames := self._queue.take(self.model.config.read_chunk_frames):
                for chunk in self._cut(frames):
                    with self._turn():
                        self._memory.read(np.stack([f for f, _ in chunk]), np.array([s for _, s in chunk]))
                    self.report.frames_read += len(chunk)
                    self.report.seconds_read = chunk[-1][1]
        except BaseException as error:
            self._fail(error)

    def _cut(self, frames: list[Any]) -> Iterator[list[Any]]:
        """Pieces between which a call is due; the calls are made in between."""
        piece: list[Any] = []
        for frame in frames:
            due = [entry for entry in self._every if frame[1] >= entry[2]]
            if due and piece:
                yield piece
                piece = []
            for entry in due:
                interval, call, _ = entry
                entry[2] = (frame[1] // interval + 1) * interval
                if self.seen is not None:
                    call(self)
            piece.append(frame)
        if piece:
            yield piece

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stop.set()
        self._queue.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _refuse_closed(self) -> None:
        self._raise_error()
        if self._stop.is_set():
            raise ValueError("the session is closed: open another one")
