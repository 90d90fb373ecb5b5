"""A session: reading, asking and forking do not disturb each other, whatever their order."""

import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoSession, VideoState
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

ASKED = "What is shown?"


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(dtype=torch.float64)
    model.generation_config.max_new_tokens = 4
    return model


@pytest.fixture(scope="module")
def processor(model):
    pictures = VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16})
    return VideoMa2mbaProcessor(build_byte_tokenizer(), pictures, tokens_per_frame=model.config.tokens_per_frame)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)


@pytest.fixture
def session(model, processor):
    with VideoSession(model, processor, policy="queue") as session:
        yield session


def assert_same(found: VideoState, expected: VideoState) -> None:
    torch.testing.assert_close(found.ssm, expected.ssm, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.conv, expected.conv, rtol=1e-9, atol=1e-11)
    assert found.seen_tokens == expected.seen_tokens
    assert [found.metadata[k] for k in ("frames", "seconds")] == [expected.metadata[k] for k in ("frames", "seconds")]


steps = st.lists(st.one_of(st.integers(1, 5), st.sampled_from(["ask", "fork", "append"])), max_size=9)


@settings(max_examples=15, deadline=None)
@given(steps=steps)
def test_any_order_of_pushing_asking_and_forking(model, processor, frames, steps):
    """Forks do not touch each other or the session; in pieces equals at once; answers are those of a plain reading."""
    read, forks = 0, []

    def plain(count, state=None):
        return model.read_video(list(frames[:count]), processor, state=state)

    with VideoSession(model, processor, policy="queue", waiting=3) as session:
        for step in steps:
            if isinstance(step, int):
                for frame in frames[read : read + step]:
                    session.push(frame)
                read = min(read + step, len(frames))
                assert session.wait(200)
            elif read == 0:
                with pytest.raises(ValueError, match="no frame has been read yet"):
                    session.fork() if step == "fork" else session.ask(ASKED)
            elif step == "ask":
                assert session.ask(ASKED) == model.answer(plain(read), ASKED, processor)
            elif step == "fork":
                forks.append((session.fork(), plain(read)))
            elif forks:
                state, expected = forks[-1]
                forks[-1] = plain(2, state), plain(2, expected)
        if read:
            assert_same(session.fork(), plain(read))
        for state, expected in forks:
            assert_same(state, expected)
            state.conv.zero_()  # and a fork that is spoiled spoils nothing
        if read:
            assert_same(session.fork(), plain(read))
        assert session.report.frames_read == read


def test_a_file_is_read_as_by_the_model(session, model, processor, tiny_video):
    session.attach(tiny_video)
    assert session.wait(200)
    expected = model.read_video(tiny_video, processor)
    found = session.fork()
    assert_same(found, expected)
    assert found.metadata["video"] == str(tiny_video)
    model.check_state(found, processor)
    made = model.generate(
        input_ids=torch.tensor([[70, 71, 72]]), past_key_values=found, max_new_tokens=3, do_sample=False
    )
    assert made.shape == (1, 6)


def test_asking_while_it_reads_equals_asking_after_it_stopped(model, processor, frames):
    """Questions come from another thread, at whatever moment; each is answered from one state it names."""
    asked = []

    def slowly():
        deadline = time.monotonic() + 200
        for number, frame in enumerate(frames):
            while len(asked) < number // 8 and time.monotonic() < deadline:
                time.sleep(0.001)  # so that questions fall in between however slow they are
            yield frame

    with VideoSession(model, processor, policy="queue") as session:
        session.attach(slowly())
        while not session.wait(0.001):
            seen = session.seen
            if seen is not None:
                asked.append((seen.frames, model.answer(seen.state, ASKED, processor), session.ask(ASKED)))
    assert len({count for count, _, _ in asked}) >= 3
    for count, answer, _ in asked[:: max(1, len(asked) // 5)]:
        stopped = model.read_video(list(frames[:count]), processor)
        assert answer == model.answer(stopped, ASKED, processor)
    assert session.report.questions == len(asked) and session.report.frames_read == len(frames)


def test_standing_calls_come_at_their_times(session, frames):
    times = []
    session.every(4, lambda s: times.append((s.seen.until, s.seen.frames, s.ask(ASKED, max_new_tokens=1))))
    session.attach((frame, 0.5 * n) for n, frame in enumerate(frames))
    assert session.wait(200)
    assert [(until, count) for until, count, _ in times] == [(3, 4), (7, 8), (11, 12), (15, 16)]


def test_the_rolling_memory_is_a_reading_of_the_last_while(model, processor, frames):
    with VideoSession(model, processor, policy="queue", remember=6) as session:
        for count, frame in enumerate(frames, start=1):
            session.push(frame)
            assert session.wait(200)
            seen = session.seen
            assert seen.until == count - 1 and seen.frames == count - seen.since
            assert seen.frames == count if count <= 12 else 6 <= seen.frames <= 12
            if count in (1, 6, 12, 13, 29, 40):
                recent = model.read_video(list(frames[int(seen.since) : count]), processor)
                torch.testing.assert_close(seen.state.ssm, recent.ssm, rtol=1e-9, atol=1e-11)
                assert seen.state.seen_tokens == recent.seen_tokens
                assert session.ask(ASKED) == model.answer(recent, ASKED, processor)
                assert session.fork().metadata["frames"] == recent.metadata["frames"]
        assert session._memory._batch.batch_size == 2


def test_clips_end_where_they_do_in_a_file_however_frames_arrive(make_model, frames):
    tower = dict(model_type="videomamba", hidden_size=12, num_hidden_layers=1, state_size=4, image_size=16)
    model = make_model(dtype=torch.float64, vision=tower | dict(patch_size=8, num_frames=4), vision_feature_layer=-1)
    pictures = VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16})
    processor = VideoMa2mbaProcessor(build_byte_tokenizer(), pictures, tokens_per_frame=model.config.tokens_per_frame)
    model.generation_config.max_new_tokens = 2

    def plain(first, count):
        return model.read_video(list(frames[first:count]), processor)

    short = [plain(0, 4).ssm, model.read_video(list(frames[:3]), processor, state=plain(0, 1)).ssm]
    assert (short[0] - short[1]).abs().max() > 1e-3  # borders matter
    for groups in ([1] * 11, [3, 5, 3], [11], [2, 9]):
        count = 0
        with VideoSession(model, processor, policy="queue") as session:
            for number in groups:
                session.push(frames[count : count + number])
                count += number
                assert session.wait(200)
                assert_same(session.fork(), plain(0, count))  # an unfinished clip is a short one for who asks
                assert session.seen.frames == count and session.seen.until == count - 1
            answer = session.ask(ASKED)
            assert answer == model.answer(plain(0, 11), ASKED, processor)
            session.finish()
            assert_same(session.fork(), plain(0, 11))
            assert session.ask(ASKED) == answer
    with VideoSession(model, processor, policy="queue", remember=6) as session:
        for count, frame in enumerate(frames[:30], start=1):
            session.push(frame)
            assert session.wait(200)
            seen = session.seen
            since = int(seen.since)
            assert since % 4 == 0 and seen.frames == count - since
            assert seen.frames == count if count <= 16 else 6 <= seen.frames <= 16
            recent = plain(since, count)
            torch.testing.assert_close(seen.state.ssm, recent.ssm, rtol=1e-9, atol=1e-11)


def test_reading_on_from_a_state(model, processor, frames):
    before = model.read_video(list(frames[:7]), processor)
    kept = before.fork()
    with VideoSession(model, processor, state=before) as session:
        session.push(frames[7:12])
        session.finish()
        found = session.fork()
        assert_same(found, model.read_video(list(frames[7:12]), processor, state=kept))
    assert torch.equal(before.ssm, kept.ssm)
    before.metadata["model_config"] = before.metadata["model_config"].replace('hidden_size": 16', 'hidden_size": 17')
    with pytest.raises(ValueError, match="the state belongs to another model"):
        VideoSession(model, processor, state=before)


@pytest.mark.parametrize("policy", ["drop", "queue"])
def test_falling_behind(model, processor, frames, policy):
    """A model that stands still while frames come: given up and counted, or waited for."""
    with VideoSession(model, processor, policy=policy, waiting=4) as session:
        pushed = []

        def push():
            for frame in frames[:20]:
                session.push(frame)
                pushed.append(1)

        thread = threading.Thread(target=push)
        with session._turn():
            thread.start()
            if policy == "drop":
                thread.join(200)
            else:  # the reader holds what it took at first, and the rest waits
                while session.counters()["frames_waiting"] < 4:
                    time.sleep(0.01)
            time.sleep(0.3)
            stuck = len(pushed)
        thread.join(200)
        session.finish()
        counters = session.counters()
    assert counters["frames_read"] + counters["frames_dropped"] == counters["frames_chosen"] == 20
    if policy == "queue":
        assert stuck < 20 and counters["frames_dropped"] == 0 and counters["waited_seconds"] > 0.1
    else:
        assert stuck == 20 and counters["frames_dropped"] >= 20 - 4 - 4
        (mark,) = session.report.timeline
        assert (mark.event, int(mark.detail)) == ("dropped frames", counters["frames_dropped"])


def test_closing_in_the_middle_ends_at_once(model, processor, frames):
    def for_ever():
        while True:
            time.sleep(0.01)
            yield frames[0]

    spent = []
    for _ in range(3):  # of a busy machine, the quickest counts
        session = VideoSession(model, processor)
        session.attach(for_ever())
        while session.seen is None:
            time.sleep(0.01)
        began = time.monotonic()
        session.close(timeout=100)
        spent.append(time.monotonic() - began)
        assert not session._reader.is_alive() and not session._source_thread.is_alive()
    assert min(spent) < 2
    with pytest.raises(ValueError, match="the session is closed"):
        session.push(frames[0])
    assert session.fork().metadata["frames"] == str(session.report.frames_read)
    assert isinstance(session.ask(ASKED), str), "what was read can still be asked"


def test_errors_come_to_whoever_asks(model, processor, frames):
    def broken():
        yield frames[0]
        raise OSError("the camera fell down")

    with VideoSession(model, processor) as session:
        with suppress(OSError):  # it may fall down before attach() comes back
            session.attach(broken())
        with pytest.raises(OSError, match="the camera fell down"):
            session.wait(10)
        with pytest.raises(OSError, match="the camera fell down"):
            session.ask(ASKED)
    with VideoSession(model, processor) as session:
        session.every(1, lambda _: 1 / 0)
        session.push(frames[:5])
        with pytest.raises(ZeroDivisionError):
            session.finish()
    with VideoSession(model, processor) as session, pytest.raises(ValueError, match="whole-number pixels|must"):
        session.push(np.full((16, 16, 3), 300))
    for wrong in ({"fps": -1}, {"policy": "x"}, {"waiting": 0}, {"remember": 0}):
        with pytest.raises(ValueError):
            VideoSession(model, processor, **wrong)


def test_memory_is_flat(make_model, processor):
    """1,500 frames and questions in between: what the process holds after 500 is what it holds at the end."""
    model = make_model()
    picture = np.zeros((64, 64, 3), np.uint8)
    process, sizes = psutil.Process(), []
    with VideoSession(model, processor, policy="queue", remember=60) as session:
        for number in range(1500):
            picture[:] = number % 256
            session.push(picture.copy())
            if number % 100 == 99:
                session.ask(ASKED, max_new_tokens=2)
                sizes.append(process.memory_info().rss)
        session.finish()
        assert session.report.frames_read == 1500
    assert max(sizes[6:]) - sizes[5] < 8e6, sizes
