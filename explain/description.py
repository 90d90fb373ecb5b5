"""A video in words: captions with times, chapters and a summary, from one reading.

The state is forked along the way: a caption is asked of what has been read at the end of its stretch of video, the
summary of all. `segments` in the JSON form are those of whisper's, so that a description can be read as subtitles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..modeling_video_ma2mba.answering_questions import report_frames
from ..processing.frame_times import Cue, TimedChunk, clock
from ..processing.video_subtitles import srt_text, srt_time

FORMATS = ("srt", "vtt", "json", "md")
QUESTION = "Describe what happens between {start} and {end}."
"""Asked of models that read time stamps; others are asked `QUESTION_NOW`."""
QUESTION_NOW = "Describe what is shown now."
SUMMARY = "Describe the video."
ALIKE = 0.5
"""Captions that share so much of their words, over the union of both, belong to one chapter."""
_TITLE = 60  # characters


@dataclass(frozen=True)
class Description:
    """`segments`: what happens when; `chapters`: stretches of them that say much the same; `duration` in seconds."""

    video: str
    duration: float
    segments: list[Cue]
    chapters: list[Cue]
    summary: str

    def text(self, kind: str) -> str:
        """Everything in one of `FORMATS`; SRT holds the captions alone, WebVTT the rest as notes.

        Raises:
            ValueError: another format.
        """
        if kind == "srt":
            return srt_text(self.segments)
        if kind == "vtt":
            notes = [f"NOTE chapter {clock(c.start)}-{clock(c.end)}: {c.text}" for c in self.chapters]
            notes += [f"NOTE summary: {self.summary}"] if self.summary else []
            cues = [f"{srt_time(c.start, '.')} --> {srt_time(c.end, '.')}\n{c.text}" for c in self._told()]
            return "\n\n".join(["WEBVTT", *(note.replace("-->", "->") for note in notes), *cues]) + "\n"
        if kind == "json":
            parts = {name: [vars(cue) for cue in getattr(self, name)] for name in ("segments", "chapters")}
            facts = {"video": self.video, "duration": self.duration, "summary": self.summary, **parts}
            return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
        if kind == "md":
            lines = [f"# {self.video}", "", self.summary or "(nothing was said)", "", "## Chapters", ""]
            lines += [f"- {clock(c.start)}-{clock(c.end)} {c.text}" for c in self.chapters]
            lines += ["", "## What happens", ""]
            return "\n".join([*lines, *(f"- {clock(c.start)} {c.text}" for c in self._told())]) + "\n"
        raise ValueError(f"format {kind!r}: use one of {', '.join(FORMATS)}")

    def _told(self) -> Iterator[Cue]:
        """Captions that say something, on one line each."""
        return (Cue(c.start, c.end, " ".join(c.text.split())) for c in self.segments if c.text.strip())


def describe_video(
    model: Any,
    processor: Any,
    video: Any,
    every: float = 10.0,
    *,
    question: str | None = None,
    summary: str = SUMMARY,
    max_new_tokens: int = 64,
    on_frames: Callable[[int, int | None], None] | None = None,
    **video_settings: Any,
) -> Description:
    """Describe a video, read once; memory does not grow with it.

    Args:
        every: seconds of a caption.
        question: asked for each caption, with `{start}` and `{end}` where it names the stretch; None: `QUESTION`, or
            of a model that reads no time stamps `QUESTION_NOW`.
        summary: asked at the end.
        on_frames: called with the number of frames read and expected.
        video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames`, `subtitles`, `subtitle_tokens`.

    Raises:
        ValueError: `every` is not positive, the question holds an unknown place; and what reading a video raises.
    """
    if not every > 0:
        raise ValueError(f"every={every}: a caption must last more than 0 seconds")
    question = question or (QUESTION_NOW if processor.frame_times == "none" else QUESTION)
    try:
        question.format(start="", end="")
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"the question {question!r} may hold the places {{start}} and {{end}}, and no other"
        ) from None
    messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    prefix, _, (reader,) = processor.streaming_prompt(messages, add_generation_prompt=False, **video_settings)
    report = report_frames([reader], on_frames)
    segments: list[Cue] = []
    state, read = None, 0
    begin, duration = reader.sampling.start or 0.0, float(reader.duration)
    finish = duration if reader.sampling.end is None else min(reader.sampling.end, duration)
    try:
        pieces = cut_by_time(reader.chunks(model.config.read_chunk_frames), every, model.config.clip_frames)
        for number, chunks in pieces:
            before = read
            state = model.read(prefix, [chunks], state, None if report is None else lambda n, b=before: report(b + n))
            read, prefix = int(state.metadata["frames"]), prefix[:, -1:]
            start, end = max(number * every, begin), min((number + 1) * every, finish)
            asked = question.format(start=clock(start), end=clock(end))
            text = model.answer(state, asked, processor, max_new_tokens=max_new_tokens)
            segments.append(Cue(round(start, 3), round(max(end, start), 3), text))
    finally:
        reader.close()
    said = model.answer(state, summary, processor, max_new_tokens=max_new_tokens)
    return Description(str(reader.name), round(duration, 3), segments, chapters_of(segments), said)


def cut_by_time(chunks: Iterator[Any], every: float, clip: int = 1) -> Iterator[tuple[int, list[Any]]]:
    """Chunks of frames, cut where another stretch of `every` seconds begins: each stretch's number and its chunks.

    A tower's clips of `clip` frames stay whole: a stretch then ends with the clip that its end falls into.
    """
    number, held, count = None, [], 0
    for chunk in chunks:
        texts, start = list(getattr(chunk, "texts", ())), 0
        for place, moment in enumerate(chunk.timestamps):
            now = int((float(moment) + 1e-3) // every)
            if number is None:
                number = now
            if now > number and count % clip == 0:
                held.append(_part(chunk, texts, start, place))
                yield number, held
                number, held, start = now, [], place
            count += 1
        held.append(_part(chunk, texts, start, len(chunk) + 1))
    if number is not None:
        yield number, held


def _part(chunk: Any, texts: list[tuple[int, list[int]]], start: int, end: int) -> TimedChunk:
    """Frames `start` to `end` of a chunk, with what stands in front of them."""
    told = [(place - start, ids) for place, ids in texts if start <= place < end]
    return TimedChunk(chunk.pixels[start:end], chunk.timestamps[start:end], told)


def chapters_of(segments: list[Cue]) -> list[Cue]:
    """Neighbouring captions that say much the same as one, under what the first of them says."""
    chapters: list[Cue] = []
    words: set[str] = set()
    for segment in segments:
        own = set(re.findall(r"\w+", segment.text.casefold()))
        if chapters and len(own & words) >= ALIKE * max(len(own | words), 1):
            chapters[-1] = Cue(chapters[-1].start, segment.end, chapters[-1].text)
        else:
            title = re.split(r"(?<=[.!?])\s", " ".join(segment.text.split()))[0]
            title = title if len(title) <= _TITLE else title[: _TITLE - 2].rsplit(" ", 1)[0] + " …"
            chapters.append(Cue(segment.start, segment.end, title))
        words = own
    return chapters
