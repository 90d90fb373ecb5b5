"""Questions about times and speech: every answer against a second, independent reading of the world."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from video_ma2mba.processing.frame_times import TIMES_REQUEST
from video_ma2mba.processing.video_subtitles import read_subtitles
from video_ma2mba.trainer.data.sample_encoding import EncodingSettings, encode_row
from video_ma2mba.world import KINDS, WorldDataset, chat
from video_ma2mba.world.accuracy import span_overlap
from video_ma2mba.world.batches import WorldBatches, choose_questions, question_subject
from video_ma2mba.world.hf_datasets import load_world
from video_ma2mba.world.model import SIZES, world_config, world_processor
from video_ma2mba.world.questions import (
    ALL_KINDS,
    FOLLOW_KINDS,
    QUARTERS,
    SPOKEN_KINDS,
    TIMED_KINDS,
    ask,
    list_times,
    quarter_of,
    repeat_sign,
)
from video_ma2mba.world.scoring import read_videos
from video_ma2mba.world.tokenizer import build_world_tokenizer
from video_ma2mba.world.video_files import render_to_folder
from video_ma2mba.world.world import CARD_SYMBOLS

load_training_data = pytest.importorskip("video_ma2mba.trainer.data.loading").load_training_data
CLOCK = r"(?:(\d+):)?(\d+):(\d\d)"


def seconds(text):
    hours, minutes, rest = re.fullmatch(CLOCK, text).groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(rest)


def listing(world):
    """What is in view at each second of the video, read off thing by thing."""
    seen = {}
    for second in range(world.seconds):
        names = {f"{t.colour} {t.shape}" for t in world.things if t.start <= second < t.end}
        if world.card is not None and world.card.start == second:
            names.add(f"card {world.card.symbol.lower()}")
        for shown in range(world.pace):  # in slow motion each of its seconds is many of the video
            seen[world.begin + second * world.pace + shown] = names
    return seen


def arrivals(seen):
    first = {}
    for second, names in seen.items():
        for name in names:
            first.setdefault(name, second)
    return first


def span_of(seen, name):
    inside = [second for second, names in seen.items() if name in names]
    return min(inside), max(inside) + 1


def answer_span(text):
    start, end = re.search(r"\[([\d:]+)-([\d:]+)\]$", text).groups()
    return seconds(start), seconds(end)


DATA = WorldDataset("train", 400, frames=(4, 90), kinds=ALL_KINDS, questions=40, begins=4000, pace=9)


def test_every_timed_answer_is_what_the_seconds_show():
    counts = dict.fromkeys(TIMED_KINDS, 0)
    for index in range(250):
        world, questions = DATA.asked(index)
        seen = listing(world)
        came = arrivals(seen)
        for question in questions:
            if question.kind not in TIMED_KINDS:
                continue
            counts[question.kind] += 1
            text, answer = question.text, question.answer
            moments = [seconds(found[0]) for found in re.finditer(CLOCK, text)]
            if question.kind == "span":
                name = next(n for n in came if n in text or (n.startswith("card") and "card" in text))
                assert answer_span(answer) == span_of(seen, name)
            elif question.kind == "moment":
                assert [name for name, second in came.items() if second == moments[0]] == [answer]
            elif question.kind == "between":
                first, last = moments
                assert [name for name, second in came.items() if first <= second <= last] == [answer] or (
                    [name for name, second in came.items() if first <= second < last] == [answer]
                )
            else:
                assert text.endswith(f" {TIMES_REQUEST}")
                said = answer.partition(" [")[0]
                spans = [span_of(seen, name) for name in came]
                assert answer_span(answer) in spans
                fits = [n for n in came if said in n.split() or said in ("left", "right", "up", "down")]
                assert answer_span(answer) in [span_of(seen, name) for name in fits]
    assert all(count > 100 for count in counts.values()), counts
    paces = [DATA.world(index).pace for index in range(400)]
    assert {1, 2, 9} <= set(paces) <= set(range(1, 10)) and 180 < paces.count(1) < 270


def test_follow_ups_ask_about_what_was_just_named():
    """Against the one thing that fits all that was said before."""
    asked = {"colour": 0, "shape": 0, "direction": 0, "quarter": 0, "sign": 0}
    for index in range(250):
        world, questions = DATA.asked(index)
        seen = listing(world)
        for question in (one for one in questions if one.kind in FOLLOW_KINDS):
            (before,) = question.before
            words = set(re.findall(r"\w+", f"{before.text} {before.answer}".lower()))
            if before.kind == "order":
                words = set(before.answer.split())
            fits = [
                thing
                for thing in world.things
                if (thing.colour in words) + (thing.shape in words) == 2
                and (before.kind != "direction" or before.answer == thing.direction)
            ]
            said, _, span = question.answer.partition(" [")
            about = next(
                name for name in asked if name in question.text.replace("way", "direction").replace("stood", "sign")
            )
            asked[about] += 1
            if not fits:
                assert "card" in before.text and said == (
                    world.card.symbol.lower()
                    if about == "sign"
                    else QUARTERS[quarter_of(world.card.start, world.seconds)]
                )
                continue
            (thing,) = fits
            truths = {"colour": thing.colour, "shape": thing.shape, "direction": thing.direction}
            assert said == (truths.get(about) or QUARTERS[quarter_of(thing.start, world.seconds)])
            assert bool(span) == (question.kind == "follow_timed") == question.text.endswith(f" {TIMES_REQUEST}")
            assert not span or answer_span(f"[{span}") == span_of(seen, thing.name)
    assert min(asked.values()) >= 5, asked
    turns = [message["content"][-1]["text"] for message in chat([question])]
    assert turns == [before.text, before.answer, question.text, question.answer]


def test_a_training_chat_tells_of_each_thing_once_when_it_is_seen():
    """Whatever the kind: the seconds of a second question would stand in the first one, or in its answer."""
    rng, several = random.Random(0), 0
    for index in range(60):
        world, questions = DATA.asked(index)
        chosen = choose_questions(rng, questions, 40, dict.fromkeys(ALL_KINDS, 1.0))
        came = arrivals(listing(world))
        told = [question_subject(question) for question in chosen if question.kind in TIMED_KINDS]
        names = [{"card"} if name.startswith("card") else set(name.split()) for name in came]
        assert all(set(about) in names for kind, about in told if kind == "when")
        assert len(set(told)) == len(told) <= len(came)
        several += len(told) > 2
    assert several > 30


def test_videos_begin_at_any_hour_and_are_calm_or_busy():
    data = WorldDataset("train", 600, frames=(64, 64), begins=90_000, variety=0.5)
    worlds = [data.world(index) for index in range(600)]
    begins = [world.begin for world in worlds if world.begin]
    decades = [sum(10**n <= begin < 10 ** (n + 1) for begin in begins) for n in range(4)]
    assert max(begins) <= 90_000 and min(decades) > 0.7 * max(decades) > 30
    calm = sum(len(world.things) <= 2 and not world.clutter for world in worlds)
    busy = sum(len(world.things) > 6 for world in worlds)
    assert 110 < calm < 190 and 110 < busy < 190
    plain = WorldDataset("train", 600, frames=(64, 64))
    same = sum(replace(world, begin=0) == plain.world(index) for index, world in enumerate(worlds))
    assert 250 < same < 350
    with pytest.raises(ValueError, match="variety=2"):
        WorldDataset("train", 4, variety=2)


def test_slow_motion_is_read_with_its_own_times():
    sample = next(s for s in map(DATA.sample, range(40)) if s.world.pace == 9 and len(s.frames) > 8)
    times = sample.timed_frames.timestamps
    assert (times == [sample.world.begin + 9 * k for k in range(len(sample.frames))]).all()
    assert sample.timed_frames.duration == times[-1] + 9
    with pytest.raises(ValueError, match="pace=0"):
        WorldDataset("train", 4, pace=0)


def test_what_is_said_is_told_once_and_contradicts_the_picture_half_of_the_time():
    agrees, asked = 0, dict.fromkeys(SPOKEN_KINDS, 0)
    for index in range(300):
        world, questions = DATA.asked(index)
        cues = DATA.cues(world)
        assert cues == tuple(sorted(cues, key=lambda cue: cue.start))
        last = world.begin + max(world.seconds - 1, 1) * world.pace
        assert all(world.begin <= cue.start < last for cue in cues)
        told = " ".join(cue.text for cue in cues)
        (sign,) = re.findall(r"sign (?:is )?(\w)\.", told)
        claims = dict(re.findall(r"The (\w+) is (\w+)\.", told.replace("The sign is", "")))
        assert world.card is None or sign != world.card.symbol.lower(), "what is heard is never shown"
        for shape, colour in claims.items():
            (shown,) = [thing.colour for thing in world.things if thing.shape == shape]
            agrees += shown == colour
        for question in questions:
            if question.kind in SPOKEN_KINDS:
                asked[question.kind] += 1
                said = question.options["ABCD".index(question.answer)] if question.options else question.answer
                shape = next((shape for shape in claims if shape in question.text), None)
                assert said == (sign if question.kind == "spoken" else claims[shape])
    assert all(count > 200 for count in asked.values()), asked
    assert 0.4 < agrees / 280 < 0.6


def test_what_is_shown_and_asked_is_the_same_with_and_without_times():
    plain = WorldDataset("train", 400, frames=(4, 90), questions=40)
    for index in range(30):
        world, questions = plain.asked(index)
        assert replace(DATA.world(index), begin=0, pace=1) == world
        assert ask(replace(world, begin=500), 40) == questions, "no question without times knows when a video begins"
        assert plain.cues(world) == ()
        listed = list_times(world).answer
        assert listed.count("[") == len(world.things) + (world.card is not None)


def test_training_and_scoring_read_what_the_processor_writes():
    """One tokenization: batches of training, scoring from states, and everybody's processor."""
    tokenizer = build_world_tokenizer()
    config = world_config(SIZES["tiny"], tokenizer)
    config.frame_times, config.frame_times_every = "text", 2.0
    processor = world_processor(config, tokenizer)
    data = WorldDataset("train", 50, frames=(6, 6), kinds=ALL_KINDS, questions=6, begins=300)
    batches = WorldBatches(data, processor, 2000, torch.ones(1), torch.ones(len(ALL_KINDS)))
    batch = next(iter(batches))
    assert int((batch["input_ids"] == processor.video_token_id).sum()) == int(batch["num_frames"].sum()) * 16
    samples = [data.sample(index) for index in (3, 4, 5)]
    rows = []
    for sample in samples:
        messages = chat(sample.questions, sample.timed_frames, sample.cues)
        (row,) = batches.collator([{"messages": messages}])["input_ids"].tolist()
        written = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert written["input_ids"] == [row]
        last = len(row) - row[::-1].index(processor.video_token_id)
        ending = tokenizer.decode(row[last : last + 60]).partition("\n")[0]
        rows.append(row[:last] + row[last : last + len(tokenizer(ending, add_special_tokens=False)["input_ids"])])
        shown = tokenizer.decode(row[:last], skip_special_tokens=False)
        assert f"[{sample.world.begin // 60}:{sample.world.begin % 60:02}]" in shown
    fed = []

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids, attention_mask, **_):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            fed.extend(ids[real.bool()].tolist() for ids, real in zip(input_ids, mask, strict=True))
            return type("Out", (), {"past_key_values": type("S", (), {"reorder_cache": lambda self, rows: None})()})

    read_videos(Model(), processor, samples, [1, 1, 1])
    assert fed == rows


@pytest.mark.parametrize(
    ("given", "overlap"),
    [("[0:02-0:06]", 1), ("red [0:02-0:04]", 0.5), ("[0:06-0:08]", 0), ("[0:00-0:12]", 1 / 3), ("never", 0)],
)
def test_overlap_of_spans(given, overlap):
    assert span_overlap(given, "red [0:02-0:06]") == pytest.approx(overlap)
    assert ALL_KINDS[: len(KINDS)] == KINDS


def test_files_of_a_world_that_speaks_are_training_rows(tmp_path):
    """What is said comes as subtitles beside the video, named in each row, and is read with it."""
    questions = render_to_folder(tmp_path / "world", 1, kinds=SPOKEN_KINDS, frames=(8, 8), progress=False)
    (row, *_) = [json.loads(line) for line in questions.read_text().splitlines()]
    data = WorldDataset("train", 1, frames=(8, 8), kinds=SPOKEN_KINDS, questions=2)
    assert read_subtitles(tmp_path / "world" / row["subtitles"]).cues == list(data.cues(data.world(0)))
    tokenizer = build_world_tokenizer()
    processor = world_processor(world_config(SIZES["tiny"], tokenizer), tokenizer)
    (sample,) = load_training_data(str(questions.parent), merge_by_video=True)
    text = tokenizer.decode(encode_row(processor, sample, EncodingSettings()).input_ids.tolist())
    assert all(f'"{cue.text}"' in text for cue in data.cues(data.world(0)))
    with pytest.raises(ValueError, match="which follow cannot be"):
        render_to_folder(tmp_path / "talk", 1, kinds=("follow", "colour"), progress=False)
    with pytest.raises(ValueError, match="hold no subtitles"):
        load_world("train", 1, kinds=SPOKEN_KINDS)


def test_what_training_alone_asks_about_speech_is_what_it_quotes():
    rng = random.Random(0)
    asked = [repeat_sign(rng) for _ in range(400)]
    assert {re.search(r"sign (?:is )?(\w)\.", question.text)[1] for question in asked} == set(CARD_SYMBOLS.lower())
    assert all(re.search(r"sign (?:is )?(\w)\.", question.text)[1] == question.answer for question in asked)
