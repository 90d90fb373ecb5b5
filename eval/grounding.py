"""Tasks that ask when something happens: their questions and answers in the form that a model with times was taught.

Such tasks want `The event happens in the 24.3 - 30.4 seconds`, a model that reads time stamps says `[0:24.3-0:30.4]`.
"""

from __future__ import annotations

import re
from typing import Any

from ..processing.frame_times import parse_span

_ASKS_SPAN = re.compile(r"start(?:ing)?\b[^.?!]{0,12}\band\b[^.?!]{0,6}\bend(?:ing)?\b[^.?!]{0,4}\btimes?\b", re.I)


def asks_span(text: str) -> bool:
    """Whether a question asks for "its starting and ending times" ("start time and end time")."""
    return _ASKS_SPAN.search(text) is not None


def grounded(processor: Any, messages: list[dict[str, Any]], text: str) -> tuple[list[dict[str, Any]], bool]:
    """The conversation as it is to be asked, and whether its answer is a span; `text` is its last question."""
    wants = processor.frame_times != "none" and asks_span(text)
    return (processor.times_question(messages), True) if wants else (messages, False)


def in_seconds(answer: str) -> str:
    """An answer that ends in a span, as these tasks read it; any other as it is."""
    found = parse_span(answer)
    return answer if found is None else f"The event happens in the {found[1]:.1f} - {found[2]:.1f} seconds."
