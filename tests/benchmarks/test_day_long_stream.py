"""The day-long stream, cut to minutes: every frame arrives, memory stays, answers about the last minute are right."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "day_long_stream.py"


@pytest.mark.bundled
def test_some_minutes_of_a_day(tmp_path):
    spec = importlib.util.spec_from_file_location("day_long_stream", PATH)
    day = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(day)
    rows = day.measure(day.load_pipeline(device="cpu"), 450, 30, every=75, questions=6, seed=5)
    assert [row["frames"] for row in rows] == [75, 150, 225, 300, 375, 450]
    assert max(row["rss_mb"] for row in rows[2:]) - rows[1]["rss_mb"] < 150  # the allocator under load
    asked, right, chance = (sum(row[name] for row in rows) for name in ("asked", "right", "by_chance"))
    assert asked >= 30 and right >= 0.85 * asked > 2 * chance
    day.plot(rows, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
