"""Every example on docs/training_data.md is loaded exactly as it stands there, and makes batches."""

import re
import shutil
from pathlib import Path

import pytest

from video_ma2mba.trainer.data import VideoChatCollator, load_training_data
from video_ma2mba.trainer.data.loading import read_rows
from video_ma2mba.trainer.data.row_formats import FORMATS, detect_format

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "training_data.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"<!-- example: (?P<name>[\w.]+), (?P<rows>\d+) rows(?:, (?P<merged>\d+) merged by video)? -->\n"
    r"```\w+\n(?P<text>.*?)```",
    re.S,
)
EXAMPLES = list(EXAMPLE.finditer(PAGE))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["name"])
@pytest.mark.parametrize("labels", ["answers", "captions"])
def test_example(processor, video_folder, tmp_path, example, labels):
    for name in ("a.mp4", "dot.png"):
        shutil.copy(video_folder / name, tmp_path)
    path = tmp_path / example["name"]
    path.write_text(example["text"], encoding="utf-8")
    rows = load_training_data(path)
    assert rows["problem"] == [None] * int(example["rows"])
    streamed = list(load_training_data(path, streaming=True))
    assert streamed == list(rows)
    if example["merged"]:
        assert len(load_training_data(path, merge_by_video=True)) == int(example["merged"])
    collator = VideoChatCollator(processor, labels=labels, on_broken="raise")
    assert len(collator(list(rows))["labels"]) == len(rows)


def test_every_form_has_an_example(tmp_path):
    shown = set()
    for example in EXAMPLES:
        path = tmp_path / example["name"]
        path.write_text(example["text"], encoding="utf-8")
        shown |= {detect_format(list(row), "page").name for _, row in read_rows(str(path))}
    assert shown == {form.name for form in FORMATS} - {"captions of images"}
