"""The small rendered world: videos, questions and answers, made from a seed. Needs NumPy; PyAV to write files."""

from .dataset import WorldDataset, WorldSample, chat, parse_frames
from .questions import FORMS, KINDS, Question, ask, check_kinds
from .render import WorldRenderer, render
from .world import SPLITS, World, WorldSettings, build_world, split_of, video_seed

__all__ = [
    "FORMS",
    "KINDS",
    "SPLITS",
    "Question",
    "World",
    "WorldDataset",
    "WorldRenderer",
    "WorldSample",
    "WorldSettings",
    "ask",
    "build_world",
    "chat",
    "check_kinds",
    "parse_frames",
    "render",
    "split_of",
    "video_seed",
]
