"""The day-long stream, cut to minutes: every frame arrives, memory stays, answers about the last minute are right."""

import time

import pytest

from video_ma2mba.streaming.session import VideoSession


class Stocked(VideoSession):
    """Begins to read when as many frames wait as can.

    Frames that wait are read together, and 30 take 100 MB more than one does, which the allocator keeps from then on.
    How many wait otherwise depends on how busy the machine is.
    """

    def attach(self, source, **settings) -> None:
        with self._turn():
            super().attach(source, **settings)
            while self.counters()["frames_waiting"] < self._queue.bound:
                self._raise_error()
                time.sleep(0.01)


@pytest.mark.bundled
def test_some_minutes_of_a_day(benchmark_script, tmp_path, monkeypatch):
    day = benchmark_script("day_long_stream")
    monkeypatch.setattr(day, "VideoSession", Stocked)
    rows = day.measure(day.load_pipeline(device="cpu"), 450, 30, every=75, questions=6, seed=5)
    assert [row["frames"] for row in rows] == [75, 150, 225, 300, 375, 450]
    assert max(row["rss_mb"] for row in rows[2:]) - rows[1]["rss_mb"] < 60
    asked, right, chance = (sum(row[name] for row in rows) for name in ("asked", "right", "by_chance"))
    assert asked >= 30 and right >= 0.85 * asked > 2 * chance
    day.plot(rows, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
