"""Captions scored by a judge for correctness, detail and context."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")

from fake_judge import fake_judge

from video_ma2mba.cli.main import app
from video_ma2mba.eval.captions import DIMENSIONS, REQUEST, judge_request, read_captions
from video_ma2mba.eval.lmms_tasks.caption_score import utils
from video_ma2mba.world.video_files import write_video

SAID = "A red star moves left. Then nothing."


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    draw = np.random.default_rng(0)
    for name in "ab":
        write_video(folder / f"{name}.mp4", [draw.integers(0, 255, (3, 16, 16, 3), np.uint8)])
    table = [{"video": "a.mp4", "caption": SAID}, {"video": "b.mp4", "answer": "A cat.", "question": "Describe it."}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder / "captions.jsonl"


def evaluate(*arguments: object):
    return CliRunner().invoke(app, ["eval", "--tasks", "caption_score", *map(str, arguments), "--device", "cpu"])


def scores(out: Path) -> dict[str, float]:
    report = json.loads((out / "report.json").read_text())
    return {row["category"]: row["value"] for row in report["benchmarks"]["caption_score"]["rows"]}


def test_captions_are_scored_by_a_judge(
    rows: Path, tiny_checkpoint: Path, tmp_path: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    asked = script({"Describe": SAID})
    given = ("--model", tiny_checkpoint, "--captions", rows)
    with fake_judge() as server:
        done = evaluate(*given, "--out", tmp_path / "out", "--judge", server.url, "--judge-model", "fake")
    assert done.exit_code == 0, done.output + str(done.exception)
    assert [REQUEST in one.text for one in asked] == [True, False] and "Describe it." in asked[1].text
    assert scores(tmp_path / "out") == {"correctness": 3.5, "detail": 2.5, "context": 1.5, "all": 2.5}
    assert len(server.asked) == 7  # three for each video, and whether it is fit

    # A language model of a folder, loaded here, which is asked the same; answers are known already.
    heard: list[str] = []
    monkeypatch.setattr(
        "video_ma2mba.trainer.data.long_models.text_generator",
        lambda *_: lambda request, most: heard.append(request) or "{'pred': 'yes', 'score': 4}",
    )
    done = evaluate(*given, "--out", tmp_path / "out", "--judge", tiny_checkpoint)
    assert done.exit_code == 0, done.output + str(done.exception)
    assert len(heard) == 7 and len(asked) == 2 and set(scores(tmp_path / "out").values()) == {4.0}
    assert f"Correct Answer: {SAID}" in heard[1] and "You judge descriptions of videos" in heard[1]


def test_the_rendered_world_is_captioned_without_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("VIDEO_MA2MBA_CAPTIONS", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = utils.documents([{"frames": 8, "videos": 2, "seed": 1}])
    assert len(found) == 2 and all(row["question"] and row["caption"] for row in found)
    (video,) = utils.doc_to_visual(found[1])
    assert Path(video).stat().st_size > 500 and utils.doc_to_visual(found[0]) != [video]


def test_files_of_any_form_and_what_is_wrong_with_them(rows: Path, tmp_path: Path):
    table = rows.with_name("captions.csv")
    table.write_text("video,caption\na.mp4,One\n")
    assert read_captions(table) == [{"video": str(rows.with_name("a.mp4")), "question": REQUEST, "caption": "One"}]
    rows.with_name("list.json").write_text(json.dumps([{"video": "http://h/v.mp4", "summary": "Two"}]))
    assert read_captions(rows.with_name("list.json"))[0]["video"] == "http://h/v.mp4"
    for text, words in (
        ('{"video": "a.mp4"}\n', "row 1: a row needs a video, and a caption"),
        ('{"video": "none.mp4", "caption": "x"}\n', "none.mp4: no such video"),
        ("[1]\n", "row 1: it is no object"),
        ("", "has no rows"),
    ):
        rows.with_name("bad.jsonl").write_text(text)
        with pytest.raises((ValueError, OSError), match=words):
            read_captions(rows.with_name("bad.jsonl"))
    done = evaluate("--captions", "none.jsonl", "--out", tmp_path / "out", "--no-judge")
    assert done.exit_code == 2 and "--captions none.jsonl: no such file" in done.output
    done = CliRunner().invoke(
        app, ["eval", "--tasks", "mvbench", "--captions", str(rows), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 2 and "--captions is for the task caption_score" in done.output
    requests = [judge_request({"question": "q", "caption": "c"}, " said ", name)[1]["content"] for name in DIMENSIONS]
    assert len(set(requests)) == 3 and all("Predicted Answer: said\n" in text for text in requests)
