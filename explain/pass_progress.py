"""How far the passes over a video are: the layers of the language model count the tokens that go through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


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
