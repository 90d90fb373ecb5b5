"""The time of parts of a step and of whole steps, predicted and measured on hosts of different speed."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def host(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("host_speed")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (BENCHMARKS / "results" / "host_speed.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_whole_steps_are_predicted_within_fifteen_percent(host: ModuleType, rows: list[dict[str, str]]):
    whole = [
        (float(row["seconds"]), host.predicted(row)) for row in rows if (row["part"], row["host"]) == ("whole", "own")
    ]
    for measured, predicted in [*whole, host.two_hours()]:
        assert abs(predicted / measured - 1) < 0.15
    assert whole


def test_published_table_is_the_current_prediction(host: ModuleType, rows: list[dict[str, str]]):
    table = host.comparison(rows).strip()
    assert table == (BENCHMARKS / "results" / "host_accuracy.md").read_text(encoding="utf-8").strip()
    assert table in (BENCHMARKS.parent / "docs" / "ma_gc.md").read_text(encoding="utf-8")


def test_the_constants_are_those_that_fit(host: ModuleType, rows: list[dict[str, str]]):
    found = host.fit(rows)
    for name in ("launch", "tower_launch_forward", "tower_launch_backward", "tower"):
        assert getattr(found, name) == pytest.approx(getattr(host.H200, name), rel=0.02)
