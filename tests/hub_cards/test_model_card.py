"""The card says what the files and the table say, and nothing that was not measured."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from video_ma2mba.hub_cards.checkpoint_facts import read_facts
from video_ma2mba.hub_cards.evaluations import accuracy_command, accuracy_markdown, read_accuracy, read_evaluation
from video_ma2mba.hub_cards.model_card import OWN_WORDS_BEGIN, OWN_WORDS_END, model_card, own_words, read_metadata

HEADER = "frames,kind,form,questions,right,accuracy,chance\n"
TABLE = HEADER + "8..64,all,all,200,150,0.75,0.25\n8..64,all,open,100,80,0.8,0.2\n256,all,all,50,20,0.4,0.25\n"


@pytest.fixture
def accuracy(tmp_path: Path) -> list[dict[str, str]]:
    path = tmp_path / "accuracy.csv"
    path.write_text(TABLE)
    return read_accuracy(path)


def test_facts_are_those_of_the_loaded_model(tiny_checkpoint: Path):
    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoState

    facts = read_facts(tiny_checkpoint)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    assert sum(facts.parameters.values()) == sum(p.numel() for p in model.parameters())  # tied weights once in both
    assert facts.parameters["vision tower"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert facts.parameters["projector"] == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert facts.state_bytes == VideoState.zeros(model.config.text_config).nbytes
    assert facts.dtypes == ("F32",)


def test_facts_of_a_checkpoint_in_several_files(tiny_checkpoint: Path, make_model, tmp_path: Path):
    make_model().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_facts(tmp_path).parameters == read_facts(tiny_checkpoint).parameters
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="names weight files that"):
        read_facts(tmp_path)


def test_card_without_measurements_shows_none(tiny_checkpoint: Path):
    text = model_card(read_facts(tiny_checkpoint), "me/tiny", license="mit")
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "video-text-to-text")
    assert card.data.eval_results is None
    assert card.data.base_model is None
    assert "No accuracy was measured" in text
    assert "## Evaluation" not in text
    assert 'model="me/tiny"' in text
    assert "| frames | 16×16 pixels, 4 tokens each |" in text


def test_card_with_measurements(tiny_checkpoint: Path, accuracy, tmp_path: Path):
    text = model_card(
        read_facts(tiny_checkpoint),
        "me/tiny",
        license="mit",
        base_model="you/large",
        evaluations=[read_evaluation(tmp_path / "accuracy.csv", "a CPU, fp32")],
    )
    card = ModelCard(text)
    assert card.data.base_model == "you/large"
    assert [result.metric_value for result in card.data.eval_results] == [0.75, 0.4]
    assert not any(result.verified for result in card.data.eval_results)
    assert "| all | 75.0 % (25.0 %; 200) | 40.0 % (25.0 %; 50) |" in text
    assert "measured on a CPU, fp32" in text
    assert "--frames 8..64 256 --out" in text


def test_card_with_benchmarks(tiny_checkpoint: Path, tmp_path: Path):
    """The folder that `video-ma2mba eval` writes: its tables, its command, its numbers."""
    from video_ma2mba.eval.benchmark_report import write_report
    from video_ma2mba.eval.benchmark_scores import Score, Scores

    rows = [Score("short", 60.0, 10), Score("overall", 48.3, 30)]
    about = {"command": "video-ma2mba eval --tasks videomme", "model": "mine", "frames": "1 a second", "judge": None}
    about |= {"limit": 30, "date": "2030-01-02", "device": "A GPU", "dtype": "bfloat16", "versions": "lmms-eval 9"}
    facts = {"videomme": {"questions": 30}}
    write_report(tmp_path, {"videomme": Scores(rows, "overall")}, facts, about)
    found = read_evaluation(tmp_path)
    text = model_card(read_facts(tiny_checkpoint), "me/tiny", license="mit", evaluations=[found])
    assert "```bash\nvideo-ma2mba eval --tasks videomme\n```" in text
    assert "### Video-MME" in text
    assert "| overall | **48.3** | 30 |" in text
    assert "chart.png" not in text
    assert text.count("\n# ") == 1
    results = {result.dataset_config: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results["overall"] == 48.3
    assert found.files.keys() == {"report.md", "report.json"}
    (tmp_path / "model_index.yaml").write_text("")
    with pytest.raises(ValueError, match="holds no scores"):
        read_evaluation(tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks report\.json"):
        read_evaluation(tmp_path)


def test_the_command_is_one_that_the_program_takes(accuracy):
    from transformers import HfArgumentParser

    from video_ma2mba.world.accuracy import WorldAccuracy

    words = accuracy_command(accuracy).split()
    assert words[:3] == ["python", "-m", "video_ma2mba.world.accuracy"]
    (settings,) = HfArgumentParser(WorldAccuracy).parse_args_into_dataclasses(words[3:])
    assert settings.frames == ["8..64", "256"]


def test_own_words_and_metadata_survive(tiny_checkpoint: Path, tmp_path: Path):
    old = tmp_path / "README.md"
    old.write_text(
        "---\nlicense: mit\nlanguage: fr\ntags: [mine]\ndatasets: [me/films]\n---\n\n# Its name\n\n"
        f"{OWN_WORDS_BEGIN}\nTrained at night.\n{OWN_WORDS_END}\n\nWhat else stood there.\n"
    )
    title, words = own_words(old)
    settings = {"license": "mit", "metadata": read_metadata(old), "title": title, "words": words}
    text = model_card(read_facts(tiny_checkpoint), "me/tiny", **settings)
    card = ModelCard(text)
    assert (card.data.language, card.data.datasets) == ("fr", ["me/films"])
    assert "mine" in card.data.tags
    assert "\n# Its name\n" in text
    assert "Trained at night." in text
    assert "What else stood there" not in text
    new = tmp_path / "new.md"
    new.write_text(text)
    again = {"metadata": read_metadata(new), "title": own_words(new)[0], "words": own_words(new)[1]}
    assert model_card(read_facts(tiny_checkpoint), "me/tiny", license="mit", **again) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "it lacks"),
        (HEADER, "no row whose form"),
        (HEADER + "8,all,all,200,150,0.9,0.25\n", "accuracy is not right / questions"),
        (HEADER + "8,all,all,0,0,0.9,0.25\n", "accuracy is not right / questions"),
        (HEADER + "8,all,all,many,150,0.9,0.25\n", "accuracy is not right / questions"),
    ],
)
def test_other_tables_are_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_accuracy(path)
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_accuracy(tmp_path / "none.csv")


def test_the_measured_table_of_the_repository():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "world_accuracy.csv"
    with path.open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["form"] == "all"]
    lengths = list(dict.fromkeys(row["frames"].replace("..", " to ") for row in measured))
    header, _, *lines = accuracy_markdown(read_accuracy(path)).splitlines()
    assert header == f"| kind | {' frames | '.join(lengths)} frames |" and "8 to 64" in lengths and "3600" in lengths
    for kind in ("order", "all"):
        cells = [
            f"{float(row['accuracy']):.1%} ({float(row['chance']):.1%}; {int(row['questions']):,})".replace("%", " %")
            for row in measured
            if row["kind"] == kind
        ]
        assert f"| {kind} | {' | '.join(cells)} |" in lines


def test_foreign_folders_are_refused(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no directory"):
        read_facts(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="not a saved model"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="type llama"):
        read_facts(tmp_path)
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_facts(tmp_path)
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_facts(tmp_path)


def test_adapters_name_their_base(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        read_facts(tmp_path)
