"""Under DDP, a rank whose samples are broken keeps in step with the others."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(580),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL 1.16 needs Python 3.11"),
]


def test_ranks_stay_in_step(tmp_path: Path, tiny_checkpoint: Path, video_folder: Path):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    shutil.copy(video_folder / "a.mp4", tmp_path)
    shutil.copy(video_folder / "cut.mp4", tmp_path)
    videos = ["a", "cut", "cut", "a", None, "gone", "a", "cut"]  # ranks 0 and 1 in turn
    rows = [{"question": "What?", "answer": "This."} | ({"video": f"{v}.mp4"} if v else {}) for v in videos]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).with_name("broken_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert len(ranks[0]["losses"]) == 4
    assert all(math.isfinite(loss) and loss > 0 for loss in ranks[0]["losses"])
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name
        assert weight.isfinite().all()
    listed = [json.loads(line)["id"] for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert sorted(set(listed)) == [f"rows.jsonl:{n}" for n in (2, 3, 6, 8)]
