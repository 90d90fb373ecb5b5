"""The benchmark of several GPUs at tiny size on two processes of the CPU: every kind of case gives a row."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_cases_are_written_as_they_are_read(benchmark_script):
    script = benchmark_script("sequence_parallel")
    for gpus in (1, 2, 4, 8):
        cases = script.default_cases(gpus)
        assert cases and len(set(cases)) == len(cases)
        assert [script.Case.of(str(case)) for case in cases] == cases
        assert max(case.gpus for case in cases) == gpus
        assert all(case.gpus == 1 or len(case.cells.blocks(48)) >= case.gpus for case in cases if case.size == "370m")
    film = script.Case.of("film 370m 7200 x4 l8,s16128,host round_robin 0+1")
    assert (film.tokens, film.gpus, film.cells.segment_length, film.steps) == (7200, 4, 16128, (0, 1))
    more = script.Case.of("film 370m 7200 x2 l8,s16128,host,t32 round_robin 0+1")
    assert (film.frames_together, more.frames_together, more.cells) == (8, 32, film.cells)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_smoke_run_agrees_with_one_process(tmp_path):
    table, environment = tmp_path / "table.csv", os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, str(BENCHMARKS / "sequence_parallel.py"), "--smoke", "--out", str(table)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stdout and "left out" not in done.stdout, done.stdout
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    kinds = {case.split()[0] for case in rows}
    assert kinds == {"train", "error", "read", "film", "ddp", "fsdp2"}
    own = ("ddp", "fsdp2")
    shared = [row for case, row in rows.items() if row["gpus"] == "2" and case.split()[0] not in own]
    assert len(shared) == 6
    errors = [float(row["grad_error"]) for case, row in rows.items() if case.startswith("error")]
    assert len(errors) == 2 and all(0 <= error < 1e-4 for error in errors)
    for row in shared:
        assert float(row["seconds"]) > 0 and float(row["efficiency"]) > 0
        assert float(row["loss_error"]) < 1e-5, row
        if row["case"].split()[0] != "read":
            assert float(row["grad_norm_error"]) < 1e-4, row
            assert "heads" in row["case"] or float(row["messages_ms"]) > 0, row
