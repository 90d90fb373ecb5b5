"""The rendered world as a Hugging Face `datasets` data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .dataset import WorldDataset
from .questions import SPOKEN_KINDS

if TYPE_CHECKING:
    import datasets


def load_world(
    split: str = "train", size: int = 1000, *, streaming: bool = False, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """Videos in memory with their questions; `options` are those of `WorldDataset`.

    Columns: ``video`` uint8 (F, H, W, 3), ``messages`` (one chat about it, the first turn holds the video's place),
    ``questions`` (kind, question, options, answer), ``frames``. With `streaming`, videos are drawn when they are read;
    otherwise once, into the cache of `datasets`.
    """
    import datasets

    data = WorldDataset(split, size, **options)
    if data.speaks:
        raise ValueError(f"these rows hold no subtitles: leave {', '.join(SPOKEN_KINDS)} out, or render files")
    side = data.resolution
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "video": datasets.Array4D(shape=(None, side, side, 3), dtype="uint8"),
            "messages": [{"role": text, "content": [{"type": text, "text": text}]}],
            "questions": [{"kind": text, "question": text, "options": [text], "answer": text}],
            "frames": datasets.Value("int32"),
        }
    )
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_rows, features=features, gen_kwargs={"split": split, "size": size, "options": options})


def _rows(split: str, size: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for sample in WorldDataset(split, size, **options):
        messages = [
            {"role": message["role"], "content": [{"text": None, **part} for part in message["content"]]}
            for message in sample.messages()
        ]
        questions = [
            {"kind": q.kind, "question": q.text, "options": list(q.options), "answer": q.answer}
            for q in sample.questions
        ]
        yield {"video": sample.frames, "messages": messages, "questions": questions, "frames": len(sample.frames)}
