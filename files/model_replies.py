"""What language models reply that are asked by a program: answers among thoughts, values among words."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_THOUGHT = r"(?:think|thinking|thought|reasoning)"


class UnusableReply(ValueError):
    """What a model has said cannot be used, or it says nothing: why."""


def spoken(text: str) -> str:
    """What a model says, without what it thinks aloud before that.

    Raises:
        UnusableReply: it has not come to an end with thinking.
    """
    text = re.split(rf"</{_THOUGHT}>", text)[-1]
    if re.match(rf"\s*<{_THOUGHT}>", text):
        raise UnusableReply("it was still thinking when its tokens were used up")
    return text.strip()


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to its last whole sentence.

    Raises:
        UnusableReply: it has none.
    """
    ends = [match.end() for match in re.finditer(r"[.!?。！？]['\"”)]*(?=\s|$)", text)]
    if not ends:
        raise UnusableReply("it was cut off before the end of its first sentence")
    return text[: ends[-1]]


def dictionaries(text: str) -> Iterator[dict[Any, Any]]:
    """Dictionaries that stand in a text, of JSON or of Python, in order."""
    end = 0
    for match in re.finditer(r"\{", text):
        if match.start() < end:
            continue
        for length, found in _from(text[match.start() :]):
            if isinstance(found, dict):
                end = match.start() + length
                yield found
                break


def _from(text: str) -> Iterator[tuple[int, Any]]:
    """Values that the beginning of a text may be, with their lengths: JSON first, then Python's from the shortest."""
    try:
        found, length = json.JSONDecoder().raw_decode(text)
        yield length, found
    except ValueError:
        pass
    for match in re.finditer(r"\}", text[:4000]):
        try:
            yield match.end(), ast.literal_eval(text[: match.end()])
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            continue


def fewer_settings(settings: Mapping[str, Any], complaint: str) -> dict[str, Any] | None:
    """Settings of a chat completion without what a server complains about, or under the name that it wants; None where
    it complains about none of them."""
    if "max_tokens" in settings and "max_completion_tokens" in complaint:
        return {("max_completion_tokens" if name == "max_tokens" else name): value for name, value in settings.items()}
    blamed = [name for name in settings if re.search(rf"\b{name}\b", complaint)]
    return {name: value for name, value in settings.items() if name not in blamed} if blamed else None
