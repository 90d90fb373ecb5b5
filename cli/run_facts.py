"""Facts about a run for its report: the command, versions, device, date."""

import shlex
from typing import Any

from .errors import masked


def command_line(verb: str, given: dict[str, Any]) -> str:
    """The command with those options that have a value, without secrets; True is a flag, False leaves it out."""
    words: list[str] = []
    for option, value in given.items():
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, str(value)]
    return masked(shlex.join(["video-ma2mba", verb, *words]))


def require_matplotlib(what: str) -> None:
    """Before hours of measuring rather than behind them."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError(f"{what} needs matplotlib: pip install 'video-ma2mba[plot]'", name="matplotlib")


def run_facts(model: Any) -> dict[str, str]:
    """Date, device, data type and versions, as a report says them."""
    import datetime

    import torch
    import transformers

    from video_ma2mba import __version__

    kind = model.device.type
    name = (
        torch.cuda.get_device_name(model.device)
        if kind == "cuda"
        else f"CPU (PyTorch threads: {torch.get_num_threads()})"
    )
    versions = f"video-ma2mba {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions,
    }
