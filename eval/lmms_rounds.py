"""Requests of several rounds: the task looks at the answers so far and gives the next question, or an end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .answering import Answerer
from .lmms_requests import Job, Prompt, prompt_of_messages, prompt_of_visuals


def answer_rounds(answerer: Answerer, job: Job, document: Callable[[Job], Any]) -> list[str]:
    """Answers of all rounds. Each round is a question of its own: what the task wants remembered, it says again."""
    doc = document(job)
    outputs: list[str] = []
    told: Any = None
    prompt: Prompt | None = job.prompt(doc)
    while prompt is not None:
        this = replace(job, round=len(outputs))
        key = f"{answerer.key(job, prompt)}-{len(outputs)}"
        answerer.log.expect(this.place, key)
        if answerer.log.holds(key):
            answerer.reused += 1
        else:
            answerer.answer([(key, this, prompt)])
        outputs.append(answerer.log.answers[key]["answer"])
        prompt, told = _next(job, doc, outputs, told)
    return outputs


def _next(job: Job, doc: Any, outputs: list[str], told: Any) -> tuple[Prompt | None, Any]:
    """The next round's prompt (None: there is none), and what the task wants to be told then."""
    progress = {"round_idx": len(outputs), "previous_output": list(outputs), "previous_round_info": told}
    if job.is_chat:
        found = job.source(doc, **progress)
        if not isinstance(found, tuple) or len(found) != 4:
            return None, None
        messages, is_over, _, told = found
        return (None if is_over else prompt_of_messages(messages)), told
    visuals, text, is_over, _, told = job.rounds(doc, **progress)
    return (None if is_over else prompt_of_visuals(visuals, text)), told
