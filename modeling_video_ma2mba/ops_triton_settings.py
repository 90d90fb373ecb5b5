"""How this package's Triton kernels of Mamba-2 are launched. `benchmarks/ssd_kernels.py --sweep` times others."""

from typing import NamedTuple

from .ops_triton_parts import LaunchTable


class Tiles(NamedTuple):
    """One kernel of the scan: tokens of a tile, warps, stages of loading ahead, registers a thread at most (0: as the
    compiler likes)."""

    tile: int
    warps: int
    stages: int
    registers: int = 0

    def options(self, chunk: int) -> dict[str, int]:
        """Of a launch: a tile is no longer than a chunk."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"TILE": min(self.tile, chunk), "num_warps": self.warps, "num_stages": self.stages} | limit


class KernelSettings(NamedTuple):
    """Settings of every kernel.

    Args:
        add_norm, gated_norm: warps forward, warps backward, programs a multiprocessor in backward; stages there.
        conv_forward, conv_backward: tokens of a stretch at most, channels, warps.
        state_passing: numbers of a state that one program takes, warps.
        programs: how many programs the heads are dealt to, at least, where there are heads enough.
    """

    add_norm: tuple[int, int, int, int] = (4, 2, 4, 1)
    gated_norm: tuple[int, int, int] = (4, 16, 1)
    conv_forward: tuple[int, int, int] = (64, 128, 1)
    conv_backward: tuple[int, int, int] = (128, 128, 1)
    scores: Tiles = Tiles(64, 4, 2)
    chunk_state: Tiles = Tiles(64, 4, 3)
    chunk_scan: Tiles = Tiles(64, 4, 1, registers=128)
    dx: Tiles = Tiles(64, 4, 1, registers=128)
    dscores: Tiles = Tiles(64, 4, 1)
    rows_by_states: Tiles = Tiles(64, 4, 3)
    finish: Tiles = Tiles(32, 4, 2)
    state_passing: tuple[int, int] = (512, 4)
    programs: int = 1024


_TABLE = LaunchTable({(9, 0): KernelSettings()}, KernelSettings())
settings_for, force_settings = _TABLE.settings_for, _TABLE.force_settings
