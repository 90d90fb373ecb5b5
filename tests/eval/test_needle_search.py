"""Needles: shared states equal reading each video whole, scores mean what they say, a grid is finished later."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from video_ma2mba.eval.needle_haystack import Distracted, _mixed, make_needles, open_haystack
from video_ma2mba.eval.needle_scoring import NeedleReader, normalised
from video_ma2mba.eval.needle_search import NeedleGrid, measure
from video_ma2mba.loading import load_pipeline
from video_ma2mba.world.render import WorldRenderer
from video_ma2mba.world.world import CARD_SYMBOLS, build_world


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path):
    return load_pipeline(str(tiny_checkpoint), device="cpu")


def whole_video(haystack, needle, frames: int, position: int) -> np.ndarray:
    straw = np.concatenate(list(haystack.chunks(frames)))
    return np.insert(straw, position, needle.frame, axis=0)


@pytest.fixture
def timed(pipe, monkeypatch):
    """The same model as one that reads a time stamp every four seconds."""
    monkeypatch.setattr(pipe.model.config, "frame_times", "text")
    monkeypatch.setattr(pipe.processor, "frame_times", "text")


def test_needles_are_read_with_time_stamps(pipe, timed):
    test_shared_states_equal_reading_the_whole_video(pipe, 5)


@pytest.mark.parametrize("position", [0, 5, 12], ids=["first", "between", "last"])
def test_shared_states_equal_reading_the_whole_video(pipe, position: int):
    haystack = open_haystack("synthetic", pipe.processor)
    needles = make_needles(haystack, 12, position, 3, ("open", "choice"), seed=1)
    reader = NeedleReader(pipe.model, pipe.processor)
    with torch.inference_mode():
        features = torch.cat([reader.features(chunk) for chunk in haystack.chunks(12)])
        prefix = reader.opening()
        reader.advance(prefix, features[:position])
        pictures = reader.features(np.stack([needle.frame for needle in needles]))
        states = reader.with_needles(prefix, pictures, features[position:])
        answers = reader.answers(states, [needle.questions for needle in needles])
    assert reader.frames_read == position + 3 * (13 - position)
    for row, needle in enumerate(needles):
        plain = pipe.read(whole_video(haystack, needle, 12, position))
        torch.testing.assert_close(states.ssm[:, row : row + 1], plain.ssm, rtol=1e-4, atol=1e-5)
        assert states.seen_tokens == plain.seen_tokens
        for question, (given, _) in zip(needle.questions, answers[row], strict=True):
            longest = len(reader.encode(question)[1]) + 16
            assert given == pipe.ask(plain, question.text, max_new_tokens=longest, do_sample=False)


def test_forced_scores_follow_the_likeliest_tokens(pipe):
    """The model's own greedy answer, taken as the right one, is right; another one is not."""
    haystack = open_haystack("synthetic", pipe.processor)
    (needle,) = make_needles(haystack, 4, 2, 1, ("open",), seed=0)
    (question,) = needle.questions
    reader = NeedleReader(pipe.model, pipe.processor)
    tokenizer = pipe.processor.tokenizer
    with torch.inference_mode():
        state = pipe.read(whole_video(haystack, needle, 4, 2))
        prompt, answer = reader.encode(question)
        assert tokenizer.decode(answer) == question.answer + tokenizer.eos_token
        logits = pipe.model(input_ids=torch.tensor([prompt]), past_key_values=state.fork()).logits
        best, second = logits[0, -1].topk(2).indices.tolist()
        assert reader._forced(state.fork(), [(prompt, [best])]) == [True]
        assert reader._forced(state.fork(), [(prompt, [second])]) == [False]
        assert reader._forced(_twice(state), [(prompt, [best]), (prompt[1:], [second, second, second])]) == [
            True,
            False,
        ]


def _twice(state):
    state = state.fork()
    state.batch_repeat_interleave(2)
    return state


def test_only_the_needle_shows_a_card(pipe):
    haystack = open_haystack("synthetic", pipe.processor, seed=3)
    assert haystack._world(40).card is None
    needles = make_needles(haystack, 40, 10, 24, ("open",), seed=3)
    assert sorted(needle.questions[0].answer for needle in needles) == sorted(CARD_SYMBOLS.lower())
    again = make_needles(haystack, 40, 10, 24, ("open",), seed=3)
    assert all(np.array_equal(one.frame, two.frame) for one, two in zip(needles, again, strict=True))
    straw = np.concatenate(list(haystack.chunks(40)))
    assert len(straw) == 40
    assert needles[0].frame.mean() > straw.mean() + 30  # cards are paper


def test_a_video_as_haystack(pipe, tiny_video: Path):
    haystack = open_haystack(str(tiny_video), pipe.processor, fps=2)
    straw = np.concatenate(list(haystack.chunks(7)))
    assert len(straw) == 7
    expected = pipe.processor.video_processor.open(str(tiny_video), fps=2).read().pixels[:7]
    assert np.array_equal(straw, expected)
    (needle,) = make_needles(haystack, 7, 7, 1, ("open",), seed=0)
    assert needle.frame.shape == straw.shape[1:]
    with pytest.raises(ValueError, match="has 12 frames at 2 a second, but --frames asks for 13"):
        haystack.check(13)


def test_distractors_look_like_needles(pipe, tiny_video: Path, tmp_path: Path):
    """A card's colours in a card's place, without its sign; the same frames whoever reads which of them."""
    plain = open_haystack("synthetic", pipe.processor, seed=3)
    haystack = Distracted(plain, 20, seed=3)
    straw, other = (np.concatenate(list(source.chunks(150))) for source in (plain, haystack))
    places = haystack.places(150)
    assert len(set(places)) == 20
    assert [n for n in range(150) if not np.array_equal(straw[n], other[n])] == places
    turns = [list(haystack.chunks(150, (turn, 2))) for turn in range(2)]
    assert np.array_equal(np.concatenate([turns[0][0], turns[1][0], turns[0][1]]), other)
    world = build_world(1, 4)
    picture, bare = (
        WorldRenderer(one, 64).frames([world.card.start])[0] for one in (world, replace(world, card=None))
    )
    mixed = _mixed(picture, bare, random.Random(0))
    assert not np.array_equal(mixed, picture)
    assert np.array_equal(np.sort(mixed.reshape(-1, 3), 0), np.sort(picture.reshape(-1, 3), 0)), "nothing is added"
    outside = ~(picture != bare).any(-1)
    assert np.array_equal(mixed[outside], picture[outside])
    film = Distracted(open_haystack(str(tiny_video), pipe.processor, fps=2), 3, seed=0)
    assert len(np.concatenate(list(film.chunks(7)))) == 7
    grid = NeedleGrid([8], [0.5], needles=2, distractors=4)
    (cell,) = measure(pipe, plain, grid, tmp_path)
    assert cell["questions"] == 2
    with pytest.raises(ValueError, match="its distractors is 4, now it is None"):
        measure(pipe, plain, replace(grid, distractors=0), tmp_path)
    with pytest.raises(ValueError, match="at most half"):
        replace(grid, distractors=5)


def test_a_grid_is_resumed_and_extended(pipe, tmp_path: Path):
    haystack = open_haystack("synthetic", pipe.processor)
    grid = NeedleGrid([6, 9], [0.0, 0.5, 1.0], needles=2, forms=("open", "choice"))
    made, progress = [], []
    cells = measure(pipe, haystack, grid, tmp_path, made.append, lambda *seen: progress.append(seen))
    assert made == cells
    assert [(cell["frames"], cell["depth"], cell["position"]) for cell in cells] == [
        (6, 0.0, 0), (6, 0.5, 3), (6, 1.0, 6), (9, 0.0, 0), (9, 0.5, 4), (9, 1.0, 9),
    ]  # fmt: skip
    assert progress[-1][0] == progress[-1][1]
    for cell in cells:
        assert cell["questions"] == len(cell["answers"]) == 4
        assert cell["greedy"] == sum(normalised(row["given"]) == row["answer"] for row in cell["answers"]) / 4
        assert cell["chance"] == pytest.approx((1 / 24 + 1 / 4) / 2)

    kept = tmp_path / "cells" / "frames_9_depth_0.5.json"
    kept.write_text(kept.read_text()[:50])  # a damaged file
    made.clear()
    wider = replace(grid, frames=[6, 9, 10])
    again = measure(pipe, haystack, wider, tmp_path, made.append)
    assert [(cell["frames"], cell["depth"]) for cell in made] == [(9, 0.5), (10, 0.0), (10, 0.5), (10, 1.0)]
    answers = [[cell["answers"] for cell in found] for found in (cells, again[:6])]
    assert answers[0] == answers[1]

    with pytest.raises(ValueError, match="its seed is 0, now it is 1"):
        measure(pipe, haystack, replace(grid, seed=1), tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        measure(pipe, haystack, grid, tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json says whose"):
        measure(pipe, haystack, grid, tmp_path)


def test_exact_match_forgives_case_and_a_full_stop():
    assert normalised(" K.\n") == normalised("k")
    assert normalised("k k") != normalised("k")


def test_cells_are_json(pipe, tmp_path: Path):
    haystack = open_haystack("synthetic", pipe.processor)
    (cell,) = measure(pipe, haystack, NeedleGrid([4], [0.25], needles=1), tmp_path)
    assert json.loads((tmp_path / "cells" / "frames_4_depth_0.25.json").read_text()) == cell
