"""How much memory a training step takes, term by term, from the sizes of the model and the plan of recomputation.

Nothing here is measured: every term is a tensor that the engine (`recompute_engine`), the mixers (`mixer_mamba2`, on
`ops_mamba_ssm` or in PyTorch), the loss (`recompute_loss`) or the vision part (`vision_features`) allocates, counted
at the moments when most of them are alive. `docs/ma_gc.md` walks through the terms and compares them with the paper's.

Legend: B batch, S tokens, F frames, D width, E inner width, L layers, C conv channels, W conv width, H heads, N state
size, G groups, Q chunk length; Z = E + C + H is the output width of in_proj. Everything is in bytes.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .ops_costs import ADD_NORM_COSTS, CoreCosts, MixerShape
from .recompute_plan import COPIES_IN_FLIGHT, LOGITS_PER_CHUNK, RecomputePlan

# What cuBLAS keeps for itself on Hopper (none on a CPU); allocated once through PyTorch's allocator.
_MATMUL_WORKSPACE = 32 << 20


@dataclass(frozen=True)
class StackShape:
    """Sizes of a Mamba-2 stack; `compute` and `stream` are bytes per number of activations and residual stream.

    `backends`: what runs the mixers: kernels (CUDA in 16 bits), or plain PyTorch, which keeps far more.
    """

    layers: int
    width: int
    inner: int
    conv_dim: int
    heads: int
    state: int
    groups: int
    conv_kernel: int
    chunk: int
    vocabulary: int
    compute: int = 2
    stream: int = 4
    backends: CoreCosts = field(default_factory=CoreCosts.preferred)

    @classmethod
    def of(cls, config: Any, compute: int = 2, kernels: bool | CoreCosts = True) -> "StackShape":
        """From a `Ma2mbaTextConfig`; `compute` is 2 for bf16 and fp16, 4 for fp32. `kernels`: what the mixers'
        backends take, or whether they are the preferred ones or PyTorch."""
        named = {True: CoreCosts.preferred, False: lambda: CoreCosts.named("torch")}
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.inner_size,
            conv_dim=config.conv_dim,
            heads=config.num_heads,
            state=config.state_size,
            groups=config.n_groups,
            conv_kernel=config.conv_kernel,
            chunk=config.chunk_size,
            vocabulary=config.vocab_size,
            compute=compute,
            stream=max(compute, 4) if config.residual_in_fp32 else compute,
            backends=named[kernels]() if isinstance(kernels, bool) else kernels,
        )

    @cached_property
    def kernels(self) -> bool:
        """Whether kernels run the mixers."""
        return self.backends.fused

    @cached_property
    def mixer(self) -> MixerShape:
        """The sizes of one mixer."""
        heads = (self.heads, self.inner // self.heads, self.state, self.groups)
        return MixerShape(*heads, self.conv_kernel, self.chunk, eps=0.0, time_step_limit=(0.0, float("inf")))

    @cached_property
    def projected(self) -> int:
        """Z, what in_proj writes per token: gate, convolution input, step sizes."""
        return self.inner + self.conv_dim + self.heads

    @cached_property
    def state_bytes(self) -> int:
        """State of one layer for one row: fp32 SSM state and the last W-1 inputs of the convolution."""
        return 4 * self.inner * self.state + self.compute * self.conv_dim * (self.conv_kernel - 1)

    @cached_property
    def workspace(self) -> int:
        """What matrix products take for themselves."""
        return _MATMUL_WORKSPACE if self.kernels else 0

    @cached_property
    def longest_segment(self) -> int:
        """Most tokens (times rows) that the mixers' backends address in one call."""
        return self.backends.longest_call(self.mixer)

    @cached_property
    def core_bytes(self) -> tuple[float, float, float]:
        """What a mixer's inside keeps per token, and what it holds at its worst moment in forward and in backward."""
        asked = (self.backends.kept_bytes, self.backends.forward_bytes, self.backends.backward_bytes)
        kept, forward, backward = (ask(self.mixer, self.compute) for ask in asked)
        return kept, forward, backward


@dataclass(frozen=True)
class Workload:
    """One batch of a training step as the stack sees it.

    Attributes:
        tokens, batch: S and B.
        kept: positions whose hidden states are kept (the labelled ones); None is all of them.
        layer_parameters: trainable parameters of one layer, as a count.
        weight_bytes: bytes per parameter. autocast: whether weights are cast to the compute type on the fly.
        projections_train: whether in_proj and out_proj keep their inputs for a weight gradient.
        head_trains: whether the loss makes a gradient of the head's weight.
        input_on_gpu: where the input embeddings and their gradient live. input_gradient: whether anybody wants it.
        ranks: how many share the batch; `tokens` are then those of one of them, in segments of `segment` tokens.
        stretches: ranks have one stretch each (`recompute_schedule.SCHEDULES`), instead of segments dealt like cards.
        graphs: whether small cells are CUDA graphs.
    """

    tokens: int
    batch: int = 1
    kept: int | None = None
    layer_parameters: int = 0
    weight_bytes: int = 2
    autocast: bool = False
    projections_train: bool = True
    head_trains: bool = True
    input_on_gpu: bool = True
    input_gradient: bool = True
    ranks: int = 1
    segment: int = 0
    stretches: bool = False
    graphs: bool = True

    def replays(self, shape: StackShape, plan: RecomputePlan) -> bool:
        """Whether a plan's cells are CUDA graphs."""
        alone = self.graphs and self.ranks == 1 and shape.kernels
        return alone and plan.replayed(self.batch, self.tokens, shape.width)

    @property
    def kept_rows(self) -> int:
        """Positions whose hidden states are kept, of all rows together: `kept`, or every one."""
        return self.tokens * self.batch if self.kept is None else self.kept


def saved_per_token(shape: StackShape, projections_train: bool = True) -> float:
    """What one layer keeps per token between its recomputation and its backward: the residual sum in front of the
    norm, the mixer's inside as its backends say, and what the two projections read."""
    inputs = shape.compute if projections_train else 0
    norm = ADD_NORM_COSTS["triton"].kept_bytes(itemsize=shape.stream, width=shape.width)
    if not shape.kernels:  # fp32 at least, and whatever trains
        inputs = max(4, shape.compute)
        norm = ADD_NORM_COSTS["torch"].kept_bytes(itemsize=inputs, width=shape.width)
    return norm + shape.core_bytes[0] + inputs * (shape.width + shape.inner)


def backward_temporaries_per_token(shape: StackShape) -> float:
    """What the backward of one mixer holds beside the saved tensors, at its worst moment."""
    return shape.core_bytes[2]


def forward_temporaries_per_token(shape: StackShape) -> float:
    """What one layer holds in forward without gradients, at its worst moment, beside its block's input."""
    kept, mixer, _ = shape.core_bytes
    if not shape.kernels:
        return saved_per_token(shape) - kept + mixer
    return 2 * (shape.stream + shape.compute) * shape.width + mixer


def loss_bytes(shape: StackShape, work: Workload) -> float:
    """One chunk of logits with its gradients, and the head's gradient summed in fp32 over chunks."""
    rows = min(max(work.kept_rows, 1), max(1, LOGITS_PER_CHUNK // shape.vocabulary))
    logits = rows * shape.vocabulary * (2 * shape.compute + 12)
    if not work.head_trains:
        return logits
    copies = work.weight_bytes + (8 if work.kept_rows > rows else 4)
    return logits + shape.vocabulary * shape.width * copies


def kept_bytes(shape: StackShape, work: Workload, plan: RecomputePlan) -> tuple[float, float]:
    """Block inputs and border states that wait between forward and backward."""
    blocks, segments = _counts(shape, work, plan)
    inputs = (blocks - 1) * work.batch * work.tokens * shape.stream * shape.width
    return inputs, (segments - 1) * shape.layers * work.batch * shape.state_bytes


def stack_phases(shape: StackShape, work: Workload, plan: RecomputePlan) -> dict[str, dict[str, float]]:
    """GPU bytes above weights and gradients in every phase of the language model's step, by what holds them."""
    blocks, segments = _counts(shape, work, plan)
    layers = min(plan.layers_per_block, shape.layers)
    rows = work.batch * min(plan.segment_length, work.tokens)
    stream = shape.stream * shape.width * rows  # one segment of the residual stream
    state = layers * work.batch * shape.state_bytes  # one set of states of a block
    row = shape.compute * shape.width
    inputs = row * work.batch * work.tokens if work.input_on_gpu else 0
    kept = row * work.kept_rows
    waiting_x, waiting_state = kept_bytes(shape, work, plan)
    stored = 0 if plan.offload else waiting_x + waiting_state
    # Casting keeps 16-bit copies of the weights as long as the autocast region lasts.
    cast = _weights_per_layer(shape) * shape.compute if work.autocast else 0

    leaving = COPIES_IN_FLIGHT * stream if plan.offload and blocks > 1 else 0
    # Orders that leave a segment for another read its stream back from the host, the next cell's ahead.
    back = 2 * stream if plan.offload and blocks > 1 and plan.forward_order != "segment_major" else 0
    forward = {
        "input": inputs,
        "kept activations": stored,
        "prefetch": leaving + back + (2 * state if plan.offload and segments > 1 else 0),
        "cell": stream + rows * forward_temporaries_per_token(shape),
        "states": 2 * shape.layers * work.batch * shape.state_bytes,
        "kept rows": kept,
        "workspace": shape.workspace + shape.layers * cast,
    }
    loss = {
        "input": inputs,
        "kept activations": stored,
        "prefetch": leaving,
        "kept rows": 2 * kept,
        "loss": loss_bytes(shape, work),
        "workspace": shape.workspace,
    }

    # Block after block, sums and state gradients exist for one block at a time; in other orders for all of them.
    own = layers * work.layer_parameters
    if plan.band:  # ranks that share the step sum up for a band of blocks
        in_blocks = segments == 1
        together = min(shape.layers, layers * -(-blocks // max(1, blocks // plan.band)))
    else:
        in_blocks = plan.backward_order == "block_major" or blocks == 1 or segments == 1
        together = layers if in_blocks else shape.layers
    summed = together * work.layer_parameters
    dstates = 0 if in_blocks else together * work.batch * shape.state_bytes
    wide = max(4, work.weight_bytes)
    # The sum over the segments so far: the first segment's own gradients, in fp32 from the second sum on.
    sums_before = {1: 0, 2: work.weight_bytes if in_blocks else wide}.get(segments, wide) * summed
    sums_after = work.weight_bytes * own if segments == 1 else wide * summed + 2 * work.weight_bytes * own
    saved = rows * saved_per_token(shape, work.projections_train)
    # What the last projection reads is let go before its mixer's backward, the worst moment.
    out_input = shape.compute * shape.inner * rows if shape.kernels and work.projections_train else 0
    # The gradient of the cell's result, for the residual sum and for what the last mixer adds to it.
    result_gradient = (
        (shape.stream + shape.compute) * shape.width * rows if blocks > 1 or work.kept is None else stream
    )
    cell = layers * saved + result_gradient - out_input + rows * backward_temporaries_per_token(shape)
    states_arriving = state if segments > 1 else 0
    backward = {"kept rows": 2 * kept, "workspace": shape.workspace + layers * cast}
    phases = {"forward": forward, "loss": loss}
    if blocks > 1:
        # The cell that runs took its own input, output gradient and states out of the store.
        arriving = states_arriving + (2 if segments > 1 else 1) * stream
        phases["backward"] = backward | {
            "input": inputs * (2 if work.input_gradient and not in_blocks else 1),
            "kept activations": max(0, stored - (0 if plan.offload else stream + arriving)),
            "prefetch": leaving + arriving if plan.offload else 0,
            "cell": cell,
            "states": 3 * state + dstates,
            "gradient sums": sums_before,
        }
    # The first block reads the input instead of a kept activation, and writes the input's gradient.
    between = stream * segments if blocks > 1 else 0
    waiting = between + (segments - 1) * state
    first_block = backward | {
        "input": inputs * (2 if work.input_gradient else 1),
        "kept activations": 0 if plan.offload else max(0, waiting - (stream if blocks > 1 else 0) - states_arriving),
        "prefetch": leaving + states_arriving + (stream if blocks > 1 and segments > 1 else 0) if plan.offload else 0,
    }
    copied = 0 if work.input_on_gpu else row * rows
    phases["backward of the first block"] = first_block | {
        "cell": cell + copied,
        "states": 3 * state + dstates,
        "gradient sums": sums_before,
    }
    phases["end of a cell's backward"] = first_block | {
        "cell": result_gradient + saved + rows * shape.compute * shape.projected,
        "states": 4 * state + dstates,
        "gradient sums": sums_after,
    }
    if work.replays(shape, plan):
        # Graphs hold one cell's memory from step to step, and what they read and write is copied.
        copies = (4 * shape.stream + 2 * shape.compute) * shape.width * rows + 2 * state + work.weight_bytes * own
        cell = max(phase.get("cell", 0) for phase in phases.values())
        for phase in phases.values():
            phase |= {"cell": cell, "copies for graphs": copies}
    return phases


def plain_phases(shape: StackShape, work: Workload, segment_length: int) -> dict[str, dict[str, float]]:
    """The same without checkpointing: autograd keeps every layer of every segment."""
    segments = -(-work.tokens // segment_length)
    rows = work.batch * min(segment_length, work.tokens)
    total = work.batch * work.tokens
    stream = shape.stream * shape.width
    inputs = shape.compute * shape.width * total if work.input_on_gpu else 0
    kept = shape.compute * shape.width * work.kept_rows
    cell = shape.layers * total * saved_per_token(shape, work.projections_train)
    states = (segments + 1) * shape.layers * work.batch * shape.state_bytes
    cast = shape.layers * _weights_per_layer(shape) * shape.compute if work.autocast else 0
    common = {"input": inputs, "cell": cell, "states": states, "workspace": shape.workspace + cast}
    forward = common | {"kept rows": kept, "cell": cell + rows * forward_temporaries_per_token(shape)}
    loss = common | {"kept rows": 2 * kept, "loss": loss_bytes(shape, work)}
    backward = common | {
        "input": inputs * (2 if work.input_gradient else 1),
        "kept rows": 2 * kept,
        "cell": cell + rows * (2 * stream + backward_temporaries_per_token(shape)),
    }
    return {"forward": forward, "loss": loss, "backward": backward}


def host_bytes(shape: StackShape, work: Workload, plan: RecomputePlan | None) -> dict[str, float]:
    """Pinned host memory: offloaded activations, and the input with its gradient where they live there."""
    inputs = shape.compute * shape.width * work.batch * work.tokens * (2 if work.input_gradient else 1)
    stored = sum(kept_bytes(shape, work, plan)) if plan is not None and plan.offload else 0
    return {"kept activations": stored, "input": 0 if work.input_on_gpu else inputs}


def _counts(shape: StackShape, work: Workload, plan: RecomputePlan) -> tuple[int, int]:
    return -(-shape.layers // plan.layers_per_block), -(-work.tokens // plan.segment_length)


def _weights_per_layer(shape: StackShape) -> int:
    return shape.width * (shape.projected + shape.inner)
