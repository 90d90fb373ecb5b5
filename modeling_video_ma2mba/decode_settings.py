"""What a `GenerationConfig` asks for, as transformers' own processors and stopping criteria.

Every class used is a public one of transformers, looked up by name when it is wanted: one that an installed version
lacks costs the setting that needs it, nothing else.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,
}
"""What `generate()` assumes where neither the call nor the model says anything."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "guidance_scale": (1, 1.0),
    "token_healing": (False,),
    "is_assistant": (False,),
    "low_memory": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
"""Values by which a setting asks for nothing."""

_NO_MATTER = {
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("do_sample", "use_cache", "num_beams", "num_return_sequences", "output_scores", "output_logits"),
    # these concern beams, assistants and compilation, of which there are none here
    *("early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("disable_compile", "return_dict_in_generate", "prefill_chunk_size", "transformers_version"),
    *("decoder_start_token_id", "max_cache_len"),
}
"""Settings that the loop reads itself, and those that say nothing to it."""


class Prompt(NamedTuple):
    """What processors must know about the prompts."""

    tokens: int
    device: torch.device
    ends: Tensor | None
    longest: int
    vocabulary: int


Build = Callable[[Any, Any, Prompt], Any]


def _plain(kind: Any, value: Any, prompt: Prompt) -> Any:
    return kind(value)


def _on_device(kind: Any, value: Any, prompt: Prompt) -> Any:
    return kind(value, device=prompt.device)


def _until_end(kind: Any, value: Any, prompt: Prompt) -> Any:
    return kind(value, prompt.ends, device=prompt.device)


# In transformers' order, which is part of the result: setting, class, and how the class is made of the value.
_PROCESSORS: tuple[tuple[str, str, Build], ...] = (
    ("sequence_bias", "SequenceBiasLogitsProcessor", _plain),
    ("repetition_penalty", "RepetitionPenaltyLogitsProcessor", _plain),
    ("no_repeat_ngram_size", "NoRepeatNGramLogitsProcessor", _plain),
    ("bad_words_ids", "NoBadWordsLogitsProcessor", lambda kind, value, prompt: kind(value, prompt.ends)),
    ("min_length", "MinLengthLogitsProcessor", _until_end),
    (
        "min_new_tokens",
        "MinNewTokensLengthLogitsProcessor",
        lambda kind, value, prompt: kind(prompt.tokens, value, prompt.ends, device=prompt.device),
    ),
    ("forced_bos_token_id", "ForcedBOSTokenLogitsProcessor", _plain),
    (
        "forced_eos_token_id",
        "ForcedEOSTokenLogitsProcessor",
        lambda kind, value, prompt: kind(prompt.longest, value, device=prompt.device),
    ),
    ("remove_invalid_values", "InfNanRemoveLogitsProcessor", lambda kind, value, prompt: kind()),
    (
        "exponential_decay_length_penalty",
        "ExponentialDecayLengthPenalty",
        lambda kind, value, prompt: kind(value, prompt.ends, prompt.tokens),
    ),
    ("suppress_tokens", "SuppressTokensLogitsProcessor", _on_device),
    (
        "begin_suppress_tokens",
        "SuppressTokensAtBeginLogitsProcessor",
        lambda kind, value, prompt: kind(value, prompt.tokens, device=prompt.device),
    ),
)
_WARPERS: tuple[tuple[str, str, Build], ...] = (
    ("temperature", "TemperatureLogitsWarper", _plain),
    ("top_h", "TopHLogitsWarper", _plain),
    ("top_k", "TopKLogitsWarper", _plain),
    ("top_p", "TopPLogitsWarper", _plain),
    ("min_p", "MinPLogitsWarper", _plain),
    ("typical_p", "TypicalLogitsWarper", _plain),
    ("epsilon_cutoff", "EpsilonLogitsWarper", _plain),
    ("eta_cutoff", "EtaLogitsWarper", _on_device),
)
_NEED_ENDS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")


def settled(
    own: GenerationConfig, given: GenerationConfig | None, changes: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings that hold, by `generate()`'s rule: call before `generation_config` before model before defaults.

    Args:
        own: the model's. given: the call's `generation_config`. changes: the call's keyword arguments.

    Returns:
        A configuration of its own, and the keyword arguments that are no settings.
    """
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    usual = {name: getattr(own, name) for name in own.to_dict() if not name.startswith("_") and hasattr(own, name)}
    for name, value in (*usual.items(), *DEFAULTS.items()):
        if value is not None and getattr(config, name, None) is None:
            setattr(config, name, value)
    return config, config.update(**changes)


def plain_mode(config: GenerationConfig) -> bool:
    """Whether a configuration asks for greedy search or for sampling, token by token."""
    return config.get_generation_mode().value in ("greedy_search", "sample")


def unsupported_settings(config: GenerationConfig) -> list[str]:
    """Names of the settings that are asked for and that only `generate()` can honour."""
    known = (
        _NO_MATTER | {name for name, *_ in (*_PROCESSORS, *_WARPERS)} | {"watermarking_config", "renormalize_logits"}
    )
    asked = [
        name
        for name, value in config.to_dict().items()
        if value is not None and value not in _NEUTRAL.get(name, ()) and not name.startswith("_")
    ]
    unknown = [name for name in asked if name not in known]
    table = _PROCESSORS + (_WARPERS if config.do_sample else ())
    missing = [name for name, kind, _ in table if name in asked and not hasattr(transformers, kind)]
    unusual = [] if plain_mode(config) else ["num_beams"] if (config.num_beams or 1) > 1 else ["penalty_alpha"]
    return unknown + missing + unusual + ([] if config.use_cache is not False else ["use_cache"])


def end_tokens(config: GenerationConfig) -> list[int]:
    """Ids that end an answer."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return torch.as_tensor(ends).flatten().tolist()


def pad_token(config: GenerationConfig) -> int | None:
    """The id behind an answer that has ended: the padding token, or else the first that ends answers."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return next(iter(end_tokens(config)), None)


def processors_of(
    config: GenerationConfig,
    prompt: Prompt,
    given: Sequence[Any] = (),
    allowed: Callable[[int, Tensor], list[int]] | None = None,
) -> LogitsProcessorList:
    """All processors in transformers' order; one of the caller's replaces ours of the same class.

    Args:
        given: the caller's. allowed: `prefix_allowed_tokens_fn`.
    """
    own = _built(_PROCESSORS, config, prompt)
    if allowed is not None:
        copies = config.num_return_sequences or 1
        own.append(transformers.PrefixConstrainedLogitsProcessor(allowed, copies))
    own = _merged(own, given)
    if config.do_sample:
        own += _built(_WARPERS, config, prompt)
    if config.watermarking_config is not None:
        own.append(config.watermarking_config.construct_processor(prompt.vocabulary, prompt.device))
    if config.renormalize_logits:
        own.append(transformers.LogitNormalization())
    return LogitsProcessorList(own)


def criteria_of(
    config: GenerationConfig, prompt: Prompt, tokenizer: Any = None, given: Sequence[Any] = ()
) -> StoppingCriteriaList:
    """What ends a row: length, time, strings, tokens, and the caller's criteria, which replace ours of their class."""
    own: list[Any] = [transformers.MaxLengthCriteria(prompt.longest)]
    if config.max_time is not None:
        own.append(transformers.MaxTimeCriteria(config.max_time))
    stop = stop_strings_of(config, {"tokenizer": tokenizer})
    if stop is not None:
        own.append(stop)
    if prompt.ends is not None:
        own.append(transformers.EosTokenCriteria(prompt.ends))
    return StoppingCriteriaList(_merged(own, given))


def stop_strings_of(config: GenerationConfig, arguments: dict[str, Any]) -> Any:
    """The criterion for `stop_strings`, or None.

    Raises:
        ValueError: there is no tokenizer among the arguments.
    """
    if not config.stop_strings:
        return None
    if arguments.get("tokenizer") is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=processor.tokenizer")
    return transformers.StopStringCriteria(tokenizer=arguments["tokenizer"], stop_strings=config.stop_strings)


def _built(table: Sequence[tuple[str, str, Build]], config: GenerationConfig, prompt: Prompt) -> list[Any]:
    found = []
    for name, kind, made in table:
        value = getattr(config, name, None)
        neutral = value is None or value in _NEUTRAL.get(name, ())
        if not neutral and not (name in _NEED_ENDS and prompt.ends is None):
            found.append(made(getattr(transformers, kind), value, prompt))
    return found


def _merged(own: list[Any], given: Sequence[Any]) -> list[Any]:
    replaced = [next((g for g in given if type(g) is type(o)), o) for o in own]
    return replaced + [g for g in given if not any(g is o for o in replaced)]
