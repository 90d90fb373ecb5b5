"""What the bundled checkpoint says about frames and questions that are unlike its training."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoState
from video_ma2mba.cli.loading import load_pipeline
from video_ma2mba.cli.main import app
from video_ma2mba.modeling_video_ma2mba.answering_familiarity import (
    FILE,
    STRANGE_FRAMES,
    Familiarity,
    Likeness,
    QuestionForms,
    StrangeFrames,
    add_strange,
    asked_questions,
)
from video_ma2mba.processing.frame_times import TIMES_REQUEST
from video_ma2mba.world import WorldDataset, render
from video_ma2mba.world.familiarity import (
    Seen,
    encoded_videos,
    fit_videos,
    look_at,
    look_at_file,
    strange,
    world_questions,
)
from video_ma2mba.world.questions import ALL_KINDS, list_things, name_option, repeat_sign
from video_ma2mba.world.video_files import write_video

ROOT = Path(__file__).resolve().parents[2]
VIDEO = ROOT / "world" / "examples" / "000000.mp4"
KNOWN = "Which sign did the card show?"
STRANGE_QUESTIONS = [
    "What is shown?",
    "What colour is it?",
    "What color is the circle?",
    "Describe the video.",
    "What colour is the dog?",
    "How many people are there?",
    "Which came first?",
    "Is there a red circle?",
    "How many squares?",
    "Which way does the circle move?",  # things are named by colour and shape
    "What is the red object?",
    "who is this",
    "Quelle couleur a le cercle ?",
]


@pytest.fixture(scope="module")
def bundled():
    if not (ROOT / "bundled" / FILE).is_file():
        pytest.skip("needs the checkpoint in bundled/")
    return load_pipeline(device="cpu")


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Twelve frames that no world shows."""
    path = tmp_path_factory.mktemp("noise") / "noise.mp4"
    write_video(path, [np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)])
    return path


def test_no_trained_question_is_strange():
    forms, kinds = world_questions(), set()
    data = WorldDataset("train", 1500, frames=(4, 24), questions=12, seed=3)
    for number in range(1500):
        for question in data.asked(number)[1]:
            kinds.add((question.kind, question.form))
            assert forms.knows(question.text), question.text
            if question.form == "choice":
                assert forms.knows(name_option(question).text), name_option(question).text
        assert forms.knows(list_things(data.world(number)).text)
    assert len(kinds) == 14


def test_no_question_that_a_model_with_times_was_trained_on_is_strange():
    known, untimed, kinds = Familiarity(questions=world_questions(timed=True)), world_questions(), set()
    data = WorldDataset("train", 300, frames=(4, 90), kinds=ALL_KINDS, questions=30, begins=90_000, pace=9)
    for number in range(300):
        for question in data.asked(number)[1]:
            asked = [turn.text.removesuffix(f" {TIMES_REQUEST}") for turn in (*question.before, question)]
            kinds.add(question.kind)
            assert not known.unfamiliar({}, asked), asked
            assert question.kind not in ("span", "moment", "spoken", "said") or not untimed.knows(asked[-1])
        assert known.questions.knows(repeat_sign(random.Random(number)).text)
    assert kinds == set(ALL_KINDS)
    assert known.unfamiliar({}, ["What comes at noon?"]).nearest == "What comes at 0:00?"


@pytest.mark.parametrize("question", STRANGE_QUESTIONS)
def test_other_questions_are_strange_and_told_what_is_known(question: str):
    forms = world_questions()
    assert not forms.knows(question)
    assert forms.knows(forms.nearest(question))


def test_capitals_spaces_and_last_marks_do_not_matter():
    forms = world_questions()
    for text in ("which sign did the card show", "  WHICH sign   did the card show ?!", "How many crosses appear"):
        assert forms.knows(text)
    assert forms.nearest("What colour is the heart, please?") == "What colour is the heart?"


def test_a_question_about_what_was_named_needs_something_named():
    known = Familiarity(questions=world_questions())
    found = known.unfamiliar({}, [KNOWN, "What colour is it?"])
    assert found.pointing and "just named" in found.question_note and "What colour is the" in found.question_note
    assert not known.unfamiliar({}, ["What colour is it?"]).pointing
    learnt = Familiarity(questions=QuestionForms(("how many {n}",), {"n": ["stars"]}, follow_ups=True))
    assert not learnt.unfamiliar({}, ["How many stars?", "What colour is it?"])
    assert learnt.unfamiliar({}, ["How many stars?", "Who won?"])
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "A?"}]}]
    chat += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "C?"}]
    assert asked_questions(chat) == ["A?", "C?"]


def test_distances_are_those_of_a_direct_computation(tmp_path: Path):
    random = torch.Generator().manual_seed(1)
    features = torch.randn(400, 6, generator=random) * torch.tensor([9.0, 4, 3, 2, 1, 0.1]) + 5
    likeness = Likeness.fit(features, features[:100], 0.1, 2)
    known = Familiarity(likeness, questions=world_questions(), facts={"fitted": "here"})
    centred = features.double() - features.double().mean(0)
    values, vectors = np.linalg.eigh((centred.T @ centred / 400).numpy())
    along = centred.numpy() @ vectors[:, :2] / values[:2] ** 0.5
    np.testing.assert_allclose(likeness.distance(features).numpy(), np.sqrt((along**2).mean(1)), rtol=1e-4)
    assert int(likeness.strange(features[:100]).sum()) == 10
    known.save(tmp_path / FILE)
    again = Familiarity.load(tmp_path / FILE)
    torch.testing.assert_close(again.features.distance(features), likeness.distance(features), rtol=1e-2, atol=1e-2)
    assert (again.features.threshold, again.pictures, again.facts) == (likeness.threshold, None, known.facts)
    assert again.questions.knows(KNOWN) and not again.questions.knows("What is shown?")
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:50])
    with pytest.raises(ValueError, match="does not say what a model is familiar with"):
        Familiarity.load(tmp_path / FILE)
    with pytest.raises(ValueError, match="too few"):
        Likeness.fit(features[:20], features, 0.1, 2)


def test_counts_of_an_older_state_are_not_invented():
    metadata: dict[str, str] = {}
    add_strange(metadata, 3, frames_before=10)  # nobody counted among those
    assert metadata == {}
    add_strange(metadata, 3)
    add_strange(metadata, 2, frames_before=10)
    assert metadata == {STRANGE_FRAMES: "5"}
    assert StrangeFrames(None).count() is None


@pytest.mark.bundled
def test_rendered_videos_are_familiar_however_they_were_encoded(bundled, tmp_path: Path):
    known = bundled.model.model.familiarity
    shares: dict[str, list[float]] = {}
    for name, path in encoded_videos(tmp_path, "test", 2, seed=77):
        shares.setdefault(name, []).append(float(strange(known, look_at_file(bundled, path)).float().mean()))
    assert len(shares) == 6 and max(map(max, shares.values())) < 0.25, shares


@pytest.mark.bundled
def test_what_is_counted_does_not_depend_on_the_way_of_reading(bundled, noise: Path, tmp_path: Path):
    model, prefix = bundled.model, None
    alone = bundled.read(str(noise))
    assert (alone.metadata["frames"], alone.metadata[STRANGE_FRAMES]) == ("12", "12")
    both = bundled.append(alone, str(VIDEO))
    assert (both.metadata["frames"], both.metadata[STRANGE_FRAMES]) == ("52", "12")
    kept = bundled.read(str(noise), partial=tmp_path / "partial", save_seconds=0)
    assert kept.metadata[STRANGE_FRAMES] == "12"
    from video_ma2mba.modeling_video_ma2mba.answering_questions import chunks_of_all, video_prefix

    prefix = video_prefix(bundled.processor)
    readers = [bundled.processor.video_processor.open(str(path)) for path in (noise, VIDEO)]
    found = model.read_together(prefix, chunks_of_all(readers, model.config.read_chunk_frames))
    assert [state.metadata[STRANGE_FRAMES] for state in found] == ["12", "0"]
    found[0].save(tmp_path / "state")
    told = model.unfamiliar(VideoState.load(tmp_path / "state"), KNOWN)
    assert told.share == 1 and "12 of 12 frames look unlike" in told.video_note and told.question is None


@pytest.mark.bundled
def test_a_stream_counts_too(bundled, noise: Path):
    from video_ma2mba import VideoSession

    with VideoSession(bundled.model, bundled.processor, remember=4) as session:
        session.attach(str(noise))
        session.wait()
        assert bundled.model.unfamiliar(session.seen.state, KNOWN).share == 1
        assert int(session.fork().metadata[STRANGE_FRAMES]) == session.seen.frames


@pytest.mark.bundled
def test_the_pipeline_says_so_only_where_there_is_something_to_say(bundled, noise: Path):
    asked = [KNOWN, "What is shown?"]
    familiar, strange = bundled(str(VIDEO), asked)
    assert familiar == [{"answer": "2"}]
    assert strange[0]["unfamiliar"] == {"frames": 0.0, "question": True}
    (told,) = bundled(str(noise), KNOWN)
    assert told["unfamiliar"] == {"frames": 1.0, "question": False}


@pytest.mark.bundled
def test_commands_say_so(bundled, noise: Path, tmp_path: Path, monkeypatch):
    for verb in ("ask", "batch", "watch"):
        monkeypatch.setattr(f"video_ma2mba.cli.{verb}.load_pipeline", lambda *_, **__: bundled)
    run = CliRunner()
    told = run.invoke(app, ["ask", str(noise), KNOWN])
    assert told.exit_code == 0 and told.stderr.count("note: ") == 1 and "12 of 12 frames" in told.stderr
    told = run.invoke(app, ["ask", str(VIDEO), KNOWN, "What is shown?", "--json"])
    first, second = map(json.loads, told.stdout.splitlines())
    assert (first["unfamiliar"], second["unfamiliar"]["question"]) == ({"frames": 0.0, "question": False}, True)
    assert told.stderr.count("note: ") == 1 and '"What is shown?"; the nearest it knows:' in told.stderr
    told = run.invoke(app, ["ask", str(VIDEO)], input=f"{KNOWN}\nWhat colour is it?\n")
    assert told.exit_code == 0 and "note: " not in told.stderr  # it has learnt questions about what was just named
    queue, out = tmp_path / "queue.jsonl", tmp_path / "out.jsonl"
    queue.write_text("".join(json.dumps({"video": str(v), "question": KNOWN}) + "\n" for v in (noise, VIDEO)))
    assert run.invoke(app, ["batch", str(queue), str(out)]).exit_code == 0
    shares = {line["video"]: line["unfamiliar"]["frames"] for line in map(json.loads, out.read_text().splitlines())}
    assert shares == {str(noise): 1.0, str(VIDEO): 0.0}
    told = run.invoke(app, ["watch", str(noise), "--ask", "What is shown?", "--every", "4", "--json"])
    assert json.loads(told.stdout.splitlines()[0])["unfamiliar"] == {"frames": 1.0, "question": True}
    assert told.stderr.count("note: ") == 2  # once about the video, once about the question


def measures(model) -> list[Likeness]:
    known = model.model.familiarity
    assert known.features is not None and known.pictures is not None
    return [known.features, known.pictures]


@pytest.mark.bundled
def test_black_frames_and_worlds_in_other_colours_are_strange(bundled):
    known, data = bundled.model.model.familiarity, WorldDataset("test", 4, frames=(8, 24), seed=41)
    assert strange(known, look_at(bundled, [np.zeros((3, 64, 64, 3), np.uint8)])).all()
    for number in range(4):
        frames = render(data.world(number))
        assert strange(known, look_at(bundled, [frames])).float().mean() < 0.25
        for swapped in ([1, 2, 0], [2, 0, 1], [2, 1, 0], [0, 2, 1]):  # red and green alone are too close
            assert strange(known, look_at(bundled, [np.ascontiguousarray(frames[..., swapped])])).all()


@pytest.mark.bundled
def test_the_file_travels_with_a_saved_model_and_goes_with_training(bundled, tmp_path: Path):
    bundled.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["familiarity"] == FILE
    again = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path)
    for one, other in zip(measures(again), measures(bundled.model), strict=True):
        assert one.threshold == other.threshold
    again.model.familiarity = None
    (tmp_path / FILE).unlink()
    again.save_pretrained(tmp_path)
    assert "familiarity" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / FILE).exists()


@pytest.mark.bundled
def test_other_checkpoints_can_have_it(bundled, noise: Path, tmp_path: Path, monkeypatch):
    frames = [np.full((8, 64, 64, 3), 20 * n, np.uint8) for n in range(1, 11)]
    random = np.random.default_rng(1)
    for number, grey in enumerate(frames):
        write_video(
            tmp_path / f"{number}.mp4", [np.clip(grey + random.integers(0, 9, grey.shape), 0, 255).astype("u1")]
        )
    files = sorted(tmp_path.glob("*.mp4"))
    with pytest.raises(ValueError, match="give ten or more"):
        fit_videos(bundled, files[:9])
    with pytest.raises(ValueError, match="too few for 192 features"):
        fit_videos(bundled, files)
    monkeypatch.setattr(
        "video_ma2mba.world.familiarity.look_at_file",
        lambda pipe, path: Seen(*(numbers.repeat(15, 1) for numbers in look_at_file(pipe, path))),
    )
    known = fit_videos(bundled, files)
    assert known.questions is None
    assert bool(strange(known, look_at_file(bundled, noise)).all())
