"""What the settings of all trainers here have in common, whichever class of transformers or TRL they extend."""

from __future__ import annotations

from typing import Any

import torch

from .training_clock import ENDLESS


def fit_to_machine(args: Any) -> None:
    """Where to run, and in which precision, unless that is said. Before the class above looks at its settings."""
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args.use_cpu = True  # or processes that torchrun started would not find together
    if args.bf16 is None:
        args.bf16 = not args.fp16 and not args.use_cpu and torch.cuda.is_available()


def fit_batches_to_machine(args: Any) -> None:
    """How batches come to where they are used. After the class above looked at its settings."""
    if not torch.cuda.is_available():
        args.dataloader_pin_memory = False
    # Samples differ in length: batches are never cut up and sent around between processes.
    args.accelerator_config.dispatch_batches = False


def accumulation_steps(args: Any, processes: int, samples: str) -> int:
    """Micro-batches of an optimizer step, so that it has `global_batch_size` samples.

    Args:
        processes: that have batches of their own. samples: what a batch has how many of, such as "videos x 2
            processes", for the message.

    Raises:
        ValueError: they do not come out even.
    """
    steps, rest = divmod(args.global_batch_size, args.per_device_train_batch_size * processes)
    if rest or not steps:
        raise ValueError(
            f"global_batch_size={args.global_batch_size} is no multiple of {args.per_device_train_batch_size} "
            f"{samples}: change one of them"
        )
    return steps


def check_clock(args: Any) -> None:
    """ValueError for negative lengths; a run with `max_seconds` alone is ended by the clock alone."""
    for name in ("max_seconds", "stop_after", "save_seconds"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    if args.max_seconds is not None and args.max_steps <= 0:
        args.max_steps = ENDLESS
