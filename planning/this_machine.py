"""What the machine has that `plan` runs on; needs no torch but to measure."""

import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

from ..modeling_video_ma2mba.cost_time import HostPace, measure_host
from ..modeling_video_ma2mba.state_writing import write_whole


def gpu_here() -> tuple[str, int] | None:
    """Name and bytes of the first GPU that this process may use, as NVIDIA's driver tells; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None or visible in ("", "-1"):
        return None
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        name, mebibytes = told.splitlines()[0].rsplit(",", 1)
        return name.strip(), int(mebibytes) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def host_memory_here() -> int | None:
    """Bytes of memory installed; None where nobody tells."""
    try:
        import psutil  # comes with accelerate

        return int(psutil.virtual_memory().total)
    except ImportError:
        return None


def pace_here() -> HostPace:
    """What this machine needs to launch an operation on its GPU, measured for a second and remembered, and the part of
    its core that this process gets now.

    Raises:
        ValueError: it has no CUDA GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("launch_us=here: this machine has no CUDA GPU to measure with; give a number of microseconds")
    pace = measure_host()
    with contextlib.suppress(OSError):  # what cannot be remembered is measured again
        file = _launches_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        found = _launches() | {platform.node(): [pace.launch, datetime.date.today().isoformat()]}
        write_whole(file, json.dumps(found))
    return pace


def known_launch() -> tuple[float, str] | None:
    """What a launch took when `pace_here` last measured on this machine, and the day; None where it never did, or
    where there is no GPU any more."""
    if gpu_here() is None:
        return None
    launch, day = _launches().get(platform.node(), (None, ""))
    return (launch, day) if isinstance(launch, float) and 1e-7 <= launch <= 1e-4 else None


def _launches_file() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "video_ma2mba" / "launches.json"


def _launches() -> dict[str, list]:
    try:
        return dict(json.loads(_launches_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
