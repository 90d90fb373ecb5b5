"""Instruction data about long videos, as LongVILA makes it: a caption every ten seconds, then a summary and questions.

A captioner sees each clip; a writer, who has read all captions of a video and seen nothing of it, writes the summary
and one question of each kind. Every caption and every question is kept as soon as it is there, with who made it, so
that a run that was interrupted goes on with the next one. What is not fit to be learnt is refused and listed.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.append_log import AppendLog, read_log, write_durably
from ...files.model_replies import UnusableReply
from ...modeling_video_ma2mba.state_writing import write_whole
from ...processing.frame_times import Cue, clock
from ...processing.video_reader import open_video

QUESTION_KINDS = {
    "spatial": "where something is, or where things are to one another",
    "attribute": "a property of something, such as its colour, size, material or number",
    "action": "what somebody or something does, or how it moves",
    "object": "which objects, persons or animals there are",
    "ocr": "text or signs that can be read in the video",
    "synopsis": "what the whole video is about",
    "temporal": "the order of events, or when something happens",
}
"""LongVILA's seven kinds of question, and what each asks about."""
SUMMARY, SUMMARY_REQUEST = "summary", "Summarize the video."
LONGEST = {"caption": 2000, "question": 400, "answer": 2000}
"""Characters."""
_REFUSAL = re.compile(
    r"\W*(?:i['’]?m |i am )?(?:sorry|unable to|not able to)\b|\W*i (?:cannot|can['’]?t|can not)\b|\W*as an ai\b",
    re.IGNORECASE,
)
_SEEN = re.compile(r"\b(captions?|clips?|transcripts?|as an ai)\b", re.IGNORECASE)
CAPTIONS, WRITTEN, REFUSED = "captions.jsonl", "written.jsonl", "refused.jsonl"
OURS, LONGVILA = "train.jsonl", "longvila.json"
_SETTINGS = "made_with.json"


Captioner = Callable[[Path, float, float], str]
"""From a video and the seconds where a clip begins and ends to a caption of it; may raise `UnusableReply`."""
Writer = Callable[[Path, Sequence[Cue], str], tuple[str, str]]
"""From a video's captions and a kind to a question and its answer; of `SUMMARY` the answer alone counts. May raise
`UnusableReply`."""


@dataclass(frozen=True)
class LongSettings:
    """How a data set is made.

    Args:
        captioner, writer: what they are called, for the provenance of every row.
        clip_seconds: length of a clip, about: a video is cut into equal parts.
        kinds: of question, one of each a video.
    """

    captioner: str
    writer: str
    clip_seconds: float = 10.0
    kinds: tuple[str, ...] = tuple(QUESTION_KINDS)

    def __post_init__(self) -> None:
        if not 1 <= self.clip_seconds < float("inf"):
            raise ValueError(f"clips of {self.clip_seconds:g} s make no sense: a clip lasts at least 1 s")
        unknown = [kind for kind in self.kinds if kind not in QUESTION_KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"there is no kind of question {unknown}: choose among {', '.join(QUESTION_KINDS)}")


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done: a caption, a summary or a question of `video`, or why it was refused."""

    video: str
    what: str
    refused: str = ""


def clips_of(seconds: float, length: float) -> list[tuple[float, float]]:
    """Equal parts of a video, as near to a length as can be, each as (begin, end) in seconds."""
    count = max(1, round(seconds / length))
    return [(seconds * n / count, seconds * (n + 1) / count) for n in range(count)]


def one_line(text: str) -> str:
    """A text as it can be kept and learnt: in one line, without control characters and halves of characters."""
    whole = text.encode("utf-8", "replace").decode()
    return " ".join("".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in whole).split())


def caption_fault(text: str) -> str:
    """Why a caption is of no use; "" where it is."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return "it is empty"
    if len(text) > LONGEST["caption"]:
        return f"it has more than {LONGEST['caption']} characters"
    if _REFUSAL.match(text):
        return "it says that it cannot be told"
    if len(words) >= 12 and Counter(words).most_common(1)[0][1] > len(words) / 2:
        return "it says one word over and over"
    return ""


def question_fault(question: str, answer: str, earlier: Sequence[str] = ()) -> str:
    """Why a question, or a summary (an empty question), is not to be learnt; "" where it is."""
    for name, text in (("question", question), ("answer", answer)):
        if len(text) > LONGEST[name]:
            return f"its {name} has more than {LONGEST[name]} characters"
        if found := _SEEN.search(text):
            return f"its {name} speaks of {found[0]!r}, which nobody sees who watches the video"
    if fault := caption_fault(answer):
        return f"its answer: {fault}"
    if not question:
        return ""
    if not re.search(r"\w", question):
        return "its question is empty"
    if question.strip()[-1] not in "?.!":
        return "its question is no whole sentence"
    if question.strip().lower() == answer.strip().lower():
        return "its answer repeats its question"
    if question in earlier:
        return "its question was asked already"
    return ""


class LongVideos:
    """A data set of long videos in a folder, made in units that survive a crash.

    Args:
        folder: made where it does not exist; one that was begun with the same settings is completed.

    Raises:
        ValueError: it was begun with other settings, or another process works at it.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: LongSettings):
        self.folder, self.settings = Path(folder), settings
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {**vars(settings), "kinds": list(settings.kinds)}
        made_with = self.folder / _SETTINGS
        if made_with.exists():
            if json.loads(made_with.read_text(encoding="utf-8")) != told:
                raise ValueError(f"{folder} was made with other settings (see {_SETTINGS} there): name another --out")
        elif any(self.folder.iterdir()):
            raise ValueError(f"{folder} holds other files: name another --out")
        else:
            write_whole(made_with, json.dumps(told, indent=1) + "\n")
        self.captions: dict[tuple[str, int], dict[str, Any]] = {}
        self.written: dict[tuple[str, str], dict[str, Any]] = {}
        self._captions = AppendLog(self.folder / CAPTIONS, write=write_durably, alone=True)
        self._written = AppendLog(self.folder / WRITTEN, write=write_durably)
        for log in (self._captions, self._written):
            log.cut_torn_line()
        for _, record in read_log(self.folder / CAPTIONS):
            self.captions[record["video"], record["clip"]] = record
        for _, record in read_log(self.folder / WRITTEN):
            self.written[record["video"], record["kind"]] = record

    def close(self) -> None:
        """Let other processes have the folder."""
        self._captions.close()

    def name_of(self, video: Path) -> str:
        """How a video is called in the rows: its path from the folder, so that both may be moved together."""
        path = os.path.abspath(video)
        try:
            return Path(os.path.relpath(path, os.path.abspath(self.folder))).as_posix()
        except ValueError:  # another drive
            return Path(path).as_posix()

    def units(self, video: Path) -> int:
        """Pieces of work that a video is, done or not; 1 where it cannot be read."""
        try:
            clips = len(clips_of(open_video(video).duration, self.settings.clip_seconds))
        except (OSError, ValueError):
            return 1
        return clips + 1 + len(self.settings.kinds)

    def make(self, video: Path, captioner: Captioner, writer: Writer) -> Iterator[Unit]:
        """Do what is left of a video; also tells what was done before.

        Raises:
            ConnectionError: a captioner or writer elsewhere does not answer. What else they raise.
        """
        name = self.name_of(video)
        try:
            seconds = open_video(video).duration
        except (OSError, ValueError) as error:
            yield Unit(name, "video", str(error))
            return
        clips = clips_of(seconds, self.settings.clip_seconds)
        for number, (begin, end) in enumerate(clips):
            if (name, number) not in self.captions:
                record = {"video": name, "clip": number, "start": round(begin, 3), "end": round(end, 3), "caption": ""}
                try:
                    record["caption"] = text = one_line(captioner(video, begin, end))
                    record["refused"] = caption_fault(text)
                except UnusableReply as error:
                    record["refused"] = one_line(str(error))
                record["by"] = self.settings.captioner
                self._captions.add(record)
                self.captions[name, number] = record
            yield Unit(name, "caption", self.captions[name, number]["refused"])
        told = [self.captions[name, number] for number in range(len(clips))]
        cues = [Cue(one["start"], one["end"], one["caption"]) for one in told if not one["refused"]]
        for kind in (SUMMARY, *self.settings.kinds):
            if (name, kind) not in self.written:
                record = {"video": name, "kind": kind, "question": "", "answer": "", "by": self.settings.writer}
                if not cues:
                    record["refused"] = "none of its clips has a caption"
                else:
                    earlier = [self.written.get((name, other)) for other in (SUMMARY, *self.settings.kinds)]
                    asked = [one["question"] for one in earlier if one is not None]
                    try:
                        record |= self._row(kind, *writer(video, cues, kind), asked)
                    except UnusableReply as error:
                        record["refused"] = one_line(str(error))
                self._written.add(record)
                self.written[name, kind] = record
            yield Unit(name, kind, self.written[name, kind]["refused"])

    def _row(self, kind: str, question: str, answer: str, asked: Sequence[str]) -> dict[str, str]:
        question, answer = one_line(question), one_line(answer)
        if kind == SUMMARY:
            return {"question": SUMMARY_REQUEST, "answer": answer, "refused": question_fault("", answer)}
        fault = question_fault(question, answer, asked) if question else "there is no question"
        return {"question": question, "answer": answer, "refused": fault}

    def write(self, videos: Sequence[Path]) -> tuple[int, int]:
        """Write the rows of some videos in both forms, and what was refused.

        Returns:
            How many there are of each.
        """
        rows, refused = [], []
        for video in videos:
            name = self.name_of(video)
            clips: list[dict[str, Any]] = []
            while one := self.captions.get((name, len(clips))):
                clips.append(one)
            refused += [one for one in clips if one["refused"]]
            made = {"captioner": self.settings.captioner, "writer": self.settings.writer}
            made |= {"clips": len(clips), "clip_seconds": self.settings.clip_seconds}
            for kind in (SUMMARY, *self.settings.kinds):
                one = self.written.get((name, kind))
                if one is None or one["refused"]:
                    refused += [one] if one else []
                    continue
                rows.append({"id": f"{name}#{kind}", "video": name, **one, "made": made})
        write_whole(self.folder / OURS, "".join(json.dumps(_ours(row), ensure_ascii=False) + "\n" for row in rows))
        write_whole(self.folder / LONGVILA, json.dumps([_longvila(row) for row in rows], ensure_ascii=False, indent=1))
        write_whole(self.folder / REFUSED, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in refused))
        return len(rows), len(refused)


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "video"}, {"type": "text", "text": row["question"]}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
    return {"id": row["id"], "video": row["video"], "messages": said, "kind": row["kind"], "made": row["made"]}


def _longvila(row: dict[str, Any]) -> dict[str, Any]:
    said = [
        {"from": "human", "value": f"<video>\n{row['question']}"},
        {"from": "gpt", "value": row["answer"]},
    ]
    return {"id": row["id"], "video": row["video"], "conversations": said, "type": row["kind"], "made": row["made"]}


def captions_text(cues: Sequence[Cue]) -> str:
    """Captions as a writer reads them, each with its time."""
    return "\n".join(f"{clock(cue.start)}-{clock(cue.end)} {cue.text}" for cue in cues)
