"""video-ma2mba: questions answered about videos of any length, in memory that does not grow with the video.

Public names load on first use. `import video_ma2mba` itself imports neither torch nor transformers, but makes sure
that transformers' Auto classes and pipelines know this package's classes once transformers is imported, too.
"""

import importlib
from pathlib import Path

# Read, not imported: the folder it travels in imports transformers.
__version__ = (
    (Path(__file__).parent / "modeling_video_ma2mba" / "state_version.py").read_text(encoding="utf-8").split('"')[-2]
)

BUNDLED_CHECKPOINT = Path(__file__).parent / "bundled"
"""Directory of the small checkpoint that ships with the package (it understands the rendered world only)."""
EXAMPLE_VIDEOS = Path(__file__).parent / "world" / "examples"
"""Directory of four short clips of the rendered world, with `questions.jsonl` (`examples/videos` of a checkout)."""

_MODULE_OF = {
    "Ma2mbaTextConfig": "modeling_video_ma2mba.configuration_video_ma2mba",
    "VideoMa2mbaConfig": "modeling_video_ma2mba.configuration_video_ma2mba",
    "Ma2mbaTextModel": "modeling_video_ma2mba.stack_language_model",
    "VideoMa2mbaModel": "modeling_video_ma2mba.modeling_video_ma2mba",
    "VideoMa2mbaForConditionalGeneration": "modeling_video_ma2mba.modeling_video_ma2mba",
    "VideoQuestionAnsweringPipeline": "modeling_video_ma2mba.pipeline_video_ma2mba",
    "VideoState": "modeling_video_ma2mba.state_video",
    "VideoMa2mbaProcessor": "processing.processing_video_ma2mba",
    "VideoMa2mbaVideoProcessor": "processing.video_processing_video_ma2mba",
    "VideoSession": "streaming.session",
    "convert_checkpoint": "conversion.convert_checkpoint",
    "plan": "planning.plan_report",
    "open_video": "processing.video_reader",
    "VideoMa2mbaGRPOTrainer": "trainer.reward_trainers",
    "VideoMa2mbaRLOOTrainer": "trainer.reward_trainers",
    "VideoMa2mbaTrainer": "trainer.video_trainer",
    "VideoMa2mbaTrainingConfig": "trainer.training_config",
}
# The trainer needs the extra [train], which `from video_ma2mba import *` must not ask for.
__all__ = ["BUNDLED_CHECKPOINT", "EXAMPLE_VIDEOS", "__version__", *sorted(n for n in _MODULE_OF if "Train" not in n)]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "video_ma2mba":  # pytest also runs this file, as a package named like the folder it lies in
    from .auto_classes import register_with_transformers

    register_with_transformers()
