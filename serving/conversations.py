"""OpenAI's chat messages as what is read and what is asked: media in order, and the ids of the question."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

import torch
from PIL import Image

from ..modeling_video_ma2mba.answering_questions import video_prefix
from ..processing.frame_sampling import Sampling, seconds_of
from ..processing.video_subtitles import parse_subtitles
from .errors import BadRequest
from .reading import SAMPLING
from .store import ID

STATE = "state:"
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA = {"video_url": "video", "input_video": "video", "video": "video", "image_url": "image", "input_image": "image"}
_MOST_MEDIA = 64
_WORDS = {"fps": float, "num_frames": int, "start": float, "end": float, "max_frames": int}


@dataclass(frozen=True)
class Medium:
    """A video or picture of a conversation.

    Attributes:
        kind: "video" or "image". source: `state:ID`, an address, or `data:`. settings: how frames are chosen.
        prefix: ids from behind the medium before it (or the beginning) up to its own token.
    """

    kind: str
    source: str
    settings: dict[str, Any]
    prefix: list[int]

    @property
    def state_id(self) -> str | None:
        """The id of the video whose state it names."""
        return self.source.removeprefix(STATE) if self.source.startswith(STATE) else None


@dataclass
class Conversation:
    """What is read, one after the other, and the ids of the question that follows."""

    media: list[Medium] = field(default_factory=list)
    question: list[int] = field(default_factory=list)


def sampling_of(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of sampling that were given, as numbers.

    Raises:
        BadRequest: one is no number, or out of range.
    """
    found: dict[str, Any] = {}
    for name in SAMPLING:
        value = given.get(name)
        if value is None or value == "":
            continue
        try:
            number = (seconds_of(value, name) or 0.0) if name in ("start", "end") else float(value)
            if isinstance(value, bool) or not math.isfinite(number) or number < 0 or number != _WORDS[name](number):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            kind = "a whole number" if _WORDS[name] is int else "a number"
            raise BadRequest(f"{where}{name} must be {kind} of at least 0, not {value!r:.40}", name) from None
        found[name] = _WORDS[name](number)
    if "fps" in found and "num_frames" in found:
        raise BadRequest(f"{where}give either fps or num_frames, not both", "fps")
    if found.get("end") is not None and found["end"] <= found.get("start", 0.0):
        raise BadRequest(f"{where}end ({found['end']:g}) must lie behind start ({found.get('start', 0.0):g})", "end")
    try:
        Sampling(**found)
    except ValueError as error:
        raise BadRequest(f"{where}{error}", str(error).partition(" ")[0]) from None
    return found


def subtitles_of(given: str | None) -> Any:
    """Subtitles that a request gives: None, "auto", or cues `[start, end, text]` of the content of a file.

    Raises:
        BadRequest: what is wrong with them.
    """
    if given is None or given.strip() in ("", "off"):
        return None
    if given.strip() == "auto":
        return "auto"
    try:
        found = parse_subtitles(given.encode(errors="replace"), "subtitles")
    except ValueError as error:
        raise BadRequest(f"{error}: send auto, or what such a file holds", "subtitles") from None
    return [[cue.start, cue.end, cue.text] for cue in found.cues]


def conversation_of(
    processor: Any,
    messages: list[dict[str, Any]],
    usual: Mapping[str, Any],
    video_id: str | None = None,
    times: bool = False,
) -> Conversation:
    """Take messages apart.

    What a system message says stands in front of the first question: a video is read before, and whatever is asked
    of it later, it is read once.

    Args:
        messages: OpenAI's, with parts of the types text, video_url and image_url.
        usual: sampling settings of videos that name none.
        video_id: of a video that the conversation is about where its messages hold none.
        times: the answer is to end in the span that shows it.

    Raises:
        BadRequest: what is wrong with them.
    """
    if not messages:
        raise BadRequest("messages are empty: ask something", "messages")
    plain: list[dict[str, Any]] = []
    media: list[tuple[str, str, dict[str, Any]]] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise BadRequest(f"{where}: the role {role!r:.40} is not supported: use system, user or assistant", where)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(parts, list):
            raise BadRequest(f"{where}: content must be a text or a list of parts, not {content!r:.60}", where)
        found = [_part(part, f"{where}.content[{place}]", usual) for place, part in enumerate(parts)]
        if role in ("system", "developer"):
            if any(isinstance(part, tuple) for part in found):
                raise BadRequest(f"{where}: a video or picture belongs into a message of the user", where)
            system += [part.strip() for part in found if isinstance(part, str)]
            continue
        media += [part for part in found if isinstance(part, tuple)]
        plain.append({"role": role, "content": [_as_plain(part) for part in found]})
    if not plain or plain[-1]["role"] != "user":
        raise BadRequest("the last message must be the user's: it is what is answered", "messages")
    if video_id is not None and not media:
        media = [("video", STATE + video_id, {})]
        plain[0]["content"] = [_blank(), *plain[0]["content"]]
    if len(media) > _MOST_MEDIA:
        raise BadRequest(f"{len(media)} videos and pictures are more than {_MOST_MEDIA}", "messages")
    told = "\n".join(text for text in system if text and text != processor.system_prompt)
    if told:
        first = next(message for message in plain if message["role"] == "user")
        place = next((i for i, part in enumerate(first["content"]) if part["type"] == "text"), len(first["content"]))
        first["content"].insert(place, {"type": "text", "text": f"{told}\n\n"})
    try:
        prefix, question, readers = processor.streaming_prompt(processor.times_question(plain, times))
    except ValueError as error:
        raise BadRequest(str(error), "messages") from None
    for reader in readers:
        reader.close()
    pieces: list[list[int]] = [[]]
    for token in prefix[0].tolist():
        pieces[-1].append(token)
        if token == processor.video_token_id:
            pieces.append([])
    found_media = [Medium(*own, prefix=piece) for own, piece in zip(media, pieces, strict=False)]
    for place, medium in enumerate(found_media):
        if medium.state_id is None:
            continue
        if not ID.fullmatch(medium.state_id):
            raise BadRequest(f"{medium.source[:80]!r} names no video: ids look like video_0123…", "messages")
        if place or medium.prefix != video_prefix(processor)[0].tolist():
            raise BadRequest("the video of a state comes first in a conversation: it was read from its beginning")
    return Conversation(found_media, question[0].tolist())


def _blank() -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (1, 1))}  # stands for a medium that comes another way


def _as_plain(part: str | tuple[Any, ...]) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else _blank()


def _part(part: Any, where: str, usual: Mapping[str, Any]) -> str | tuple[str, str, dict[str, Any]]:
    """Text, or the kind, source and settings of a medium."""
    kind = str(part.get("type")) if isinstance(part, dict) else ""
    if kind in _TEXTS and isinstance(part.get(_TEXTS[kind]), str):
        return part[_TEXTS[kind]]
    if kind not in _MEDIA:
        raise BadRequest(f"{where}: use parts of the types text, video_url and image_url, not {part!r:.60}", where)
    source = next((part[name] for name in (kind, f"{_MEDIA[kind]}_url", "url") if part.get(name) is not None), None)
    own = source if isinstance(source, dict) else {}
    address = own.get("url") if own else source
    if not isinstance(address, str) or not address:
        raise BadRequest(f'{where}: write {{"type": "{_MEDIA[kind]}_url", "{_MEDIA[kind]}_url": {{"url": …}}}}', where)
    scheme = address.split(":", 1)[0].lower()
    if scheme not in ("http", "https", "data", "state") or (scheme == "state" and _MEDIA[kind] != "video"):
        raise BadRequest(
            f"{where}: a {_MEDIA[kind]} comes from http(s):, data: or state:, not {address[:40]!r}", where
        )
    address = address[len(scheme) + 1 :]
    given = {name: own.get(name, part.get(name)) for name in SAMPLING}
    settings = sampling_of(given, f"{where}: ")
    if scheme == "state":
        if settings:
            raise BadRequest(
                f"{where}: the frames of a state are read already: leave {', '.join(settings)} out", where
            )
    elif _MEDIA[kind] == "video":
        rest = {name: value for name, value in usual.items() if name not in settings}
        if "fps" in settings or "num_frames" in settings:
            rest = {name: value for name, value in rest.items() if name not in ("fps", "num_frames")}
        settings = rest | settings
    return _MEDIA[kind], f"{scheme}:{address.strip()}", settings


def data_of(address: str) -> bytes:
    """The bytes in a `data:` address.

    Raises:
        BadRequest: it is damaged.
    """
    head, comma, data = address.partition(",")
    if not comma:
        raise BadRequest("a data: address holds no data: write data:video/mp4;base64,…", "messages")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except binascii.Error as error:
        raise BadRequest(f"the base64 data of a video or picture cannot be read ({error})", "messages") from None


def zero_state(model: Any) -> Any:
    """The state before anything was read, for a conversation without a video."""
    from ..modeling_video_ma2mba.state_video import VideoState

    weight: torch.Tensor = model.get_input_embeddings().weight
    return VideoState.zeros(model.config.text_config, 1, weight.device, weight.dtype)
