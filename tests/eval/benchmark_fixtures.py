"""Small local copies of the paper's benchmarks, in the schemas of their Hub data sets, with videos of our own.

Each video shows the answer to nothing: answers come from a script (`ScriptedPipeline`), so scores can be counted by
hand. What is real: the harness, its unmodified tasks, our adapter, and the reading of every video by a tiny model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from video_ma2mba.world.video_files import write_video

MVBENCH_FOLDERS = {  # task: folder of its videos, as the harness's task file has them
    "action_sequence": "star/Charades_segment",
    "moving_count": "clevrer/video_validation",
    "action_prediction": "star/Charades_segment",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "scene_transition": "scene_qa/video",
    "object_shuffle": "perception/videos",
    "object_existence": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "unexpected_action": "FunQA_test/test",
    "moving_direction": "clevrer/video_validation",
    "state_change": "perception/videos",
    "object_interaction": "star/Charades_segment",
    "character_order": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "counterfactual_inference": "clevrer/video_validation",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "moving_attribute": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
}
DURATIONS = ("short", "medium", "long")
LVB_GROUPS = (15, 60, 600, 3600)


def video(path: Path, seconds: int, level: int = 0) -> None:
    """A video of 2 frames a second, 32 x 32 pixels, that differs from others by `level`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((2 * seconds, 32, 32, 3), 40 + 20 * (level % 10), np.uint8)
    frames[:, 4:12, 4:12, level % 3] = 250
    write_video(path, [frames], fps=2.0)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def build(root: Path) -> Path:
    """Write all of it below `root`: data sets beside each other, videos in `root/hf_home`."""
    _videomme(root)
    _longvideobench(root)
    _mvbench(root)
    _activitynet(root)
    _videochatgpt(root)
    _newer(root)
    _timed(root)
    return root


def _videomme(root: Path) -> None:
    rows = []
    for place, duration in enumerate(DURATIONS):
        name = f"vmm{place}"
        video(root / f"hf_home/videomme/data/{name}.mp4", 2 + 2 * place, place)
        for number in range(3):
            rows.append(
                {
                    "video_id": f"{place:03d}",
                    "duration": duration,
                    "domain": "Knowledge",
                    "sub_category": "Geography",
                    "url": f"https://www.youtube.com/watch?v={name}",
                    "videoID": name,
                    "question_id": f"{place:03d}-{number + 1}",
                    "task_type": "Counting Problem",
                    "question": f"Video-MME question {place}.{number}?",
                    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The same."],
                    "answer": "ABCD"[(place + number) % 4],
                }
            )
    parquet(root / "lmms-eval/Video-MME/videomme/test-00000-of-00001.parquet", rows)
    subtitles = root / "hf_home/videomme/subtitle/vmm0.srt"
    subtitles.parent.mkdir(parents=True, exist_ok=True)
    subtitles.write_text(
        '1\n00:00:00,000 --> 00:00:01,500\n<font color="white" size=".72c">Good morning.</font>\n\n', encoding="utf-8"
    )


def _longvideobench(root: Path) -> None:
    home = root / "hf_home/datasets/longvideobench"
    rows = []
    for place, group in enumerate(LVB_GROUPS):
        name = f"lvb{place}"
        video(home / f"videos/{name}.mp4", 4, 3 + place)
        (home / "subtitles").mkdir(parents=True, exist_ok=True)
        lines = [{"start": "00:00:00.000", "end": "00:00:02.000", "line": "A line."}]
        (home / f"subtitles/{name}_en.json").write_text(json.dumps(lines))
        rows.append(
            {
                "video_id": name,
                "id": f"{name}_0",
                "video_path": f"{name}.mp4",
                "subtitle_path": f"{name}_en.json",
                "correct_choice": place,
                "question": f"LongVideoBench question {place}?",
                "option0": "red",
                "option1": "green",
                "option2": "blue",
                "option3": "white",
                "option4": "N/A",
                "duration": 4.0,
                "duration_group": group,
                "question_category": "T3E",
                "topic_category": "KC-Knowledge-Computer-Science",
                "starting_timestamp_for_subtitles": 0,
            }
        )
    folder = root / "longvideobench/LongVideoBench"
    parquet(folder / "validation-00000-of-00001.parquet", rows)
    parquet(folder / "test-00000-of-00001.parquet", [{**row, "correct_choice": -1} for row in rows])


def _mvbench(root: Path) -> None:
    folder, configs = root / "OpenGVLab/MVBench", []
    for place, (task, place_of_videos) in enumerate(MVBENCH_FOLDERS.items()):
        target = root / "hf_home/mvbench_video" / place_of_videos
        if task == "episodic_reasoning":  # folders of pictures, 3 a second
            name = "episode"
            (target / name).mkdir(parents=True)
            for number in range(9):
                Image.new("RGB", (32, 32), (25 * number, 60, 60)).save(target / name / f"{number + 1:05d}.jpg")
        else:
            name = f"{task}.mp4"
            video(target / name, 2, place)
        rows = [
            {
                "video": name,
                "question": f"MVBench {task} {number}?",
                "candidates": ["Left.", "Right.", "Nowhere."],
                "answer": ["Left.", "Right."][number],
            }
            for number in range(2)
        ]
        (folder / "json").mkdir(parents=True, exist_ok=True)
        (folder / f"json/{task}.json").write_text(json.dumps(rows))
        configs.append(f"- config_name: {task}\n  data_files:\n  - split: train\n    path: json/{task}.json\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")


def _activitynet(root: Path) -> None:
    rows = []
    for number in range(4):
        name = f"anet{number // 2}"
        video(root / f"hf_home/activitynetqa/all_test/v_{name}.mp4", 3, 5 + number // 2)
        rows.append(
            {
                "video_name": name,
                "question_id": f"{name}_{number}",
                "question": f"activitynet question {number}",
                "answer": ["yes", "no", "two", "red"][number],
                "type": str(number),
            }
        )
    parquet(root / "lmms-eval/ActivityNetQA/data/test-00000-of-00001.parquet", rows)


def _videochatgpt(root: Path) -> None:
    folder, configs = root / "lmms-eval/VideoChatGPT", []
    names = [f"vcg{number}" for number in range(3)]
    for place, name in enumerate(names):
        video(root / f"hf_home/videochatgpt/Test_Videos/{name}.mp4", 3, 7 + place)
    for kind in ("Generic", "Temporal"):
        rows = [
            {"video_name": name, "question": f"{kind} question {place}?", "answer": f"{kind} answer {place}"}
            for place, name in enumerate(names)
        ]
        parquet(folder / f"{kind}/test-00000-of-00001.parquet", rows)
    pairs = []
    for place, name in enumerate(names):
        for number in (1, 2):
            asked = {f"question_{n}": f"Consistency {place}.{n}?" if n == number else "None" for n in (1, 2)}
            pairs.append({"video_name": name, **asked, "answer": f"Consistency answer {place}"})
    parquet(folder / "Consistency/test-00000-of-00001.parquet", pairs)
    for kind in ("Generic", "Temporal", "Consistency"):
        configs.append(f"- config_name: {kind}\n  data_files:\n  - split: test\n    path: {kind}/*.parquet\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")


def _newer(root: Path) -> None:
    """LVBench, MLVU, LongTimeScope and Video-MME-v2: four questions each, answered A, B, C and D, about two videos."""
    tables: dict[str, list[dict[str, Any]]] = {"lvbench": [], "mlvu": [], "longtimescope": [], "videomme_v2": []}
    for number, letter in enumerate("ABCD"):
        name, asked = f"long{number // 2}.mp4", f"newer question {number}?"
        tables["lvbench"].append({"video_path": name, "question": asked, "answer": letter})
        kind = ("ego", "ego", "ego", "needle")[number]
        tables["mlvu"].append({"video_name": name, "question": asked, "answer": letter, "task_type": kind})
        row = {"id": f"{number}", "type": "QA", "length": 60 if number < 2 else 600, "video": name, "input": asked}
        tables["longtimescope"].append({**row, "answer": letter})
        row = {"video_id": "long0", "question_id": f"001-{number + 1}", "question": asked, "answer": letter}
        row |= {"options": "A. a\nB. b\nC. c\nD. d", "group_type": "relevance", "group_structure": "", "level": 1}
        tables["videomme_v2"].append({**row, "second_head": "x", "third_head": "y"})
    places = {"lvbench": ("lmms-eval/LVBench", "train"), "mlvu": ("sy1998/MLVU_dev", "test")}
    places |= {"longtimescope": ("Apollo-LMMs/LongTimeScope2", "test")}
    places |= {"videomme_v2": ("MME-Benchmarks/Video-MME-v2", "test")}
    for home, (dataset, split) in places.items():
        parquet(root / dataset / f"data/{split}-00000-of-00001.parquet", tables[home])
        for place in range(2):
            video(root / f"hf_home/{home}/long{place}.mp4", 4, place)


def _timed(root: Path) -> None:
    """ExtremeWhenBench, TimeLens and OVO-Bench: spans asked of videos, and questions asked as they go on."""
    spans = [(1.0, 3.0), (0.0, 2.0)]
    rows = [
        {"qid": f"q{n}", "source_corpus": "LVBench", "video_id": f"long{n}", "question": f"Span question {n}?",
         "correct_interval": list(span), "video_duration_s": 4.0}
        for n, span in enumerate(spans)
    ]  # fmt: skip
    parquet(root / "min1321/extreme-when-bench/data/test-00000-of-00001.parquet", rows)
    configs = []
    for split in ("activitynet", "charades", "qvhighlights"):
        video(root / f"hf_home/timelens/{split}/clip.mp4", 4, 2)
        row = {"video_path": f"{split}/clip.mp4", "query": f"{split} event", "span": [[1.0, 3.0]]}
        parquet(root / f"kcz358/timelens/{split}.parquet", [row])
        configs.append(f"  - split: {split}\n    path: {split}.parquet\n")
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (root / "kcz358/timelens/README.md").write_text(head + "".join(configs) + "---\n")
    chosen = {"question": "", "options": [""], "gt": 0}
    tables = {
        "backward": [{"id": 1, "task": "EPM", "question": "ovo backward?", "options": ["a", "b"], "gt": 1}],
        "realtime": [{"id": 2, "task": "OCR", "question": "ovo realtime?", "options": ["a", "b"], "gt": 0}],
        "forward": [
            {"id": 3, "task": "SSR", **chosen, "test_info": [{"step": f"ovo step {n}", "type": n} for n in range(2)]}
        ],
    }
    configs = []
    for name, table in tables.items():
        parquet(root / f"kcz358/OVOBench/{name}/test-00000-of-00001.parquet", table)
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/*.parquet\n")
    (root / "kcz358/OVOBench/README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    for place, name in enumerate(("1", "2", "3_0", "3_1")):
        video(root / f"hf_home/ovobench/chunked_videos/{name}.mp4", 2 + place, place)
