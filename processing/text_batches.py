"""Cuts and pads rows of token ids into a batch."""

from typing import Any

import torch

IGNORED_LABEL = -100


def pad_batch(
    rows: list[list[int]],
    extras: dict[str, list[list[int]]],
    *,
    pad_token_id: int | None,
    whole_token_id: int,
    return_tensors: str | None,
    padding: bool | str | None = None,
    padding_side: str = "left",
    truncation: bool | str | None = False,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Any]:
    """Make `input_ids`, `attention_mask` and `extras` of equal length out of rows of token ids.

    Args:
        extras: further rows of one number a token, by name; padded with 0.
        whole_token_id: the video placeholder; a row may not be cut where that would lose one of them.
        padding: True or "longest", "max_length", False or "do_not_pad"; None pads only where tensors need it.

    Raises:
        ValueError: rows of unequal length for tensors, no pad token, or a cut through a video.
    """
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, not {return_tensors!r}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    if truncation not in (False, None, "do_not_truncate"):
        if max_length is None:
            raise ValueError("truncation needs max_length")
        if any(whole_token_id in row[max_length:] for row in rows):
            raise ValueError(
                f"max_length={max_length} would cut a video off; raise it, or look at fewer frames (fps, max_frames)"
            )
        rows = [row[:max_length] for row in rows]
        extras = {name: [values[:max_length] for values in given] for name, given in extras.items()}
    longest = max(map(len, rows))
    if padding is None:
        padding = return_tensors is not None and any(len(row) != longest for row in rows)
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        longest = max(longest, max_length)
    elif padding not in (True, False, "longest", "do_not_pad"):
        raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', not {padding!r}")
    pads = padding not in (False, "do_not_pad")
    if pads and pad_to_multiple_of:
        longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    if pads and pad_token_id is None and any(len(row) != longest for row in rows):
        raise ValueError("the tokenizer has no pad token; add one with add_video_tokens")
    if return_tensors is not None and not pads and any(len(row) != longest for row in rows):
        raise ValueError("the prompts differ in length; tensors of them need padding=True")

    def fill(values: list[list[int]], filler: int) -> Any:
        if pads:
            values = [
                [filler] * (longest - len(row)) + row
                if padding_side == "left"
                else row + [filler] * (longest - len(row))
                for row in values
            ]
        if return_tensors is None:
            return values
        tensor = torch.tensor(values, dtype=torch.long)
        return tensor if return_tensors == "pt" else tensor.numpy()

    batch = {"input_ids": fill(rows, pad_token_id or 0), "attention_mask": fill([[1] * len(row) for row in rows], 0)}
    return batch | {name: fill(values, 0) for name, values in extras.items()}
