"""SceneWalk's rows: clips of long videos, each with a caption. The data set names videos and does not hold them.

Two releases are understood. In the first (IVLLab/SceneWalk) a row is a clip: `id`, `url`, `time_stamp` and
`conversations`; clips of a video become one sample. In the later ones a row is a video: `id`, `video`, `total_time`,
`clip_num`, `scenes`, `conversations`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlparse

from .row_text import find_video, locate, media_part, seconds, take_marks, text_part


def clip_turn(video: Any, start: float | None, end: float | None, caption: str) -> list[dict[str, Any]]:
    """A clip and its caption, as a user who shows the clip and an assistant who describes it."""
    return [
        {"role": "user", "content": [media_part("video", video, start, end)]},
        {"role": "assistant", "content": [text_part(caption)]},
    ]


def scenewalk_clip(row: dict[str, Any], base_dir: str | None) -> list[dict[str, Any]]:
    """One row of the first release; the video is looked for in `base_dir` under its YouTube id, then the row's id."""
    stamp = row["time_stamp"]
    names = [name for name in (youtube_id(row["url"]), str(row.get("id") or "")) if name]
    start, end = (_moment(stamp, edge) for edge in ("start", "end"))
    return clip_turn(find_video(names, base_dir), start, end, _captions(row)[0])


def scenewalk_video(row: dict[str, Any], base_dir: str | None) -> list[dict[str, Any]]:
    """One row of a later release. `scenes` are [start, end] or {"start", "end"} (also start_time, end_time)."""
    captions, scenes = _captions(row), [_window(scene) for scene in row["scenes"]]
    video = locate(row["video"], base_dir)
    if len(captions) != len(scenes):
        if len(captions) == 1:  # one text about the whole video
            return clip_turn(video, None, None, captions[0])
        raise ValueError(f"there are {len(captions)} captions for {len(scenes)} scenes")
    return [m for window, caption in zip(scenes, captions, strict=True) for m in clip_turn(video, *window, caption)]


def youtube_id(url: str) -> str:
    """The id in a YouTube address, or the last part of any other."""
    parsed = urlparse(url)
    return (parse_qs(parsed.query).get("v") or [parsed.path.rstrip("/").rpartition("/")[2]])[0]


def _captions(row: dict[str, Any]) -> list[str]:
    captions = [take_marks(turn["value"])[0] for turn in row["conversations"] if turn["from"] in ("gpt", "assistant")]
    if not captions:
        raise ValueError("the conversations hold no caption (from gpt)")
    return captions


def _moment(stamp: dict[str, Any], edge: str) -> float | None:
    """Seconds of a clip's start or end; from its frame number where there is no time."""
    found = seconds(stamp.get(f"{edge}_time"), f"{edge}_time")
    if found is None and stamp.get(f"{edge}_fps"):
        found = stamp[f"{edge}_frame"] / stamp[f"{edge}_fps"]
    return found


def _window(scene: Any) -> tuple[float | None, float | None]:
    if isinstance(scene, dict):
        found = [
            next((scene[key] for key in (edge, f"{edge}_time") if key in scene), None) for edge in ("start", "end")
        ]
    else:
        found = list(scene)
    if len(found) != 2 or None in found:
        raise ValueError(f"a scene must say when it starts and ends, not {scene!r:.100}")
    return seconds(found[0], "start"), seconds(found[1], "end")
