"""A byte-level BPE tokenizer whose merges come from the rendered world's own words.

Any text still encodes and decodes without loss, because every single byte is a token; a word of the world is one token
instead of a token per letter, so a question is short beside the 16 tokens of a frame and its words can be looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..processing.byte_tokenizer import (
    END_TOKEN,
    PAD_TOKEN,
    ROLE_TOKENS,
    VIDEO_TOKEN,
    as_chat_tokenizer,
    byte_alphabet,
)
from ..processing.chat_format import DEFAULT_SYSTEM_PROMPT
from . import WorldDataset
from .questions import list_things, name_option
from .world import COLOURS, SHAPES

_LARGEST = 1024  # tokens; the words of the world need about half
_VIDEOS = 600


def _texts() -> Iterator[str]:
    """What is said about a fixed set of training videos, and every word alone, as an answer is."""
    data = WorldDataset("train", _VIDEOS, frames=(8, 32), questions=12, seed=1)
    yield DEFAULT_SYSTEM_PROMPT
    yield from chain(COLOURS, SHAPES)
    for index in range(_VIDEOS):
        world, questions = data.asked(index)
        named = [name_option(question) for question in questions if question.options]
        for question in [*questions, *named, list_things(world)]:
            yield question.text
            yield question.answer


def build_world_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the bundled model. Ids 0 to 5 are `<|endoftext|>` (begin and end of text), `<pad>`, `<video>`,
    `<|system|>`, `<|user|>`, `<|assistant|>`; then come the 256 bytes and the merged words. Pads on the left.
    """
    special = [END_TOKEN, PAD_TOKEN, VIDEO_TOKEN, *ROLE_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=byte_alphabet(),
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return as_chat_tokenizer(tokenizer)
