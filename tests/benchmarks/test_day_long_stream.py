"""The day-long stream, cut to minutes: every frame arrives, memory stays, answers about the last minute are right."""

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
import day_long_stream as day
rows = day.measure(day.load_pipeline(device="cpu"), 450, 30, every=75, questions=6, seed=5)
print(json.dumps(rows))
"""
# What is freed goes back to the system at once. Otherwise glibc keeps some of it, for the sizes and threads that came
# before: up to 100 MB more or less, depending on how many frames a busy machine let wait, and so read together.
EXACT_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.bundled
def test_some_minutes_of_a_day(benchmark_script, tmp_path):
    day = benchmark_script("day_long_stream")
    environment = os.environ | EXACT_MEMORY | {"PYTHONPATH": os.path.dirname(day.__file__), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["frames"] for row in rows] == [75, 150, 225, 300, 375, 450]
    assert max(row["rss_mb"] for row in rows[2:]) - rows[1]["rss_mb"] < 20
    asked, right, chance = (sum(row[name] for row in rows) for name in ("asked", "right", "by_chance"))
    assert asked >= 30 and right >= 0.85 * asked > 2 * chance
    day.plot(rows, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
