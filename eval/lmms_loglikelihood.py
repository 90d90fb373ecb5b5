"""How likely a given answer is."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .lmms_requests import Prompt
from .state_store import StateStore


@torch.no_grad()
def continuation_loss(pipe: Any, store: StateStore, prompt: Prompt, text: str) -> tuple[float, bool]:
    """Negative log-likelihood of `text` and of its end as the answer (summed over tokens), and whether it is the
    greedy one."""
    blank = {"type": "image", "image": Image.new("RGB", (1, 1))}
    first, *later = prompt.messages
    asked = [{**first, "content": [blank, *first["content"]]}, *later]
    sample = pipe.processor.tokenize_conversation([*asked, {"role": "assistant", "content": text.strip()}])
    ids, labels = sample["input_ids"], sample["labels"]
    begin = int((ids == pipe.processor.video_token_id).nonzero()[-1]) + 1
    ids, labels = ids[begin:], labels[begin:]
    state = store.state(prompt.media).fork().to(pipe.model.device, pipe.model.dtype)
    mask = torch.ones(1, state.get_seq_length() + len(ids), dtype=torch.long, device=pipe.model.device)
    logits = pipe.model(input_ids=ids[None].to(pipe.model.device), attention_mask=mask, past_key_values=state).logits
    wanted = labels[1:].to(logits.device)
    places = wanted != -100
    logits, wanted = logits[0, :-1][places].float(), wanted[places]
    loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return loss.item(), bool((logits.argmax(-1) == wanted).all())
