"""One decoding step over buffers of fixed addresses, which a CUDA graph can replay: token in, logits out.

Legend: as in `decode_reference`, and L layers, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decode_reference import partial_sums, scale_residual, square_parts
from .ops_costs import MixerShape
from .stack_protocols import TextStack
from .state_layers import Mamba2State, unstack
from .state_video import VideoState


class LayerWeights(NamedTuple):
    """One block's tensors."""

    norm: Tensor
    in_proj: Tensor
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_norm: Tensor
    out_proj: Tensor


class DecodeWeights(NamedTuple):
    """What one step reads, the model's own tensors: a change in place is seen, a replaced tensor is not."""

    embeddings: Tensor
    layers: tuple[LayerWeights, ...]
    norm_f: Tensor
    head: Tensor
    shape: MixerShape
    stream_dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> "DecodeWeights | None":
        """The tensors of a `VideoMa2mbaForConditionalGeneration`; None where a step is more than these tensors:
        adapters, hooks, biased, quantised or scattered weights, fp64."""
        language_model = model.model.language_model
        # Looked at with every answer: `modules()` would cost as much as a token.
        mixers = [block.mixer for block in language_model.layers]
        linears = [part for mixer in mixers for part in (mixer.in_proj, mixer.out_proj)]
        linears.append(model.lm_head)
        others = [language_model, language_model.embeddings, language_model.norm_f, *language_model.layers, *mixers]
        others.append(model.model)
        if not getattr(vars(model).get("forward"), "same_tokens", False):  # what trainers replace may say so
            others.append(model)
        others += [part for mixer in mixers for part in (mixer.norm, mixer.conv1d)]
        if any(_hooked(part) for part in (*linears, *others)):
            return None
        if any(type(part) is not nn.Linear or part.bias is not None for part in linears):
            return None
        if type(language_model.embeddings) is not nn.Embedding:
            return None
        layers = tuple(
            LayerWeights(
                norm=block.norm.weight,
                in_proj=mixer.in_proj.weight,
                conv=mixer.conv1d.weight,
                conv_bias=mixer.conv1d.bias,
                dt_bias=mixer.dt_bias,
                A_log=mixer.A_log,
                D=mixer.D,
                gated_norm=mixer.norm.weight,
                out_proj=mixer.out_proj.weight,
            )
            for block, mixer in zip(language_model.layers, mixers, strict=True)
        )
        weights = cls(
            embeddings=language_model.embeddings.weight,
            layers=layers,
            norm_f=language_model.norm_f.weight,
            head=model.lm_head.weight,
            shape=mixers[0].shape,
            stream_dtype=language_model.stream_dtype,
        )
        device, dtype = weights.embeddings.device, weights.embeddings.dtype
        matrices = [weights.norm_f, weights.head, *(layer.in_proj for layer in layers)]
        plain = all(type(tensor) is nn.Parameter and tensor.is_contiguous() for tensor in weights.tensors())
        here = all(tensor.device == device for tensor in weights.tensors())
        if not plain or not here or dtype == torch.float64 or any(tensor.dtype != dtype for tensor in matrices):
            return None
        return weights

    def tensors(self) -> list[Tensor]:
        """Every weight tensor that there is: embeddings, final norm, head, then layer by layer."""
        every = [self.embeddings, self.norm_f, self.head]
        for layer in self.layers:
            every += [tensor for tensor in layer if tensor is not None]
        return every


def prompt_step(
    language_model: TextStack, head: Tensor, buffers: "DecodeBuffers", ids: Tensor, lengths: Tensor
) -> None:
    """Read the first `lengths` (B,) of `ids` (B, S) and write the `logits` behind each row's last token.

    Everything goes through the model's own blocks; the buffers must have been loaded, and not stepped since.
    """
    x: Tensor = language_model.embeddings(ids).to(language_model.stream_dtype)
    delta: Tensor | None = None
    for block, state in zip(language_model.layers, buffers.layers(), strict=True):
        x, delta, new = block(x, delta, state, lengths)
        for own, value in zip(state, new, strict=True):
            own.copy_(value)  # at once: all layers' new states together would be as large as the buffers
    last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
    delta = None if delta is None else delta.gather(1, last)
    hidden = language_model.norm_f(x.gather(1, last), delta, head.dtype)[0][:, 0]
    torch.mm(hidden, head.T, out=buffers.logits)
    buffers.tokens.copy_(buffers.logits.argmax(-1))


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)  # accelerate's hooks replace forward, and so do trainers


class DecodeBuffers:
    """A batch's state and everything a step writes.

    Attributes:
        tokens: (B,) int64, read by a step and replaced by the likeliest next ones. logits: (B, V).
        conv, base, xbc, steps, totals: with a leading layer axis, as in `decode_reference`; slot: (1,) int32.
    """

    def __init__(
        self, weights: DecodeWeights, batch: int, slots: int = 1, state_dtype: torch.dtype = torch.float32
    ) -> None:
        shape, layers = weights.shape, len(weights.layers)
        device = weights.embeddings.device

        def model(*size: int) -> Tensor:
            return torch.zeros(size, device=device, dtype=weights.embeddings.dtype)

        def full(*size: int) -> Tensor:
            return torch.zeros(size, device=device, dtype=torch.float32)

        width = weights.embeddings.shape[1]
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.int32, device=device)
        self.position = 0  # slot's value, as the host knows it
        self.residual = torch.zeros(batch, width, device=device, dtype=weights.stream_dtype)
        self.normed = model(batch, width)
        self.projected = model(batch, shape.inner + shape.conv_dim + shape.num_heads)
        self.gated = full(batch, shape.inner)
        self.inner = model(batch, shape.inner)
        # Parts of squared norms, one per program of the kernels; what no program writes stays zero.
        self.squares = full(-(-width // 4))
        self.gated_squares = full(batch, square_parts(shape))
        splits, dtype = partial_sums(batch, weights.layers[0].out_proj)
        self.partial = torch.zeros(splits, batch, width, device=device, dtype=dtype)
        self.weights = full(batch, shape.num_heads, slots)
        self.decay = full(batch, shape.num_heads)
        self.logits = model(batch, weights.head.shape[0])
        self.conv = model(layers, batch, shape.conv_dim, shape.conv_kernel - 1)
        sizes = (layers, batch, shape.num_heads, shape.head_dim, shape.state_size)
        self.base = torch.zeros(sizes, device=device, dtype=state_dtype)
        self.xbc = model(layers, batch, slots, shape.conv_dim)
        self.steps = full(layers, batch, slots, shape.num_heads)
        self.totals = full(layers, batch, slots, shape.num_heads)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, nearly all of them the state's."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def load(self, state: VideoState) -> None:
        """Begin from `state`, which stays as it is."""
        state.copy_into(Mamba2State(self.conv, self.base))
        self.slot.zero_()
        self.position = 0

    def advance(self) -> bool:
        """Count a token that is going to be read; whether its step must fold the history."""
        self.position = (self.position + 1) % self.xbc.shape[2]
        return self.position == 0

    def layers(self) -> list[Mamba2State]:
        """Views of `conv` and `base`, layer by layer."""
        return unstack(Mamba2State(self.conv, self.base))

    def export(self) -> Mamba2State:
        """The state after the tokens read, all layers stacked; these buffers stay as they are."""
        ssm = self.base.to(torch.float32, copy=True)
        count, heads, size = int(self.slot), ssm.shape[2], ssm.shape[4]
        if count:
            groups = (self.xbc.shape[-1] - heads * ssm.shape[3]) // (2 * size)
            for layer, out in enumerate(ssm):
                totals, xbc = self.totals[layer, :, :count], self.xbc[layer, :, :count].float()
                x = xbc[..., : heads * ssm.shape[3]].unflatten(-1, (heads, -1))
                b = xbc[..., heads * ssm.shape[3] :][..., : groups * size].unflatten(-1, (groups, -1))
                b = b.repeat_interleave(heads // groups, dim=2)
                weights = self.steps[layer, :, :count] * torch.exp(totals[:, -1:] - totals)
                out *= torch.exp(totals[:, -1])[..., None, None]
                out += torch.einsum("bkhp,bkhn->bhpn", weights[..., None] * x, b)
        return Mamba2State(self.conv.clone(), ssm)


def token_step(ops: SimpleNamespace, weights: DecodeWeights, buffers: DecodeBuffers, fold: bool) -> None:
    """Read `buffers.tokens`, advance the state, write `logits` and the likeliest next `tokens`.

    Args:
        ops: `OPERATIONS` of `decode_kernels` or `decode_reference`.
        fold: this token takes the last slot, so the history becomes part of the state; see `DecodeBuffers.advance`.
    """
    shape, eps, b = weights.shape, weights.shape.eps, buffers
    b.residual.copy_(F.embedding(b.tokens, weights.embeddings))
    if len(b.tokens) == 1 and shape.n_groups == 1:
        _single_row_layers(ops, weights, b, fold)
        ops.norm_linear(b.normed, b.squares, weights.head, eps, b.logits)
    else:
        _batch_layers(ops, weights, b, fold)
        torch.mm(b.normed, weights.head.T, out=b.logits)
    if b.xbc.shape[2] > 1:
        b.slot.add_(1).remainder_(b.xbc.shape[2])
    b.tokens.copy_(b.logits.argmax(-1))


def _batch_layers(ops: SimpleNamespace, weights: DecodeWeights, b: DecodeBuffers, fold: bool) -> None:
    """Five operations a layer. The gated norm's factor is applied behind out_proj; with several groups, which have
    a factor each, the norm is an operation of its own."""
    shape, eps = weights.shape, weights.shape.eps
    grouped = shape.n_groups > 1
    squares = None if grouped else b.gated_squares
    partial = None
    for i, layer in enumerate(weights.layers):
        ops.add_norm(b.residual, partial, squares, shape.inner, layer.norm, eps, b.normed)
        ops.product(b.normed, layer.in_proj, b.projected)
        heads = (layer.dt_bias, layer.A_log, layer.D)
        history = (b.steps[i], b.totals[i], b.slot)
        ops.prepare_step(
            b.projected, b.conv[i], layer.conv, layer.conv_bias, *heads, b.xbc[i], *history, b.weights, b.decay, shape
        )
        scan = (b.projected, b.xbc[i], b.base[i], b.weights, b.decay, *history, fold)
        if grouped:
            ops.batch_scan_step(*scan, b.gated, None, None, shape)
            ops.group_norm(b.gated, layer.gated_norm, eps, shape.n_groups, b.inner)
        else:
            ops.batch_scan_step(*scan, b.inner, layer.gated_norm, squares, shape)
        partial = b.partial
        ops.partial_product(b.inner, layer.out_proj, partial)
    ops.add_norm(b.residual, partial, squares, shape.inner, weights.norm_f, eps, b.normed)


def _single_row_layers(ops: SimpleNamespace, weights: DecodeWeights, b: DecodeBuffers, fold: bool) -> None:
    """Three operations a layer. A norm's input goes from one to the next as its product with the norm's weight and
    parts of its square: nobody has to wait for the whole of it to be normalised."""
    shape, eps = weights.shape, weights.shape.eps
    scales = [*(layer.norm for layer in weights.layers), weights.norm_f]
    scale_residual(b.residual, scales[0], b.normed, b.squares)
    for i, layer in enumerate(weights.layers):
        convolution = (b.conv[i], layer.conv, layer.conv_bias, b.xbc[i], b.slot, shape)
        ops.norm_linear_conv(b.normed, b.squares, layer.in_proj, eps, b.projected, *convolution)
        history = (b.xbc[i], b.base[i], b.steps[i], b.totals[i], layer.A_log, layer.D, layer.dt_bias, b.slot, fold)
        ops.scan_step(b.projected, *history, b.inner, shape, layer.gated_norm, b.gated_squares[0])
        ops.gated_linear_add(
            b.inner, b.gated_squares[0], layer.out_proj, eps, b.residual, scales[i + 1], b.normed, b.squares
        )
