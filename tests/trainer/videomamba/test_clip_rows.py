"""Lists of videos in the forms of the data sets that VideoMamba is trained on."""

import json

import pytest
from PIL import Image

from video_ma2mba.trainer.videomamba.clip_rows import ClipRow, load_clip_rows, windows


def rows_of(path, **options):
    found = load_clip_rows(path, **options)
    return [(row.source, row.label) for row in found.rows], found.classes


@pytest.mark.parametrize(
    "text",
    [
        *("a.mp4,1\nb c.mp4,0\n", "a.mp4 1\nb c.mp4 0\n", "a.mp4\t1\nb c.mp4\t0\n"),
        "path,label\na.mp4,1\nb c.mp4,0\n",
    ],
)
def test_paths_and_labels_between_commas_tabs_or_blanks(text, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    rows, classes = rows_of(tmp_path / "train.csv")
    assert rows == [(str(tmp_path / "a.mp4"), 1), (str(tmp_path / "b c.mp4"), 0)] and classes == ("0", "1")
    assert rows_of(tmp_path) == (rows, classes), "a folder with a list named after the split"
    assert rows_of(tmp_path / "train.csv", base_dir="/films")[0][0] == ("/films/a.mp4", 1)


def test_names_of_classes_are_numbered_and_kept_for_the_next_list(tmp_path):
    (tmp_path / "train.txt").write_text("a.mp4 walk\nb.mp4 run\n")
    (tmp_path / "val.txt").write_text("c.mp4 walk\n")
    found = load_clip_rows(tmp_path)
    assert [row.label for row in found.rows] == [1, 0] and found.classes == ("run", "walk")
    held = load_clip_rows(tmp_path, split="val", classes=found.classes)
    assert [row.label for row in held.rows] == [1]
    with pytest.raises(ValueError, match=r"c.mp4: there is no class 'walk' among the 1 known ones"):
        load_clip_rows(tmp_path / "val.txt", classes=["run"])


def test_lvu_lists_have_lengths_and_are_cut_into_windows(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4,2,100.0\nb.mp4,0,30\n")
    found = load_clip_rows(tmp_path / "train.csv", window=60, stride=16)
    assert [(r.start, r.end) for r in found.rows] == [(0, 60), (16, 76), (32, 92), (48, 100), (64, 100), (None, None)]
    assert [r.label for r in found.rows] == [2] * 5 + [0]
    values = load_clip_rows(tmp_path / "train.csv", regression=True)
    assert [r.label for r in values.rows] == [2.0, 0.0] and values.classes == ()
    assert list(windows(ClipRow("x"), 60, 16)) == [ClipRow("x")], "a length that is not known"
    for value in ("many", "nan", "-inf"):
        (tmp_path / "bad.csv").write_text(f"a.mp4,{value}\n")
        with pytest.raises(ValueError, match=f"the value to predict must be a number, not '{value}'"):
            load_clip_rows(tmp_path / "bad.csv", regression=True)


def test_kinetics_something_and_coin_lists(tmp_path):
    (tmp_path / "kinetics.csv").write_text("label,youtube_id,time_start,time_end,split\nabseiling,x1,20,30,train\n")
    assert rows_of(tmp_path / "kinetics.csv")[0] == [(str(tmp_path / "x1_000020_000030.mp4"), 0)]
    (tmp_path / "abseiling").mkdir()
    (tmp_path / "abseiling" / "x1_000020_000030.mp4").write_bytes(b"")
    assert rows_of(tmp_path / "kinetics.csv")[0][0][0].endswith("abseiling/x1_000020_000030.mp4")
    (tmp_path / "labels.json").write_text('{"Holding something": "5", "Closing something": "3"}')
    listed = [{"id": "7", "template": "Holding [something]", "label": "holding a cup"}]
    (tmp_path / "train.json").write_text(json.dumps(listed))
    rows, classes = rows_of(tmp_path / "train.json")
    assert rows == [(str(tmp_path / "7.webm"), 5)] and len(classes) == 6
    entries = {"v1": {"class": "PlantTree", "recipe_type": 4, "subset": "training", "duration": 9.5},
               "v2": {"class": "MakeTea", "recipe_type": 5, "subset": "testing", "duration": 9}}  # fmt: skip
    (tmp_path / "COIN.json").write_text(json.dumps({"database": entries}))
    assert rows_of(tmp_path / "COIN.json") == ([(str(tmp_path / "v1.mp4"), 0)], ("PlantTree",))
    assert rows_of(tmp_path / "COIN.json", split="test")[1] == ("MakeTea",)


def test_files_are_found_as_crawlers_and_converters_left_them(tmp_path):
    """Something-Something as mp4, Kinetics in folders of split and class with other suffixes, blanks as underscores,
    COIN by number; a folder's list of the split, however the split is called."""
    for name in (
        "7.mp4",
        "train/air_drumming/x1_000020_000030.mkv",
        "val/x2_000001_000011.mp4",
        "4/v1.webm",
        "b/c.avi",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "validation.json").write_text('[{"id": "7", "template": "Holding [something]"}]')
    assert rows_of(tmp_path, split="val") == ([(str(tmp_path / "7.mp4"), 0)], ("Holding something",))
    (tmp_path / "kinetics.CSV").write_text(
        "label,youtube_id,time_start,time_end,split\nair drumming,x1,20,30,train\nplay,x2,1,11,validate\n"
    )
    found = [source for source, _ in rows_of(tmp_path / "kinetics.CSV")[0]]
    assert found == [
        str(tmp_path / "train/air_drumming/x1_000020_000030.mkv"),
        str(tmp_path / "val/x2_000001_000011.mp4"),
    ]
    entry = {"class": "PlantTree", "recipe_type": 4, "subset": "training", "duration": 9.5}
    (tmp_path / "COIN.json").write_text(json.dumps({"database": {"v1": entry}}))
    assert rows_of(tmp_path / "COIN.json")[0] == [(str(tmp_path / "4/v1.webm"), 0)]
    (tmp_path / "bare.txt").write_text("b/c 1\nmy clip 12 3\n")
    whole = load_clip_rows(tmp_path / "bare.txt").rows
    assert [row.source for row in whole] == [str(tmp_path / "b/c.avi"), str(tmp_path / "my clip")]
    assert [(row.label, row.seconds) for row in whole] == [(1, None), (12, 3.0)]
    (tmp_path / "named.csv").write_text("video_name,class_name\na.mp4,run\n")
    assert rows_of(tmp_path / "named.csv") == ([(str(tmp_path / "a.mp4"), 0)], ("run",))


def test_folders_of_frames_folders_of_classes_and_data_sets(tmp_path):
    import datasets

    root = tmp_path / "frames"
    (root / "clip").mkdir(parents=True)
    (tmp_path / "list.txt").write_text("frames/clip 12 3\n")
    assert rows_of(tmp_path / "list.txt")[0] == [(str(root / "clip"), 3)]
    for name in ("train/cat/1.png", "train/cat/2.png", "train/ant/1.png", "val/cat/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    rows, classes = rows_of(tmp_path / "images")
    assert classes == ("ant", "cat") and [label for _, label in rows] == [0, 1, 1]
    assert len(rows_of(tmp_path / "images", split="val", classes=classes)[0]) == 1
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.new("RGB", (4, 4), (9, 9, 9))] * 2
    data = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features)
    found = load_clip_rows(data)
    assert found.classes == ("no", "yes") and [row.label for row in found.rows] == [1, 0]
    assert found.rows[0].open()["bytes"] and found.rows[0].name == "row 0"
    data.save_to_disk(str(tmp_path / "saved"))
    assert load_clip_rows(tmp_path / "saved").classes == ("no", "yes")
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(tmp_path / "both"))
    assert len(load_clip_rows(tmp_path / "both", split="val")) == 2
    with pytest.raises(ValueError, match="both has the splits train, validation: there is no test among them"):
        load_clip_rows(tmp_path / "both", split="test")


def test_mistakes_are_said_in_one_sentence(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "odd.csv").write_text("a.mp4,1,2,3\n")
    (tmp_path / "some.csv").write_text("a.mp4,1\nb.mp4\n")
    (tmp_path / "minus.csv").write_text("a.mp4,-1\n")
    (tmp_path / "head.csv").write_text("movie,mood\na.mp4,glad\n")
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for name, kind, message in (
        ("empty.csv", ValueError, "there are no rows in it"),
        ("odd.csv", ValueError, "odd.csv, line 1: it must be path,label"),
        ("some.csv", ValueError, "b.mp4 has no label, others have one"),
        ("minus.csv", ValueError, "there is no class -1, they begin at 0"),
        ("head.csv", ValueError, "head.csv, line 1 names no file: of a header one of video, image, .* is understood"),
        ("x.parquet", ValueError, "a list of videos must end in .csv"),
        ("none", FileNotFoundError, "holds neither a list"),
        ("gone.csv", FileNotFoundError, "no such file or folder"),
    ):
        with pytest.raises(kind, match=message):
            load_clip_rows(tmp_path / name)
    (tmp_path / "nine.csv").write_text("a.mp4,9\n")
    with pytest.raises(ValueError, match="there is no class 9, there are 2, 0 first"):
        load_clip_rows(tmp_path / "nine.csv", classes=["a", "b"])


def test_data_check_reads_every_clip(tmp_path):
    from typer.testing import CliRunner

    from video_ma2mba.cli.main import app

    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "train.csv").write_text("1.png,0\n2.png,1\ngone.mp4,1\n")
    report = tmp_path / "report.json"
    arguments = ["data", "check", str(tmp_path), "--labels", "classes", "--num-frames", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json-file", str(report)])
    assert result.exit_code == 1, result.output
    assert "2 classes with 1 to 2 rows each" in result.output and "2 can be used, 1 are broken" in result.output
    assert "gone.mp4" in result.output and "tokens" not in result.output.split("gone.mp4")[0]
    found = json.loads(report.read_text())
    assert found["classes"] == {"0": 1, "1": 2} and found["usable"] == 2
    assert found["same_videos"] == [[str(tmp_path / "1.png"), str(tmp_path / "2.png")]]
    (tmp_path / "train.csv").write_text("1.png,0.5\n")
    assert CliRunner().invoke(app, [*arguments[:-3], "values", "--json"]).exit_code == 0
    for wrong, said in (
        (["--labels", "pears"], "--labels pears: use one of answers, captions, classes, values, pairs"),
        (["--labels", "pairs", "--show", "0"], "--show is for answers and captions, not for --labels pairs"),
        (["--labels", "classes", "--num-frames", "0"], "num_frames"),
    ):
        result = CliRunner().invoke(app, ["data", "check", str(tmp_path), *wrong])
        assert result.exit_code == 2 and said in result.output.replace("\n", " "), result.output
