"""Which seconds of a video an answer rests on: `relevance` computes the curves, `Relevance` holds and writes them."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling_video_ma2mba.state_writing import whole_file, write_whole
from .attribution import VideoReading, as_function, gradient_times_input, integrated_gradients
from .decay import DecayRecorder
from .read_features import VideoQuestion, read_features

MEANINGS = {
    "gradient_x_input": "gradient x input: the answer's log-probability, differentiated with respect to each frame's "
    "projected features, times these features, summed over the frame; signed",
    "integrated_gradients": "gradient x input, averaged on the way from a still video (every frame the mean of all) "
    "to the given one; signed; adds up to about the log-probability that the video's changes give the answer",
    "decay": "share of what each frame wrote into the state that is left when the answer begins, mean over heads and "
    "layers; the same for every answer to the same question: what could be remembered, not what was used",
}
"""What each curve is, in words."""


@dataclass(frozen=True)
class Relevance:
    """Curves over the F frames that were looked at.

    Attributes:
        answer, log_probability: what was explained, and the sum of its tokens' log-probabilities (its end included).
        times: float64 (F,), seconds at which the frames are shown. duration: seconds the video lasts.
        gradient_x_input, integrated_gradients, decay: float64 (F,), see `MEANINGS`; integrated_gradients may be None.
        decay_by_layer: float64 (L, F), mean over the heads of each layer.
    """

    video: str
    question: str
    answer: str
    log_probability: float
    times: np.ndarray
    duration: float
    gradient_x_input: np.ndarray
    integrated_gradients: np.ndarray | None
    decay: np.ndarray
    decay_by_layer: np.ndarray

    @property
    def method(self) -> str:
        """Name of the attribution that `peak` and pictures go by: integrated gradients, where they were computed."""
        return "gradient_x_input" if self.integrated_gradients is None else "integrated_gradients"

    @property
    def attribution(self) -> np.ndarray:
        """The curve named by `method`, float64 (F,)."""
        return getattr(self, self.method)

    @property
    def peak(self) -> float:
        """Second of the frame that speaks most for the answer."""
        return float(self.times[int(np.argmax(self.attribution))])

    def per_second(self) -> list[dict[str, float]]:
        """One row a second in which frames were looked at: attributions summed over its frames, decay averaged."""
        rows = []
        seconds = np.floor(self.times + 1e-3).astype(int)
        for second in np.unique(seconds):
            inside = seconds == second
            row = {"second": int(second), "frames": int(inside.sum())}
            row |= {name: float(getattr(self, name)[inside].sum()) for name in self._attributions()}
            rows.append(row | {"decay": float(self.decay[inside].mean())})
        return rows

    def as_dict(self, layers: bool = False) -> dict[str, Any]:
        """Everything as JSON can hold it; `layers` adds the decay of every layer."""
        names = [*self._attributions(), "decay"]
        facts = {
            name: getattr(self, name)
            for name in ("video", "question", "answer", "log_probability", "duration", "method", "peak")
        }
        facts["curves"] = {name: MEANINGS[name] for name in names}
        facts["per_second"] = self.per_second()
        facts["frames"] = {"times": self.times.tolist()} | {name: getattr(self, name).tolist() for name in names}
        if layers:
            facts["frames"]["decay_by_layer"] = self.decay_by_layer.tolist()
        return facts

    def save_json(self, path: str | Path, layers: bool = False) -> None:
        """Write `as_dict`."""
        text = json.dumps(self.as_dict(layers), indent=1, ensure_ascii=False)
        write_whole(path, text + "\n")

    def save_csv(self, path: str | Path) -> None:
        """Write `per_second`, one line a second."""
        rows = self.per_second()
        with whole_file(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def _attributions(self) -> list[str]:
        return ["gradient_x_input", *(["integrated_gradients"] if self.integrated_gradients is not None else [])]


def relevance(
    model: Any,
    processor: Any,
    video: Any,
    question: str,
    answer: str | None = None,
    *,
    steps: int = 8,
    memory: str | None = None,
    max_new_tokens: int = 64,
    on_frames: Callable[[int, int | None], None] | None = None,
    on_share: Callable[[float], None] | None = None,
    **video_settings: Any,
) -> Relevance:
    """Explain one answer about one video.

    Args:
        model, processor: a `VideoMa2mbaForConditionalGeneration` and its processor.
        video: anything the processor opens; read once.
        answer: what to explain; None: the model's own (greedy) answer.
        steps: of integrated gradients; 0 leaves them out. Time grows with `steps` + 1, memory does not.
        memory: what the recomputed cells may take, such as "2GB"; None: what is free on a GPU, 2 GB on a CPU.
        on_frames: called with frames read and expected; then on_share: with the share of the passes done, 0..1.
        video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames`.

    Raises:
        ValueError: an empty question or answer, a model that answers nothing, a video without frames, no plan that
            fits into `memory`.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: must be 0 (gradient x input only) or more")
    if answer is not None and not answer.strip():
        raise ValueError("the answer is empty: give the words to explain, or leave it out to explain the model's own")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a PEFT adapter's wrapper
    with as_function(model), ExitStack() as stack:
        prompt = read_features(model, processor, video, question, on_frames, **video_settings)
        frames, language = len(prompt.features), model.model.language_model
        stack.enter_context(pass_progress(language, (steps + 1) * len(prompt.rows()[0]), on_share))
        recorder = DecayRecorder(language, frames)
        with recorder.recording(_places_of_frames(prompt)):
            reading = VideoReading(model, prompt, prompt.features, memory)
        ids, text = _answer(model, processor, reading, answer, max_new_tokens)
        asked = torch.full((len(prompt.asked) + len(ids) - 1,), frames + 1)
        asked[: len(prompt.asked)] = frames
        with recorder.recording(asked):
            scores = reading.log_probability(ids)
        curve = gradient_times_input(reading, scores.sum()).numpy()
        total = scores.detach().sum().item()
        del reading, scores
        integrated = torch.zeros(frames, dtype=torch.float64) if steps else None
        for share in integrated_gradients(model, prompt, ids, steps, memory):
            integrated += share
    weights = recorder.weights()
    return Relevance(
        video=prompt.name,
        question=question,
        answer=text,
        log_probability=total,
        times=prompt.times,
        duration=prompt.duration,
        gradient_x_input=curve,
        integrated_gradients=None if integrated is None else integrated.numpy(),
        decay=weights.mean(dim=(0, 1)).numpy(),
        decay_by_layer=weights.mean(dim=1).numpy(),
    )


def _places_of_frames(prompt: VideoQuestion) -> Tensor:
    before = torch.full((len(prompt.opening),), len(prompt.features) + 1)
    return torch.cat([before, prompt.rows()[1]])


def _answer(
    model: Any, processor: Any, reading: VideoReading, answer: str | None, max_new_tokens: int
) -> tuple[Tensor, str]:
    """Token ids (A,) of the answer, its end included, and its text."""
    tokenizer = processor.tokenizer
    if answer is not None:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id]), answer
    asked = reading.prompt.asked
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        out = model.generate(
            input_ids=asked[None].to(model.device),
            past_key_values=reading.state(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
    ids = out[0, len(asked) :].cpu()
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if not text:
        raise ValueError("the model answers nothing to this question: there is nothing to explain; give an answer")
    return ids, text


@contextlib.contextmanager
def pass_progress(language_model: Any, tokens: int, tell: Callable[[float], None] | None) -> Iterator[None]:
    """Call `tell(share)`, rising from 0 to 1, while the model computes gradients of a sequence inside.

    Args:
        language_model: a `Ma2mbaTextModel`.
        tokens: of all sequences together; each goes through every layer once forward and once recomputed backward.
        tell: what it raises ends the work; None counts nothing.
    """
    if tell is None:
        yield
        return
    done, whole = 0, 2 * len(language_model.layers) * tokens

    def count(_: Any, given: tuple[Any, ...], __: Any) -> None:
        nonlocal done
        done += given[0].shape[1]
        tell(min(done / whole, 1.0))

    hooks = [layer.mixer.in_proj.register_forward_hook(count) for layer in language_model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
