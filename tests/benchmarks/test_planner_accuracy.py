"""The planner against what was measured on a GPU, on every machine that runs the tests."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("planner_accuracy")


@pytest.fixture(scope="module")
def lines(accuracy: ModuleType) -> list[dict]:
    with (BENCHMARKS / "results" / "ma_gc.csv").open(newline="") as file:
        return [accuracy.compare(row) for row in csv.DictReader(file) if accuracy.usable(row)]


def test_gpu_peak_is_within_ten_percent_of_every_measurement(lines: list[dict]):
    assert len(lines) >= 12
    assert [line for line in lines if abs(line["gb_error_percent"]) > 10] == []


def test_speed_is_close_on_nearly_every_measurement(lines: list[dict]):
    assert sum(abs(line["speed_error_percent"]) <= 10 for line in lines) >= 0.85 * len(lines)


def test_published_table_is_the_current_prediction(accuracy: ModuleType, lines: list[dict]):
    table = accuracy.markdown(lines).strip()
    assert table == (BENCHMARKS / "results" / "planner_accuracy.md").read_text(encoding="utf-8").strip()
    assert table in (BENCHMARKS.parent / "docs" / "ma_gc.md").read_text(encoding="utf-8")


def test_fit_recovers_constants_that_made_the_speeds(accuracy: ModuleType):
    rows = [
        {
            "model": model,
            "tokens": str(tokens),
            "plan": f"l={block} s={segment} gpu",
            "method": "",
            "tokens_per_s": "",
            "kernels": "mamba_ssm",
        }
        for model in ("370m", "2.7b")
        for tokens, block, segment in ((2**14, 1, 2**14), (2**16, 4, 2**13), (2**16, 8, 2**16), (2**18, 2, 2**15))
    ]
    for row in rows:
        job, plan = accuracy.job_of(row)
        row["tokens_per_s"] = str(job.work.tokens / accuracy.predict_job(job, plan).step_seconds)
    wrong = accuracy.replace(accuracy.H200, matmul=accuracy.H200.matmul * 1.4)
    found = accuracy.fit(rows, wrong)
    assert found.matmul == pytest.approx(accuracy.H200.matmul, rel=0.1)
