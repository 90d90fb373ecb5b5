"""The benchmark of VideoMamba's trainings: its clips show what their labels say, and an interrupted table goes on."""

import csv

import numpy as np


def test_labels_are_what_the_frames_show(benchmark_script):
    script = benchmark_script("videomamba_training")
    films = script.Films("motion", "test", 20)
    right = 0
    for index in range(20):
        pixels, label, said, _ = script.draw_clip(films, index)
        changes = np.abs(np.diff(pixels.astype(int), axis=0)).sum(1)  # seven pictures of what moved
        rows, columns = ((changes.sum(axis) * np.arange(32)).sum(1) / changes.sum((1, 2)) for axis in (2, 1))
        along = {"left": -1, "up": -1, "right": 1, "down": 1}
        moved = {"left": columns, "right": columns, "up": rows, "down": rows}
        shift = {name: along[name] * (moved[name][-1] - moved[name][0]) for name in script.DIRECTIONS}
        right += max(shift, key=shift.get) == script.DIRECTIONS[label]
        assert len(said) == 8 and all(words[0] == 0 and len(words) == 11 for words in said)
    assert right >= 17, "all but those in which the other thing comes or goes meanwhile"

    counts = script.Films("count", "train", 3, seconds=32, frames=32)
    for index in range(3):
        pixels, label, _, shown = script.draw_clip(counts, index)
        assert pixels.shape == (32, 3, 32, 32) and shown and 0 <= label < 4
        assert label == len(script.world_of(counts, index).things) - 1
    few = script.Films("count", "train", 8, seconds=32, frames=2)
    assert not all(script.draw_clip(few, index)[3] for index in range(8)), "two of 32 seconds miss something"


def test_a_table_that_was_cut_short_goes_on(benchmark_script, tmp_path):
    script = benchmark_script("videomamba_training")
    table = tmp_path / "rows.csv"
    for part, arm, stages in (
        *(("scan", "alternating", ["training", "complete"]), ("scan", "temporal_first", ["training"])),
        *(("cost", "0.50 hidden", ["step"]), ("cost", "all", ["complete"]), ("waiting", "1 processes", ["step"])),
    ):
        rows = [{"part": part, "arm": arm, "seed": 1, "stage": stage} for stage in stages]
        script.append_rows(table, rows, script.FIELDS)
    assert script.finished(table) == {script.Run("scan", "alternating", 1), script.Run("cost", "all", 1)}
    with table.open(newline="") as file:
        left = [(row["part"], row["arm"]) for row in csv.DictReader(file)]
    assert left == [("cost", "0.50 hidden"), ("cost", "all"), *[("scan", "alternating")] * 2]
