"""The former place of `video_ma2mba.loading`, for programs that import it from here."""

from video_ma2mba.loading import load_classifier, load_pipeline, pick_device, pick_dtype, resolve_model

__all__ = ["load_classifier", "load_pipeline", "pick_device", "pick_dtype", "resolve_model"]
