"""`generate()` as people know it, for a model whose memory is a state and whose prompts hold videos.

Only public parts of transformers are used, whose names have changed before. Our own verbs do not come by here but for
beams: they decode with `decode_loop`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_video_ma2mba import VideoMa2mbaConfig
from .decode_graph import decodes_by_graph
from .decode_loop import Decoding, FastDecodingMixin
from .decode_settings import plain_mode, settled, stop_strings_of
from .stack_arguments import named_arguments
from .stack_protocols import VideoModel
from .stack_weights import execution_device
from .state_outputs import CACHE_NAME, StateCausalLMOutput, check_state, take_state
from .state_video import VideoState

_TAKES_LOOP = "custom_generate" in inspect.signature(GenerationMixin.generate).parameters


class PromptVideos:
    """The frames of a prompt on their way through `generate()`.

    They are flat over videos, not one row per sample, and would take as many times their memory as there are beams:
    an object that transformers does not know is not copied for them.

    Attributes:
        pixels: (F, 3, h, w); frames_each: (videos,) or None; copies: rows that `generate()` makes of each prompt.
        read: whether a state holds them by now.
    """

    def __init__(self, pixels: Tensor, frames_each: Tensor | None, copies: int) -> None:
        self.pixels, self.frames_each, self.copies = pixels, frames_each, copies
        self.read = False

    def arguments(self, into_state: bool) -> dict[str, Any]:
        """What the forward pass takes, while it has to read them."""
        if self.read:
            return {}
        self.read = into_state
        return {"pixel_values_videos": self.pixels, "num_frames": self.frames_each, "prompt_copies": self.copies}


class PromptGenerationMixin(FastDecodingMixin, GenerationMixin):
    """transformers' `GenerationMixin` for this model."""

    config: VideoMa2mbaConfig
    model: VideoModel

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. A `VideoState` continues as `past_key_values` or `cache`, the new tokens as `input_ids`.

        transformers takes `input_ids` for the whole sequence, the part in the state included, unless an
        `attention_mask` of that whole length says otherwise. A video that was streamed into a state has no such
        sequence, so ids that are too few to be all of it are new ones, and the mask is written here.

        Raises:
            ValueError: the state is no `VideoState`, has other sizes, or comes with `use_cache=False`; and what
                transformers refuses.
        """
        state = take_state(kwargs)
        ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
        config, _ = settled(self.generation_config, generation_config, kwargs)
        assisted = kwargs.get("assistant_model") if len(args) < 3 else args[2]
        for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            assisted = assisted or getattr(config, name, None)
        if assisted:
            raise ValueError(
                "assisted generation is not possible with this model, whose state cannot go back behind a token that "
                "was guessed wrong: leave the assistant out"
            )
        first = ids if ids is not None else embeds
        rows = 1 if first is None else first.shape[0]
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        skip, own = 0, False
        if state is not None:
            check_state(state, self.config.text_config)
            if config.use_cache is False:
                raise ValueError("generate() cannot continue from a state with use_cache=False")
            mask, seen = kwargs.get("attention_mask"), state.get_seq_length()
            if ids is not None and mask is None and 0 < ids.shape[1] <= seen:
                kwargs["attention_mask"] = mask = ids.new_ones(rows, seen + ids.shape[1])
            if first is not None and (mask is None or mask.shape[1] == first.shape[1]):
                skip = seen  # the whole sequence was given, with what the state holds
            if state.batch_size == rows and copies > 1:
                state = state.fork()
                state.batch_repeat_interleave(copies)
        elif config.use_cache is not False or embeds is not None:
            language_model = self.model.language_model
            device, dtype = execution_device(language_model.norm_f), language_model.norm_f.weight.dtype
            state, own = VideoState.zeros(language_model.config, rows * copies, device, dtype), True
        if state is not None:
            kwargs[CACHE_NAME] = state
        videos, pixels = None, kwargs.pop("pixel_values_videos", None)
        frames_each = kwargs.pop("num_frames", None)
        if pixels is not None:
            videos = kwargs["pixel_values_videos"] = PromptVideos(pixels, frames_each, copies)
        with self._segments_of(config.prefill_chunk_size):
            if config.prefill_chunk_size is not None:
                kwargs["prefill_chunk_size"] = None
            if self._decodes_here(config, state, args, kwargs):
                stop = stop_strings_of(config, kwargs)
                if stop is not None:  # transformers forgets the tokenizer when it is given a loop
                    kwargs["stop_strings"] = None
                    stopping_criteria = [*(stopping_criteria or ()), stop]
                streamer = args[3] if len(args) > 3 else kwargs.get("streamer")
                kwargs["custom_generate"] = self._loop(state, own, skip, videos, streamer)
            return super().generate(inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching pages the memory of attention, of which there is none here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "generate_batch() pages the memory of attention layers, which this model does not have: its state has one "
            "size. Give generate() a padded batch, or answer() a list of questions"
        )

    def _decodes_here(
        self, config: GenerationConfig, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether `decode_loop` makes the tokens, over a graph, instead of transformers' loop."""
        if state is None or not _TAKES_LOOP or not plain_mode(config) or not decodes_by_graph(self):
            return False
        others = ("synced_gpus", "assistant_model", "custom_generate", "output_attentions", "output_hidden_states")
        given = (*args[1:3], *(kwargs.get(name) for name in others))
        return not (any(given) or config.output_attentions or config.output_hidden_states)

    def _loop(
        self, state: VideoState, own: bool, skip: int, videos: PromptVideos | None, streamer: Any
    ) -> Callable[..., Any]:
        """A decoding loop as `generate(custom_generate=...)` takes it."""

        def loop(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
            decoding = Decoding(
                self,
                state,
                generation_config,
                processors=logits_processor,
                criteria=stopping_criteria,
                streamer=streamer,
                keep_state=generation_config.return_dict_in_generate or not own,
            )
            found = decoding.run(
                input_ids[:, skip:] if embeds is None else None,
                mask,
                history=input_ids,
                embeds=None if embeds is None else embeds[:, skip:],
                videos={} if videos is None else videos.arguments(into_state=True),
            )
            sequences = torch.cat([input_ids, found.tokens.to(input_ids.device)], dim=1)
            if not generation_config.return_dict_in_generate:
                return sequences
            memory = {CACHE_NAME: state}
            return GenerateDecoderOnlyOutput(sequences=sequences, scores=found.scores, logits=found.logits, **memory)

        return loop

    @contextmanager
    def _segments_of(self, tokens: int | None) -> Iterator[None]:
        """Prompts always run in segments of `prefill_segment_length`. Cutting them once more outside would separate
        placeholders from their frames, so a requested chunk size becomes the segment length."""
        language_model = self.model.language_model
        usual = language_model.prefill_segment_length
        language_model.prefill_segment_length = usual if tokens is None else tokens
        try:
            yield
        finally:
            language_model.prefill_segment_length = usual

    # The signature is that of the installed transformers, which looks there for the names that it may pass.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, but frames reach only the forward pass that reads the prompt, and stay where they are:
        the model moves them to its device chunk by chunk."""
        videos = kwargs.pop("pixel_values_videos", None)
        frames_each = kwargs.pop("num_frames", None)
        prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        # transformers hands on what only its own loop uses, and more with every version; it has refused typing errors.
        known = named_arguments(type(self).forward)
        model_inputs = {name: value for name, value in prepared.items() if name in known}
        state = kwargs.get(CACHE_NAME)
        if isinstance(videos, PromptVideos):
            model_inputs.update(videos.arguments(into_state=state is not None))
        elif videos is not None and (kwargs.get("is_first_iteration") or state is None):
            model_inputs.update(pixel_values_videos=videos, num_frames=frames_each)
        return model_inputs

    def _copy_videos(self, input_ids: Tensor, pixels: Tensor, copies: int) -> Tensor:
        """Each prompt's frames `copies` times, for rows that are copies of prompts in groups of `copies`."""
        placeholders = (input_ids[::copies] == self.config.video_token_id).sum(dim=1)
        frames = (placeholders // self.config.tokens_per_frame).tolist()
        return torch.cat([piece.repeat(copies, 1, 1, 1) for piece in pixels.split(frames)])

    def _read_prompt_once(
        self,
        copies: int,
        state: VideoState,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> StateCausalLMOutput:
        """Read each prompt once, then copy state and logits: beams of one video share its reading."""
        one_each = state.fork()
        one_each.batch_select_indices(torch.arange(0, input_ids.shape[0], copies))
        outputs = self(
            input_ids=input_ids[::copies],
            attention_mask=None if attention_mask is None else attention_mask[::copies],
            past_key_values=one_each,
            **kwargs,
        )
        one_each.batch_repeat_interleave(copies)
        state.take(one_each)
        hidden = outputs.hidden_states
        if hidden is not None:
            hidden = tuple(layer.repeat_interleave(copies, dim=0) for layer in hidden)
        logits = outputs.logits.repeat_interleave(copies, dim=0)
        return StateCausalLMOutput(logits=logits, hidden_states=hidden, **{CACHE_NAME: state})
