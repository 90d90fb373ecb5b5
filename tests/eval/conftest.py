"""Local copies of the benchmarks, and a model whose videos are read for real while a script gives its answers."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import benchmark_fixtures


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """Folder with the five benchmarks; lmms-eval's tasks look for their videos in it, so it is one for all tests."""
    pytest.importorskip("lmms_eval")
    root = benchmark_fixtures.build(tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(root / "hf_home"))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        yield root


@pytest.fixture
def in_bench(bench: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets are found below the current folder."""
    monkeypatch.chdir(bench)
    return bench


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`script({"part of a question": "answer"})`: what the model says from now on (else nothing).

    Returns the list of what it was asked: prompt, video and frames that its state has seen.
    """

    def install(answers: dict[str, str]) -> list[SimpleNamespace]:
        asked: list[SimpleNamespace] = []

        def scripted(model, tokenizer, states, questions, **settings):
            found = []
            for state, ids in zip(states, questions, strict=True):
                text = tokenizer.decode(ids[0])
                video, frames = state.metadata["video"], int(state.metadata["frames"])
                asked.append(SimpleNamespace(text=text, video=video, frames=frames, settings=settings))
                found.append([{"answer": next((said for part, said in answers.items() if part in text), "")}])
            return found

        monkeypatch.setattr("video_ma2mba.eval.answering.answer_together", scripted)
        return asked

    return install
