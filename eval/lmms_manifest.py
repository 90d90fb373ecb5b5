"""What the entry point group `lmms_eval.models` loads: names of our adapters, without torch or a model.

lmms-eval loads all plugins in one `try` block, so a module that fails here would take other packages' models along.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """lmms-eval's manifests: the model, for chat and simple tasks, and the player of recorded answers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="video_ma2mba",
            simple_class_path="video_ma2mba.eval.lmms_adapter.VideoMa2mbaSimple",
            chat_class_path="video_ma2mba.eval.lmms_adapter.VideoMa2mbaChat",
        ),
        ModelManifest(
            model_id="video_ma2mba_replay",
            simple_class_path="video_ma2mba.eval.lmms_replay.ReplaySimple",
            chat_class_path="video_ma2mba.eval.lmms_replay.ReplayChat",
        ),
    ]
