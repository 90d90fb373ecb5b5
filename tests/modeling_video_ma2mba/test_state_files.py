"""States through the pipeline: whose they are, reading on, reading after an interruption, forks."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import video_ma2mba
from video_ma2mba import VideoQuestionAnsweringPipeline, VideoState, open_video
from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file
from video_ma2mba.modeling_video_ma2mba.state_identity import PACKAGE_VERSION, weights_digest

ASKED = "What is shown?"


@pytest.fixture(scope="session")
def make_pipe(make_model, make_processor):
    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> VideoQuestionAnsweringPipeline:
        model = make_model(seed, dtype, **overrides)
        model.generation_config.max_new_tokens = 5
        return VideoQuestionAnsweringPipeline(model=model, processor=make_processor(model.config), device="cpu")

    return make


@pytest.fixture(scope="session")
def pipe(make_pipe):
    return make_pipe()


def assert_identical(a: VideoState, b: VideoState) -> None:
    assert torch.equal(a.conv, b.conv) and torch.equal(a.ssm, b.ssm)
    assert a.seen_tokens == b.seen_tokens and a.metadata == b.metadata


class Interrupted(Exception):
    """Stands for a pulled plug."""


# ------------------------------------------------------------------------------------------------------- metadata
def test_the_metadata_say_where_a_state_comes_from(pipe, tiny_video, tmp_path):
    import hashlib

    state = pipe.read(tiny_video, fps=2, start=1)
    state.save(tmp_path / "film.state")
    found = VideoState.load(tmp_path / "film.state").metadata
    assert found["package_version"] == PACKAGE_VERSION == video_ma2mba.__version__
    assert (found["frames"], found["seconds"], found["fps"], found["dtype"]) == ("10", "5.0", "2", "float32")
    assert found["video"] == str(tiny_video)
    assert found["weights"] == weights_digest(pipe.model)
    assert json.loads(found["model_config"])["text_config.num_hidden_layers"] == 2
    assert json.loads(found["processor"])["size"] == {"height": 16, "width": 16}
    (source,) = json.loads(found["sources"])
    assert source["sha256"] == hashlib.sha256(tiny_video.read_bytes()).hexdigest()
    assert (source["start"], source["end"], source["frames"], source["seconds"]) == (1, None, 10, 5.0)


def test_a_name_tells_no_path(pipe, tiny_checkpoint, raw_video):
    from video_ma2mba.loading import load_pipeline

    assert load_pipeline(str(tiny_checkpoint), device="cpu").read(raw_video(1)).metadata["model"] == "checkpoint"


def test_the_record_of_many_videos_stays_small(pipe, raw_video):
    state = pipe.read(raw_video(1))
    for _ in range(70):
        state = pipe.append(state, raw_video(1))
    assert (state.metadata["frames"], state.metadata["seconds"]) == ("71", "71.0")
    assert len(json.loads(state.metadata["sources"])) == 64


def test_digests_of_weights(make_model):
    model = make_model(dtype=torch.float32)
    digest = weights_digest(model)
    assert weights_digest(make_model(dtype=torch.bfloat16)) == digest, "the same checkpoint, loaded in 16 bits"
    assert weights_digest(make_model(seed=1)) != digest
    assert weights_digest(model.to("meta")) == ""


def test_state_files_are_known_by_their_content(pipe, raw_video, tiny_video, tmp_path):
    state = tmp_path / "film.mp4"
    pipe.read(raw_video(1)).save(state)
    assert is_state_file(state)
    (tmp_path / "empty").touch()
    (tmp_path / "text.state").write_text("{ not a state at all }")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    for other in (tiny_video, tmp_path / "empty", tmp_path / "text.state", tmp_path / "picture.png", tmp_path, "none"):
        assert not is_state_file(other)


# -------------------------------------------------------------------------------------------------- belongs to whom
def test_other_models_and_processors_are_refused(pipe, make_pipe, raw_video):
    state = pipe.read(raw_video(2))
    other_size = make_pipe(text={"num_hidden_layers": 3})
    other_pixels = make_pipe(image_mean=[0.1, 0.1, 0.1])
    other_weights = make_pipe(seed=1)
    other_crop, other_prompt = make_pipe(), make_pipe()
    other_crop.processor.video_processor.resize_mode = "crop"
    other_prompt.processor.system_prompt = "Be brief."
    for other, named in [
        (other_size, r"another model: text_config\.num_hidden_layers is 2 there and 3 here"),
        (other_pixels, r"another model: image_mean is \[.*\] there and \[0\.1, 0\.1, 0\.1\] here"),
        (other_weights, "another model: its weights have the digest"),
        (other_crop, "another processor: resize_mode is squash there and crop here"),
        (other_prompt, "another processor: system_prompt"),
    ]:
        for use in (
            lambda other=other: other.ask(state, ASKED),
            lambda other=other: other.append(state, raw_video(1)),
            lambda other=other: other.check(state),
        ):
            with pytest.raises(ValueError, match=named):
                use()
    pipe.check(state)
    pipe.check(VideoState(state.layers, state.seen_tokens))  # made by model.read(): nothing to compare


def test_training_makes_another_model(make_pipe, raw_video):
    pipe = make_pipe()
    state = pipe.read(raw_video(2))
    with torch.no_grad():
        pipe.model.lm_head.weight.add_(0.1)
    with pytest.raises(ValueError, match="its weights have the digest"):
        pipe.ask(state, ASKED)


def test_a_state_goes_to_a_model_of_another_data_type(pipe, make_pipe, raw_video):
    double, half = make_pipe(dtype=torch.float64), make_pipe(dtype=torch.bfloat16)
    state = pipe.read(raw_video(6))
    assert double.ask(state, ASKED) == pipe.ask(state, ASKED)
    read_in_half = half.read(raw_video(6))
    assert read_in_half.conv.dtype == torch.bfloat16
    longer = pipe.append(read_in_half, raw_video(2))
    assert (longer.conv.dtype, longer.ssm.dtype, longer.metadata["dtype"]) == (torch.float32, torch.float32, "float32")
    expected = pipe.append(state, raw_video(2)).ssm
    assert (longer.ssm - expected).norm() < 0.05 * expected.norm()


# ------------------------------------------------------------------------------------------------------- from file
def test_asking_from_a_file_equals_asking_after_reading(pipe, tiny_video, tmp_path):
    state = pipe.read(tiny_video)
    expected = [pipe.ask(state, q, return_scores=True) for q in (ASKED, "Why?")]
    state.save(tmp_path / "film.state")
    loaded = VideoState.load(tmp_path / "film.state")
    assert_identical(loaded, state)
    assert [pipe.ask(loaded, q, return_scores=True) for q in (ASKED, "Why?")] == expected
    assert_identical(loaded, state)


def test_appending_in_two_goes_equals_reading_once(make_pipe, pipe, tiny_video, tmp_path):
    """Cut where chunks are handed over (4 frames), bit for bit; elsewhere up to rounding."""
    whole = pipe.read(tiny_video, fps=2)
    pipe.read(tiny_video, fps=2, end=4).save(tmp_path / "film.state")
    goes = pipe.append(VideoState.load(tmp_path / "film.state"), tiny_video, fps=2, start=4)
    assert torch.equal(goes.conv, whole.conv) and torch.equal(goes.ssm, whole.ssm)
    assert goes.seen_tokens == whole.seen_tokens
    assert [goes.metadata[k] for k in ("frames", "seconds")] == [whole.metadata[k] for k in ("frames", "seconds")]

    exact = make_pipe(dtype=torch.float64)
    goes = exact.append(exact.read(tiny_video, fps=2, end=2.5), tiny_video, fps=2, start=2.5)
    torch.testing.assert_close(goes.ssm, exact.read(tiny_video, fps=2).ssm, atol=1e-10, rtol=1e-10)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ask", "append", "fork"])), max_size=6))
def test_forks_do_not_touch_each_other(pipe, raw_video, steps):
    """Whatever happens to other forks in between, each is what it would be alone."""
    forks = [[pipe.read(raw_video(2, 5)), 0]]
    expected = [forks[0][0]]  # after so many appendings
    for which, action in steps:
        state, appended = forks[which % len(forks)]
        if action == "ask":
            pipe.ask(state, ASKED)
        elif action == "append":
            forks[which % len(forks)] = [pipe.append(state, raw_video(1, 6)), appended + 1]
        else:
            forks.append([state.fork(), appended])
    while len(expected) <= max(appended for _, appended in forks):
        expected.append(pipe.append(expected[-1], raw_video(1, 6)))
    for state, appended in forks:
        assert_identical(state, expected[appended])


# --------------------------------------------------------------------------------------------------- interruptions
def interrupted_read(pipe, video, partial, after: int, **arguments) -> VideoState:
    """Read, pulling the plug each time `after` more chunks have been read."""
    attempts = 0
    while True:
        left = after

        def pull(read, expected):
            nonlocal left
            left -= 1
            if left < 0:
                raise Interrupted

        attempts += 1
        assert attempts < 20
        try:
            return pipe.read(video, partial=partial, save_seconds=0, on_frames=pull, **arguments)
        except Interrupted:
            assert partial.exists()


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupted_reading_ends_in_the_same_state(pipe, tiny_video, tmp_path, after):
    whole = pipe.read(tiny_video, fps=4)
    assert_identical(interrupted_read(pipe, tiny_video, tmp_path / "partial", after, fps=4), whole)


@pytest.mark.filterwarnings("ignore:.*frames could be read")
@pytest.mark.filterwarnings("ignore:.*skipped an image")
def test_pictures_and_appending_are_resumed_as_well(pipe, tiny_video, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(11):
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="skipped an image"):
        before = pipe.read(folder)
    assert before.metadata["frames"] == "10"
    assert_identical(interrupted_read(pipe, folder, tmp_path / "pictures", 1), before)
    longer = pipe.append(before, tiny_video, fps=4)
    assert_identical(interrupted_read(pipe, tiny_video, tmp_path / "more", 2, fps=4, state=before), longer)


def test_only_the_same_reading_is_continued(pipe, make_pipe, raw_video, tiny_video, tmp_path):
    partial = tmp_path / "film.partial"

    def pull(read, expected):
        if read > 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        pipe.read(tiny_video, fps=4, partial=partial, save_seconds=0, on_frames=pull)
    kept = partial.read_bytes()
    other_video = tmp_path / "other.mp4"
    other_video.write_bytes(tiny_video.read_bytes() + b"\0")
    for other, video, arguments, named in [
        (pipe, tiny_video, {"fps": 2}, "fps"),
        (pipe, tiny_video, {"fps": 4, "end": 5}, "end"),
        (pipe, other_video, {"fps": 4}, "video"),
        (pipe, tiny_video, {"fps": 4, "state": pipe.read(raw_video(1))}, "state to continue"),
        (make_pipe(seed=1), tiny_video, {"fps": 4}, "weights"),
        (make_pipe(dtype=torch.float64), tiny_video, {"fps": 4}, "dtype"),
        (make_pipe(vision_chunk_frames=3), tiny_video, {"fps": 4}, "number of frames at once"),
    ]:
        with pytest.raises(ValueError, match=rf"an unfinished reading with another {named}: .*delete the file"):
            other.read(video, partial=partial, **arguments)
    assert partial.read_bytes() == kept
    partial.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match="is not a readable state file"):
        pipe.read(tiny_video, fps=4, partial=partial)
    pipe.read(raw_video(1)).save(partial)
    with pytest.raises(ValueError, match="is not an unfinished reading"):
        pipe.read(tiny_video, fps=4, partial=partial)


def test_skipped_frames_are_those_read_before(tiny_video):
    with open_video(tiny_video, fps=4) as reader:
        everything = reader.read()
        for skip in (0, 1, 7, 23):
            chunks = list(reader.chunks(5, skip=skip))
            assert (sum(len(c) for c in chunks)) == 24 - skip
            assert (chunks[0].pixels[0] == everything.pixels[skip]).all()
            assert chunks[-1].timestamps[-1] == everything.timestamps[-1]
        assert list(reader.chunks(5, skip=24)) == []
        with pytest.raises(ValueError, match="skip"):
            reader.chunks(5, skip=-1)
        assert reader.warnings == []
