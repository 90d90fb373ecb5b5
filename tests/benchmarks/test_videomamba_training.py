"""The benchmark of VideoMamba's trainings: its clips show what their labels say, and an interrupted table goes on."""

import csv
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def test_labels_are_what_the_frames_show(benchmark_script, tmp_path):
    script = benchmark_script("videomamba_training")
    films = script.Films("motion", "test", 20)
    right = 0
    for index in range(20):
        pixels, label, said = script.draw_clip(films, index)
        changes = np.abs(np.diff(pixels.astype(int), axis=0)).sum(1)  # seven pictures of what moved
        rows, columns = ((changes.sum(axis) * np.arange(32)).sum(1) / changes.sum((1, 2)) for axis in (2, 1))
        along = {"left": -1, "up": -1, "right": 1, "down": 1}
        moved = {"left": columns, "right": columns, "up": rows, "down": rows}
        shift = {name: along[name] * (moved[name][-1] - moved[name][0]) for name in script.DIRECTIONS}
        right += max(shift, key=shift.get) == script.DIRECTIONS[label]
        assert len(said) == 8 and all(words[0] == 0 and len(words) == 11 for words in said)
    assert right >= 17, "all but those in which the other thing comes or goes meanwhile"

    counts = script.Films("count", "test", 8, seconds=32)
    with ThreadPoolExecutor(1) as workers:
        script.render(counts, tmp_path, workers)
    for frames in (32, 4, 2):
        clips = script.Clips(counts, tmp_path, frames=frames)
        whole = 0
        for index in range(8):
            world, item = script.world_of(counts, index), clips[index]
            assert item["pixel_values"].shape == (1, frames, 3, 32, 32)
            assert item["labels"] == len(world.things) - 1
            seconds = range(32)[32 // frames // 2 :: 32 // frames]
            whole += all(any(thing.start <= second < thing.end for second in seconds) for thing in world.things)
        assert clips.shown() == whole / 8 and (frames < 32 or whole == 8)


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
