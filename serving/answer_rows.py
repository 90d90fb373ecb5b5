"""One answer being made: its settings, the text so far, and what is done to the model's scores for it.

Answers of different settings share a batch; `RowScores` treats each row as its own settings say.
Legend: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made; names and meaning are OpenAI's.

    Attributes:
        max_tokens: most tokens. temperature: 0 takes the likeliest token. seed: None draws anew each time.
        top_logprobs: None: no log-probabilities; else so many alternatives of each token.
        grammar: makes an `llguidance.LLMatcher` that every token has to please; None: any text.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    grammar: Callable[[], Any] | None = None


@dataclass
class Piece:
    """Text that is certain, and what is known of its tokens: `(id, log-probability, [(id, log-probability), ...])`."""

    text: str = ""
    tokens: list[tuple[int, float, list[tuple[int, float]]]] = field(default_factory=list)


class Ended(NamedTuple):
    """Why an answer ended ("stop" or "length"), and after how many tokens."""

    reason: str
    tokens: int


class AnswerRow:
    """A row of a batch; also the streamer that the decoding loop tells its tokens.

    Args:
        state: a `VideoState` of one row, which is not changed. prompt: ids that follow it.
        ends: ids that end an answer.
        deliver: called in the thread of the model with each `Piece` and, as the last thing, with `Ended` or an
            exception.

    Attributes:
        produced: tokens made that count. finished: nothing more is wanted of it; set it to give the answer up.
    """

    def __init__(
        self,
        state: Any,
        prompt: Sequence[int],
        settings: AnswerSettings,
        tokenizer: Any,
        ends: Sequence[int],
        deliver: Callable[[Piece | Ended | Exception], None],
    ):
        self.state, self.prompt, self.settings = state, list(prompt), settings
        self.produced = self.slices = 0
        self.finished = False
        self._tokenizer, self._ends, self._deliver = tokenizer, frozenset(ends), deliver
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = self._passed = self._held = ""  # shown; passed by, spaces at the beginning included; not yet
        self._matcher = settings.grammar() if settings.grammar is not None else None
        self._counts: Counter[int] = Counter()
        self._scored: tuple[Tensor, list[tuple[int, float]]] | None = None

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.settings.max_tokens - self.produced

    @property
    def slice_seed(self) -> int | None:
        """Seed of the next slice: of the answer's own seed and place alone, whoever shares the batch."""
        if self.settings.seed is None:
            return None
        digest = hashlib.blake2b(f"{self.settings.seed}:{self.slices}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken and nothing else is wanted: the model may then pick it itself."""
        s = self.settings
        return not (s.temperature > 0 or s.top_logprobs is not None or self._adjusts())

    def _adjusts(self) -> bool:
        s = self.settings
        return bool(s.logit_bias or s.frequency_penalty or s.presence_penalty or self._matcher is not None)

    def note_scores(self, logits: Tensor) -> None:
        """Remember the model's own log-probabilities (V,) of the next token, where they are wanted."""
        if self.settings.top_logprobs is None or self.finished:
            return
        logs = torch.log_softmax(logits.float(), dim=-1)
        best = logs.topk(self.settings.top_logprobs) if self.settings.top_logprobs else None
        pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self._scored = logs, pairs

    def adjusted(self, scores: Tensor) -> Tensor:
        """Scores (V,) after bias, penalties and grammar."""
        s = self.settings
        if self.finished or not self._adjusts():
            return scores
        changes = Counter(dict(s.logit_bias))
        for token, count in self._counts.items():
            changes[token] -= s.frequency_penalty * count + s.presence_penalty
        if changes:
            scores = scores.clone()
            index = torch.tensor(list(changes), device=scores.device)
            scores[index] += torch.tensor(list(changes.values()), dtype=scores.dtype, device=scores.device)
        if self._matcher is not None:
            bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
            masked = torch.full_like(scores, float("-inf"))
            allowed = allowed[: len(scores)].to(scores.device)
            masked[: len(allowed)] = torch.where(allowed, scores[: len(allowed)], masked[: len(allowed)])
            scores = masked
        return scores

    def put(self, token: Tensor) -> None:
        """The next token."""
        if self.finished:
            return
        number = int(token)
        self.produced += 1
        piece = Piece()
        if self._scored is not None:
            logs, pairs = self._scored
            piece.tokens.append((number, float(logs[number]), pairs))
            self._scored = None
        if number in self._ends:
            piece.tokens = []
            self._finish("stop", piece)
            return
        self._ids.append(number)
        self._counts[number] += 1
        if self._matcher is not None and not self._matcher.consume_token(number):
            self._fail(RuntimeError(self._matcher.get_error()))
            return
        self._held += self._stream.step(self._tokenizer.backend_tokenizer, number) or ""
        found = self._stop_found()
        if found is not None:
            self._held = self._held[:found]
            self._finish("stop", piece, whole=False)
        elif self._matcher is not None and self._matcher.is_stopped():
            self._finish("stop", piece)
        elif self.left <= 0:
            self._finish("length", piece)
        else:
            piece.text = self._release(len(self._held) - self._uncertain())
            if piece.text or piece.tokens:
                self._deliver(piece)

    def end(self) -> None:
        """The slice is over; the answer may not be."""

    def fail(self, error: Exception) -> None:
        """Nothing comes of it."""
        if not self.finished:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.finished = True
        self._deliver(error)

    def _finish(self, reason: str, piece: Piece, whole: bool = True) -> None:
        if whole:  # bytes that never became a character
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            known = self._passed + self._held
            self._held += text[len(known) :] if text.startswith(known) else ""
            found = self._stop_found()
            self._held, reason = (self._held, reason) if found is None else (self._held[:found], "stop")
        self._held = self._held.rstrip()
        piece.text = self._release(len(self._held))
        self.finished = True
        if piece.text or piece.tokens:
            self._deliver(piece)
        self._deliver(Ended(reason, self.produced))

    def _release(self, count: int) -> str:
        """The first so many characters that are held back; spaces before the first word are never shown."""
        text, self._held = self._held[:count], self._held[count:]
        self._passed += text
        shown = text if self._shown else text.lstrip()
        self._shown += shown
        return shown

    def _stop_found(self) -> int | None:
        places = [place for place in map(self._held.find, self.settings.stop) if place >= 0]
        return min(places, default=None)

    def _uncertain(self) -> int:
        """Characters at the end that may be the beginning of a stop string, and spaces, which may be the last."""
        held = self._held
        begun = (size for stop in self.settings.stop for size in range(1, len(stop)) if held.endswith(stop[:size]))
        return len(held) - len(held[: len(held) - max(begun, default=0)].rstrip())


class RowScores:
    """A logits processor that serves every row by its own settings, for decoding that draws.

    Rows whose temperature is 0 are left their likeliest token alone, which is then drawn for certain.
    """

    def __init__(self, rows: Sequence[AnswerRow | None], device: Any):
        """
        Args:
            rows: of the batch; None stands for one that nobody listens to.
        """
        self.rows = list(rows)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        chosen = [AnswerSettings(temperature=0.0) if row is None else row.settings for row in rows]
        self._greedy = column([s.temperature == 0 for s in chosen]).bool()
        self._temperature = column([s.temperature or 1.0 for s in chosen])
        self._top_p = column([max(s.top_p, 1e-6) for s in chosen])
        self._cuts = any(s.top_p < 1 and s.temperature > 0 for s in chosen)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) after everything that the rows' settings ask for."""
        changed = []
        for row, own in zip(self.rows, scores, strict=True):
            if row is not None:
                row.note_scores(own)
            changed.append(own if row is None else row.adjusted(own))
        scores = torch.stack(changed) / self._temperature
        best = scores.argmax(-1, keepdim=True)
        if self._cuts:  # tokens outside the smallest set of the likeliest that make up top_p
            sorted_scores, order = scores.sort(dim=-1, descending=True)
            before = sorted_scores.softmax(-1).cumsum(-1) - sorted_scores.softmax(-1)
            outside = (before >= self._top_p).scatter(-1, order, before >= self._top_p)
            scores = scores.masked_fill(outside & (self._top_p < 1), float("-inf"))
        alone = torch.full_like(scores, float("-inf")).scatter(-1, best, scores.gather(-1, best))
        return torch.where(self._greedy, alone, scores)
