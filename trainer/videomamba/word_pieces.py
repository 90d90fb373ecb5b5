"""A tokenizer of BERT's kind made from captions, where no trained one is at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_pieces(texts: Iterable[str], size: int) -> Any:
    """A fast tokenizer of transformers with at most `size` word pieces, lower case: the letters of `texts` and their
    most frequent words. The same texts give the same pieces, in every process and every resumed run (the trainers of
    `tokenizers` decide ties at random)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    pieces = [*SPECIAL, *(each for letter in _frequent(letters) for each in (letter, f"##{letter}"))]
    pieces += [word for word in _frequent(words) if len(word) > 1]
    made = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces[:size])}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizer, decoders.WordPiece()
    begin, end = made.token_to_id("[CLS]"), made.token_to_id("[SEP]")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", begin), ("[SEP]", end)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _frequent(counts: Counter[str]) -> list[str]:
    """The most frequent first, those of the same frequency in alphabetical order."""
    return sorted(counts, key=lambda each: (-counts[each], each))
