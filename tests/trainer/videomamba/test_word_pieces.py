"""A vocabulary made from captions: the same for the same texts, since processes and resumed runs make it anew."""

from video_ma2mba.trainer.videomamba.word_pieces import SPECIAL, word_pieces


def test_the_same_texts_give_the_same_pieces():
    texts = ["A red ball", "a blue ball, a red ring"]
    tokenizer = word_pieces(texts, 100)
    order = sorted(set("".join(texts).lower()) - {" "}, key=lambda each: (-"".join(texts).lower().count(each), each))
    pieces = [
        *SPECIAL,
        *(piece for letter in order for piece in (letter, f"##{letter}")),
        "ball",
        "red",
        "blue",
        "ring",
    ]
    assert tokenizer.get_vocab() == {piece: number for number, piece in enumerate(pieces)}
    assert all(word_pieces(reversed(texts), 100).get_vocab() == tokenizer.get_vocab() for _ in range(3))
    assert tokenizer.tokenize("Red BALL, drab") == ["red", "ball", ",", "d", "##r", "##a", "##b"]
    assert tokenizer.decode(tokenizer("a red ring")["input_ids"], skip_special_tokens=True) == "a red ring"
    assert tokenizer("zoo")["input_ids"] == [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]


def test_few_pieces_are_the_most_frequent_letters():
    pieces = [*SPECIAL, "a", "##a", "b", "##b"]
    assert word_pieces(["aab b a c"], 9).get_vocab() == {piece: number for number, piece in enumerate(pieces)}
