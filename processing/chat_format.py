"""The chat format: the template, and turning messages into rendered text plus the videos and images in it.

A prompt reads, after the paper's Table 5 (role tags written out, every turn ended by the end-of-text token):

    <|system|>You are a helpful assistant.<|endoftext|><|user|>FRAMES
    question<|endoftext|><|assistant|>answer<|endoftext|><|user|>question<|endoftext|><|assistant|>...

Frames come before the question of their turn. What stands between them the paper does not say; a newline is the
default.
"""

import base64
import binascii
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from .picture_sources import split_videos

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
DEFAULT_FRAME_SEPARATOR = "\n"
_NO_WIDTH = re.compile("[\u200b\u2060\ufeff]")
IMAGE_MARK = "<image>"
"""How an image is written in rendered text. In token ids it is a video of one frame."""

CHAT_TEMPLATE = """\
{%- set system_text = system_prompt if system_prompt is defined else 'You are a helpful assistant.' -%}
{%- set separator = frame_separator if frame_separator is defined else '\\n' -%}
{%- set video_mark = video_token if video_token is defined else '<video>' -%}
{%- set end = eos_token if eos_token is defined else '<|endoftext|>' -%}
{%- if system_text and not (messages and messages[0]['role'] == 'system') -%}
{{- '<|system|>' + system_text + end -}}
{%- endif -%}
{%- for message in messages -%}
{%- set parts = namespace(media='', text='') -%}
{%- if message['content'] is string -%}
{%- set parts.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{%- set parts.media = parts.media + video_mark -%}
{%- elif part['type'] == 'image' -%}
{%- set parts.media = parts.media + '<image>' -%}
{%- elif part['type'] == 'text' -%}
{%- set parts.text = parts.text + part['text'] -%}
{%- else -%}
{{- raise_exception('content of the type ' + part['type'] + ' is not supported; use video, image or text') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set body = parts.media + (separator if parts.media and parts.text else '') + parts.text -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}{%- generation -%}{{- body + end -}}{%- endgeneration -%}
{%- elif message['role'] in ('system', 'user') -%}
{{- '<|' + message['role'] + '|>' + body + end -}}
{%- else -%}
{{- raise_exception('the role ' + message['role'] + ' is not supported; use system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {"video": "video", "video_url": "video", "input_video": "video"}
_MEDIA_PARTS |= {"image": "image", "image_url": "image", "input_image": "image"}
_one_template = threading.Lock()  # transformers keeps a compiled template, which counts as it writes
_SOURCES = ("path", "url", "base64", "image_url", "video_url", "image", "video")

# Text behind a role tag is tokenized on its own, so that an answer has the same tokens in training, where it follows
# its tag, and in generation, where the prompt ends with the tag. (In GPT-NeoX's vocabulary tags are ordinary text.)
ROLE_TAGS = ("<|system|>", "<|user|>", "<|assistant|>")
ROLE_TAG_ENDS = re.compile("|".join(f"(?<={re.escape(tag)})" for tag in ROLE_TAGS))


@dataclass
class Chat:
    """A rendered conversation: its text, the character spans the assistant wrote, and its media in order.

    Where somebody's words hold a string that the tokenizer would take for a special token (`<video>`,
    `<|endoftext|>`), `text` has one character in its place, which `typed` maps to the string.
    """

    text: str
    answers: list[tuple[int, int]]
    videos: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    subtitles: list[Any] = field(default_factory=list)  # of each video, where its part of a message names some
    typed: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The text as it was written."""
        return restored(self.text, self.typed)


def restored(text: str, typed: dict[str, str]) -> str:
    """`text` with the strings that stand-ins of `typed` stand for."""
    return text.translate({ord(mark): string for mark, string in typed.items()})


def stand_ins(strings: Iterable[str], texts: Sequence[str]) -> dict[str, str]:
    """A private character, which no text holds, for each of `strings` that occurs in `texts`: character -> string."""
    found = [string for string in strings if string and any(string in text for text in texts)]
    if not found:
        return {}
    used = set().union(*texts)
    free = (mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in used)
    return dict(zip(free, sorted(found, key=len, reverse=True), strict=False))  # longest first: one may hold another


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is one conversation (a list of role/content dicts) and not a batch of them."""
    return hasattr(messages, "messages") or (
        isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], dict)
    )


def plain_spaces(question: str) -> str:
    """A question without spaces around it and without characters of no width; one line also with single, usual spaces
    between its words. So may it have been copied from a page or a table, and means the same. A prompt of several
    lines keeps its line ends, the last one too: benchmarks end theirs so."""
    question = _NO_WIDTH.sub("", question)
    return question.strip(" \t\xa0") if "\n" in question.strip() else " ".join(question.split())


def render_chat(
    messages: Any, template: str, require_question: bool, special: Iterable[str] = (), **variables: Any
) -> Chat:
    """Render one conversation.

    Args:
        messages: role/content dicts, content a string, None (nothing) or a list of `{"type": "text", "text": ...}`,
            `{"type": "video", "video" | "path" | "url": source}` and
            `{"type": "image", "image" | "path" | "url" | "base64": source}` (`plain_part` tells other spellings);
            media without a source are placeholders, filled from elsewhere.
        template: Jinja chat template.
        require_question: refuse a conversation whose last message asks nothing.
        special: strings that mean something to the tokenizer; in the words of messages they are words.
        variables: passed on to the template (`add_generation_prompt`, `continue_final_message`, `system_prompt`, ...).

    Raises:
        ValueError: no messages, a malformed message, an empty question.
    """
    messages = list(getattr(messages, "messages", messages))
    if not messages:
        raise ValueError("the conversation is empty: give at least one message")
    videos, images, subtitles, plain = [], [], [], []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must be a dict with 'role' and 'content', not {message!r:.100}")
        content = message["content"] or ""
        if not isinstance(content, str):
            content = [plain_part(part) for part in content]
            videos += [part.get("video") for part in content if part["type"] == "video"]
            subtitles += [part.get("subtitles") for part in content if part["type"] == "video"]
            images += [part.get("image") for part in content if part["type"] == "image"]
            content = [part if part["type"] == "text" else {"type": part["type"]} for part in content]
        plain.append({**message, "content": content})
    if require_question and not _text_of(plain[-1]).strip():
        raise ValueError("the question is empty: say what you want to know about the video")
    system = variables.get("system_prompt")
    typed = stand_ins(special, [*map(_text_of, plain), *([system] if isinstance(system, str) else [])])
    if typed:
        plain = [{**message, "content": _marked(message["content"], typed)} for message in plain]
        variables = {**variables, **({"system_prompt": _marked(system, typed)} if isinstance(system, str) else {})}
    try:
        with _one_template:
            texts, spans = render_jinja_template(
                conversations=[plain], chat_template=template, return_assistant_tokens_mask=True, **variables
            )
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        raise
    return Chat(texts[0], [tuple(span) for span in spans[0]], videos, images, subtitles, typed)


def _marked(content: Any, typed: dict[str, str]) -> Any:
    """Content of a message with stand-ins in the place of special strings."""
    if isinstance(content, str):
        for mark, string in typed.items():
            content = content.replace(string, mark)
        return content
    return [{**part, "text": _marked(part["text"], typed)} if part["type"] == "text" else part for part in content]


def plain_part(part: Any) -> dict[str, Any]:
    """A part of a message in this package's spelling: `{"type": "text", "text"}`, or `{"type": "video" | "image"}`
    with its source under the type's name, where there is one.

    Other spellings: "path", "url", "base64" (of an image) as the source's name; and OpenAI's `image_url`, `video_url`
    (an address, or `{"url": ...}`), `input_text`, `input_image`, `output_text`, `refusal`.

    Raises:
        ValueError: a part of another kind.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        text = part.get(_TEXT_PARTS[kind])
        if isinstance(text, str) or (text is None and _TEXT_PARTS[kind] in part):
            return {"type": "text", "text": text or ""}
    elif kind in _MEDIA_PARTS:
        medium = _MEDIA_PARTS[kind]
        rest = {name: value for name, value in part.items() if name not in _SOURCES and name != "type"}
        source = next((part[name] for name in (medium, *_SOURCES) if part.get(name) is not None), None)
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if medium == "image" and part.get("base64") is not None:
            source = image_from_base64(part["base64"])
        elif isinstance(source, str) and source[:5].lower() == "data:":
            source = _from_data_address(source, medium)
        return {**rest, "type": medium, **({} if source is None else {medium: source})}
    raise ValueError(f"a part of a message must be of the type video, image or text, not {part!r:.100}")


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _from_data_address(address: str, medium: str) -> Any:
    """What a `data:` address holds: an image, or the bytes of a video."""
    head, comma, data = address.partition(",")
    if not comma:
        raise ValueError(f"the address {address!r:.60} holds no data: write data:{medium}/...;base64,...")
    if not head.lower().endswith(";base64"):
        data = base64.b64encode(unquote_to_bytes(data)).decode()
    if medium == "image":
        return image_from_base64(data)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the base64 data of a video cannot be read ({error})") from error


def image_from_base64(data: str) -> Image.Image:
    """Decode a base64 image.

    Raises:
        ValueError: not base64, or not an image.
    """
    try:
        return Image.open(BytesIO(base64.b64decode("".join(data.split()), validate=True)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"the base64 data of an image cannot be read ({error})") from error


def assign_media(chats: list[Chat], media: Any, mark: str, kind: str) -> None:
    """Give each prompt its videos (images): as grouped by the caller, else in the order of the placeholders."""
    wanted = [chat.text.count(mark) for chat in chats]
    if media is None:
        groups: list[list[Any]] = [[] for _ in chats]
    elif len(chats) > 1 and isinstance(media, list | tuple) and all(isinstance(item, list | tuple) for item in media):
        if len(media) != len(chats):
            raise ValueError(f"{kind} are given for {len(media)} prompts, but there are {len(chats)} prompts")
        groups = [_split(group, kind) for group in media]
    else:
        flat = iter(found := _split(media, kind))
        if len(found) != sum(wanted):
            raise ValueError(
                f"the text has {sum(wanted)} {mark} placeholders for {len(found)} {kind}; there must be one for each"
            )
        groups = [[next(flat) for _ in range(count)] for count in wanted]
    for chat, group in zip(chats, groups, strict=True):
        setattr(chat, kind, group)


def _split(media: Any, kind: str) -> list[Any]:
    """List single videos, or single images (where a list of pictures is no video)."""
    if kind == "videos":
        return split_videos(media) if media is not None else []
    if isinstance(media, list | tuple):
        return [image for item in media for image in _split(item, kind)]
    return [media]


def fill_placeholders(sources: list[Any], given: Any, kind: str) -> list[Any]:
    """Fill the placeholders among `sources` with what is given, in order."""
    found = _split(given, kind) if given is not None else []
    if sum(source is None for source in sources) != len(found):
        raise ValueError(
            f"the conversation has {sum(source is None for source in sources)} placeholders for {len(found)} {kind}; "
            "there must be one for each"
        )
    rest = iter(found)
    return [next(rest) if source is None else source for source in sources]


def require_sources(chat: Chat) -> None:
    """ValueError where a video or image of the messages has no source."""
    if any(source is None for source in [*chat.videos, *chat.images]):
        raise ValueError('a video or image in the messages has no source; write {"type": "video", "video": path}')
