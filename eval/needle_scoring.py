"""Is the needle found? Reading a haystack with needles in it from shared states, and scoring the answers.

Shapes: R rows (one per needle, then one per question), F frames, T tokens per frame, D width, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed

from ..modeling_video_ma2mba.reading_shared import SharedStack, reading_group
from ..world import Question
from .needle_haystack import CHUNK

_IGNORED = -100


def normalised(text: str) -> str:
    """What exact match compares: no case, no spaces at the ends, no full stop at the end."""
    return text.strip().removesuffix(".").rstrip().casefold()


class NeedleReader:
    """Reads haystacks and needles with one model; the haystack's frames pass the vision tower once.

    Their features wait in host memory: F * T * D numbers of the model's type (4.4 GB for 6,000 frames of a 2.7B model
    with 144 tokens a frame).
    """

    def __init__(self, model: Any, processor: Any, group: Any = None):
        """`group`: a process group whose ranks all make the same calls, and share the frames."""
        self.model, self.processor, self.group = model, processor, group
        self.frames_read = 0  # by the language model, each row counted
        self.fps = processor.video_processor.fps or 1.0
        self.text = processor.frame_text()

    def encode(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of what follows the frames up to the answer, and of the answer with its end."""
        blank = {"type": "image", "image": Image.new("RGB", (1, 1))}
        asked = {"role": "user", "content": [blank, {"type": "text", "text": question.text}]}
        sample = self.processor.tokenize_conversation([asked, {"role": "assistant", "content": question.answer}])
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        begin = len(ids) - ids[::-1].index(self.processor.video_token_id)
        answered = next(place for place, label in enumerate(labels) if label != _IGNORED)
        return ids[begin:answered], [label for label in labels if label != _IGNORED]

    def features(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (F, h, w, 3) as (F, T, D), on the host."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        found = self.model.get_video_features(pixels.to(self.model.device))
        return found.view(len(frames), self.model.config.tokens_per_frame, -1).cpu()

    def haystack(self, haystack: Any, frames: int) -> Tensor:
        """The features of a haystack's first `frames` frames, (F, T, D), on the host of every rank."""
        if self.group is None:
            return torch.cat([self.features(chunk) for chunk in haystack.chunks(frames)])
        rank, world = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        config = self.model.config
        shape = (frames, config.tokens_per_frame, config.text_config.hidden_size)
        found = torch.empty(shape, dtype=self.model.dtype)
        own, ranks = haystack.chunks(frames, (rank, world)), distributed.get_process_group_ranks(self.group)
        for number, piece in enumerate(found.split(CHUNK)):
            owner = number % world
            part = self.features(next(own)) if owner == rank else piece
            part = part.to(self.model.device)
            distributed.broadcast(part, ranks[owner], group=self.group)
            piece.copy_(part)
        return found

    def opening(self) -> Any:
        """The state after what stands before the frames: the system turn and the beginning of the user's."""
        blank = {"type": "image", "image": Image.new("RGB", (1, 1))}
        message = {"role": "user", "content": [blank, {"type": "text", "text": ""}]}
        prefix, _, readers = self.processor.streaming_prompt([message], add_generation_prompt=False)
        for reader in readers:
            reader.close()
        prefix = prefix[:, :-1].to(self.model.device)
        return self.model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values

    def advance(self, state: Any, features: Tensor, on_frames: Callable[[int], None] | None = None) -> None:
        """Read frames (F, T, D) into every row of `state`, or (R, F, T, D) row by row; `state` changes."""
        rows, first = state.batch_size, int(state.metadata.get("frames", 0))
        step = self.model.config.vision_chunk_frames
        features = features.expand(rows, *features.shape[-3:])
        state.metadata["frames"] = str(first + features.shape[1])
        pieces = [piece for piece in features.split(step, dim=1) if piece.shape[1]]
        if self.group is not None and len(pieces) > 1:
            self._advance_together(state, pieces, first, on_frames)
            return
        for piece in pieces:
            chunk = self._stamped(piece, first)
            self.model(inputs_embeds=chunk, past_key_values=state, use_cache=True, logits_to_keep=1)
            self._count(rows * piece.shape[1], on_frames)
            first += piece.shape[1]

    def _stamped(self, piece: Tensor, first: int) -> Tensor:
        """Frames (R, n, T, D), the first of them number `first`, as rows (R, N, D) with the model's time stamps."""
        rows = piece.flatten(1, 2).to(self.model.device)
        times = [number / self.fps for number in range(first, first + piece.shape[1])]
        texts = self.text.texts(times, (first - 1) / self.fps if first else None)
        if not texts:
            return rows
        per_frame, embeddings, parts, start = piece.shape[2], self.model.get_input_embeddings(), [], 0
        for place, ids in texts:
            words = embeddings(torch.tensor(ids, device=rows.device)).to(rows).expand(len(rows), -1, -1)
            parts += [rows[:, start * per_frame : place * per_frame], words]
            start = place
        return torch.cat([*parts, rows[:, start * per_frame :]], dim=1)

    def _advance_together(
        self, state: Any, pieces: Sequence[Tensor], first: int, on_frames: Callable[[int], None] | None = None
    ) -> None:
        """The same by all ranks of the group, each taking every W-th piece (R, F, T, D) through the layers."""
        link = reading_group(self.group, self.model.device)
        shared = SharedStack(self.model.model.language_model, link, state)
        for start in range(0, len(pieces), link.world):
            wave = pieces[start : start + link.world]
            stamped = []
            for piece in wave:
                stamped.append(self._stamped(piece, first))
                first += piece.shape[1]
            frames, own = sum(piece.shape[1] for piece in wave), stamped[link.rank : link.rank + 1]
            shared.round(own, sum(rows.shape[1] for rows in stamped))
            self._count(state.batch_size * frames, on_frames)
        state.take(shared.end())

    def _count(self, frames: int, on_frames: Callable[[int], None] | None) -> None:
        self.frames_read += frames
        if on_frames is not None:
            on_frames(self.frames_read)

    def with_needles(
        self, prefix: Any, needles: Tensor, rest: Tensor, on_frames: Callable[[int], None] | None = None
    ) -> Any:
        """The states (a row each) after `prefix`, one of the needles (R, T, D), and the rest (F, T, D)."""
        state = prefix.fork()
        state.batch_repeat_interleave(len(needles))
        self.advance(state, needles.unsqueeze(1), on_frames)
        self.advance(state, rest, on_frames)
        return state

    def answers(self, state: Any, questions: Sequence[Sequence[Question]]) -> list[list[tuple[str, bool]]]:
        """For each row of `state` and each of its questions: the greedy answer, and whether the right one is the
        likeliest at each of its tokens (its end included) when it is given. `state` stays as it is."""
        asked = [self.encode(question) for row in questions for question in row]
        rows = torch.tensor([number for number, row in enumerate(questions) for _ in row])
        forced = self._forced(_rows(state, rows), asked)
        greedy = self._greedy(_rows(state, rows), asked)
        pairs = iter(zip(greedy, forced, strict=True))
        return [[next(pairs) for _ in row] for row in questions]

    def _forced(self, state: Any, asked: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        device, seen = self.model.device, state.get_seq_length()
        longest = max(len(prompt) + len(answer) for prompt, answer in asked)
        ids = torch.full((len(asked), longest), self._pad())
        wanted = torch.full((len(asked), longest), _IGNORED)
        mask = torch.zeros(len(asked), longest, dtype=torch.long)
        for row, (prompt, answer) in enumerate(asked):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            wanted[row, len(prompt) : length] = torch.tensor(answer)
            mask[row, :length] = 1
        mask = torch.cat([mask.new_ones(len(asked), seen), mask], dim=1).to(device)
        logits = self.model(input_ids=ids.to(device), attention_mask=mask, past_key_values=state).logits
        guesses, wanted = logits[:, :-1].argmax(-1).cpu(), wanted[:, 1:]
        return ((guesses == wanted) | (wanted == _IGNORED)).all(dim=1).tolist()

    def _greedy(self, state: Any, asked: Sequence[tuple[list[int], list[int]]]) -> list[str]:
        device, seen = self.model.device, state.get_seq_length()
        longest = max(len(prompt) for prompt, _ in asked)
        ids = torch.full((len(asked), longest), self._pad())
        mask = torch.ones(len(asked), seen + longest, dtype=torch.long)
        for row, (prompt, _) in enumerate(asked):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, seen : seen + longest - len(prompt)] = 0
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=state,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(len(answer) for _, answer in asked) + 16,  # room for a wrong answer in words
            pad_token_id=self._pad(),
        )
        texts = self.processor.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _rows(state: Any, rows: Tensor) -> Any:
    chosen = state.fork()
    chosen.batch_select_indices(rows)
    return chosen
