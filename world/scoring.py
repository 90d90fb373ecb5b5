"""Is a question about a rendered video answered right? Each video is read once; every question starts from that state.

Shapes: V videos of F frames each, Q questions over all of them, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..modeling_video_ma2mba.answering_questions import question_ids, video_prefix
from ..processing.text_batches import IGNORED_LABEL
from . import Question, WorldSample
from .questions import TIMED_KINDS

LONGEST_ANSWER = 20  # tokens of a byte-level answer such as "purple triangle", with its end
LONGEST_TIMED_ANSWER = 40  # with [1:02:03-1:02:10] behind it


def read_videos(model: Any, processor: Any, samples: Sequence[WorldSample], repeats: Sequence[int]) -> Any:
    """Read all videos (same number of frames) as one batch; the state holds row v `repeats[v]` times in a row."""
    frames = np.concatenate([sample.frames for sample in samples])
    length = len(samples[0].frames)
    opening = video_prefix(processor)  # with one token for the video
    readers = [(sample.timed_frames, list(sample.cues) or None) for sample in samples]
    timed = [processor.timed(reader, cues) for reader, cues in readers]
    shown = [
        processor.video_row(one, sample.timed_frames.timestamps) for one, sample in zip(timed, samples, strict=True)
    ]
    longest = max(map(len, shown))
    video = torch.full((len(shown), longest), processor.tokenizer.pad_token_id)
    mask = torch.zeros(len(shown), longest, dtype=torch.long)
    for row, ids in enumerate(shown):  # padded behind: none of it reaches the state
        video[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    before, device = opening[:, :-1].expand(len(shown), -1), model.device
    state = model(
        input_ids=torch.cat([before, video], dim=1).to(device),
        attention_mask=None if mask.all() else torch.cat([torch.ones_like(before), mask], dim=1).to(device),
        pixel_values_videos=torch.from_numpy(frames).permute(0, 3, 1, 2).to(device),
        num_frames=torch.tensor([length] * len(samples), device=device),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    rows = torch.arange(len(samples)).repeat_interleave(torch.tensor(repeats))
    state.reorder_cache(rows.to(device))
    return state


def _prompt(processor: Any, question: Question) -> list[int]:
    """Token ids from the video's end to where the answer begins; only what `question` goes on with is asked before."""
    said = [(role, text) for turn in question.before for role, text in _turn(turn)]
    turns = [{"role": role, "content": text} for role, text in [*said, *_turn(question)[:1]]]
    return question_ids(processor, turns)[0].tolist()


def _turn(question: Question) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", question.text), ("assistant", question.answer)


def _answer(processor: Any, question: Question) -> list[int]:
    tokenizer = processor.tokenizer
    return tokenizer(f"{question.answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def score_forced(model: Any, processor: Any, samples: Sequence[WorldSample]) -> list[tuple[Question, bool]]:
    """Exact match with the right answer given: each of its tokens must be the likeliest. Equals greedy decoding."""
    asked = [(sample, question) for sample in samples for question in sample.questions]
    state = read_videos(model, processor, samples, [len(sample.questions) for sample in samples])
    encoded = [(_prompt(processor, question), _answer(processor, question)) for _, question in asked]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids = torch.full((len(asked), longest), processor.tokenizer.pad_token_id)
    labels = torch.full((len(asked), longest), IGNORED_LABEL)
    mask = torch.zeros((len(asked), longest), dtype=torch.long)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    device = model.device
    mask = torch.cat([torch.ones(len(asked), state.get_seq_length(), dtype=torch.long), mask], dim=1)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=state).logits
    guesses = logits[:, :-1].argmax(-1).cpu()
    wanted = labels[:, 1:]
    right = ((guesses == wanted) | (wanted == IGNORED_LABEL)).all(dim=1)
    return [(question, bool(hit)) for (_, question), hit in zip(asked, right.tolist(), strict=True)]


@torch.inference_mode()
def generate_answers(model: Any, processor: Any, samples: Sequence[WorldSample]) -> list[tuple[Question, str]]:
    """Greedy answers through `generate()`, batched over all questions of all videos."""
    asked = [question for sample in samples for question in sample.questions]
    state = read_videos(model, processor, samples, [len(sample.questions) for sample in samples])
    prompts = [_prompt(processor, question) for question in asked]
    longest = max(map(len, prompts))
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    mask = torch.cat([mask.new_ones(len(asked), state.get_seq_length()), mask], dim=1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=state,
        do_sample=False,
        max_new_tokens=LONGEST_TIMED_ANSWER if any(q.kind in TIMED_KINDS for q in asked) else LONGEST_ANSWER,
        pad_token_id=pad,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    texts = processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [(question, text.strip()) for question, text in zip(asked, texts, strict=True)]
