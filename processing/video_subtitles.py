"""Subtitles as cues: from files (SRT, WebVTT, ASS, the JSON of whisper and its kin), text tracks of videos, or lists.

ASS and tracks are parsed by FFmpeg. SRT and WebVTT are not: its demuxers leave out what is damaged without a word, at
worst with all that follows, and read a negative time as a positive one.
"""

import codecs
import hashlib
import html
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from .frame_times import Cue, clock
from .video_source_names import local_path, shown_name

SUFFIXES = (".srt", ".vtt", ".ass", ".ssa")
_LARGEST = 2**26
"""Bytes of a file of subtitles; a day of speech takes two million."""
_MARKS = (
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_ASIDE = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}.*?(?=\{[^{}]*\\p0[^{}]*\}|$)|\{[^{}]*\}", re.S)
"""What in ASS is not said: drawings, comments, styles."""
_STYLES = re.compile(r"\{\\[^{}]*\}|</?(?:i|b|u|s|c|v|em|strong|font|ruby|rt|lang|span)\b[^<>]*>|<[\d:.]+>", re.I)
_BREAKS = re.compile(r"\\[NnhH]|<br\b[^<>]*>|&nbsp;", re.I)
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_PAUSE, _LINE_WORDS = 1.0, 12  # seconds and words that end a line of single words
_EDGE = r"(-?)\s*(?:(\d+)\s*:)?\s*(-?\d{1,2})\s*:\s*(-?\d{1,2})(?:\s*[.,]\s*(\d+))?"
_TIMES = re.compile(rf"\s*{_EDGE}\s*--?>\s*{_EDGE}(?:\s.*)?")
_BROKEN_TIMES = re.compile(r"\s*-?\d+\s*:.*-->.*|.*-->\s*-?\d+\s*:.*|\s*(?:\d+:)?\d{1,2}:\d\d[.,]\d{3}\s*-{0,2}")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,9}))?")
_TEXT_CODECS = frozenset({"subrip", "srt", "webvtt", "mov_text", "ass", "ssa", "text", "ttml", "eia_608"})


@dataclass
class Subtitles:
    """Cues in the order of their starts. `name`, `digest` (SHA-256 of all that they say) tell them apart; `problems`:
    what was wrong with them."""

    name: str
    cues: list[Cue]
    problems: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of times and words."""
        told = json.dumps([[cue.start, cue.end, cue.text] for cue in self.cues])
        return hashlib.sha256(told.encode()).hexdigest()


def find_subtitles(given: Any, reader: Any) -> Subtitles | None:
    """The subtitles of a video that is read; problems with them become warnings of its reader.

    Args:
        given: None or "off": none. "auto": the video's own text track, else a file beside it of the same name that
            ends in one of `SUFFIXES`, else none. Or a path; or a list of cues: `(start, end, text)`, `Cue`, or dicts
            with these keys, in seconds from the video's first frame.
        reader: a `FrameReader`, or what gives frames as it does.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no subtitles, or not one lies within the video.
    """
    if given is None or given is False or (isinstance(given, str) and given == "off"):
        return None
    if isinstance(given, str) and given == "auto":
        found = _of_the_video(reader)
        if found is None:
            return None
    else:
        found = stream_subtitles(given)
    _fit(found, float(reader.duration))
    for problem in found.problems:
        if problem not in reader.warnings:
            reader.warnings.append(problem)
            warnings.warn(problem, stacklevel=2)
    return found


def stream_subtitles(given: Any) -> Subtitles:
    """Subtitles of a stream, whose end is not known: a file, or cues; see `find_subtitles`."""
    if isinstance(given, str | os.PathLike):
        return read_subtitles(given)
    return Subtitles("<cues>", *_cleaned(_listed(given), "<cues>"))


def _of_the_video(reader: Any) -> Subtitles | None:
    """The text track, or the file beside the video; None where there is neither."""
    track = getattr(reader, "text_track", lambda: None)()
    if track:
        return Subtitles(f"{reader.name}: text track", *_cleaned(track, f"{reader.name}: text track"))
    video = getattr(reader, "file", None)
    if video is None:
        return None
    beside = [video.with_suffix(suffix) for suffix in SUFFIXES]
    languages = (file for suffix in SUFFIXES for file in sorted(video.parent.glob(f"*{suffix}")))
    beside += [file for file in languages if file.with_suffix("").stem == video.stem]  # film.en.srt
    return next((read_subtitles(file) for file in beside if file.is_file()), None)


def read_subtitles(path: str | os.PathLike[str]) -> Subtitles:
    """Read a file of subtitles, whatever it is called; its kind is told by what it holds.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not UTF-8 or UTF-16, or holds no subtitles.
    """
    file, name = local_path(path), shown_name(path)
    if not os.path.exists(file):
        raise FileNotFoundError(f"{name}: no such file of subtitles")
    if not file.is_file():
        raise ValueError(f"{name}: this is no file; subtitles are a .srt, .vtt or .ass file, or whisper's .json")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{name}: {file.stat().st_size / 1e6:.0f} MB are no subtitles")
    return parse_subtitles(file.read_bytes(), name)


def parse_subtitles(data: bytes, name: str) -> Subtitles:
    """What a file of subtitles called `name` holds; its kind is told by that.

    Raises:
        ValueError: as of `read_subtitles`.
    """
    text = decoded_text(data, name).replace("\r\n", "\n").replace("\r", "\n").lstrip()
    if text[:13].lower() == "[script info]":
        found = _of_ass(text)
        broken = max(len(re.findall(r"^Dialogue:", text, re.M)) - len(found), 0)
    elif text.startswith(("{", "[")) and not re.match(r"\{\d+\}\{|\[\d+:\d", text):  # MicroDVD, LRC
        found, broken = _of_json(text, name), 0
    else:
        found, broken = _of_lines(text.split("\n"), text[:6].lower() == "webvtt")
    cues, problems = _cleaned(found, name)
    if not cues:
        damaged = f" but {broken} damaged cues" if broken else ""
        raise ValueError(
            f"{name}: there are no subtitles in it{damaged} (SRT, WebVTT, ASS and whisper's JSON are understood; "
            "other kinds: ffmpeg -i FILE FILE.srt)"
        )
    if broken:
        problems.append(f"{name}: {broken} of {broken + len(found)} cues are damaged and left out")
    return Subtitles(name, cues, problems)


def decoded_text(data: bytes, name: str) -> str:
    """The text of a file called `name`. ValueError: it is not UTF-8, UTF-16 or UTF-32."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    empty = [bytes(data[side:200:2]).count(0) for side in (0, 1)]
    if encoding is None and 2 * max(empty) > len(data[:200:2]) and not min(empty):  # UTF-16 without its mark
        encoding = "utf-16-be" if empty[0] else "utf-16-le"
    if encoding is not None:
        return data.decode(encoding, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", data[:4096])) * 100 > len(data[:4096]):
            raise ValueError(
                f"{name}: this is no text (a video, a picture, packed?); subtitles are a .srt, .vtt or .ass file, or "
                "whisper's .json"
            ) from None
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8 (Latin-1 or Windows-1252, maybe): "
            "convert the file: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def _of_lines(lines: Sequence[str], webvtt: bool) -> tuple[list[Cue], int]:
    """Cues of an SRT or WebVTT file, and how many more there are whose times cannot be read.

    A cue lasts to the next line of times, of whose number it is relieved; in WebVTT to the next empty line.
    """
    cues: list[Cue] = []
    words: list[str] = []
    broken, inside, aside = 0, False, False

    def close() -> None:
        if inside:
            if not webvtt and words and words[-1].strip().isdigit():
                words.pop()
            cues[-1] = Cue(cues[-1].start, cues[-1].end, "\n".join(words))
        words.clear()

    for line in lines:
        aside = aside or (webvtt and not inside and re.match(r"(?:NOTE|STYLE|REGION)\b", line) is not None)
        found = None if aside else _TIMES.fullmatch(line)
        if found or (not aside and _BROKEN_TIMES.fullmatch(line)):
            close()
            inside = found is not None
            if found:
                cues.append(Cue(_edge(*found.groups()[:5]), _edge(*found.groups()[5:]), ""))
            broken += found is None
        elif webvtt and not line.strip():
            close()
            inside = aside = False
        elif inside:
            words.append(line)
    close()
    return cues, broken


def _edge(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    """Seconds of a time; a minus anywhere makes it negative. Digits behind the comma are milliseconds, as for FFmpeg,
    unless there are more than three."""
    rest = 0.0 if fraction is None else int(fraction) / 1000 if len(fraction) <= 3 else float(f"0.{fraction}")
    total = int(hours or 0) * 3600 + abs(int(minutes)) * 60 + abs(int(seconds)) + rest
    return -total if sign or minutes.startswith("-") or seconds.startswith("-") else total


def _of_ass(text: str) -> list[Cue]:
    """What FFmpeg finds in an ASS file."""
    import av
    import av.error

    try:
        with av.open(BytesIO(text.encode()), format="ass") as container:
            return track_cues(container, container.streams.subtitles[0])
    except (av.error.FFmpegError, IndexError):
        return []


def srt_text(cues: Iterable[Cue]) -> str:
    """Cues as an SRT file holds them; each on one line, empty ones left out."""
    told = [cue for cue in cues if cue.text.strip()]
    return "\n".join(
        f"{number}\n{srt_time(cue.start)} --> {srt_time(cue.end)}\n{' '.join(cue.text.split())}\n"
        for number, cue in enumerate(told, 1)
    )


def srt_time(seconds: float, point: str = ",") -> str:
    """`00:01:20,500`; WebVTT has a full stop as its `point`."""
    whole, thousandth = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandth:03}"


def choose_track(container: Any) -> tuple[Any | None, str]:
    """The subtitle stream of a video that holds text: the one marked as default, else the first; or None. And what is
    to be said about the choice: empty where there was none to make."""
    tracks = [stream for stream in container.streams.subtitles if stream.codec_context]
    texts = [stream for stream in tracks if stream.codec_context.name in _TEXT_CODECS]
    if tracks and not texts:
        kinds = ", ".join(sorted({stream.codec_context.name for stream in tracks}))
        return None, f"its subtitles are pictures or of an unknown kind ({kinds}): give a file of subtitles"
    chosen = max(texts, key=lambda s: int(getattr(s.disposition, "value", s.disposition)) & 1, default=None)
    if len(texts) < 2:
        return chosen, ""
    languages = [stream.language or "no language named" for stream in texts]
    number = next(place for place, stream in enumerate(texts) if stream is chosen)
    told = f"text track {number + 1} ({languages[number]}) of {len(texts)} ({', '.join(languages)}) is read"
    return chosen, told


def track_cues(container: Any, stream: Any, zero: float = 0.0) -> list[Cue]:
    """Cues of a subtitle stream, their times counted from the second `zero` of the container's clock."""
    import av.error

    cues, tick, styled = [], float(stream.time_base), stream.codec_context.name in ("ass", "ssa")
    for packet in container.demux(stream):
        if packet.pts is None or not packet.size:
            continue
        try:
            parts = [part for found in packet.decode() for part in getattr(found, "rects", [found])]
        except (av.error.FFmpegError, EOFError):
            continue
        texts = [part.dialogue or b"" for part in parts if hasattr(part, "dialogue")]
        start = packet.pts * tick - zero
        length = (packet.duration or 0) * tick
        words = "\n".join(text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts)
        words = _ASIDE.sub("", words) if styled else words
        cues.append(Cue(start, start + (length if 0 <= length < 86400 else -1.0), words))
    return cues


def _of_json(text: str, name: str) -> list[Cue]:
    """Whisper's and its kin's: a list of segments, or an object with one (`segments`, `chunks`, `transcription`)."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:  # one object a line
            return _lines_of_words(_listed([json.loads(line) for line in text.splitlines() if line.strip()], name))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{name}: this is not JSON ({error})") from None
    whole = False  # what calls itself a segment or a cue stays one, however short
    if isinstance(found, dict):
        lists = ("segments", "chunks", "transcription", "cues", "words")
        key = next((key for key in lists if key in found), None)
        found, whole = found.get(key), key in ("segments", "cues")
    if not isinstance(found, list):
        raise ValueError(f"{name}: this JSON holds no list of segments with start, end and text, as whisper writes it")
    cues = _listed(found, name)
    return cues if whole else _lines_of_words(cues)


def _listed(items: Iterable[Any], name: str = "subtitles") -> list[Cue]:
    """Cues of a list, each in one of the forms that programs write."""
    cues = []
    for number, item in enumerate(items):
        try:
            if isinstance(item, dict):
                text = next(item[key] for key in ("text", "line", "content", "word") if key in item)
                times = item.get("timestamp") or item.get("timestamps") or item
                if "offsets" in item:  # whisper.cpp: milliseconds
                    times = [item["offsets"]["from"] / 1000, item["offsets"]["to"] / 1000]
                start, end = _edges(times) if isinstance(times, dict) else times
            elif hasattr(item, "start"):
                start, end, text = item.start, item.end, item.text
            else:
                start, end, text = item
            start = _moment(start)
            cues.append(Cue(start, start if end is None else _moment(end), "" if text is None else str(text)))
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError):
            raise ValueError(f"{name}: cue {number} is not (start, end, text) in seconds, but {item!r:.80}") from None
    return cues


def _edges(times: dict[str, Any]) -> tuple[Any, Any]:
    start, end = (next(times[key] for key in (edge, f"{edge}_time") if key in times) for edge in ("start", "end"))
    return start, end


def _lines_of_words(cues: list[Cue]) -> list[Cue]:
    """Cues of single words put together to lines; others as they are."""
    if not cues or sum(len(cue.text.split()) for cue in cues) > 1.5 * len(cues):
        return cues
    lines = [cues[0]]
    for cue in cues[1:]:
        last = lines[-1]
        if cue.start - last.end > _PAUSE or len(last.text.split()) >= _LINE_WORDS or last.text[-1:] in ".!?":
            lines.append(cue)
        else:
            lines[-1] = Cue(last.start, cue.end, f"{last.text} {cue.text}")
    return lines


def _moment(value: Any) -> float:
    if isinstance(value, str) and (found := _CLOCK.fullmatch(value.strip())):
        return int(found[1] or 0) * 3600 + int(found[2]) * 60 + float(f"{found[3]}.{found[4] or 0}")
    if not math.isfinite(seconds := float(value)):
        raise ValueError(f"{value} is no time")
    return seconds


def _cleaned(found: Sequence[Cue], name: str) -> tuple[list[Cue], list[str]]:
    """Cues in order, without marks of style and without empty ones; and what was wrong."""
    cues, backwards = [], 0
    for cue in found:
        text = _STYLES.sub("", _BREAKS.sub(" ", cue.text))
        text = " ".join(_UNSEEN.sub("", html.unescape(text).replace("\t", " ").replace("\n", " ")).split())
        if cue.end < cue.start:
            backwards += 1
        elif text:
            cues.append(Cue(round(cue.start, 3), round(cue.end, 3), text))
    problems = (
        [f"{name}: {backwards} of {len(found)} cues end before they start and are left out"] if backwards else []
    )
    return sorted(cues, key=lambda cue: cue.start), problems


def _signed(seconds: float) -> str:
    return clock(seconds) if seconds >= 0 else f"-{clock(-seconds)}"


def _fit(subtitles: Subtitles, duration: float) -> None:
    """Drop cues outside of the video, and say so: they are shifted, or belong to another cut.

    Raises:
        ValueError: all of them are.
    """
    inside = [cue for cue in subtitles.cues if cue.start < duration and cue.end > 0]
    outside = len(subtitles.cues) - len(inside)
    if not inside and subtitles.cues:
        raise ValueError(
            f"{subtitles.name}: its cues lie between {_signed(subtitles.cues[0].start)} and "
            f"{_signed(max(cue.end for cue in subtitles.cues))}, but the video lasts {clock(duration)}: "
            "they are shifted, or belong to another video"
        )
    if outside:
        subtitles.problems.append(
            f"{subtitles.name}: {outside} of {len(subtitles.cues)} cues lie outside of the video, which lasts "
            f"{clock(duration)}, and are left out: they are shifted, or belong to another cut"
        )
    subtitles.cues = [Cue(max(cue.start, 0.0), cue.end, cue.text) for cue in inside]
