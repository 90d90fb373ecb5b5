"""The thread that answers: all questions that wait are decoded together, and new ones join within a few tokens.

Answers are made in slices of a few tokens. Before each, questions that came meanwhile read their prompts and make
their first `FIRST_SLICE` tokens (many answers have no more) in a batch of their own, and then join the others; whoever
has ended, or gone away, leaves. So a short question never waits for the end of a long answer, and readings of videos
take their turns in between.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..modeling_video_ma2mba.decode_loop import decode
from ..modeling_video_ma2mba.decode_settings import end_tokens, settled
from ..streaming.turns import Turns
from .answer_rows import AnswerRow, AnswerSettings, Ended, Piece, RowScores
from .errors import TooMany, Unavailable

FIRST_SLICE, SLICE = 4, 8
_BUCKETS = (1, 8, 64)
"""Sizes of batches for which CUDA graphs are captured; a batch in between is filled up."""


class StateCache:
    """States that were asked lately, where the model computes; the bytes of all are bounded.

    Args:
        most_bytes: the state used last stays even if it is larger.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._states: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int], load: Callable[[], Any]) -> Any:
        """The state of a video in a version, loaded if need be. Raises what `load` raises."""
        with self._lock:
            if key in self._states:
                self._states.move_to_end(key)
                return self._states[key]
        state = load()
        self.put(key, state)
        return state

    def put(self, key: tuple[str, int], state: Any) -> None:
        """Keep a state; earlier versions of it go."""
        with self._lock:
            for old in [old for old in self._states if old[0] == key[0]]:
                del self._states[old]
            self._states[key] = state
            while len(self._states) > 1 and sum(kept.nbytes for kept in self._states.values()) > self.most_bytes:
                self._states.popitem(last=False)

    def forget(self, video_id: str) -> None:
        """Drop a video's state."""
        with self._lock:
            for old in [old for old in self._states if old[0] == video_id]:
                del self._states[old]


class Answerer:
    """Answers questions about states, many at a time.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`. tokenizer: its own, a fast one.
        turns: shared with whoever else uses the model.
        most_rows: answers made at once. most_waiting: questions that may wait besides.
        buckets: sizes that batches are filled up to (default: on CUDA, those whose graphs are kept).
        batched: called with the number of rows of each slice.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        turns: Turns,
        *,
        most_rows: int = 64,
        most_waiting: int = 256,
        buckets: Sequence[int] | None = None,
        batched: Callable[[int], None] = lambda rows: None,
    ):
        self.model, self.tokenizer, self.turns = model, tokenizer, turns
        self.most_rows, self.most_waiting, self._batched = most_rows, most_waiting, batched
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.config, _ = settled(model.generation_config, None, {"pad_token_id": pad, "num_return_sequences": 1})
        self.ends = end_tokens(self.config)
        self.buckets = (_BUCKETS if model.device.type == "cuda" else ()) if buckets is None else buckets
        model.decoders_kept, model.decoders_share = len(_BUCKETS), 0.25
        self._waiting: deque[AnswerRow] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._joint: tuple[list[AnswerRow], Any] | None = None  # rows of the last slice, and their state
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="answerer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that nobody works at yet."""
        return len(self._waiting)

    def check_room(self, rows: int) -> None:
        """See that so many questions can be taken.

        Raises:
            TooMany: the queue is full. Unavailable: the server is stopping.
        """
        if self._closing:
            raise Unavailable("the server is stopping: ask again in a moment")
        if len(self._waiting) + rows > self.most_waiting:
            raise TooMany(f"{len(self._waiting)} questions wait to be answered already: ask again in a moment")

    def ask(
        self,
        state: Any,
        prompt: Sequence[int],
        settings: Sequence[AnswerSettings],
        deliver: Callable[[int, Piece | Ended | Exception], None],
    ) -> list[AnswerRow]:
        """Queue an answer of each settings to one prompt.

        Args:
            state: a `VideoState` of one row. prompt: ids that follow it.
            deliver: called from another thread with the number of the answer and what `AnswerRow` delivers.

        Returns:
            The rows; set their `finished` to give them up.

        Raises:
            TooMany, Unavailable.
        """
        rows = [
            AnswerRow(state, prompt, own, self.tokenizer, self.ends, lambda what, n=number: deliver(n, what))
            for number, own in enumerate(settings)
        ]
        with self._changed:
            self.check_room(len(rows))
            self._waiting.extend(rows)
            self._changed.notify()
        return rows

    def close(self, seconds: float = 30.0) -> None:
        """Finish what was begun, take nothing new."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        running: list[AnswerRow] = []
        while not (self._closing and not running and not self._waiting):
            fresh = [row for row in self._taken(len(running)) if not row.finished]
            self.running = len(running) + len(fresh)
            if fresh:
                self._slice(fresh)
            joined = self._alive(running + fresh)
            if running and joined:
                self._slice(joined)
            running = self._alive(joined)
            self.running = len(running)

    def _taken(self, running: int) -> list[AnswerRow]:
        """Questions for which there is room, if any wait; with no answers running, as soon as there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or running or self._closing)
            room = min(len(self._waiting), self.most_rows - running)
            return [self._waiting.popleft() for _ in range(max(0, room))]

    def _alive(self, rows: list[AnswerRow]) -> list[AnswerRow]:
        return [row for row in rows if not row.finished]

    def _slice(self, rows: list[AnswerRow]) -> None:
        """The next tokens of some answers."""
        before = [row.produced for row in rows]
        try:
            with self.turns.turn():
                self._decode(rows)
        except torch.OutOfMemoryError as error:
            self._joint = None
            if len(rows) == 1 or [row.produced for row in rows] != before:
                for row in rows:
                    row.fail(error)
                return
            self.most_rows = len(rows) // 2
            self._slice(rows[: self.most_rows])
            self._slice(rows[self.most_rows :])
        except Exception as error:
            self._joint = None
            for row in rows:
                row.fail(error)

    def _decode(self, rows: list[AnswerRow]) -> None:
        self._batched(len(rows))
        device = self.model.device
        everyone: list[AnswerRow | None] = list(rows)
        size = next((bucket for bucket in self.buckets if bucket >= len(rows)), len(rows))
        everyone += [None] * (size - len(rows))
        first = rows[0]
        filled = [first if row is None else row for row in everyone]
        if self._joint is not None and len(self._joint[0]) == len(rows) and all(map(_same, self._joint[0], rows)):
            states: Any = self._joint[1]
        else:
            states = [row.state for row in filled]
        self._joint = None
        longest = max(len(row.prompt) for row in rows)
        ids = torch.full((len(filled), longest), self.config.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(filled), longest, dtype=torch.long)
        for place, row in enumerate(filled):
            ids[place, longest - len(row.prompt) :], mask[place, longest - len(row.prompt) :] = (
                torch.tensor(row.prompt),
                1,
            )
        plain = all(row.is_plain for row in rows)
        config, _ = settled(
            self.config,
            None,
            {
                "max_new_tokens": max(1, min(SLICE if rows[0].slices else FIRST_SLICE, max(row.left for row in rows))),
                **(
                    {"do_sample": False}
                    if plain
                    else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                ),
            },
        )
        found = decode(
            self.model,
            states,
            ids,
            config,
            mask=mask if int(mask.min()) == 0 else None,
            processors=() if plain else (RowScores(everyone, device),),
            streamer=everyone,
            seed=None if plain else [row.slice_seed for row in filled],
            keep_state=True,
        )
        for place, row in enumerate(rows):
            row.slices += 1
            row.prompt = found.tokens[place, found.lengths[place] - 1 :][:1].tolist()
            row.state = found.state.select(slice(place, place + 1))
        self._joint = list(rows), found.state


def _same(one: Any, other: Any) -> bool:
    return one is other
