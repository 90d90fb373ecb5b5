"""Questions about a world, each with exactly one right answer.

A question is only made where the world settles it: a colour is asked of a shape of which there is one, an order only
of two arrivals at least two seconds apart, a quarter only away from the borders between quarters. Every kind comes as
"open" and with lettered options as "choice", whose wrong options are drawn first from what the same video shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..processing.frame_times import TIMES_REQUEST, clock, span_text
from .speech import SIGN_CUES, speech_of
from .world import (
    CARD_SYMBOLS,
    COLOURS,
    DIRECTIONS,
    QUARTERS,
    SHAPES,
    Thing,
    World,
    pick,
    quarter_of,
    shuffled,
)

KINDS = ("colour", "shape", "count", "direction", "order", "needle", "time")
TIMED_KINDS = ("span", "moment", "between", "timed", "follow_timed")
"""For models that read time stamps; open questions only."""
SPOKEN_KINDS = ("spoken", "said")
"""About what is said, for videos with subtitles."""
FOLLOW_KINDS = ("follow", "follow_timed")
"""About what the question before, or its answer, has named: "Which way does it move?"; open questions only."""
ALL_KINDS = (*KINDS, *TIMED_KINDS, *SPOKEN_KINDS, "follow")
FORMS = ("open", "choice")
COUNTS = ("0", "1", "2", "3", "4")
LETTERS = "ABCD"
ORDER_GAP = 2  # seconds between two arrivals whose order may be asked
QUARTER_MARGIN = 0.08  # of a quarter: nearer to a border than this, the quarter is not asked
_COUNT_WEIGHTS = {"0": 1.0, "1": 1.0, "2": 2.5, "3": 4.0, "4": 6.0}


@dataclass(frozen=True)
class Question:
    """`text` is what is asked, options included; `answer` is a word, or a letter where there are options.

    `before` are the questions of the conversation that it goes on with, answered."""

    kind: str
    form: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    before: tuple[Question, ...] = ()

    @property
    def choices(self) -> int:
        """How many answers the wording leaves open to somebody who has not seen the video."""
        return len(self.options) or ANSWERS[self.kind]


ANSWERS = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "count": len(COUNTS),
    "direction": len(DIRECTIONS),
    "order": 2,
    "needle": len(CARD_SYMBOLS),
    "time": len(QUARTERS),
    "span": 10**6,
    "timed": 10**6,
    "moment": len(COLOURS) * len(SHAPES),
    "between": len(COLOURS) * len(SHAPES),
    "spoken": len(CARD_SYMBOLS),
    "said": len(COLOURS),
    "follow": len(COLOURS),
    "follow_timed": 10**6,
}


@dataclass(frozen=True)
class _Draft:
    text: str
    truth: str
    universe: tuple[str, ...]
    present: tuple[str, ...]  # wrong answers that the video also shows
    open_text: str = ""  # where the open wording differs
    before: tuple[Question, ...] = ()


def list_things(world: World) -> Question:
    """Extra kind `list`, for training only: everything in the order of its arrival, with the way it moves and the
    quarter it arrives in, where the video settles them.

    It asks for all at once, which teaches a model to see and remember long before single questions do.
    """
    moments = [(thing.start, thing.name, f" {thing.direction}" if _shows_motion(world, thing) else "")
               for thing in world.things]  # fmt: skip
    if world.card is not None:
        moments.append((world.card.start, f"card {world.card.symbol.lower()}", ""))
    told = []
    for start, name, motion in sorted(moments):
        settled = world.seconds >= 4 and _is_inside_quarter(start, world.seconds)
        told.append(name + motion + (f" {QUARTERS[quarter_of(start, world.seconds)]}" if settled else ""))
    return Question("list", "open", "List everything in the video.", ", ".join(told) or "none")


def list_times(world: World, speaks: bool = False) -> Question:
    """Extra kind `times`, for training only: everything in the order of its arrival, with the span of its visit; and
    the sign that is named aloud, where somebody `speaks`."""
    visits = [(start, end, name) for name, start, end in _visits(world)]
    told = [f"{name} {span_text(start, end)}" for start, end, name in sorted(visits)]
    told += [f"sign {speech_of(world).sign}"] if speaks else []
    return Question("times", "open", f"List everything in the video. {TIMES_REQUEST}", ", ".join(told) or "none")


def repeat_sign(rng: random.Random) -> Question:
    """Extra kind `repeat`, for training only: which sign is named in words that the question quotes.

    It needs no video. A sign that is heard is read as one token and answered as another; how, is learnt within a few
    steps from this, and hardly ever from one word in a long video.
    """
    sign = pick(rng, CARD_SYMBOLS).lower()
    text = f'A voice says "{pick(rng, SIGN_CUES).format(sign)}" Which sign did it name?'
    return Question("repeat", "open", text, sign)


def name_option(question: Question) -> Question:
    """Extra kind `option`, for training only: which letter stands before the right option, told what that option says.

    It needs no video, and teaches what every lettered question takes after its answer has been found.
    """
    told = question.options[LETTERS.index(question.answer)]
    text = f"Which option is {told}? {_listed(question.options)}"
    return Question("option", "choice", text, question.answer, question.options)


def check_kinds(kinds: Iterable[str], known: Sequence[str] = ALL_KINDS, what: str = "kind") -> tuple[str, ...]:
    """`kinds` as a tuple without repeats; a ValueError names what is unknown."""
    kinds = tuple(dict.fromkeys(kinds))
    wrong = [kind for kind in kinds if kind not in known]
    if wrong or not kinds:
        named = ", ".join(map(repr, wrong)) or "none given"
        raise ValueError(f"Unknown question {what}: {named}. Choose among {', '.join(known)}.")
    return kinds


def ask(
    world: World,
    count: int,
    kinds: Sequence[str] = KINDS,
    forms: Sequence[str] = FORMS,
    salt: int = 0,
) -> list[Question]:
    """Up to `count` different questions, kinds in turn in random order; fewer where the world settles no more.

    `salt` gives other questions about the same world. A one-second video settles no ``direction``, for instance: kinds
    that the world leaves open are skipped.
    """
    kinds, forms = check_kinds(kinds), check_kinds(forms, FORMS, "form")
    rng = random.Random((world.seed << 20) + salt + (1 << 100))  # a stream apart from the world's own
    asked: dict[tuple[str, tuple[Question, ...]], Question] = {}
    misses: dict[str, int] = {}
    queue: list[str] = []
    while len(asked) < count:
        if not queue:
            queue = shuffled(rng, [kind for kind in kinds if misses.get(kind, 0) < 4])
            if not queue:
                break
        kind = queue.pop()
        draft = _DRAFTS[kind](world, rng)
        question = _finish(kind, draft, _form(kind, forms, rng), rng) if draft else None
        if question is None or (question.text, question.before) in asked:
            misses[kind] = misses.get(kind, 0) + (1 if question else 4)
        else:
            asked[question.text, question.before] = question
    return shuffled(rng, list(asked.values()))


def _form(kind: str, forms: Sequence[str], rng: random.Random) -> str:
    return "open" if kind in (*TIMED_KINDS, *FOLLOW_KINDS) else pick(rng, forms)


def _finish(kind: str, draft: _Draft, form: str, rng: random.Random) -> Question:
    if form == "open":
        return Question(kind, form, draft.open_text or draft.text, draft.truth, before=draft.before)
    present = [answer for answer in shuffled(rng, draft.present) if answer != draft.truth]
    absent = [answer for answer in shuffled(rng, draft.universe) if answer != draft.truth and answer not in present]
    wrong = (present + absent)[: len(LETTERS) - 1]
    options = tuple(shuffled(rng, [draft.truth, *wrong]))
    text = f"{draft.text} {_listed(options)}"
    return Question(kind, form, text, LETTERS[options.index(draft.truth)], options)


def _listed(options: Sequence[str]) -> str:
    return " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _unique(things: Sequence[Thing], attribute: Callable[[Thing], str]) -> list[Thing]:
    values = [attribute(thing) for thing in things]
    return [thing for thing, value in zip(things, values, strict=True) if values.count(value) == 1]


def _colour(world: World, rng: random.Random) -> _Draft | None:
    things = _unique(world.things, lambda thing: thing.shape)
    if not things:
        return None
    thing = pick(rng, things)
    text = pick(rng, ("What colour is the {}?", "Which colour does the {} have?")).format(thing.shape)
    return _Draft(text, thing.colour, tuple(COLOURS), tuple(dict.fromkeys(other.colour for other in world.things)))


def _shape(world: World, rng: random.Random) -> _Draft | None:
    things = _unique(world.things, lambda thing: thing.colour)
    if not things:
        return None
    thing = pick(rng, things)
    text = pick(rng, ("Which shape is {}?", "What shape is the {} object?")).format(thing.colour)
    return _Draft(text, thing.shape, SHAPES, tuple(dict.fromkeys(other.shape for other in world.things)))


def _count(world: World, rng: random.Random) -> _Draft | None:
    numbers: dict[str, list[str]] = {}
    for noun, values in (("{} objects", [t.colour for t in world.things]), ("{}s", [t.shape for t in world.things])):
        for value in COLOURS if noun == "{} objects" else SHAPES:
            plural = "crosses" if value == "cross" else noun.format(value)
            numbers.setdefault(str(values.count(value)), []).append(plural)
    known = [number for number in COUNTS if number in numbers]
    mark = rng.random() * sum(_COUNT_WEIGHTS[number] for number in known)
    for number in known:  # large counts are rarer than small ones, so they are asked about more often
        mark -= _COUNT_WEIGHTS[number]
        if mark <= 0:
            break
    text = pick(rng, ("How many {} appear?", "How many {} are there?")).format(pick(rng, numbers[number]))
    return _Draft(text, number, COUNTS, ())


def _direction(world: World, rng: random.Random) -> _Draft | None:
    movers = [thing for thing in world.things if _shows_motion(world, thing)]
    if not movers:
        return None
    thing = pick(rng, movers)
    text = pick(rng, ("Which way does the {} move?", "In which direction does the {} go?")).format(thing.name)
    return _Draft(text, thing.direction or "", DIRECTIONS, ())


def _order(world: World, rng: random.Random) -> _Draft | None:
    pairs = [
        (early, late)
        for early in world.things
        for late in world.things
        if late.start - early.start >= ORDER_GAP
    ]  # fmt: skip
    if not pairs:
        return None
    early, late = pick(rng, pairs)
    which = pick(rng, ("first", "last"))
    names = tuple(shuffled(rng, [early.name, late.name]))
    truth = early.name if which == "first" else late.name
    return _Draft(f"Which came {which}?", truth, names, (), f"Which came {which}, the {names[0]} or the {names[1]}?")


def _needle(world: World, rng: random.Random) -> _Draft | None:
    if world.card is None:
        return None
    text = pick(rng, ("What stood on the card?", "Which sign did the card show?"))
    return _Draft(text, world.card.symbol.lower(), tuple(CARD_SYMBOLS.lower()), ())


def _time(world: World, rng: random.Random) -> _Draft | None:
    if world.seconds < 4:
        return None
    moments = [(f"the {thing.name}", thing.start) for thing in world.things]
    if world.card is not None:
        moments.append(("the card", world.card.start))
    moments = [moment for moment in moments if _is_inside_quarter(moment[1], world.seconds)]
    if not moments:
        return None
    number = pick(rng, sorted({quarter_of(start, world.seconds) for _, start in moments}))
    name, _ = pick(rng, [moment for moment in moments if quarter_of(moment[1], world.seconds) == number])
    text = pick(rng, ("In which quarter of the video did {} appear?", "Which quarter of the video first shows {}?"))
    return _Draft(text.format(name), QUARTERS[number], QUARTERS, ())


def _visits(world: World) -> list[tuple[str, int, int]]:
    """Everything that comes and goes, with the seconds of the video at which it does."""
    own = [(thing.name, thing.start, thing.end) for thing in world.things]
    if world.card is not None:
        own.append((f"card {world.card.symbol.lower()}", world.card.start, world.card.start + 1))
    return [(name, int(world.moment(start)), int(world.moment(end))) for name, start, end in own]


def _span(world: World, rng: random.Random) -> _Draft | None:
    visits = _visits(world)
    if not visits:
        return None
    name, start, end = pick(rng, visits)
    text = pick(rng, ("When is the {} in view?", "From when to when is the {} shown?"))
    text = text.format(name.partition(" ")[0] if name.startswith("card ") else name)
    text += pick(rng, ("", f" {TIMES_REQUEST}"))  # who wants all answers with times asks so, too
    return _Draft(text, span_text(start, end), (), ())


def _moment(world: World, rng: random.Random) -> _Draft | None:
    visits = _visits(world)
    starts = [start for _, start, _ in visits]
    visits = [visit for visit in visits if starts.count(visit[1]) == 1]
    if not visits:
        return None
    name, start, _ = pick(rng, visits)
    text = pick(rng, ("What comes at {}?", "What appears at {}?"))
    return _Draft(text.format(clock(start)), name, (), ())


def _between(world: World, rng: random.Random) -> _Draft | None:
    visits = sorted(_visits(world), key=lambda visit: visit[1])
    if not visits:
        return None
    number = int(rng.random() * len(visits))
    name, start, _ = visits[number]
    earliest = visits[number - 1][1] + 1 if number else world.begin
    latest = visits[number + 1][1] if number + 1 < len(visits) else int(world.moment(world.seconds))
    if not earliest <= start < latest:  # two come at once
        return None
    most = 20 * world.pace
    first = start - int(rng.random() * (min(start - earliest, most) + 1))
    last = start + 1 + int(rng.random() * min(latest - start, most))
    return _Draft(f"What comes between {clock(first)} and {clock(last)}?", name, (), ())


def _timed(world: World, rng: random.Random) -> _Draft | None:
    """A question about a thing, or the card, whose answer ends in the span that shows it."""
    kind = pick(rng, ("colour", "shape", "direction", "needle"))
    draft = _DRAFTS[kind](world, rng)
    if draft is None:
        return None
    return _with_times(draft, world, _asked_about(kind, draft, world))


def _with_times(draft: _Draft, world: World, thing: Thing | None) -> _Draft:
    """A question about a thing, or about the card where that is None, whose answer ends in the span that shows it."""
    _, start, end = _visits(world)[-1 if thing is None else world.things.index(thing)]
    text, answer = f"{draft.text} {TIMES_REQUEST}", f"{draft.truth} {span_text(start, end)}"
    return _Draft(text, answer, (), (), before=draft.before)


def _asked_about(kind: str, draft: _Draft, world: World) -> Thing | None:
    """The thing that a question of a kind is about, or its answer names; None: the card."""
    for thing in world.things:
        subject = {"colour": thing.shape, "shape": thing.colour, "direction": thing.name, "time": thing.name}.get(kind)
        answer = {"colour": thing.colour, "shape": thing.shape, "direction": thing.direction}.get(kind, draft.truth)
        if kind == "order" and draft.truth == thing.name:
            return thing
        if subject is not None and f" {subject} " in draft.text.replace("?", " ") and answer == draft.truth:
            return thing
    return None


def _follow(world: World, rng: random.Random) -> _Draft | None:
    return _followed(world, rng)[0]


def _follow_timed(world: World, rng: random.Random) -> _Draft | None:
    draft, thing = _followed(world, rng)
    return None if draft is None or thing is None or draft.truth in QUARTERS else _with_times(draft, world, thing)


def _followed(world: World, rng: random.Random) -> tuple[_Draft | None, Thing | None]:
    """A question about what another one is about, with that one before it, and the thing; None: the card."""
    kind = pick(rng, ("colour", "shape", "direction", "order", "time", "needle"))
    draft = _DRAFTS[kind](world, rng)
    if draft is None:
        return None, None
    thing = _asked_about(kind, draft, world)
    start = thing.start if thing is not None else world.card.start if world.card is not None else 0
    known: dict[str, tuple[tuple[str, ...], str]] = {}
    if thing is not None:
        known["colour"] = ("What colour is it?", "Which colour does it have?"), thing.colour
        known["shape"] = ("What shape is it?", "Which shape does it have?"), thing.shape
        if _shows_motion(world, thing):
            known["direction"] = ("Which way does it move?", "In which direction does it go?"), thing.direction or ""
    elif world.card is not None:
        known["needle"] = ("What stood on it?", "Which sign did it show?"), world.card.symbol.lower()
    if world.seconds >= 4 and _is_inside_quarter(start, world.seconds):
        texts = ("In which quarter of the video did it appear?", "Which quarter of the video first shows it?")
        known["time"] = texts, QUARTERS[quarter_of(start, world.seconds)]
    known.pop(kind, None)
    if not known:
        return None, None
    told = [name for name in known if name in ("colour", "shape")]  # by the question before, or by its answer
    seen = [name for name in known if name not in told]
    texts, truth = known[pick(rng, seen if seen and (not told or rng.random() < 0.75) else told)]
    before = Question(kind, "open", draft.open_text or draft.text, draft.truth)
    return _Draft(pick(rng, texts), truth, (), (), before=(before,)), thing


def _spoken(world: World, rng: random.Random) -> _Draft | None:
    text = pick(rng, ("Which sign was named aloud?", "What sign did the voice name?"))
    shown = () if world.card is None else (world.card.symbol.lower(),)
    return _Draft(text, speech_of(world).sign, tuple(CARD_SYMBOLS.lower()), shown)


def _said(world: World, rng: random.Random) -> _Draft | None:
    claim = speech_of(world).claim
    if claim is None:
        return None
    shape, colour = claim
    text = pick(rng, ("Which colour did the voice give the {}?", "What colour is the {}, says the voice?"))
    return _Draft(text.format(shape), colour, tuple(COLOURS), tuple(dict.fromkeys(t.colour for t in world.things)))


def _is_inside_quarter(start: int, seconds: int) -> bool:
    part = 4 * (start + 0.5) / seconds % 1
    return QUARTER_MARGIN <= part <= 1 - QUARTER_MARGIN


def _shows_motion(world: World, thing: Thing) -> bool:
    return thing.direction is not None and len(_seen(world, thing)) >= 2


def _seen(world: World, thing: Thing) -> list[int]:
    """Whole seconds at which the thing is in view and no card hides it."""
    hidden = world.card.start if world.card else None
    return [second for second in range(thing.start, thing.end) if second != hidden]


_DRAFTS: dict[str, Callable[[World, random.Random], _Draft | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "direction": _direction,
    "order": _order,
    "needle": _needle,
    "time": _time,
    "span": _span,
    "moment": _moment,
    "between": _between,
    "timed": _timed,
    "spoken": _spoken,
    "said": _said,
    "follow": _follow,
    "follow_timed": _follow_timed,
}
