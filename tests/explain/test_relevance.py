"""The whole: curves, files, picture, the command, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.explain import Relevance, check_time, relevance
from video_ma2mba.explain.filmstrip import clock, frames_at, peaks, save_filmstrip
from video_ma2mba.explain.time_check import named_span

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "videos" / "000000.mp4"


def curve(values, question="When?", answer="at 0:02", duration=None) -> Relevance:
    values = np.asarray(values, float)
    times, nothing = np.arange(len(values), dtype=float), np.zeros(len(values))
    length = len(values) if duration is None else duration
    return Relevance("v", question, answer, -0.1, times, length, nothing, values, nothing + 0.5, nothing[None] + 0.5)


def test_two_frames_a_second_are_summed_by_second(parts, tiny_video, tmp_path):
    model, processor = parts
    found = relevance(model, processor, str(tiny_video), "What?", "ab", steps=2, fps=2)
    assert found.times.tolist() == [i / 2 for i in range(12)]
    rows = found.per_second()
    assert [row["second"] for row in rows] == list(range(6)) and {row["frames"] for row in rows} == {2}
    for name in ("gradient_x_input", "integrated_gradients"):
        assert np.abs(getattr(found, name)).max() > 0
        np.testing.assert_allclose([row[name] for row in rows], getattr(found, name).reshape(6, 2).sum(1))
    assert found.peak == found.times[found.integrated_gradients.argmax()]

    found.save_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        assert [float(row["decay"]) for row in csv.DictReader(file)] == [row["decay"] for row in rows]
    found.save_json(tmp_path / "a.json", layers=True)
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["frames"]["times"] == found.times.tolist()
    assert np.shape(facts["frames"]["decay_by_layer"]) == (2, 12)
    assert set(facts["curves"]) == {"gradient_x_input", "integrated_gradients", "decay"}


def test_progress_rises_to_the_end_and_leaves_nothing_behind(parts, clip):
    model, processor = parts
    seen, shares = [], []
    given = {"on_frames": lambda n, of: seen.append((n, of)), "on_share": shares.append}
    relevance(model, processor, clip(7), "What?", "ab", steps=2, **given)
    assert seen[-1] == (7, 7)
    assert shares == sorted(shares) and len(shares) >= 3 * 2 * 2 and shares[0] < 0.2 and shares[-1] == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_without_steps_gradient_x_input_stands_alone(parts, clip):
    model, processor = parts
    found = relevance(model, processor, clip(3), "What?", "ab", steps=0)
    assert found.integrated_gradients is None and found.method == "gradient_x_input"
    assert "integrated_gradients" not in json.dumps(found.as_dict())


def test_the_models_own_answer_is_what_it_generates(parts, clip):
    model, processor = parts
    own = relevance(model, processor, clip(4), "What?", steps=0, max_new_tokens=5)
    from video_ma2mba import VideoQuestionAnsweringPipeline

    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor)
    assert own.answer == pipe(list(map(Image.fromarray, clip(4))), "What?", max_new_tokens=5)[0]["answer"]


def test_refusals(parts, clip, tiny_video, monkeypatch):
    model, processor = parts
    with pytest.raises(ValueError, match="answer is empty"):
        relevance(model, processor, clip(2), "What?", "  ")
    with pytest.raises(ValueError, match="question"):
        relevance(model, processor, clip(2), " ", "ab")
    with pytest.raises(ValueError, match=r"frame|empty|picture"):
        relevance(model, processor, clip(2)[:0], "What?", "ab")
    with pytest.raises(ValueError, match="beyond the end"):
        relevance(model, processor, str(tiny_video), "What?", "ab", start=100)
    with pytest.raises(ValueError, match="steps=-1"):
        relevance(model, processor, clip(2), "What?", "ab", steps=-1)
    with pytest.raises(ValueError, match="What would fit: memory_budget"):
        relevance(model, processor, clip(2), "What?", "ab", memory="100B")
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: input_ids)
    with pytest.raises(ValueError, match="answers nothing"):
        relevance(model, processor, clip(2), "What?")


@pytest.mark.parametrize("frames", [1, 2, 5, 41])
def test_picture(clip, tmp_path, frames: int):
    values = np.sin(np.arange(frames)) - 0.2
    save_filmstrip(curve(values, "What $is$ it?"), clip(frames), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size == (1320, 720)
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    with pytest.raises(ValueError, match="frames=13"):
        save_filmstrip(curve(values), clip(frames), tmp_path / "b.png", frames=13)


def test_the_strip_shows_the_frames_of_the_peaks(clip):
    values = np.zeros(200)
    values[[20, 21, 90, 150]] = 5, 4, 7, 6
    assert peaks(values, 3) == [20, 90, 150]  # 21 is a neighbour of 20
    assert peaks(np.array([1.0, 3.0, 2.0]), 6) == [0, 1, 2]
    for picture, index in zip(frames_at(clip(9), [0, 4, 8]), (0, 4, 8), strict=True):
        np.testing.assert_array_equal(picture, clip(9)[index])
    assert [clock(t) for t in (7, 61.5, 3723)] == ["0:07", "1:01.5", "1:02:03"]


@pytest.mark.parametrize(
    ("question", "answer", "span"),
    [
        ("When?", "at 1:05", (65, 65)),
        ("When?", "from 00:01:05 to 00:01:10.5.", (65, 70.5)),
        ("When?", "12 seconds in", (12, 12)),
        ("When?", "It appears at second 7.", (7, 7)),
        ("When?", "after 1.5 minutes", (90, 90)),
        ("In which quarter did it appear?", "third", (50, 75)),
        ("When?", "in the second half", (50, 100)),
        ("When?", "in the last third", (100 * 2 / 3, 100)),
        ("In which quarter did it appear? (A) second (B) fourth", "B", (75, 100)),
        ("When?", "near the end", (100 * 2 / 3, 100)),
        ("Which came first?", "the red circle", None),
        ("What is it?", "first aid", None),
        ("How many?", "3", None),
    ],
)
def test_named_times(question: str, answer: str, span):
    found = named_span(question, answer, 100.0)
    assert found is None if span is None else found == pytest.approx(span)


def test_the_named_time_is_checked_against_the_peak():
    check = check_time(curve([0, 0, 4, 0, 0, -9, 0, 1, 0, 0]))
    assert check.agrees and check.named == (2, 2) and check.share == pytest.approx(0.8)
    assert check.expected_share == pytest.approx(0.3) and "agrees with" in str(check)
    check = check_time(curve([0, 0, 1, 0, 0, 0, 0, 4, 0, 0]))
    assert not check.agrees and check.share == pytest.approx(0.2) and "contradicts" in str(check)
    assert check_time(curve([0, 0, 1, 0], answer="red")) is None
    assert check_time(curve([-1, -2, -3, -4])).share == 0


def test_command(tiny_checkpoint, tiny_video, tmp_path):
    files = ["--out", tmp_path / "a.png", "--json-file", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--layers"]
    asked = ["where", tiny_video, "What is it?", "--answer", "at 0:03", "--steps", "1", "--fps", "2", "--strip", "3"]
    result = CliRunner().invoke(app, [*map(str, [*asked, *files]), "--model", str(tiny_checkpoint), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "at 0:03\n"
    assert "peak of integrated gradients: " in result.stderr and "the time named, 3.0 to 3.0 s" in result.stderr
    facts = json.loads((tmp_path / "a.json").read_text())
    assert len(facts["frames"]["times"]) == 12 and len(facts["frames"]["decay_by_layer"]) == 2
    assert Image.open(tmp_path / "a.png").size == (1320, 720) and (tmp_path / "a.csv").stat().st_size > 100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["VIDEO", " "], "question is empty"),
        (["none.mp4", "What?"], "none.mp4"),
        (["VIDEO", "What?", "--answer", " "], "answer is empty"),
        (["VIDEO", "What?", "--out", "a.jpg"], "a.jpg"),
        (["VIDEO", "What?", "--json-file", "no/such/a.json"], "--json-file no/such/a.json"),
        (["VIDEO", "What?", "--layers"], "--json"),
        (["VIDEO", "What?", "--memory", "lots"], "lots"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tiny_checkpoint, tiny_video, options: list[str], named: str):
    words = [str(tiny_video) if word == "VIDEO" else word for word in options]
    result = CliRunner().invoke(app, ["where", *words, "--model", str(tiny_checkpoint), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and named in result.stderr.splitlines()[-1] and result.stderr.count("error: ") == 1


@pytest.mark.bundled
def test_the_card_is_found_in_an_example_video():
    """The video shows its card in the sixth second."""
    from video_ma2mba.loading import load_pipeline

    pipe = load_pipeline(None, device="cpu")
    found = relevance(
        pipe.model, pipe.processor, EXAMPLE.with_name("000001.mp4"), "Which sign did the card show?", steps=4
    )
    assert found.answer == "y" and found.peak == 5.0
    assert found.integrated_gradients[5] > 5 * np.abs(np.delete(found.integrated_gradients, 5)).max()
