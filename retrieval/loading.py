"""Loads a retrieval model with what reads its texts and its videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, device, dtype

from ..modeling_video_ma2mba.state_identity import weights_digest
from .index import Clip, Maker
from .search import Retriever

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


def load_retriever(
    source: str, place: device, kind: dtype, trust_remote_code: bool = False, length: int | None = None
) -> tuple[Retriever, Callable[[Clip], Tensor], Maker]:
    """A model at work; a function from a clip to its pixels uint8 (frames, 3, H, W); and what tells its index.

    Args:
        source: directory or Hub id. length: tokens of a text that are read; None is the model's own.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such model, it is of another kind, or it is incomplete.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    import video_ma2mba  # noqa: F401 (registers the classes)

    from ..processing.video_processing_videomamba import VideoMambaVideoProcessor
    from ..processing.video_source_names import check_source

    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **remote)
    if config.model_type != "videomamba_retrieval":
        raise ValueError(
            f"{source} holds a model of the type {config.model_type}, not a retrieval model of VideoMamba"
        )
    most = config.text_config.max_position_embeddings
    if length is not None and length > most:
        raise ValueError(f"--max-text-length {length}: the model reads {most} tokens at most")
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(source, config=config, dtype=kind, **remote).eval().to(place)
    vision = config.vision_config
    processor = VideoMambaVideoProcessor(vision.image_size, vision.num_frames)

    def decode(clip: Clip) -> Tensor:
        check_source(clip.file)
        return processor(clip.file, start=clip.start, end=clip.end)["pixel_values"][0]

    name = f"{weights_digest(model)} {vision.num_frames} x {vision.image_size}"
    maker = Maker(name, config.projection_dim, vision.hidden_size)
    return Retriever(model, text_tokenizer(source, config.text_config.vocab_size), length), decode, maker
