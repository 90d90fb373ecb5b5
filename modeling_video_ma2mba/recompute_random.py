"""The random numbers of a first run, drawn again in its recomputation: dropout must leave out the same values."""

import contextlib
from collections.abc import Iterator

import torch


class RandomState:
    """The state of the generators now: the CPU's, and those of other devices (CUDA, MPS, ...), each named once."""

    def __init__(self, *devices: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        others = (device for device in devices if device.type not in ("cpu", "meta"))
        self.others = {device: torch.get_device_module(device).get_rng_state(device) for device in others}

    def put_back(self) -> None:
        """Have all of them go on from here."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def random_state_kept(*devices: torch.device) -> Iterator[None]:
    """Whatever is drawn inside: afterwards the generators go on as if nothing had been."""
    before = RandomState(*devices)
    try:
        yield
    finally:
        before.put_back()
