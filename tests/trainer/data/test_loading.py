"""Sources and forms of rows: what each becomes, and what is said about those that are not understood."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from video_ma2mba.trainer.data import load_training_data
from video_ma2mba.trainer.data.canonical import drop_empty
from video_ma2mba.trainer.data.row_formats import FORMATS
from video_ma2mba.world import KINDS
from video_ma2mba.world.hf_datasets import load_world
from video_ma2mba.world.video_files import render_to_folder


def chats(rows) -> list[list[tuple]]:
    """Rows as (role, parts without what is empty) for comparison."""
    return [[(m["role"], drop_empty(m)["content"]) for m in row["messages"]] for row in rows]


def chat(*turns) -> list[tuple]:
    """The expected chat: texts and media dicts of user and assistant in turn."""
    return [
        (
            ("user", "assistant")[number % 2],
            [
                {"type": "text", "text": p} if isinstance(p, str) else p
                for p in (turn if isinstance(turn, list) else [turn])
            ],
        )
        for number, turn in enumerate(turns)
    ]


def video(path, **window) -> dict:
    return {"type": "video", "video": str(path), **window}


def test_questions_in_a_table_with_a_folder(tmp_path: Path):
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "question", "answer", "start", "end", "note"])
        writer.writerow(["a.mp4", 'Who says "hi, you"?', "line one\nline two", "1.5", "0:00:04", "ignored"])
        writer.writerow(["b.mp4", "Was?", "Größe", "", "", ""])
    rows = load_training_data(tmp_path)
    assert chats(rows) == [
        chat([video(tmp_path / "a.mp4", start=1.5, end=4.0), 'Who says "hi, you"?'], "line one\nline two"),
        chat([video(tmp_path / "b.mp4"), "Was?"], "Größe"),
    ]
    assert rows["id"] == ["questions.csv:3", "questions.csv:4"]
    assert rows["problem"] == [None, None]


def test_options_are_written_out_unless_the_question_has_them(write_jsonl):
    row = {"video": "/a.mp4", "answer": "B", "options": ["red", "blue"]}
    rows = load_training_data(
        write_jsonl([row | {"question": "Which?"}, row | {"question": "Which? (A) red (B) blue"}])
    )
    asked = [row["messages"][0]["content"][1]["text"] for row in rows]
    assert asked == ["Which?\n(A) red\n(B) blue", "Which? (A) red (B) blue"]


def test_llava_conversations(tmp_path: Path, video_folder: Path):
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "c.mp4").write_bytes(b"x")
    turns = [
        {"from": "human", "value": "<image>\nFirst?"},
        {"from": "gpt", "value": "One."},
        {"from": "human", "value": "Second?"},
        {"from": "gpt", "value": "Two."},
    ]
    rows = [
        {"id": 7, "video": "c.mp4", "data_source": "subset", "conversations": turns},
        {"id": "i", "image": "dot.png", "conversations": [{"from": "human", "value": "Look:\n<image>"}, turns[1]]},
        {"id": "t", "conversations": turns[2:]},
        {"id": "two", "image": ["1.png", "2.png"], "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich?"}, turns[1]]},
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    found = load_training_data(tmp_path / "llava.json")
    image = {"type": "image", "image": str(tmp_path / "dot.png")}
    pair = [{"type": "image", "image": str(tmp_path / f"{n}.png")} for n in (1, 2)]
    assert chats(found) == [
        chat([video(tmp_path / "subset" / "c.mp4"), "First?"], "One.", "Second?", "Two."),
        chat([image, "Look:"], "One."),
        chat("Second?", "Two."),
        chat([*pair, "Which?"], "One."),
    ]
    assert found["id"] == ["7", "i", "t", "two"]


def test_chat_messages_in_every_spelling(write_jsonl, tmp_path: Path):
    ask, answer = {"type": "text", "text": "Q"}, {"role": "assistant", "content": "A"}
    frames = ["f1.png", "f2.png"]
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4", "end": 3}, ask]}, answer]},
        {"messages": [{"role": "user", "content": [{"type": "video"}, ask]}, answer], "videos": ["a.mp4"]},
        {"messages": [{"role": "user", "content": "<video>\nQ"}, answer], "video": "a.mp4"},
        {"messages": [{"role": "user", "content": "Q"}, answer], "video": "a.mp4"},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": frames}, ask]}, answer]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}, answer]},
    ]
    found = chats(load_training_data(write_jsonl(rows)))
    path = tmp_path / "a.mp4"
    plain = chat([video(path), "Q"], "A")
    assert found[0] == chat([video(path, end=3.0), "Q"], "A")
    assert found[1:4] == [plain, plain, plain]
    assert found[4] == chat([{"type": "video", "video": [str(tmp_path / name) for name in frames]}, "Q"], "A")
    assert found[5] == [("system", [{"type": "text", "text": "Be brief."}]), *chat("Q", "A")]


def test_video_chat_questions(write_jsonl, tmp_path: Path):
    pairs = [{"i": "You see a film.", "q": "", "a": "A dog."}, {"i": "", "q": "Colour?", "a": "Brown."}]
    (found,) = chats(load_training_data(write_jsonl([{"video": "a.mp4", "QA": pairs, "start": 2, "end": 5}])))
    assert found[0] == ("system", [{"type": "text", "text": "You see a film."}])
    assert found[1:] == chat(video(tmp_path / "a.mp4", start=2.0, end=5.0), "A dog.", "Colour?", "Brown.")


def test_captioned_clips_of_a_video_become_one_sample_in_the_order_of_time(write_jsonl, tmp_path: Path):
    def clip(name, start, caption):
        return {"video": name, "start": start, "end": start + 2, "caption": caption}

    rows = [
        clip("a.mp4", 4, "third"),
        clip("b.mp4", 0, "other"),
        clip("a.mp4", 0, "first"),
        clip("a.mp4", 2, "second"),
    ]
    found = chats(load_training_data(write_jsonl(rows)))
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert found == [
        chat(
            *(video(a, start=0.0, end=2.0), "first"),
            *(video(a, start=2.0, end=4.0), "second"),
            *(video(a, start=4.0, end=6.0), "third"),
        ),
        chat(video(b, start=0.0, end=2.0), "other"),
    ]


def test_scenewalk_clips_of_the_first_release(tmp_path: Path, video_folder: Path):
    def clip(name, number, start, end):
        stamp = {"duration": 2, "start_fps": 30, "end_fps": 30, "start_frame": int(start * 30)}
        stamp |= {"end_frame": int(end * 30), "start_time": f"00:00:0{start:.3f}", "end_time": f"00:00:0{end:.3f}"}
        said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"clip {number}"}]
        url = f"https://www.youtube.com/watch?v={name}&t=3"
        return {"id": f"{name}_{number}", "url": url, "time_stamp": stamp, "conversations": said, "v2t_score": [0.3]}

    rows = [clip("a", 0, 0.0, 2.5), clip("a", 1, 2.5, 5.0), clip("gone", 0, 0.0, 1.0)]
    rows[1]["time_stamp"] |= {"start_time": None, "end_time": None}  # frames say it as well
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    found = load_training_data(tmp_path, base_dir=video_folder)
    path = video_folder / "a.mp4"
    assert chats(found)[0] == chat(
        video(path, start=0.0, end=2.5), "clip 0", video(path, start=2.5, end=5.0), "clip 1"
    )
    assert len(found) == 2
    assert "no video gone.mp4 or gone_0.mp4" in found["problem"][1]


def test_scenewalk_videos_of_the_later_releases(write_jsonl, tmp_path: Path):
    said = [{"from": who, "value": text} for text in ("one", "two") for who in ("human", "gpt")]
    row = {"id": "v", "video": "a.mp4", "total_time": 9.0, "clip_num": 2, "conversations": said}
    rows = [row | {"scenes": [[0, 4], [4, 9]]}, row | {"scenes": [{"start": "0:00:00", "end": "0:00:04"}] * 2},
            row | {"scenes": [[0, 4]]}, row | {"scenes": [[0], [4]]}]  # fmt: skip
    found = load_training_data(write_jsonl(rows))
    path = tmp_path / "a.mp4"
    assert chats(found)[0] == chat(video(path, start=0.0, end=4.0), "one", video(path, start=4.0, end=9.0), "two")
    assert chats(found)[1][2] == chat(video(path, start=0.0, end=4.0))[0]
    assert "2 captions for 1 scenes" in found["problem"][2]
    assert "starts and ends" in found["problem"][3]


def test_merging_questions_by_video_keeps_every_answer_once(tmp_path: Path):
    render_to_folder(tmp_path / "world", 3, KINDS, (8, 12), seed=1, progress=False)
    apart = load_training_data(tmp_path / "world")
    together = load_training_data(tmp_path / "world", merge_by_video=True)
    streamed = list(load_training_data(tmp_path / "world", merge_by_video=True, streaming=True))
    assert len(together) == 3 < len(apart)
    assert list(together) == streamed
    for row in together:
        media = [p for m in row["messages"] for p in m["content"] if p["type"] == "video"]
        assert len(media) == 1 and row["messages"][0]["content"][0] == media[0]

    def texts(rows):
        return [p["text"] for row in rows for m in row["messages"] for p in m["content"] if p["type"] == "text"]

    assert texts(together) == texts(apart)


def test_parts_of_a_video_asked_about_differ(write_jsonl):
    rows = [{"video": "a.mp4", "question": q, "answer": "A", "start": s} for q, s in (("1", 0), ("2", 5), ("3", 0))]
    found = load_training_data(write_jsonl(rows), merge_by_video=True)
    assert [len(row["messages"]) for row in found] == [4, 2]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"video": "a.mp4", "question": "Q"}, "no known form"),
        ({"video": "a.mp4", "question": "Q", "answer": ""}, "no answer"),
        ({"video": "a.mp4", "question": "Q", "answer": "A", "start": "soon"}, "start='soon' is no time"),
        ({"video": "a.mp4", "question": "Q", "answer": 3}, "malformed"),
        ({"conversations": [{"from": "tool", "value": "x"}], "video": "a.mp4"}, "the role 'tool' is not known"),
        ({"conversations": [{"from": "gpt"}], "video": "a.mp4"}, "malformed"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "video": "a.mp4"}, "no question"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}], "image": "a.png"}, "2 placeholders"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "1 places for 0"),
        ({"messages": "hello"}, "malformed"),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense_are_kept_with_their_problem(write_jsonl, row: dict, problem: str):
    good = {"video": "a.mp4", "question": "Q", "answer": "A"}
    for streaming in (False, True):
        found = list(load_training_data(write_jsonl([good, row, good]), streaming=streaming))
        assert [bool(each["problem"]) for each in found] == [False, True, False]
        assert problem in found[1]["problem"]
        assert "rows.jsonl:2" in found[1]["problem"]
        assert found[1]["messages"] == []


def test_lines_that_are_no_json_are_kept_with_their_problem(write_jsonl, tmp_path: Path):
    path = write_jsonl([{"question": "Q", "answer": "A"}])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"question": "half\n[1]\n\n')
    (tmp_path / "rows.csv").write_text("question,answer\nQ,A\nQ, with a comma,A\n")
    assert [bool(problem) for problem in load_training_data(path)["problem"]] == [False, True, True]
    assert "quotes" in load_training_data(tmp_path / "rows.csv")["problem"][1]


def test_unknown_columns_are_listed_with_all_that_is_understood(write_jsonl):
    path = write_jsonl([{"clip": "a.mp4", "prompt": "Q", "reply": "A"}])
    for source in (path, datasets.Dataset.from_list([{"clip": "a.mp4", "reply": "A"}])):
        with pytest.raises(ValueError, match="no known form") as caught:
            load_training_data(source)
        assert "'clip'" in str(caught.value)
        for form in FORMATS:
            assert form.name in str(caught.value)


def test_sources_that_cannot_be_told_apart_or_found(tmp_path: Path, write_jsonl):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
        load_training_data(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"holds no training data"):
        load_training_data(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        load_training_data(tmp_path / "notes.txt")
    write_jsonl([], "empty.jsonl")
    with pytest.raises(ValueError, match="no rows"):
        load_training_data(tmp_path / "empty.jsonl")
    (tmp_path / "one.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must hold a list"):
        load_training_data(tmp_path / "one.json")
    with pytest.raises(ValueError, match="several data files"):
        load_training_data(tmp_path)
    with pytest.raises(ValueError, match="no source"):
        load_training_data([])


def test_folders_know_their_splits(tmp_path: Path, write_jsonl):
    for name, answer in (("train", "T"), ("validation", "V")):
        write_jsonl([{"question": "Q", "answer": answer}], f"{name}.jsonl")
    for split, answer in (("train", "T"), ("validation", "V")):
        assert chats(load_training_data(tmp_path, split=split)) == [chat("Q", answer)]


def test_saved_and_loaded_data_sets_and_lists_of_sources(tmp_path: Path, write_jsonl):
    path = write_jsonl([{"video": "a.mp4", "question": "Q", "answer": "A"}])
    rows = load_training_data(path)
    rows.save_to_disk(str(tmp_path / "saved"))
    again = load_training_data(tmp_path / "saved")
    assert list(again) == list(rows) == list(load_training_data(rows))
    table = datasets.Dataset.from_list([{"question": "Q2", "answer": "A2"}])
    table.save_to_disk(str(tmp_path / "table"))
    both = load_training_data([path, tmp_path / "table"])
    assert chats(both) == [*chats(rows), chat("Q2", "A2")]
    streamed = load_training_data([path, tmp_path / "table"], streaming=True)
    assert chats(streamed) == chats(both)
    with pytest.raises(ValueError, match="some sources stream"):
        load_training_data([path, table.to_iterable_dataset()])


def test_a_changed_file_is_read_again(write_jsonl):
    for answer in ("first", "second"):
        path = write_jsonl([{"question": "Q", "answer": answer}])
        assert chats(load_training_data(path)) == [chat("Q", answer)]


def test_data_sets_that_stream_merge_what_follows_one_another(write_jsonl, tmp_path: Path):
    clips = [
        {"video": f"{v}.mp4", "start": 2 * n, "end": 2 * n + 2, "caption": f"{v}{n}"} for v in "ab" for n in range(3)
    ]
    whole = load_training_data(datasets.Dataset.from_list(clips))
    streamed = load_training_data(datasets.Dataset.from_list(clips).to_iterable_dataset(num_shards=2))
    assert chats(streamed) == chats(whole)
    apart = [row for batch in DataLoader(streamed, num_workers=2, batch_size=1, collate_fn=list) for row in batch]
    assert sorted(map(str, chats(apart))) == sorted(map(str, chats(whole)))
    assert [len(row["messages"]) for row in whole] == [6, 6]


def test_a_stream_of_unknown_types_is_known_by_its_first_row(video_folder: Path):
    frames = np.zeros((3, 8, 8, 3), np.uint8)

    def rows():
        yield {"video": frames, "question": "Q", "answer": "A"}

    (found,) = load_training_data(datasets.IterableDataset.from_generator(rows))
    assert drop_empty(found["messages"][0])["content"][0] == {"type": "video"}
    assert np.asarray(found["video"]).shape == frames.shape


def test_bytes_belong_into_columns(write_jsonl):
    part = {"type": "video", "video": {"bytes": b"123", "path": None}, "text": None}
    said = [{"role": "user", "content": [part]}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    for message in said:
        message["content"] = [{"type": None, "text": None, "video": None} | part for part in message["content"]]
    (found,) = load_training_data(datasets.Dataset.from_list([{"messages": said}]))
    assert "put what it holds into a column videos" in found["problem"]


@pytest.mark.parametrize("streaming", [False, True])
def test_videos_that_a_data_set_holds_stay_where_they_are(video_folder: Path, streaming: bool):
    data = (video_folder / "b.mp4").read_bytes()
    rows = datasets.Dataset.from_list(
        [{"video": {"bytes": data, "path": "b.mp4"}, "question": "Q", "answer": str(n)} for n in range(3)]
    )
    rows = rows.filter(lambda row: row["answer"] != "1")  # an indices mapping
    found = load_training_data(rows.to_iterable_dataset() if streaming else rows)
    assert [row["messages"][1]["content"][0]["text"] for row in found] == ["0", "2"]
    for row in found:
        assert row["messages"][0]["content"][0] | {"type": None} == dict.fromkeys(row["messages"][0]["content"][0])
        assert row["video"]["bytes"] == data


def test_the_rendered_world_in_memory():
    world = load_world("train", 3, frames=(4, 6), questions=2)
    found = load_training_data(world)
    for row, original in zip(found, world, strict=True):
        assert isinstance(row["video"], np.ndarray) and row["video"].dtype == np.uint8
        assert row["video"].shape == (original["frames"], 64, 64, 3)
        assert drop_empty(row["messages"][0])["content"][0] == {"type": "video"}


TABLE = "video,question,answer\na.mp4,Größe?,drei\nb.mp4,Wie\u2028viele?,zwei\n"


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("t.csv", TABLE, "utf-8-sig"),
        ("t.csv", TABLE.replace("\n", "\r\n"), "utf-16"),
        ("t.csv", TABLE.replace(",", ";"), "utf-8"),
        ("t.csv", "sep=;\n" + TABLE.replace(",", ";"), "utf-8"),
        ("t.csv", TABLE.replace(",", "\t"), "utf-16"),
        ("t.tsv", TABLE.replace(",", "\t"), "utf-8"),
        ("t.csv", TABLE.replace("video,question,answer", "Video, Question ,ANSWER"), "utf-8"),
        ("t.csv", TABLE.replace(",", " , ").replace("b.mp4", "  b.mp4"), "utf-8"),
        ("t.csv", TABLE.replace("Größe?", '"Größe?"').replace("video,", '"video",'), "utf-8"),
    ],
)
def test_tables_of_every_kind(name: str, text: str, encoding: str, tmp_path: Path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    rows = load_training_data(tmp_path / name)
    assert rows["problem"] == [None, None]
    said = [[part["text"] for m in row["messages"] for part in m["content"] if part["text"]] for row in rows]
    assert said == [["Größe?", "drei"], ["Wie\u2028viele?", "zwei"]]
    assert [Path(row["messages"][0]["content"][0]["video"]).name for row in rows] == ["a.mp4", "b.mp4"]


def test_a_table_in_another_encoding_is_refused_with_its_line(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(TABLE.replace("\u2028", " ").encode("cp1252"))
    with pytest.raises(ValueError, match=r"t.csv, line 2: the byte 0xf6 is not UTF-8"):
        load_training_data(tmp_path / "t.csv")
    lines = ["video,question,answer", *(f"a{n}.mp4,how many?,{n}" for n in range(50)), "a.mp4,Größe?,1"]
    (tmp_path / "late.csv").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match=r"late.csv, line 52: the byte 0xf6"):
        load_training_data(tmp_path / "late.csv")


def test_lines_in_another_encoding_or_nested_without_end_are_problems_of_their_own(tmp_path: Path):
    good = json.dumps({"video": "a.mp4", "question": "Q", "answer": "A"}).encode()
    odd = '{"video": "a.mp4", "question": "Größe", "answer": "A"}'.encode("latin-1")
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([good, odd, b"[" * 100_000, good]))
    found = load_training_data(tmp_path / "t.jsonl")["problem"]
    assert [bool(problem) for problem in found] == [False, True, True, False]
    assert "0xf6 is not UTF-8" in found[1]
    assert "nested too deeply" in found[2]


def test_half_characters_of_a_cut_emoji_do_not_stop_a_data_set(tmp_path: Path):
    row = {"video": "a.mp4", "question": "How \ud83d many?", "answer": "A\ud83d", "id": "x\ud83d"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (found,) = load_training_data(tmp_path / "t.jsonl")
    assert (found["problem"], found["id"]) == (None, "x\ufffd")
    assert "How \ufffd many?" in str(found["messages"])


@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_question_of_a_table_is_a_problem_of_its_row(place: int, tmp_path: Path):
    lines = ["a.mp4,Q,A", "a.mp4,Q,A"]
    lines[place] = "a.mp4,,A"
    (tmp_path / "t.csv").write_text("\n".join(["video,question,answer", *lines]))
    found = load_training_data(tmp_path / "t.csv")["problem"]
    assert [bool(problem) for problem in found] == [place == 0, place == 1]
    assert found[place].count("t.csv") == 1
    assert "question" in found[place]


def test_an_answer_before_every_question_is_left_out_as_llava_does(write_jsonl):
    turns = [{"from": who, "value": text} for who, text in (("gpt", "Hello!"), ("human", "Q"), ("gpt", "A"))]
    (row,) = load_training_data(write_jsonl([{"conversations": turns, "video": "a.mp4"}]))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"][0]["type"] == "video"


def test_spaces_around_a_question_and_its_answer_are_not_learnt(write_jsonl):
    (row,) = load_training_data(write_jsonl([{"video": "a.mp4", "question": " Q \n", "answer": " A "}]))
    assert [m["content"][-1]["text"] for m in row["messages"]] == ["Q", "A"]


def test_devices_and_addresses_of_files(tmp_path: Path):
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    with pytest.raises((ValueError, FileNotFoundError)):
        load_training_data(tmp_path / "zero.csv")
    (tmp_path / "my data.csv").write_text(TABLE)
    assert len(load_training_data((tmp_path / "my data.csv").as_uri())) == 2
