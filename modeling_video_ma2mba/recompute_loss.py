"""Next-token loss over labelled positions, in chunks: logits for a whole sequence never exist.

A million positions times 50,288 logits are 100 GB in 16 bits; the answers that carry labels are a few hundred tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .recompute_chunks import ChunkedRows, ChunkJob, RowLayout, fill_rows
from .recompute_plan import LOGITS_PER_CHUNK

IGNORE_INDEX = -100


def shift_labels_left(labels: Tensor) -> Tensor:
    """`(B, S)` labels aligned with tokens -> labels aligned with the position that predicts them."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def chunked_causal_lm_loss(
    lm_head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross entropy of `lm_head(hidden)` against `targets`; the value of transformers' `ForCausalLMLoss`.

    Args:
        hidden: `(n, D)` hidden states of the labelled positions only.
        targets: `(n,)` token ids, every one of them valid.
        num_items_in_batch: what to divide the sum by (Trainer counts over accumulation steps); None takes the mean.
        chunk: positions per chunk; None keeps the logits of a chunk around 128 MB.

    Returns:
        A scalar in at least fp32. Without any labelled position it is 0 and still reaches every parameter, so that a
        rank of a distributed run that drew an unlabelled sample takes part in the gradient exchange.
    """
    weight = 1.0
    if len(targets) == 0:
        hidden, targets, weight = hidden.new_zeros(1, hidden.shape[1]) + hidden.sum() * 0, targets.new_zeros(1), 0.0
    targets = targets.to(hidden.device)

    def losses(piece: Tensor, first: int) -> Tensor:
        logits = lm_head(piece)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = targets[first : first + len(piece)].to(logits.device)
        return F.cross_entropy(logits, wanted, reduction="none").unsqueeze(1)

    wide = torch.promote_types(hidden.dtype, torch.float32)
    job = ChunkJob(
        run=losses,
        chunk=chunk or max(1, LOGITS_PER_CHUNK // lm_head.out_features),
        rows_per_item=1,
        width=1,
        dtype=wide,
        layout=RowLayout(len(hidden), hidden.device),
        devices=[hidden.device],
    )
    parameters: list[Any] = [p for p in lm_head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (parameters or hidden.requires_grad):
        total = ChunkedRows.apply(job, hidden, None, *parameters).sum()
    else:
        total = fill_rows(job, hidden).sum()
    if num_items_in_batch is None:
        return total * weight / len(targets)
    if isinstance(num_items_in_batch, Tensor):
        return total * weight / num_items_in_batch.to(total.device).clamp(min=1)  # 0 where no rank has a label
    return total * weight / max(num_items_in_batch, 1)
