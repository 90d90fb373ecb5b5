"""Tables of measurements: CSV files that the scripts beside this one write, and what the machine is called in them.

Scripts import it as a sibling (`python benchmarks/NAME.py` puts this folder first on the path).
"""

import csv
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def hardware(device: Any = "cpu") -> str:
    """`NVIDIA H200`, or `x86_64 CPU, 2 cores` with the cores that this process may use."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {usable} cores"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], fields: Sequence[str] | None = None) -> None:
    """Write a table, in the place of one that may be there.

    Args:
        fields: columns; default: those of the first row. Rows may lack some; what no column is for is an error.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def row_writer(path: Path, fields: Sequence[str], **about: Any) -> Callable[[Mapping[str, Any]], None]:
    """Begin a table anew; what is returned prints a row and adds it, so that a run cut short keeps what it measured.

    Args:
        about: columns that are the same in all rows.
    """
    write_rows(path, [], fields)

    def write(row: Mapping[str, Any]) -> None:
        print(dict(row), flush=True)
        append_rows(path, [{**about, **row}], fields)

    return write


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], fields: Sequence[str] | None = None) -> None:
    """Add rows to a table, which is begun if there is none. With `fields`, other columns of the rows are left out.

    Raises:
        ValueError: the table that is there has other columns.
    """
    rows = list(rows)
    fields = list(fields or rows[0])
    if not path.exists():
        write_rows(path, [], fields)
    with path.open("r+", encoding="utf-8", newline="") as file:
        there = next(csv.reader(file), [])
        if there != fields:
            raise ValueError(f"{path} has the columns {there}, not {fields}: name another file with --out")
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, fields, extrasaction="ignore").writerows(rows)
