"""Is a question about a rendered video answered right? Each video is read once; every question starts from that state.

Shapes: V videos of F frames each, Q questions over all of them, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import Question, WorldSample
from .batches import IGNORED, ChatTokens

LONGEST_ANSWER = 20  # tokens of a byte-level answer such as "purple triangle", with its end


def read_videos(model: Any, tokens: ChatTokens, samples: Sequence[WorldSample], repeats: Sequence[int]) -> Any:
    """Read all videos (same number of frames) as one batch; the state holds row v `repeats[v]` times in a row."""
    frames = np.concatenate([sample.frames for sample in samples])
    length = len(samples[0].frames)
    prefix = tokens.opening + [tokens.video_id] * (length * tokens.tokens_per_frame)
    device = model.device
    state = model(
        input_ids=torch.tensor([prefix] * len(samples), device=device),
        pixel_values_videos=torch.from_numpy(frames).permute(0, 3, 1, 2).to(device),
        num_frames=torch.tensor([length] * len(samples), device=device),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    rows = torch.arange(len(samples)).repeat_interleave(torch.tensor(repeats))
    state.reorder_cache(rows.to(device))
    return state


@torch.inference_mode()
def score_forced(model: Any, tokens: ChatTokens, samples: Sequence[WorldSample]) -> list[tuple[Question, bool]]:
    """Exact match with the right answer given: each of its tokens must be the likeliest. Equals greedy decoding."""
    asked = [(sample, question) for sample in samples for question in sample.questions]
    state = read_videos(model, tokens, samples, [len(sample.questions) for sample in samples])
    encoded = [tokens.encode_question(question) for _, question in asked]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(asked), longest), tokens.tokenizer.pad_token_id)
    labels = torch.full((len(asked), longest), IGNORED)
    mask = torch.zeros((len(asked), longest), dtype=torch.long)
    for row, (question_ids, question_labels) in enumerate(encoded):
        ids[row, : len(question_ids)] = torch.tensor(question_ids)
        labels[row, : len(question_labels)] = torch.tensor(question_labels)
        mask[row, : len(question_ids)] = 1
    device = model.device
    mask = torch.cat([torch.ones(len(asked), state.get_seq_length(), dtype=torch.long), mask], dim=1)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=state).logits
    guesses = logits[:, :-1].argmax(-1).cpu()
    wanted = labels[:, 1:]
    right = ((guesses == wanted) | (wanted == IGNORED)).all(dim=1)
    return [(question, bool(hit)) for (_, question), hit in zip(asked, right.tolist(), strict=True)]


@torch.inference_mode()
def generate_answers(model: Any, tokens: ChatTokens, samples: Sequence[WorldSample]) -> list[tuple[Question, str]]:
    """Greedy answers through `generate()`, batched over all questions of all videos."""
    asked = [question for sample in samples for question in sample.questions]
    state = read_videos(model, tokens, samples, [len(sample.questions) for sample in samples])
    prompts = [tokens.encode_question(question, with_answer=False)[0] for question in asked]
    longest = max(map(len, prompts))
    pad = tokens.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    mask = torch.cat([mask.new_ones(len(asked), state.get_seq_length()), mask], dim=1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=state,
        do_sample=False,
        max_new_tokens=LONGEST_ANSWER,
        pad_token_id=pad,
        eos_token_id=tokens.tokenizer.eos_token_id,
    )
    texts = tokens.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [(question, text.strip()) for question, text in zip(asked, texts, strict=True)]
