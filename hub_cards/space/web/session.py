"""One visitor's video and conversation: reading, asking, and the state file. Knows nothing of the page."""

from __future__ import annotations

import inspect
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from .background import latest_reports

NEW_TOKENS = 128


class Session:
    """What a visitor has read and said so far.

    Attributes:
        state: the `VideoState`; None before a video is read.
        messages: questions and answers since then, as chat messages.
        video: path of the video on this machine while it is known (not after opening a state file).
        fps: frames read per second of it. seconds: that reading it took.
        subtitles: that were read with it: "auto", a file, or None.
        unfinished: whether its reading was stopped and can go on.
        strip: frames of the last filmstrip.
        span: first and last second that show the last answer, where they were asked for and given.
        stopped: set to end a reading or an answer that is under way.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self.messages: list[dict[str, str]] = []
        self.video: str | None = None
        self.fps = 1.0
        self.seconds = 0.0
        self.subtitles: str | None = None
        self.unfinished = False
        self._kept: tempfile.TemporaryDirectory[str] | None = None  # what a stopped reading goes on from
        self.strip: list[Any] = []
        self.span: tuple[float, float] | None = None
        self.stopped = False

    def read(
        self, pipe: Any, video: str, fps: float, subtitles: str | None = None
    ) -> Iterator[tuple[int, int | None]]:
        """Read a video from its beginning; what was read and said before is forgotten once this has succeeded.

        A reading that is stopped keeps its frames: they may be asked about, and `go_on` reads the rest.

        Args:
            subtitles: "auto", a file, or None: without.

        Yields:
            Numbers of frames read and expected.

        Raises:
            Whatever the pipeline raises; `Stopped` where one keeps nothing of what it read (a server, say).
        """
        yield from self._read(pipe, video, fps, subtitles, tempfile.TemporaryDirectory(), 0.0)

    def go_on(self, pipe: Any) -> Iterator[tuple[int, int | None]]:
        """Read the rest of a video whose reading was stopped, to the same bits as without a stop. As `read`.

        Raises:
            ValueError: no reading was stopped.
        """
        if not self.unfinished or self._kept is None or self.video is None:
            raise ValueError("there is no reading to go on with: read a video first")
        yield from self._read(pipe, self.video, self.fps, self.subtitles, self._kept, self.seconds)

    def _read(
        self,
        pipe: Any,
        video: str,
        fps: float,
        subtitles: str | None,
        kept: tempfile.TemporaryDirectory[str],
        spent: float,
    ) -> Iterator[tuple[int, int | None]]:
        self.stopped = False
        told: dict[str, Any] = {} if subtitles is None else {"subtitles": subtitles}
        keeps = "stop" in inspect.signature(pipe.read).parameters
        if keeps:
            told |= {"partial": Path(kept.name) / "partial", "save_seconds": math.inf, "stop": lambda: self.stopped}
        began = time.perf_counter()
        state = yield from latest_reports(
            lambda report: pipe.read(
                video, fps=fps, on_frames=lambda seen, expected=None: report((seen, expected)), **told
            ),
            lambda: self.stopped and not keeps,
        )
        self.state, self.messages, self.video, self.fps, self.subtitles = state, [], video, fps, subtitles
        self.seconds = spent + time.perf_counter() - began
        self.unfinished = "unfinished" in state.metadata
        self._kept = kept if self.unfinished else None

    def ask(self, pipe: Any, question: str, times: bool = False) -> Iterator[str]:
        """Answer from the state, with the conversation so far in mind; nothing is read again.

        Args:
            times: put into `self.span` the seconds that show the answer.

        Yields:
            The answer so far.

        Raises:
            ValueError: there is no state, the question is empty, or times are wanted of a model that reads none.
        """
        if self.state is None:
            raise ValueError("read a video first, or open a state file")
        if not question.strip():
            raise ValueError("the question is empty: write what you want to know about the video")
        self.stopped, self.span = False, None
        asked = [*self.messages, {"role": "user", "content": question.strip()}]
        wanted = {"times": True} if times else {}

        def work(report: Any) -> Any:
            streamer = _Reports(pipe.processor.tokenizer, report)
            return pipe.ask(self.state, asked, streamer=streamer, max_new_tokens=NEW_TOKENS, **wanted)

        answer = yield from latest_reports(work, lambda: self.stopped)
        if times:
            self.span = None if answer["start"] is None else (answer["start"], answer["end"])
            answer = answer["answer"]
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def unfamiliar(self, pipe: Any, asked: bool) -> str:
        """What is to be said about the video, or (`asked`) about the last question, being unlike the model's training;
        empty where nothing is, or where the checkpoint does not say what it was trained on."""
        tell = getattr(pipe.model, "unfamiliar", None)
        found = None if tell is None or self.state is None else tell(self.state, self.messages)
        return "" if found is None else found.question_note if asked else found.video_note

    def last_answer(self) -> tuple[str, str]:
        """The last question and its answer.

        Raises:
            ValueError: nothing was asked yet.
        """
        if not self.messages:
            raise ValueError("ask a question first")
        question, answer = (message["content"] for message in self.messages[-2:])
        return question, answer

    def explain(self, pipe: Any, strip: Any) -> Iterator[str]:
        """Put into `self.strip` what speaks for the last answer, to its question asked on its own.

        Args:
            strip: `strip(pipe, video, question, answer, fps, report)`, see `build_page`.

        Yields:
            How far it is.

        Raises:
            ValueError: there is no answer yet, or no video beside the state.
        """
        question, answer = self.last_answer()
        if self.video is None:
            raise ValueError("a state file holds no pictures: read the video to see where the answer comes from")
        self.stopped = False
        video, fps = self.video, self.fps
        self.strip = yield from latest_reports(
            lambda report: strip(pipe, video, question, answer, fps, report), lambda: self.stopped
        )

    def save(self, folder: str | Path) -> Path:
        """Write state and conversation into a new folder inside `folder`, as `video-ma2mba ask` writes and reads them.

        Raises:
            ValueError: there is nothing to save.
        """
        if self.state is None:
            raise ValueError("there is nothing to save: read a video first")
        kept = self.state.fork()
        kept.metadata["chat"] = json.dumps(self.messages, ensure_ascii=False)
        name = Path(self.video).stem if self.video else "video"
        path = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.state"
        kept.save(path)
        return path

    def open(self, pipe: Any, path: str | Path) -> None:
        """Take over what a state file holds.

        Raises:
            ValueError: it is damaged, no state, or of another model or processor.
        """
        # the class that belongs to the pipeline: of the package, or of the code beside the checkpoint
        state = sys.modules[type(pipe).__module__].VideoState.load(path)
        pipe.check(state)
        messages = _messages(state.metadata.pop("chat", "[]"))
        self.state, self.messages, self.video = state.to(pipe.device), messages, None
        self.unfinished, self._kept = False, None


class _Reports(TextStreamer):
    """Reports the text so far whenever some words are certain."""

    def __init__(self, tokenizer: Any, report: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._report, self._text = report, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        self._report(self._text)


def _messages(text: str) -> list[dict[str, str]]:
    """The conversation in a state file.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
        messages = [{"role": item["role"], "content": item["content"]} for item in found]
        if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise ValueError("questions and answers do not take turns")
        if not all(isinstance(message["content"], str) for message in messages):
            raise ValueError("not all of it is text")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the conversation in the state file is damaged: {error}") from None
    return messages
