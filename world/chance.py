"""What somebody who never saw the video scores: the chance level of each kind of question.

Per kind and form, the better of two blind strategies: guess uniformly among the answers that the wording leaves open,
or always say the answer that is right most often. A kind's level is the mean over its questions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from .dataset import WorldDataset
from .questions import ALL_KINDS, FORMS, KINDS, Question


def chance_levels(questions: Iterable[Question]) -> dict[str, float]:
    """Chance level 0..1 of every kind that occurs among `questions`, and of all together under ``"all"``."""
    groups: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.kind, question.form].append(question)
    expected: dict[str, float] = defaultdict(float)
    asked: Counter[str] = Counter()
    for (kind, _), members in groups.items():
        uniform = sum(1 / question.choices for question in members)
        constant = Counter(question.answer for question in members).most_common(1)[0][1]
        for name in (kind, "all"):
            expected[name] += max(uniform, constant)
            asked[name] += len(members)
    return {kind: expected[kind] / asked[kind] for kind in (*ALL_KINDS, "all") if asked[kind]}


def world_chance(
    videos: int = 5000,
    *,
    frames: tuple[int, int] = (8, 64),
    kinds: Sequence[str] = KINDS,
    forms: Sequence[str] = FORMS,
    seed: int = 0,
) -> dict[str, float]:
    """Chance levels on `videos` videos of the test split, one question per kind and video; nothing is drawn."""
    dataset = WorldDataset("test", videos, frames=frames, questions=len(kinds), kinds=kinds, forms=forms, seed=seed)
    return chance_levels(question for index in range(videos) for question in dataset.asked(index)[1])
