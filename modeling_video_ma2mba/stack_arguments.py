"""Keyword arguments that forward passes take without naming them: what has no meaning here, and what is refused."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .state_outputs import CACHE_NAMES

_MEANINGLESS = {
    # said by input_ids and the state already, or about layers that this model does not have
    *("return_dict", "cache_position", "token_type_ids", "mm_token_type_ids", "position_ids", "is_first_iteration"),
    # for whoever computes the loss of a base model's output
    *("labels", "shift_labels", "num_items_in_batch"),
}


@functools.cache
def named_arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of a forward pass's arguments, those of the state included."""
    return frozenset((*inspect.signature(forward).parameters, *CACHE_NAMES, "position_ids"))


def refuse_unknown(given: dict[str, Any]) -> None:
    """Stop on keyword arguments that would change nothing, where somebody expects that they do.

    Raises:
        ValueError: one of them is set, and neither meaningless nor a name of the state.
    """
    unknown = [name for name, value in given.items() if value is not None and value is not False]
    unknown = [name for name in unknown if name not in _MEANINGLESS and name not in CACHE_NAMES]
    if "output_attentions" in unknown:
        raise ValueError("output_attentions cannot be honoured: the language model has no attention")
    if unknown:
        raise ValueError(f"the forward pass does not know the arguments {sorted(unknown)}: leave them out")


def packed_samples(
    position_ids: Tensor | None, attention_mask: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Sample numbers (B, S) of rows that say by position numbers alone that they hold several samples.

    Trainers that pack without padding give position numbers which begin again with every sample, and no mask.
    """
    if seq_idx is not None or position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return seq_idx
    begins = position_ids == 0
    again = begins[..., 1:]
    if position_ids.ndim != 2 or not bool(again.any()):
        return None
    begins[:, 0] = False
    return begins.cumsum(dim=1)
