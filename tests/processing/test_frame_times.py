"""Text between frames: time stamps, spans, moments in questions, and where cues stand."""

import itertools
import random

import pytest

from video_ma2mba.processing.frame_times import (
    Cue,
    FrameText,
    as_clocks,
    clock,
    parse_span,
    span_text,
    spread_cues,
)


def test_clock_and_span_come_back_from_their_text():
    for seconds, text in ((0, "0:00"), (7.04, "0:07"), (7.46, "0:07.5"), (59.96, "1:00"), (3723.5, "1:02:03.5")):
        assert clock(seconds) == text
    for number in range(400):
        start = random.Random(number).randrange(0, 400_000) / 10
        end = round(start + random.Random(~number).randrange(0, 50_000) / 10, 1)
        assert parse_span(f"red star {span_text(start, end)}") == ("red star", start, end)
    assert parse_span("[0:03-0:09]") == ("", 3.0, 9.0)


@pytest.mark.parametrize(
    "answer",
    [
        "red", "red [0:03]", "red 0:03-0:09", "red [0:09-0:03]", "red [0:03-0:09] and more", "red [0:61-0:70]",
        "red [0:3-0:9]", "red[0:03-0:09]", "[1:75:00-2:00:00]",
    ],
)  # fmt: skip
def test_only_the_very_form_of_a_span_counts(answer):
    assert parse_span(answer) is None


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("What comes at 80 s?", "What comes at 1:20?"),
        ("What comes at 1 min 20 s?", "What comes at 1:20?"),
        ("What comes at 00:01:20?", "What comes at 1:20?"),
        ("Between 0:30 and 1:00, what?", "Between 0:30 and 1:00, what?"),
        ("Between 30 seconds and 1:00:05?", "Between 0:30 and 1:00:05?"),
        ("Between 30 and 90.5 seconds? 24 - 30 s?", "Between 0:30 and 1:30.5? 0:24 - 0:30?"),
        ("What is at 2 h 3 min 4.5 seconds?", "What is at 2:03:04.5?"),
        ("Are there 3 shapes in 2 minutes, or 99:99?", "Are there 3 shapes in 2 minutes, or 99:99?"),
    ],
)
def test_moments_in_questions_are_written_as_stamps_are(asked, written):
    assert as_clocks(asked) == written


def told(text, times, previous=None):
    """What is read, frames as `F`."""
    found = dict(text.texts(times, previous))
    parts = ["".join(found.get(place, "")) + "F" for place in range(len(times))]
    return "".join(parts)


def test_stamps_and_cues_stand_where_their_times_say():
    cues = (Cue(0.5, 1.0, "a"), Cue(2.0, 3.0, "b"), Cue(2.01, 3.0, "c"), Cue(9.0, 9.5, "d"))
    text = FrameText(list, 2.0, cues)
    assert told(text, [0, 1, 2, 3, 4.04]) == '[0:00]F[0:00.5] "a"F[0:02] "b"[0:02]F[0:02] "c"F[0:04]F'
    assert "".join(text.ending(4.04)) == '[0:09] "d"'
    plain = FrameText(list, None, cues)
    assert told(plain, [0, 1, 2, 3]) == 'F"a"F"b"F"c"F'
    part = FrameText(list, None, cues, begin=0.8, end=2.005)
    assert told(part, [0.8, 1.8]) + "".join(part.ending(1.8)) == '"a"FF"b"', (
        "what is being said at the beginning is told"
    )


def test_every_cut_gives_the_same_texts():
    """Whole against every way to cut it in two, and one by one."""
    dice = random.Random(3)
    times = sorted({round(dice.random() * 20, 3) for _ in range(25)})
    cues = tuple(sorted((Cue(t := dice.random() * 22, t + 1, chr(97 + n)) for n in range(9)), key=lambda c: c.start))
    text = FrameText(list, 3.0, cues)
    whole = told(text, times)
    for cut in range(1, len(times)):
        assert told(text, times[:cut]) + told(text, times[cut:], times[cut - 1]) == whole
    singly = [told(text, [now], before) for before, now in itertools.pairwise([None, *times])]
    assert "".join(singly) == whole
    assert whole.count('"') == 2 * sum(cue.start <= times[-1] for cue in cues)


def test_a_budget_leaves_out_evenly():
    cues = [Cue(float(n), n + 1.0, "x") for n in range(100)]
    assert spread_cues(cues, [10] * 100, 1000) == cues
    assert spread_cues(cues, [10] * 100, 999) == cues[::2]
    assert spread_cues(cues, [10] * 100, 55) == cues[::20]
    assert spread_cues(cues, [10] * 100, 9) == []
