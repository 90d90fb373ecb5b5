"""Gradients of an answer's log-probability with respect to the features of every frame, in bounded memory.

The frames run through the Multi-Axis Gradient Checkpointing engine, cell by cell; question and answer continue from
its states by plain autograd. The full-length tensors are the features, the model's input and its gradient (host
memory) and the engine's checkpoints. Parameters get no gradients. Legend: F frames, T tokens per frame, D model width,
L layers, B batch, C conv channels, W conv width, H heads, P head width, N state size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_video_ma2mba.planner import choose_plan
from ..modeling_video_ma2mba.recompute_engine import MultiAxisEngine
from ..modeling_video_ma2mba.recompute_plan import RecomputeSettings
from ..modeling_video_ma2mba.stack_language_model import CPU_SEGMENT
from ..modeling_video_ma2mba.stack_token_layout import TokenLayout
from ..modeling_video_ma2mba.stack_weights import execution_device, in_fp64
from ..modeling_video_ma2mba.state_video import VideoState
from .read_features import VideoQuestion


@contextlib.contextmanager
def as_function(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters: the model as a fixed function of its input."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


class VideoReading:
    """One differentiable reading of frame features, up to the question."""

    def __init__(self, model: Any, prompt: VideoQuestion, features: Tensor, memory: str | None = None) -> None:
        """Args:
        model: a `VideoMa2mbaForConditionalGeneration` inside `as_function`.
        features: (F, T, D), those of `prompt` or others in their place.
        memory: what the cells may take, such as "2GB"; None: what is free on a GPU, 2 GB on a CPU.

        Raises:
            ValueError: no plan fits into `memory`.
        """
        self.model, self.prompt = model, prompt
        language = self.language = model.model.language_model
        device = execution_device(language.norm_f)
        embeddings = model.get_input_embeddings()
        ids, _ = prompt.rows()
        self._is_frame = torch.cat([torch.zeros_like(prompt.opening, dtype=torch.bool), ids < 0])
        words = torch.cat([prompt.opening, ids[ids >= 0]]).to(execution_device(embeddings))
        rows = features.new_empty(len(self._is_frame), features.shape[-1])
        rows[self._is_frame], rows[~self._is_frame] = features.flatten(0, 1), embeddings(words).to(features)
        self.x = rows[None].requires_grad_()
        nothing = torch.zeros(self.x.shape[:2], dtype=torch.bool)  # hidden states of frames are not wanted
        engine = MultiAxisEngine()
        engine.configure(_settings(language, self.x, nothing, memory))
        start = VideoState.zeros(language.config, 1, device, language.norm_f.weight.dtype)
        with torch.enable_grad():
            _, layers = engine.run(language, self.x, start, TokenLayout(), nothing)
        self._after = VideoState(layers, self.x.shape[1])

    def state(self) -> VideoState:
        """What the model remembers of the frames, cut off from this reading."""
        return self._after.detach().fork()

    def log_probability(self, answer: Tensor) -> Tensor:
        """Log-probability (A,) of each token of `answer` (A,) behind the question; gradients flow to the frames."""
        with torch.enable_grad():
            return answer_log_probability(self.model, self._after, self.prompt.asked, answer)[0]

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient (F, T, D) of a number made from `log_probability`; once for each reading."""
        (gradient,) = torch.autograd.grad(value, self.x)
        return gradient[0, self._is_frame.to(gradient.device)].view(self.prompt.features.shape)


def _settings(language: Any, x: Tensor, keep: Tensor, memory: str | None) -> RecomputeSettings:
    """On a GPU the planner's cells; on a CPU the short ones that it computes fastest, where their states fit."""
    if execution_device(language.norm_f).type == "cuda":
        return RecomputeSettings(memory_budget=memory)
    memory = memory or "2GB"
    short = RecomputeSettings(memory_budget=memory, segment_length=CPU_SEGMENT)
    try:
        choose_plan(short, language, x, keep)
    except ValueError:  # longer cells have fewer borders, and if nothing fits the engine says what would
        return RecomputeSettings(memory_budget=memory)
    return short


def answer_log_probability(model: Any, state: VideoState, asked: Tensor, answer: Tensor) -> Tensor:
    """Log-probabilities (B, A) of the tokens `answer` (A,) after the question `asked` (Q,), from a state of B rows."""
    ids = torch.cat([asked, answer[:-1]])
    embeddings = model.get_input_embeddings()
    rows = embeddings(ids[None].to(execution_device(embeddings))).expand(state.batch_size, -1, -1)
    wanted = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    wanted[:, len(asked) - 1 :] = True
    hidden, _ = model.model.language_model.scan(rows, state, output_positions=wanted)
    scores = model.lm_head(hidden).float().log_softmax(-1).view(state.batch_size, len(answer), -1)
    return scores.gather(-1, answer.to(scores.device).expand(state.batch_size, -1)[..., None])[..., 0]


def gradient_times_input(reading: VideoReading, total: Tensor) -> Tensor:
    """Sum over each frame's features of gradient x input, fp64 (F,), signed: + speaks for the answer."""
    gradient = reading.gradient(total)
    return frame_sums(gradient, reading.prompt.features)


def integrated_gradients(
    model: Any, prompt: VideoQuestion, answer: Tensor, steps: int, memory: str | None = None
) -> Iterator[Tensor]:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365) from a still video to the given one, fp64 (F,).

    In the still video every frame has the mean features of all frames. Gradients are taken at the midpoints of
    `steps` parts of the straight line between the two videos, and averaged; gradient x input alone looks only at the
    end of that line, where a confident answer hardly changes any more. The values of a video add up to what its log-
    probability is above that of the still video (as far as so many steps approximate the integral).

    Yields:
        after each step its share; the sum of all is the result.
    """
    still = prompt.features.mean(dim=0, keepdim=True)
    change = prompt.features - still
    for step in range(steps):
        reading = VideoReading(model, prompt, still + change * ((step + 0.5) / steps), memory)
        yield frame_sums(reading.gradient(reading.log_probability(answer).sum()), change) / steps


def frame_sums(gradient: Tensor, change: Tensor) -> Tensor:
    """sum over T and D of gradient * change, both (F, T, D), frame by frame in fp64: no full-length product."""
    return torch.stack(
        [torch.dot(in_fp64(g.flatten()), in_fp64(c.flatten())) for g, c in zip(gradient, change, strict=True)]
    )
