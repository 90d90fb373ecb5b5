"""The paper's sizes of language model, by name; needs nothing."""

PRESETS = {"370m": (1024, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
"""Width and number of layers."""


def check_preset(preset: str, what: str = "there is no preset {!r}") -> None:
    """ValueError unless a preset is known; `what` says it, with the preset's name put in."""
    if preset not in PRESETS:
        raise ValueError(f"{what.format(preset)}: use one of {', '.join(PRESETS)}")


def check_parts(language_model: str | None, vision_tower: str | None, preset: str | None) -> None:
    """ValueError unless there is something to compose a model from."""
    if preset is not None:
        check_preset(preset)
    elif language_model is None or vision_tower is None:
        raise ValueError("name a language model and a vision tower, or a preset that stands in for what is not named")
