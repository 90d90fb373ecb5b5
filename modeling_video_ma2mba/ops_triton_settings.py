"""How this package's Triton kernels of Mamba-2 are launched: fixed settings by GPU, so that nothing is tuned when a
model runs. `benchmarks/ssd_kernels.py --sweep` times others; the table holds the fastest of what was measured.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KernelSettings:
    """Warps, and stages of loading ahead where two numbers stand; tokens of a tile first where three stand.

    Args:
        add_norm, gated_norm: warps forward, warps backward, programs a multiprocessor in backward.
        conv_forward, conv_backward: tokens of a stretch, channels, warps.
        scores, chunk_state, chunk_scan, dx, dscores, rows_by_states, finish: tile, warps, stages.
        state_passing: numbers of a state that one program takes, warps.
        programs: how many programs the sums over heads are dealt to, at least, where there are heads enough.
    """

    add_norm: tuple[int, int, int] = (4, 4, 4)
    gated_norm: tuple[int, int, int] = (8, 8, 2)
    conv_forward: tuple[int, int, int] = (64, 128, 1)
    conv_backward: tuple[int, int, int] = (128, 128, 1)
    scores: tuple[int, int, int] = (64, 4, 2)
    chunk_state: tuple[int, int, int] = (64, 4, 3)
    chunk_scan: tuple[int, int, int] = (64, 4, 3)
    dx: tuple[int, int, int] = (64, 4, 2)
    dscores: tuple[int, int, int] = (64, 4, 2)
    rows_by_states: tuple[int, int, int] = (64, 8, 2)
    finish: tuple[int, int, int] = (64, 4, 2)
    state_passing: tuple[int, int] = (512, 4)
    programs: int = 2048


_TABLE = {(9, 0): KernelSettings()}
_forced: KernelSettings | None = None


def settings_for(device: torch.device) -> KernelSettings:
    """Settings of the table for this GPU; cards that were not measured take those of the one that was."""
    if _forced is not None:
        return _forced
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return _TABLE.get(capability, KernelSettings())


def force_settings(settings: KernelSettings | None) -> None:
    """Launch with these settings from now on; None goes back to the table. For tests and the sweep."""
    global _forced
    _forced = settings
