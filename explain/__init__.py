"""Where to look: which seconds of a video an answer rests on, as numbers, as a picture, and checked by leaving out."""

from .occlusion import occlusion
from .relevance import Relevance, relevance
from .time_check import TimeCheck, check_time

__all__ = ["Relevance", "TimeCheck", "check_time", "occlusion", "relevance"]
