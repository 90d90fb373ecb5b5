"""What rounding a state to 16 bits changes: answers of a trained model on unseen rendered videos, and file sizes.

    python benchmarks/state_rounding.py --videos 100 --frames 8..64 256 --out benchmarks/results/state_rounding.csv

Each video is read once; its state is saved in fp32, bf16 and fp16, loaded again, and asked all questions (greedy). A
row counts how many answers differ from those of the fp32 state and how many are right, beside the file's size and the
rounding's relative size. The last rows also keep the state in bf16 between the tokens of the answer.
"""

import argparse
import datetime
import tempfile
from pathlib import Path

import torch
from result_tables import row_writer

from video_ma2mba import BUNDLED_CHECKPOINT, VideoMa2mbaProcessor, VideoState
from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids
from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.world import KINDS, WorldDataset, parse_frames
from video_ma2mba.world.scoring import LONGEST_ANSWER, read_videos

# name, dtype of the file, dtype between tokens (None: the usual way), tokens between two roundings
WAYS = [
    ("file fp32", None, None, 1),
    ("file bf16", torch.bfloat16, None, 1),
    ("file fp16", torch.float16, None, 1),
    ("decoding bf16, every token", None, torch.bfloat16, 1),
    ("decoding bf16, every 16", None, torch.bfloat16, 16),
]
FIELDS = ["hardware", "date", "frames", "way", "videos", "questions", "right", "changed", "file_bytes", "state_error"]


@torch.inference_mode()
def answer(model, processor, state: VideoState, questions, way) -> list[str]:
    """Greedy answers to all questions from one state."""
    _, _, between, slots = way
    prompts = [question_ids(processor, question.text)[0].tolist() for question in questions]
    longest, pad = max(map(len, prompts)), processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    mask = torch.cat([torch.ones(len(prompts), state.seen_tokens, dtype=torch.long), mask], dim=1)
    state = state.fork()
    state.batch_repeat_interleave(len(prompts))
    model.decode_state_dtype, model.decode_slots = between or torch.float32, slots
    with force_decoding("eager" if between is None else "steps"):
        found = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=state, max_new_tokens=LONGEST_ANSWER, do_sample=False
        )
    return processor.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)


def measure(model, processor, frames: str, videos: int) -> list[dict]:
    data = WorldDataset("test", videos, frames=parse_frames(frames), questions=len(KINDS), seed=7)
    rows = [
        dict.fromkeys(("questions", "right", "changed", "file_bytes"), 0) | {"state_error": 0.0, "way": way[0]}
        for way in WAYS
    ]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(videos):
            sample = data.sample(index)
            with torch.inference_mode():
                read = read_videos(model, processor, [sample], [1])
            expected = None
            for row, way in zip(rows, WAYS, strict=True):
                file = Path(folder) / "film.state"
                read.save(file, way[1])
                state = VideoState.load(file)
                given = answer(model, processor, state, sample.questions, way)
                expected = expected or given
                row["questions"] += len(given)
                row["right"] += sum(a.strip() == q.answer for a, q in zip(given, sample.questions, strict=True))
                row["changed"] += sum(a != b for a, b in zip(given, expected, strict=True))
                row["file_bytes"] = file.stat().st_size
                row["state_error"] += ((state.ssm - read.ssm).norm() / read.ssm.norm()).item() / videos
    about = {"hardware": f"CPU, {torch.get_num_threads()} threads", "date": datetime.date.today().isoformat()}
    return [
        about | {"frames": frames, "videos": videos} | row | {"state_error": f"{row['state_error']:.1e}"}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--frames", nargs="+", default=["8..64", "256"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/state_rounding.csv"))
    arguments = parser.parse_args()
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(arguments.model)
    write = row_writer(arguments.out, FIELDS)
    for frames in arguments.frames:
        for row in measure(model, processor, frames, arguments.videos):
            write(row)


if __name__ == "__main__":
    main()
