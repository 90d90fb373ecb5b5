"""The byte tokenizer loses nothing; videos fit into a text model's embeddings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from video_ma2mba.processing.byte_tokenizer import add_video_tokens, build_byte_tokenizer

SPECIAL = ["<|endoftext|>", "<pad>", "<video>", "<|system|>", "<|user|>", "<|assistant|>"]
TOKENIZER = build_byte_tokenizer()


@given(st.text(max_size=200))
def test_any_text_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    if not any(token in text for token in SPECIAL):
        assert ids == [6 + byte for byte in text.encode()]


def test_special_tokens():
    assert len(TOKENIZER) == 262
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(6))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 0, 1)
    text = "<|user|><video>\n 'twas  here .<|endoftext|>"
    ids = TOKENIZER(text)["input_ids"]
    assert ids[:2] == [4, 2] and ids[-1] == 0
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "\n 'twas  here ."
    assert TOKENIZER(["a", "bcd"], padding=True)["input_ids"][0] == [1, 1, 6 + ord("a")]


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|><video>naïve ☃  '' \x00\r\n<|endoftext|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 1, 0)


def test_video_tokens_fit_into_spare_embedding_rows(neox_like):
    size = len(neox_like)
    before = neox_like("what shape?")["input_ids"]
    assert add_video_tokens(neox_like, embedding_rows=size + 11) == size
    assert neox_like.pad_token_id == size + 1 != neox_like.eos_token_id
    assert len(neox_like) == size + 2
    assert neox_like("what shape?")["input_ids"] == before
    assert neox_like("a<video>b")["input_ids"].count(size) == 1
    assert neox_like.padding_side == "left"
    assert add_video_tokens(neox_like, embedding_rows=size + 2) == size  # a second call changes nothing
    assert len(neox_like) == size + 2


def test_video_tokens_that_do_not_fit_are_refused(neox_like):
    with pytest.raises(ValueError, match="resize the embeddings"):
        add_video_tokens(neox_like, embedding_rows=len(neox_like) + 1)
    assert "<video>" not in neox_like.get_vocab()
