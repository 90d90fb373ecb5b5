"""Answers about media that are read once; each answer is written down as soon as it is known."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..modeling_video_ma2mba.answering_batches import answer_together
from ..modeling_video_ma2mba.answering_questions import question_ids
from .answer_log import AnswerLog
from .grounding import grounded, in_seconds
from .lmms_requests import Job, Prompt
from .media import subtitles_digest
from .ranks import SHARE_FRAMES
from .state_store import StateStore

Asked = tuple[str, Job, Prompt]  # key, request, what it shows and asks


class Answerer:
    """Answers requests with one pipeline.

    Args:
        pipe: the pipeline. store: of states, made for `pipe`. log: of answers.
        stop_ngram: end an answer at a repeat of so many tokens; 0: never.
        batch: questions about the same media that are answered together.
        skip_broken: media that cannot be read give empty answers, with the reason in the log, instead of an error.
        share_frames: media of so many frames are read by all ranks together; 0: none.
    """

    def __init__(
        self,
        pipe: Any,
        store: StateStore,
        log: AnswerLog,
        stop_ngram: int = 5,
        batch: int = 8,
        skip_broken: bool = False,
        share_frames: int = SHARE_FRAMES,
    ):
        if stop_ngram:
            RepeatedNgramStop(stop_ngram)  # refuses a bad number now rather than at the first answer
        self.pipe, self.store, self.log = pipe, store, log
        self.stop_ngram, self.batch, self.skip_broken = stop_ngram, batch, skip_broken
        self.share_frames = share_frames
        self.announce: Callable[[str], None] | None = None  # told what a run will take, before it begins
        self.answered = self.reused = self.spared = self.output_tokens = 0
        self.seconds_answering = self.seconds_saved = 0.0

    def key(self, job: Job, prompt: Prompt) -> str:
        """By which an answer is found again: the question, the content of what is shown, the model's weights and how
        it looks at videos."""
        identity = self.pipe.identity()
        facts = [identity[name] for name in ("weights", "model_config", "processor", "dtype")]
        told = [subtitles_digest(medium) for medium in prompt.media] if self.store.reading.subtitles else []
        return job.key([prompt.digest(), *facts, self.store.reading.facts, self.stop_ngram, *told])

    def answer(self, asked: Sequence[Asked]) -> None:
        """Answer requests that all show the same media, `batch` at a time.

        Raises:
            ValueError, OSError: the media cannot be read, or an answer cannot be written.
        """
        if not asked:
            return
        media = asked[0][2].media
        if asked[0][2].whole or not media:
            for key, job, prompt in asked:
                self._note(key, job, prompt, *self._from_conversation(job, prompt))
            return
        read_before = self.store.tally.videos_read
        try:
            state = self.store.state(media)
        except (ValueError, OSError) as error:
            if not self.skip_broken:
                where = f"{asked[0][1].task}, document {asked[0][1].doc_id}"
                raise ValueError(f"{where}: {error} (answers so far are kept; broken=skip goes on without)") from error
            warnings.warn(f"{media[0].name} cannot be read, its answers stay empty: {error}", stacklevel=2)
            for key, job, prompt in asked:
                self._note(key, job, prompt, "", 0.0, 0, {"error": str(error)})
            return
        fresh = self.store.tally.videos_read - read_before
        self.spared += len(asked) - fresh
        self.seconds_saved += (len(asked) - fresh) * self.store.seconds(state)
        facts = {
            "frames": int(state.metadata["frames"]),
            "video_seconds": float(state.metadata["seconds"]),
            "read_seconds": round(self.store.seconds(state), 4),
        }
        for _, group in groupby(sorted(asked, key=_settings), key=_settings):
            members = list(group)
            for first in range(0, len(members), self.batch):
                part = members[first : first + self.batch]
                began = time.perf_counter()
                texts, sizes = self._ask(state, [prompt.messages for _, _, prompt in part], part[0][1].generation)
                seconds = (time.perf_counter() - began) / len(part)
                for (key, job, prompt), text, size in zip(part, texts, sizes, strict=True):
                    self._note(key, job, prompt, text, seconds, state.seen_tokens + size, facts)

    def answer_together(self, asked: Sequence[Asked], group: Any, rank: int, world: int) -> None:
        """`answer` by all ranks of a group, which share the reading and then the questions: each answers every
        `world`-th of them."""
        try:
            self.store.state(asked[0][2].media, group)
        except (ValueError, OSError):
            if not self.skip_broken:
                raise
        self.answer(asked[rank::world])  # from the state in memory, or with the reason why there is none

    def _ask(
        self, state: Any, conversations: Sequence[list[dict[str, Any]]], generation: dict[str, Any]
    ) -> tuple[list[str], list[int]]:
        """Answers to conversations that follow what `state` has seen, and the tokens of each conversation."""
        processor = self.pipe.processor
        asked = [grounded(processor, messages, question_of(messages)) for messages in conversations]
        ids = [question_ids(processor, messages) for messages, _ in asked]
        with self.pipe.device_placement(), torch.no_grad():
            found = answer_together(
                self.pipe.model,
                self.pipe.processor.tokenizer,
                [state] * len(ids),
                ids,
                **generation,
                **self._stopping(),
            )
        texts = [answers[0]["answer"] for answers in found]
        texts = [in_seconds(text) if spans else text for text, (_, spans) in zip(texts, asked, strict=True)]
        return texts, [row.shape[1] for row in ids]

    def _from_conversation(self, job: Job, prompt: Prompt) -> tuple[str, float, int, dict[str, Any]]:
        """For conversations without media, or with media in between, which are read anew for each."""
        began = time.perf_counter()
        (answer,) = self.pipe(prompt.messages, **self.store.reading.chosen, **job.generation, **self._stopping())
        return answer["answer"], time.perf_counter() - began, 0, {}

    def _stopping(self) -> dict[str, Any]:
        if not self.stop_ngram:
            return {}
        return {"stopping_criteria": StoppingCriteriaList([RepeatedNgramStop(self.stop_ngram)])}

    def _note(
        self, key: str, job: Job, prompt: Prompt, text: str, seconds: float, input_tokens: int, facts: dict[str, Any]
    ) -> None:
        for ending in job.until:
            text = text.split(ending)[0]
        text = text.strip()
        count = len(self.pipe.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        row = {"key": key, "task": job.task, "split": job.split, "doc_id": job.doc_id, "question": question(prompt)}
        row |= {} if job.round is None else {"round": job.round}
        row |= {"media": [medium.name for medium in prompt.media], "answer": text, **facts}
        row |= {"answer_seconds": round(seconds, 4), "input_tokens": input_tokens, "output_tokens": count}
        self.log.add(row)
        self.answered += 1
        self.output_tokens += count
        self.seconds_answering += seconds


def question(prompt: Prompt) -> str:
    """The text of the last message."""
    return question_of(prompt.messages)


def question_of(messages: Sequence[dict[str, Any]]) -> str:
    """The text of the last message of a conversation."""
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _settings(asked: Asked) -> str:
    return repr(sorted(asked[1].generation.items()))


class RepeatedNgramStop(StoppingCriteria):
    """The paper's rule: ends a row as soon as its latest `n` generated tokens already occurred, in this order, in the
    same answer.

    The prompt does not count. An object serves one call of `generate()`: it learns the prompt's length from the first
    token.
    """

    def __init__(self, n: int = 5):
        if n < 1:
            raise ValueError(f"stop_repeat_ngram={n}: must be at least 1, or 0 for no such rule")
        self.n = n
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Rows that end, bool (B,), for `input_ids` (B, prompt and generated tokens)."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1
        answer = input_ids[:, self._prompt :]
        if answer.shape[1] <= self.n:
            return torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
        windows = answer.unfold(1, self.n, 1)
        return (windows[:, :-1] == windows[:, -1:]).all(dim=-1).any(dim=-1)
