"""lmms-eval's requests, of simple and of chat tasks, as one thing: what is shown, what is asked, how to answer.

The harness passes tuples whose layout depends on the kind of task, and a task of an own YAML folder is a simple one
even for chat models, so the layout is told by what stands where.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .media import Medium, media_of

_GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_PLACE_MARKS = ("<image>\n", "<image>", "<video>\n", "<video>")  # of pictures in a text: ours all come before it
_INJECTED_UNTIL = "\n\n"  # stands in every task that names no `until`; it would cut answers of several paragraphs


@dataclass(frozen=True)
class Prompt:
    """Media, all of which come first, and the messages that follow them; or, where media stand elsewhere, the `whole`
    conversation, which is read anew for each question."""

    media: tuple[Medium, ...]
    messages: list[dict[str, Any]]
    whole: bool = False

    def digest(self) -> str:
        """SHA-256 of all that is shown and said, whatever files are called."""

        def content(part: dict[str, Any]) -> Any:
            source = part.get(part["type"])
            if part["type"] == "text":
                return ["text", source]
            return [part["type"], Medium(source if isinstance(source, str) else (source,)).digest()]

        said = [[message["role"], [content(part) for part in message["content"]]] for message in self.messages]
        facts = [[medium.digest() for medium in self.media], said]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Job:
    """One request. `source` is the task's function that gives media (`doc_to_visual`) or messages."""

    task: str
    split: str
    doc_id: int
    context: str
    settings: dict[str, Any]
    source: Callable[..., Any]
    is_chat: bool
    rounds: Callable[..., Any] | None = None  # simple multi-round: the task's text of each round
    repeat: int = 0  # which of several answers to the same question, when answers are drawn
    round: int | None = None  # of a request of several rounds
    generation: dict[str, Any] = field(init=False)
    until: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.generation, self.until = _generation(self.settings)

    @property
    def place(self) -> tuple[str, int, int]:
        """Where the task will look for the answer."""
        return self.task, int(self.doc_id), self.round or 0

    def key(self, facts: Any) -> str:
        """Digest of the question and of `facts` about what is shown and who answers."""
        asked = [self.task, self.split, self.doc_id, self.context, self.generation, self.until, self.repeat]
        return hashlib.sha256(json.dumps([asked, facts], sort_keys=True, default=str).encode()).hexdigest()[:32]

    def prompt(self, doc: Any) -> Prompt:
        """What is shown and asked, from the task's document."""
        if self.is_chat:
            return prompt_of_messages(self.source(doc))
        return prompt_of_visuals(self.source(doc), self.context)


def job_of(request: Any) -> Job:
    """A `generate_until` or `generate_until_multi_round` request."""
    arguments = request.args
    if callable(arguments[1]):
        context, source, settings, doc_id, task, split = arguments
        return Job(task, split, doc_id, context, settings, source, is_chat=True)
    if callable(arguments[3]):
        context, settings, source, rounds, doc_id, task, split = arguments
        return Job(task, split, doc_id, context, settings, source, is_chat=False, rounds=rounds)
    context, settings, source, doc_id, task, split = arguments
    return Job(task, split, doc_id, context, settings, source, is_chat=False)


def is_padding(request: Any) -> bool:
    """Whether the harness made the request up, so that all ranks have as many."""
    return bool((request.metadata or {}).get("__padding_only__"))


def prompt_of_visuals(visuals: Any, text: str) -> Prompt:
    """Prompt of the simple interface: the media first, then `text` as one user turn."""
    content = [{"type": "text", "text": _unmarked(text)}]
    return Prompt(media_of(visuals or ()), [{"role": "user", "content": content}])


def prompt_of_messages(messages: Any) -> Prompt:
    """Of chat messages, as dicts or as lmms-eval's objects.

    Raises:
        TypeError: content of a kind that this model does not read.
    """
    plain = [_plain_message(message) for message in getattr(messages, "messages", messages)]
    places = [
        (i, j) for i, message in enumerate(plain) for j, part in enumerate(message["content"]) if "medium" in part
    ]
    first = plain[0]
    if first["role"] == "user" and places == [(0, j) for j in range(len(places))]:
        parts = first["content"]
        media: list[Medium] = []
        for part in parts[: len(places)]:
            medium = part["medium"]
            if medium.in_memory and media and media[-1].in_memory:  # pictures that follow one another: one video
                medium = Medium(media.pop().source + medium.source)
            media.append(medium)
        return Prompt(tuple(media), [{"role": "user", "content": parts[len(places) :]}, *plain[1:]])
    if any(part["medium"].start is not None or part["medium"].end is not None for part in _parts(plain)):
        raise TypeError("a part of a video is asked about, but not before all text: that is not supported")
    for part in _parts(plain):
        source = part.pop("medium").source
        part[part["type"]] = source[0] if isinstance(source, tuple) else source
    return Prompt((), plain, whole=True)


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"] if "medium" in part]


def _plain_message(message: Any) -> dict[str, Any]:
    message = message if isinstance(message, dict) else message.model_dump()
    content = message["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message["role"], "content": [_plain_part(part) for part in content]}


def _plain_part(part: Any) -> dict[str, Any]:
    part = part if isinstance(part, dict) else part.model_dump()
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": _unmarked(part["text"])}
    if kind not in ("video", "image"):
        raise TypeError(f"a message holds {kind}, which this model does not read")
    (medium,) = media_of([part["url"]])
    if part.get("start_time") is not None or part.get("end_time") is not None:
        medium = Medium(medium.source, part.get("start_time"), part.get("end_time"))
    return {"type": kind, "medium": medium}


def _unmarked(text: str) -> str:
    for mark in _PLACE_MARKS:
        text = text.replace(mark, "")
    return text


def _generation(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings for `generate()`, and the texts that end an answer."""
    chosen = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
    chosen["do_sample"] = bool(chosen.get("do_sample", (chosen.get("temperature") or 0) > 0))
    if not chosen.get("temperature"):
        chosen["do_sample"] = chosen["do_sample"] and "temperature" not in chosen
    if not chosen["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            chosen.pop(name, None)
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return chosen, [text for text in until if text and text != _INJECTED_UNTIL]
