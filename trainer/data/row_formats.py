"""The forms in which training rows come, told by their columns, and each turned into chat messages.

A canonical row is one chat: `messages`, a list of `{"role", "content": [parts]}`, a part being
`{"type": "text", "text"}` or
`{"type": "video" | "image", "video" | "image" | "frames": source, "start", "end", "subtitles"}`.
An answer with `"learn": False` is part of the question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlparse

from ...processing.chat_format import plain_part
from ...processing.frame_sampling import seconds_of
from .row_text import Part, find_video, locate, media_part, subtitles_of, take_marks, text_part

Row = dict[str, Any]
_ROLES = {"system": "system", "human": "user", "user": "user"}
_ROLES |= dict.fromkeys(("gpt", "assistant", "model"), "assistant")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class UnknownFormError(ValueError):
    """Columns of no form that is understood: not one row that is broken, but all of them."""


@dataclass(frozen=True)
class RowFormat:
    """One form of rows. `needs`: columns by which it is known; `convert(row, base_dir)` gives its messages.

    `clips`: rows that show the same video belong together, as clips of one interleaved sample.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Row, str | None], list[Row]]
    clips: bool = False


def _media_columns(row: Row, base_dir: str | None) -> list[Part]:
    """Parts for what the columns video(s) and image(s) hold, in the order of the columns."""
    window = {name: seconds_of(row.get(name), name) for name in ("start", "end")}
    told = subtitles_of(row.get("subtitles"), base_dir)
    parts = []
    for kind in ("video", "image"):
        for column in (kind, f"{kind}s"):
            found = row.get(column)
            if found is None or (isinstance(found, list | str) and not found):
                continue
            many = column.endswith("s") or (kind == "image" and isinstance(found, list))
            for source in found if many else [found]:
                source = locate(source, base_dir, row.get("data_source"))
                parts.append(media_part(kind, source, **(window if kind == "video" else {})))
                if kind == "video" and told is not None:
                    parts[-1]["subtitles"] = told
    return parts


def _place_media(turns: list[tuple[str, str]], media: list[Part], within: bool = True) -> list[Row]:
    """Messages of `(role, text)` turns, media put where the texts have placeholders, else into the first user turn.

    A text may also speak of `<image>` and `<video>`. Placeholders are those at the beginning of a line of a question;
    else, where that makes one for each medium, all in questions; else all. `within=False`: the first of these only.

    Raises:
        ValueError: placeholders and media differ in number.
    """
    readings = [
        [(role, *(take_marks(text, leading) if role in roles else (text, 0))) for role, text in turns]
        for roles, leading in ((("user",), True), (("user",), False), (("user", "assistant", "system"), False))
    ]
    counts = [sum(count for _, _, count in reading) for reading in readings]
    fits = [place for place in range(3 if within and media else 1) if counts[place] == len(media)]
    cleaned, marks = (readings[fits[0]], len(media)) if fits else (readings[0], counts[0])
    if within and media and not fits:
        marks = counts[2]
    if marks and marks != len(media):
        raise ValueError(f"the text has {marks} placeholders (<image> or <video>) for {len(media)} videos and images")
    if not marks and media:
        first = next((place for place, (role, _, _) in enumerate(cleaned) if role == "user"), None)
        if first is None:
            raise ValueError("there is no question to which the video could belong")
        cleaned[first] = (*cleaned[first][:2], len(media))
    rest = iter(media)
    return [
        {"role": role, "content": [*(next(rest) for _ in range(count)), *([text_part(text)] if text else [])]}
        for role, text, count in cleaned
    ]


def _role(name: Any) -> str:
    if name not in _ROLES:
        raise ValueError(f"the role {name!r} is not known: use system, user (human) or assistant (gpt)")
    return _ROLES[name]


def chat_messages(row: Row, base_dir: str | None) -> list[Row]:
    """Messages in parts, from `messages` and the columns with videos and images of a row.

    Raises:
        ValueError: places for media and media differ in number, a role or a part of an unknown kind.
    """
    media = iter(found := _media_columns(row, base_dir))
    messages, placeholders = [], 0
    turns = [(_role(message["role"]), message["content"] or "") for message in row["messages"]]
    if all(isinstance(content, str) for _, content in turns):
        return _place_media(turns, found)
    for role, content in turns:
        parts = []
        for given in [text_part(content)] if isinstance(content, str) else content:
            part = plain_part({key: value for key, value in given.items() if value is not None})
            if (kind := part["type"]) != "text":
                source = part.get("frames", part.get(kind))
                if source is None:
                    placeholders += 1
                    part = next(media, None) or {"type": kind}
                else:
                    window = {name: seconds_of(part.get(name), name) for name in ("start", "end")}
                    told = subtitles_of(part.get("subtitles"), base_dir)
                    part = media_part(kind, locate(source, base_dir), **window)
                    part |= {} if told is None else {"subtitles": told}
            parts.append(part)
        messages.append({"role": role, "content": parts})
    if placeholders == 0 and found:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there is no question to which the video could belong")
        first["content"][:0] = found
    elif placeholders != len(found):
        raise ValueError(f"the messages have {placeholders} places for {len(found)} videos and images")
    return messages


def _conversations(row: Row, base_dir: str | None) -> list[Row]:
    turns = [(_role(turn["from"]), turn["value"]) for turn in row["conversations"]]
    # An answer without a question is left out, as LLaVA does; it would be learnt before the video is seen.
    while turns and turns[0][0] == "assistant" and any(role == "user" for role, _ in turns):
        turns = turns[1:]
    return _place_media(turns, _media_columns(row, base_dir))


def _video_chat_questions(row: Row, base_dir: str | None) -> list[Row]:
    turns = []
    for number, pair in enumerate(row["QA"]):
        if number == 0 and pair.get("i"):
            turns.append(("system", pair["i"]))
        turns += [("user", pair.get("q") or ""), ("assistant", pair["a"])]
    return _place_media(turns, _media_columns(row, base_dir))


def _question(row: Row, base_dir: str | None) -> list[Row]:
    text, options = _cell(row, "question"), [_words(option, "an option") for option in row.get("options") or []]
    if not text:
        raise ValueError("the question is empty")
    if options and not all(option in text for option in options):
        text += "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return _place_media(
        [("user", text), ("assistant", _cell(row, "answer"))], _media_columns(row, base_dir), within=False
    )


def _cell(row: Row, column: str) -> str:
    """The text of a column, without the spaces around it."""
    return _words(row[column], f"the {column}").strip()


def _words(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'the row is malformed: {what} must be a text, not {value!r:.60} (write "…" around it)')
    return value


def _caption(row: Row, base_dir: str | None) -> list[Row]:
    return _place_media(
        [("user", ""), ("assistant", _cell(row, "caption"))], _media_columns(row, base_dir), within=False
    )


def _prompt_and_completion(row: Row, base_dir: str | None) -> list[Row]:
    """TRL's form; both are texts or lists of messages. Only the completion is learnt, as there."""
    prompt, completion = (
        [{"role": role, "content": row[name]}] if isinstance(row[name], str) else list(row[name])
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    messages = chat_messages({**row, "messages": [*prompt, *completion]}, base_dir)
    return [{**message, "learn": place >= len(prompt)} for place, message in enumerate(messages)]


def _text(row: Row, base_dir: str | None) -> list[Row]:
    """A text that is learnt whole, without roles; with videos or images, it is what is said about them."""
    text, media = _words(row["text"], "the text"), _media_columns(row, base_dir)
    if not media:
        return [{"role": "assistant", "content": [text_part(text)]}]
    text, marks = take_marks(text)
    if marks not in (0, len(media)):
        raise ValueError(f"the text has {marks} placeholders (<image> or <video>) for {len(media)} videos and images")
    return [{"role": "user", "content": media}, {"role": "assistant", "content": [text_part(text)]}]


# SceneWalk's rows are clips of long videos, each with a caption; the data set names videos and does not hold them. Two
# releases are understood. In the first (IVLLab/SceneWalk) a row is a clip: `id`, `url`, `time_stamp` and
# `conversations`; clips of a video become one sample. In the later ones a row is a video: `id`, `video`, `total_time`,
# `clip_num`, `scenes`, `conversations`.
def clip_turn(video: Any, start: float | None, end: float | None, caption: str) -> list[dict[str, Any]]:
    """A clip and its caption, as a user who shows the clip and an assistant who describes it."""
    return [
        {"role": "user", "content": [media_part("video", video, start, end)]},
        {"role": "assistant", "content": [text_part(caption)]},
    ]


def scenewalk_clip(row: dict[str, Any], base_dir: str | None) -> list[dict[str, Any]]:
    """One row of the first release; the video is looked for in `base_dir` under its YouTube id, then the row's id."""
    stamp = row["time_stamp"]
    names = [name for name in (youtube_id(row["url"]), str(row.get("id") or "")) if name]
    start, end = (_moment(stamp, edge) for edge in ("start", "end"))
    return clip_turn(find_video(names, base_dir), start, end, _captions(row)[0])


def scenewalk_video(row: dict[str, Any], base_dir: str | None) -> list[dict[str, Any]]:
    """One row of a later release. `scenes` are [start, end] or {"start", "end"} (also start_time, end_time)."""
    captions, scenes = _captions(row), [_window(scene) for scene in row["scenes"]]
    video = locate(row["video"], base_dir)
    if len(captions) != len(scenes):
        if len(captions) == 1:  # one text about the whole video
            return clip_turn(video, None, None, captions[0])
        raise ValueError(f"there are {len(captions)} captions for {len(scenes)} scenes")
    return [m for window, caption in zip(scenes, captions, strict=True) for m in clip_turn(video, *window, caption)]


def youtube_id(url: str) -> str:
    """The id in a YouTube address, or the last part of any other."""
    parsed = urlparse(url)
    return (parse_qs(parsed.query).get("v") or [parsed.path.rstrip("/").rpartition("/")[2]])[0]


def _captions(row: dict[str, Any]) -> list[str]:
    captions = [take_marks(turn["value"])[0] for turn in row["conversations"] if turn["from"] in ("gpt", "assistant")]
    if not captions:
        raise ValueError("the conversations hold no caption (from gpt)")
    return captions


def _moment(stamp: dict[str, Any], edge: str) -> float | None:
    """Seconds of a clip's start or end; from its frame number where there is no time."""
    found = seconds_of(stamp.get(f"{edge}_time"), f"{edge}_time")
    if found is None and stamp.get(f"{edge}_fps"):
        found = stamp[f"{edge}_frame"] / stamp[f"{edge}_fps"]
    return found


def _window(scene: Any) -> tuple[float | None, float | None]:
    if isinstance(scene, dict):
        found = [
            next((scene[key] for key in (edge, f"{edge}_time") if key in scene), None) for edge in ("start", "end")
        ]
    else:
        found = list(scene)
    if len(found) != 2 or None in found:
        raise ValueError(f"a scene must say when it starts and ends, not {scene!r:.100}")
    return seconds_of(found[0], "start"), seconds_of(found[1], "end")


FORMATS = (
    RowFormat("chat messages", ("messages",), chat_messages),
    RowFormat("SceneWalk clips", ("conversations", "time_stamp", "url"), scenewalk_clip, clips=True),
    RowFormat("SceneWalk videos", ("conversations", "scenes", "video"), scenewalk_video),
    RowFormat("LLaVA conversations", ("conversations",), _conversations),
    RowFormat("VideoChat2 questions", ("QA", "video"), _video_chat_questions),
    RowFormat("questions", ("question", "answer"), _question),
    RowFormat("captions of clips", ("video", "caption"), _caption, clips=True),
    RowFormat("captions of images", ("image", "caption"), _caption),
    RowFormat("prompts and completions", ("prompt", "completion"), _prompt_and_completion),
    RowFormat("plain text", ("text",), _text),
)
COLUMNS = frozenset(
    [
        *("video", "videos", "image", "images", "id", "start", "end", "subtitles", "options"),
        *("data_source", "question_id", "video_id"),
    ]
).union(*(form.needs for form in FORMATS))
"""Names that mean something in a row."""


def detect_format(columns: list[str], where: str | None = None) -> RowFormat:
    """The form of a row with these columns. `where`: begins the message.

    Raises:
        UnknownFormError: it is none that is known; the message lists what was found and what is understood.
    """
    for form in FORMATS:
        if set(form.needs) <= set(columns):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.needs)})" for form in FORMATS)
    raise UnknownFormError(
        f"{where}: "
        * (where is not None)
        + f"the columns {', '.join(map(repr, columns)) or '(none)'} are of no known form. Understood: {known}"
        "; with the columns video, videos, image or images where the messages do not name them. Rename yours"
    )


def check_answers(messages: list[Row]) -> None:
    """See that there is something to learn.

    Raises:
        ValueError: no message, or not one answer with a text.
    """
    answers = [m for m in messages if m["role"] == "assistant" and m.get("learn") is not False]
    written = [part for m in answers for part in m["content"] if part["type"] == "text"]
    if not any(part.get("text", "").strip() for part in written):
        raise ValueError("there is no answer (or caption) to learn from")
