"""Loads a retrieval model with what reads its texts and its videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BERT, _BERT_WORDS = "google-bert/bert-base-uncased", 30522  # which the released models read texts with


def text_tokenizer(folder: str | Path | None, words: int) -> Any:
    """The tokenizer of a saved model, a folder or Hub id; of a converted one, which has none, BERT's own.

    Args:
        words: of the model's vocabulary.

    Raises:
        FileNotFoundError: there is none, and how to put it there. ValueError: it has more words than the model.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "vocab.txt")
    if folder is not None and (not Path(folder).is_dir() or any(Path(folder, name).is_file() for name in names)):
        found = AutoTokenizer.from_pretrained(folder)
    elif words != _BERT_WORDS:
        raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json): save the one it was trained with there")
    else:
        try:
            found = AutoTokenizer.from_pretrained(_BERT)
        except OSError:
            raise FileNotFoundError(
                f"{folder or 'the released file'} has no tokenizer, and {_BERT} cannot be fetched: save that one in "
                "the model's folder (AutoTokenizer.from_pretrained(...).save_pretrained(DIR))"
            ) from None
    if len(found) > words:
        raise ValueError(
            f"the tokenizer in {folder} has {len(found)} words, the model {words}: they do not belong together"
        )
    return found
