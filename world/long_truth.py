"""What a rendered world shows, as the captioner and the writer of long-video data: both tell the truth."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from ..processing.frame_times import Cue
from .dataset import WorldDataset
from .questions import Question, ask, list_things
from .video_files import SETTINGS_FILE
from .world import World, pick

_KINDS = {
    "attribute": ("colour",),
    "action": ("direction",),
    "object": ("count", "shape"),
    "ocr": ("needle",),
    "temporal": ("order", "time"),
}
_HALVES = ("left", "right")
_MIDDLE = 0.1  # of the picture's width, on both sides of its middle: what arrives there is on no side


class WorldTruth:
    """Tells what videos of `video-ma2mba world render` show, from the seeds that they were made of."""

    def __init__(self) -> None:
        self.world = functools.lru_cache(maxsize=1)(self._world)  # a video is asked about many times in a row

    def _world(self, video: Path) -> World:
        """The world of a video file.

        Raises:
            ValueError: its folder was not rendered, or with other words for things.
        """
        settings = video.parent / SETTINGS_FILE
        if not settings.is_file() or not video.stem.isdigit():
            raise ValueError(f"{video}: the truth is known of videos that `video-ma2mba world render` made, not of it")
        options = json.loads(settings.read_text(encoding="utf-8"))
        if options.pop("rename", None):
            raise ValueError(f"{video}: its folder was rendered with --rename: the truth has other words")
        data = WorldDataset(size=int(video.stem) + 1, **(options | {"frames": tuple(options["frames"])}))
        return data.world(int(video.stem))

    def caption(self, video: Path, begin: float, end: float) -> str:
        """What is seen from second `begin` to `end`."""
        world = self.world(video)
        told = []
        for thing in world.things:
            if thing.start < end and thing.end > begin:
                way = f"moves {thing.direction}" if thing.direction else "stands still"
                told.append(f"A {thing.name} {way}.")
        if world.card is not None and begin <= world.card.start < end:
            told.append(f"A card shows the sign {world.card.symbol.lower()}.")
        return " ".join(told) or "Nothing but the background is seen."

    def write(self, video: Path, cues: Sequence[Cue], kind: str) -> tuple[str, str]:
        """A question of a kind and its answer; empty where the world settles none."""
        world = self.world(video)
        if kind in ("summary", "synopsis"):
            found = list_things(world)
            return found.text, found.answer
        question = (
            self._where(world) if kind == "spatial" else next(iter(ask(world, 1, _KINDS[kind], ("open",))), None)
        )
        return ("", "") if question is None else (question.text, question.answer)

    def _where(self, world: World) -> Question | None:
        """On which side of the picture something arrives."""
        sides = [
            (thing.name, _HALVES[thing.position(thing.start)[0] > 0.5])
            for thing in world.things
            if abs(thing.position(thing.start)[0] - 0.5) > _MIDDLE
        ]
        if not sides:
            return None
        name, side = pick(random.Random((world.seed << 20) + (1 << 101)), sides)
        return Question("spatial", "open", f"On which side does the {name} appear, left or right?", side, _HALVES)
