"""How this package's Triton kernels of Mamba-2 are launched. `benchmarks/ssd_kernels.py --sweep` times others."""

from dataclasses import dataclass

from .ops_triton_parts import LaunchTable


@dataclass(frozen=True)
class KernelSettings:
    """Warps, and stages of loading ahead where two numbers stand; tokens of a tile first where three stand.

    Args:
        add_norm, gated_norm: warps forward, warps backward, programs a multiprocessor and stages in backward.
        conv_forward, conv_backward: tokens of a stretch, channels, warps.
        scores, chunk_state, chunk_scan, dx, dscores, rows_by_states, finish: tile, warps, stages.
        state_passing: numbers of a state that one program takes, warps.
        programs: how many programs the sums over heads are dealt to, at least, where there are heads enough.
    """

    add_norm: tuple[int, int, int, int] = (4, 2, 4, 1)
    gated_norm: tuple[int, int, int, int] = (4, 16, 1, 1)
    conv_forward: tuple[int, int, int] = (16, 128, 1)
    conv_backward: tuple[int, int, int] = (128, 64, 1)
    scores: tuple[int, int, int] = (64, 4, 2)
    chunk_state: tuple[int, int, int] = (64, 4, 3)
    chunk_scan: tuple[int, int, int] = (64, 4, 2)
    dx: tuple[int, int, int] = (64, 4, 1)
    dscores: tuple[int, int, int] = (64, 4, 1)
    rows_by_states: tuple[int, int, int] = (64, 4, 3)
    finish: tuple[int, int, int] = (32, 4, 2)
    state_passing: tuple[int, int] = (512, 4)
    programs: int = 1024


_TABLE = LaunchTable({(9, 0): KernelSettings()}, KernelSettings())
settings_for, force_settings = _TABLE.settings_for, _TABLE.force_settings
