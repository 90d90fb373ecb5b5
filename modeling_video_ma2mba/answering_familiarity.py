"""What a model was trained on, as far as a few numbers and sentences tell: frames and questions unlike that are named.

A small model answers whatever it is asked about whatever it is shown, and its score does not tell that it never saw
the like. A checkpoint may ship a file `familiarity.safetensors` (named by its configuration as `familiarity`):

- frames: the mean of a frame's patch features, and the frame itself at 8 x 8 pixels, lie close to those of training in
  the directions in which these hardly vary. The tower hardly sees what never varied in training, such as which channel
  is which, or that there is anything at all; the small picture does.
- questions: the sentences that were trained, with the words that may stand in their gaps.

Legend: F frames, T rows of a frame, C numbers about a frame, K directions.
"""

import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

FILE = "familiarity.safetensors"
STRANGE_FRAMES = "unfamiliar_frames"
"""Entry of a state's metadata: how many of its "frames" look unlike training."""
_PREFIXES = {"features": "", "pictures": "picture_"}  # of the tensors in a file
MOST_STRANGE = 0.5
"""Share of strange frames from which on a video as a whole is one."""
_CLOCK = re.compile(r"(?<![\w:.])(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?(?![\w:])")
_POINTING = re.compile(r"\b(?:it|its|this|that|these|those|they|them|their|he|she|his|her|ones?|there|then)\b", re.I)


@dataclass(frozen=True)
class QuestionForms:
    """The questions that a model was trained on.

    Attributes:
        forms: sentences with gaps, such as "what colour is the {shape}"; a gap "{a|b}" takes words of either slot.
        slots: the texts that may stand in each gap.
        follow_ups: whether questions about what was just named were trained, too ("Which way does it move?").
    """

    forms: tuple[str, ...]
    slots: Mapping[str, Sequence[str]] = field(default_factory=dict)
    follow_ups: bool = False

    def knows(self, question: str) -> bool:
        """Whether a question is one of the forms, whatever its capitals, spaces and last marks."""
        return self._pattern.fullmatch(_plain(question)) is not None

    def nearest(self, question: str) -> str:
        """The trained question whose wording is closest, with gaps filled by what the question says where possible."""
        asked = _plain(question)
        words = set(re.findall(r"\w+", asked))
        examples = [self._example(form, words) for form in self.forms]
        best = max(examples, key=lambda text: difflib.SequenceMatcher(None, asked.split(), text.split()).ratio())
        return f"{best[:1].upper()}{best[1:]}?"

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        gaps = {name: "(?:" + "|".join(map(re.escape, map(_plain, texts))) + ")" for name, texts in self.slots.items()}
        forms = []
        for form in self.forms:
            parts = re.split(r"\{([^}]*)\}", form)
            named = ("(?:" + "|".join(gaps[name] for name in gap.split("|")) + ")" for gap in parts[1::2])
            texts = [re.escape(_plain(text, ends=False)) for text in parts[::2]]
            forms.append(texts[0] + "".join(gap + text for gap, text in zip(named, texts[1:], strict=True)))
        any_gap = "(?:" + "|".join(gaps.values()) + ")"
        return re.compile(f"(?:{'|'.join(forms)})(?:[?.,]?(?: \\([a-d]\\) {any_gap})+)?" if gaps else "|".join(forms))

    def _example(self, form: str, words: set[str]) -> str:
        def filled(gap: re.Match[str]) -> str:
            texts = [text for name in gap[1].split("|") for text in self.slots[name]]
            return max(texts, key=lambda text: len(words & set(_plain(text).split())))

        return re.sub(r"\{([^}]*)\}", filled, form)


def _plain(text: str, ends: bool = True) -> str:
    text = re.sub(r"\s+", " ", re.sub("[\u200b\u2060\ufeff]", "", text).casefold())
    text = _CLOCK.sub("0:00", text)  # one moment is as familiar as another
    return text.strip().rstrip("?!. ") if ends else text


@dataclass(frozen=True, eq=False)
class Likeness:
    """How far numbers about a frame lie from those of training, in the directions in which these vary least.

    Attributes:
        mean: (C,). directions: (C, K), each divided by its spread: the distance is the root of the mean square over
            them, about 1 in training. threshold: from where on a frame is strange.
    """

    mean: Tensor
    directions: Tensor
    threshold: float

    @classmethod
    def fit(cls, seen: Tensor, others: Tensor, false_alarms: float, directions: int) -> "Likeness":
        """From frames of training.

        Args:
            seen: (F, C), many more frames than C.
            others: (G, C) of frames that were not looked at in fitting, as they come from files: `threshold` leaves
                out the share `false_alarms` of them.
            directions: K, at most C: those in which `seen` varies least.

        Raises:
            ValueError: too few frames for so many directions.
        """
        if len(seen) < 4 * seen.shape[1] or not 1 <= directions <= seen.shape[1]:
            raise ValueError(
                f"{len(seen)} frames are too few for {seen.shape[1]} features: give at least "
                f"{4 * seen.shape[1]} (and 1 to {seen.shape[1]} directions)"
            )
        wide = seen.double()
        mean = wide.mean(0)
        _, spread, axes = torch.linalg.svd(wide - mean, full_matrices=False)
        spread = (spread / len(wide) ** 0.5).clamp(min=1e-6 * float(spread[0]) / len(wide) ** 0.5)
        found = cls(mean.float(), (axes[-directions:].T / spread[-directions:]).float(), 0.0)
        return replace(found, threshold=float(torch.quantile(found.distance(others), 1 - false_alarms)))

    def distance(self, numbers: Tensor) -> Tensor:
        """Distances (F,) of `numbers` (F, C), where these tensors are (`to`)."""
        return ((numbers.float() - self.mean) @ self.directions).square().mean(-1).sqrt()

    def strange(self, numbers: Tensor) -> Tensor:
        """(F,) bool: which of `numbers` (F, C), on any device, are farther off than `threshold`."""
        return self.to(numbers.device).distance(numbers) > self.threshold

    def to(self, device: torch.device) -> "Likeness":
        """The same on another device."""
        if self.mean.device == device:
            return self
        return replace(self, mean=self.mean.to(device), directions=self.directions.to(device))


def small_pictures(frames: Tensor) -> Tensor:
    """(F, 192) float: raw frames `(F, 3, h, w)` uint8 at 8 x 8 pixels."""
    return nn.functional.adaptive_avg_pool2d(frames.float(), 8).flatten(1)


@dataclass(frozen=True, eq=False)
class Familiarity:
    """See the top of the file.

    Attributes:
        features: of the means (F, C) over the tower's rows of each frame. pictures: of `small_pictures`. None: nothing
            is known of those.
        questions: None: nothing is known of questions.
        facts: how it was fitted and what was measured, for people: names and values, JSON.
    """

    features: Likeness | None = None
    pictures: Likeness | None = None
    questions: QuestionForms | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Familiarity":
        """Read a file written by `save`; ValueError: it is none, or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
            content = json.loads(facts["familiarity"])
            questions = content.pop("questions", None)
            if questions is not None:
                questions = QuestionForms(tuple(questions.pop("forms")), **questions)
            found = {}
            for name, prefix in _PREFIXES.items():  # the first is there in files of all ages
                threshold = content.pop(f"{prefix}threshold", 0.0) if prefix else content.pop("threshold")
                if f"{prefix}mean" in tensors:
                    parts = tensors[f"{prefix}mean"], tensors[f"{prefix}directions"]
                    found[name] = Likeness(*parts, threshold)
            return cls(**found, questions=questions, facts=content)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} does not say what a model is familiar with: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one small file, tensors in half precision."""
        from safetensors.torch import save_file

        content: dict[str, Any] = {**self.facts, "threshold": 0.0}
        if (known := self.questions) is not None:
            slots = {name: list(texts) for name, texts in known.slots.items()}
            content["questions"] = {"forms": list(known.forms), "slots": slots, "follow_ups": known.follow_ups}
        tensors: dict[str, Tensor] = {}
        for name, prefix in _PREFIXES.items():
            likeness: Likeness | None = getattr(self, name)
            if likeness is not None:
                tensors[f"{prefix}mean"] = likeness.mean.half().contiguous()
                tensors[f"{prefix}directions"] = likeness.directions.half().contiguous()
                content[f"{prefix}threshold"] = likeness.threshold
        save_file(tensors, path, metadata={"familiarity": json.dumps(content, ensure_ascii=False)})

    def strange(self, rows: Tensor, frames: Tensor) -> Tensor:
        """(F,) bool, where `rows` are: which frames are unlike training.

        Args:
            rows: (F, T, C) of the tower. frames: the same frames (F, 3, h, w); only raw ones (uint8) are looked at.
        """
        found = rows.new_zeros(len(rows), dtype=torch.bool)
        if self.features is not None:
            found |= self.features.strange(rows.float().mean(1))
        if self.pictures is not None and frames.dtype == torch.uint8:
            found |= self.pictures.strange(small_pictures(frames)).to(rows.device, non_blocking=True)
        return found

    def to(self, rows: torch.device, frames: torch.device) -> "Familiarity":
        """The same where the tower's rows and where frames are."""
        features, pictures = self.features, self.pictures
        return replace(self, features=features and features.to(rows), pictures=pictures and pictures.to(frames))

    def unfamiliar(self, metadata: Mapping[str, str], questions: Sequence[str]) -> "Unfamiliar":
        """What of a state and of the question asked of it is unlike training.

        Args:
            metadata: of the state. questions: all of the conversation, the last one being asked.
        """
        frames, strange = int(metadata.get("frames", 0)), metadata.get(STRANGE_FRAMES)
        share = None if strange is None or not frames else int(strange) / frames
        forms = self.questions
        if forms is None or not questions or forms.knows(questions[-1]):
            return Unfamiliar(share, frames)
        pointing = len(questions) > 1 and _POINTING.search(questions[-1]) is not None
        if pointing and forms.follow_ups:
            return Unfamiliar(share, frames)
        return Unfamiliar(share, frames, questions[-1], forms.nearest(questions[-1]), pointing)


@dataclass(frozen=True)
class Unfamiliar:
    """What is unlike training: the share of frames (None: unknown), the question (None: it is like those trained) and
    the nearest that was trained, and whether it asks for something named before, which was not trained."""

    share: float | None
    frames: int
    question: str | None = None
    nearest: str | None = None
    pointing: bool = False

    @property
    def strange_video(self) -> bool:
        """Whether most of the video is unlike training."""
        return self.share is not None and self.share >= MOST_STRANGE

    def __bool__(self) -> bool:
        return self.strange_video or self.question is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the share of strange frames, where it is known, and whether the question is strange."""
        share = {} if self.share is None else {"frames": round(self.share, 4)}
        return {**share, "question": self.question is not None}

    @property
    def video_note(self) -> str:
        """One sentence for people about the video; empty where there is nothing to say."""
        if not self.strange_video or self.share is None:
            return ""
        count = (
            "this picture looks"
            if self.frames == 1
            else f"{round(self.share * self.frames)} of {self.frames} frames look"
        )
        return f"{count} unlike anything that this model was trained on: its answers about this mean nothing"

    @property
    def question_note(self) -> str:
        """One sentence for people about the question; empty where there is nothing to say."""
        if self.question is None:
            return ""
        short = self.question if len(self.question) <= 80 else f"{self.question[:77]} …"
        if self.pointing:
            return (
                f'this model has not learnt questions about what was just named, such as "{short}": name it, as in '
                f'"{self.nearest}"'
            )
        return f'this model was not trained on questions such as "{short}"; the nearest it knows: "{self.nearest}"'

    @property
    def notes(self) -> list[str]:
        """The sentences that there are."""
        return [text for text in (self.video_note, self.question_note) if text]


class StrangeFrames:
    """Counts, as frames are read, those that look unlike training; without a `Familiarity`, nothing.

    Args:
        known: the model's, or None.
    """

    def __init__(self, known: Familiarity | None) -> None:
        self._known = known if known is not None and (known.features or known.pictures) else None
        self._flags: list[Tensor] = []

    def __call__(self, rows: Tensor, frames: Tensor) -> None:
        """Take the tower's rows (F, T, C) of the next frames, and these (F, 3, h, w); no GPU is waited for."""
        if self._known is not None:
            self._known = self._known.to(rows.device, frames.device)  # once: a copy to a GPU makes the host wait
            self._flags.append(self._known.strange(rows, frames))

    def counts(self, groups: int) -> list[int] | None:
        """How many of the frames since the last call were strange, in `groups` parts of as many frames each; None
        where nothing is known of frames."""
        flags, self._flags = self._flags, []
        if self._known is None:
            return None
        if not flags:
            return [0] * groups
        return [int(n) for n in torch.cat([part.cpu() for part in flags]).view(groups, -1).sum(1)]

    def count(self) -> int | None:
        """The same of all frames together."""
        found = self.counts(1)
        return None if found is None else found[0]

    def add_to(self, metadata: dict[str, str], frames_before: int = 0) -> None:
        """Add those since the last call to what a state's metadata say."""
        add_strange(metadata, self.count(), frames_before)


def add_strange(metadata: dict[str, str], count: int | None, frames_before: int = 0) -> None:
    """Add a number of strange frames to a state's metadata; unless it is unknown, or was for the frames before."""
    if count is not None and (frames_before == 0 or STRANGE_FRAMES in metadata):
        metadata[STRANGE_FRAMES] = str(int(metadata.get(STRANGE_FRAMES, 0)) + count)


def asked_questions(question: str | Iterable[Mapping[str, Any]]) -> list[str]:
    """The texts of a question, or of all questions of a conversation."""
    if isinstance(question, str):
        return [question]
    texts = []
    for message in question:
        content = message.get("content")
        parts = (
            [content] if isinstance(content, str) else [p.get("text") for p in content or () if isinstance(p, dict)]
        )
        if message.get("role") == "user":
            texts.append(" ".join(part for part in parts if isinstance(part, str)))
    return texts
