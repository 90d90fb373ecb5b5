"""`video-ma2mba retrieve` on the command line, with a small model that was not trained."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig
from typer.testing import CliRunner

from video_ma2mba import EXAMPLE_VIDEOS
from video_ma2mba.cli.main import app
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval
from video_ma2mba.retrieval.search import Retriever, match_probability
from video_ma2mba.trainer.videomamba.word_pieces import word_pieces

TEXTS = ["a red circle", "a blue star rests", "something green moves left", "nothing"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_pieces(TEXTS, 60)
    text = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    vision = VideoMambaConfig(
        hidden_size=16, num_hidden_layers=1, state_size=4, patch_size=16, image_size=32, num_frames=2,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = VideoMambaRetrievalConfig(
        vision, text, fusion_layers=1, projection_dim=8, max_text_length=12, initializer_range=0.5
    )
    VideoMambaForRetrieval(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "inside").mkdir(parents=True)
    for number, target in enumerate(("a.mp4", "b.mp4", "inside/c.mp4")):
        shutil.copy(EXAMPLE_VIDEOS / f"{number:06d}.mp4", folder / target)
    return folder


def retrieve(*arguments):
    return CliRunner().invoke(app, ["retrieve", *map(str, arguments)])


def test_texts_find_videos(model, videos):
    (videos / "broken.mp4").write_bytes(b"nothing that could be decoded")
    found = retrieve(*TEXTS[:2], "--videos", videos, "--model", model, "--json")
    assert found.exit_code == 1
    failed, *lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert failed["video"].endswith("broken.mp4") and "header is damaged" in failed["error"]
    assert [line["text"] for line in lines] == TEXTS[:2]
    for line in lines:
        match = [entry["match"] for entry in line["videos"]]
        assert len(match) == 3 and match == sorted(match, reverse=True)
    assert "3 videos read, 0 as before" in found.stderr and "1 of 4 videos could not be read" in found.stderr

    (videos / "broken.mp4").unlink()
    again = retrieve(TEXTS[0], "--videos", videos, "--model", model, "--rerank", "0", "--top", "2")
    assert again.exit_code == 0 and again.stderr == ""
    assert len(again.stdout.splitlines()) == 2
    alone = retrieve(
        TEXTS[0], "--index", videos / "retrieval.safetensors", "--model", model, "--json", "--rerank", "0"
    )
    best = json.loads(alone.stdout)["videos"]
    similar = [entry["similarity"] for entry in best]
    assert similar == sorted(similar, reverse=True) and "match" not in best[0]
    assert f"{similar[0]:.4f}" in again.stdout.splitlines()[0]

    shutil.copy(videos / "a.mp4", videos / "d.mp4")
    (videos / "b.mp4").unlink()
    noticed = retrieve(TEXTS[0], "--videos", videos, "--model", model)
    assert "1 videos read, 2 as before, 1 gone" in noticed.stderr


def test_videos_find_captions(model, videos, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(TEXTS) + "\n\n" + TEXTS[0] + "\n", encoding="utf-8")
    found = retrieve("--captions", captions, "--videos", videos / "a.mp4", "--model", model, "--json", "--top", "9")
    assert found.exit_code == 0, found.output
    (line,) = [json.loads(each) for each in found.stdout.splitlines()]
    assert line["video"].endswith("a.mp4") and sorted(entry["caption"] for entry in line["captions"]) == sorted(TEXTS)
    match = [entry["match"] for entry in line["captions"]]
    assert match == sorted(match, reverse=True)
    assert not list(videos.glob("*.safetensors"))  # of one video nothing is kept
    shown = retrieve("--captions", captions, "--videos", videos, "--model", model, "--top", "1")
    assert len(shown.stdout.splitlines()) == 6  # a line a video and one for its caption


def test_recall_of_a_list(model, videos, tmp_path):
    rows = [{"video": name, "caption": said} for name, said in zip(("a", "b", "inside/c", "gone"), TEXTS, strict=True)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    command = ("--recall", tmp_path / "list.json", "--videos", videos, "--model", model)
    found = retrieve(*command, "--json")
    assert found.exit_code == 1 and "gone.mp4: no such file" in found.stderr
    line = json.loads(found.stdout.splitlines()[-1])
    assert (line["texts"], line["videos"]) == (3, 3)
    assert list(line["recall"]) == ["dual encoder", "best 128 re-ranked"]
    for each in line["recall"].values():
        assert each["t2v_r5"] == each["v2t_r10"] == 1.0 and 1 <= each["t2v_median_rank"] <= 3
    checked = CliRunner().invoke(
        app, ["data", "check", *map(str, command[1:2]), "--base-dir", str(videos), "--labels", "pairs"]
    )
    assert checked.exit_code == 1 and "4 videos or pictures with 4 captions" in checked.stdout
    assert "3 can be used, 1 are broken" in checked.stdout
    assert (videos / "list.retrieval.safetensors").is_file()
    shown = retrieve(*command, "--rerank", "0")
    assert shown.stdout.splitlines()[0] == "3 texts, 3 videos" and len(shown.stdout.splitlines()) == 3


def test_reranking_compares_the_best_again():
    """By hand: a stand-in for the matching head whose logits are known."""

    class Known(Retriever):
        def __init__(self):
            pass

        def match(self, texts, tokens, batch=32):
            values = torch.tensor([float(text) * float(token) for text, token in zip(texts, tokens, strict=True)])
            return torch.stack([torch.zeros(len(values)), values], 1)

    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]])
    one = Known().reranked(["1", "-1"], scores, lambda number: torch.tensor(number - 1.0), 2)
    assert one.argsort(descending=True).tolist() == [[1, 0, 2], [1, 2, 0]]
    assert one[0, 2] == pytest.approx(0.1) and one[1, 1] == 10000.0
    two = Known().reranked_back(["1", "-1"], scores, lambda number: torch.tensor(number - 1.0), 1, match_probability)
    assert two[0, 0] == pytest.approx(10000 + torch.sigmoid(torch.tensor(-1.0)).item()) and two[1, 0] == scores[1, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a TEXT to look for, or --captions FILE, or --recall LIST"),
        (["x", "--captions", "y"], "one of them"),
        (["x", "--videos", "."], "--model is missing"),
        (["x", "--model", "MODEL"], "--videos is missing"),
        (["x", "--model", "MODEL", "--videos", "none"], "--videos none: no such file or folder"),
        (["x", "--model", "MODEL", "--index", "none"], "there is no such file, and no --videos to make it of"),
        (["x", "--model", "MODEL", "--videos", "EMPTY"], "there is no video"),
        (["--captions", "none", "--model", "MODEL", "--videos", "EMPTY"], "--captions none: no such file"),
        (["--recall", "none", "--model", "MODEL", "--videos", "EMPTY"], "--recall none: no such file or folder"),
        (["x", "--model", "BUNDLED", "--videos", "VIDEOS"], "holds a model of the type video_ma2mba"),
        (
            ["x", "--model", "MODEL", "--videos", "VIDEOS", "--max-text-length", "13"],
            "the model reads 12 tokens at most",
        ),
    ],
)
def test_what_is_wrong_is_said(model, videos, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    from video_ma2mba import BUNDLED_CHECKPOINT

    names = {"MODEL": model, "EMPTY": tmp_path / "empty", "VIDEOS": videos, "BUNDLED": BUNDLED_CHECKPOINT}
    found = retrieve(*(names.get(each, each) for each in arguments))
    assert found.exit_code == 2 and said in found.stderr and len(found.stderr.splitlines()) == 1, found.output
