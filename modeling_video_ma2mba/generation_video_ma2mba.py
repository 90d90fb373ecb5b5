"""What `generate()` needs to know about a model whose memory is a state and whose prompts hold videos."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .stack_weights import execution_device
from .state_video import VideoState


class PromptGenerationMixin:
    """Overrides of transformers' `GenerationMixin`; comes before it among the bases."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A `VideoState` continues as `past_key_values`, with the new tokens as `input_ids`.

        transformers takes `input_ids` for the whole sequence, the part in the state included, unless an
        `attention_mask` of that whole length says otherwise. A video that was streamed into a state has no such
        sequence, so ids that are too few to be all of it are new ones, and the mask is written here.
        """
        state, ids = kwargs.get("past_key_values"), kwargs.get("input_ids", inputs)
        if state is not None and ids is not None and kwargs.get("attention_mask") is None:
            seen = state.get_seq_length()
            if 0 < ids.shape[1] <= seen:
                kwargs["attention_mask"] = ids.new_ones(ids.shape[0], seen + ids.shape[1])
        return super().generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *args: Any
    ) -> None:
        state = model_kwargs.get("past_key_values")
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if generation_config.use_cache is False:
            if state is not None:
                raise ValueError("generate() cannot continue from a state with use_cache=False")
            return
        language_model = self.model.language_model
        if state is None:
            device, dtype = execution_device(language_model.norm_f), language_model.norm_f.weight.dtype
            state = VideoState.zeros(language_model.config, batch_size * copies, device, dtype)
            state.made_by_generate = True
        elif state.batch_size == batch_size and copies > 1:
            state = state.fork()
            state.batch_repeat_interleave(copies)
        model_kwargs["past_key_values"] = state

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # Frames are flat over videos, not one row per sample, and would take `expand_size` times their memory.
        videos = {name: kwargs.pop(name) for name in ("pixel_values_videos", "num_frames") if name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if expand_size > 1 and videos.get("pixel_values_videos") is not None:
            kwargs["prompt_copies"] = expand_size
        return input_ids, {**kwargs, **videos}

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # Prompts always run in segments of `prefill_segment_length`. Cutting them once more outside would separate
        # placeholders from their frames, so a requested chunk size becomes the segment length.
        chunk, language_model = generation_config.prefill_chunk_size, self.model.language_model
        if chunk is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        usual = language_model.prefill_segment_length
        try:
            generation_config.prefill_chunk_size, language_model.prefill_segment_length = None, chunk
            return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            generation_config.prefill_chunk_size, language_model.prefill_segment_length = chunk, usual

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but frames reach only the forward pass that reads the prompt, and stay where they are:
        the model moves them to its device chunk by chunk."""
        videos = {name: kwargs.pop(name, None) for name in ("pixel_values_videos", "num_frames", "prompt_copies")}
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("is_first_iteration") or kwargs.get("past_key_values") is None:
            model_inputs.update({name: value for name, value in videos.items() if value is not None})
        return model_inputs

    def _copy_videos(self, input_ids: Tensor, pixels: Tensor, copies: int) -> Tensor:
        """Each prompt's frames `copies` times, for rows that are copies of prompts in groups of `copies`."""
        placeholders = (input_ids[::copies] == self.config.video_token_id).sum(dim=1)
        frames = (placeholders // self.config.tokens_per_frame).tolist()
        return torch.cat([piece.repeat(copies, 1, 1, 1) for piece in pixels.split(frames)])

    def _read_prompt_once(
        self,
        copies: int,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: VideoState,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read each prompt once, then copy state and logits: beams of one video share its reading."""
        state = past_key_values.fork()
        state.batch_select_indices(torch.arange(0, input_ids.shape[0], copies))
        outputs = self(
            input_ids=input_ids[::copies],
            attention_mask=None if attention_mask is None else attention_mask[::copies],
            past_key_values=state,
            **kwargs,
        )
        state.batch_repeat_interleave(copies)
        past_key_values.update(state.conv, state.ssm, state.seen_tokens - past_key_values.seen_tokens)
        return CausalLMOutputWithPast(
            logits=outputs.logits.repeat_interleave(copies, dim=0), past_key_values=past_key_values
        )
