"""One row to the model's inputs: readers for its videos, token ids with labels, what to leave out if it is too long.

Too long a sample loses frames first: all its videos are thinned evenly, down to `FEW_FRAMES` each. What is then still
too long loses its last turns, whole; with one turn left, frames again, down to one. An answer is never cut.
Shapes: F frames, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...processing.text_batches import IGNORED_LABEL
from .canonical import drop_empty
from .row_formats import check_answers, detect_format

LABELS = ("answers", "captions")
ENDS = ("all", "first")
LEAST_DECODED = 0.5
"""Share of a video's frames that must come out of the decoder: with fewer, what is asked may not be seen."""
FEW_FRAMES = 8
"""Frames of a video that are kept in preference to further turns about it."""

# Stage 1 and 1.5: what is seen and what is said about it, in turn; no roles, no questions.
CAPTION_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}{{- video_token + frame_separator -}}
{%- elif part['type'] == 'image' -%}{{- '<image>' + frame_separator -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}{{- part['text'] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class EncodingSettings:
    """How rows become samples. `fps` and `num_frames` as for `open_video`, None taking the processor's; `max_frames`
    bounds the frames of a whole sample, `max_length` its tokens. `ends`: which answers' end-of-text tokens are learnt;
    after answers of one word they would be half of the loss, and are easy, so "first" learns one of them only."""

    labels: str = "answers"
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    max_length: int | None = None
    ends: str = "all"

    def __post_init__(self) -> None:
        if self.ends not in ENDS:
            raise ValueError(f"ends={self.ends!r}: use one of {', '.join(ENDS)}")
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r}: use one of {', '.join(LABELS)}")
        for name in ("max_frames", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    @property
    def chat_template(self) -> str | None:
        """Template without roles where captions are learnt; None is the processor's own."""
        return CAPTION_TEMPLATE if self.labels == "captions" else None

    def tokens(self, processor: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids, each video and image being ONE token, and 1 for what is to be learnt."""
        given = 0
        if self.labels == "answers":
            given = sum(m["role"] == "assistant" and m.get("learn") is False for m in messages)
        is_text = all(message["role"] == "assistant" for message in messages)  # which nobody asked for: no roles
        return processor.conversation_tokens(messages, CAPTION_TEMPLATE if is_text else self.chat_template, given)


@dataclass
class Sample:
    """A row as the model takes it.

    `input_ids`, `labels` int64 `(S,)`; `pixels` uint8 `(F, 3, h, w)` or None; `frames`: frames of each video.
    `wanted_frames`: what sampling asked for before `max_length`; `dropped_turns`: answers left out; `notes`: damage;
    `readers`: of each video, where nothing has been read yet; `documents`: of a pack, the tokens of each sample in it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None
    frames: list[int]
    wanted_frames: int
    dropped_turns: int = 0
    notes: list[str] = field(default_factory=list)
    readers: list[Any] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)


def joined(samples: list[Sample]) -> Sample:
    """Samples one after the other. No sample's first token is learnt: nothing of its own comes before it."""
    labels = [sample.labels.clone() for sample in samples]
    for own in labels:
        own[0] = IGNORED_LABEL
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return Sample(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        labels=torch.cat(labels),
        pixels=torch.cat(pixels) if pixels else None,
        frames=[count for sample in samples for count in sample.frames],
        wanted_frames=sum(sample.wanted_frames for sample in samples),
        readers=[reader for sample in samples for reader in sample.readers],
        documents=[len(sample.input_ids) for sample in samples],
    )


@dataclass
class Layout:
    """What a row will be, before anything is decoded: tokens with each video as one of them, frames of each, and how
    many tokens (at most) are `told` between them."""

    tokens: list[int]
    written: list[int]
    frames: list[int]
    wanted_frames: int
    dropped_turns: int
    told: int = 0

    def length(self, tokens_per_frame: int) -> int:
        """Tokens of the whole sample."""
        return len(self.tokens) - len(self.frames) + tokens_per_frame * sum(self.frames) + self.told


def conversation_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat of a row in canonical or another form, videos and images of other columns in the places left for them.

    Raises:
        UnknownFormError: the row has columns that are not understood.
        ValueError: the row has a problem, or its places and videos differ in number.
    """
    if "problem" not in row and not _has_places(row.get("messages") or ()):
        row = {key: value for key, value in row.items() if value is not None}
        messages = detect_format(list(row), "a training row").convert(row, None)
        check_answers(messages)
        return [drop_empty(message) for message in messages]
    if row.get("problem"):
        raise ValueError(row["problem"])
    if not row["messages"]:
        raise ValueError("the row has no messages")
    messages = [m if isinstance(m["content"], str) else drop_empty(m) for m in row["messages"]]
    for kind in ("video", "image"):
        one, several = row.get(kind), row.get(f"{kind}s")
        held = iter(([] if one is None else [one]) + list([] if several is None else several))
        for part in (p for m in messages if not isinstance(m["content"], str) for p in m["content"]):
            if part["type"] == kind and kind not in part:
                part[kind] = next(held, None)
                if part[kind] is None:
                    raise ValueError(f"a place for a {kind} in the messages has no {kind}")
        if next(held, None) is not None:
            raise ValueError(f"there are more {kind}s than places for them in the messages")
    return messages


def _has_places(messages: Any) -> bool:
    """Whether messages are written in parts, and some of them are (places for) media."""
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if not all(isinstance(content, list) for content in contents):
        return False
    return any(isinstance(part, dict) and part.get("type") in ("video", "image") for c in contents for part in c)


def media_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts that are videos or images, in the order of the text."""
    return [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"]


def lay_out(
    processor: Any,
    messages: list[dict[str, Any]],
    frames: list[int],
    settings: EncodingSettings,
    told: list[int] | None = None,
) -> Layout:
    """Fit a sample into `max_frames` and `max_length`. `frames`: of each video as sampled, 1 for an image; `told`:
    tokens that are read between them.

    Raises:
        ValueError: there is no answer, or the first answer does not fit even with one frame of each video.
    """
    tokens, written = settings.tokens(processor, messages)
    wanted, told = sum(frames), [0] * len(frames) if told is None else told
    limit = settings.max_length
    if limit is None:
        return Layout(tokens, written, thin_frames(frames, settings.max_frames), wanted, 0, sum(told))
    dropped, few = 0, FEW_FRAMES
    per_frame = processor.tokens_per_frame
    while len(tokens) - len(frames) + sum(told) + per_frame * sum(min(n, few) for n in frames) > limit:
        shorter = without_last_turn(messages)
        if shorter is None and few > 1:
            few = 1
            continue
        if shorter is None:
            raise ValueError(
                f"its first question and answer take {len(tokens) + sum(told)} tokens besides the frames, which does "
                f"not fit into max_length={limit}; raise max_length"
            )
        messages, dropped = shorter, dropped + 1
        tokens, written = settings.tokens(processor, messages)
        frames, told = frames[: len(media_of(messages))], told[: len(media_of(messages))]
    room = (limit - (len(tokens) - len(frames)) - sum(told)) // per_frame
    kept = thin_frames(frames, min(room, settings.max_frames or room))
    return Layout(tokens, written, kept, wanted, dropped, sum(told))


def without_last_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation without its last answer and the question before it; None where only one answer is left."""
    answers = [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("learn") is not False
    ]
    return messages[: answers[-2] + 1] if len(answers) > 1 else None


def thin_frames(frames: list[int], limit: int | None) -> list[int]:
    """Frame counts that add up to at most `limit` (or 1 each, where that is more), thinned in proportion."""
    if limit is None or sum(frames) <= limit:
        return list(frames)
    room = max(limit - len(frames), 0)  # beyond the one frame that each keeps
    spare = sum(frames) - len(frames)
    shares = [(count - 1) * room / spare if spare else 0 for count in frames]
    kept = [1 + int(share) for share in shares]
    by_rest = sorted(range(len(frames)), key=lambda place: int(shares[place]) - shares[place])
    for place in by_rest[: room - sum(int(share) for share in shares)]:
        kept[place] += 1
    return kept


def open_media(processor: Any, messages: list[dict[str, Any]], settings: EncodingSettings) -> list[Any]:
    """A reader for each video and image; parts of one file share what was found out about it."""
    readers, opened = [], {}
    for part in media_of(messages):
        if part["type"] == "image":
            readers.append(processor.video_processor.open(part["image"], num_frames=1))
            continue
        source, window = part["video"], {"start": part.get("start"), "end": part.get("end")}
        key = source if isinstance(source, str) else id(source)
        if key in opened:
            reader = opened[key].resampled(**window)
        else:
            reader = processor.video_processor.open(source, fps=settings.fps, num_frames=settings.num_frames, **window)
            opened[key] = reader
        reader.duration  # noqa: B018  # scans the file
        readers.append(processor.timed(reader, part.get("subtitles")))
    return readers


def told_tokens(reader: Any) -> int:
    """Tokens that are read between the frames of a `timed` reader, if all that are sampled are read; else none."""
    text = getattr(reader, "text", None)
    return 0 if text is None else len(text.row(getattr(reader, "frame_times", ()), 0, 0))


def encode_row(processor: Any, row: dict[str, Any], settings: EncodingSettings, keep_pixels: bool = True) -> Sample:
    """Read the videos of one row and make the model's inputs of it; without `keep_pixels` frames are read and dropped.

    Raises:
        ValueError, OSError: what is wrong with the row or a video of it.
    """
    readers, layout = _opened(processor, row, settings)
    pixels, place = None, 0
    if keep_pixels and layout.frames:  # an hour is a gigabyte: frames go where they belong, and are never copied
        size = processor.video_processor.size
        pixels = torch.empty(sum(layout.frames), 3, size["height"], size["width"], dtype=torch.uint8)
    frames, rows, notes = [], [], []
    for reader, count in zip(readers, layout.frames, strict=True):
        before, times = place, []
        with reader:
            for chunk in getattr(reader, "untimed", reader).chunks():  # what is told follows from the times
                if pixels is not None:
                    pixels[place : place + len(chunk)] = torch.from_numpy(chunk.pixels).permute(0, 3, 1, 2)
                place += len(chunk)
                times += chunk.timestamps.tolist()
        frames.append(place - before)
        rows.append(processor.video_row(reader, times))
        if frames[-1] < LEAST_DECODED * count:
            raise ValueError(f"{reader.name}: only {frames[-1]} of {count} frames could be decoded")
        notes += [note for note in reader.warnings if note not in notes]
    pixels = None if pixels is None else pixels[:place]
    return assemble(processor, layout, pixels, frames, rows, notes, settings.ends)


def lay_out_row(processor: Any, row: dict[str, Any], settings: EncodingSettings) -> Sample:
    """What `encode_row` makes of a row whose frames are all there, before one of them is decoded: without pixels, with
    a reader for each video. For processes that share a sample: each decodes its own frames (`read_own`).

    Raises:
        ValueError, OSError: as `encode_row`, but for what only decoding finds out.
    """
    readers, layout = _opened(processor, row, settings)
    rows = [processor.video_row(reader, reader.frame_times.tolist()) for reader in readers]
    sample = assemble(processor, layout, None, layout.frames, rows, [], settings.ends)
    sample.readers = readers
    return sample


def read_own(sample: Sample, own: list[list[int]], size: Any) -> tuple[torch.Tensor, list[str]]:
    """Decode some of the frames of `lay_out_row`'s sample.

    Args:
        own: for each video, numbers of the frames wanted. size: the processor's, `{"height": h, "width": w}`.

    Returns:
        uint8 (wanted frames, 3, h, w), and what was damaged. Every wanted frame is there: what a damaged end lacks,
        its last frame takes the place of, as other processes have laid out the sample without having seen it.

    Raises:
        ValueError, OSError: less than `LEAST_DECODED` of a video's frames can be decoded.
    """
    pixels = torch.empty(sum(map(len, own)), 3, size["height"], size["width"], dtype=torch.uint8)
    place, notes = 0, []
    for reader, places in zip(sample.readers, own, strict=True):
        before = place
        with reader:
            for chunk in reader.chunks(places=places):
                pixels[place : place + len(chunk)] = torch.from_numpy(chunk.pixels).permute(0, 3, 1, 2)
                place += len(chunk)
        if place - before < LEAST_DECODED * len(places):
            raise ValueError(f"{reader.name}: only {place - before} of {len(places)} frames could be decoded")
        if missing := len(places) - (place - before):
            pixels[place : place + missing] = pixels[place - 1]
            place += missing
        notes += [note for note in reader.warnings if note not in notes]
    return pixels, notes


def _opened(processor: Any, row: dict[str, Any], settings: EncodingSettings) -> tuple[list[Any], Layout]:
    """A reader for each video of a row that has a place, thinned as the layout says."""
    messages = conversation_of(row)
    readers = open_media(processor, messages, settings)
    told = None if settings.max_length is None else [told_tokens(reader) for reader in readers]
    layout = lay_out(processor, messages, [reader.expected_frames for reader in readers], settings, told)
    thinned = [
        reader.resampled(num_frames=count) if count < reader.expected_frames else reader
        for reader, count in zip(readers, layout.frames, strict=False)
    ]
    return thinned, layout


def assemble(
    processor: Any,
    layout: Layout,
    pixels: torch.Tensor | None,
    frames: list[int],
    rows: list[list[int]],
    notes: list[str],
    ends: str = "all",
) -> Sample:
    """Put what was read of each video in the place of its placeholder, and label what the assistant wrote."""
    tokens, written = torch.tensor(layout.tokens), torch.tensor(layout.written)
    is_video = tokens == processor.video_token_id
    repeats = torch.ones_like(tokens)
    repeats[is_video] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids, within = tokens.repeat_interleave(repeats), is_video.repeat_interleave(repeats)
    if rows:
        ids[within] = torch.cat([torch.tensor(row, dtype=torch.int64) for row in rows])
    learnt = (written.repeat_interleave(repeats) == 1) & ~within
    if ends == "first":
        learnt[(learnt & (ids == processor.tokenizer.eos_token_id)).nonzero()[1:, 0]] = False
    if not learnt.any():
        raise ValueError("there is no answer (or caption) to learn from")
    return Sample(
        input_ids=ids,
        labels=torch.where(learnt, ids, IGNORED_LABEL),
        pixels=pixels,
        frames=frames,
        wanted_frames=layout.wanted_frames,
        dropped_turns=layout.dropped_turns,
        notes=notes,
    )
