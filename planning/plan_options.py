"""What `plan` can be asked for by name, and whether it makes sense; needs neither torch nor transformers."""

from collections.abc import Sequence

PARTS = ("lm", "projector", "vision")
# Bytes of optimizer state per trainable parameter, given the bytes of that parameter.
OPTIMIZERS = {
    "adamw": lambda size: 2 * size,  # two moments in the parameters' type, as torch.optim.AdamW keeps them
    "adamw_8bit": lambda size: 2,
    "adafactor": lambda size: 0.01 * size,  # a row and a column per matrix
    "sgd_momentum": lambda size: size,
    "sgd": lambda size: 0,
    "none": lambda size: 0,
}
# Bytes per parameter and per activation. "mixed" is fp32 weights under bf16 autocast.
DTYPES = {"bfloat16": (2, 2), "float16": (2, 2), "mixed": (4, 2), "float32": (4, 4)}


def require(condition: bool, message: str) -> None:
    """ValueError with the message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_parts(train: Sequence[str]) -> None:
    """ValueError unless all are parts of a model."""
    unknown = [part for part in train if part not in PARTS]
    require(not unknown, f"train names {', '.join(map(repr, unknown))}: use some of {', '.join(PARTS)}")


def check_options(frames: int | None, tokens: int | None, batch: int, fps: float, optimizer: str, dtype: str) -> None:
    """ValueError, naming the argument, unless all are in range and known."""
    require(batch >= 1, f"batch={batch} is not valid: it must be at least 1")
    require(fps > 0, f"fps={fps} is not valid: it must be positive")
    require(optimizer in OPTIMIZERS, f"optimizer={optimizer!r} is unknown: use one of {sorted(OPTIMIZERS)}")
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown: use one of {sorted(DTYPES)}")
    require(frames is None or frames >= 1, f"frames={frames} is not valid: it must be at least 1")
    require(tokens is None or tokens >= 1, f"tokens={tokens} is not valid: it must be at least 1")
