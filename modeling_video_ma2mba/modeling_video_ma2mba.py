"""Video-Ma2mba: vision tower, projector and Mamba-2 language model as transformers models.

Shapes: B batch, S tokens, F frames of all videos of the batch, T tokens per frame, D model width, V vocabulary.
"""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple, logging

from .answering_familiarity import FILE, Familiarity
from .answering_questions import VideoQuestionsMixin
from .configuration_video_ma2mba import VideoMa2mbaConfig
from .generation_video_ma2mba import PromptGenerationMixin
from .parallel_cut import SequenceCut, clip_numbers, cut_sequence
from .parallel_dims import process_group_exists
from .recompute_chunks import RowLayout
from .recompute_loss import IGNORE_INDEX, chunked_causal_lm_loss, shift_labels_left
from .recompute_plan import RecomputeSettings
from .stack_arguments import refuse_unknown
from .stack_language_model import Ma2mbaTextModel
from .stack_token_layout import TokenLayout, exporting
from .stack_weights import quantised_weights, refuse_incomplete
from .state_outputs import CACHE_NAME, CACHE_NAMES, StateCausalLMOutput, StateModelOutput, check_state, take_state
from .state_video import VideoState
from .vision_features import (
    VideoMa2mbaMultiModalProjector,
    freeze_unused_tower_parameters,
    used_tower_modules,
    video_rows,
)
from .vision_towers import TOWERS, tower_adapter

logger = logging.get_logger(__name__)

MOST_EVALUATED_LOGITS = 2**30
"""Numbers that logits may take which nobody asked for (4 GB in fp32): evaluating hours of video gives a loss only."""


class VideoMa2mbaPreTrainedModel(PreTrainedModel):
    """What both models share: loading rules, initialisation and the switch of gradient checkpointing."""

    config: VideoMa2mbaConfig
    config_class = VideoMa2mbaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Ma2mbaBlock", *(name for tower in TOWERS.values() for name in tower.no_split_modules)]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "D"}
    # These concern the vision tower: the language model has no attention.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The tower and the language model initialise themselves; what is left are the projector and an untied head.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)

    def _base(self) -> "VideoMa2mbaModel":
        return getattr(self, self.base_model_prefix) if hasattr(self, self.base_model_prefix) else self

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Every road of transformers, PEFT and TRL to gradient checkpointing ends here.

        Keys of the checkpointing arguments are the fields of `RecomputeSettings` ("method", "segment_length",
        "layers_per_block", "offload", "memory_budget", "host_memory_budget", ...); "use_reentrant" is accepted and has
        no meaning here. The vision tower is recomputed in chunks of frames.

        Raises:
            ValueError: an unknown key, a wrong value, or `every_n_layers` other than 1.
        """
        settings: dict[str, Any] = {}
        if isinstance(gradient_checkpointing_func, functools.partial):
            settings = {k: v for k, v in gradient_checkpointing_func.keywords.items() if k != "use_reentrant"}
            if gradient_checkpointing_func.func is not checkpoint:
                settings.setdefault("offload", True)  # transformers' own `offload=True` arrives as another function
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers} is not supported: use layers_per_block instead")
        known = [field.name for field in fields(RecomputeSettings)]
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"unknown gradient checkpointing arguments {unknown}: use some of {known}")
        base = self._base()
        base.language_model.set_checkpointing(enable, **settings)
        base.recompute_vision = enable
        base.offload_inputs = enable and bool(settings.get("offload"))

    def enable_input_require_grads(self) -> None:
        """Nothing to do: checkpointing here differentiates parameters whether or not its input has a gradient.

        transformers and PEFT call this whenever they turn checkpointing on; obeying would cost a gradient of the size
        of the whole input (5 GB for a million tokens at 2.7b) that nobody reads.
        """

    def disable_input_require_grads(self) -> None:
        """Counterpart of `enable_input_require_grads`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but an incomplete checkpoint is refused, and the tower's unused layers stay frozen.

        Without a checkpoint (None and `state_dict=`), tensors that are not given are random.

        Raises:
            ValueError: tensors are missing, or have other sizes without `ignore_mismatched_sizes=True`.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        accept_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        if pretrained_model_name_or_path is not None:
            refuse_incomplete(pretrained_model_name_or_path, report, accept_other_sizes)
        model._base().freeze_unused_parameters()  # loading makes every parameter trainable
        if pretrained_model_name_or_path is not None and getattr(model.config, "familiarity", None):
            file = _beside_config(pretrained_model_name_or_path, str(model.config.familiarity), kwargs)
            model._base().familiarity = None if file is None else Familiarity.load(file)
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers; the checkpoint also gets all code that it needs to load without this package."""
        from .pipeline_video_ma2mba import CUSTOM_PIPELINES

        module = "modeling_video_ma2mba"
        own = {"AutoModel": f"{module}.VideoMa2mbaModel"}
        for auto_class in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
            own[auto_class] = f"{module}.VideoMa2mbaForConditionalGeneration"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **own}
        self.config.custom_pipelines = {**getattr(self.config, "custom_pipelines", {}), **CUSTOM_PIPELINES}
        known = self._base().familiarity
        if known is not None:
            self.config.familiarity = FILE
        elif hasattr(self.config, "familiarity"):
            del self.config.familiarity
        super().save_pretrained(save_directory, **kwargs)
        if known is not None:
            known.save(os.path.join(save_directory, FILE))


class VideoMa2mbaModel(VideoMa2mbaPreTrainedModel):
    """Frames and tokens in, hidden states and a `VideoState` out."""

    def __init__(self, config: VideoMa2mbaConfig) -> None:
        super().__init__(config)
        self.vision_tower = tower_adapter(config.vision_config).make_tower(config.vision_config)
        self.multi_modal_projector = VideoMa2mbaMultiModalProjector(config)
        self.language_model = Ma2mbaTextModel(config.text_config)
        self.language_model.prefill_segment_length = config.prefill_segment_length
        self.recompute_vision = False
        self.offload_inputs = False
        self.familiarity: Familiarity | None = None
        self.post_init()
        self.freeze_unused_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def freeze_unused_parameters(self) -> None:
        """Freeze the tower's layers above the feature layer: they never run, and DDP stops on parameters without a
        gradient. Done after building and loading; call it again after unfreezing everything."""
        freeze_unused_tower_parameters(self.vision_tower, self.config)

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        num_frames: Tensor | Sequence[int] | None = None,
        on_features: Callable[[Tensor, Tensor], object] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Rows that stand for the frames in the language model's input.

        Args:
            pixel_values_videos: (F, 3, h, w) on any device; uint8 is raw RGB, floating point already normalised.
            num_frames: frames of each video; only towers that look at clips of frames ask. None: all are of one.
            on_features: called with the tower's rows (F', T, C) of some frames after the other, and with these frames;
                see `video_rows`.

        Returns:
            (F * T, D), frame after frame, raster order inside; computed `config.vision_chunk_frames` frames at a time.
        """
        return video_rows(
            self.vision_tower,
            self.multi_modal_projector,
            self.config,
            pixel_values_videos,
            recompute=self.recompute_vision and self.training,
            num_frames=_plain_list(num_frames),
            on_features=on_features,
        )

    def embed_inputs(self, input_ids: Tensor, pixel_values_videos: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Embeddings (B, S, D) with the frames' rows in the places of the placeholder tokens.

        Raises:
            ValueError: the numbers of placeholders and of frame rows differ, in total or (with `num_frames`) by row.
        """
        is_video = input_ids == self.config.video_token_id
        if exporting():  # what is where must not decide what is computed
            text = self.get_input_embeddings()(input_ids)
            rows = self.get_video_features(pixel_values_videos)
            return text.masked_scatter(is_video.unsqueeze(-1), rows.to(text))
        self._check_placeholders(is_video, len(pixel_values_videos), num_frames)
        flat = is_video.flatten().cpu()
        text = self._embed_text(input_ids, ~is_video)
        offload = self.offload_inputs and self.training and torch.is_grad_enabled()
        layout = RowLayout(
            total_rows=flat.numel(),
            device=torch.device("cpu") if offload else text.device,
            computed_rows=flat.nonzero()[:, 0],
            text_rows=(~flat).nonzero()[:, 0],
        )
        rows = video_rows(
            self.vision_tower,
            self.multi_modal_projector,
            self.config,
            pixel_values_videos,
            recompute=self.recompute_vision and self.training,
            layout=layout,
            text=text,
            num_frames=_plain_list(num_frames) if self.config.clip_frames > 1 else None,
        )
        return rows.view(*input_ids.shape, -1)

    def cut(self, input_ids: Tensor, num_frames: Tensor | None = None) -> SequenceCut:
        """How the ranks that share this model's steps (`share_sequence`) share a batch (B, S), padded on the right."""
        engine, is_video = self.language_model.engine, (input_ids == self.config.video_token_id).cpu()
        assert engine.group is not None, "no ranks share this model's steps"
        settings = engine.settings or RecomputeSettings()
        clips = self._clips(is_video, num_frames)
        size, per_frame = engine.group.size, self.config.tokens_per_frame
        return cut_sequence(is_video, size, per_frame, clips, settings.segment_length, engine.schedule)

    def shared_batch(
        self, batch: dict[str, Any], shift_labels: Tensor
    ) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
        """A batch for a forward pass that ranks share, padded on the right and with its `sequence_cut`.

        Args:
            batch: arguments of `forward`, the same on all ranks. shift_labels: (B, S), -100 where nothing is learnt.

        Returns:
            the arguments, the labels and where they are (B, S) bool: on any rank, and in this rank's columns.

        Raises:
            ValueError: no `input_ids`.
        """
        group, ids, mask = self.language_model.engine.group, batch.get("input_ids"), batch.get("attention_mask")
        if group is None or ids is None:
            raise ValueError("a step that ranks share needs input_ids, not inputs_embeds")
        batch = dict(batch)
        if mask is not None:
            layout = TokenLayout.of(mask, ids.shape[1])
            if layout.order is not None:
                batch |= {"input_ids": layout.arrange(ids), "attention_mask": layout.arrange(mask)}
                shift_labels = shift_labels.gather(1, layout.order.to(shift_labels.device))
        if batch.get("sequence_cut") is None:
            batch["sequence_cut"] = self.cut(batch["input_ids"], batch.get("num_frames"))
        labelled = shift_labels != IGNORE_INDEX
        own = labelled & batch["sequence_cut"].mask(group.rank, labelled.device)
        return batch, shift_labels, labelled, own

    def _clips(self, is_video: Tensor, num_frames: Tensor | None) -> Tensor | None:
        frames = _plain_list(num_frames) or [int(is_video.sum()) // self.config.tokens_per_frame]
        return clip_numbers(frames, self.config.clip_frames)

    def _embed_own(
        self, input_ids: Tensor, pixels: Tensor | None, num_frames: Tensor | None, cut: SequenceCut, rank: int
    ) -> Tensor:
        """Embeddings (B, own, D) of one rank's columns of (B, S) ids, from its own frames or from all frames."""
        per_frame = self.config.tokens_per_frame
        is_video = (input_ids == self.config.video_token_id).cpu()
        total, given = int(is_video.sum()) // per_frame, 0 if pixels is None else len(pixels)
        frames = cut.frames(is_video, rank, per_frame, self._clips(is_video, num_frames))
        if given not in (len(frames), total) or int(is_video.sum()) % per_frame:
            raise ValueError(
                f"rank {rank} got {given} frames: it needs the {len(frames)} of its own segments, or all {total} for "
                f"which the prompt holds placeholders ({per_frame} each)"
            )
        own, is_own_video = cut.take(input_ids, rank), cut.take(is_video, rank)
        if not len(frames) or pixels is None:
            return self._touch_vision(self.get_input_embeddings()(own))
        if given != len(frames):
            pixels = pixels[frames.to(pixels.device)]
        text = self._embed_text(own, ~is_own_video.to(own.device))
        # Rows of its frames that lie in other ranks' segments go to the end, and are cut off there.
        flat = is_own_video.flatten()
        row = cut.take((is_video.flatten().cumsum(0) - 1).view_as(is_video), rank).flatten()[flat]
        target = torch.full((len(frames) * per_frame,), -1)
        target[torch.searchsorted(frames, row // per_frame) * per_frame + row % per_frame] = flat.nonzero()[:, 0]
        foreign = target < 0
        target[foreign] = flat.numel() + torch.arange(int(foreign.sum()))
        counts = None
        if self.config.clip_frames > 1:
            videos = _plain_list(num_frames) or [total]
            video = torch.arange(len(videos)).repeat_interleave(torch.tensor(videos))
            counts = [count for count in torch.bincount(video[frames]).tolist() if count]
        layout = RowLayout(
            total_rows=flat.numel() + int(foreign.sum()),
            device=torch.device("cpu") if self.offload_inputs else text.device,
            computed_rows=target,
            text_rows=(~flat).nonzero()[:, 0],
        )
        rows = video_rows(
            self.vision_tower,
            self.multi_modal_projector,
            self.config,
            pixels,
            recompute=True,
            layout=layout,
            text=text,
            num_frames=counts,
        )
        return rows[: flat.numel()].view(*own.shape, -1)

    def _embed_text(self, input_ids: Tensor, is_text: Tensor) -> Tensor:
        """Embeddings (text tokens, D) of the text of all rows, by one call with (B, longest text) ids: what hooks into
        the embedding (NEFTune's noise) expects is a batch of sequences, and placeholders are not worth embedding."""
        ids = [row[text] for row, text in zip(input_ids, is_text, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        embedded = self.get_input_embeddings()(padded)
        if len(ids) == 1:
            return embedded[0]
        return torch.cat([row[: len(own)] for row, own in zip(embedded, ids, strict=True)])

    def _check_placeholders(self, is_video: Tensor, frames: int, num_frames: Tensor | None) -> None:
        per_frame = self.config.tokens_per_frame
        per_row = is_video.sum(dim=1).cpu()
        if int(per_row.sum()) != frames * per_frame:
            raise ValueError(
                f"the prompt holds {int(per_row.sum())} video placeholder tokens, but {frames} frames make "
                f"{frames * per_frame} ({per_frame} each): every frame needs its placeholders and every placeholder "
                "its frame (the processor writes them)"
            )
        if num_frames is None:
            return
        ends = num_frames.cpu().cumsum(0) * per_frame
        if (int(ends[-1]) if len(ends) else 0) != frames * per_frame:
            raise ValueError(f"num_frames adds up to {int(num_frames.sum())} frames, but there are {frames}")
        starts_and_ends = {0, *ends.tolist()}
        if any(end not in starts_and_ends for end in per_row.cumsum(0).tolist()):
            raise ValueError(
                f"rows hold {per_row.tolist()} video placeholder tokens, which does not fit videos of "
                f"{num_frames.tolist()} frames of {per_frame} tokens: a video would be split between samples"
            )

    def _touch_vision(self, embeddings: Tensor) -> Tensor:
        """Let a text-only sample take part in the gradient exchange of a distributed run.

        Ranks of one micro-step must agree on which parameters get gradients: one without pixels crashes ZeRO and
        hangs DDP, so it runs a single black frame whose rows count nothing.
        """
        if not (self.training and torch.is_grad_enabled()):
            return embeddings
        if not process_group_exists():
            return embeddings
        parts = [*used_tower_modules(self.vision_tower, self.config), self.multi_modal_projector]
        if not any(p.requires_grad for part in parts for p in part.parameters()):
            return embeddings
        side = self.config.vision_config.image_size
        rows = self.get_video_features(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        return embeddings + 0 * rows.sum().to(embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        past_key_values: VideoState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_frames: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        sequence_cut: SequenceCut | None = None,
        **kwargs: Any,
    ) -> StateModelOutput:
        """Read tokens and frames from a state.

        Args:
            input_ids: (B, S), with one `config.video_token_id` per frame row; or inputs_embeds: (B, S, D), no pixels.
            attention_mask: (B, at least S), 1 on real tokens. Padding on either side never changes a result.
            pixel_values_videos: (F, 3, h, w), the frames of all videos of the batch in order.
            past_key_values: state to start from (updated in place), also as `cache`; use_cache: return the state after
                the last token (default: on in evaluation, off in training).
            num_frames: (videos,) frames of each video; lets a misplaced video be noticed.
            seq_idx: (B, S) numbers of packed samples. output_positions: (B, S) bool, hidden states wanted.
            output_hidden_states: also return every layer's (`Ma2mbaTextModel.forward` tells which they are).
            sequence_cut: in steps that ranks share (`Ma2mbaTextModel.share_sequence`), how; default: `cut`. All ranks
                give the same ids, mask and positions, and either all frames or those of `SequenceCut.frames`; results
                are of this rank's columns.

        Returns:
            `last_hidden_state` (B, S, D), or (wanted positions, D); `past_key_values`; `hidden_states`.

        Raises:
            ValueError: sizes that do not fit, a state that is none, an argument that cannot be honoured.
        """
        past_key_values = take_state({**kwargs, "past_key_values": past_key_values})
        if past_key_values is not None:
            check_state(past_key_values, self.config.text_config)
        refuse_unknown(kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if (
            self.training
            and torch.is_grad_enabled()
            and any(name.endswith("()") for name, _ in quantised_weights(self))
        ):
            raise ValueError(
                "linear layers of this model are quantised dynamically and give no gradients: train it first and "
                "quantise it then, or call eval()"
            )
        group = self.language_model.engine.group
        if group is not None and self.language_model.shares:
            if input_ids is None:
                raise ValueError("a step that ranks share needs input_ids, not inputs_embeds")
            sequence_cut = self.cut(input_ids, num_frames) if sequence_cut is None else sequence_cut
            self.language_model.engine.open(self.language_model, sequence_cut, len(input_ids), output_positions)
            inputs_embeds = self._embed_own(input_ids, pixel_values_videos, num_frames, sequence_cut, group.rank)
            if output_positions is not None:
                output_positions = output_positions & sequence_cut.mask(group.rank, output_positions.device)
        elif pixel_values_videos is not None:
            if input_ids is None:
                raise ValueError("pixel_values_videos need input_ids, which say where the frames belong")
            inputs_embeds = self.embed_inputs(input_ids, pixel_values_videos, num_frames)
        elif input_ids is not None:
            # A placeholder that the model itself generated is an ordinary token; in a prompt it lacks its frames.
            decoding = past_key_values is not None and past_key_values.get_seq_length() > 0 and input_ids.shape[1] == 1
            if not decoding and not torch.compiler.is_compiling():
                self._check_placeholders(input_ids == self.config.video_token_id, 0, None)
            inputs_embeds = self._touch_vision(self.get_input_embeddings()(input_ids))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            seq_idx=seq_idx,
            output_positions=output_positions,
            output_hidden_states=output_hidden_states,
            sequence_cut=sequence_cut,
            position_ids=kwargs.get("position_ids"),
        )


class VideoMa2mbaForConditionalGeneration(
    VideoQuestionsMixin, PromptGenerationMixin, VideoMa2mbaPreTrainedModel, GenerationMixin
):
    """Answers in words: `VideoMa2mbaModel` with a language modelling head."""

    model: VideoMa2mbaModel
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embeddings.weight"}

    def __init__(self, config: VideoMa2mbaConfig) -> None:
        super().__init__(config)
        self.model = VideoMa2mbaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @torch.no_grad()
    def set_frame_times(self, processor: Any, mode: str, every: float | None = None) -> None:
        """Read time stamps from now on as `mode` says, in place: in configuration and processor, and with new rows of
        the embedding for learned stamps, each of which begins as the mean of the digits that it stands for.

        Args:
            processor: this model's, changed with it.
            mode: "none", "text" or "learned", see `VideoMa2mbaConfig`.
            every: seconds between two stamps; None: as until now.

        Raises:
            ValueError: an unknown mode, or no more than 0 seconds.
        """
        digits = processor.set_frame_times(mode, every)
        rare = self.lm_head.weight.mean(0)  # no answer begins with them
        if digits and max(digits) >= len(self.lm_head.weight):
            self.resize_token_embeddings(max(digits) + 1, pad_to_multiple_of=16, mean_resizing=False)
        words = self.model.language_model.embeddings.weight
        for token, ids in digits.items():
            self.lm_head.weight[token] = rare
            words[token] = words[ids].mean(0)  # the last where both are one
        self.config.frame_times, self.config.frame_times_every = mode, processor.frame_times_every

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Tensor:
        """See `VideoMa2mbaModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: VideoState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_frames: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prompt_copies: int = 1,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> StateCausalLMOutput:
        """Arguments beyond those of `VideoMa2mbaModel.forward`:

        Args:
            labels: (B, S) token ids aligned with `input_ids`, -100 where nothing is to be learned; or (by keyword)
                `shift_labels`, aligned with the positions that predict them. While gradients are on, hidden states
                and logits then exist at labelled positions only, the latter a chunk at a time. (In the signature,
                transformers' Trainer would take `shift_labels` for a label that every evaluated batch must hold.)
            num_items_in_batch: divisor of the summed loss (Trainer's count over accumulation steps); None: the mean.
            logits_to_keep: int n: the last n positions (0: all); 1-D tensor: these positions. Default: all positions;
                with labels, **no logits at all while gradients are on**, nor beyond `MOST_EVALUATED_LOGITS` numbers.
            sequence_cut (by keyword): as in `VideoMa2mbaModel.forward`. The loss is then this rank's part:
                the sum over the ranks of the group is that of the batch, and so it is with gradients.
            prompt_copies: rows come in groups of this many copies of one prompt while `pixel_values_videos` holds each
                video once (generation with beams or several samples).

        Returns:
            `loss`; `logits` (B, positions, V); `past_key_values`; `hidden_states`.
        """
        past_key_values = take_state(kwargs | {"past_key_values": past_key_values})
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        if prompt_copies > 1 and pixel_values_videos is not None and input_ids is not None:
            if past_key_values is not None and labels is None:
                return self._read_prompt_once(
                    prompt_copies,
                    past_key_values,
                    input_ids,
                    attention_mask,
                    pixel_values_videos=pixel_values_videos,
                    logits_to_keep=logits_to_keep,
                    num_frames=num_frames,
                    use_cache=use_cache,
                    output_hidden_states=output_hidden_states,
                )
            pixel_values_videos, num_frames = self._copy_videos(input_ids, pixel_values_videos, prompt_copies), None
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is not None and shift_labels is None:
            shift_labels = shift_labels_left(labels)
        own = None
        if self.model.language_model.shares:
            if shift_labels is None or logits_to_keep is not None:
                raise ValueError("a step that ranks share takes input_ids and labels, and gives a loss only")
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "num_frames": num_frames}
            given["sequence_cut"] = kwargs.get("sequence_cut")
            given, shift_labels, _, own = self.model.shared_batch(given, shift_labels)
            input_ids, attention_mask = given["input_ids"], given["attention_mask"]
            kwargs["sequence_cut"] = given["sequence_cut"]
        rows, tokens = inputs.shape[:2]
        if shift_labels is not None and logits_to_keep is None and not torch.is_grad_enabled() and not self.training:
            if rows * tokens * self.config.text_config.vocab_size <= MOST_EVALUATED_LOGITS:
                logits_to_keep = 0  # what Trainer hands to `compute_metrics`
            else:
                logger.warning_once(
                    f"logits of {rows} x {tokens} positions are left out beside the loss: pass logits_to_keep for them"
                )

        # Which hidden states are wanted: None is all of them.
        last = logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep < tokens else None
        labelled = positions = None
        if shift_labels is not None:
            labelled = shift_labels != IGNORE_INDEX
            positions = labelled if logits_to_keep is None else None
        elif last is not None and not exporting():
            positions = (torch.arange(tokens, device=inputs.device) >= tokens - last).expand(rows, tokens)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values_videos=pixel_values_videos,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_frames=num_frames,
            seq_idx=seq_idx,
            output_positions=positions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labelled is not None:
            if own is not None:  # labels were shifted before the cut, and are counted over all ranks
                num_items_in_batch = labelled.sum() if num_items_in_batch is None else num_items_in_batch
                labelled = own
            at_labels = hidden if positions is not None else hidden[labelled.to(hidden.device)]
            targets = shift_labels[labelled]
            loss = chunked_causal_lm_loss(self.lm_head, at_labels, targets, num_items_in_batch)
        if shift_labels is None or logits_to_keep is not None:
            if last is not None and positions is not None:
                hidden = hidden.view(rows, last, -1)
            elif last is not None:
                hidden = hidden[:, -last:]
            elif isinstance(logits_to_keep, Tensor):
                hidden = hidden[:, logits_to_keep.to(hidden.device)]
            logits = self.lm_head(hidden)
        memory = {CACHE_NAME: outputs.get(CACHE_NAME)}
        return StateCausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **memory)


def _beside_config(source: str | os.PathLike[str], name: str, given: Mapping[str, Any]) -> str | None:
    """A file that lies beside a checkpoint's config.json; None where there is none."""
    name = os.path.basename(name)
    if os.path.isdir(source):
        path = os.path.join(source, given.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    # Not `from … import`: transformers would look for the package before it loads this file from the Hub.
    hf_hub_download = importlib.import_module("huggingface_hub").hf_hub_download

    options = {key: given[key] for key in ("revision", "subfolder", "cache_dir", "token") if given.get(key)}
    try:
        return hf_hub_download(os.fspath(source), name, **options)
    except OSError:  # not there, or not in the cache and no network
        return None


def _plain_list(numbers: Tensor | Sequence[int] | None) -> list[int] | None:
    return None if numbers is None else [int(n) for n in numbers]


VideoMa2mbaModel.register_for_auto_class("AutoModel")
VideoMa2mbaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
