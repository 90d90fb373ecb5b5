"""Reading with time stamps and subtitles: the same in every cut, as a file, a stream, one of several, or a batch."""

import itertools
import json
import re
import subprocess

import numpy as np
import pytest
import torch

from video_ma2mba import VideoState
from video_ma2mba.modeling_video_ma2mba.answering_questions import video_prefix
from video_ma2mba.processing.frame_times import Cue, TimedChunk
from video_ma2mba.processing.video_reader import open_video
from video_ma2mba.streaming.session import VideoSession

CUES = [Cue(0.2, 1.0, "one"), Cue(2.0, 3.0, "two"), Cue(2.6, 3.0, "<video>three"), Cue(5.7, 5.75, "late")]
FPS = 2.0


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float64, frame_times="text", frame_times_every=1.5)


@pytest.fixture(scope="module")
def processor(model, make_processor):
    processor = make_processor(model.config)
    processor.frame_times, processor.frame_times_every = "text", 1.5
    return processor


@pytest.fixture(scope="module")
def uneven_video(ffmpeg, tmp_path_factory):
    """Frames at uneven times, the first of which is not at 0 of the container's clock."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.mkv"
    times = "setpts='(2+if(lt(N,12),N/6,2+(N-12)/3))/TB'"
    source = ["-f", "lavfi", "-i", "testsrc=d=4:r=6:s=32x32", "-vf", times, "-fps_mode", "vfr"]
    kept = ["-copyts", "-avoid_negative_ts", "disabled", "-c:v", "libx264"]
    subprocess.run([ffmpeg, "-v", "error", *source, *kept, str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def whole(model, processor, uneven_video):
    return model.read_video(uneven_video, processor, subtitles=CUES, fps=FPS)


def same(one, other, exactly=False):
    assert one.seen_tokens == other.seen_tokens
    for a, b in zip(one.layers, other.layers, strict=True):
        for left, right in zip(a, b, strict=True):
            assert torch.equal(left, right) if exactly else torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def test_tokens_tell_the_times_that_ffprobe_tells(model, processor, uneven_video, whole):
    batch = processor(text="<video>", videos=[uneven_video], subtitles=CUES, fps=FPS, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    runs = [(is_video, list(run)) for is_video, run in itertools.groupby(ids, key=lambda token: token == 2)]
    decode = processor.tokenizer.decode
    shown = "".join("F" * (len(run) // 4) if is_video else decode(run) for is_video, run in runs)
    probe = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", "frame=pts_time", "-select_streams", "v"]
    probed = subprocess.run([*probe, str(uneven_video)], capture_output=True, check=True)
    times = [float(frame["pts_time"]) for frame in json.loads(probed.stdout)["frames"]]
    times = [moment - times[0] for moment in times]
    expected, last, told = "", None, iter(CUES)
    cue = next(told)
    for moment in (n / FPS for n in range(int((times[-1] + 1 / 3) * FPS + 0.999))):
        now = max(t for t in times if t <= moment + 1e-3)
        while cue is not None and cue.start <= now:
            stamp = f"0:0{cue.start:.1f}".removesuffix(".0")
            expected, cue = expected + f'[{stamp}] "{cue.text}"', next(told, None)
        if last is None or int(round(now, 1) / 1.5) != int(round(last, 1) / 1.5):
            expected += f"[0:0{now:.1f}]".replace(".0]", "]")
        expected, last = expected + "F", now
    assert cue.text == "late"
    assert shown == expected + '[0:05.7] "late"'
    state = model(**batch, use_cache=True).past_key_values
    read = model.read(
        torch.tensor([[2]]), [processor.timed(open_video(uneven_video, fps=FPS, size=(16, 16)), CUES).chunks(3)]
    )
    same(read, state)


def test_pieces_of_any_size_read_the_same(model, processor, uneven_video, whole):
    usual = model.config.prefill_segment_length
    try:
        for segment in (4, 8, 64):
            model.config.prefill_segment_length = segment
            same(model.read_video(uneven_video, processor, subtitles=CUES, fps=FPS), whole)
    finally:
        model.config.prefill_segment_length = usual


@pytest.mark.parametrize("cut", [2.5, 3.0, 4.5])
def test_a_video_read_in_two_parts_is_the_video_read_at_once(model, processor, uneven_video, whole, cut):
    first = model.read_video(uneven_video, processor, subtitles=CUES, fps=FPS, end=cut)
    both = model.read_video(uneven_video, processor, subtitles=CUES, fps=FPS, start=cut, state=first)
    same(both, whole)
    again = model.read_video(uneven_video, processor, subtitles=CUES, fps=FPS, start=cut, state=whole)
    assert again.seen_tokens > whole.seen_tokens, "what does not continue begins with a stamp"


def test_an_interrupted_reading_ends_with_the_same_bits(model, processor, uneven_video, whole, tmp_path):
    partial = tmp_path / "partial"
    for stop in (8, 12):

        def interrupt(seen, expected, stop=stop):
            if seen >= stop:
                raise KeyboardInterrupt

        settings = {"partial": partial, "save_seconds": 0, "subtitles": CUES, "fps": FPS}
        with pytest.raises(KeyboardInterrupt):
            model.read_video(uneven_video, processor, on_frames=interrupt, **settings)
        assert partial.exists()
        same(model.read_video(uneven_video, processor, **settings), whole, exactly=True)
        partial.unlink()


def test_several_read_together_as_each_alone(model, processor, uneven_video, raw_video, whole):
    def readers():
        film = processor.timed(open_video(uneven_video, fps=FPS, size=(16, 16)), CUES)
        others = [open_video(raw_video(n), fps=FPS, size=(16, 16)) for n in (5, 9)]
        return [film, *(processor.timed(other, [(0.1, 1, "a much longer cue")]) for other in others)]

    prefix = torch.tensor([[5, 2]])
    together = model.read_together(prefix, [reader.chunks(4) for reader in readers()])
    for found, reader in zip(together, readers(), strict=True):
        same(found, model.read(prefix, [reader.chunks(4)]))


@pytest.mark.parametrize("skip", [0, 3])
def test_readers_that_take_turns_tell_what_one_tells(processor, uneven_video, skip):
    def chunks(**settings):
        reader = processor.timed(open_video(uneven_video, fps=FPS, size=(16, 16)), CUES)
        reader.after = None if skip == 0 else float(reader.frame_times[skip - 1])
        return list(reader.chunks(2, skip=skip, **settings))

    def told(found):
        starts = np.cumsum([0, *map(len, found)])
        return [
            (int(start) + place, ids)
            for start, chunk in zip(starts, found, strict=False)
            for place, ids in chunk.texts
        ]

    alone, turns = chunks(), [chunks(turn=(rank, 3)) for rank in range(3)]
    dealt = [turn[n] for n in range(len(turns[0])) for turn in turns if n < len(turn)]
    assert told(dealt) == told(alone)
    assert sum(map(len, dealt)) == sum(map(len, alone))


def test_padded_rows_of_a_batch_are_each_row_alone(model, processor, uneven_video, raw_video):
    videos = [[uneven_video], [raw_video(3)]]
    for side in ("left", "right"):
        batch = processor(
            text=["<video> a", "bc <video>"], videos=videos, padding_side=side, return_tensors="pt", fps=FPS
        )
        state = model(**batch, use_cache=True).past_key_values
        for row, (text, video) in enumerate(zip(["<video> a", "bc <video>"], videos, strict=True)):
            alone = model(
                **processor(text=text, videos=video, fps=FPS, return_tensors="pt"), use_cache=True
            ).past_key_values
            alone.seen_tokens = state.seen_tokens
            same(state.select(slice(row, row + 1)), alone)


def test_a_stream_reads_what_a_file_does(model, processor, uneven_video, whole):
    with VideoSession(model, processor, fps=FPS, policy="queue", subtitles=CUES) as session:
        session.attach(str(uneven_video))
        assert session.wait(60)
        same(session.seen.state, whole)
        state = session.fork()
    assert json.loads(state.metadata["sources"])[0]["subtitles"]["cues"] == 4
    with VideoSession(model, processor, fps=FPS, policy="queue", subtitles=CUES, remember=2.0) as session:
        session.attach(str(uneven_video))
        assert session.wait(60)
        seen = session.seen
    assert seen.since == pytest.approx(3.0, abs=0.35), "a state begins with a stamp, at least 2 s back"
    reader = processor.timed(open_video(uneven_video, fps=FPS, size=(16, 16)), CUES)
    frames, times = reader.read().pixels, reader.frame_times
    first = int(np.searchsorted(times, seen.since))
    texts = reader.text.texts(times[first:], times[first - 1])
    rest = [
        TimedChunk(frames[first:], times[first:], texts),
        TimedChunk(frames[:0], times[:0], [(0, reader.text.ending(times[-1]))]),
    ]
    same(seen.state, model.read(video_prefix(processor), [rest]))


def test_states_say_how_times_were_told(model, processor, make_processor, uneven_video, whole, tmp_path):
    whole.save(tmp_path / "film.state")
    kept = VideoState.load(tmp_path / "film.state")
    source = json.loads(kept.metadata["sources"])[0]
    assert source["subtitles"] == {"name": "<cues>", "sha256": source["subtitles"]["sha256"], "cues": 4}
    model.check_state(kept, processor)
    other = make_processor(model.config)
    with pytest.raises(ValueError, match=r"frame_times='text' \(every 1.5\), its processor 'none' .*set both alike"):
        model.check_state(kept, other)
    other.frame_times, other.frame_times_every = "text", 3.0
    with pytest.raises(ValueError, match=r"every 1.5.*every 3.0"):
        model.check_state(kept, other)
    asked = {"times": True, "max_new_tokens": 4}
    assert model.answer(kept, "What?", processor, **asked) == model.answer(whole, "What?", processor, **asked)


def test_an_answer_with_times_is_parsed_strictly(model, processor, make_model, make_processor, whole, monkeypatch):
    said = {}
    monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda rows, **_: [said["text"]] * len(rows))
    asked = {"times": True, "max_new_tokens": 2}
    said["text"] = "red star [0:03-1:09.5]"
    assert model.answer(whole, "What?", processor, **asked) == {"answer": "red star", "start": 3.0, "end": 69.5}
    said["text"] = "[0:03-0:04]"
    assert model.answer(whole, ["When?"], processor, **asked) == [{"answer": "0:03-0:04", "start": 3.0, "end": 4.0}]
    said["text"] = "red star"
    found = model.answer(whole, "What?", processor, return_scores=True, **asked)
    assert (found["answer"], found["start"], found["end"]) == ("red star", None, None)
    assert "does not end in [start-end]" in found["reason"]
    assert 0 < found["score"] <= 1
    plain = make_model()
    own = make_processor(plain.config)
    seen = plain.read_video([np.zeros((16, 16, 3), np.uint8)] * 2, own)
    with pytest.raises(ValueError, match="never learnt times .*ask without them"):
        plain.answer(seen, "What?", own, times=True)


def test_learned_stamps_are_tokens_of_their_own(
    model, processor, make_model, make_processor, uneven_video, whole, tmp_path
):
    """The same places as text stamps, in any pieces, as a file or a stream, and through a checkpoint on disk."""
    learned = make_model(dtype=torch.float64)
    own = make_processor(learned.config)
    before, rows = learned.get_input_embeddings().weight.detach().clone(), len(own.tokenizer)
    learned.set_frame_times(own, "learned", 1.5)
    after = learned.get_input_embeddings().weight
    assert torch.equal(after[: len(before)][:rows], before[:rows]), "what the model knew stays"
    assert len(own.tokenizer) == rows + 24 + 60 + 60 + 9 <= len(after) == learned.config.text_config.vocab_size
    digits = own.tokenizer("59", add_special_tokens=False)["input_ids"]
    token = own.tokenizer.convert_tokens_to_ids("<|59 m|>")
    assert torch.allclose(after[token], after[digits].mean(0))
    learned.set_frame_times(own, "learned", 1.5)
    assert len(own.tokenizer) == rows + 153, "a second call adds nothing"

    def places(processor):
        reader = processor.timed(open_video(uneven_video, fps=FPS, size=(16, 16)), CUES)
        return [(place, processor.tokenizer.decode(ids)) for place, ids in reader.text.texts(reader.frame_times)]

    for (place, text), (other, told) in zip(places(processor), places(own), strict=True):
        assert place == other
        stamps = re.findall(r"\[0:0(\d)(?:\.(\d))?\]", text)
        assert re.findall(r"<\|0 m\|><\|(\d) s\|>(?:<\|.(\d) s\|>)?", told) == stamps
        assert re.findall('".*?"', told) == re.findall('".*?"', text)
    days = own.frame_text().texts([2 * 86400 + 3600 * 5 + 61.0])
    assert own.tokenizer.decode(days[0][1]) == "<|2 h|><|5 h|><|1 m|><|1 s|>"
    assert not set(own.words("<|0 m|>")) & {own.tokenizer.convert_tokens_to_ids("<|0 m|>")}, "typed, it is only text"

    at_once = learned.read_video(uneven_video, own, subtitles=CUES, fps=FPS)
    first = learned.read_video(uneven_video, own, subtitles=CUES, fps=FPS, end=2.5)
    same(learned.read_video(uneven_video, own, subtitles=CUES, fps=FPS, start=2.5, state=first), at_once)
    with VideoSession(learned, own, fps=FPS, policy="queue", subtitles=CUES) as session:
        session.attach(str(uneven_video))
        assert session.wait(60)
        same(session.seen.state, at_once)
    learned.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    kept, told = type(learned).from_pretrained(tmp_path, dtype=torch.float64), type(own).from_pretrained(tmp_path)
    same(kept.read_video(uneven_video, told, subtitles=CUES, fps=FPS), at_once)
    at_once.save(tmp_path / "film.state")
    asked = {"times": True, "max_new_tokens": 4}
    loaded = VideoState.load(tmp_path / "film.state")
    assert kept.answer(loaded, "What?", told, **asked) == learned.answer(at_once, "What?", own, **asked)
    with pytest.raises(ValueError, match="belongs to another model"):
        model.answer(loaded, "What?", processor)
    with pytest.raises(ValueError, match="no tokens for times: add them"):
        type(own)(tokenizer=processor.tokenizer, video_processor=own.video_processor, frame_times="learned")


def test_without_the_setting_nothing_is_told(make_model, make_processor, raw_video):
    """The default leaves prompts as they were: official checkpoints see frames alone."""
    model = make_model()
    processor = make_processor(model.config)
    batch = processor(text="a<video>b", videos=[raw_video(5)], return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids[1:-1] == [processor.video_token_id] * 5 * 4
    assert "frame_times" not in model.read_video(raw_video(5), processor).metadata["processor"]
    assert processor.times_question("at 80 s?", wants_times=False) == "at 80 s?"
