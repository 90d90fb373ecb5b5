"""Questions to answers: several states, each with its question, generate together and stay as they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .stack_weights import execution_device
from .state_video import VideoState

DEFAULT_NEW_TOKENS = 256


def answer_together(
    model: Any,
    tokenizer: Any,
    states: Sequence[VideoState],
    questions: Sequence[Tensor],
    return_scores: bool = False,
    **generate: Any,
) -> list[list[dict[str, Any]]]:
    """Generate all answers in one batch; a streamer takes one at a time.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`.
        states: one of a single row for each question; the same one may come several times. They are not changed.
        questions: (1, Q) token ids of what follows the video, of any lengths.
        return_scores: add the mean probability of each answer's tokens.
        generate: settings of `generate()`; at most 256 tokens come where neither these nor the model say.

    Returns:
        For each question a list of `{"answer": ..., "score": ...}`, `num_return_sequences` long.
    """
    if generate.get("streamer") is not None and len(states) > 1:
        pairs = zip(states, questions, strict=True)
        return [answer_together(model, tokenizer, [s], [q], return_scores, **generate)[0] for s, q in pairs]
    embeddings = model.get_input_embeddings()
    device, dtype = execution_device(embeddings), embeddings.weight.dtype
    seen = max(state.seen_tokens for state in states)
    states = [state.to(device, dtype) for state in states]
    conv = torch.cat([state.conv for state in states], dim=1)
    ssm = torch.cat([state.ssm for state in states], dim=1)

    longest = max(question.shape[1] for question in questions)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(questions), longest), pad, dtype=torch.long)
    mask = torch.ones(len(questions), seen + longest, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, longest - question.shape[1] :] = question[0]
        mask[row, seen : seen + longest - question.shape[1]] = 0

    if generate.get("generation_config") is None and not {"max_new_tokens", "max_length"} & generate.keys():
        own = model.generation_config
        if own.max_new_tokens is None and own.max_length in (None, 20):  # 20: what transformers <= 5.1 fills in
            generate["max_new_tokens"] = DEFAULT_NEW_TOKENS
    generate.setdefault("pad_token_id", pad)
    found = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        past_key_values=VideoState(conv, ssm, seen),
        **generate,
        **({"output_logits": True} if return_scores else {}),
        return_dict_in_generate=True,
    )
    new = found.sequences[:, longest:]
    answers = [{"answer": text.strip()} for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    if return_scores:
        log_probabilities = model.compute_transition_scores(
            found.sequences, found.logits, getattr(found, "beam_indices", None), normalize_logits=True
        )
        for answer, row, values in zip(answers, new.tolist(), log_probabilities, strict=True):
            answer["score"] = _mean_probability(row, values, _ends(model, generate), pad)
    per_question = len(answers) // len(questions)
    return [answers[i : i + per_question] for i in range(0, len(answers), per_question)]


def _ends(model: Any, generate: dict[str, Any]) -> set[int]:
    config = generate.get("generation_config") or model.generation_config
    ends = generate.get("eos_token_id", config.eos_token_id)
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _mean_probability(ids: list[int], log_probabilities: Tensor, ends: set[int], pad: int) -> float:
    """Mean probability of the generated tokens, the ending one included and padding behind it excluded."""
    count = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    if count is None:
        count = len(ids)
        while count > 1 and ids[count - 1] == pad:
            count -= 1
    return log_probabilities[:count].float().exp().mean().item()
