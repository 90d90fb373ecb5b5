"""Recorded answers with known correctness, through the harness's unmodified tasks, to the tables of the paper."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")

from benchmark_fixtures import MVBENCH_FOLDERS
from fake_judge import by_rule, fake_judge

from video_ma2mba.cli.main import app
from video_ma2mba.eval.benchmark_report import PAPER_NUMBERS


def recorded() -> list[dict]:
    """Answers to every question of the local benchmarks; which are wrong, the comments say."""
    answers = {("videomme", number): "ABCD"[(number // 3 + number % 3) % 4] for number in range(9)}
    answers["videomme", 8] = "C"  # a long video's; A is right
    answers |= {("longvideobench_val_v", number): f"{'ABC'[number]}." for number in range(3)}
    answers["longvideobench_val_v", 3] = "I do not know."  # names none of A to E: the harness would draw one
    for task in MVBENCH_FOLDERS:
        answers |= {(f"mvbench_{task}", number): f"({'AB'[number]})" for number in range(2)}
    answers["mvbench_action_count", 1] = "A"  # wrong
    answers["mvbench_moving_count", 1] = ""  # empty: the harness would leave it out
    answers |= {("activitynetqa", number): text for number, text in enumerate(("yes", "no", "two", "blue"))}  # red
    answers |= {("videochatgpt_gen", number): f"Generic answer {number}" for number in range(2)}
    answers["videochatgpt_gen", 2] = "Something else"  # wrong
    answers |= {("videochatgpt_temporal", number): f"Temporal answer {number}" for number in range(3)}
    answers |= {("videochatgpt_consistency", number): f"Consistency answer {number // 2}" for number in range(6)}
    answers["videochatgpt_consistency", 1] = answers["videochatgpt_consistency", 2] = "No idea"  # two of three pairs
    return [{"task": task, "doc_id": number, "answer": text} for (task, number), text in answers.items()]


EXPECTED = {
    "videomme": {"short": 100, "medium": 100, "long": 200 / 3, "all": 800 / 9},
    "longvideobench_val_v": {"8-15 s": 100, "15-60 s": 100, "180-600 s": 100, "900-3600 s": 0, "all": 75},
    "mvbench": {task: 100 for task in MVBENCH_FOLDERS} | {"action_count": 50, "moving_count": 50, "all": 95},
    "activitynetqa": {"accuracy": 75, "score": (5 + 5 + 5 + 1) / 4},
    # The judge's numbers for right and wrong: correctness 5/2, detail 4/1, context 3/0, others 5/1.
    "videochatgpt": {
        "correctness": (5 + 5 + 2) / 3,
        "detail": (4 + 4 + 1) / 3,
        "context": (3 + 3 + 0) / 3,
        "temporal": 5,
        "consistency": (5 + 1 + 1) / 3,
        "all": (4 + 3 + 2 + 5 + 7 / 3) / 5,
    },
}


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in recorded()))
    return path


def run(*arguments) -> object:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def table(out: Path, name: str) -> dict[str, float]:
    return {row["category"]: row["value"] for row in json.loads((out / "scores" / f"{name}.json").read_text())["rows"]}


def test_the_papers_tables(in_bench: Path, answers: Path, tmp_path: Path):
    out = tmp_path / "out"
    with fake_judge() as judge:
        result = run("--tasks", "paper", "--replay", answers, "--judge", judge.url, "--data", in_bench, "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    for name, expected in EXPECTED.items():
        assert table(out, name) == pytest.approx(expected), name
        found = report["benchmarks"][name]
        assert {row["category"]: row["value"] for row in found["rows"]} == pytest.approx(expected)
        assert {category: tuple(values) for category, values in found["paper"].items()} == PAPER_NUMBERS[name]
    # Where nothing is drawn or left out, the harness says the same.
    harness = {name: found["harness"] for name, found in report["benchmarks"].items()}
    assert harness["videomme"]["videomme/videomme_perception_score,none"] == pytest.approx(800 / 9)
    assert harness["mvbench"]["mvbench_moving_count/mvbench_accuracy,none"] == 100
    assert harness["activitynetqa"]["activitynetqa/gpt_eval_score,none"] == 4
    assert len(judge.asked) == 1 + 4 + 3 * 3 + 3 + 3  # the first is the test before the run

    page = (out / "report.md").read_text()
    assert f"--tasks paper --judge {judge.url}" in page
    for line in (
        "| long | 66.7 | 3 | 26.8 | 31.9 | 35.4 |",
        "| all | **88.9** | 9 | 33.1 | 40.3 | 45.2 |",
        "| 900-3600 s | 0.0 | 1 | 28.5 | 34.1 | 38.5 |",
        "| moving_count | 50.0 | 2 |  |  |  |",
        "| all | **95.0** | 40 | 41.1 | 44.4 | 48.3 |",
        "| accuracy | **75.0** | 4 | 43.8 | 50.0 | 51.7 |",
        "| score | 4.00 | 4 | 3.2 | 3.1 | 3.4 |",
        "| consistency | 2.33 | 3 |  |  |  |",
        "| all | **3.27** | 15 | 2.69 | 2.76 | 3.03 |",
    ):
        assert line in page, line
    assert "Answers that name no option and count as wrong: 1 (lmms-eval draws an option for them)." in page
    assert "Empty answers, which count as wrong: 1." in page
    assert (out / "chart.png").stat().st_size > 20_000
    _check_model_index(out / "model_index.yaml")


def _check_model_index(path: Path) -> None:
    """The Hub's own reader finds every number in it."""
    import yaml
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    data = ModelCardData(**yaml.safe_load(path.read_text(encoding="utf-8")))
    _, entries = model_index_to_eval_results(yaml.safe_load(path.read_text(encoding="utf-8"))["model-index"])
    assert data.eval_results is not None and len(entries) == sum(map(len, EXPECTED.values()))
    found = {(entry.dataset_type, entry.dataset_config): (entry.metric_type, entry.metric_value) for entry in entries}
    assert found["lmms-eval/Video-MME", "all"] == ("accuracy", 88.8889)
    assert found["lmms-eval/ActivityNetQA", "score"] == ("score", 4.0)
    assert "judge gpt-3.5-turbo-0125" in next(
        e.metric_name for e in entries if e.dataset_type == "lmms-eval/VideoChatGPT"
    )


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        ("1 fps", "| all | **50.0** | 2 | 33.1 | 40.3 | 45.2 |"),
        ("8 frames", "| all | **50.0** | 2 | 41.6 |"),
        ("16 frames", "| all | **50.0** | 2 | 43.7 |"),
        ("32 frames", "| all | **50.0** | 2 | 44.6 |"),
        ("64 frames", "| all | **50.0** | 2 | 33.1 | 40.3 | 45.2 |"),
    ],
)
def test_the_papers_numbers_for_as_many_frames(frames: str, line: str, tmp_path: Path):
    """Table 4's where there are any; else those at 1 fps, and the page says so."""
    from video_ma2mba.eval.benchmark_report import write_report
    from video_ma2mba.eval.benchmark_scores import Score, Scores

    about = {name: "x" for name in ("command", "model", "judge", "date", "device", "dtype", "versions")}
    scores = {"videomme": Scores([Score("short", 0, 1), Score("all", 50, 2)])}
    write_report(tmp_path, scores, {"videomme": {"questions": 2}}, {**about, "frames": frames, "limit": None})
    page = (tmp_path / "report.md").read_text()
    assert line in page
    assert ("The paper read 1 frame a second." in page) == (frames == "64 frames")


def test_a_judge_that_dies_costs_nothing(in_bench: Path, answers: Path, tmp_path: Path, monkeypatch):
    """What it said is kept, as are the scores before; the next run asks only for the rest."""
    monkeypatch.setattr("video_ma2mba.eval.judge.Judge.__init__.__defaults__", ("", None, 2, 5.0, 0.01))
    out = tmp_path / "out"
    given = ["--tasks", "videomme,activitynetqa", "--replay", answers, "--data", in_bench, "--out", out]
    with fake_judge(lambda system, text, number: by_rule(system, text) if number <= 3 else "I am tired.") as judge:
        result = run(*given, "--judge", judge.url)
        assert result.exit_code == 2
        assert "error: the judge gpt-3.5-turbo-0125" in result.stderr and "I am tired." in result.stderr
        assert "3 replies of the judge are kept: run the same command again" in result.stderr
        assert table(out, "videomme") == pytest.approx(EXPECTED["videomme"])
        assert not (out / "scores/activitynetqa.json").exists()
        page = (out / "report.md").read_text()
        assert "| all | **88.9** | 9 |" in page and "Answered, but not scored yet" in page
    with fake_judge() as judge:
        result = run(*given, "--judge", judge.url)
        assert result.exit_code == 0, result.output
        assert len(judge.asked) == 2  # of four questions and the test, three were answered before
    assert table(out, "activitynetqa") == pytest.approx(EXPECTED["activitynetqa"])


def test_without_a_judge_answers_are_collected_only(in_bench: Path, answers: Path, tmp_path: Path):
    out = tmp_path / "out"
    given = ["--tasks", "activitynetqa", "--replay", answers, "--data", in_bench, "--out", out]
    result = run(*given)
    assert result.exit_code == 2 and "--judge" in result.stderr and "--no-judge" in result.stderr
    result = run(*given, "--no-judge")
    assert result.exit_code == 0, result.output
    assert "not scored yet" in (out / "report.md").read_text()
    assert (out / "model_index.yaml").read_text() == ""


def test_newer_tasks_of_long_videos(in_bench: Path, tmp_path: Path):
    """Right are A, B and D; the third of four questions is answered with D instead of C."""
    said = ["A", "(B)", "D", "D"]
    tasks = ("lvbench", "mlvu_dev", "longtimescope", "videomme_v2")
    path, out = tmp_path / "recorded.jsonl", tmp_path / "out"
    lines = [{"task": task, "doc_id": n, "answer": text} for task in tasks for n, text in enumerate(said)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("--tasks", "long", "--replay", path, "--data", in_bench, "--out", out)
    assert result.exit_code == 0, result.output
    assert table(out, "lvbench") == {"all": 75}
    assert table(out, "mlvu_dev") == pytest.approx({"ego": 200 / 3, "needle": 100, "all": (200 / 3 + 100) / 2})
    assert list(table(out, "longtimescope").items()) == [("60 s", 100), ("600 s", 50), ("all", 75)]
    newest = table(out, "videomme_v2")
    assert newest["overall acc"] == newest["level 1 acc"] == 75
    assert newest["overall score"] == newest["relevance score"] == pytest.approx(100 * (3 / 4) ** 2)
