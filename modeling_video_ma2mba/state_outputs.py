"""Under which name transformers hands a model's memory over, and outputs that know it by every name.

It was `past_key_values` up to transformers 5.23 and is `cache` from 5.24 on. Whatever comes is what the installed
transformers calls it in its own outputs.
"""

from dataclasses import dataclass, fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_NAME = next(
    field.name
    for field in fields(BaseModelOutputWithPast)
    if field.name not in ("last_hidden_state", "hidden_states", "attentions")
)
"""Argument and output by which the installed transformers passes a state."""
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values", "cache", "cache_params")))
"""All names under which a state is taken."""


def take_state(arguments: dict[str, Any]) -> Any:
    """Remove every name of a state from keyword arguments and return the state, or None.

    Raises:
        ValueError: two different states were given under two names.
    """
    given = {name: arguments.pop(name) for name in CACHE_NAMES if name in arguments}
    states = [(name, state) for name, state in given.items() if state is not None]
    if any(state is not states[0][1] for _, state in states):
        raise ValueError(f"a state was given twice, as {' and as '.join(name for name, _ in states)}: give one")
    return states[0][1] if states else None


def check_state(state: Any, text_config: Any) -> None:
    """ValueError unless a given cache is a state of a model with this `Ma2mbaTextConfig`."""
    if not hasattr(state, "check_fits"):
        raise ValueError(
            f"a {type(state).__name__} cannot be this model's memory, which is a VideoState: pass none to begin, or "
            "the past_key_values that the model returned"
        )
    state.check_fits(text_config)


class _EveryName:
    """Lets an output's state be read as `past_key_values` and as `cache`, whichever transformers is installed."""

    def __getattr__(self, name: str) -> Any:
        if name in CACHE_NAMES and name != CACHE_NAME:
            return getattr(self, CACHE_NAME)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass
class StateModelOutput(_EveryName, BaseModelOutputWithPast):
    """`last_hidden_state`, `past_key_values` (also called `cache`), `hidden_states`."""


@dataclass
class StateCausalLMOutput(_EveryName, CausalLMOutputWithPast):
    """`loss`, `logits`, `past_key_values` (also called `cache`), `hidden_states`."""
