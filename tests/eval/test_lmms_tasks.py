"""The harness's unmodified tasks with our adapter: prompts, what is read, extraction and scores, counted by hand."""

import pytest

pytest.importorskip("lmms_eval")

from benchmark_fixtures import MVBENCH_FOLDERS

from video_ma2mba.eval.harness import evaluate_tasks, task_manager

VIDEO_TASKS = ["videomme", "videomme_w_subtitle", "longvideobench_val_v", "longvideobench_val_i", "mvbench"]
ANSWERS = {
    # Video-MME: 0.0 is right with A, 0.1 with B and so on; 2.2 (A) is answered wrongly.
    "Video-MME question 0.0": "A",
    "Video-MME question 0.1": "B.",
    "Video-MME question 0.2": "The best answer is C.",
    "Video-MME question 1.0": "(B)",
    "Video-MME question 1.1": "Answer: C",
    "Video-MME question 1.2": "D. The same.",
    "Video-MME question 2.0": "C",
    "Video-MME question 2.1": "D",
    "Video-MME question 2.2": "D",
    "LongVideoBench question 0": "A",
    "LongVideoBench question 1": "B. green",
    "LongVideoBench question 2": "The answer is C",
    "LongVideoBench question 3": "A",  # D is right
    **{f"MVBench {task} 0?": "(A) Left." for task in MVBENCH_FOLDERS},
    **{f"MVBench {task} 1?": "A" if task == "action_count" else "B" for task in MVBENCH_FOLDERS},  # B is right
}
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
)
OPTIONS = "A. Apples.\nB. Candles.\nC. Berries.\nD. The same.\n"


@pytest.mark.parametrize("interface", ["chat", "simple"])
def test_prompts_readings_and_scores(interface: str, in_bench, script, tiny_checkpoint, tmp_path):
    from video_ma2mba.eval.answer_log import read_rows
    from video_ma2mba.eval.lmms_adapter import VideoMa2mbaChat, VideoMa2mbaSimple

    asked = script(ANSWERS)
    kind = {"chat": VideoMa2mbaChat, "simple": VideoMa2mbaSimple}[interface]
    log = tmp_path / "answers.jsonl"
    model = kind(pretrained=str(tiny_checkpoint), device="cpu", fps=1, batch_size=4, answers=str(log))
    store = model.store
    results = evaluate_tasks(model, VIDEO_TASKS, task_manager(VIDEO_TASKS))

    scores = {name: value for name, value in results["results"].items()}
    assert scores["videomme"]["videomme_perception_score,none"] == pytest.approx(100 * 8 / 9)
    assert scores["videomme_w_subtitle"]["videomme_perception_score,none"] == pytest.approx(100 * 8 / 9)
    assert scores["longvideobench_val_v"]["lvb_acc,none"] == pytest.approx(0.75)
    assert scores["longvideobench_val_i"]["lvb_acc,none"] == pytest.approx(0.75)
    for task in MVBENCH_FOLDERS:
        expected = 50 if task == "action_count" else 100
        assert scores[f"mvbench_{task}"]["mvbench_accuracy,none"] == pytest.approx(expected), task

    texts = {entry.text for entry in asked}
    question = "Video-MME question 0.1?\n" + OPTIONS
    plain = INSTRUCTION + question + "\nAnswer with the option's letter from the given choices directly."
    subtitled = "This video's subtitles are listed below: \nGood morning.\n" + INSTRUCTION + question
    assert _prompt(plain) in texts
    assert _prompt(subtitled + "The best answer is:") in texts
    unsubtitled = subtitled.replace("Good morning.", "No subtitles available").replace("0.1", "1.1")
    assert _prompt(unsubtitled + "The best answer is:") in texts
    options = "LongVideoBench question 2?\nA. red\nB. green\nC. blue\nD. white\n"
    ending = "Answer with the option's letter from the given choices directly.\n"
    assert _prompt(options + ending) in texts
    assert _prompt("A line.\n" + options + ending) in texts  # frames stand before all text
    mvbench = "Question:MVBench state_change 1?\nOption:\n(A) Left.\n(B) Right.\n(C) Nowhere.\n"
    assert _prompt(mvbench + "Only give the best option.\n") in texts

    # Each file is read once, for both Video-MME tasks; LongVideoBench's pictures come decoded and are read as such.
    assert len(asked) == 9 + 9 + 4 + 4 + 40
    assert store.tally.videos_read == 3 + 4 + 4 + 20
    frames = {entry.video.split("/")[-1]: entry.frames for entry in asked}
    assert [frames[f"vmm{place}.mp4"] for place in range(3)] == [2, 4, 6]
    assert [entry.frames for entry in asked if "episodic_reasoning" in entry.text] == [3, 3]  # 9 pictures, 3 a second
    assert len(read_rows(log)) == len(asked)
    assert {entry.settings["max_new_tokens"] for entry in asked} == {16, 32}
    assert all(entry.settings["do_sample"] is False and "temperature" not in entry.settings for entry in asked)


def _prompt(question: str) -> str:
    return f"\n{question}<|endoftext|><|assistant|>"


def test_the_entry_point_brings_both_interfaces():
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    assert {"video_ma2mba", "video_ma2mba_replay"} <= set(MODEL_REGISTRY_V2.list_model_names())
    assert get_model("video_ma2mba").is_simple is False
    assert get_model("video_ma2mba", force_simple=True).is_simple is True
    with pytest.raises(TypeError, match="frames_per_second"):
        get_model("video_ma2mba").create_from_arg_string("frames_per_second=2")
