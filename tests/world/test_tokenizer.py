"""The tokenizer of the bundled model: words of the world are tokens, and no text is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from video_ma2mba.processing.byte_tokenizer import byte_alphabet
from video_ma2mba.world.tokenizer import build_world_tokenizer
from video_ma2mba.world.world import COLOURS, SHAPES

SPECIAL = ["<|endoftext|>", "<pad>", "<video>", "<|system|>", "<|user|>", "<|assistant|>"]
TOKENIZER = build_world_tokenizer()


@given(st.text(max_size=200))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_every_byte_is_a_token():
    assert set(byte_alphabet()) <= set(TOKENIZER.get_vocab())
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(6))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 0, 1)
    assert 300 < len(TOKENIZER) <= 1024


@pytest.mark.parametrize("word", [*COLOURS, *SHAPES, "left", "fourth", "4", "A"])
def test_answers_are_single_tokens(word):
    assert len(TOKENIZER(word)["input_ids"]) == 1
    assert len(TOKENIZER(f" {word}")["input_ids"]) in ((1,) if word != "A" else (1, 2))


def test_questions_are_short():
    assert len(TOKENIZER("Which way does the cyan star move?")["input_ids"]) == 8


def test_building_it_again_gives_the_same(tmp_path):
    assert build_world_tokenizer().get_vocab() == TOKENIZER.get_vocab()
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|><video>\nWhat colour is the heart? naïve ☃<|endoftext|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
