"""Who captions clips and writes questions: local checkpoints, or any server that speaks OpenAI's API."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ...modeling_video_ma2mba.state_video import VideoState
from ...processing.frame_times import Cue
from ...processing.video_reader import open_video
from .long_videos import LONGEST, QUESTION_KINDS, SUMMARY, captions_text

CAPTION_REQUEST = "Describe in one or two sentences what is seen, what happens, and any text that can be read."
_SCHEMA = {
    "type": "object",
    "properties": {
        "question": {"type": "string", "maxLength": LONGEST["question"]},
        "answer": {"type": "string", "maxLength": LONGEST["answer"]},
    },
    "required": ["question", "answer"],
    "additionalProperties": False,
}
_TOKENS = {"caption": 128, "writing": 512}
_CLIP_FRAMES = 10


def is_endpoint(name: str) -> bool:
    """Whether a model is named by the address of a server, `http://HOST:PORT/v1`, with or without `#MODEL`."""
    return name.startswith(("http://", "https://"))


def writing_request(cues: Sequence[Cue], kind: str, shape: str) -> str:
    """What a writer is asked."""
    told = "These captions, each of a few seconds, describe a video from its beginning to its end:\n\n"
    told += f"{captions_text(cues)}\n\n"
    rules = "Write as somebody who has watched the video: speak of the video, never of captions or clips. "
    if kind == SUMMARY:
        return f"{told}{rules}Summarize the video in a few sentences. Write the summary and nothing else."
    return (
        f"{told}{rules}Write one question about {QUESTION_KINDS[kind]}, which the captions answer for certain, and "
        f"its answer. {shape}"
    )


def parse_pair(text: str) -> tuple[str, str]:
    """Question and answer that a writer wrote: JSON, or lines that begin with Question: and Answer:. Empty: none."""
    if match := re.search(r"\{.*\}", text, re.DOTALL):
        try:
            found = json.loads(match[0])
            return str(found.get("question") or ""), str(found.get("answer") or "")
        except ValueError:
            pass
    match = re.search(r"question\s*:\s*(.+?)\s*\banswer\s*:\s*(.+)", text, re.IGNORECASE | re.DOTALL)
    return (match[1], match[2]) if match else ("", "")


class LocalCaptioner:
    """A Video-Ma2mba checkpoint that describes clips.

    Args:
        pipe: the question-answering pipeline.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe

    def __call__(self, video: Path, begin: float, end: float) -> str:
        """A caption of the seconds `begin` to `end`."""
        state = self.pipe.read(str(video), start=begin, end=end)
        return self.pipe.ask(state, CAPTION_REQUEST, max_new_tokens=_TOKENS["caption"])


class LocalWriter:
    """A language model that writes from captions.

    Args:
        generate: from a request and the most tokens to what the model says; see `text_generator`.
    """

    def __init__(self, generate: Callable[[str, int], str]):
        self.generate = generate

    def __call__(self, video: Path, cues: Sequence[Cue], kind: str) -> tuple[str, str]:
        """A question and its answer."""
        request = writing_request(cues, kind, "Write two lines: Question: … and Answer: …")
        text = self.generate(request, _TOKENS["writing"])
        return ("", text) if kind == SUMMARY else parse_pair(text)


def blind_generator(model: Any, processor: Any) -> Callable[[str, int], str]:
    """As `text_generator`, of a Video-Ma2mba model that is loaded: it answers without having seen anything."""
    nothing = VideoState.zeros(model.config.text_config, 1, model.device, model.dtype)
    return lambda request, most: model.answer(nothing, request, processor, max_new_tokens=most)


def text_generator(model: str, device: Any, dtype: Any, trust_remote_code: bool = False) -> Callable[[str, int], str]:
    """A language model of a directory or the Hub: any of transformers that chats, or a Video-Ma2mba model.

    Raises:
        ValueError: it has no chat template.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    if AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).model_type == "video_ma2mba":
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code)
        return blind_generator(loaded.to(device).eval(), AutoProcessor.from_pretrained(model))
    made = pipeline("text-generation", model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if made.tokenizer is None or made.tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template: name a model that is made for conversations")

    def generate(request: str, most: int) -> str:
        chat = [{"role": "user", "content": request}]
        return made(chat, max_new_tokens=most, do_sample=False, return_full_text=False)[0]["generated_text"]

    return generate


class Endpoint:
    """A model behind OpenAI's API, as captioner (of frames as pictures) and as writer.

    Args:
        address: `http://HOST:PORT/v1`, with `#MODEL` where the server has several.
        key: None takes what the environment says (OPENAI_API_KEY), if it does.

    Raises:
        ImportError: the `openai` package is missing. ConnectionError: nobody answers there.
    """

    def __init__(self, address: str, key: str | None = None):
        try:
            import openai
        except ImportError:
            raise ImportError("a model behind an address needs the openai package: pip install openai") from None
        import os

        self._errors = openai
        self.address, _, model = address.partition("#")
        key = key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=self.address, api_key=key, max_retries=4, timeout=600.0)
        self._schemas = True
        try:
            self.model = model or self._client.with_options(max_retries=0).models.list().data[0].id
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self.address} does not answer ({error.__cause__ or error})") from None
        except (openai.APIStatusError, IndexError) as error:
            raise ConnectionError(f"{self.address} names no model ({error}): write {self.address}#MODEL") from None

    def caption(self, video: Path, begin: float, end: float) -> str:
        """A caption of the seconds `begin` to `end`, from up to ten frames."""
        frames = open_video(video, num_frames=_CLIP_FRAMES, start=begin, end=end).read().pixels
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _jpeg(frame)}} for frame in frames]
        request = f"These are frames of a clip, in order. {CAPTION_REQUEST}"
        return self._ask([*parts, {"type": "text", "text": request}], _TOKENS["caption"])

    def write(self, video: Path, cues: Sequence[Cue], kind: str) -> tuple[str, str]:
        """A question and its answer."""
        if kind == SUMMARY:
            return "", self._ask(writing_request(cues, kind, ""), _TOKENS["writing"])
        if self._schemas:
            form = {"type": "json_schema", "json_schema": {"name": "question", "strict": True, "schema": _SCHEMA}}
            request = writing_request(cues, kind, 'Write JSON: {"question": …, "answer": …}')
            try:
                return parse_pair(self._ask(request, _TOKENS["writing"], response_format=form))
            except self._errors.BadRequestError:
                self._schemas = False  # a server that knows no schemas
        request = writing_request(cues, kind, "Write two lines: Question: … and Answer: …")
        return parse_pair(self._ask(request, _TOKENS["writing"]))

    def _ask(self, content: Any, tokens: int, **settings: Any) -> str:
        messages: Any = [{"role": "user", "content": content}]
        try:
            made = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=tokens, **settings
            )
        except self._errors.BadRequestError:
            if settings:
                raise
            return ""  # what it refuses to look at or to speak of is refused here, too
        except self._errors.OpenAIError as error:
            raise ConnectionError(f"{self.address}: {error}; the same command goes on from here") from None
        return made.choices[0].message.content or ""


def _jpeg(frame: Any) -> str:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
