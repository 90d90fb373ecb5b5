"""The day-long stream, cut to minutes: every frame arrives, memory stays, answers about the last minute are right."""

import numpy as np
import pytest

from video_ma2mba.streaming.rolling_memory import RollingMemory


@pytest.mark.bundled
def test_some_minutes_of_a_day(benchmark_script, tmp_path):
    day = benchmark_script("day_long_stream")
    pipe = day.load_pipeline(device="cpu")
    # Frames that wait are read together: 30 at once take 100 MB more than one does, for as long as the process runs.
    # How many wait depends on how busy the machine is, so the most that can is read before memory is looked at.
    frames = np.random.default_rng(0).integers(0, 256, (120, 64, 64, 3), np.uint8)
    RollingMemory(pipe.model, pipe.processor, remember=30).read(frames, np.arange(120.0))
    rows = day.measure(pipe, 450, 30, every=75, questions=6, seed=5)
    assert [row["frames"] for row in rows] == [75, 150, 225, 300, 375, 450]
    assert max(row["rss_mb"] for row in rows[2:]) - rows[1]["rss_mb"] < 60
    asked, right, chance = (sum(row[name] for row in rows) for name in ("asked", "right", "by_chance"))
    assert asked >= 30 and right >= 0.85 * asked > 2 * chance
    day.plot(rows, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
