"""Who captions clips and writes questions: local checkpoints, or any server that speaks OpenAI's API."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...files.model_replies import UnusableReply, dictionaries, fewer_settings, spoken, whole_sentences
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
_PROBE = "Say hello."
_MARK = r"[ \t*_#>-]*(?:\d+[.)][ \t]*)?[*_]*\b"  # of a line, before its first word
_COLON = r"[*_ ]*\d*[*_ ]*:"
_PAIRS = (
    re.compile(rf"{_MARK}question{_COLON}(.+?)\s*{_MARK}answer{_COLON}(.+)", re.IGNORECASE | re.DOTALL),
    re.compile(rf"^{_MARK}q{_COLON}(.+?)\s*^{_MARK}a{_COLON}(.+)", re.IGNORECASE | re.DOTALL | re.MULTILINE),
)


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
    for found in dictionaries(text):
        values = {str(name).lower(): value for name, value in found.items()}
        if {"question", "answer"} & set(values):
            return _as_text(values.get("question")), _as_text(values.get("answer"))
    match = next(filter(None, (form.search(text) for form in _PAIRS)), None)
    return (match[1].strip("*_ \n"), match[2].strip("*_ \n")) if match else ("", "")


def _as_text(value: Any) -> str:
    """A value of JSON as somebody would answer."""
    if value is None:
        return ""
    return {True: "Yes", False: "No"}[value] if isinstance(value, bool) else str(value)


def _said(text: str, tokenizer: Any, most: int) -> str:
    """What a model in this process has said within `most` tokens, which may have cut it off."""
    text = spoken(text)
    if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= most:
        with contextlib.suppress(UnusableReply):
            return whole_sentences(text)  # where it writes sentences
    return text


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
        text = self.pipe.ask(state, CAPTION_REQUEST, max_new_tokens=_TOKENS["caption"])
        return _said(text, self.pipe.processor.tokenizer, _TOKENS["caption"])


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

    def generate(request: str, most: int) -> str:
        return _said(model.answer(nothing, request, processor, max_new_tokens=most), processor.tokenizer, most)

    return generate


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
    room = getattr(made.model.config.get_text_config(), "max_position_embeddings", None)

    def generate(request: str, most: int) -> str:
        chat = [{"role": "user", "content": request}]
        asked = made.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if room is not None and len(asked) + most > room:
            raise UnusableReply(f"with {len(asked)} tokens, the captions leave no room for an answer within {room}")
        text = made(chat, max_new_tokens=most, do_sample=False, return_full_text=False)[0]["generated_text"]
        return _said(text, made.tokenizer, most)

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
        self._schemas, self._settings = True, {"max_tokens": 0, "temperature": 0}
        self._understands: set[bool] = set()  # requests with pictures (True), and without, that it has answered
        try:
            self.model = model or self._client.with_options(max_retries=0).models.list().data[0].id
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self.address} does not answer ({error.__cause__ or error})") from None
        except (openai.APIStatusError, IndexError) as error:
            raise ConnectionError(f"{self.address} names no model ({error}): write {self.address}#MODEL") from None

    def caption(self, video: Path, begin: float, end: float) -> str:
        """A caption of the seconds `begin` to `end`, from up to ten frames."""
        frames = open_video(video, num_frames=_CLIP_FRAMES, start=begin, end=end).read().pixels
        parts = [_picture(frame) for frame in frames]
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
                return parse_pair(self._ask(request, _TOKENS["writing"], form))
            except _NoSchemas:
                self._schemas = False
        request = writing_request(cues, kind, "Write two lines: Question: … and Answer: …")
        return parse_pair(self._ask(request, _TOKENS["writing"]))

    def _ask(self, content: Any, tokens: int, form: dict[str, Any] | None = None) -> str:
        """What the model says.

        Raises:
            UnusableReply: nothing that could be used, to this request. ConnectionError: to no request.
        """
        try:
            made = self._complete(content, tokens, form)
        except UnusableReply as error:
            pictures = isinstance(content, list)
            probe: Any = {"type": "text", "text": _PROBE}
            probe = [_picture(np.full((64, 64, 3), 128, np.uint8)), probe] if pictures else _PROBE
            if pictures not in self._understands:  # is it this request, or all of them?
                try:
                    self._complete(probe, tokens, None)
                except UnusableReply:
                    what = "a grey picture" if pictures else "a plain question"
                    raise ConnectionError(f"{self.address} does not answer {what} either: {error}") from None
                self._understands.add(pictures)
            raise
        self._understands.add(isinstance(content, list))
        try:
            choice = made.choices[0]
            said = choice.message.content
        except (AttributeError, IndexError, TypeError):
            told = f"{getattr(made, 'error', None) or made!s:.200}"
            raise ConnectionError(f"{self.address} gives no chat completion: {told}") from None
        if isinstance(said, list):  # parts, of which some servers make an answer
            said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
        if not said:
            told = getattr(choice.message, "refusal", None) or f"it ends with {choice.finish_reason!r}"
            raise UnusableReply(f"the model says nothing: {told}")
        said = spoken(said)
        return whole_sentences(said) if choice.finish_reason == "length" else said

    def _complete(self, content: Any, tokens: int, form: dict[str, Any] | None) -> Any:
        """The server's answer, asked in the settings that it knows."""
        settings = {**self._settings, **({"response_format": form} if form else {})}
        messages: Any = [{"role": "user", "content": content}]
        while True:
            given = {name: tokens if name.startswith("max_") else value for name, value in settings.items()}
            try:
                return self._client.chat.completions.create(model=self.model, messages=messages, **given)
            except (self._errors.BadRequestError, self._errors.UnprocessableEntityError) as error:
                fewer = fewer_settings(settings, str(error))
                if form and (fewer is None or "response_format" not in fewer):
                    raise _NoSchemas from None
                if fewer is None:
                    raise UnusableReply(f"the server refuses the request: {error}") from None
                settings = fewer
                self._settings = {name: value for name, value in fewer.items() if name != "response_format"}
            except self._errors.OpenAIError as error:
                raise ConnectionError(f"{self.address}: {error}; the same command goes on from here") from None


class _NoSchemas(Exception):
    """A server that knows no schemas, or refuses a request that has one."""


def _picture(frame: Any) -> dict[str, Any]:
    """Part of a message: a frame, uint8 (h, w, 3), as JPEG."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
