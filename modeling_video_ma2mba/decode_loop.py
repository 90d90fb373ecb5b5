"""The one loop by which our own verbs make tokens: from states and prompts to answers, with or without CUDA graphs.

It gives the tokens of `generate()` for the same settings and, where it draws them, the same random numbers; but it
knows nothing of transformers' loop. Legend: B rows, S prompt tokens, T new tokens, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .decode_graph import LONGEST_PROMPT, Decoder, borrow_decoder, release_decoders
from .decode_settings import Prompt, criteria_of, end_tokens, pad_token, processors_of
from .stack_token_layout import TokenLayout
from .stack_weights import execution_device
from .state_outputs import CACHE_NAME
from .state_video import VideoState

_LARGEST_PROMPT_BATCH = 4096  # tokens; beyond that a pass through the model is no slower than a graph


class FastDecodingMixin:
    """How a model decodes.

    Attributes:
        fast_decoding: on CUDA, decode by graphs (`decode_graph`) where the model allows it.
        decode_slots: tokens after which a state is written down while decoding (None: 1, or 16 in large batches).
        decode_state_dtype: in what it is kept while decoding; 16 bits make large batches faster and less exact.
        decoders_kept: batch sizes whose buffers and graphs stay for the next answer (None: 2).
        decoders_share: share of the GPU's memory that their buffers may take (None: a tenth).
    """

    fast_decoding = True
    decode_slots: int | None = None
    decode_state_dtype = torch.float32
    decoders_kept: int | None = None
    decoders_share: float | None = None

    def release_decoders(self) -> None:
        """Free the buffers and graphs kept for the next answers."""
        release_decoders(self)


@dataclass
class Decoded:
    """What a run made.

    Attributes:
        tokens: (B, T) int64 on the host, padded behind each row's end.
        lengths: tokens of each row, the ending one included.
        ended: for each row whether something else than the length ended it.
        log_probabilities: (B, T) of the tokens under the model's own distribution, before any processor; or None.
        scores, logits: T tensors (B, V) after and before the processors, where the configuration asks for them.
        state: after the last token that was read: all but each row's last one.
    """

    tokens: Tensor
    lengths: list[int]
    ended: list[bool]
    log_probabilities: Tensor | None
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    state: VideoState


def decode(
    model: Any,
    states: VideoState | Sequence[VideoState],
    ids: Tensor,
    config: GenerationConfig,
    *,
    mask: Tensor | None = None,
    processors: Sequence[Any] = (),
    criteria: Sequence[Any] = (),
    allowed: Callable[[int, Tensor], list[int]] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    seed: int | Sequence[int | None] | None = None,
    log_probabilities: bool = False,
    keep_state: bool = False,
) -> Decoded:
    """Continue states by prompts, one row each.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`.
        states: one of a single row for each prompt (the same one may come several times), or one of B rows. They stay
            as they are.
        ids: (B, S) token ids of what follows the states, padded on the left; mask: (B, S), 1 on real tokens.
        config: settings, complete (`decode_settings.settled`); `decode_settings.unsupported_settings` names those that
            this loop cannot honour. With `num_return_sequences` n every row becomes n rows, next to each other.
        processors, criteria, allowed: the caller's logits processors, stopping criteria and
            `prefix_allowed_tokens_fn`, as `generate()` takes them.
        tokenizer: needed by `stop_strings`.
        streamer: a transformers streamer, told the prompt and the tokens as `generate()` does; or a sequence of
            them, one a row (None: nobody listens), each of which gets its row's new tokens, and its `end()` with them.
        seed: draw the tokens from a generator of this seed instead of torch's; or one seed a row, whose tokens then
            do not depend on the other rows.
        log_probabilities: compute them.
        keep_state: whether the state of the result is wanted; else it need not be the one after the last token.

    Raises:
        ValueError: sizes that do not fit.
    """
    device = execution_device(model.get_input_embeddings())
    ids = ids.to(device)
    mask = None if mask is None else mask.to(device)
    copies = config.num_return_sequences or 1
    if copies > 1:
        ids = ids.repeat_interleave(copies, dim=0)
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
    rows, tokens = ids.shape
    state = one_state(model, states)
    if state.batch_size * copies != rows:
        raise ValueError(f"there are states for {state.batch_size} rows, and prompts for {rows // copies}")
    if copies > 1:
        state.batch_repeat_interleave(copies)
    # What a processor counts must not depend on how far the batch was padded: no answer holds a placeholder.
    history = ids if mask is None else ids.masked_fill(mask[:, -tokens:] == 0, model.config.video_token_id)
    ends = end_tokens(config)
    prompt = Prompt(
        tokens=tokens,
        device=device,
        ends=torch.tensor(ends, device=device) if ends else None,
        longest=tokens + config.max_new_tokens if config.max_new_tokens is not None else config.max_length,
        vocabulary=model.config.text_config.vocab_size,
    )
    if prompt.longest <= tokens:
        raise ValueError(
            f"max_length={config.max_length} leaves no room behind a question of {tokens} tokens: set max_new_tokens"
        )
    decoding = Decoding(
        model,
        state,
        config,
        processors=processors_of(config, prompt, processors, allowed),
        criteria=criteria_of(config, prompt, tokenizer, criteria),
        streamer=streamer,
        seed=seed,
        log_probabilities=log_probabilities,
        keep_state=keep_state,
    )
    if decoding.streamer is not None:
        decoding.streamer.put(ids.cpu())
    return decoding.run(ids, mask, history=history)


class Decoding:
    """One run of the loop over processors and criteria that exist already."""

    def __init__(
        self,
        model: Any,
        state: VideoState,
        config: GenerationConfig,
        *,
        processors: Any,
        criteria: Any,
        streamer: Any = None,
        seed: int | Sequence[int | None] | None = None,
        log_probabilities: bool = False,
        keep_state: bool = True,
    ) -> None:
        """
        Args:
            state: as many rows as there are prompts; it moves on with them.
            streamer, seed, log_probabilities: see `decode`.
            keep_state: whether somebody wants the state afterwards. Else what is read twice need not be kept twice: a
                large batch's states are large.
        """
        self.model, self.state, self.config = model, state, config
        self.processors, self.criteria = processors, criteria
        self.streams = streamer if isinstance(streamer, list | tuple) else None
        self.streamer = None if self.streams is not None else streamer
        self.seed, self.wants_log_probabilities, self.keep_state = seed, log_probabilities, keep_state
        self.pad = pad_token(config)
        self.wants_scores = bool(config.return_dict_in_generate and config.output_scores)
        self.wants_logits = bool(config.return_dict_in_generate and config.output_logits)

    @torch.no_grad()
    def run(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        *,
        history: Tensor,
        embeds: Tensor | None = None,
        videos: dict[str, Any] | None = None,
    ) -> Decoded:
        """Read the prompts and decode.

        Args:
            ids: (B, S) new tokens, or embeds: (B, S, D). mask: (B, at least S).
            history: (B, any) what processors and criteria see before the new tokens.
            videos: arguments of the forward pass that reads the prompts.
        """
        with self._steps(history) as steps:
            steps.read(ids, embeds, mask, videos or {})
            ends = None if self.config.do_sample or len(self.processors) else self._known_ends()
            wants = self.wants_scores or self.wants_logits or self.wants_log_probabilities
            if ends is None or wants:
                found = self._step_by_step(steps, history)
            else:
                found = self._greedily(steps, history, ends)
            if self.streamer is not None:
                self.streamer.end()
            if self.keep_state:
                steps.write_back()
        return found

    @contextlib.contextmanager
    def _steps(self, history: Tensor) -> Iterator["_ForwardSteps"]:
        longest = getattr(self.criteria, "max_length", None)
        if longest is None:
            yield _ForwardSteps(self.model, self.state)
            return
        with borrow_decoder(self.model, history.shape[0], longest - history.shape[1]) as decoder:
            if decoder is None:
                yield _ForwardSteps(self.model, self.state)
            else:
                yield _DecoderSteps(self.model, self.state, decoder, self.keep_state, self.config.prefill_chunk_size)

    def _known_ends(self) -> set[int] | None:
        """The ids that end a row, where nothing but these and the length ends it; else None."""
        ends: set[int] = set()
        for criterion in self.criteria:
            name = type(criterion).__name__
            if name == "EosTokenCriteria":
                ends |= set(criterion.eos_token_id.flatten().tolist())
            elif name != "MaxLengthCriteria":
                return None
        return ends if self.criteria.max_length is not None else None

    def _greedily(self, steps: "_ForwardSteps", history: Tensor, ends: set[int]) -> Decoded:
        """The decoder picks the tokens; the host only looks whether to go on."""
        rows = history.shape[0]
        most = self.criteria.max_length - history.shape[1]
        columns: list[list[int]] = []
        going = [True] * rows
        lengths = [0] * rows
        pad = self.pad or 0  # where there are ends, there is one
        while True:
            picked = steps.likeliest()
            if not all(going):
                picked = [token if goes else pad for token, goes in zip(picked, going, strict=True)]
            columns.append(picked)
            before = going
            lengths = [length + goes for length, goes in zip(lengths, going, strict=True)]
            going = [goes and token not in ends for token, goes in zip(picked, going, strict=True)]
            more = any(going) and len(columns) < most
            if more:
                steps.advance(picked)
            self._tell(picked, before, going if more else [False] * rows)  # while the GPU works on the next token
            if not more:
                break
        ended = [not goes for goes in going]
        return Decoded(torch.tensor(columns).T, lengths, ended, None, None, None, self.state)

    def _step_by_step(self, steps: "_ForwardSteps", history: Tensor) -> Decoded:
        """As transformers does it: processors, sampling and criteria see every token."""
        device, rows, start = history.device, history.shape[0], history.shape[1]
        stops_rows = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        going = torch.ones(rows, dtype=torch.bool, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        longest = getattr(self.criteria, "max_length", None)
        scores_kept, logits_kept, chosen = [], [], []
        draw = _drawing(self.seed, rows, device) if self.config.do_sample else None
        while True:
            logits = steps.logits().to(device, torch.float32, copy=True)
            scores = self.processors(history, logits)
            if self.wants_scores:
                scores_kept.append(scores)
            if self.wants_logits:
                logits_kept.append(logits)
            picked = scores.argmax(-1) if draw is None else draw(torch.softmax(scores, dim=-1))
            if stops_rows and self.pad is not None:
                picked = torch.where(going, picked, self.pad)
            if self.wants_log_probabilities:
                chosen.append(torch.log_softmax(logits, dim=-1).gather(1, picked[:, None])[:, 0])
            history = torch.cat([history, picked[:, None]], dim=1)
            before, lengths = going, lengths + going
            going = going & ~self.criteria(history, tuple(scores_kept) or None)
            more = bool(going.any())
            if self.streams is not None:
                self._tell(picked.tolist(), before.tolist(), going.tolist())
            elif self.streamer is not None:
                self.streamer.put(picked.cpu())
            if not more:
                break
            steps.advance(picked)
        tokens, count = history[:, start:].cpu(), lengths.tolist()
        new, ends = tokens.tolist(), set(end_tokens(self.config))
        return Decoded(
            tokens=tokens,
            lengths=count,
            ended=[
                longest is None or start + n < longest or row[n - 1] in ends for n, row in zip(count, new, strict=True)
            ],
            log_probabilities=torch.stack(chosen, dim=1).cpu() if chosen else None,
            scores=tuple(scores_kept) if self.wants_scores else None,
            logits=tuple(logits_kept) if self.wants_logits else None,
            state=self.state,
        )

    def _tell(self, picked: list[int], before: list[bool], after: list[bool]) -> None:
        """Hand tokens to whoever listens: `before` and `after` them, rows that had not ended."""
        if self.streamer is not None:
            self.streamer.put(torch.tensor(picked))
        for row, stream in enumerate(self.streams or ()):
            if stream is None or not before[row]:
                continue
            stream.put(torch.tensor(picked[row : row + 1]))
            if not after[row]:
                stream.end()


class _ForwardSteps:
    """A forward pass of the model for every token."""

    def __init__(self, model: Any, state: VideoState) -> None:
        self.model, self.state = model, state
        self._logits = torch.empty(0)  # until something was read

    def read(self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, videos: dict[str, Any]) -> None:
        device = execution_device(self.model.get_input_embeddings())
        prompt = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        given = {name: value.to(device) for name, value in prompt.items() if value is not None}
        self._forward(**given, attention_mask=mask, **videos)

    def _forward(self, **arguments: Any) -> None:
        outputs = self.model(**arguments, **{CACHE_NAME: self.state}, use_cache=True, logits_to_keep=1)
        self._logits = outputs.logits[:, -1]

    def logits(self) -> Tensor:
        """(B, V) behind the last token read."""
        return self._logits

    def likeliest(self) -> list[int]:
        return self._logits.argmax(-1).tolist()

    def advance(self, picked: Tensor | list[int]) -> None:
        """Read one token a row."""
        device = execution_device(self.model.get_input_embeddings())
        self._forward(input_ids=torch.as_tensor(picked, device=device)[:, None])

    def write_back(self) -> None:
        """Bring the state up to date: it is already."""


class _DecoderSteps(_ForwardSteps):
    """The kernels of a `Decoder`, replayed."""

    def __init__(
        self, model: Any, state: VideoState, decoder: Decoder, keep_state: bool, prefill_chunk_size: int | None
    ) -> None:
        super().__init__(model, state)
        self.decoder, self.keep_state, self.chunk = decoder, keep_state, prefill_chunk_size
        self.read_by_decoder = 0

    def read(self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, videos: dict[str, Any]) -> None:
        buffers = self.decoder.buffers
        self.state.check_fits(self.model.config.text_config)
        if ids is not None and not videos:
            self.read_by_decoder = self._read_short_prompt(ids, mask)
        if not self.read_by_decoder:
            super().read(ids, embeds, mask, videos)
            buffers.load(self.state)
            buffers.logits.copy_(self._logits)
            buffers.tokens.copy_(self._logits.argmax(-1))
        if not self.keep_state:
            self.state.layers = buffers.layers()

    def _read_short_prompt(self, ids: Tensor, mask: Tensor | None) -> int:
        """Read a short prompt of text by a graph; returns its length, or 0 when it takes the usual way."""
        rows, tokens = ids.shape
        unusual = self.chunk is not None or rows != self.state.batch_size
        if unusual or not 0 < tokens <= LONGEST_PROMPT or rows * tokens > _LARGEST_PROMPT_BATCH:
            return 0
        if bool((ids == self.model.config.video_token_id).any()):
            return 0  # the forward pass says what is wrong with it
        layout = TokenLayout.of(mask, tokens)
        if layout.host_lengths is not None and not min(layout.host_lengths):
            return 0
        lengths = torch.full((rows,), tokens) if layout.lengths is None else layout.lengths
        if not self.decoder.prepare_prompt(self.model, tokens):
            return 0
        self.decoder.buffers.load(self.state)
        self.decoder.read_prompt(self.model, layout.arrange(ids.unsqueeze(-1)).squeeze(-1), lengths)
        return tokens

    def logits(self) -> Tensor:
        return self.decoder.buffers.logits

    def likeliest(self) -> list[int]:
        self.offered = self.decoder.buffers.tokens.tolist()
        return self.offered

    def advance(self, picked: Tensor | list[int]) -> None:
        if isinstance(picked, Tensor) or picked != self.offered:
            self.decoder.buffers.tokens.copy_(torch.as_tensor(picked))
        self.decoder.step()
        self.read_by_decoder += 1

    def write_back(self) -> None:
        seen = self.state.seen_tokens + self.read_by_decoder
        conv, ssm = self.decoder.buffers.export()
        self.state.take(VideoState.from_stacked(conv, ssm, seen))


def one_state(model: Any, states: VideoState | Sequence[VideoState]) -> VideoState:
    """A new state of all rows, where and as the model computes."""
    embeddings = model.get_input_embeddings()
    device, dtype = execution_device(embeddings), embeddings.weight.dtype
    if not isinstance(states, Sequence):
        return states.fork().to(device, dtype)
    states = [state.to(device, dtype) for state in states]
    return VideoState.concatenate(states)


def _drawing(seed: int | Sequence[int | None] | None, rows: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from (B, V) probabilities to (B,) drawn ids."""

    def generator(value: int | None) -> torch.Generator | None:
        return None if value is None else torch.Generator(device).manual_seed(value)

    if seed is None or isinstance(seed, int):
        one = generator(seed)
        return lambda p: torch.multinomial(p, num_samples=1, generator=one).squeeze(1)
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds were given for {rows} rows: give one, or one for each")
    each = [generator(value) for value in seed]
    return lambda p: torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, each, strict=True)])
