"""What `plan` can be asked for by name, and whether it makes sense; needs neither torch nor transformers."""

from collections.abc import Sequence

from ..modeling_video_ma2mba.recompute_plan import parse_bytes
from .adapters import Adapters
from .this_machine import gpu_here, host_memory_here

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


_ASSUMED_GPU, _ASSUMED_HOST = 80 * 10**9, 128 * 10**9


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


def chosen_memory(
    gpu_memory: int | float | str | None, host_memory: int | float | str | None
) -> tuple[int, str, int, str]:
    """Bytes of the GPU and where the number comes from, and the same of the host.

    Args:
        gpu_memory, host_memory: bytes, or a text with a unit; None is what this machine has, or what is assumed.

    Raises:
        ValueError: no size; a number that can only be meant as gigabytes.
    """
    for name, value in (("gpu_memory", gpu_memory), ("host_memory", host_memory)):
        if isinstance(value, int | float) and 0 < value < 1 << 20:
            raise ValueError(f"{name}={value} is a number of bytes: write '{value}GB', or '{value}GiB'")
    here = gpu_here() if gpu_memory is None else None
    gpu_bytes, gpu = parse_bytes(gpu_memory, "gpu_memory"), "as asked"
    if gpu_bytes is None:
        gpu_bytes, gpu = (here[1], f"this machine's {here[0]}") if here else (_ASSUMED_GPU, "assumed: no GPU here")
    host_bytes, host = parse_bytes(host_memory, "host_memory"), "as asked"
    if host_bytes is None:
        installed = host_memory_here() if here else None
        host_bytes, host = (installed, "this machine's") if installed else (_ASSUMED_HOST, "assumed")
    return gpu_bytes, gpu, host_bytes, host


def chosen_adapters(rank: int | None, vision: bool, four_bit: bool, train: Sequence[str] | None) -> Adapters | None:
    """The adapters that train; None without a rank.

    Raises:
        ValueError: parts of them are asked for without a rank; a rank below 1; `train` beside them.
    """
    if rank is None:
        require(not vision and not four_bit, "lora_vision and four_bit are about adapters: give lora_rank, too")
        return None
    require(rank >= 1, f"lora_rank={rank} is not valid: it must be at least 1")
    require(train is None, "with adapters the projector trains, and nothing else: leave train away")
    return Adapters(rank, vision, four_bit)


def gigabytes(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.1f} GB"
