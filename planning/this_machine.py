"""What the machine has that `plan` runs on; needs no torch but to measure."""

import os
import shutil
import subprocess


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


def launch_here() -> float:
    """Seconds that this machine needs to launch an operation on its GPU, measured.

    Raises:
        ValueError: it has no CUDA GPU.
    """
    import torch

    from ..modeling_video_ma2mba.cost_time import measure_launch

    if not torch.cuda.is_available():
        raise ValueError("launch_us=here: this machine has no CUDA GPU to measure with; give a number of microseconds")
    return measure_launch()
