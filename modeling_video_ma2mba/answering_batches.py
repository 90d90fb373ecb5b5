"""Questions to answers: several states, each with its question, generate together and stay as they are."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .decode_loop import decode, one_state
from .decode_settings import end_tokens, settled, unsupported_settings
from .stack_weights import execution_device
from .state_video import VideoState

DEFAULT_NEW_TOKENS = 256
_FOR_THE_LOOP = {
    "logits_processor": "processors",
    "stopping_criteria": "criteria",
    "prefix_allowed_tokens_fn": "allowed",
    "tokenizer": "tokenizer",
    "streamer": "streamer",
    "seed": "seed",
}
"""Arguments of `generate()`, and the loop's names of them."""


def answer_together(
    model: Any,
    tokenizer: Any,
    states: Sequence[VideoState],
    questions: Sequence[Tensor],
    return_scores: bool = False,
    **settings: Any,
) -> list[list[dict[str, Any]]]:
    """Decode all answers in one batch.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`.
        states: one of a single row for each question; the same one may come several times. They are not changed.
        questions: (1, Q) token ids of what follows the video, of any lengths.
        return_scores: add the mean probability of each answer's tokens.
        settings: those of `generate()`, and `seed` (see `decode_loop.decode`); at most 256 tokens come where neither
            these nor the model say. A single streamer is told one answer after the other.

    Returns:
        For each question a list of `{"answer": ..., "score": ...}`, `num_return_sequences` long.

    Raises:
        ValueError: a setting that is unknown or cannot be.
    """
    streamer = settings.get("streamer")
    if streamer is not None and not isinstance(streamer, list | tuple) and len(states) > 1:
        pairs = zip(states, questions, strict=True)
        return [answer_together(model, tokenizer, [s], [q], return_scores, **settings)[0] for s, q in pairs]
    longest = max(question.shape[1] for question in questions)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(questions), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(questions), longest, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, longest - question.shape[1] :], mask[row, longest - question.shape[1] :] = question[0], 1

    if settings.get("generation_config") is None and not {"max_new_tokens", "max_length"} & settings.keys():
        own = model.generation_config
        if own.max_new_tokens is None and own.max_length in (None, 20):  # 20: what transformers <= 5.1 fills in
            settings["max_new_tokens"] = DEFAULT_NEW_TOKENS
    settings.setdefault("pad_token_id", pad)
    settings.setdefault("tokenizer", tokenizer)
    given = {name: settings.pop(name, None) for name in ("generation_config", *_FOR_THE_LOOP)}
    config, others = settled(model.generation_config, given["generation_config"], settings)
    if others or unsupported_settings(config):
        rows = _by_generate(model, states, ids, mask, return_scores, given, settings)
    else:
        loop = {ours: given[theirs] for theirs, ours in _FOR_THE_LOOP.items()}
        loop |= {name: loop[name] or () for name in ("processors", "criteria")}
        found = decode(model, states, ids, config, mask=mask, log_probabilities=return_scores, **loop)
        rows = [
            (row[:length].tolist(), None if found.log_probabilities is None else found.log_probabilities[i, :length])
            for i, (row, length) in enumerate(zip(found.tokens, found.lengths, strict=True))
        ]
    texts = tokenizer.batch_decode([row for row, _ in rows], skip_special_tokens=True)
    answers = [{"answer": text.strip()} for text in texts]
    for answer, (_, log_probabilities) in zip(answers, rows, strict=True):
        if log_probabilities is not None:
            answer["score"] = log_probabilities.float().exp().mean().item()
    per_question = len(answers) // len(questions)
    return [answers[i : i + per_question] for i in range(0, len(answers), per_question)]


def _by_generate(
    model: Any,
    states: Sequence[VideoState],
    ids: Tensor,
    mask: Tensor,
    return_scores: bool,
    given: dict[str, Any],
    settings: dict[str, Any],
) -> list[tuple[list[int], Tensor | None]]:
    """What the loop cannot do, above all beams: tokens of each row, and their log-probabilities where wanted."""
    state = one_state(model, states)
    device = execution_device(model.get_input_embeddings())
    seed = given.pop("seed")
    if isinstance(seed, list | tuple):
        raise ValueError("one seed a row is not possible with beams and what else only generate() does: give one seed")
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.cat([mask.new_ones(len(ids), state.get_seq_length()), mask], dim=1).to(device),
            past_key_values=state,
            **{name: value for name, value in given.items() if value is not None},
            **settings,
            **({"output_logits": True} if return_scores else {}),
            return_dict_in_generate=True,
        )
    new = found.sequences[:, ids.shape[1] :]
    values: list[Tensor | None] = [None] * len(new)
    if return_scores:
        beams = getattr(found, "beam_indices", None)
        values = model.compute_transition_scores(found.sequences, found.logits, beams, normalize_logits=True)
    config, _ = settled(model.generation_config, given.get("generation_config"), settings)
    ends, pad = set(end_tokens(config)), settings["pad_token_id"]
    lengths = [_answer_length(row, ends, pad) for row in new.tolist()]
    return [
        (row[:n].tolist(), None if value is None else value[:n])
        for row, value, n in zip(new, values, lengths, strict=True)
    ]


def _answer_length(ids: list[int], ends: set[int], pad: int) -> int:
    """Tokens of an answer, the ending one included and padding behind it excluded."""
    count = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    if count is None:
        count = len(ids)
        while count > 1 and ids[count - 1] == pad:
            count -= 1
    return count
