"""The Mamba-2 language model of Video-Ma2mba, without its head.

Long sequences always run in segments, so no kernel sees more than a bounded number of tokens (full-length calls of
the public kernels overflow 32-bit offsets beyond about 200k tokens). Legend: B batch, S tokens, D width, L layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_video_ma2mba import Ma2mbaTextConfig
from .mixer_mamba2 import Ma2mbaBlock, Ma2mbaRMSNorm, init_mixer_, is_mixer, run_blocks
from .parallel_cut import SequenceCut
from .parallel_sequence import SequenceGroup
from .parallel_shards import ShardedLayers, is_unit
from .recompute_engine import MultiAxisEngine
from .recompute_plan import RecomputeSettings
from .stack_arguments import packed_samples, refuse_unknown
from .stack_token_layout import TokenLayout, kept_rows, original_order
from .stack_weights import execution_device, sent
from .state_layers import LayerState
from .state_outputs import CACHE_NAME, StateModelOutput, take_state
from .state_video import VideoState

CPU_SEGMENT = 512
"""Most tokens at a time on a CPU: longer segments leave its caches, which is slower and takes more memory."""


class Ma2mbaTextModel(PreTrainedModel):
    """Embedding, L Mamba-2 blocks and the final norm, from state to state."""

    config_class = Ma2mbaTextConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Ma2mbaBlock"]
    # There is no attention here, so every implementation is as good: what a whole model asks for is for its tower.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"A_log", "D", "dt_bias"}

    def __init__(self, config: Ma2mbaTextConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Ma2mbaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm_f = Ma2mbaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.prefill_segment_length = 8192
        self.engine = MultiAxisEngine()
        self.gradient_checkpointing = False
        self.window_length: int | None = None
        self.window_gradient = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if is_mixer(module):
            init_mixer_(module, self.config, init)
        elif module is self.embeddings:
            init.normal_(module.weight, std=self.config.initializer_range)
        elif hasattr(module, "eps") and hasattr(module, "weight"):
            init.ones_(module.weight)

    def set_checkpointing(self, enabled: bool, **settings: Any) -> None:
        """Turn Multi-Axis Gradient Checkpointing on or off; `settings` are the fields of `RecomputeSettings`."""
        self.engine.configure(RecomputeSettings(**settings) if enabled else None)
        self.gradient_checkpointing = enabled

    def share_sequence(self, group: SequenceGroup | None, schedule: str = "round_robin") -> None:
        """Let the ranks of `group` share the training steps that follow (`MultiAxisEngine.share`): multi-axis
        checkpointing is on for these, as `set_checkpointing` says or with a plan of the planner. None: every rank
        works alone again. `schedule` (one of `recompute_schedule.SCHEDULES`) counts where no cut is given."""
        self.engine.share(group, schedule)

    def carry_state(self, window: int | None, gradient: bool = True) -> None:
        """Read sequences in training in windows, from the state that the one before has left behind.

        Args:
            window: tokens of each; None: one window, whatever the length.
            gradient: whether the state's gradient goes back through the borders, which gives the gradients of one
                window, or is cut there (truncated backpropagation through time).

        Raises:
            ValueError: a window of less than one token.
        """
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} tokens: it must have at least 1")
        self.window_length, self.window_gradient = window, gradient

    @property
    def stream_dtype(self) -> torch.dtype:
        """Data type of the residual stream."""
        own = self.norm_f.weight.dtype
        return torch.promote_types(own, torch.float32) if self.config.residual_in_fp32 else own

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: VideoState | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        output_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        sequence_cut: SequenceCut | None = None,
        **kwargs: Any,
    ) -> StateModelOutput:
        """Read tokens from a state.

        Args:
            input_ids: (B, S), or inputs_embeds: (B, S, D); the latter may live on the CPU while the model is on a GPU.
            attention_mask: (B, at least S), 1 on real tokens; padding on either side never touches the state.
            past_key_values: the state to start from (updated in place), or None for the beginning; also as `cache`.
            use_cache: return the state after the last token. Default: on, but off in training.
            seq_idx: (B, S) numbers of packed samples, 0, 1, 2, … along each row; the state restarts at each change.
            output_positions: (B, S) bool, the positions whose hidden states are wanted; the others are never kept.
            output_hidden_states: return every layer's, of all positions. Not with gradient checkpointing.
            sequence_cut: how ranks share the batch (`share_sequence`). `inputs_embeds` and hidden states are then of
                this rank's columns; mask, `seq_idx` and positions are of all columns, padded on the right.

        Returns:
            `last_hidden_state`: (B, S, D), or (number of wanted positions, D) in row-major order; `past_key_values`;
            `hidden_states`: L + 1 times (B, S, D): the embeddings, what each block but the last leaves in the residual
            stream, and the last one's behind the final norm.
        """
        past_key_values = take_state({**kwargs, "past_key_values": past_key_values})
        refuse_unknown(kwargs)
        seq_idx = packed_samples(kwargs.get("position_ids"), attention_mask, seq_idx)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        tokens = inputs_embeds.shape[1]
        if tokens == 0 and sequence_cut is None:
            raise ValueError("the sequence is empty: give at least one token")
        if use_cache and self.recomputes:
            raise ValueError("use_cache=True cannot be combined with gradient checkpointing: pass use_cache=False")
        use_cache = not self.training if use_cache is None else use_cache
        wants_layers = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: list[Tensor] | None = [] if wants_layers else None
        hidden, state = self.scan(
            inputs_embeds, past_key_values, attention_mask, seq_idx, output_positions, hidden_states, sequence_cut
        )
        if use_cache and past_key_values is not None:
            past_key_values.take(state)
            state = past_key_values
        return StateModelOutput(
            last_hidden_state=hidden,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            **{CACHE_NAME: state if use_cache else None},
        )

    def longest_pass(self, batch: int) -> int:
        """Tokens of each row that pass through the layers at a time."""
        if execution_device(self.norm_f).type != "cpu":
            return self.prefill_segment_length
        return min(self.prefill_segment_length, max(CPU_SEGMENT // max(batch, 1), CPU_SEGMENT // 8))

    @property
    def recomputes(self) -> bool:
        """Whether a forward pass now would checkpoint: switched on, in training, gradients wanted."""
        switched_on = self.gradient_checkpointing or self.engine.group is not None
        return switched_on and self.training and torch.is_grad_enabled()

    @property
    def shares(self) -> bool:
        """Whether a forward pass now would be shared out among ranks."""
        return self.engine.group is not None and self.recomputes

    def scan(
        self,
        inputs_embeds: Tensor,
        state: VideoState | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_positions: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
        cut: SequenceCut | None = None,
    ) -> tuple[Tensor, VideoState]:
        """Differentiable from state to state, with or without checkpointing: truncated backpropagation through time
        cuts wherever it likes. Arguments as in `forward`; `hidden_states` is filled with what it returns, `cut` is its
        `sequence_cut`.

        Returns:
            hidden states (B, S, D) or (wanted, D), and the new state; gradients flow from both to the inputs, the
            parameters and the given state's tensors.
        """
        batch, tokens = inputs_embeds.shape[0], inputs_embeds.shape[1] if cut is None else cut.tokens
        if state is not None:
            state.check_fits(self.config)
            if state.batch_size != batch:
                raise ValueError(f"the state holds {state.batch_size} rows, the input {batch}")
        if output_positions is not None and output_positions.shape != (batch, tokens):
            raise ValueError(f"output_positions must be ({batch}, {tokens}), not {tuple(output_positions.shape)}")
        for name, value in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
            if value is not None and value.shape[0] != batch:
                raise ValueError(f"{name} has {value.shape[0]} rows, the input {batch}")
        layout = TokenLayout.of(attention_mask, tokens, seq_idx)
        x = layout.arrange(inputs_embeds) if cut is None else self._own_columns(inputs_embeds, layout, cut)
        keep = kept_rows(output_positions, layout)
        window = self.window_length if self.training and torch.is_grad_enabled() else None
        if window is not None and tokens > window:
            if hidden_states is not None or cut is not None:
                raise ValueError("windows (carry_state) give no output_hidden_states, and are not shared among ranks")
            hidden, layers = self._run_windows(x, state, layout, keep, window)
        else:
            hidden, layers = self._run_window(x, state, layout, keep, cut, hidden_states)
        if hidden_states is not None:
            hidden_states[:] = [layout.restore(outputs) for outputs in hidden_states]
        if keep is None:
            hidden = layout.restore(hidden)
        elif output_positions is not None and (order := original_order(output_positions, layout)) is not None:
            hidden = hidden[order]
        others = layout.other_samples(self.config.conv_kernel - 1)
        if others is not None:
            layers = [layer.without_inputs_of(others) for layer in layers]
        return hidden, VideoState(layers, (0 if state is None else state.seen_tokens) + tokens)

    def _run_window(
        self,
        x: Tensor,
        state: VideoState | None,
        layout: TokenLayout,
        keep: Tensor | None,
        cut: SequenceCut | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """All layers over x, with or without checkpointing; results as of `_run_segments`."""
        if not self.recomputes:
            return self._run_segments(x, state, layout, keep, hidden_states)
        if hidden_states is not None:
            raise ValueError("output_hidden_states keeps what gradient checkpointing drops: turn one off")
        return self.engine.run(self, x, state, layout, keep, cut)

    def _run_windows(
        self, x: Tensor, state: VideoState | None, layout: TokenLayout, keep: Tensor | None, length: int
    ) -> tuple[Tensor, list[LayerState]]:
        """`_run_window` over windows of `length` tokens, each from the state of the one before (`carry_state`)."""
        batch, tokens = x.shape[:2]
        pieces, rows = [], []
        layers: list[LayerState] = []
        for start in range(0, tokens, length):
            stop = min(start + length, tokens)
            if start:
                if not self.window_gradient:
                    layers = [type(layer)._make(tensor.detach() for tensor in layer) for layer in layers]
                same = layout.continues(start)
                if same is not None:  # a packed sample that begins with the window knows nothing of the one before
                    layers = [type(layer)._make(_rows_kept(tensor, same) for tensor in layer) for layer in layers]
                state = VideoState(layers, start)
            part = layout.window(start, stop)
            kept = None if keep is None else keep[:, start:stop]
            hidden, layers = self._run_window(x[:, start:stop], state, part, kept)
            others = part.other_samples(self.config.conv_kernel - 1)
            if others is not None:
                layers = [layer.without_inputs_of(others) for layer in layers]
            pieces.append(hidden)
            if kept is not None:
                row, column = kept.nonzero(as_tuple=True)
                rows.append(row * tokens + column + start)
        if keep is None:
            return torch.cat(pieces, dim=1), layers
        hidden = torch.cat(pieces)
        if batch > 1:  # windows come one after the other, the result is row after row
            hidden = hidden[sent(torch.cat(rows).argsort(), hidden.device)]
        return hidden, layers

    def _own_columns(self, x: Tensor, layout: TokenLayout, cut: SequenceCut) -> Tensor:
        """This rank's columns (B, own, D), padding blanked."""
        if not self.shares or self.engine.group is None:
            raise ValueError("a sequence_cut needs ranks that share the step: share_sequence, train(), and gradients")
        rank = self.engine.group.rank
        own = sum(stop - start for start, stop in cut.places(rank).values())
        if cut.ranks != self.engine.group.size or x.shape[1] != own:
            raise ValueError(
                f"inputs_embeds of {x.shape[1]} columns are not rank {rank}'s {own} of a cut for {cut.ranks} ranks "
                f"(the group has {self.engine.group.size}): pass cut.take(columns, rank)"
            )
        if layout.order is not None:
            raise ValueError("rows of a batch that ranks share must be padded on the right")
        if layout.lengths is None:
            return x
        columns = cut.take(torch.arange(cut.tokens, device=x.device)[None], rank)
        return x.masked_fill((columns >= layout.lengths.to(x.device)[:, None]).unsqueeze(-1), 0)

    def _run_segments(
        self,
        x: Tensor,
        state: VideoState | None,
        layout: TokenLayout,
        keep: Tensor | None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """All layers over one segment after the other; plain autograd when gradients are on.

        Returns hidden states (B, S, D) or (kept, D), and the layers' states. `outputs` is filled with `hidden_states`
        of `forward`, real tokens first in each row.
        """
        batch, tokens = x.shape[:2]
        device, own = execution_device(self.norm_f), self.norm_f.weight.dtype
        starts: Sequence[LayerState | None] = [None] * len(self.layers) if state is None else state.layers
        ends: list[LayerState] = []
        pieces, rows = [], []
        sharded = ShardedLayers.of(self.layers) if is_unit(self.layers[0]) else None
        if sharded is not None and torch.is_grad_enabled():
            raise ValueError(
                "layers that are FSDP units train with checkpointing only: gradient_checkpointing_enable()"
            )
        length = self.longest_pass(batch)
        rounds = math.ceil(tokens / length)
        most = rounds if sharded is None else sharded.largest(rounds)[0]
        streams: list[list[Tensor]] = [[] for _ in range(0 if outputs is None else len(self.layers) + 1)]
        blocks = list(self.layers)
        if outputs is not None and sharded is not None:
            raise ValueError("output_hidden_states is not possible while layers are FSDP units")
        for start in range(0, tokens, length):
            stop = min(start + length, tokens)
            lengths, seq_idx = layout.segment(start, stop, self.config.conv_kernel - 1)
            segment = x[:, start:stop].to(device, self.stream_dtype)
            around = None if sharded is None else sharded.gathered
            segment, delta, ends = run_blocks(
                blocks, segment, ends or starts, lengths, seq_idx, around=around, streams=streams, reading=True
            )
            if outputs is not None:
                streams[-1].append(self.norm_f(segment, delta, own)[0])
            if keep is not None:
                row, column = keep[:, start:stop].nonzero(as_tuple=True)
                rows.append(row * tokens + column + start)
                # Positions given on the host stay a plain copy: nothing here waits for the GPU.
                row, column = (sent(i, segment.device) for i in (row, column))
                segment, delta = segment[row, column].unsqueeze(0), delta[row, column].unsqueeze(0)
            pieces.append(self.norm_f(segment, delta, own)[0])
        if sharded is not None:
            sharded.idle_rounds(self.layers, most - rounds)
        if outputs is not None:
            outputs[:] = [torch.cat([piece.to(device, own) for piece in stream], dim=1) for stream in streams]
        hidden = torch.cat(pieces, dim=1)
        if keep is not None:
            hidden = hidden[0]
            if batch > 1:  # segments come one after the other, the result is row after row
                hidden = hidden[torch.cat(rows).argsort()]
        # Layers may live on several GPUs; the state is in one place, and hooks bring its parts to where they are used.
        return hidden, [type(layer)._make(tensor.to(device) for tensor in layer) for layer in ends]


def _rows_kept(tensor: Tensor, rows: Tensor) -> Tensor:
    """A tensor (B, …) with zeros in the rows that `rows` (B,) bool leaves out."""
    return tensor.masked_fill(~rows.to(tensor.device).view(-1, *(1,) * (tensor.ndim - 1)), 0)
