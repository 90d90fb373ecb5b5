"""Captions in the forms in which the benchmarks of retrieval come."""

import json
import pickle

import pytest

from video_ma2mba.trainer.videomamba.caption_rows import load_caption_rows


@pytest.fixture
def folder(tmp_path):
    """Gives a function that writes a list and empty videos."""

    def write(name, content, videos=()):
        for video in videos:
            (tmp_path / video).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / video).touch()
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def shown(rows):
    """File names, captions, and ends, for comparisons."""
    return [(row.clip.source.rsplit("/", 1)[1], row.captions, row.clip.end) for row in rows]


def test_activitynet_paragraphs(folder):
    entry = {"duration": 82.7, "timestamps": [[0, 5], [4, 82]], "sentences": ["A man enters.", "  He sings. "]}
    path = folder("train.json", {"v_QOlSCBRmfWY": entry}, ["v_QOlSCBRmfWY.mkv"])
    (row,) = load_caption_rows(path)
    assert row.captions == ("A man enters. He sings.",) and row.clip.seconds == 82.7
    assert row.clip.source.endswith("v_QOlSCBRmfWY.mkv") and row.clip.end is None


def test_didemo_is_a_paragraph_about_30_seconds(folder):
    video = "54322086@N00_2408598493_274c77d26a.avi"
    entries = [
        {"annotation_id": n, "description": said, "video": video, "times": [[0, 0]], "num_segments": 6}
        for n, said in enumerate(("camera pans", "a dog jumps"))
    ]
    found = load_caption_rows(folder("train_data.json", entries, [video]))
    assert shown(found) == [(video, ("camera pans a dog jumps",), 30.0)]


def test_msrvtt(folder):
    whole = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video7", "split": "validate"}],
        "sentences": [
            {"video_id": "video0", "caption": "a car"},
            {"video_id": "video7", "caption": "a cat"},
            {"video_id": "video0", "caption": "a fast car"},
        ],
    }
    path = folder("MSRVTT_data.json", whole, ["video0.mp4", "video7.mp4"])
    assert shown(load_caption_rows(path)) == [("video0.mp4", ("a car", "a fast car"), None)]
    assert shown(load_caption_rows(path, split="val")) == [("video7.mp4", ("a cat",), None)]
    with pytest.raises(ValueError, match="there is no video with a caption .of the split test"):
        load_caption_rows(path, split="test")
    test = folder("MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr1,video7,a cat plays\n")
    assert shown(load_caption_rows(test)) == [("video7.mp4", ("a cat plays",), None)]
    names = folder("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo7\n")
    assert shown(load_caption_rows(names))[0] == ("video0.mp4", ("a car", "a fast car"), None)


def test_lsmdc_lies_in_a_folder_a_film(folder):
    clip = "0001_American_Beauty_00.00.51.926-00.00.54.129"
    line = f"{clip}\t00.00.51.926\t00.00.54.129\t00.00.51.426\t00.00.54.629\tSOMEONE lies, asleep."
    path = folder("LSMDC16_annos_test.csv", line + "\n", [f"0001_American_Beauty/{clip}.avi"])
    (row,) = load_caption_rows(path)
    assert row.clip.source == str(path.parent / "0001_American_Beauty" / f"{clip}.avi")
    assert row.captions == ("SOMEONE lies, asleep.",)
    with pytest.raises(ValueError, match="line 2: LSMDC's lines have six fields between tabs, not 2"):
        load_caption_rows(folder("LSMDC16_annos_test.csv", f"{line}\nx\ty\n"))


def test_msvd(folder, tmp_path):
    one, two = "mv89psg6zh4_33_46", "_0nX-El-ySo_83_93"
    folder("test_list.txt", f"{two}\n", [f"{one}.avi", f"{two}.avi"])
    text = folder("AllVideoDescriptions.txt", f"# comment\n\n{one} a bird in a sink\n{two} a man\n{one} a bird\n")
    both = [(f"{one}.avi", ("a bird in a sink", "a bird"), None), (f"{two}.avi", ("a man",), None)]
    assert shown(load_caption_rows(text)) == both and shown(load_caption_rows(text, split="test")) == both[1:]
    table = folder(
        "corpus.csv",
        "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
        "mv89psg6zh4,33,46,1,clean,5,English,a bird in a sink\nmv89psg6zh4,33,46,1,clean,5,German,ein Vogel\n"
        "_0nX-El-ySo,83,93,1,clean,5,English,a man\nmv89psg6zh4,33,46,1,clean,5,English,a bird\n",
    )
    assert shown(load_caption_rows(table)) == both
    (tmp_path / "raw-captions.pkl").write_bytes(
        pickle.dumps({one: [["a", "bird", "in", "a", "sink"], ["a", "bird"]], two: [["a", "man"]]})
    )
    assert shown(load_caption_rows(tmp_path / "raw-captions.pkl")) == both
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="not a pickle of plain captions.*builtins.print"):
        load_caption_rows(tmp_path / "evil.pkl")


def test_pretraining_lists(folder, tmp_path):
    coco = {
        "images": [{"id": 4, "file_name": "4.jpg"}],
        "annotations": [{"image_id": 4, "caption": "a cake"}, {"image_id": 4, "caption": "food"}],
    }
    (row,) = load_caption_rows(folder("captions_val.json", coco, ["4.jpg"]))
    assert row.captions == ("a cake", "food") and row.is_picture
    webvid = folder(
        "webvid.csv",
        'videoid,contentUrl,duration,page_dir,name\n12,http://a/b.mp4,PT00H00M11S,000_050,"Sea, waves"\n',
        ["000_050/12.mp4"],
    )
    (row,) = load_caption_rows(webvid)
    assert row.clip.source == str(tmp_path / "000_050/12.mp4") and row.captions == ("Sea, waves",)
    listed = folder("anno.json", [{"video": "a.mp4", "caption": ["one", "two"]}, {"image": "4.jpg", "caption": "x"}])
    video, picture = load_caption_rows(listed)
    assert video.captions == ("one", "two") and not video.is_picture and picture.is_picture
    assert load_caption_rows(listed, paragraphs=True)[0].captions == ("one two",)
    assert video.key != picture.key


def test_simple_lists(folder, tmp_path):
    lines = folder("lines.csv", "a.mp4,a red ball, rolling\nb.mp4,a dog\na.mp4,a ball\n", ["a.mp4", "b.mp4"])
    expected = [("a.mp4", ("a red ball, rolling", "a ball"), None), ("b.mp4", ("a dog",), None)]
    assert shown(load_caption_rows(lines)) == expected
    quoted = folder("quoted.csv", '"a.mp4", "a red ball, rolling"\nb.mp4,a dog\na.mp4,"a ball"\n')
    assert shown(load_caption_rows(quoted)) == expected
    by_name = folder("by_name.json", {"a": ["a red ball, rolling", "a ball"], "b.mp4": "a dog"})
    assert shown(load_caption_rows(by_name)) == expected
    for name, said in {"a.txt": "a red ball, rolling\na ball\n", "b.txt": "a dog\n"}.items():
        (tmp_path / name).write_text(said, encoding="utf-8")
    assert shown(load_caption_rows(tmp_path)) == expected
    parts = folder("parts.jsonl", '{"video": "a.mp4", "caption": "up", "start": 1, "end": "0:03"}\n')
    assert [(row.clip.start, row.clip.end) for row in load_caption_rows(parts)] == [(1.0, 3.0)]
    with pytest.warns(UserWarning, match="1 captions are empty and left out"):
        assert len(
            load_caption_rows(folder("some.json", [{"video": "a", "caption": ""}, {"video": "b", "caption": "c"}]))
        )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", [{"video": "a.mp4"}], r"a.json\[0\]: there is no field that says a caption"),
        ("b.json", {"a": 1}, "none of the forms of captions that are known"),
        ("e.csv", "movie,said\na.mp4,a dog\n", "e.csv, line 1 names no file: of a header one of video, image, "),
        ("c.csv", "", "there is no video with a caption"),
        ("d.csv", "video_id\nvideo1\n", "has no captions: put MSRVTT_data.json beside it"),
    ],
)
def test_what_is_not_understood_is_said(folder, name, content, said):
    with pytest.raises(ValueError, match=said):
        load_caption_rows(folder(name, content))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_caption_rows(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds neither a list"):
        load_caption_rows(tmp_path)
