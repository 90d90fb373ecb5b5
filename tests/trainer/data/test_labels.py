"""Labels, token by token, and what is left out of samples that are too long."""

import itertools
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings

from video_ma2mba.processing.byte_tokenizer import END_TOKEN
from video_ma2mba.trainer.data.sample_encoding import (
    FEW_FRAMES,
    EncodingSettings,
    encode_row,
    lay_out,
    thin_frames,
    without_last_turn,
)

PER_FRAME = 4
TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)
FRAMES = st.lists(st.integers(1, 40), max_size=5)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tokens_of(processor, *pieces) -> tuple[list[int], list[int]]:
    """(ids, labels) of pieces in turn: a text that is read, ("learnt", text), or a number of frames."""
    ids, labels = [], []
    for piece in pieces:
        if isinstance(piece, int):
            found, learnt = [processor.video_token_id] * (piece * PER_FRAME), False
        else:
            learnt = isinstance(piece, tuple)
            text = piece[1] if learnt else piece
            found = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if learnt else [-100] * len(found)
    return ids, labels


def row_of(*messages: dict) -> dict:
    return {"messages": list(messages), "id": "row", "problem": None}


def check(sample, expected) -> None:
    ids, labels = expected
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == labels
    assert sample.input_ids.dtype == sample.labels.dtype == torch.int64


def test_answers_only(processor, video_folder, turn):
    row = row_of(*turn("Q1", "A1", video=str(video_folder / "a.mp4")), *turn("Q2", "A2 <|endo"))
    sample = encode_row(processor, row, EncodingSettings())
    opening = f"<|system|>{processor.system_prompt}{END_TOKEN}<|user|>"
    expected = tokens_of(
        processor,
        opening,
        6,
        f"\nQ1{END_TOKEN}<|assistant|>",
        ("learnt", f"A1{END_TOKEN}"),
        f"<|user|>Q2{END_TOKEN}<|assistant|>",
        ("learnt", f"A2 <|endo{END_TOKEN}"),
    )
    check(sample, expected)
    assert sample.frames == [6] and sample.pixels.shape == (6, 3, 16, 16) and sample.pixels.dtype == torch.uint8


def test_captions_only_with_clips_in_turn(processor, video_folder, frame_numbers):
    def clip(start, end, caption):
        part = {"type": "video", "video": str(video_folder / "long.mp4"), "start": start, "end": end}
        said = {"role": "assistant", "content": [{"type": "text", "text": caption}]}
        return {"role": "user", "content": [part, {"type": "text", "text": "Describe."}]}, said

    row = row_of(*clip(3.0, 7.0, "first"), *clip(20.0, 22.0, "second"))
    sample = encode_row(processor, row, EncodingSettings(labels="captions"))
    caption = [("learnt", f"{text}{END_TOKEN}") for text in ("first", "second")]
    check(sample, tokens_of(processor, 4, "\n", caption[0], 2, "\n", caption[1]))
    assert sample.frames == [4, 2]
    assert frame_numbers(sample.pixels) == [3, 4, 5, 6, 20, 21]


def test_images_and_text_alone(processor, video_folder, turn):
    image = encode_row(processor, row_of(*turn("Q", "A", image=str(video_folder / "dot.png"))), EncodingSettings())
    assert image.frames == [1] and image.pixels.shape == (1, 3, 16, 16)
    assert (image.input_ids == processor.video_token_id).sum() == PER_FRAME
    text = encode_row(processor, row_of(*turn("Q", "A")), EncodingSettings())
    assert text.pixels is None and text.frames == []
    assert text.input_ids[text.labels >= 0].tolist() == tokens_of(processor, f"A{END_TOKEN}")[0]


@st.composite
def conversations(draw) -> tuple[list[dict], list[int], list[str]]:
    """Messages whose media are lists of blank frames, how many each has, and the answers."""
    messages, frames, answers = [], [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(1, 25), max_size=2))
        parts = [{"type": "video", "video": torch.zeros(n, 3, 9, 11, dtype=torch.uint8)} for n in counts]
        parts.append({"type": "text", "text": draw(TEXTS)})
        answers.append(draw(TEXTS))
        frames += counts
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return messages, frames, answers


def learnt_runs(processor, sample) -> list[str]:
    """Texts of the runs of labels, each cut at its end-of-text tokens."""
    runs = itertools.groupby(sample.labels.tolist(), key=lambda label: label >= 0)
    texts = [processor.tokenizer.decode(list(run)) for learnt, run in runs if learnt]
    assert all(text.endswith(END_TOKEN) for text in texts)
    return [text for run in texts for text in run.split(END_TOKEN)[:-1]]


@QUICK
@given(conversations())
def test_encoding_is_that_of_the_processor(processor, found):
    messages, frames, answers = found
    sample = encode_row(processor, row_of(*messages), EncodingSettings())
    reference = processor.tokenize_conversation(messages)
    assert torch.equal(sample.input_ids, reference["input_ids"])
    assert torch.equal(sample.labels, reference["labels"])
    assert sample.frames == frames == reference.get("num_frames", torch.tensor([])).tolist()
    assert learnt_runs(processor, sample) == answers


@QUICK
@given(conversations(), st.integers(60, 260), st.sampled_from(["answers", "captions"]), st.none() | st.integers(1, 30))
def test_long_samples_lose_frames_then_turns_and_never_part_of_an_answer(processor, found, limit, labels, most):
    messages, frames, answers = found
    chosen = EncodingSettings(labels=labels, max_length=limit, max_frames=most)
    first = messages[: next(n for n, m in enumerate(messages) if m["role"] == "assistant") + 1]
    tokens, _ = processor.conversation_tokens(first, chosen.chat_template)
    videos = tokens.count(processor.video_token_id)
    if len(tokens) + videos * (PER_FRAME - 1) > limit:  # the first turn with one frame of each video
        event("does not fit")
        with pytest.raises(ValueError, match=f"max_length={limit}"):
            encode_row(processor, row_of(*messages), chosen)
        return
    sample = encode_row(processor, row_of(*messages), chosen)
    event(f"turns dropped: {sample.dropped_turns > 0}, frames dropped: {sum(sample.frames) < sum(frames)}")
    kept = learnt_runs(processor, sample)
    assert len(sample.input_ids) <= limit
    assert kept == answers[: len(kept)] and len(kept) == len(answers) - sample.dropped_turns
    assert sum(sample.frames) == sum(sample.input_ids == processor.video_token_id) // PER_FRAME
    assert sum(sample.frames) <= max(most or 10**9, len(sample.frames))
    assert sample.wanted_frames == sum(frames)
    if sample.dropped_turns:  # not one more turn would have fitted, with a few frames of each video
        more = messages
        for _ in range(sample.dropped_turns - 1):
            more = without_last_turn(more)
        tokens, _ = processor.conversation_tokens(more, chosen.chat_template)
        media = frames[: sum(p["type"] == "video" for m in more for p in m["content"] if m["role"] == "user")]
        assert len(tokens) + sum(min(n, FEW_FRAMES) * PER_FRAME - 1 for n in media) > limit


@given(FRAMES, st.integers(0, 120))
def test_thinning_is_even_and_leaves_every_video_a_frame(frames, limit):
    kept = thin_frames(frames, limit)
    assert len(kept) == len(frames)
    assert all(1 <= k <= n for k, n in zip(kept, frames, strict=True))
    assert sum(kept) == min(sum(frames), max(limit, len(frames)))
    for (a, kept_a), (b, kept_b) in itertools.permutations(zip(frames, kept, strict=True), 2):
        assert kept_a <= kept_b + 1 if a <= b else True


def test_without_limits_nothing_is_left_out(processor, turn):
    layout = lay_out(processor, turn("Q", "A"), [3, 9], EncodingSettings())
    assert layout.frames == [3, 9] and layout.dropped_turns == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "id": "x", "problem": "line 3 is odd"}, "line 3 is odd"),
        ({"messages": [], "id": "x", "problem": None}, "no messages"),
        ({"messages": [{"role": "user", "content": "only a question"}]}, "no answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "has no video"),
    ],
)
def test_rows_without_sense(processor, row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(processor, row, EncodingSettings())


def test_media_of_other_columns_fill_the_places_in_order(processor, turn, video_folder):
    messages = [*turn("Q", "A"), *turn("Q", "A")]
    for message in messages[::2]:
        message["content"].insert(0, {"type": "video", "video": None})
    files = [{"path": None, "bytes": (video_folder / f"{name}.mp4").read_bytes()} for name in ("b", "a")]
    sample = encode_row(processor, {"messages": messages, "id": "x", "videos": files}, EncodingSettings())
    assert sample.frames == [3, 6]
    with pytest.raises(ValueError, match="more videos than places"):
        encode_row(processor, {"messages": messages[:2], "id": "x", "videos": files}, EncodingSettings())


def test_damaged_videos_are_used_and_noted(processor, tmp_path, video_folder, turn):
    """Half of a file whose index comes first: what is there is read, and a note says what is missing."""
    import av

    whole = tmp_path / "whole.mp4"
    with (
        av.open(str(video_folder / "long.mp4")) as source,
        av.open(str(whole), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = whole.read_bytes()
    half = tmp_path / "half.mp4"
    half.write_bytes(data[: len(data) - 120])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = encode_row(processor, row_of(*turn("Q", "A", video=str(half))), EncodingSettings())
    assert sample.notes
    assert 0 < sample.frames[0] < 30
    assert (
        (sample.input_ids == processor.video_token_id).sum()
        == PER_FRAME * sample.frames[0]
        == PER_FRAME * len(sample.pixels)
    )


def test_settings_are_checked():
    for wrong in ({"labels": "all"}, {"max_length": 0}, {"max_frames": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EncodingSettings(**wrong)


def test_subtitles_of_a_row_are_read_between_its_frames(processor, turn, video_folder, tmp_path):
    """From a column, a part of a message, or cues in memory; what is told is never learnt, and counts as length."""
    video = next(path for path in sorted(video_folder.iterdir()) if path.suffix == ".mp4")
    told = tmp_path / "told.srt"
    told.write_text("1\n00:00:00,200 --> 00:00:00,400\nhello\n")
    columns = {"video": str(video), "question": "Q", "answer": "A", "subtitles": str(told)}
    plain = {name: columns[name] for name in ("video", "question", "answer")}
    samples = [encode_row(processor, columns, EncodingSettings())]
    for subtitles in (str(told), [(0.2, 0.4, "hello")]):
        question, answer = turn("Q", "A", video=str(video))
        question["content"][0]["subtitles"] = subtitles
        samples.append(encode_row(processor, row_of(question, answer), EncodingSettings()))
    words = processor.words('"hello"')
    without = encode_row(processor, plain, EncodingSettings())
    for sample in samples:
        ids = sample.input_ids.tolist()
        place = next(n for n in range(len(ids)) if ids[n : n + len(words)] == words)
        assert ids[:place] + ids[place + len(words) :] == without.input_ids.tolist()
        assert (sample.labels >= 0).sum() == (without.labels >= 0).sum()
    limit = len(without.input_ids)
    assert len(encode_row(processor, columns, EncodingSettings(max_length=limit)).input_ids) <= limit
    processor.frame_times = "text"
    try:
        timed = encode_row(processor, plain, EncodingSettings())
    finally:
        processor.frame_times = "none"
    assert processor.tokenizer.decode(timed.input_ids.tolist()).count("[0:00]") == 1
