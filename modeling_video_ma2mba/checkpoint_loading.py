"""Refuses checkpoints that would leave a part of the model with random weights.

transformers only warns about tensors that a checkpoint lacks, and old versions of it name the tensors of vision towers
differently: without this check a model with a random tower would answer, fluently and wrongly.
"""

from typing import Any


def refuse_incomplete(name: Any, report: dict[str, Any], accept_other_sizes: bool = False) -> None:
    """Raise unless transformers' loading report says that every parameter came from the checkpoint.

    Args:
        name: directory or Hub id, for the message.
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        accept_other_sizes: the caller asked for `ignore_mismatched_sizes`.

    Raises:
        ValueError: tensors are missing or have other sizes than the configuration says; names the first of them.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"checkpoint {name} lacks {len(missing)} of the model's tensors: {_first(missing)}; it is incomplete, or "
            "was saved for another architecture or by a transformers version older than 5.6"
        )
    other = sorted(report["mismatched_keys"], key=lambda entry: entry[0])
    if other and not accept_other_sizes:
        shapes = [f"{key} is {list(found)} instead of {list(wanted)}" for key, found, wanted in other]
        raise ValueError(f"checkpoint {name} does not fit its config.json: {_first(shapes)}")


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
