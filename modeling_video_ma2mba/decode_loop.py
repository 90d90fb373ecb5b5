"""transformers' sampling loop over a `Decoder`: the same tokens, without a forward pass in Python for each of them."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from .decode_graph import LONGEST_PROMPT, Decoder, borrow_decoder, release_decoders
from .stack_token_layout import TokenLayout
from .state_video import VideoState

_LARGEST_PROMPT_BATCH = 4096  # tokens; beyond that a pass through the model is no slower than a graph


class FastGenerationMixin:
    """Overrides `GenerationMixin._sample`, by which `generate()` does greedy search and sampling.

    Attributes:
        fast_decoding: on CUDA, decode by graphs (`decode_graph`) where the model allows it.
        decode_slots: tokens after which a state is written down while decoding (None: 1, or 16 in large batches).
        decode_state_dtype: in what it is kept while decoding; 16 bits make large batches faster and less exact.
    """

    fast_decoding = True
    decode_slots: int | None = None
    decode_state_dtype = torch.float32

    def release_decoders(self) -> None:
        """Free the buffers and graphs kept for the next answers."""
        release_decoders(self)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        settings = (input_ids, logits_processor, stopping_criteria, generation_config)
        longest = getattr(stopping_criteria, "max_length", None)
        usual = (
            synced_gpus
            or longest is None
            or generation_config.output_attentions
            or generation_config.output_hidden_states
            or getattr(generation_config, "is_assistant", False)
            or not isinstance(model_kwargs.get("past_key_values"), VideoState)
        )
        if not usual:
            with borrow_decoder(self, input_ids.shape[0], longest - input_ids.shape[1]) as decoder:
                if decoder is not None:
                    return _Generation(self, decoder, *settings, streamer).run(model_kwargs)
        return super()._sample(*settings, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)


class _Generation:
    """One run of the loop; the arguments are those of `_sample`."""

    def __init__(
        self, model: Any, decoder: Decoder, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.model, self.decoder, self.ids = model, decoder, ids
        self.processors, self.criteria, self.config, self.streamer = processors, criteria, config, streamer
        pad = config._pad_token_tensor
        self.pad = None if pad is None else int(pad)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.steps = 0

    def run(self, model_kwargs: dict[str, Any]) -> Any:
        state = model_kwargs["past_key_values"]
        read = self._read_short_prompt(state, model_kwargs)
        if not read:
            outputs = self.model._prefill(self.ids, self.config, model_kwargs)
            self.decoder.buffers.load(outputs.past_key_values)
            self.decoder.buffers.logits.copy_(outputs.logits[:, -1])
            self.decoder.buffers.tokens.copy_(outputs.logits[:, -1].argmax(-1))
        own = getattr(state, "made_by_generate", False)
        if own:  # nobody else has it: do not keep what was read twice, a large batch's states are large
            state.conv, state.ssm = self.decoder.buffers.conv, self.decoder.buffers.base
        simple = not self.config.do_sample and not len(self.processors) and self._known_ends() is not None
        wants = self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits)
        if simple and not wants:
            self._greedily()
        else:
            self._step_by_step()
        if self.streamer is not None:
            self.streamer.end()
        if self.config.return_dict_in_generate or not own:
            state.update(*self.decoder.buffers.export(), read + self.steps)
        if not self.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=tuple(self.scores) if self.config.output_scores else None,
            logits=tuple(self.logits) if self.config.output_logits else None,
            past_key_values=state,
        )

    def _read_short_prompt(self, state: VideoState, model_kwargs: dict[str, Any]) -> int:
        """Read a short prompt of text by a graph; returns its length, or 0 when it takes the usual way."""
        mask = model_kwargs.get("attention_mask")
        if mask is None or any(
            model_kwargs.get(name) is not None for name in ("pixel_values_videos", "inputs_embeds")
        ):
            return 0
        ids = self.ids
        if mask.shape[1] == ids.shape[1]:
            ids = ids[:, state.seen_tokens :]  # the whole sequence was given, with what the state holds
        rows, tokens = ids.shape
        state.check_fits(self.model.config.text_config)
        unusual = self.config.prefill_chunk_size is not None or rows != state.batch_size
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
        self.decoder.buffers.load(state)
        self.decoder.read_prompt(self.model, layout.arrange(ids.unsqueeze(-1)).squeeze(-1), lengths)
        return tokens

    def _known_ends(self) -> set[int] | None:
        """The ids that end a row, where nothing but these and the length ends it; else None."""
        ends: set[int] = set()
        for criterion in self.criteria:
            name = type(criterion).__name__
            if name == "EosTokenCriteria":
                ends |= set(criterion.eos_token_id.flatten().tolist())
            elif name != "MaxLengthCriteria":
                return None
        return ends

    def _greedily(self) -> None:
        """The graph picks the tokens; the host only looks whether to go on."""
        buffers, ends = self.decoder.buffers, self._known_ends()
        most = self.criteria.max_length - self.ids.shape[1]
        columns: list[list[int]] = []
        going = [True] * self.ids.shape[0]
        while True:
            picked = buffers.tokens.tolist()
            if not all(going):
                picked = [token if goes else self.pad for token, goes in zip(picked, going, strict=True)]
                buffers.tokens.copy_(torch.tensor(picked))
            columns.append(picked)
            going = [goes and token not in ends for token, goes in zip(picked, going, strict=True)]
            more = any(going) and len(columns) < most
            if more:
                self._advance()
            if self.streamer is not None:  # while the GPU works on the next token
                self.streamer.put(torch.tensor(picked))
            if not more:
                break
        new = torch.tensor(columns, device=self.ids.device).T
        self.ids = torch.cat([self.ids, new], dim=1)

    def _step_by_step(self) -> None:
        """As transformers does it: processors, sampling and criteria see every token."""
        buffers, config = self.decoder.buffers, self.config
        stops_rows = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        going = torch.ones(self.ids.shape[0], dtype=torch.long, device=self.ids.device)
        while True:
            logits = buffers.logits.to(self.ids.device, torch.float32, copy=True)
            scores = self.processors(self.ids, logits)
            if config.return_dict_in_generate:
                if config.output_scores:
                    self.scores.append(scores)
                if config.output_logits:
                    self.logits.append(logits)
            if config.do_sample:
                picked = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                picked = scores.argmax(-1)
            if stops_rows:
                picked = picked * going + self.pad * (1 - going)
            self.ids = torch.cat([self.ids, picked[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(picked.cpu())
            going = going & ~self.criteria(self.ids, tuple(self.scores) or None)
            if not bool(going.any()):
                break
            buffers.tokens.copy_(picked)
            self._advance()

    def _advance(self) -> None:
        self.decoder.step()
        self.steps += 1
