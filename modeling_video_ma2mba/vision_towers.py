"""The kinds of vision towers: a new one is a file with an adapter, and a line here."""

from typing import Any

from .vision_adapter import TowerAdapter
from .vision_clip import ClipAdapter
from .vision_siglip import SiglipAdapter
from .vision_videomamba import VideoMambaAdapter

TOWERS: dict[str, TowerAdapter[Any]] = {
    adapter.model_type: adapter for adapter in (ClipAdapter(), SiglipAdapter(), VideoMambaAdapter())
}


def tower_adapter(vision_config: Any) -> TowerAdapter[Any]:
    """The adapter for a vision configuration, or for its `model_type`.

    Raises:
        ValueError: there is none; the known kinds are named.
    """
    kind = vision_config if isinstance(vision_config, str) else vision_config.model_type
    if kind not in TOWERS:
        raise ValueError(f"vision_config.model_type={kind!r} is not valid: use one of {', '.join(TOWERS)}")
    return TOWERS[kind]
