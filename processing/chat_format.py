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
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
DEFAULT_FRAME_SEPARATOR = "\n"
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

# Text behind a role tag is tokenized on its own, so that an answer has the same tokens in training, where it follows
# its tag, and in generation, where the prompt ends with the tag. (In GPT-NeoX's vocabulary tags are ordinary text.)
ROLE_TAG_ENDS = re.compile(r"(?<=<\|system\|>)|(?<=<\|user\|>)|(?<=<\|assistant\|>)")


@dataclass
class Chat:
    """A rendered conversation: its text, the character spans the assistant wrote, and its media in order."""

    text: str
    answers: list[tuple[int, int]]
    videos: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is one conversation (a list of role/content dicts) and not a batch of them."""
    return hasattr(messages, "messages") or (
        isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], dict)
    )


def render_chat(messages: Any, template: str, require_question: bool, **variables: Any) -> Chat:
    """Render one conversation.

    Args:
        messages: role/content dicts, content a string or a list of `{"type": "text", "text": ...}`,
            `{"type": "video", "video" | "path" | "url": source}` and
            `{"type": "image", "image" | "path" | "url" | "base64": source}`; media without a source are placeholders,
            filled from elsewhere.
        template: Jinja chat template.
        require_question: refuse a conversation whose last message asks nothing.
        variables: passed on to the template (`add_generation_prompt`, `continue_final_message`, `system_prompt`, ...).

    Raises:
        ValueError: no messages, a malformed message, an empty question.
    """
    messages = list(getattr(messages, "messages", messages))
    if not messages:
        raise ValueError("the conversation is empty: give at least one message")
    videos, images, plain = [], [], []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must be a dict with 'role' and 'content', not {message!r:.100}")
        content = message["content"]
        if not isinstance(content, str):
            content = [_plain_part(part, videos, images) for part in content]
        plain.append({**message, "content": content})
    if require_question and not _text_of(plain[-1]).strip():
        raise ValueError("the question is empty: say what you want to know about the video")
    try:
        texts, spans = render_jinja_template(
            conversations=[plain], chat_template=template, return_assistant_tokens_mask=True, **variables
        )
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        raise
    return Chat(texts[0], [tuple(span) for span in spans[0]], videos, images)


def _plain_part(part: Any, videos: list[Any], images: list[Any]) -> dict[str, Any]:
    """One part of a message without its medium, which is appended to `videos` or `images` (None: a placeholder)."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    if kind == "video":
        videos.append(_source_of(part, ("video", "path", "url")))
        return {"type": "video"}
    if kind == "image":
        if part.get("base64") is not None:
            images.append(image_from_base64(part["base64"]))
        else:
            source = _source_of(part, ("image", "path", "url"))
            is_data = isinstance(source, str) and source.startswith("data:")
            images.append(image_from_base64(source.partition(",")[2]) if is_data else source)
        return {"type": "image"}
    raise ValueError(f"a part of a message must be of the type video, image or text, not {part!r:.100}")


def _source_of(part: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_from_base64(data: str) -> Image.Image:
    """Decode a base64 image.

    Raises:
        ValueError: not base64, or not an image.
    """
    try:
        return Image.open(BytesIO(base64.b64decode(data, validate=True)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"the base64 data of an image cannot be read ({error})") from error
